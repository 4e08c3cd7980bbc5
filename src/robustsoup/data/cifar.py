"""CIFAR-10: found or downloaded once, and every file checked against its published digest before it is opened."""

import hashlib
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch

from robustsoup.data.download import Progress, download
from robustsoup.data.splits import Augmentation, Data, DataDescription, Samples, assemble, hold_out
from robustsoup.errors import DataError
from robustsoup.files import atomic_path, cache_folder

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILES = ("test_batch",)
FILE_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2471, 0.2435, 0.2616)
VAL = 5000


def load_cifar10(root: str | os.PathLike | None, seed: int) -> Data:
    """CIFAR-10: 45000 train, 5000 val, 10000 test; images uint8 (n, 3, 32, 32). The seed decides who is in val.

    root: as in fetch_cifar10, which is asked for files that are missing.
    ids are 0..49999 over the five training files in order, and 0..9999 over the test file.

    Raises DataError, naming the file, if a file cannot be had or its md5 is not the published one.
    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    folder = fetch_cifar10(root)
    pool, test = _read(folder, TRAIN_FILES), _read(folder, TEST_FILES)
    train, val = (pool.take(rows) for rows in hold_out(len(pool), VAL, seed))
    digest = hashlib.sha256("".join(FILE_MD5.values()).encode()).hexdigest()
    source = DataDescription("cifar10", digest, CLASSES, MEAN, STD, Augmentation(pad=4, flip=True))
    return assemble(source, train, val, test, seed=seed)


def data_root(root: str | os.PathLike | None = None) -> Path:
    """Where data is kept: `root`, else $ROBUSTSOUP_DATA, else "data" in the user's cache folder."""
    return Path(root or os.environ.get("ROBUSTSOUP_DATA") or cache_folder() / "data").expanduser()


def fetch_cifar10(
    root: str | os.PathLike | None = None,
    *,
    url: str = URL,
    archive_md5: str = ARCHIVE_MD5,
    file_md5: Mapping[str, str] = FILE_MD5,
    on_progress: Progress | None = None,
) -> Path:
    """The folder cifar-10-batches-py under data_root(root), with any missing file first unpacked from the archive.

    An archive cifar-10-python.tar.gz in that root is used; else it is downloaded from `url`, and removed once unpacked.
    on_progress(done, total) gets bytes; total is None where the server does not say.

    Raises DataError if the root is a file, the download fails, is cut short or is not the archive, or an archived file
    is not the published one; StorageError if it cannot be written. Whatever fails, no incomplete file is left
    under a final name.
    """
    place = data_root(root)
    if place.exists() and not place.is_dir():
        raise DataError(
            f"{place}: got a file, expected a folder to keep data in; name another root"
        )
    folder, archive = place / FOLDER, place / ARCHIVE
    missing = [name for name in file_md5 if not (folder / name).is_file()]
    if not missing:
        return folder
    if archive.is_file():
        _unpack(archive, folder, missing, file_md5, archive_md5)
        return folder
    with atomic_path(archive) as temporary:
        advice = f"try again, or put {ARCHIVE} there by hand: {place}"
        download(
            url,
            temporary,
            begins=(b"\x1f\x8b",),
            kind="a gzip archive",
            advice=advice,
            on_progress=on_progress,
        )
        _check(
            _file_md5(temporary),
            archive_md5,
            url,
            f"try again later, or put the right {ARCHIVE} into {place}",
        )
    _unpack(archive, folder, missing, file_md5, archive_md5)
    archive.unlink(missing_ok=True)
    return folder


def _unpack(
    archive: Path, folder: Path, names: list[str], file_md5: Mapping[str, str], archive_md5: str
) -> None:
    """Write the named members only, each by its known name, so that no path in the archive is ever followed."""
    _check(_file_md5(archive), archive_md5, archive, "delete it and load again to download it anew")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in names:
                content = _member(tar, f"{FOLDER}/{name}", archive)
                _check(
                    _md5(content),
                    file_md5[name],
                    f"{archive}: {name}",
                    "delete the archive and load again",
                )
                with atomic_path(folder / name) as temporary:
                    temporary.write_bytes(content)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{archive}: not a readable archive ({error}); delete it and load again"
        ) from error


def _member(tar: tarfile.TarFile, name: str, archive: Path) -> bytes:
    try:
        file = tar.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"{archive}: no file {name} in it; delete the archive and load again")
    return file.read()


def _read(folder: Path, names: tuple[str, ...]) -> Samples:
    """The samples of the named files, in order. A file is unpickled only once its md5 is the published one."""
    images, labels = [], []
    for name in names:
        content = (folder / name).read_bytes()
        _check(
            _md5(content),
            FILE_MD5[name],
            folder / name,
            "delete it and load again to download it anew",
        )
        stored = pickle.loads(content, encoding="bytes")
        images.append(torch.from_numpy(stored[b"data"]))
        labels += stored[b"labels"]
    return Samples(
        torch.cat(images).view(-1, 3, 32, 32), torch.tensor(labels), torch.arange(len(labels))
    )


def _check(got: str, expected: str, where: str | Path, advice: str) -> None:
    if got != expected:
        raise DataError(f"{where}: wrong content: got md5 {got}, expected {expected}; {advice}")


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _file_md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
