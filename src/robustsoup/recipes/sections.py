"""The tables of a recipe: frozen settings. What is wrong with one by itself is found here."""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from robustsoup.catalog import BUFFER_POLICIES
from robustsoup.errors import RequestError
from robustsoup.soups.granularity import GRANULARITIES
from robustsoup.soups.grid import MAX_SOUPS
from robustsoup.soups.selection import Requirement, Score
from robustsoup.threats import ThreatModel
from robustsoup.training.objectives import Objective
from robustsoup.training.schedules import check_schedule

Figure = Literal["ternary", "lines", "tradeoff", "curves", "landscape", "coefficients"]


class Section(BaseModel):
    """A table of a recipe: frozen, and nothing unknown in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("threat", "threats", "calibrate_threat", mode="after", check_fields=False)
    @classmethod
    def _threat(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else value or []:
            _as_value_error(ThreatModel.parse, text)
        return value

    @field_validator("objective", "objectives", mode="after", check_fields=False)
    @classmethod
    def _objective(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else value or []:
            _as_value_error(Objective.parse, text)
        return value

    @field_validator("schedule", mode="after", check_fields=False)
    @classmethod
    def _schedule(cls, value: Any) -> Any:
        if value is not None:
            _as_value_error(check_schedule, value)
        return value

    @field_validator("early_stop", mode="before", check_fields=False)
    @classmethod
    def _early_stop(cls, value: Any) -> Any:
        return (
            None if value is False else value
        )  # as a recipe says where the one that it extends stops early

    @field_validator("buffers", "learning_buffers", mode="after", check_fields=False)
    @classmethod
    def _buffers(cls, value: str | None) -> str | None:
        if value is not None and value not in BUFFER_POLICIES:
            raise ValueError(f"got {value!r}, expected one of {', '.join(BUFFER_POLICIES)}")
        return value


def _as_value_error(function: Any, value: Any) -> None:
    try:
        function(value)
    except RequestError as error:
        raise ValueError(str(error)) from None


class EarlyStop(Section):
    """Keep the epoch with the least robust loss on `val`, measured after each epoch by APGD with `steps` steps."""

    split: Literal["val"] = "val"
    metric: Literal["robust_loss"] = "robust_loss"
    steps: int = Field(10, ge=1)
    samples: int | None = Field(None, ge=1)


PUBLISHED = "robustbench:"
"""How a checkpoint begins that is named as `robustsoup fetch` names it, not by a path."""
LATER = ("label_smoothing", "weight_decay_bn", "nesterov", "clip_grad", "bn_momentum", "ema")
"""Settings of Training that are in no key at their default, so that steps which were done before they came stay done."""


class Training(Section):
    """How a network is trained; an ingredient may override what [finetune] says."""

    threat: str = "Linf 8/255"
    objective: str = "ce"
    attack_steps: int = Field(2, ge=1)
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(1e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: str | dict[str, Any] = "cosine"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    weight_decay_bn: bool = True
    nesterov: bool = False
    clip_grad: float | None = Field(None, gt=0)
    bn_momentum: float | None = Field(None, gt=0, le=1)
    ema: float = Field(0.0, ge=0, lt=1)
    synthetic: str | None = None
    synthetic_fraction: float = Field(0.7, ge=0, lt=1)
    early_stop: EarlyStop | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _possible(self) -> "Training":
        if "synthetic_fraction" in self.model_fields_set and self.synthetic is None:
            raise ValueError(
                'synthetic_fraction: of what? give synthetic, as in synthetic = "1m.npz"'
            )
        self.check_together()
        return self

    def check_together(self) -> None:
        """Raise ValueError for settings that do not go together."""
        if self.nesterov and not self.momentum:
            raise ValueError(
                "nesterov: got momentum 0, expected a momentum above 0; leave nesterov out"
            )
        _as_value_error(Objective.parse(self.objective).with_label_smoothing, self.label_smoothing)

    def overridden(self, ingredient: "Ingredient") -> "Training":
        """How an ingredient is trained: as this says, but for what the ingredient says itself."""
        return self.model_copy(
            update=ingredient.model_dump(exclude_none=True, exclude={"checkpoint_every", "epoch"})
        )

    def settings(self) -> dict[str, Any]:
        """What `train` is to be told and a step's key is made of: of settings that came later, only what is not as usual."""
        content = self.model_dump(mode="json", exclude={"synthetic", "synthetic_fraction"})
        return {
            name: value
            for name, value in content.items()
            if name not in LATER or value != type(self).model_fields[name].default
        }


class Pretrain(Training):
    """Training from fresh weights; the defaults are the paper's."""

    epochs: int = Field(150, ge=1)
    lr: float = Field(0.1, gt=0)
    schedule: str | dict[str, Any] = {"milestones": [75, 113], "gamma": 0.1}


class Ingredient(Section):
    """A checkpoint that exists already, or what differs from [finetune].

    checkpoint_every = k: one run gives an ingredient every k epochs; `run = { epochs = 50, checkpoint_every = 10 }` stands for
    run-10, run-20, ..., run-50, each with its epoch.
    """

    checkpoint: str | None = None
    threat: str | None = None
    objective: str | None = None
    attack_steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=2)
    lr: float | None = Field(None, gt=0)
    momentum: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)
    schedule: str | dict[str, Any] | None = None
    label_smoothing: float | None = Field(None, ge=0, lt=1)
    weight_decay_bn: bool | None = None
    nesterov: bool | None = None
    clip_grad: float | None = Field(None, gt=0)
    bn_momentum: float | None = Field(None, gt=0, le=1)
    ema: float | None = Field(None, ge=0, lt=1)
    checkpoint_every: int | None = Field(None, ge=1)
    epoch: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _either(self) -> "Ingredient":
        others = [
            name
            for name in type(self).model_fields
            if name != "checkpoint" and getattr(self, name) is not None
        ]
        if self.checkpoint and others:
            raise ValueError(f"an ingredient with a checkpoint is not trained; remove {others[0]}")
        if (self.epoch is None) != (self.checkpoint_every is None) or (self.epoch or 0) % (
            self.checkpoint_every or 1
        ):
            raise ValueError(
                f"got epoch {self.epoch} and checkpoint_every {self.checkpoint_every}, expected a multiple and its part"
            )
        return self


class Soup(Section):
    """One family of soups of the same ingredients. Coefficients by method; what belongs to another method is refused."""

    method: Literal["uniform", "grid", "line", "greedy", "learned", "dial"]
    ingredients: tuple[str, ...] | None = None
    buffers: str | None = None
    calibrate_samples: int = Field(10_000, ge=2)
    calibrate_threat: str = "Linf 8/255"
    step: float = Field(0.2, gt=0, le=1)
    max_soups: int = Field(MAX_SOUPS, ge=1)
    score: str | None = None
    threats: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ("ce",)
    attack_steps: int = Field(2, ge=1)
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(10.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    schedule: str | dict[str, Any] = "cosine"
    detach: float = Field(0.8, ge=0, le=1)
    init: Literal["xavier", "zeros"] = "xavier"
    granularity: str = "parameter"
    learning_buffers: str = "tracked"
    early_stop: EarlyStop | None = None
    dial: Literal["objective", "eps"] = "objective"
    turn_every: int = Field(4, ge=1)
    at: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seed: int | None = Field(None, ge=0, lt=2**63)

    @property
    def settable(self) -> set[str]:
        """The keys that have a meaning with this method."""
        every = {"method", "ingredients", "buffers", "calibrate_samples", "calibrate_threat"}
        stepped, turned = {"step", "max_soups"}, {"dial", "turn_every", "at"}
        learned = set(type(self).model_fields) - stepped - {"score"}
        return {
            "uniform": every,
            "grid": every | stepped,
            "line": every | stepped,
            "greedy": every | {"score"},
            "learned": learned - turned,
            "dial": learned - {"objectives", "early_stop"},
        }[self.method]

    @field_validator("granularity")
    @classmethod
    def _granularity(cls, value: str) -> str:
        if value not in GRANULARITIES and not value.startswith("re:"):
            raise ValueError(
                f"got {value!r}, expected one of {', '.join(GRANULARITIES)}, or re:PATTERN"
            )
        return value

    @field_validator("score")
    @classmethod
    def _score(cls, value: str | None) -> str | None:
        if value is not None:
            _as_value_error(Score.parse, value)
        return value

    @field_validator("at")
    @classmethod
    def _at(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0 <= t <= 1 for t in value):
            raise ValueError(f"got {list(value)}, expected numbers from 0 (robust) to 1 (clean)")
        return value

    @model_validator(mode="after")
    def _belongs(self) -> "Soup":
        for name in sorted(self.model_fields_set - self.settable):
            raise ValueError(f'{name} has no meaning with method = "{self.method}"; remove it')
        if self.buffers == "tracked" and self.method not in ("learned", "dial"):
            raise ValueError('buffers = "tracked": only a learned soup has tracked statistics')
        if abs(round(1 / self.step) * self.step - 1) > 1e-9:
            raise ValueError(f"step: got {self.step}, expected a fraction of 1 such as 0.2 or 0.25")
        return self


class Plane(Section):
    """The plane through three networks of the recipe, and the loss on points x points of it (the paper's Fig. 7).

    checkpoints: at the origin, off the x axis, at the end of the x axis. samples: at most so many, drawn by the seed.
    """

    checkpoints: tuple[str, str, str]
    threat: str | None = None
    attack_steps: int = Field(10, ge=1)
    points: int = Field(21, ge=2)
    samples: int = Field(2000, ge=1)
    buffers: Literal["base", "recalibrate", "recalibrate-adversarial"] = "recalibrate"
    calibrate_samples: int = Field(10_000, ge=2)
    seed: int | None = Field(None, ge=0, lt=2**63)


class Evaluate(Section):
    """How every checkpoint is judged, on the split that selects and on the one that reports.

    precision is the search's; every verdict is float32's. screen: on the split that selects, soups of a grid or line get the
    ingredients' adversarial points and a short attack (screen_steps, bfloat16 where the device has it), and those that no
    other one beats are confirmed in full.
    """

    threats: tuple[str, ...] = ("Linf 8/255",)
    attack: Literal["apgd", "pgd", "autoattack"] = "apgd"
    loss: Literal["ce", "dlr", "targeted dlr"] = "ce"
    steps: int = Field(100, ge=1)
    restarts: int = Field(1, ge=1)
    eot: int = Field(1, ge=1)
    screen: bool = False
    screen_steps: int = Field(10, ge=1)
    select_on: Literal["val"] = (
        "val"  # "test" under the paper's protocol, which is asked for by that name alone
    )
    report_on: Literal["test"] = "test"
    select_samples: int | None = Field(None, ge=1)
    report_samples: int | None = Field(None, ge=1)
    report: Literal["all", "chosen"] = "all"
    batch_size: int | None = Field(None, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    keep_points: bool = False
    seed: int | None = Field(None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _screens(self) -> "Evaluate":
        if self.screen and all(threat == "clean" for threat in self.threats):
            raise ValueError("screen: there is no attack to shorten; give threats")
        if self.screen and self.attack == "autoattack":
            raise ValueError(
                'screen: soups are screened by a short apgd; it does not go with attack = "autoattack"'
            )
        return self


class Select(Section):
    """Which soup to choose on `select_on`."""

    maximise: str | None = None
    require: tuple[str, ...] = ()
    point: bool = False

    @field_validator("maximise")
    @classmethod
    def _maximise(cls, value: str | None) -> str | None:
        if value not in (None, "clean", "union"):
            _as_value_error(ThreatModel.parse, value)
        return value

    @field_validator("require")
    @classmethod
    def _require(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            _as_value_error(Requirement.parse, text)
        return value

    def looked_at(self) -> list[str]:
        """What the choice looks at: "clean", "union" or threat models as text."""
        maximise = [] if self.maximise is None else [self.maximise]
        keys = [
            key if key in ("clean", "union") else str(ThreatModel.parse(key)) for key in maximise
        ]
        return keys + [Requirement.parse(text).key for text in self.require]


class Report(Section):
    """Which figures to draw."""

    figures: tuple[Figure, ...] = ("ternary", "tradeoff", "coefficients")


def nearest(name: str, known: Any) -> str:
    """What to say of a name that is unknown: the one it comes near to, else all that are known."""
    near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
    return (
        f'; did you mean "{near[0]}"?' if near else f"; expected one of {', '.join(sorted(known))}"
    )
