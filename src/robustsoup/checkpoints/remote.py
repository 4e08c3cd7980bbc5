"""Checkpoints of other places, such as hf://ORG/NAME or s3://BUCKET/FILE, copied into the cache.

A copy is made only where a user names such an address, and used without a connection from then on,
until `robustsoup fetch` asks for it again or `robustsoup doctor --prune` removes it. Each file is
compared with what its place says about it when it is copied, and with its own digest at every use.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from robustsoup.checkpoints.formats import read_checkpoint
from robustsoup.checkpoints.hub import copy_from_hub
from robustsoup.checkpoints.transfers import (
    DownloadProgress,
    Transfer,
    copy_from_path,
    show_address,
)
from robustsoup.digests import FileDigest, digest_folder, digest_json, find_damaged_file
from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError, DownloadError, RobustsoupError, StorageError
from robustsoup.files import cache_folder, one_at_a_time, write_text
from robustsoup.paths import user_path

RECORD = "source.json"
"""File of a copy's folder that says where it came from, with the digest of each file."""

_ADDRESS = re.compile(r"([a-z][a-z0-9+]+):/{1,3}([^/].*)")
_DIGEST = re.compile(r"sha256[=:]([0-9a-f]{64})", re.IGNORECASE)
_LOOKS_LIKE_A_DIGEST = re.compile(r"(sha|md)[-_]?[0-9]*[=:].*|[0-9a-f]{32,}", re.IGNORECASE)


@dataclass(frozen=True)
class RemoteCopy:
    """A checkpoint of another place, on this machine.

    Attributes:
        folder: The folder of the copy in the cache.
        main: Name of the checkpoint in it.
        address: Where it came from.
        files: The digest of each copied file, by its name in the folder.
        revision: The commit of the hub; None elsewhere.
    """

    folder: Path
    main: str
    address: str
    files: dict[str, FileDigest]
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The checkpoint in the cache."""
        return self.folder / self.main

    @property
    def sha256(self) -> str:
        """Digest of the checkpoint's file (hex)."""
        return self.files[self.main].sha256


def remote_address(place: str | os.PathLike[str]) -> str | None:
    """Return the address that a path spells; None for a path of this machine.

    `Path` turns the two slashes of an address into one; they are restored.
    """
    text = os.fspath(place) if isinstance(place, str) else Path(place).as_posix()
    found = _ADDRESS.fullmatch(text)
    # Unlike Path.exists, this takes text that is too long for a path.
    if found is None or os.path.exists(text):  # noqa: PTH110
        return None
    slashes = ":///" if found[1] == "file" else "://"
    return f"{found[1]}{slashes}{found[2]}"


def copies_folder() -> Path:
    """Return the folder of the copies, one folder in it for each address."""
    return cache_folder() / "checkpoints"


def local_path(place: str | os.PathLike[str]) -> Path:
    """Return a path of this machine: the path itself, or the copy of an address.

    Raises:
        DownloadError: The address cannot be read.
        CheckpointError: It holds no checkpoint, or a library that it needs is missing.
    """
    address = remote_address(place)
    return user_path(place) if address is None else copy_remote(address).path


def copy_remote(
    address: str, *, again: bool = False, on_transfer: DownloadProgress | None = None
) -> RemoteCopy:
    """Return the copy of a remote checkpoint; make it first if there is none, or a damaged one.

    What a killed copy left is continued where the source allows it, and begun again elsewhere.

    Args:
        address: hf://ORG/NAME[@REVISION][/FILE], or SCHEME://PLACE as fsspec knows it;
            "#sha256=DIGEST" at its end demands a content.
        again: Copy it again even if there is a copy.
        on_transfer: Called with (done, total) in bytes.

    Raises:
        DownloadError: The address cannot be read, or the content is not what its place says.
        CheckpointError: It holds no checkpoint, or a library that it needs is missing.
        StorageError: The copy cannot be written.
    """
    address = _with_plain_digest(address)
    folder = _folder_of(address)
    if not again and (copy := _find_copy(folder, address)) is not None:
        return copy
    partial = folder.with_name(f"{folder.name}.partial")
    with one_at_a_time(partial):  # another process may have copied it meanwhile
        if not again and (copy := _find_copy(folder, address)) is not None:
            return copy
        try:
            partial.mkdir(parents=True, exist_ok=True)
            _fill_folder(partial, address, on_transfer)
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        except OSError as error:
            raise StorageError(
                f"{show_address(address)}: cannot be copied to {folder}: {error.strerror or error}"
            ) from error
        finally:
            if not any(path.is_file() for path in partial.rglob("*")):
                shutil.rmtree(partial, ignore_errors=True)
    copy = _find_copy(folder, address)
    if copy is None:
        raise StorageError(f"{folder}: was removed by another program; run the command again")
    return copy


def has_copy(address: str) -> bool:
    """Return whether a complete and undamaged copy of an address is in the cache."""
    address = _with_plain_digest(address)
    return _find_copy(_folder_of(address), address) is not None


def _folder_of(address: str) -> Path:
    return copies_folder() / hashlib.sha256(address.encode()).hexdigest()[:32]


def find_copy_of(path: Path) -> RemoteCopy | None:
    """Return the copy that a path in the cache belongs to; None for other paths."""
    for folder in path.parents:
        if folder.parent == copies_folder():
            return _find_copy(folder, None)
    return None


def _find_copy(folder: Path, address: str | None) -> RemoteCopy | None:
    """Return the complete and undamaged copy in a folder; None if there is none."""
    try:
        content = read_json(folder / RECORD)
        if content.pop("digest") != digest_json(content):
            return None
        files = {name: FileDigest.from_json(item) for name, item in content["files"].items()}
        copy = RemoteCopy(
            folder, content["main"], content["address"], files, content.get("revision")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if address not in (None, copy.address) or copy.main not in files:
        return None
    return None if find_damaged_file(folder, files) else copy


def _fill_folder(folder: Path, address: str, on_transfer: DownloadProgress | None) -> None:
    """Copy the files of an address into a folder, check them, and write the record."""
    place, demanded = _split_digest(address)
    within = _name_folder(place)
    (folder / within).mkdir(exist_ok=True)
    copy_files = copy_from_hub if place.startswith("hf://") else copy_from_path
    transfer = copy_files(place, folder / within, on_transfer)
    try:
        _check_content(folder / within, transfer, demanded, show_address(place))
    except RobustsoupError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    digests, names = digest_folder(folder), [f"{within}/{name}" for name in transfer.files]
    record = {
        "address": address,
        "main": f"{within}/{transfer.main}",
        "revision": transfer.revision,
        "files": {name: digests[name].to_json() for name in names},
    }
    record["digest"] = digest_json(record)
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _split_digest(address: str) -> tuple[str, str | None]:
    """Split an address into the place and the sha256 (hex) that it demands; None without one.

    Elsewhere than on the web, other text after a "#" belongs to the name of a file.

    Raises:
        CheckpointError: The end of the address is no such digest, and would not be checked.
    """
    place, mark, end = address.rpartition("#")
    digest = _DIGEST.fullmatch(end)
    if mark and digest:
        return place, digest[1].lower()
    is_web = address.startswith(("http://", "https://", "hf://"))
    if mark and (is_web or _LOOKS_LIKE_A_DIGEST.fullmatch(end)):
        raise CheckpointError(
            f'{show_address(place)}: got "#{end}" at the end of the address, expected "#sha256=" '
            "and 64 hexadecimal digits"
        )
    return address, None


def _with_plain_digest(address: str) -> str:
    """Return an address with the demanded digest spelled as one of our own."""
    place, demanded = _split_digest(address)
    return place if demanded is None else f"{place}#sha256={demanded}"


def _name_folder(place: str) -> str:
    """Return a name for the folder of a checkpoint: many repositories call theirs "model"."""
    parts = show_address(place).partition("://")[2].split("/")
    name = (
        parts[1].partition("@")[0] if place.startswith("hf://") else parts[max(len(parts) - 2, 0)]
    )
    return re.sub(r"[^\w.+-]", "_", name).strip(".")[:60] or "checkpoint"


def _check_content(folder: Path, transfer: Transfer, sha256: str | None, place: str) -> None:
    """Compare a copy with a demanded digest, and read it once: no login page stays in the cache.

    Raises:
        DownloadError: It has another digest.
        CheckpointError: It is no checkpoint.
    """
    path = folder / transfer.main
    got = FileDigest.of(path).sha256
    if sha256 not in (None, got):
        raise DownloadError(f"{place}: got sha256 {got}, expected {sha256}, as the address says")
    try:
        read_checkpoint(path, mapped=True)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), place)) from None
