"""Copy the files of one checkpoint from a web server, or from what fsspec opens."""

import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from robustsoup.checkpoints.shards import INDEX_ENDING, read_index
from robustsoup.checkpoints.wrapping import PICKLE_ENDINGS, file_ending
from robustsoup.data.download import DownloadProgress, download
from robustsoup.errors import CheckpointError, DownloadError
from robustsoup.file_bytes import MAX_FILE_BYTES
from robustsoup.printable import first_line

FAVOURITES = (
    "model.safetensors",
    "soup.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""Files of a repository that are read if the address names none, the first that exists."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

INSTALL_LINES = {
    "hf": "pip install 'robustsoup[hub]'",
    "s3": "pip install s3fs",
    "gs": "pip install gcsfs",
    "gcs": "pip install gcsfs",
    "az": "pip install adlfs",
    "abfs": "pip install adlfs",
    "sftp": "pip install paramiko",
    "ssh": "pip install paramiko",
}
"""How to install what reads the addresses of each scheme."""


@dataclass(frozen=True)
class Transfer:
    """What was copied.

    Attributes:
        main: Name of the checkpoint below the folder.
        files: Names of all copied files, the checkpoint included.
        revision: The commit of the hub; None elsewhere.
    """

    main: str
    files: tuple[str, ...] = field(default_factory=tuple)
    revision: str | None = None


def choose_file(names: Iterable[str], address: str) -> str:
    """Return the checkpoint of a repository: a favourite, else the only one.

    Raises:
        CheckpointError: There is none, or several.
    """
    known = set(names)
    for name in FAVOURITES:
        if name in known:
            return name
    endings = (".safetensors", *PICKLE_ENDINGS)
    candidates = sorted(name for name in known if name.endswith(endings))
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise CheckpointError(f"{address}: got a folder that holds no checkpoint; name a file")
    listed = ", ".join(candidates[:6])
    raise CheckpointError(
        f"{address}: holds {len(candidates)} checkpoints ({listed}); name one: "
        f"{address}/{candidates[0]}"
    )


def copy_with_companions(main: str, copy: Callable[[str], Path]) -> tuple[str, ...]:
    """Copy a checkpoint and the files that it is read with; return the names of all.

    Args:
        main: The checkpoint: an index of shards and an adapter need other files beside it.
        copy: Copies one file and returns its path.
    """
    path, folder = copy(main), PurePosixPath(main).parent
    others: Sequence[str] = []
    if main.endswith(INDEX_ENDING):
        others = list(read_index(path))
    elif PurePosixPath(main).name in ADAPTER_WEIGHTS:
        others = [ADAPTER_CONFIG]
    names = [str(folder / name) for name in others]
    for name in names:
        copy(name)
    return (main, *names)


def show_address(address: str) -> str:
    """Return an address for messages, without names, passwords and keys that it may hold."""
    scheme, _, place = address.partition("://")
    host, slash, rest = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{rest.partition('?')[0]}"


def copy_from_path(address: str, folder: Path, on_transfer: DownloadProgress | None) -> Transfer:
    """Copy a checkpoint from a web server, or from what fsspec opens.

    Raises:
        DownloadError: The file cannot be read, or is cut short.
        CheckpointError: A library is missing, or the scheme is unknown.
    """
    location, _, query = address.partition("?")
    place, _, last = location.rpartition("/")
    name = _file_name(last)

    def copy(file: str) -> Path:
        source = address if file == name else f"{place}/{file}{'?' if query else ''}{query}"
        _copy_file(source, folder / file, on_transfer)
        return folder / file

    names = copy_with_companions(name, copy)
    if file_ending(folder / name) is None and not name.endswith(INDEX_ENDING):
        name = _add_ending(folder / name)
        names = (name,)
    return Transfer(name, names)


def _file_name(last: str) -> str:
    """Return the name of a file for the last part of an address, which may hold any character."""
    return re.sub(r"[^\w.+-]", "_", urllib.parse.unquote(last)).lstrip(".") or "checkpoint"


def _add_ending(path: Path) -> str:
    """Give a file whose address does not name its format the ending of its content."""
    with path.open("rb") as file:
        ending = ".safetensors" if file.read(9)[8:] == b"{" else ".pth"
    path.replace(path.with_name(path.name + ending))
    return path.name + ending


def _copy_file(address: str, target: Path, on_transfer: DownloadProgress | None) -> None:
    shown = show_address(address)
    if address.startswith(("http://", "https://")):
        try:
            download(address, target, advice="check the address", on_progress=on_transfer)
        except DownloadError as error:
            raise DownloadError(str(error).replace(address, shown)) from None
        return
    kind = address.partition("://")[0]
    try:
        _copy_with_fsspec(address, target, on_transfer)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{shown}: {_describe_missing(kind, error)}") from None
    except FileNotFoundError:
        raise DownloadError(f"{shown}: no such file") from None
    except Exception as error:  # what a file system raises depends on its library
        raise DownloadError(f"{shown}: {first_line(error).replace(address, shown)}") from None


def _describe_missing(kind: str, error: Exception) -> str:
    """Return why fsspec does not know a scheme, and what to do."""
    if isinstance(error, ImportError):
        line = INSTALL_LINES.get(kind)
        return f"what reads {kind}:// is not installed; {line}" if line else first_line(error)
    if "rotocol not known" in str(error):
        return f"unknown scheme {kind}://; expected hf, https, s3, gs or another one of fsspec"
    return first_line(error)


def _copy_with_fsspec(address: str, target: Path, on_transfer: DownloadProgress | None) -> None:
    import fsspec

    def report(size: int | None, value: int, **_others: object) -> None:
        if on_transfer:
            on_transfer(value, size)

    system, path = fsspec.core.url_to_fs(address)
    information = system.info(path)
    kind, size = information.get("type"), information.get("size")
    if kind not in ("file", None):  # reading a device may never end
        is_folder = kind == "directory"
        raise OSError("is a folder; name a file in it" if is_folder else "is no regular file")
    if isinstance(size, int) and size > MAX_FILE_BYTES:
        raise OSError(f"{size:,} bytes, and {MAX_FILE_BYTES:,} are the most that are read")
    callback = fsspec.callbacks.Callback(hooks={"report": report})
    system.get_file(path, os.fspath(target), callback=callback)
    got = target.stat().st_size
    if isinstance(size, int) and got != size:
        raise OSError(f"cut short: got {got} bytes, expected {size}; try again")
