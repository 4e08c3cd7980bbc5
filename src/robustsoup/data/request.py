"""The request that `load_data` passes to a data source."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from robustsoup.data.splits import Data
from robustsoup.progress import Progress


@dataclass(frozen=True)
class DataRequest:
    """The arguments of `load_data`, as every data source receives them.

    Attributes:
        spec: the text that the user wrote; the name in the data's record.
        place: the text after the name in `spec`, such as the path of a folder.
        root: folder for downloads; None for the default, see `data_root`.
        seed: decides which samples are in val; an integer of at least 0.
        image_size: pixels a side; None for the source's default.
        on_progress: called with (done, total, figures) while samples are read.
    """

    spec: str
    place: str = ""
    root: str | os.PathLike[str] | None = None
    seed: int = 0
    image_size: int | None = None
    on_progress: Progress | None = None


DataSource = Callable[[DataRequest], Data]
"""Loads the data of a request; see `assemble` for building the result."""
