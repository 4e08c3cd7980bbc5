"""Shards: .tar files of images and labels, in the format of webdataset."""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from robustsoup.data.folders import SPLIT_FOLDERS
from robustsoup.data.images import IMAGE_SUFFIXES, open_image
from robustsoup.data.request import DataRequest
from robustsoup.data.splits import Augmentation, Data, assemble_tensors, promote_val
from robustsoup.data.torch_datasets import LABEL_KEYS, ImageStack
from robustsoup.errors import DataError
from robustsoup.files import open_regular
from robustsoup.printable import first_line


def load_shards(request: DataRequest) -> Data:
    """Load the samples of local .tar files into memory.

    PATTERN is a folder, or a path with {000..012}, * and ?. Files whose names start with train, val
    or test are these splits; other files are split 70/10/20. A sample is an image and a label: the
    text of .cls, or "label" in .json. Images are square and of one size, unless image_size is set.

    Raises:
        DataError: webdataset is not installed, there is no file, or a sample lacks its image or
            label; the error names the sample.
    """
    files = _find_files(request)
    parts: dict[str, tuple[object, object]] = {}
    for part, shards in _group_files(files).items():
        stack = ImageStack(request.spec, request.image_size, request.channels)
        labels: list[int] = []
        for sample in _iterate_samples(shards, request.spec):
            key = f"{request.spec}: sample {sample.get('__key__')}"
            stack.add(open_image(_find_image(sample, key), key))
            labels.append(_find_label(sample, key))
            if request.on_progress:
                request.on_progress(len(labels), len(labels), "images decoded")
        if not labels:
            raise DataError(f"{request.spec}: got no samples in the files of {part}")
        parts[part] = stack.stack(), labels
    notes = promote_val(parts)
    size = request.image_size or 0
    augmentation = Augmentation(pad=size // 8, flip=True)
    data = assemble_tensors(
        request.spec, parts, seed=request.seed, augmentation=augmentation, decoded=True
    )
    return replace(data, notes=(*data.notes, *(f"{request.spec}: {note}" for note in notes)))


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
    patterns = [str(folder / "*.tar")] if folder.is_dir() else expand_urls(request.place)
    files: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))  # noqa: PTH207
        if not found:
            raise DataError(f"{request.spec}: {pattern}: no such file, expected local .tar files")
        files += [Path(path).resolve() for path in found]
    return files


def _group_files(files: list[Path]) -> dict[str, list[Path]]:
    """Return the files of each split by the start of their names."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        for part, starts in SPLIT_FOLDERS.items():
            if file.name.startswith(starts):
                groups.setdefault(part, []).append(file)
    grouped = sum(len(group) for group in groups.values())
    return groups if "train" in groups and grouped == len(files) else {"train": files}


def _iterate_samples(files: list[Path], place: str) -> Iterator[Mapping[str, object]]:
    """Iterate over samples as bytes by ending; nothing is unpickled or decoded by webdataset."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    for path in files:
        try:
            with open_regular(path) as file:
                yield from group_by_keys(
                    {**member, "__url__": str(path)} for member in tar_file_iterator(file)
                )
        except DataError:
            raise
        except Exception as error:  # what tarfile and webdataset raise on broken files
            reason = first_line(error)
            raise DataError(f"{place}: {path}: not a readable .tar file: {reason}") from None


def _find_image(sample: Mapping[str, object], place: str) -> bytes:
    for ending, content in sample.items():
        if f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES and isinstance(content, bytes):
            return content
    raise DataError(f"{place}: no image; got {_list_endings(sample)}")


def _find_label(sample: Mapping[str, object], place: str) -> int:
    content = sample.get("cls", sample.get("json"))
    try:
        if isinstance(content, bytes):
            label = json.loads(content)
            if isinstance(label, dict):
                label = next(label[key] for key in LABEL_KEYS if key in label)
            if type(label) is int:
                return label
    except (ValueError, RecursionError, StopIteration):
        pass
    raise DataError(
        f"{place}: no label; got {_list_endings(sample)}, expected the number of a class in .cls, "
        'or {"label": number} in .json'
    )


def _list_endings(sample: Mapping[str, object]) -> str:
    return ", ".join(f".{key}" for key in sample if not key.startswith("__")) or "nothing"
