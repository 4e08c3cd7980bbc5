"""Published robust checkpoints: downloaded once and verified before use."""

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import data_root
from robustsoup.data.download import DownloadProgress, FileKind, download
from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError, DataError, ModelError, RequestError
from robustsoup.files import atomic_path, open_regular, write_text
from robustsoup.models import load_model

TORCH_SAVE = FileKind("a file of torch.save", (b"PK\x03\x04", b"\x80"))
"""A zip archive, or a pickle from before PyTorch 1.6."""
SIGNATURE_BYTES = 15


@dataclass(frozen=True)
class Published:
    """A checkpoint of RobustBench's CIFAR-10 model zoo; no digest of these files is published.

    Attributes:
        drive_id: The file on Google Drive.
        model: The network, as `load_model` takes it.
        threat: The threat model that the checkpoint was trained for.
        mirror: The authors' own copy.
    """

    drive_id: str
    model: str
    threat: str = "Linf 8/255"
    mirror: str | None = None

    @property
    def url(self) -> str:
        """The address of the file itself, which skips the page about the virus scan."""
        return (
            "https://drive.usercontent.google.com/download"
            f"?id={self.drive_id}&export=download&confirm=t"
        )

    @property
    def page(self) -> str:
        """The pages that offer the file, for error messages."""
        page = f"https://drive.google.com/file/d/{self.drive_id}/view"
        return f"{page} or {self.mirror}" if self.mirror else page


WANG_MIRROR = "https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/checkpoint"
PUBLISHED_CHECKPOINTS: dict[str, Published] = {
    "Gowal2021Improving_28_10_ddpm_100m": Published(
        "12L8YE6VBgUDKyW6GMSNefSYj2gg4LEKx", "wide_resnet"
    ),
    "Gowal2021Improving_R18_ddpm_100m": Published(
        "1-0EuCJashqSXEkkd1DOzFA4tH8KL2kim", "preact_resnet18"
    ),
    "Wang2023Better_WRN-28-10": Published(
        "1-6MYKJdECDVGaWjj6GgqvaT95BGKhUvI",
        "wide_resnet",
        mirror=f"{WANG_MIRROR}/cifar10_linf_wrn28-10.pt",
    ),
    "L2/Wang2023Better_WRN-28-10": Published(
        "1-fwKiJXEqHHUngt8wKsNnHuD4vAPvPXC",
        "wide_resnet",
        "L2 0.5",
        f"{WANG_MIRROR}/cifar10_l2_wrn28-10.pt",
    ),
}
"""Source: robustbench 1.1.1, model_zoo/cifar10.py; README of github.com/wzekai99/DM-Improves-AT."""


@dataclass(frozen=True)
class Fetched:
    """A published checkpoint on this machine.

    Attributes:
        path: The file.
        published: Its description.
        sha256: Digest of the file (hex).
        first_seen: Whether the digest was recorded by this call; no earlier record confirms it.
    """

    path: Path
    published: Published
    sha256: str
    first_seen: bool


@dataclass(frozen=True)
class ExpectedDigest:
    """A sha256 (hex) that a file must have, and its origin as the end of a sentence."""

    sha256: str
    origin: str


def fetch_published(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    sha256: str | None = None,
    url: str | None = None,
    on_progress: DownloadProgress | None = None,
) -> Fetched:
    """Return a published checkpoint under data_root(root); download it if it is absent.

    The file must have the digest `sha256`, if given, and the digest recorded beside it
    (NAME.pt.json) when it was first fetched, and must load with weights_only=True into its network.
    A file that the user put there is accepted if it passes these checks. After a failure, no
    new file exists under the final name.

    Args:
        name: A key of PUBLISHED_CHECKPOINTS.
        root: see `data_root`.
        sha256: The expected digest, 64 hexadecimal digits.
        url: Another address of the file.
        on_progress: Called with (done, total) in bytes.

    Raises:
        RequestError: The name is unknown or `sha256` is not a digest.
        DataError: The file cannot be downloaded or has another digest.
        CheckpointError: The file does not fit the network.
        StorageError: The file cannot be written.
    """
    published, path = _look_up_published(name), published_path(name, root)
    expected = _expected_digests(path, sha256)
    if path.exists():
        source = str(path)
        advice = f"delete it and fetch again, or see {published.page}"
        digest = _verify_published(path, published, expected, source, advice)
    else:
        source = url or published.url
        advice = f"try again later, or save the file from {published.page} as {path}"
        with atomic_path(path) as temporary:
            download(source, temporary, kind=TORCH_SAVE, advice=advice, on_progress=on_progress)
            digest = _verify_published(temporary, published, expected, source, advice)
    first_seen = not _digest_record_path(path).is_file()
    if first_seen:
        size = path.stat().st_size
        record = {"name": name, "from": source, "sha256": digest, "bytes": size}
        write_text(_digest_record_path(path), json.dumps(record, indent=1) + "\n")
    return Fetched(path, published, digest, first_seen)


def published_path(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Return the place of a published checkpoint under data_root(root), fetched or not.

    Raises:
        RequestError: The name is unknown.
    """
    _look_up_published(name)
    key = name if "/" in name else f"Linf/{name}"
    return data_root(root) / "robustbench" / "cifar10" / f"{key}.pt"


def _look_up_published(name: str) -> Published:
    if name not in PUBLISHED_CHECKPOINTS:
        close = difflib.get_close_matches(name, PUBLISHED_CHECKPOINTS, 1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        names = ", ".join(PUBLISHED_CHECKPOINTS)
        raise RequestError(f'robustbench: got "{name}", expected one of {names}{hint}')
    return PUBLISHED_CHECKPOINTS[name]


def _digest_record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _expected_digests(path: Path, sha256: str | None) -> list[ExpectedDigest]:
    """Return the digest recorded beside the file, if any, and the requested one, if any."""
    expected: list[ExpectedDigest] = []
    record_path = _digest_record_path(path)
    if record_path.is_file():
        try:
            recorded = str(read_json(record_path, 10_000)["sha256"])
        except (ValueError, KeyError, TypeError, OSError):
            raise DataError(
                f"{record_path}: not a record of a digest; delete it and fetch again"
            ) from None
        expected.append(ExpectedDigest(recorded, f"recorded in {record_path}"))
    if sha256 is not None:
        requested = sha256.strip().lower().removeprefix("sha256:")
        if len(requested) != 64 or set(requested) - set("0123456789abcdef"):
            raise RequestError(f'--sha256: got "{sha256}", expected 64 hexadecimal digits')
        expected.append(ExpectedDigest(requested, "as requested"))
    return expected


def _verify_published(
    file: Path, published: Published, expected: list[ExpectedDigest], where: str, advice: str
) -> str:
    """Check a file's kind, digests and network, and return its sha256 (hex).

    Args:
        file: The file to read.
        published: Its description.
        expected: The digests that it must have.
        where: Names the file in errors.
        advice: Ends the errors.

    Raises:
        DataError: The file cannot be read, or has another kind or digest.
        CheckpointError: The file does not fit the network.
    """
    try:
        with open_regular(file) as opened:
            start = opened.read(SIGNATURE_BYTES)
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); {advice}") from error
    if not start.startswith(TORCH_SAVE.signatures):
        raise DataError(f"{where}: starts with {start!r}, expected {TORCH_SAVE.name}; {advice}")
    for required in expected:
        if required.sha256 != digest:
            raise DataError(
                f"{where}: wrong content: got sha256 {digest}, expected {required.sha256}, "
                f"{required.origin}; {advice}"
            )
    try:
        Checkpoint.load(file).load_into(load_model(published.model))
    except (CheckpointError, ModelError) as error:
        reason = str(error).removeprefix(f"{file}: ").removesuffix("; is --model right?")
        raise CheckpointError(
            f"{where}: not a checkpoint of {published.model}: {reason}; {advice}"
        ) from error
    return digest
