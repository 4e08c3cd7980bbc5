"""The Hugging Face Hub: addresses of its repositories, and checkpoints copied from them."""

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from robustsoup.checkpoints.transfers import (
    INSTALL_LINES,
    DownloadProgress,
    Transfer,
    choose_file,
    copy_with_companions,
)
from robustsoup.errors import CheckpointError, DownloadError, RequestError, RobustsoupError
from robustsoup.files import remove_file
from robustsoup.printable import first_line

if TYPE_CHECKING:
    from types import ModuleType

_HUB_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"(/(?P<file>.+))?",
    re.ASCII,
)
_BLOCK = 2**24


@dataclass(frozen=True)
class HubAddress:
    """A parsed hf://ORG/NAME[@REVISION][/FILE].

    Attributes:
        repo: ORG/NAME.
        revision: A branch, tag or commit; None for the default branch. An address spells a slash
            in it as %2F, except that of refs/pr/NUMBER and refs/convert/NAME.
        file: A file of the repository; None if the address names none.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, address: str) -> "HubAddress":
        """Parse an address.

        Raises:
            CheckpointError: It is spelled otherwise.
        """
        found = _HUB_ADDRESS.fullmatch(address)
        if found is None or ".." in (found["file"] or "").split("/"):
            raise CheckpointError(f"{address}: expected hf://ORG/NAME[@REVISION][/FILE]")
        revision = found["revision"] and unquote(found["revision"])
        return cls(found["repo"], revision, found["file"])


def import_hub(address: str) -> "ModuleType":
    """Import huggingface_hub, without its progress bars' noise where nobody watches.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{address}: huggingface_hub is not installed; {INSTALL_LINES['hf']}"
        ) from None
    return huggingface_hub


def copy_from_hub(address: str, folder: Path, _on_transfer: DownloadProgress | None) -> Transfer:
    """Copy a checkpoint of the Hugging Face Hub; its library shows its own progress.

    The files of one commit are taken, and each is compared with the digest that the hub states.

    Raises:
        DownloadError: The hub does not give a file, or gives another content.
        CheckpointError: huggingface_hub is not installed, or the repository holds no checkpoint.
    """
    hub, parsed = import_hub(address), HubAddress.parse(address)
    try:
        main, revision = parsed.file, parsed.revision
        if main is None:
            names = hub.HfApi().list_repo_files(parsed.repo, revision=revision)
            main = choose_file(names, address)
        etags: dict[str, str | None] = {}

        def copy(name: str) -> Path:
            nonlocal revision
            url = hub.hf_hub_url(parsed.repo, name, revision=revision)
            metadata = hub.get_hf_file_metadata(url)
            revision, etags[name] = metadata.commit_hash or revision, metadata.etag
            path = hub.hf_hub_download(parsed.repo, name, revision=revision, local_dir=folder)
            return Path(path)

        names = copy_with_companions(main, copy)
    except (CheckpointError, DownloadError):
        raise
    except Exception as error:  # what the library raises depends on its HTTP library
        raise DownloadError(f"{address}: {describe_hub_error(error)}") from None
    for name in names:
        _check_etag(folder / name, etags[name], f"hf://{parsed.repo}/{name}")
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return Transfer(main, names, revision)


def push_to_hub(
    target: HubAddress, files: Mapping[str, Path | bytes], *, private: bool, message: str
) -> str:
    """Write files into a repository of the hub, in one commit; the repository is made if needed.

    Args:
        target: The repository, and its branch.
        files: A file, or its content, by its name in the repository.
        private: Whether nobody else may see the repository.
        message: First line of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: huggingface_hub is not installed.
        RequestError: The repository exists and is public, and `private` is set.
        DownloadError: The hub refuses.
    """
    hub = import_hub(f"hf://{target.repo}")
    try:
        api = hub.HfApi()
        api.create_repo(target.repo, private=private, exist_ok=True)
        if private and api.repo_info(target.repo).private is False:
            raise RequestError(
                f"hf://{target.repo}: the repository exists and is public; make it private on its "
                "page, or push without --private"
            )
        operations = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(
            target.repo, operations, commit_message=message, revision=target.revision
        )
    except RobustsoupError:
        raise
    except Exception as error:  # what the library raises depends on its HTTP library
        raise DownloadError(f"hf://{target.repo}: {describe_hub_error(error)}") from None
    return str(commit.commit_url)


def describe_hub_error(error: Exception) -> str:
    """Return an error of huggingface_hub in one line, with what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    for kind, text in (
        ("GatedRepoError", "the repository is gated: accept its terms on its page, and log in"),
        (
            "RepositoryNotFoundError",
            "no such repository, or it is private: log in with `hf auth login`, or set HF_TOKEN",
        ),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
        ("EntryNotFoundError", "no such file in the repository"),
        ("LocalTokenNotFoundError", "no token: log in with `hf auth login`, or set HF_TOKEN"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set"),
    ):
        if kind in kinds:
            return text
    if status in (401, 403):
        return (
            f"the hub answered {status}: log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may do this"
        )
    return f"the hub cannot be used: {first_line(error)}"


def _check_etag(path: Path, etag: str | None, place: str) -> None:
    """Compare a file with its ETag on the hub: a sha256, or the name of a blob of Git (sha1).

    Raises:
        DownloadError: The content is another one; the file is removed.
    """
    lengths = {64: hashlib.sha256(), 40: hashlib.sha1(f"blob {path.stat().st_size}\0".encode())}
    digest = lengths.get(len(etag or ""))
    if digest is None or not re.fullmatch("[0-9a-f]+", etag or ""):
        return
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != etag:
        remove_file(path)
        raise DownloadError(
            f"{place}: got a content with digest {digest.hexdigest()}, the hub states {etag}; "
            "try again"
        )
