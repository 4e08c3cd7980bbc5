"""The tables of a recipe.

The keys that a table shares with a Python function are declared once, as the fields of a settings
class in `robustsoup.settings`; `declares` adds them to the table with their types, defaults and
ranges. Keys that only recipes have (ingredients, methods, files) are declared here. A validated
table holds parsed values: a threat is a ThreatModel, a requirement a Requirement.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from robustsoup.catalog import ATTACKS, LOSSES, SOUP_METHODS
from robustsoup.data.transforms import ImageTransform
from robustsoup.errors import RequestError
from robustsoup.schema import describe_value
from robustsoup.settings import (
    LINF_8,
    PRETRAIN_DEFAULTS,
    QUEUED_ATTACKS,
    AttackSettings,
    BufferSettings,
    DialSettings,
    EarlyStop,
    LandscapeSettings,
    LearnSettings,
    MergeSettings,
    Rule,
    SearchSettings,
    TrainSettings,
    rules,
)
from robustsoup.soups.goal import Goal, Requirement, Score, parse_target
from robustsoup.soups.granularity import GRANULARITIES
from robustsoup.soups.learned_search import LEARNING
from robustsoup.soups.method_keys import is_merge, method_keys
from robustsoup.soups.subspace import check_subspace
from robustsoup.threats import ThreatModel
from robustsoup.training.objectives import Objective
from robustsoup.training.schedules import check_schedule

Figure = Literal["ternary", "lines", "tradeoff", "curves", "landscape", "coefficients"]
PUBLISHED_PREFIX = "robustbench:"
"""Prefix of published checkpoints, which `robustsoup fetch` downloads; others are paths."""

S = TypeVar("S")
T = TypeVar("T", bound="Section")


_SCALARS = {bool: "true or false", int: "a whole number", float: "a number"}


def _expected_scalar(annotation: Any, value: Any) -> str | None:
    """Return what a number or a truth value should have been, or None if its type may be right."""
    types = set(get_args(annotation) or (annotation,)) - {type(None)}
    kind = types.pop() if len(types) == 1 else None
    if value is None or kind not in _SCALARS:
        return None
    is_truth = isinstance(value, bool)
    is_right = is_truth if kind is bool else isinstance(value, (int, float)) and not is_truth
    return None if is_right else _SCALARS[kind]


class Section(BaseModel):
    """A table of a recipe: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_scalar(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` or text for a number, and anything else for `true` or `false`."""
        field = cls.model_fields.get(info.field_name or "")
        expected = None if field is None else _expected_scalar(field.annotation, value)
        if expected is not None:
            raise ValueError(f"got {describe_value(value)}, expected {expected}")
        return value

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key."""
        return getattr(self, key)

    def seed_or(self, seed: int) -> int:
        """Return the seed that the table sets, else `seed`."""
        return seed if self["seed"] is None else self["seed"]


# Types of values: text in the file, an object in the recipe.


def raises_value_error(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `parse` with its RequestError turned into the ValueError that pydantic collects."""

    def parse_value(value: Any) -> Any:
        try:
            return parse(value)
        except RequestError as error:
            raise ValueError(str(error)) from None

    return parse_value


def _parse_text_with(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parse_text(value: Any) -> Any:
        if not isinstance(value, str | ThreatModel | Requirement | Score):
            raise ValueError("expected text")
        return parse(value)

    return raises_value_error(parse_text)


def _checks(parse: Callable[[Any], object]) -> AfterValidator:
    """Return a validator that keeps the value that it parses."""

    def check(value: Any) -> Any:
        parse(value)
        return value

    return AfterValidator(raises_value_error(check))


def _check_granularity(text: str) -> str:
    if text not in GRANULARITIES and not text.startswith("re:"):
        raise ValueError(f'got "{text}", expected one of {", ".join(GRANULARITIES)}, or re:PATTERN')
    return text


def one_of(allowed: Iterable[str]) -> Callable[[str], str]:
    """Return a validator that accepts only the names in `allowed`."""
    names = list(allowed)

    def check_name(name: str) -> str:
        if name not in names:
            raise ValueError(f'got "{name}", expected one of {", ".join(names)}')
        return name

    return check_name


def _check_method(name: str) -> str:
    if SOUP_METHODS.find(name) is None:
        methods = ", ".join(SOUP_METHODS.all_entries())
        raise ValueError(f'got "{name}", expected one of {methods}')
    return name


def _check_attack(name: str) -> str:
    if ":" not in name and ATTACKS.find(name) is None:
        attacks = ", ".join(ATTACKS.all_entries())
        raise ValueError(f'got "{name}", expected one of {attacks}, or package.module:function')
    return name


def _none_for_false(value: Any) -> Any:
    """Let `early_stop = false` override a table of the recipe that this one extends."""
    return None if value is False else value


def _to_text(value: object) -> str:
    """Return a parsed value as text; pydantic 2.7 cannot inspect the signature of `str`."""
    return str(value)


_AS_TEXT = PlainSerializer(_to_text, return_type=str)
ThreatValue = Annotated[ThreatModel, PlainValidator(_parse_text_with(ThreatModel.parse)), _AS_TEXT]
RequirementValue = Annotated[
    Requirement, PlainValidator(_parse_text_with(Requirement.parse)), _AS_TEXT
]
ScoreValue = Annotated[Score, PlainValidator(_parse_text_with(Score.parse)), _AS_TEXT]
TargetValue = Annotated[str, PlainValidator(_parse_text_with(parse_target)), _AS_TEXT]
ObjectiveValue = Annotated[str, _checks(Objective.parse)]
ScheduleValue = Annotated[str | dict[str, Any], _checks(check_schedule)]
_VALUE_TYPES: dict[str, Any] = {
    "objective": ObjectiveValue,
    "also": tuple[ThreatValue, ...],
    "schedule": ScheduleValue,
    "synthetic": str | None,
    "transform": Annotated[str, _checks(ImageTransform.parse)] | None,
    "attack": Annotated[str, AfterValidator(_check_attack)],
    "loss": Annotated[str, AfterValidator(one_of(LOSSES))],
    "granularity": Annotated[str, AfterValidator(_check_granularity)],
    "score": ScoreValue | None,
    "require": tuple[RequirementValue, ...],
    "maximise": TargetValue | None,
}
"""Types of fields whose values are text in a file but objects in the settings class."""


def _check_range(rule: Rule) -> Callable[[Any], Any]:
    def check_value(value: Any) -> Any:
        if not rule.allows(value):
            text = f'"{value}"' if isinstance(value, str) else value
            raise ValueError(f"got {text}, expected {rule.describe_range()}")
        return value

    return check_value


def declares(
    settings_type: type,
    *,
    only: tuple[str, ...] = (),
    omit: tuple[str, ...] = (),
    rename: Mapping[str, str] | None = None,
    optional: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[type[T]], type[T]]:
    """Add the fields of a settings class to a table.

    Args:
        settings_type: The settings class.
        only: Names of the fields to add; all by default.
        omit: Names of fields to leave out.
        rename: Key in the recipe of each field that has another name there.
        optional: Keys that default to None because another table supplies the value; "*" for all.
        defaults: Defaults that differ from those of the settings class.

    Returns:
        A decorator for the table.
    """
    rename, defaults = rename or {}, defaults or {}

    def add_fields(section: type[T]) -> type[T]:
        declared = rules(settings_type)
        added: dict[str, Any] = {}
        for field in dataclasses.fields(settings_type):
            if field.name in omit or (only and field.name not in only):
                continue
            key = rename.get(field.name, field.name)
            value_type = _VALUE_TYPES.get(field.name, field.type)
            if value_type is ThreatModel:
                value_type = ThreatValue
            default = defaults.get(field.name, field.default)
            if key in optional or "*" in optional:
                value_type, default = value_type | None, None
            checked = Annotated[value_type, AfterValidator(_check_range(declared[field.name]))]
            added[key] = (checked, Field(default, description=declared[field.name].help))
        return create_model(
            section.__name__,
            __base__=section,
            __module__=section.__module__,
            __doc__=section.__doc__,
            **added,
        )

    return add_fields


def settings_from(section: Section, settings_type: type[S], **values: Any) -> S:
    """Return settings from the keys of a table.

    Args:
        section: A table that declares the fields of the settings class.
        settings_type: The settings class.
        **values: Fields that the table lacks or that override its values.

    Raises:
        RequestError: The values contradict each other.
    """
    for field in dataclasses.fields(settings_type):  # type: ignore[arg-type]
        if field.name not in values and field.name in type(section).model_fields:
            value = getattr(section, field.name)
            values[field.name] = value.settings() if isinstance(value, EarlyStopSection) else value
    return settings_type(**values)


@declares(EarlyStop)
class EarlyStopSection(Section):
    """Return the epoch with the lowest robust loss on `val`, measured after every epoch."""

    split: Literal["val"] = Field("val", description="Split to measure on.")
    metric: Literal["robust_loss"] = Field("robust_loss", description="What to minimise.")

    def settings(self) -> EarlyStop:
        """Return the settings."""
        return settings_from(self, EarlyStop)


_VALUE_TYPES["early_stop"] = Annotated[EarlyStopSection | None, BeforeValidator(_none_for_false)]


@declares(TrainSettings, omit=("precision",), optional=("seed",))
class Training(Section):
    """How networks are fine-tuned; an ingredient may override any key but the files."""

    @model_validator(mode="after")
    @raises_value_error
    def _check_together(self) -> "Training":
        if "synthetic_fraction" in self.model_fields_set and self["synthetic"] is None:
            raise ValueError(
                "synthetic_fraction: requires generated images; "
                'set synthetic, such as synthetic = "1m.npz"'
            )
        check_training(self.settings(seed=0))
        return self

    def settings(
        self,
        *,
        seed: int,
        precision: str = "auto",
        overrides: Mapping[str, Any] | None = None,
    ) -> TrainSettings:
        """Return the settings.

        Args:
            seed: Seed, unless the table or the overrides set one.
            precision: Arithmetic of training.
            overrides: Values of an ingredient, which replace those of the table.

        Raises:
            RequestError: The values contradict each other.
        """
        values = {"seed": self.seed_or(seed), "precision": precision} | dict(overrides or {})
        return settings_from(self, TrainSettings, **values)


@raises_value_error
def check_training(settings: TrainSettings) -> None:
    """Raise ValueError if the settings smooth labels but the objective does not support that."""
    Objective.parse(settings.objective).with_label_smoothing(settings.label_smoothing)


@declares(TrainSettings, omit=("precision",), optional=("seed",), defaults=PRETRAIN_DEFAULTS)
class Pretrain(Training):
    """Training from fresh weights; the defaults are the paper's."""


@declares(
    TrainSettings,
    omit=("precision", "synthetic", "synthetic_fraction", "early_stop"),
    optional=("*",),
)
class Ingredient(Section):
    """A checkpoint, or a network that the run trains, with its differences from [finetune].

    `checkpoint_every = k` makes one ingredient of every k-th epoch: `run = { epochs = 50,
    checkpoint_every = 10 }` stands for run-10, run-20, ..., run-50, each with its `epoch`.
    """

    checkpoint: str | None = Field(
        None,
        description="A file, its address such as hf://ORG/NAME, or robustbench:NAME; such an "
        "ingredient is not trained.",
    )
    checkpoint_every: int | None = Field(
        None,
        ge=1,
        description="Epochs between checkpoints; every checkpoint becomes an ingredient.",
    )
    epoch: int | None = Field(
        None, ge=1, description="Epoch of the run that this ingredient is taken from."
    )
    subspace_end: int | None = Field(
        None, ge=1, le=3, description="Number of the end of [subspace] that this ingredient is."
    )

    @model_validator(mode="after")
    def _check_together(self) -> "Ingredient":
        others = [key for key in type(self).model_fields if key != "subspace_end"]
        if self.subspace_end is not None and any(self[key] is not None for key in others):
            raise ValueError("an end of [subspace] takes its settings from that table alone")
        trained = [
            key
            for key in type(self).model_fields
            if key != "checkpoint" and getattr(self, key) is not None
        ]
        if self.checkpoint and trained:
            raise ValueError(f"an ingredient with a checkpoint is not trained; remove {trained[0]}")
        if (self.epoch is None) != (self.checkpoint_every is None) or (
            self.epoch and self.checkpoint_every and self.epoch % self.checkpoint_every
        ):
            raise ValueError(
                f"got epoch {self.epoch} and checkpoint_every {self.checkpoint_every}, "
                "expected both or neither, and epoch a multiple of checkpoint_every"
            )
        return self

    def overrides(self) -> dict[str, Any]:
        """Return the training settings that the ingredient sets itself."""
        other_keys = ("checkpoint", "checkpoint_every", "epoch", "subspace_end")
        return {
            key: value
            for key in type(self).model_fields
            if key not in other_keys and (value := getattr(self, key)) is not None
        }


@declares(
    TrainSettings,
    omit=("threat", "synthetic", "synthetic_fraction", "early_stop", "ema", "precision"),
    optional=("seed",),
)
class Subspace(Section):
    """A line or a triangle of networks, whose ends become the ingredients end1, end2 (and end3).

    All ends start from [pretrain] or `checkpoint`. Soups of them get statistics that are measured
    anew, unless they name another policy.
    """

    threats: tuple[ThreatValue, ...] = Field(
        description="Threat models of the ends, from robust to clean: 2 for a line, 3 for a "
        "triangle."
    )
    by: Literal["eps", "objective"] = Field(
        "eps",
        description="What changes along the subspace: eps (the attack's radius) or objective (the "
        "weight of the clean loss).",
    )
    at_ends: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the steps that are at an end, the same for each; the others draw a "
        "point uniformly. By default 2/3 for a line and 3/4 for a triangle.",
    )

    @model_validator(mode="after")
    @raises_value_error
    def _check_together(self) -> "Subspace":
        check_subspace(self.threats, self.settings(seed=0), self.by, self.at_ends)
        return self

    def settings(self, *, seed: int, precision: str = "auto") -> TrainSettings:
        """Return the settings; the threat is that of the first end."""
        return settings_from(
            self,
            TrainSettings,
            threat=self.threats[0] if self.threats else LINF_8,
            seed=self.seed_or(seed),
            precision=precision,
        )


@declares(
    LearnSettings,
    omit=("threat", "objective", "dial", "precision"),
    rename={"buffers": "learning_buffers"},
    optional=("seed",),
)
@declares(DialSettings, rename={"by": "dial"})
@declares(
    SearchSettings,
    only=("step", "max_soups", "score", "tolerance", "time_limit", "weights"),
)
@declares(MergeSettings)
@declares(BufferSettings, only=("buffers", "calibrate_samples", "calibrate_threat"))
class Soup(Section):
    """A family of soups of the same ingredients. Keys of other methods are refused."""

    method: Annotated[str, AfterValidator(_check_method)] = Field(
        description=f"Method that determines the coefficients: {', '.join(SOUP_METHODS)}."
    )
    ingredients: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="Names of the ingredients; all by default."
    )
    threats: tuple[ThreatValue, ...] = Field(
        (),
        description="Threat models; one soup is learned against each, or merged from what is "
        "measured under each. By default the base's.",
    )
    objectives: tuple[ObjectiveValue, ...] = Field(
        ("ce",), min_length=1, description="Objectives; one soup is learned with each."
    )
    at: tuple[float, ...] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        description="Positions on a dial, from 0 (robust) to 1 (clean); one soup for each.",
    )

    @field_validator("at")
    @classmethod
    def _check_positions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0 <= t <= 1 for t in value):
            raise ValueError(f"got {list(value)}, expected numbers from 0 (robust) to 1 (clean)")
        return value

    @model_validator(mode="after")
    @raises_value_error
    def _check_together(self) -> "Soup":
        for key in sorted(self.model_fields_set - self.settable):
            raise ValueError(f'{key} has no meaning with method = "{self.method}"; remove it')
        if self["buffers"] == "tracked" and self.method not in LEARNING:
            raise ValueError('buffers = "tracked": only learned soups have tracked statistics')
        self.search_settings()
        return self

    @property
    def settable(self) -> set[str]:
        """The valid keys for the table's method."""
        return method_keys(self.method)

    def search_settings(self) -> SearchSettings:
        """Return the step and the size of a grid."""
        return settings_from(self, SearchSettings, score=None)

    def merge_settings(self) -> MergeSettings:
        """Return the numbers of a merging method."""
        return settings_from(self, MergeSettings)

    def requires(self, need: str) -> bool:
        """Return whether the method is one that merges and requires this."""
        entry = SOUP_METHODS.find(self.method)
        return entry is not None and need in entry.facts.get("requires", ())

    @property
    def merges(self) -> bool:
        """Whether the method merges, rather than listing or learning coefficients."""
        return is_merge(self.method)

    def buffer_settings(self, *, seed: int, policy: str) -> BufferSettings:
        """Return the settings of BatchNorm's running statistics.

        Args:
            seed: Seed, unless the table sets one.
            policy: Policy, unless the table sets one.
        """
        buffers = self["buffers"] or policy
        return settings_from(self, BufferSettings, buffers=buffers, seed=self.seed_or(seed))

    def learn_settings(
        self, threat: ThreatModel, objective: str, *, seed: int, precision: str
    ) -> LearnSettings:
        """Return the learning settings of one soup or dial.

        Args:
            threat: Threat model, one of those of the table.
            objective: Objective, one of those of the table.
            seed: Seed, unless the table sets one.
            precision: Arithmetic of learning.
        """
        dial = DialSettings(by=self["dial"], turn_every=self["turn_every"])
        return settings_from(
            self,
            LearnSettings,
            threat=threat,
            objective=objective,
            buffers=self["learning_buffers"],
            dial=dial if self.method == "dial" else None,
            seed=self.seed_or(seed),
            precision=precision,
        )


@declares(LandscapeSettings, omit=("precision",), optional=("threat", "seed"))
class Plane(Section):
    """A plane through three networks of the recipe; the loss is measured on a grid of its points.

    `checkpoints` names the network at the origin, the network off the x axis, and the network at
    the end of the x axis (the paper's Fig. 7).
    """

    checkpoints: tuple[str, str, str] = Field(
        description="Names of three networks: ingredients, or pretrained."
    )

    def settings(
        self, *, threat: ThreatModel, seed: int, samples: int, precision: str
    ) -> LandscapeSettings:
        """Return the settings.

        Args:
            threat: Threat model, unless the table sets one.
            seed: Seed, unless the table sets one.
            samples: Number of available samples; limits the number that the table sets.
            precision: Arithmetic of the attack.
        """
        return settings_from(
            self,
            LandscapeSettings,
            threat=self["threat"] or threat,
            seed=self.seed_or(seed),
            samples=min(self["samples"], samples),
            precision=precision,
        )


@declares(AttackSettings, optional=("seed",))
@declares(SearchSettings, only=("screen", "screen_steps"))
class Evaluate(Section):
    """How networks are evaluated on the split that selects and on the split that reports.

    With `screen`, soups of a grid or line are first evaluated with a short attack of `screen_steps`
    steps and the adversarial points of the ingredients; those that can still win are confirmed in
    full.
    """

    threats: tuple[ThreatValue, ...] = Field((LINF_8,), description="Threat models to attack with.")
    select_on: Literal["val"] = Field("val", description="Split that selects.")
    report_on: Literal["test"] = Field("test", description="Split that reports.")
    select_samples: int | None = Field(
        None, ge=1, description="Samples of the split that selects; all by default."
    )
    report_samples: int | None = Field(
        None, ge=1, description="Samples of the split that reports; all by default."
    )
    report: Literal["all", "chosen"] = Field(
        "all", description="Networks to evaluate on the split that reports."
    )
    keep_points: bool = Field(False, description="Store the adversarial images.")
    shift: str | None = Field(
        None,
        description="Folder of corrupted copies of the test set, in the format of CIFAR-10-C; adds "
        'the measure "shift". Copies of every second image select (with as many samples of val), '
        "those of the others report.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "Evaluate":
        if self.screens and all(threat.is_clean for threat in self.threats):
            raise ValueError("screen: there is no attack to shorten; set threats")
        if self.screens and self["attack"] not in QUEUED_ATTACKS:
            raise ValueError(
                f"screen: requires an attack that can be shortened ({', '.join(QUEUED_ATTACKS)}); "
                f'got "{self["attack"]}"'
            )
        return self

    @property
    def screens(self) -> bool:
        """Whether soups are screened with a short attack."""
        return self["screen"]

    def attack_settings(self, *, seed: int, precision: str = "auto") -> AttackSettings:
        """Return the attack of the full protocol.

        Args:
            seed: Seed, unless the table sets one.
            precision: Arithmetic of the search if the table sets "auto".
        """
        table_precision = self["precision"]
        return settings_from(
            self,
            AttackSettings,
            seed=self.seed_or(seed),
            precision=precision if table_precision == "auto" else table_precision,
        )


@declares(SearchSettings, only=("maximise", "require", "point"))
class Select(Section):
    """Which soup to choose on the split that selects."""

    @model_validator(mode="after")
    @raises_value_error
    def _check_together(self) -> "Select":
        Requirement.parse_all(self["require"])
        return self

    def goal(self, default: str) -> Goal:
        """Return the goal; it maximises `default` unless the table names a measure."""
        return Goal(self["maximise"] or default, self["require"], self["point"])


class Report(Section):
    """What the report shows."""

    figures: tuple[Figure, ...] = Field(
        ("ternary", "tradeoff", "coefficients"), description="Figures, in this order."
    )
    examples: int = Field(
        6, ge=0, le=24, description="Attacked images of the chosen soup that the report shows."
    )
