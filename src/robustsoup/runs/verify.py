"""Compare stored files with their digests: of a file, a run folder, a store, or another folder."""

import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustsoup.archives import SEAL
from robustsoup.checkpoints import safetensors_files
from robustsoup.checkpoints.formats import read_checkpoint, read_tensors
from robustsoup.checkpoints.safetensors_files import read_safetensors
from robustsoup.checkpoints.shards import INDEX_ENDING, read_index
from robustsoup.checkpoints.wrapping import PICKLE_ENDINGS, file_ending
from robustsoup.digests import MISSING
from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError, RequestError
from robustsoup.evaluation import verdicts
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.files import open_regular
from robustsoup.progress import Progress
from robustsoup.runs.results import Results
from robustsoup.runs.staging import RESULTS
from robustsoup.runs.store import Store

ENDINGS = (".safetensors", *PICKLE_ENDINGS)
_OWN_FOLDERS = ("checkpoints", "coefficients", "evaluations", "landscapes")


@dataclass(frozen=True)
class Verified:
    """The outcome for one file, or one step of a store.

    Attributes:
        name: The path below the verified folder, or the file.
        damage: How it differs from what was written; None if it does not.
        recorded: Whether a digest of it is recorded; without one nothing can be said.
    """

    name: str
    damage: str | None
    recorded: bool = True

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.damage is not None:
            return self.damage
        return "as written" if self.recorded else "no digest is recorded"


def verify_path(path: Path, on_progress: Progress) -> list[Verified]:
    """Read every file below a path in full and compare it with its digest.

    Args:
        path: A checkpoint, the index of its shards, coefficients, an evaluation, a run folder, a
            store, or a folder of such files.
        on_progress: Called with (files done, all files, name).

    Raises:
        RequestError: The path is missing or holds nothing that robustsoup writes.
    """
    if path.name == RESULTS:
        path = path.parent
    if not path.exists():
        raise RequestError(f"{path}: no such file or folder; give what `robustsoup` wrote")
    if path.name.endswith(INDEX_ENDING):
        return _verify_shards(path, on_progress)
    if not path.is_dir():
        return _verify_each([path.name], lambda name: _verify_file(path, name), on_progress)
    if (path / RESULTS).is_file():
        return _verify_run_folder(path, on_progress)
    store = Store(path)
    if keys := store.keys():
        return _verify_each(keys, lambda key: _verify_step(store, key), on_progress)
    return _verify_files(path, on_progress)


def _verify_each(
    names: Sequence[str], verify: Callable[[str], Verified], on_progress: Progress
) -> list[Verified]:
    outcomes: list[Verified] = []
    for name in names:
        outcomes.append(verify(name))
        on_progress(len(outcomes), len(names), name)
    return outcomes


def _verify_shards(index: Path, on_progress: Progress) -> list[Verified]:
    """Compare the files that an index of shards names; the index holds no digests."""
    try:
        names = list(read_index(index))
    except CheckpointError as error:
        return [Verified(index.name, str(error).removeprefix(f"{index}: "))]
    shards = _verify_each(names, lambda name: _verify_file(index.parent / name, name), on_progress)
    return [Verified(index.name, None, recorded=False), *shards]


def _verify_run_folder(folder: Path, on_progress: Progress) -> list[Verified]:
    """Compare the files that results.json names, and list the others of the same kinds."""
    try:
        results = Results.load(folder / RESULTS)
    except RequestError as error:
        return [Verified(RESULTS, str(error).removeprefix(f"{folder / RESULTS}: "))]

    def verify(name: str) -> Verified:
        return Verified(name, results.files[name].find_damage(folder / name, thorough=True))

    outcomes = _verify_each(list(results.files), verify, on_progress)
    others = (path for name in _OWN_FOLDERS for path in (folder / name).glob("*.*"))
    names = {path.relative_to(folder).as_posix() for path in others if path.suffix != ".csv"}
    unnamed = sorted(names - set(results.files))
    return [
        Verified(RESULTS, None, recorded=bool(results.files)),
        *outcomes,
        *(Verified(name, None, recorded=False) for name in unnamed),
    ]


def _verify_step(store: Store, key: str) -> Verified:
    damage = store.find_damage(key, thorough=True)
    folder = store.path(key)
    name = folder.relative_to(store.root).as_posix()
    return Verified(name, None if damage is None else damage.removeprefix(f"{folder}/"))


def _verify_files(folder: Path, on_progress: Progress) -> list[Verified]:
    names = [
        path.relative_to(folder).as_posix()
        for path in _list_files(folder)
        if file_ending(path) or _is_evaluation(path)
    ]
    if not names:
        raise RequestError(
            f"{folder}: holds no run, store, checkpoint, coefficients or evaluation; "
            "give what `robustsoup` wrote"
        )
    return _verify_each(names, lambda name: _verify_file(folder / name, name), on_progress)


def _list_files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")


def _is_evaluation(path: Path) -> bool:
    return path.suffix == ".json" and path.with_suffix(".npz").is_file()


def _verify_file(path: Path, name: str) -> Verified:
    """Load a file, which compares it with the digests in it."""
    if file_ending(path) is None and path.suffix != ".json":
        raise RequestError(
            f"{path}: got the ending {path.suffix!r}, expected {', '.join(ENDINGS)} or .json"
        )
    try:
        if path.suffix == ".safetensors":
            read_tensors(path)
        elif path.suffix == ".json":
            return _verify_evaluation(path, name)
        else:
            read_checkpoint(path, mapped=False)
        return Verified(name, None, recorded=_holds_digests(path))
    except RequestError as error:
        return Verified(name, str(error).removeprefix(f"{path}: "))


def _verify_evaluation(path: Path, name: str) -> Verified:
    """Load an evaluation, and look for the points that it records, which loading does without."""
    Evaluation.load(path)
    digests = read_json(path).get(verdicts.DIGESTS_KEY)
    points = path.absolute().with_suffix(".points.npz")
    if "points" in (digests or ()) and not points.exists() and _keeps_file(points):
        return Verified(name, f"{points.name} {MISSING}")
    return Verified(name, None, recorded=digests is not None)


def _keeps_file(path: Path) -> bool:
    """Return False for a file that a run left out of its folder, such as the points of a screen."""
    folder = path.parent.parent
    try:
        return path.relative_to(folder).as_posix() in Results.load(folder / RESULTS).files
    except RequestError:  # the file is in no run folder
        return True


def _holds_digests(path: Path) -> bool:
    """Return whether a readable file holds digests of its content."""
    with open_regular(path) as file:
        if path.suffix == ".safetensors":
            return safetensors_files.DIGESTS_KEY in read_safetensors(file, mapped=True).metadata
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            return any(name.rpartition("/")[2] == SEAL for name in archive.namelist())
