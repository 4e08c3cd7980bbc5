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
        spec: The user's text, which is the name in the data's record.
        place: The text after the name in `spec`, such as the path of a folder; "~" is expanded.
        root: Folder for downloads; None for the default, see `data_root`.
        seed: Decides which samples are in val; an integer of at least 0.
        image_size: Pixels a side; None for the source's default.
        channels: 1 (grey) or 3 (colour); None to decide by the images.
        on_progress: Called with (done, total, figures) while samples are read.
    """

    spec: str
    place: str = ""
    root: str | os.PathLike[str] | None = None
    seed: int = 0
    image_size: int | None = None
    on_progress: Progress | None = None
    channels: int | None = None


DataSource = Callable[[DataRequest], Data]
"""Loads the data of a request; see `assemble` for building the result."""
