"""The index of a checkpoint in several files, as Hugging Face's libraries write it."""

from pathlib import Path

from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError
from robustsoup.file_bytes import MAX_TENSORS

INDEX_ENDING = ".index.json"
MAX_SHARDS = 1000


def read_index(path: Path) -> dict[str, list[str]]:
    """Return the names of the tensors of each file that an index names.

    The files lie beside the index: a name with a folder is refused.

    Raises:
        CheckpointError: The index is not readable or names no files.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON file: {error}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= MAX_TENSORS:
        raise CheckpointError(f'{path}: no index of a checkpoint: it has no "weight_map" of names')
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        is_plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not is_plain or file.endswith(".json") or file in ("", ".", ".."):
            raise CheckpointError(
                f"{path}: {name}: got the file {file!r}, expected the name of a file beside it"
            )
        shards.setdefault(file, []).append(name)
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"{path}: names {len(shards):,} files, and {MAX_SHARDS} are the most")
    return shards
