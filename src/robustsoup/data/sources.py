"""Load a data set by its name; the catalog lists the built-in sources."""

import importlib.util
import os
from collections.abc import Mapping

from robustsoup.catalog import DATA_SOURCES, check_call, import_path, import_user_module
from robustsoup.data.request import DataRequest, DataSource
from robustsoup.data.splits import Data
from robustsoup.errors import DataError
from robustsoup.paths import expand_home, user_path
from robustsoup.progress import Progress
from robustsoup.settings import plain_number


def load_data(
    spec: str | DataSource,
    *,
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    image_size: int | None = None,
    channels: int | None = None,
    on_progress: Progress | None = None,
) -> Data:
    """Load a data set, split into train, val and test.

    Args:
        spec: "digits" (embedded in the package), "cifar10" or "cifar100" (read from `root`, where
            it is downloaded once and verified), "folder:PATH" (one sub-folder of images for each
            class, decoded once into the user's cache folder), "npz:PATH" (arrays of one file),
            "hf:NAME" (a data set of the Hugging Face Hub, or a local folder or file),
            "wds:PATTERN" (local .tar shards), "package.module:function[:PLACE]", or a function
            that takes a DataRequest and returns Data.
        root: Folder for downloads; default: $ROBUSTSOUP_DATA, else the user's cache folder.
        seed: Decides which samples are in val; an integer of at least 0. test does not depend on
            the seed.
        image_size: Pixels a side, for sources of image files; default: 32 for folder:, and the
            images' own size for hf: and wds:.
        channels: 1 (grey) or 3 (colour), for sources of image files; default: 1 if every image is
            grey, else 3.
        on_progress: Called with (done, total, figures) as images are decoded.

    Returns:
        The data; images are uint8 (n, c, h, w), in memory or memory-mapped.

    Raises:
        DataError: The spec is unknown, the seed is negative, or the data is missing, broken or
            empty.
        StorageError: Decoded images cannot be stored.
    """
    spec = os.fspath(spec) if isinstance(spec, os.PathLike) else spec
    text = spec if isinstance(spec, str) else _describe_function(spec)
    seed = plain_number(seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f'data "{text}": got seed {seed!r}, expected an integer of at least 0')
    if isinstance(spec, str):
        source, place = _find_data_source(spec, {"image_size": image_size, "channels": channels})
    else:
        source, place = spec, ""
    check_call(source, ["request"], label=f'data "{text}"', error=DataError)
    data = source(
        DataRequest(text, expand_home(place), root, seed, image_size, on_progress, channels)
    )
    if not isinstance(data, Data):
        raise DataError(
            f'data "{text}": the source returned {type(data).__name__}, expected robustsoup.Data'
        )
    return data


def is_built_in(spec: str) -> bool:
    """Return whether a spec names a source of the catalog, not code of the user or a package."""
    return spec.partition(":")[0] in DATA_SOURCES


def _find_data_source(spec: str, form: Mapping[str, int | None]) -> tuple[DataSource, str]:
    """Return the source that a spec names, and the place that follows the name.

    Args:
        spec: The user's text.
        form: What the user asks of the images, by the name of the argument.
    """
    name, colon, place = spec.partition(":")
    if colon and DATA_SOURCES.find(name) is None and ("." in name or _is_module(name)):
        return _import_data_source(spec)
    if DATA_SOURCES.find(name) is None and spec and (path := user_path(spec)).exists():
        kind = "folder" if path.is_dir() else "npz"
        raise DataError(f'data: got the path "{spec}", expected how it is read; try {kind}:{spec}')
    entry = DATA_SOURCES.get_entry(name, error=DataError)
    is_plugin = DATA_SOURCES.get(name) is None
    if entry.facts.get("place", is_plugin):
        if not place and not is_plugin:
            raise DataError(f'data "{spec}": got no path, expected {entry.spelling}')
    elif colon:
        raise DataError(f'data "{spec}": got "{place}" after the name, expected "{name}" alone')
    asked = [f"{name} {value}" for name, value in form.items() if value is not None]
    if asked and not entry.facts.get("decodes", is_plugin):
        decoding = [e.spelling for e in DATA_SOURCES.values() if e.facts.get("decodes")]
        raise DataError(
            f'data "{spec}": got {asked[0]}, which only {", ".join(decoding)} support; leave it out'
        )
    return entry.load(), place


def _describe_function(function: object) -> str:
    if not callable(function):
        raise DataError(
            f'data: got {type(function).__name__}, expected a name such as "digits" or '
            '"folder:PATH"; samples of your own become data by rs.Data.from_tensors or from_dataset'
        )
    return import_path(function)


def _is_module(name: str) -> bool:
    return name.isidentifier() and importlib.util.find_spec(name) is not None


def _import_data_source(spec: str) -> tuple[DataSource, str]:
    """Import the function of "package.module:function[:PLACE]"."""
    module, _, rest = spec.partition(":")
    function, _, place = rest.partition(":")
    imported = import_user_module(module, label=f'data "{spec}"', error=DataError)
    source = getattr(imported, function, None)
    if not callable(source):
        raise DataError(f'data "{spec}": module "{module}" has no function "{function}"')
    return source, place
