"""From what a user writes, "digits", "cifar10" or "folder:PATH", to the data."""

import difflib
import os

from robustsoup.data.cifar import load_cifar10
from robustsoup.data.digits import load_digits
from robustsoup.data.folders import load_folder
from robustsoup.data.splits import Data
from robustsoup.errors import DataError
from robustsoup.progress import Progress

# Each takes (place, root, seed, image_size, on_progress) and passes on what its data set has a use for.
DATASETS = {
    "cifar10": lambda place, root, seed, image_size, on_progress: load_cifar10(root, seed),
    "digits": lambda place, root, seed, image_size, on_progress: load_digits(seed),
    "folder": lambda place, root, seed, image_size, on_progress: load_folder(
        place, seed, image_size, on_progress=on_progress
    ),
}
SPELLINGS = "digits, cifar10, folder:PATH"


def load_data(
    spec: str,
    *,
    root: str | os.PathLike | None = None,
    seed: int = 0,
    image_size: int | None = None,
    on_progress: Progress | None = None,
) -> Data:
    """Load a data set and split it into train, val and test; images are uint8 (n, c, h, w), in memory or memory-mapped.

    spec: "digits" (embedded), "cifar10" (found under root, else $ROBUSTSOUP_DATA, else the user's cache folder, where
    it is downloaded once and checked), or "folder:PATH" (one folder of images a class; see load_folder).
    seed: a whole number >= 0 that decides who is in val; test is the same for every seed.
    image_size: pixels a side, for "folder:PATH" only (32 unless given). Folders are decoded once, into the user's cache
    folder; on_progress(done, total, figures) is then called for each image.

    Raises DataError if the spec is unknown, the seed is negative, or the data is missing, broken or empty;
    StorageError if decoded images cannot be kept.
    """
    name, colon, place = spec.partition(":")
    if name not in DATASETS:
        raise DataError(f'data "{spec}": unknown; expected one of {SPELLINGS}{_nearest(name)}')
    if name == "folder" and not place:
        raise DataError(f'data "{spec}": got no path, expected folder:PATH')
    if name != "folder" and colon:
        raise DataError(f'data "{spec}": got "{place}" after the name, expected "{name}" alone')
    if name != "folder" and image_size is not None:
        raise DataError(
            f'data "{spec}": got image_size {image_size}, which only folder:PATH takes; leave it out'
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f'data "{spec}": got seed {seed!r}, expected a whole number >= 0')
    return DATASETS[name](place, root, seed, image_size, on_progress)


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.4)
    return f'; did you mean "{close[0]}"?' if close else ""
