"""CIFAR-10 and CIFAR-100: downloaded once; every file is verified before use."""

import contextlib
import hashlib
import os
import pickle
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robustsoup.data.download import DownloadProgress, FileKind, data_root, download
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import Augmentation, Data, DataDescription, Samples, assemble, hold_out
from robustsoup.errors import DataError, DownloadError
from robustsoup.files import atomic_path, one_at_a_time


@dataclass(frozen=True)
class Release:
    """The files of a data set as its authors publish them.

    Attributes:
        folder: Name of the folder of the files, in the archive and on disk.
        archive: Name of the archive.
        url: Address of the archive.
        archive_md5: The archive's digest.
        file_md5: Digest of each file that is unpacked.
    """

    folder: str
    archive: str
    url: str
    archive_md5: str
    file_md5: Mapping[str, str]


CIFAR10 = Release(
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)
CIFAR100 = Release(
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
    {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILES = ("test_batch",)
RELEASES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
VAL_SAMPLES = 5000
GZIP = FileKind("a gzip archive", (b"\x1f\x8b",))
REDOWNLOAD = "delete it and load again to download it again"


def load_cifar10(request: DataRequest) -> Data:
    """Load CIFAR-10: 45000 train, 5000 val, 10000 test; images uint8 (n, 3, 32, 32).

    The seed decides which samples are in val. ids are 0..49999 over the five training files in
    order, and 0..9999 over the test file. Missing files are downloaded, see `fetch_cifar10`.

    Raises:
        DataError: A file cannot be downloaded, or its md5 is not the published one; the error
            names the file.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    folder = fetch_cifar10(request.root)
    pool = _read_cifar_files(folder, CIFAR10, TRAIN_FILES, b"labels")
    test = _read_cifar_files(folder, CIFAR10, TEST_FILES, b"labels")
    constants = CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD
    return _assemble_cifar(request, _digest_release(CIFAR10), constants, pool, test)


def load_cifar100(request: DataRequest) -> Data:
    """Load CIFAR-100 with its 100 fine classes, split and augmented as CIFAR-10.

    Raises:
        DataError: A file cannot be downloaded, or its md5 is not the published one; the error
            names the file.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    folder = fetch_cifar100(request.root)
    pool = _read_cifar_files(folder, CIFAR100, ("train",), b"fine_labels")
    test = _read_cifar_files(folder, CIFAR100, ("test",), b"fine_labels")
    names = _unpickle_published(folder, CIFAR100, "meta")[b"fine_label_names"]
    constants = tuple(name.decode() for name in names), CIFAR100_MEAN, CIFAR100_STD
    return _assemble_cifar(request, _digest_release(CIFAR100), constants, pool, test)


def is_here(name: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Return whether "cifar10" or "cifar100" can be loaded without a download.

    Args:
        name: A key of RELEASES.
        root: see `data_root`.

    Raises:
        DataError: The root is a file, or cannot be read.
    """
    release, folder = RELEASES[name], data_root(root)
    with _readable_root(folder):
        return (folder / release.archive).exists() or not _list_missing(
            release, folder / release.folder
        )


def imitate_cifar(name: str, *, seed: int = 0) -> Data:
    """Return random images with the sizes, splits and record of CIFAR-10 or CIFAR-100.

    They stand for data that is not downloaded yet where only sizes count, as in a plan. The record
    is that of the real data, so results must never be made from them.

    Args:
        name: A key of RELEASES.
        seed: Decides which samples are in val.
    """
    generator = torch.Generator().manual_seed(0)
    parts: list[Samples] = []
    classes = CIFAR10_CLASSES if name == "cifar10" else tuple(f"class {n}" for n in range(100))
    for count in (50_000, 10_000):
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        rows = torch.arange(count)
        parts.append(Samples(images, rows % len(classes), rows))
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if name == "cifar10" else (CIFAR100_MEAN, CIFAR100_STD)
    request = DataRequest(name, seed=seed)
    return _assemble_cifar(request, _digest_release(RELEASES[name]), (classes, mean, std), *parts)


def _assemble_cifar(
    request: DataRequest,
    digest: str,
    constants: tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]],
    pool: Samples,
    test: Samples,
) -> Data:
    """Hold out val; `constants` are the classes, the mean and the standard deviation."""
    train, val = (pool.take(rows) for rows in hold_out(len(pool), VAL_SAMPLES, request.seed))
    augmentation = Augmentation(pad=4, flip=True)
    description = DataDescription(request.spec, digest, *constants, augmentation)
    return assemble(description, train, val, test, seed=request.seed)


def _digest_release(release: Release) -> str:
    return hashlib.sha256("".join(release.file_md5.values()).encode()).hexdigest()


def fetch_cifar10(
    root: str | os.PathLike[str] | None = None,
    *,
    url: str = CIFAR10.url,
    archive_md5: str = CIFAR10.archive_md5,
    file_md5: Mapping[str, str] = CIFAR10.file_md5,
    on_progress: DownloadProgress | None = None,
) -> Path:
    """Return the folder cifar-10-batches-py under data_root(root), downloading missing files.

    An archive cifar-10-python.tar.gz in that root is unpacked and kept; a downloaded archive is
    removed. After a failure, every file with a final name is complete.

    Args:
        root: see `data_root`.
        url: The address of the archive.
        archive_md5: The archive's digest.
        file_md5: Digest of each file that is unpacked.
        on_progress: Called with (done, total) in bytes; total is None if the server does not
            announce it.

    Raises:
        DataError: The root is a file, the download fails or is incomplete, or the archive or a
            file in it is not the published one.
        StorageError: A file cannot be written.
    """
    release = replace(CIFAR10, url=url, archive_md5=archive_md5, file_md5=file_md5)
    return fetch_release(release, root, on_progress)


def fetch_cifar100(
    root: str | os.PathLike[str] | None = None, *, on_progress: DownloadProgress | None = None
) -> Path:
    """Return the folder cifar-100-python under data_root(root), as `fetch_cifar10` does."""
    return fetch_release(CIFAR100, root, on_progress)


def fetch_release(
    release: Release,
    root: str | os.PathLike[str] | None = None,
    on_progress: DownloadProgress | None = None,
) -> Path:
    """Return the folder of a release under data_root(root), downloading missing files."""
    root_folder = data_root(root)
    folder, archive = root_folder / release.folder, root_folder / release.archive
    with _readable_root(root_folder):
        if not _list_missing(release, folder):
            return folder
    with one_at_a_time(root_folder):  # another process may have fetched them meanwhile
        if missing := _list_missing(release, folder):
            downloaded = not archive.is_file()
            if downloaded:
                _download_archive(release, archive, on_progress)
            _check_md5(_md5_of_file(archive), release.archive_md5, archive, REDOWNLOAD)
            _unpack_members(archive, folder, {name: release.file_md5[name] for name in missing})
            if downloaded:
                archive.unlink(missing_ok=True)
    return folder


@contextlib.contextmanager
def _readable_root(root: Path) -> Iterator[None]:
    """Look for files below a root.

    Raises:
        DataError: The root is a file, or something in it cannot be read.
    """
    try:
        if root.exists() and not root.is_dir():
            raise DataError(f"{root}: got a file, expected a folder for data; set another root")
        yield
    except OSError as error:
        raise DataError(
            f"{root}: {error.strerror or error}; make it readable, or set another root"
        ) from None


def _list_missing(release: Release, folder: Path) -> list[str]:
    return [name for name in release.file_md5 if not (folder / name).is_file()]


def _download_archive(
    release: Release, archive: Path, on_progress: DownloadProgress | None
) -> None:
    name, url = release.archive, release.url
    with atomic_path(archive) as temporary:
        advice = f"try again, or download {name} yourself into {archive.parent}"
        download(url, temporary, kind=GZIP, advice=advice, on_progress=on_progress)
        advice = f"try again later, or put the right {name} into {archive.parent}"
        try:
            _check_md5(_md5_of_file(temporary), release.archive_md5, url, advice)
        except DataError as error:
            raise DownloadError(str(error)) from None


def _unpack_members(archive: Path, folder: Path, file_md5: Mapping[str, str]) -> None:
    """Write the named members into `folder`; paths in the archive are never used as targets."""
    advice = "delete the archive and load again"
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name, md5 in file_md5.items():
                content = _read_member(tar, f"{folder.name}/{name}", archive)
                _check_md5(_md5_of_bytes(content), md5, f"{archive}: {name}", advice)
                with atomic_path(folder / name) as temporary:
                    temporary.write_bytes(content)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{archive}: not a readable archive ({error}); delete it and load again"
        ) from error


def _read_member(tar: tarfile.TarFile, name: str, archive: Path) -> bytes:
    try:
        file = tar.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"{archive}: no file {name} in it; delete the archive and load again")
    return file.read()


def _read_cifar_files(
    folder: Path, release: Release, names: tuple[str, ...], label_key: bytes
) -> Samples:
    """Read the samples of the files in order."""
    images: list[torch.Tensor] = []
    labels: list[int] = []
    for name in names:
        stored = _unpickle_published(folder, release, name)
        images.append(torch.from_numpy(stored[b"data"]))
        labels += stored[label_key]
    return Samples(
        torch.cat(images).view(-1, 3, 32, 32), torch.tensor(labels), torch.arange(len(labels))
    )


def _unpickle_published(folder: Path, release: Release, name: str) -> dict[bytes, Any]:
    """Unpickle a file, but only after its md5 matches the published one."""
    content = (folder / name).read_bytes()
    _check_md5(_md5_of_bytes(content), release.file_md5[name], folder / name, REDOWNLOAD)
    return pickle.loads(content, encoding="bytes")


def _check_md5(got: str, expected: str, where: str | Path, advice: str) -> None:
    if got != expected:
        raise DataError(f"{where}: wrong content: got md5 {got}, expected {expected}; {advice}")


def _md5_of_bytes(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _md5_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
