"""Published robust checkpoints: where they are, downloaded once, and checked before they are used."""

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import data_root
from robustsoup.data.download import Progress, download
from robustsoup.errors import CheckpointError, DataError, ModelError, RequestError
from robustsoup.files import atomic_path, write_text
from robustsoup.models import load_model

BEGINS = (b"PK\x03\x04", b"\x80")
"""The first bytes of what torch.save writes: a zip archive, or a pickle from before PyTorch 1.6."""


@dataclass(frozen=True)
class Published:
    """A checkpoint of RobustBench's CIFAR-10 model zoo: its file on Google Drive, its network and its threat model.

    mirror: where its authors have it. No digest of any of these files is published.
    """

    drive_id: str
    model: str
    threat: str = "Linf 8/255"
    mirror: str | None = None

    @property
    def url(self) -> str:
        """The file itself, past the page that says it is too large for a virus scan."""
        return f"https://drive.usercontent.google.com/download?id={self.drive_id}&export=download&confirm=t"

    @property
    def page(self) -> str:
        """Where a person finds the file."""
        return f"https://drive.google.com/file/d/{self.drive_id}/view" + (
            f" or {self.mirror}" if self.mirror else ""
        )


WANG = "https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/checkpoint"
PUBLISHED: dict[str, Published] = {
    "Gowal2021Improving_28_10_ddpm_100m": Published(
        "12L8YE6VBgUDKyW6GMSNefSYj2gg4LEKx", "wide_resnet"
    ),
    "Gowal2021Improving_R18_ddpm_100m": Published(
        "1-0EuCJashqSXEkkd1DOzFA4tH8KL2kim", "preact_resnet18"
    ),
    "Wang2023Better_WRN-28-10": Published(
        "1-6MYKJdECDVGaWjj6GgqvaT95BGKhUvI",
        "wide_resnet",
        mirror=f"{WANG}/cifar10_linf_wrn28-10.pt",
    ),
    "L2/Wang2023Better_WRN-28-10": Published(
        "1-fwKiJXEqHHUngt8wKsNnHuD4vAPvPXC",
        "wide_resnet",
        "L2 0.5",
        f"{WANG}/cifar10_l2_wrn28-10.pt",
    ),
}
"""Source: robustbench 1.1.1, model_zoo/cifar10.py; the README of github.com/wzekai99/DM-Improves-AT."""


@dataclass(frozen=True)
class Fetched:
    """A published checkpoint on this machine: its file, what was published, and the sha256 of the file (hex).

    first_seen: the digest was recorded just now, so nothing but the file itself vouches for it.
    """

    path: Path
    published: Published
    sha256: str
    first_seen: bool


def fetch_published(
    name: str,
    root: str | os.PathLike | None = None,
    *,
    sha256: str | None = None,
    url: str | None = None,
    on_progress: Progress | None = None,
) -> Fetched:
    """The named checkpoint under data_root(root), downloaded (from `url`, else its own) if it is not there.

    The file must have the digest `sha256`, if one is given, and the one that was recorded beside it (NAME.pt.json) when it
    was first fetched; and it must load, with weights_only=True and strictly, into its network. A file put there by hand
    is taken if it passes. on_progress(done, total) gets bytes.

    Raises RequestError for an unknown name, DataError if it cannot be downloaded or has another digest, CheckpointError
    if it is not that network's, StorageError if it cannot be written. Then no file is left under its final name that was
    not there before.
    """
    published = _find(name)
    path = (
        data_root(root)
        / "robustbench"
        / "cifar10"
        / f"{name if '/' in name else f'Linf/{name}'}.pt"
    )
    expected = _expected(path, sha256)
    if path.exists():
        where, advice = str(path), f"delete it and fetch again, or see {published.page}"
        digest = _check(path, published, expected, where, advice)
    else:
        where = url or published.url
        advice = f"try again later, or put the file of {published.page} there by hand: {path}"
        with atomic_path(path) as temporary:
            kind = "a file of torch.save"
            download(
                where, temporary, begins=BEGINS, kind=kind, advice=advice, on_progress=on_progress
            )
            digest = _check(temporary, published, expected, where, advice)
    known = _note(path).is_file()
    if not known:
        record = {"name": name, "from": where, "sha256": digest, "bytes": path.stat().st_size}
        write_text(_note(path), json.dumps(record, indent=1) + "\n")
    return Fetched(path, published, digest, not known)


def _find(name: str) -> Published:
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, 1)
        hint = f'did you mean "{near[0]}"? It is one of' if near else "expected one of"
        raise RequestError(f'robustbench: got "{name}"; {hint} {", ".join(PUBLISHED)}')
    return PUBLISHED[name]


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _expected(path: Path, sha256: str | None) -> dict[str, str]:
    """digest -> who says so, as the end of a sentence."""
    expected = {}
    note = _note(path)
    if note.is_file():
        try:
            expected[json.loads(note.read_text(encoding="utf-8"))["sha256"]] = (
                f"as {note} recorded it"
            )
        except (ValueError, KeyError, TypeError, OSError):
            raise DataError(
                f"{note}: not a record of a digest; delete it and fetch again"
            ) from None
    if sha256 is not None:
        digest = sha256.strip().lower().removeprefix("sha256:")
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise RequestError(f'--sha256: got "{sha256}", expected 64 hexadecimal digits')
        expected[digest] = "as asked for"
    return expected


def _check(
    file: Path, published: Published, expected: dict[str, str], where: str, advice: str
) -> str:
    """The sha256 of `file`. Raises DataError or CheckpointError, naming `where`, if it is not what was expected."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(15)
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); {advice}") from error
    if not start.startswith(BEGINS):
        raise DataError(f"{where}: starts with {start!r}, expected a file of torch.save; {advice}")
    for wanted, why in expected.items():
        if wanted != digest:
            raise DataError(
                f"{where}: wrong content: got sha256 {digest}, expected {wanted}, {why}; {advice}"
            )
    try:
        Checkpoint.load(file).load_into(load_model(published.model))
    except (CheckpointError, ModelError) as error:
        reason = str(error).removeprefix(f"{file}: ").removesuffix("; is --model right?")
        raise CheckpointError(
            f"{where}: no checkpoint of {published.model}: {reason}; {advice}"
        ) from error
    return digest
