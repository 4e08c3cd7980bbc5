"""What a checkpoint is: its network, its tensors, what it was made of, and who judged it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.checkpoints.remote import find_copy_of
from robustsoup.checkpoints.transfers import show_address
from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError, RequestError
from robustsoup.evaluation.attack_texts import describe_attack
from robustsoup.evaluation.doubts import describe_masking
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.file_bytes import digest_tensors
from robustsoup.runs.results import ResultRow, Results
from robustsoup.runs.staging import RESULTS
from robustsoup.schema import LONGEST_TEXT

CHECKPOINTS, EVALUATIONS = "checkpoints", "evaluations"
MAX_ANCESTORS = 500
MAX_EVALUATIONS = 2000


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint in a family tree.

    Attributes:
        name: Name of its row in the run folder, else of its file as the descendant records it.
        digest: sha256 of its weights.
        coefficient: Its weight in the soup above it, averaged over the layers; None if unknown.
        made: How it was made, in words; empty if its file was not found.
        parents: The checkpoints that it was made of.
        path: Its file; None if it was not found beside the described checkpoint.
    """

    name: str
    digest: str
    coefficient: float | None = None
    made: str = ""
    parents: tuple["Ancestor", ...] = ()
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "name": self.name,
            "digest": self.digest,
            "coefficient": self.coefficient,
            "made": self.made,
            "file": None if self.path is None else str(self.path),
            "parents": [parent.to_json() for parent in self.parents],
        }


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation of a checkpoint.

    Attributes:
        path: The JSON file of the evaluation.
        split: The samples, such as "test".
        data: Name of the data.
        attack: The attack in words.
        accuracy: The accuracies by measure.
        warnings: Reasons to doubt them.
        masking_check: Findings of the masking check, one line for each threat model.
    """

    path: Path
    split: str
    data: str
    attack: str
    accuracy: Mapping[str, Accuracy]
    warnings: tuple[str, ...] = ()
    masking_check: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path) -> "StoredEvaluation":
        """Read an evaluation.

        Raises:
            CheckpointError: It cannot be read, or was changed.
        """
        evaluation = Evaluation.load(path)
        record = evaluation.record
        return cls(
            path,
            str(record.get("split") or "unknown split"),
            str((record.get("data") or {}).get("name") or "unknown data"),
            describe_attack(record),
            dict(evaluation.accuracy),
            tuple(evaluation.warnings),
            tuple(describe_masking(record)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "file": str(self.path),
            "split": self.split,
            "data": self.data,
            "attack": self.attack,
            "accuracy": {name: accuracy.to_json() for name, accuracy in self.accuracy.items()},
            "warnings": list(self.warnings),
            "masking_check": list(self.masking_check),
        }


@dataclass(frozen=True)
class Description:
    """A checkpoint described.

    Attributes:
        checkpoint: The checkpoint, whose content was compared with its digests.
        tree: The checkpoint and its ancestors.
        evaluations: The evaluations of it beside it.
        notes: What reading left out, and evaluations that cannot be read.
    """

    checkpoint: Checkpoint
    tree: Ancestor
    evaluations: tuple[StoredEvaluation, ...]
    notes: tuple[str, ...] = ()

    @property
    def network(self) -> dict[str, Any] | None:
        """The recorded network, whether or not this program would build it; None if unrecorded."""
        recorded = self.checkpoint.provenance.get("network")
        return None if recorded is None else dict(recorded)

    @property
    def source(self) -> str | None:
        """The address that the file was copied from, and its commit; None for other files."""
        path = self.checkpoint.path
        copy = None if path is None else find_copy_of(path)
        if copy is None:
            return None
        return show_address(copy.address) + (f" at {copy.revision}" if copy.revision else "")

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        checkpoint = self.checkpoint
        return {
            "file": checkpoint.name,
            "source": self.source,
            "digest": checkpoint.digest,
            "network": self.network,
            "tensors": describe_tensors(checkpoint),
            "provenance": self.tree.to_json(),
            "record": checkpoint.provenance,
            "judged_by": [evaluation.to_json() for evaluation in self.evaluations],
            "notes": list(self.notes),
        }


def describe_checkpoint(
    source: CheckpointLike, key: str | None = None, *, adapter_base: CheckpointLike | None = None
) -> Description:
    """Read a checkpoint, and look for its ancestors and its evaluations beside it.

    Evaluations are found by the digest of the weights that they record, so a file of the right name
    that judges other weights is not taken. A soup under the names of its ingredients' files has
    those of the file that a command wrote of the same weights under the network's own names.

    Args:
        source: The checkpoint, or its file.
        key: Which of several sets of weights to read; see `Checkpoint.load`.
        adapter_base: The base of a LoRA adapter; see `Checkpoint.load`.

    Raises:
        CheckpointError: The file cannot be read, or was changed.
    """
    checkpoint = Checkpoint.open(source, key=key, adapter_base=adapter_base)
    notes = list(checkpoint.notes)
    evaluations: list[StoredEvaluation] = []
    for path in _list_evaluations(checkpoint):
        try:
            evaluations.append(StoredEvaluation.load(path))
        except CheckpointError as error:
            notes.append(str(error))
    family = _Family.beside(checkpoint)
    return Description(checkpoint, family.tree(checkpoint), tuple(evaluations), tuple(notes))


def describe_tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return name, role, type, shape and bytes of each tensor, JSON-able.

    The role is "parameter", "buffer", or "tied to NAME" for a second name of a parameter.
    """
    parameters, tied = set(checkpoint.parameters), checkpoint.tied
    return [
        {
            "name": name,
            "role": f"tied to {tied[name]}"
            if name in tied
            else ("parameter" if name in parameters else "buffer"),
            "dtype": _type_name(tensor),
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
        }
        for name, tensor in checkpoint.tensors.items()
    ]


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def describe_making(record: Mapping[str, Any]) -> str:
    """Return in words how weights were made, by their record; "no record" without one."""
    if "coefficients" in record:
        return _describe_soup(record)
    if record.get("adapter"):
        return "LoRA adapter merged into its base"
    training = record.get("training")
    if not isinstance(training, Mapping):
        return "no record of its training" if record.get("network") else "no record"
    data = record.get("data") or {}
    splits = " and ".join(map(str, record.get("trained_on", ())))
    source = f" on {_short(data['name'])} ({splits})" if data.get("name") else ""
    parts = [f"trained against {_join_threats(training)}{source}"]
    subspace = record.get("subspace")
    if isinstance(subspace, Mapping):
        parts[0] = f"end {subspace['position'] + 1} of a {_short(subspace['shape'])}, {parts[0]}"
    parts += [
        f"{name} {_short(training[name])}"
        for name in ("objective", "epochs", "lr", "seed")
        if training.get(name) is not None
    ]
    if record.get("epoch") is not None:
        parts.append(f"after epoch {_short(record['epoch'])}")
    return ", ".join(parts)


def _describe_soup(record: Mapping[str, Any]) -> str:
    learning = (record.get("learned") or {}).get("learning")
    parts = [f"soup of {len(record.get('parents', ()))} ingredients"]
    merge = record.get("merge")
    if isinstance(merge, Mapping):
        parts.append(f"merged by {_short(merge.get('method'))}")
    if isinstance(learning, Mapping):
        parts.append(f"coefficients learned against {_join_threats(learning)}")
    elif isinstance(record["coefficients"], Mapping):
        parts.append("coefficients by layer")
    policy = (record.get("buffers") or {}).get("policy")
    if policy:
        parts.append(f"BatchNorm statistics: {_short(policy)}")
    return ", ".join(parts)


def _join_threats(settings: Mapping[str, Any]) -> str:
    """Return the threat models of a training or of learning in words."""
    also = settings.get("also")
    threats = [settings.get("threat"), *(also if isinstance(also, list) else [])]
    return " and ".join(map(_short, threats))


def _short(value: object) -> str:
    """Return a value of a record as a short text; strangers may write any value."""
    text = str(value) if isinstance(value, (str, int, float)) else type(value).__name__
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


def mean_coefficients(record: Mapping[str, Any]) -> list[float | None]:
    """Return the coefficient of each parent of a soup, averaged over the layers; None if unknown.

    Args:
        record: A record that was checked.
    """
    coefficients, count = record.get("coefficients"), len(record.get("parents", ()))
    rows = list(coefficients.values()) if isinstance(coefficients, Mapping) else [coefficients]
    if not rows or not all(isinstance(row, list) and len(row) == count for row in rows):
        return [None] * count
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _list_evaluations(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield the evaluations beside a checkpoint that record its digest, or that of its own file."""
    if checkpoint.path is None:
        return
    digests = {checkpoint.digest, _find_own_digest(checkpoint, checkpoint.path)}
    folder = checkpoint.path.parent
    folders = [folder, folder / EVALUATIONS]
    if folder.name == CHECKPOINTS:
        folders.append(folder.parent / EVALUATIONS)
    stem = checkpoint.path.stem
    paths = [path for place in folders for path in sorted(place.glob("*.json"))]
    paths.sort(key=lambda path: not path.name.startswith(stem))  # a large run has thousands
    for path in paths[:MAX_EVALUATIONS]:
        if not path.with_suffix(".npz").is_file():
            continue
        try:
            content = read_json(path)
        except (OSError, ValueError):
            continue
        digest = content.get("checkpoint") if isinstance(content, dict) else None
        if isinstance(digest, str) and digest in digests:
            yield path


def find_own_file(results: Results, folder: Path) -> Path | None:
    """Return the file of a run that holds its soup under the network's own names, with a record.

    None if there is none, as where the soup is a checkpoint that the user gave.
    """
    chosen = None if results.selection is None else results.selection.chosen
    row = next((row for row in results.rows if row.name == chosen), None)
    if row is None or not row.checkpoint:
        return None
    # A name with a folder, as strangers may write it, finds nothing outside the run folder.
    file = folder / CHECKPOINTS / Path(row.checkpoint).name
    return file if file.is_file() else None


def _find_own_digest(soup: Checkpoint, path: Path) -> str:
    """Return the digest of the file with the weights of a soup under the network's own names.

    It is among the checkpoints of a run, or beside a learned soup; without one, return the digest
    of the soup.
    """
    own: Path | None = path.with_name(f"{path.name.partition('.')[0]}.safetensors")
    try:
        results = Results.load(path.parent / RESULTS)
        own = find_own_file(results, path.parent) if results.soup == path.name else None
    except (RequestError, OSError):
        pass
    if own is None or own == path:
        return soup.digest
    try:
        other = Checkpoint.open(own)
        return other.digest if _digest_each(other) == _digest_each(soup) else soup.digest
    except (CheckpointError, OSError):
        return soup.digest


def _digest_each(checkpoint: Checkpoint) -> set[str]:
    """Return the digest of each tensor, without its name."""
    return {digest_tensors({"": tensor}) for tensor in checkpoint.tensors.values()}


@dataclass
class _Family:
    """The files where ancestors of a checkpoint may be.

    Attributes:
        folder: The folder of the checkpoint; None if it has no file.
        rows: The checkpoints of the run folder by name.
        known: The checkpoints that were found, by digest.
        opened: The files that were opened; a record may name one many times.
        left: How many ancestors may still be shown.
    """

    folder: Path | None
    rows: dict[str, Path]
    known: dict[str, tuple[str, Checkpoint]] = field(default_factory=dict)
    opened: set[Path] = field(default_factory=set)
    left: int = MAX_ANCESTORS

    @classmethod
    def beside(cls, checkpoint: Checkpoint) -> "_Family":
        """Look around a checkpoint: in its folder, and in the run folder that holds it."""
        if checkpoint.path is None:
            return cls(None, {})
        folder = checkpoint.path.parent
        run = folder.parent if folder.name == CHECKPOINTS else folder
        try:
            rows = Results.load(run / RESULTS).rows
        except (RequestError, OSError):
            return cls(folder, {})
        # A name with a folder, as strangers may write it, finds nothing outside the run folder.
        files = {row.name: Path(row.checkpoint or "").name for row in rows if _is_origin(row)}
        return cls(folder, {name: run / CHECKPOINTS / file for name, file in files.items()})

    def tree(self, checkpoint: Checkpoint) -> Ancestor:
        """Return a checkpoint and its ancestors."""
        name = checkpoint.path.name if checkpoint.path else checkpoint.name
        return self._describe(name, checkpoint, None)

    def _describe(self, name: str, item: Checkpoint, coefficient: float | None) -> Ancestor:
        record = item.provenance
        parents = [
            self._find(parent["digest"], parent.get("file"), weight)
            for parent, weight in self._take(record)
        ]
        return Ancestor(
            name, item.digest, coefficient, describe_making(record), tuple(parents), item.path
        )

    def _take(self, record: Mapping[str, Any]) -> Sequence[tuple[Mapping[str, Any], float | None]]:
        """Return the parents in a record that may still be shown, with their coefficients."""
        parents = record.get("parents", [])[: self.left]
        self.left -= len(parents)
        return list(zip(parents, mean_coefficients(record), strict=False))

    def _find(self, digest: str, file: str | None, coefficient: float | None) -> Ancestor:
        """Return an ancestor, with its own ancestors if its file is found."""
        if digest not in self.known:
            self._search(digest, file)
        if digest in self.known:
            return self._describe(*self.known[digest], coefficient)
        return Ancestor(file or "weights without a file", digest, coefficient)

    def _search(self, digest: str, file: str | None) -> None:
        if self.folder is None:
            return
        candidates = {file: self.folder / file} if file else {}
        while candidates or self.rows:
            name, path = (candidates or self.rows).popitem()
            if path in self.opened:
                continue
            self.opened.add(path)
            try:
                found = Checkpoint.open(path)
                self.known.setdefault(found.digest, (name, found))
            except (CheckpointError, OSError):
                continue
            if found.digest == digest:
                return


def _is_origin(row: ResultRow) -> bool:
    return row.checkpoint is not None and row.role in ("ingredient", "pretrained")
