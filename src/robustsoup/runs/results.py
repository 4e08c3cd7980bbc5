"""Typed records of what a run measured: the content of results.json.

A run writes a `Results` into its folder; reports and the command line read it back. The names of
the fields are the keys of the JSON file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from robustsoup.checkpoints.provenance import Leakage
from robustsoup.digests import MISSING, FileDigest, digest_json
from robustsoup.documents import read_json
from robustsoup.errors import RequestError
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.files import write_text
from robustsoup.runs import result_checks
from robustsoup.runs.result_checks import ROLES
from robustsoup.schema import Check, MisfitError
from robustsoup.soups.answer import Answer
from robustsoup.stamp import stamp_record, unstamp_record

RowScores = dict[str, Accuracy]
"""Accuracies by measure: "clean", each threat model as text, and "union" for several threats."""

SOUP_ROLES = ROLES[2:]

RESULTS_LIMIT = 128 * 2**20
"""Largest results.json that is read, in bytes."""

MAX_RESULTS_SEPARATORS = 4_000_000
"""Most commas and colons in results.json: about 800 for each of 5,000 soups."""

_WRITTEN_BY_RUN = "expected a file that `robustsoup run` wrote; run the recipe again"


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One evaluated network of a run.

    Attributes:
        name: Unique name of the row.
        role: What the network is, one of ROLES.
        soup: Section of the recipe that made the soup.
        ingredients: Names of the soup's ingredients.
        coefficients: One coefficient for each ingredient, where one vector describes the soup.
        threat: Threat model that the network or its coefficients were trained against.
        objective: Objective that they were trained with.
        at: Position on a dial, from 0 (robust) to 1 (clean).
        ingredient: Name of the ingredient that the soup equals bit for bit, if it is one.
        checkpoint: File in the run folder; None for a checkpoint that existed before.
        coefficients_file: File of the coefficients by layer in the run folder.
        val: Accuracies on the split that selects.
        test: Accuracies on the split that reports.
        screened: Whether the robust accuracies on `val` are upper bounds, or estimates.
        attacked: Samples of `val` that were attacked in full, if they are estimates.
        left_after: Number of rounds of the race that the soup ran, if it raced.
        warnings: Why accuracies are doubtful, one line each.
        masking_check: Findings of the masking check, one line for each split and threat model.
    """

    name: str
    role: str
    soup: str | None = None
    ingredients: tuple[str, ...] | None = None
    coefficients: tuple[float, ...] | None = None
    threat: str | None = None
    objective: str | None = None
    at: float | None = None
    ingredient: str | None = None
    checkpoint: str | None = None
    coefficients_file: str | None = None
    val: RowScores | None = None
    test: RowScores | None = None
    screened: bool = False
    attacked: int | None = None
    left_after: int | None = None
    warnings: tuple[str, ...] = ()
    masking_check: tuple[str, ...] = ()

    def scores(self, split: str) -> RowScores | None:
        """Return the accuracies on "val" or "test"; None if they were not measured."""
        return self.test if split == "test" else self.val

    def accuracy(self, split: str, measure: str) -> Accuracy | None:
        """Return one accuracy; None if it was not measured."""
        return (self.scores(split) or {}).get(measure)

    @property
    def doubt(self) -> str:
        """What the robust accuracies on `val` are, if not all samples were attacked in full."""
        if not self.screened:
            return ""
        if self.attacked is None:
            return "robust accuracies are upper bounds"
        text = f"robust accuracies are estimates: {self.attacked:,} samples were attacked in full"
        if self.left_after is None:
            return text
        rounds = "1 round" if self.left_after == 1 else f"{self.left_after} rounds"
        return f"{text}, in {rounds} of a race"

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON-able values, without lines and flags that are not set."""
        content: dict[str, Any] = _field_values(self)
        for split in ("val", "test"):
            scores = self.scores(split)
            content[split] = scores and {key: value.to_json() for key, value in scores.items()}
        for name in ("ingredients", "coefficients", "warnings", "masking_check"):
            content[name] = None if content[name] is None else list(content[name])
        for name in ("screened", "attacked", "left_after", "warnings", "masking_check"):
            if not content[name]:
                del content[name]
        return content

    @classmethod
    def from_json(cls, content: Any, where: str) -> "ResultRow":
        """Read what `to_json` returned.

        Args:
            content: One entry of "rows".
            where: Name of the entry in error messages.

        Raises:
            RequestError: The entry is not a row.
        """
        table = _check_table(result_checks.row, content, where)
        ingredients, coefficients = table.get("ingredients"), table.get("coefficients")
        return cls(
            name=table["name"],
            role=table["role"],
            soup=table.get("soup"),
            ingredients=None if ingredients is None else tuple(ingredients),
            coefficients=None if coefficients is None else tuple(coefficients),
            threat=table.get("threat"),
            objective=table.get("objective"),
            at=table.get("at"),
            ingredient=table.get("ingredient"),
            checkpoint=table.get("checkpoint"),
            coefficients_file=table.get("coefficients_file"),
            val=_parse_scores(table.get("val")),
            test=_parse_scores(table.get("test")),
            screened=bool(table.get("screened", False)),
            attacked=table.get("attacked"),
            left_after=table.get("left_after"),
            warnings=tuple(table.get("warnings", ())),
            masking_check=tuple(table.get("masking_check", ())),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How the networks of a run were evaluated.

    Attributes:
        attack: Name of the attack.
        loss: Loss that the attack maximises; "" if it has no single one.
        steps: Steps of the attack, or queries of square; 0 if they are not settings.
        restarts: Restarts of the attack.
        precision: Arithmetic of the verdicts.
        search_precision: Arithmetic of the attack's search.
        screened: Whether soups were screened with a short attack.
        seed: Seed of the attack's noise.
        select_on: Name of the split that selects.
        report_on: Name of the split that reports.
        samples: Number of samples of each split; None for a split that was not used.
        threats: Threat models as text.
    """

    attack: str = "apgd"
    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    precision: str = "float32"
    search_precision: str = "float32"
    screened: bool = False
    seed: int = 0
    select_on: str
    report_on: str
    samples: Mapping[str, int | None] = field(default_factory=dict)
    threats: tuple[str, ...]

    @property
    def step_word(self) -> str:
        """What `steps` counts."""
        return "queries" if self.attack == "square" else "steps"

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return _field_values(self) | {"samples": dict(self.samples), "threats": list(self.threats)}

    @classmethod
    def from_json(cls, content: Any, where: str) -> "EvaluationProtocol":
        """Read what `to_json` returned; `where` names the entry in error messages.

        Raises:
            RequestError: The content is not a protocol.
        """
        table = _check_table(result_checks.protocol, content, where)
        return cls(**_known_fields(cls, table) | {"threats": tuple(table["threats"])})


@dataclass(frozen=True, kw_only=True)
class PlaneResult:
    """A plane of loss values.

    Attributes:
        name: Section of the recipe.
        checkpoints: Names of the three networks that span the plane.
        file: File of the losses in the run folder.
    """

    name: str
    checkpoints: tuple[str, ...]
    file: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return _field_values(self) | {"checkpoints": list(self.checkpoints)}

    @classmethod
    def from_json(cls, content: Any, where: str) -> "PlaneResult":
        """Read what `to_json` returned; `where` names the entry in error messages.

        Raises:
            RequestError: The content is not a plane.
        """
        table = _check_table(result_checks.plane, content, where)
        return cls(
            name=table["name"],
            checkpoints=tuple(table.get("checkpoints", ())),
            file=table["file"],
        )


@dataclass(frozen=True, kw_only=True)
class ExamplesResult:
    """A few attacked samples.

    Attributes:
        network: Name of the row.
        split: Split of the samples, its first ones.
        file: File of the samples in the run folder.
    """

    network: str
    split: str
    file: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return _field_values(self)

    @classmethod
    def from_json(cls, content: Any, where: str) -> "ExamplesResult":
        """Read what `to_json` returned; `where` names the entry in error messages.

        Raises:
            RequestError: The content is something else.
        """
        table = _check_table(result_checks.examples, content, where)
        return cls(**_known_fields(cls, table))


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a run measured.

    Attributes:
        name: Name of the recipe.
        created: When the run finished, UTC, ISO 8601.
        recipe: The recipe with every default.
        data: Record of the data.
        model: Specification of the network.
        leakage: Whether networks were trained on samples that evaluate them.
        duplicates: Counts of samples of val and test that are in another split or in generated
            images; see `Overlap`.
        warnings: Doubts about the checkpoints that the recipe names, one line each.
        figures: Names of the figures to draw; None for all.
        protocol: How the networks were evaluated.
        versions: Versions and device of the run.
        seconds: Total seconds of all steps, including steps that an earlier run executed.
        rows: The evaluated networks.
        planes: The planes of loss values.
        surrogates: How searches by surrogate ended, with their predictions; see `SurrogateResult`.
        examples: Attacked samples of the chosen soup, or None.
        selection: The answer: the chosen soup, and why; None if the recipe selects none.
        soup: File of the chosen soup in the run folder.
        files: Digest of each file that the run wrote into its folder, by name.
    """

    name: str
    created: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    leakage: Leakage | None = None
    duplicates: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    figures: tuple[str, ...] | None = None
    protocol: EvaluationProtocol
    versions: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    rows: tuple[ResultRow, ...]
    planes: tuple[PlaneResult, ...] = ()
    surrogates: tuple[Mapping[str, Any], ...] = ()
    examples: ExamplesResult | None = None
    selection: Answer | None = None
    soup: str | None = None
    files: Mapping[str, FileDigest] = field(default_factory=dict)

    def row(self, name: str) -> ResultRow:
        """Return the row called `name`."""
        return next(row for row in self.rows if row.name == name)

    @property
    def distinct_rows(self) -> list[ResultRow]:
        """The rows without the soups that are another row's network once more."""
        names = {row.name for row in self.rows if row.soup is None}
        return [row for row in self.rows if row.ingredient not in names]

    def to_json(self) -> dict[str, Any]:
        """Return the content of results.json, without "soup" if no soup was chosen."""
        content = _field_values(self) | {
            "recipe": dict(self.recipe),
            "data": dict(self.data),
            "leakage": self.leakage and self.leakage.as_record(),
            "duplicates": [dict(overlap) for overlap in self.duplicates],
            "warnings": list(self.warnings),
            "figures": None if self.figures is None else list(self.figures),
            "protocol": self.protocol.to_json(),
            "versions": dict(self.versions),
            "rows": [row.to_json() for row in self.rows],
            "planes": [plane.to_json() for plane in self.planes],
            "surrogates": [dict(item) for item in self.surrogates],
            "examples": self.examples and self.examples.to_json(),
            "selection": self.selection and self.selection.to_json(),
            "files": {name: digest.to_json() for name, digest in self.files.items()},
        }
        if self.soup is None:
            del content["soup"]
        if not self.warnings:
            del content["warnings"]
        return content

    @classmethod
    def from_json(cls, content: Any, where: str) -> "Results":
        """Read what `to_json` returned.

        Args:
            content: The parsed JSON.
            where: Name of the file in error messages.

        Raises:
            RequestError: An entry is missing or is not of its type.
        """
        table = _check_table(result_checks.results, content, where)
        leakage, selection = table.get("leakage"), table.get("selection")
        figures, examples = table.get("figures"), table.get("examples")
        protocol = EvaluationProtocol.from_json(table["protocol"], f"{where}: protocol")
        return cls(
            name=table["name"],
            created=table.get("created", ""),
            recipe=table.get("recipe") or {},
            data=table.get("data") or {},
            model=table.get("model"),
            leakage=Leakage(**_known_fields(Leakage, leakage)) if leakage else None,
            duplicates=tuple(table.get("duplicates") or ()),
            warnings=tuple(table.get("warnings") or ()),
            figures=None if figures is None else tuple(figures),
            protocol=protocol,
            versions=table.get("versions") or {},
            seconds=table.get("seconds"),
            rows=tuple(
                ResultRow.from_json(row, f"{where}: rows[{number}]")
                for number, row in enumerate(table["rows"])
            ),
            planes=tuple(
                PlaneResult.from_json(plane, f"{where}: planes[{number}]")
                for number, plane in enumerate(table.get("planes") or ())
            ),
            surrogates=tuple(table.get("surrogates") or ()),
            examples=ExamplesResult.from_json(examples, f"{where}: examples") if examples else None,
            selection=Answer.from_json(selection) if selection else None,
            soup=table.get("soup"),
            files=_parse_files(table.get("files"), where),
        )

    def check_files(self, folder: Path) -> None:
        """Check that no file of the run folder changed since these results were written.

        A missing file is no error: its reader says so.

        Raises:
            RequestError: A file changed, as after a run that was killed while it wrote the folder.
        """
        for name, digest in self.files.items():
            damage = digest.find_damage(folder / name)
            if damage not in (None, MISSING):
                raise RequestError(
                    f"{folder / name}: {damage}, so it does not belong to results.json "
                    "(edited, or a run was killed there?); run the recipe again, or see "
                    "`robustsoup verify`"
                )

    def save(self, path: Path) -> None:
        """Write a results.json, with a digest of its own content."""
        content = stamp_record(self.to_json())
        write_text(path, json.dumps({**content, "digest": digest_json(content)}, indent=1))

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a results.json, and compare its content with its digest if it has one.

        Raises:
            RequestError: The file is missing, is not JSON, or an entry is wrong.
            CheckpointError: A newer release wrote it in a newer format.
        """
        try:
            content = read_results(path)
        except FileNotFoundError:
            raise RequestError(
                f"{path}: no such file; expected a folder that `robustsoup run` wrote"
            ) from None
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror or error}; {_WRITTEN_BY_RUN}") from None
        except ValueError as error:
            raise RequestError(f"{path}: not JSON ({error}); {_WRITTEN_BY_RUN}") from None
        table = _as_table(content, str(path))
        record = unstamp_record(table, path)
        digest = table.pop("digest", None)
        if digest is not None and digest != digest_json(table):
            raise RequestError(f"{path}: its content changed; {_WRITTEN_BY_RUN}")
        return cls.from_json(record, str(path))


def read_results(path: Path) -> Any:
    """Read the JSON of a results.json, which is larger than others where there are many soups.

    Raises:
        OSError: The file cannot be read, or is larger than RESULTS_LIMIT.
        ValueError: The content is not JSON, or has more than MAX_RESULTS_SEPARATORS.
    """
    return read_json(path, RESULTS_LIMIT, MAX_RESULTS_SEPARATORS)


def _parse_files(content: Any, where: str) -> dict[str, FileDigest]:
    try:
        items = dict(content or {}).items()
        return {str(name): FileDigest.from_json(digest) for name, digest in items}
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where}: files: {error}; {_WRITTEN_BY_RUN}") from None


def _field_values(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _known_fields(record_type: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: table[f.name] for f in fields(record_type) if f.name in table}


def _check_table(check: Check, content: Any, where: str) -> dict[str, Any]:
    """Return content that passes a check.

    Raises:
        RequestError: Names the first entry that does not.
    """
    try:
        check(content, where)
    except MisfitError as error:
        raise RequestError(f"{error}; {_WRITTEN_BY_RUN}") from None
    return _as_table(content, where)


def _as_table(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RequestError(
            f"{where}: got {type(content).__name__}, expected an object; {_WRITTEN_BY_RUN}"
        )
    return content


def _parse_scores(content: Mapping[str, Any] | None) -> RowScores | None:
    """Return the accuracies of one split by measure, from checked content; None if there are none.

    `hits` is missing in files of other programs.
    """
    if not content:
        return None
    return {measure: Accuracy.from_json(entry) for measure, entry in content.items()}
