"""Shards: .tar files of images and labels, in the format of webdataset."""

import glob
import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path

from robustsoup.data.folders import abbreviate, find_split_word
from robustsoup.data.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, open_image
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import (
    MAX_CLASSES,
    Augmentation,
    Data,
    add_notes,
    assemble_tensors,
    promote_val,
)
from robustsoup.data.torch_datasets import LABEL_KEYS, ImageStack, match_channels
from robustsoup.errors import DataError
from robustsoup.files import open_regular
from robustsoup.printable import first_line

LABEL_SUFFIXES = (".cls", ".json")
MAX_LABEL_BYTES = 2**24
"""Largest file of a label that is read, in bytes."""

MAX_SHARDS = 100_000
"""Most files that a pattern describes."""

_NO_SAMPLES = re.compile(r"__[^/]*__($|/)|(.*/)?\._[^/]*$")
"""Members that webdataset leaves out, and those that macOS adds to a file."""


def load_shards(request: DataRequest) -> Data:
    """Load the samples of local .tar files into memory.

    PATTERN is a folder, or a path with {000..012}, * and ?. Files with the word train, val or test
    in their names, spelled as folders are, are these splits; if no name has one, the folders of the
    files may, and else the samples are split 70/10/20. A sample is an image and a label: the text
    of .cls, or "label" in .json. Further images of a sample are left out if their endings hold a
    dot, such as depth.png. Images are square and of one size, unless image_size is set.

    Raises:
        DataError: webdataset is not installed, there is no file, only some files name a split, or a
            sample lacks its image or label, or has several images; the error names the sample.
    """
    groups, notes = group_files(_find_files(request), request.spec)
    parts: dict[str, tuple[object, object]] = {}
    doubts: list[str] = []
    for part, shards in groups.items():
        stack, labels = _read_shards(shards, request)
        if not labels:
            raise DataError(f"{request.spec}: got no samples in the files of {part}")
        parts[part] = stack.stack(), labels
        doubts += (f"{request.spec} {part}: {doubt}" for doubt in stack.doubts())
    parts = match_channels(parts)
    notes += promote_val(parts)
    size = request.image_size or 0
    augmentation = Augmentation(pad=size // 8, flip=True)
    data = assemble_tensors(
        request.spec, parts, seed=request.seed, augmentation=augmentation, decoded=True
    )
    return add_notes(data, [f"{request.spec}: {note}" for note in notes], doubts)


def _read_shards(shards: Sequence[Path], request: DataRequest) -> tuple[ImageStack, list[int]]:
    stack = ImageStack(request.spec, request.image_size, request.channels)
    labels: list[int] = []
    for sample in _iterate_samples(shards, request.spec):
        key = f"{request.spec}: sample {sample.get('__key__')}"
        stack.add(open_image(_find_image(sample, key), key))
        labels.append(_find_label(sample, key))
        if request.on_progress:
            request.on_progress(len(labels), len(labels), "images decoded")
    return stack, labels


def _find_files(request: DataRequest) -> list[Path]:
    """Return the local files of a pattern, in order; addresses and commands are no files."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise DataError(
            f"{request.spec}: requires the library webdataset; install it with: "
            "pip install 'robustsoup[webdataset]'"
        ) from None
    folder = Path(request.place)
    ranges = re.findall(r"\{(\d+)\.\.(\d+)(?:\.\.\d+)?\}", request.place)
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges)
    if count > MAX_SHARDS:
        raise DataError(
            f"{request.spec}: got a pattern of more than {MAX_SHARDS:,} files; shorten its ranges"
        )
    if folder.is_dir():
        patterns = [f"{glob.escape(str(folder))}/*.tar"]
    else:
        patterns = expand_urls(request.place)
    files: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))  # noqa: PTH207
        if not found:
            raise DataError(f"{request.spec}: {pattern}: no such file, expected local .tar files")
        files += [Path(path).resolve() for path in found]
    return files


def group_files(files: Sequence[Path], place: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of each split by the words in their names, and notes on their splits.

    If no file names a split, the names of their folders decide where these name two or more.

    Raises:
        DataError: Some files name a split and others do not.
    """
    names = [file.name for file in files]
    if not any(map(find_split_word, names)):
        folders = [file.parent.name for file in files]
        if len(set(map(find_split_word, folders)) - {None}) > 1:
            names = [f"{file.parent.name}/{file.name}" for file in files]
    groups: dict[str, list[Path]] = {}
    named: list[str] = []
    unnamed: list[str] = []
    for file, name in zip(files, names, strict=True):
        part = find_split_word(name)
        if part is None:
            unnamed.append(name)
        else:
            groups.setdefault(part, []).append(file)
            named.append(name)
    if groups and unnamed:
        raise DataError(
            f"{place}: got files that name a split ({abbreviate(named)}) beside files that do not "
            f"({abbreviate(unnamed)}), expected train, val or test in the name of every file or of "
            "none; rename some, or give a pattern that leaves some out"
        )
    if "train" in groups:
        return groups, []
    notes = [f"no file names train; those of {' and '.join(groups)} are split anew"]
    return {"train": list(files)}, notes if groups else []


def _iterate_samples(files: Sequence[Path], place: str) -> Iterator[Mapping[str, object]]:
    """Iterate over samples as bytes by ending; nothing is unpickled or decoded by webdataset."""
    from webdataset.tariterators import group_by_keys

    for path in files:
        try:
            with open_regular(path) as file:
                yield from group_by_keys(_iterate_members(file, path))
        except DataError:
            raise
        except Exception as error:  # what tarfile and webdataset raise on broken files
            reason = first_line(error)
            raise DataError(
                f"{place}: {path}: not a readable .tar file: {reason}; expected one that is not "
                "compressed"
            ) from None


def _iterate_members(file: BufferedReader, path: Path) -> Iterator[dict[str, object]]:
    """Iterate over the members of a .tar file, in the form that `group_by_keys` takes.

    Only images and labels are read; the content of others is empty. A compressed archive is
    refused, because a small one could unpack to terabytes.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if not member.isreg() or _NO_SAMPLES.match(member.name):
                continue
            yield {
                "fname": member.name,
                "data": _read_member(archive, member, path),
                "__url__": str(path),
            }


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    """Return the content of an image or a label; nothing of other members."""
    ending = f".{member.name.rpartition('.')[2].lower()}"
    if ending not in IMAGE_SUFFIXES + LABEL_SUFFIXES:
        return b""
    limit = MAX_LABEL_BYTES if ending in LABEL_SUFFIXES else MAX_IMAGE_BYTES
    if member.size > limit:
        raise DataError(
            f"{path}: {member.name}: got {member.size:,} bytes, expected at most {limit:,}; "
            "remove the sample"
        )
    content = archive.extractfile(member)
    return b"" if content is None else content.read()


def _find_image(sample: Mapping[str, object], place: str) -> bytes:
    """Return the image of a sample; depth.png beside jpg is a map that belongs to it."""
    images = {
        ending: content
        for ending, content in sample.items()
        if f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES and isinstance(content, bytes)
    }
    named = {e: content for e, content in images.items() if "." not in e} or images
    if len(named) == 1:
        return next(iter(named.values()))
    if named:
        raise DataError(
            f"{place}: got several images, {_list_endings(named)}, expected one; write shards "
            "without the others"
        )
    raise DataError(f"{place}: no image; got {_list_endings(sample)}")


def _find_label(sample: Mapping[str, object], place: str) -> int:
    content = sample.get("cls", sample.get("json"))
    try:
        if isinstance(content, bytes):
            label = json.loads(content)
            if isinstance(label, dict):
                label = next(label[key] for key in LABEL_KEYS if key in label)
            if type(label) is int:
                return _check_label(label, place)
    except (ValueError, RecursionError, StopIteration):
        pass
    raise DataError(
        f"{place}: no label; got {_list_endings(sample)}, expected the number of a class in .cls, "
        'or {"label": number} in .json'
    )


def _check_label(label: int, place: str) -> int:
    if not 0 <= label < MAX_CLASSES:
        got = f"{label}" if abs(label) < 2**63 else f"a number of {label.bit_length()} bits"
        raise DataError(f"{place}: got label {got}, expected 0 to {MAX_CLASSES - 1:,}")
    return label


def _list_endings(sample: Mapping[str, object]) -> str:
    return ", ".join(f".{key}" for key in sample if not key.startswith("__")) or "nothing"
