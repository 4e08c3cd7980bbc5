"""Recipes: TOML files, validated into frozen settings. An unknown key is an error that names the nearest valid one."""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from robustsoup.errors import RecipeError, RequestError
from robustsoup.losses import Objective
from robustsoup.schedules import check_schedule
from robustsoup.soups.granularity import GRANULARITIES
from robustsoup.soups.mixing import POLICIES
from robustsoup.soups.search import MOST, alpha_name, candidates, grid_size
from robustsoup.soups.selection import Requirement, Score
from robustsoup.threats import ThreatModel

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

    @field_validator("buffers", "learning_buffers", mode="after", check_fields=False)
    @classmethod
    def _buffers(cls, value: str | None) -> str | None:
        if value is not None and value not in POLICIES:
            raise ValueError(f"got {value!r}, expected one of {', '.join(POLICIES)}")
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
            raise ValueError('synthetic_fraction: of what? give synthetic, as in synthetic = "1m.npz"')
        self.check_together()
        return self

    def check_together(self) -> None:
        """Raise ValueError for settings that do not go together."""
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: got momentum 0, expected a momentum above 0; leave nesterov out")
        _as_value_error(Objective.parse(self.objective).smoothed, self.label_smoothing)

    def overridden(self, ingredient: "Ingredient") -> "Training":
        """How an ingredient is trained: as this says, but for what the ingredient says itself."""
        return self.model_copy(update=ingredient.model_dump(exclude_none=True, exclude={"checkpoint_every", "epoch"}))

    def settings(self) -> dict[str, Any]:
        """What `train` is to be told and a step's key is made of: of settings that came later, only what is not as usual."""
        content = self.model_dump(mode="json", exclude={"synthetic", "synthetic_fraction"})
        return {
            name: value for name, value in content.items()
            if name not in LATER or value != type(self).model_fields[name].default
        }  # fmt: skip


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
        others = [name for name in type(self).model_fields if name != "checkpoint" and getattr(self, name) is not None]
        if self.checkpoint and others:
            raise ValueError(f"an ingredient with a checkpoint is not trained; remove {others[0]}")
        if (self.epoch is None) != (self.checkpoint_every is None) or (self.epoch or 0) % (self.checkpoint_every or 1):
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
    max_soups: int = Field(MOST, ge=1)
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
            raise ValueError(f"got {value!r}, expected one of {', '.join(GRANULARITIES)}, or re:PATTERN")
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
    select_on: Literal["val"] = "val"  # "test" under the paper's protocol, which is asked for by that name alone
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
            raise ValueError('screen: soups are screened by a short apgd; it does not go with attack = "autoattack"')
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
        keys = [key if key in ("clean", "union") else str(ThreatModel.parse(key)) for key in maximise]
        return keys + [Requirement.parse(text).key for text in self.require]


class Report(Section):
    """Which figures to draw."""

    figures: tuple[Figure, ...] = ("ternary", "tradeoff", "coefficients")


class Recipe(Section):
    """All settings of a run. Paths in it are relative to the recipe's own folder.

    protocol: "split" trains on `train` and selects on `val`. "paper" fine-tunes and learns on both together and selects on
    `test`, as the paper does; every table and figure then says so. (Pre-training is early-stopped on `val` if it is at all, and
    then fits on `train` alone.)
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    data: str
    model: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    image_size: int | None = Field(None, ge=8)
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    allow_leakage: bool = False
    protocol: Literal["split", "paper"] = "split"
    checkpoint: str | None = None
    pretrain: Pretrain | None = None
    finetune: Training = Training()
    ingredients: dict[str, Ingredient] = Field(min_length=1)
    soups: dict[str, Soup] = {}
    planes: dict[str, Plane] = {}
    evaluate: Evaluate = Evaluate()
    select: Select | None = None
    report: Report = Report()

    @model_validator(mode="before")
    @classmethod
    def _runs(cls, content: Any) -> Any:
        """One ingredient for each checkpoint that a run leaves."""
        tables, finetune = content.get("ingredients"), content.get("finetune")
        if not isinstance(tables, dict):
            return content
        default = finetune.get("epochs", 10) if isinstance(finetune, dict) else 10
        return content | {
            "ingredients": {k: v for name, table in tables.items() for k, v in _left(name, table, default)}
        }

    @field_validator("ingredients", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: {"checkpoint": v} if isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        if self.pretrain and self.checkpoint:
            raise ValueError("got both pretrain and checkpoint, expected one of them")
        trained = [name for name, ingredient in self.ingredients.items() if not ingredient.checkpoint]
        if trained and not (self.pretrain or self.checkpoint):
            raise ValueError(
                f"ingredients.{trained[0]} is to be fine-tuned, but from what? give [pretrain] or checkpoint"
            )
        for name in trained:
            try:
                self.finetune.overridden(self.ingredients[name]).check_together()
            except ValueError as error:
                raise ValueError(f"ingredients.{name}: {error}") from None
        if self.pretrain and not self.model:
            raise ValueError('model: missing; [pretrain] needs one, as in model = "resnet9:width=16"')
        names = {*self.ingredients, "pretrained"}
        for name in [*self.ingredients, *self.soups]:
            if not re.fullmatch(r"[\w.-]+", name) or name == "pretrained":
                raise ValueError(f"{name!r}: not a usable name; letters, digits, - and _ only, and not pretrained")
        for soup_name, soup in self.soups.items():
            for name in soup.ingredients or ():
                if name not in names:
                    raise ValueError(f"soups.{soup_name}.ingredients: {name!r} is unknown{_nearest(name, names)}")
            count = len(soup.ingredients or self.ingredients)
            if soup.method == "line" and count != 2:
                raise ValueError(f'soups.{soup_name}: method = "line" joins 2 ingredients, got {count}')
            if soup.method in ("grid", "line") and grid_size(count, soup.step) > soup.max_soups:
                raise ValueError(f"soups.{soup_name}: {self._too_many(soup, grid_size(count, soup.step))}")
        for plane_name, plane in self.planes.items():
            if len(set(plane.checkpoints)) < 3:
                raise ValueError(
                    f"planes.{plane_name}.checkpoints: got {list(plane.checkpoints)}, expected three different ones"
                )
            for name in plane.checkpoints:
                if name not in names:
                    raise ValueError(f"planes.{plane_name}.checkpoints: {name!r} is unknown{_nearest(name, names)}")
        self._check_names()
        self._check_select()
        for soup_name, soup in self.soups.items():
            for key in Score.parse(self.score_of(soup)).keys if soup.method == "greedy" else ():
                if key not in self._measures():
                    raise ValueError(
                        f'soups.{soup_name}.score: "{key}" is not evaluated; expected {", ".join(self._measures())}'
                    )
            if soup.method == "dial" and "clean" in self.threats_of(soup):
                raise ValueError(
                    f"soups.{soup_name}.threats: a dial turns from robust to clean; expected threats, got clean"
                )
        return self

    def _too_many(self, soup: Soup, count: int) -> str:
        """The price of a grid that is refused for it."""
        attacks = sum(threat != "clean" for threat in self.evaluate.threats)
        passes = count * 1000 * (1 + 2 * attacks * self.evaluate.steps * self.evaluate.restarts)
        return (
            f"step {soup.step:g} makes {count:,} soups, each to be mixed and judged: up to {passes:.1e} forward passes "
            f"for every 1,000 samples. max_soups is {soup.max_soups:,}; take a larger step or a learned soup, or raise it"
        )

    @property
    def select_on(self) -> str:
        """The split that selects."""
        return self.evaluate.report_on if self.protocol == "paper" else self.evaluate.select_on

    def _check_names(self) -> None:
        rows = [*self.ingredients, "pretrained"]
        for section in self.soups:
            rows += self.soup_names(section)
        for name in rows:
            if rows.count(name) > 1:
                raise ValueError(f"two networks would be called {name!r}; rename a soup or an ingredient")

    def threats_of(self, soup: Soup) -> tuple[str, ...]:
        """What the soups of a learned section are trained against: the base's threat where it names none."""
        return soup.threats or ((self.pretrain or self.finetune).threat,)

    def soup_names(self, section: str) -> list[str]:
        """What the soups of a section are called, in order: one for each coefficients, or each threat and objective."""
        soup = self.soups[section]
        if soup.method in ("uniform", "greedy"):
            return [section]
        if soup.method == "dial":
            threats = self.threats_of(soup)
            return [f"{section}{f'-{slug(threat)}' * (len(threats) > 1)}-t{t:g}" for threat in threats for t in soup.at]
        if soup.method == "learned":
            several = len(soup.objectives) > 1
            return [
                f"{section}-{slug(threat)}" + (f"-{slug(objective)}" if several else "")
                for threat in self.threats_of(soup)
                for objective in soup.objectives
            ]
        return [
            f"{section}-{alpha_name(alpha)}" for alpha in _candidates(soup, len(soup.ingredients or self.ingredients))
        ]

    def score_of(self, soup: Soup) -> str:
        """What a greedy soup must not lose: as its section says, else what the recipe maximises."""
        return soup.score or (self.select and self.select.maximise) or next(iter(self.evaluate.threats), "clean")

    def _measures(self) -> list[str]:
        """What an evaluation will have: "clean", each threat, and "union" where there are several."""
        threats = list(dict.fromkeys(str(ThreatModel.parse(text)) for text in self.evaluate.threats))
        attacks = [text for text in threats if text != "clean"]
        return ["clean", *attacks, *(["union"] if len(attacks) > 1 else [])]

    def _check_select(self) -> None:
        if self.select is None:
            return
        known = self._measures()
        if self.select.maximise is None and not self.evaluate.threats:
            raise ValueError("select.maximise: missing, and evaluate.threats is empty; by what is to be selected?")
        for key in self.select.looked_at():
            if key not in known:
                raise ValueError(f'select: "{key}" is not evaluated; expected one of {", ".join(known)}')

    def to_toml(self) -> str:
        """The resolved recipe as TOML, every default written out; reading it back gives the same recipe."""
        content = self.model_dump(mode="json")
        for name, soup in self.soups.items():
            content["soups"][name] = {k: v for k, v in content["soups"][name].items() if k in soup.settable}
        for section in ("pretrain", "finetune"):
            if content[section] and content[section]["synthetic"] is None:
                del content[section]["synthetic_fraction"]
        return tomli_w.dumps(_without_none(content))


def _left(name: str, table: Any, default: int) -> list[tuple[str, Any]]:
    """The ingredients that a table stands for: itself, or one for each checkpoint that its run leaves."""
    every = table.get("checkpoint_every") if isinstance(table, dict) else None
    if not isinstance(every, int) or every < 1 or "epoch" in table:
        return [(name, table)]
    epochs = table.get("epochs", default)
    if not isinstance(epochs, int) or epochs % every:
        raise ValueError(f"ingredients.{name}.checkpoint_every: got {every}, expected a part of its {epochs} epochs")
    return [(f"{name}-{epoch}", {**table, "epoch": epoch}) for epoch in range(every, epochs + 1, every)]


def with_files(recipe: Recipe, place: Callable[[str], str]) -> Recipe:
    """The recipe with a path, place(NAME), for each published checkpoint "robustbench:NAME" that it names."""

    def found(checkpoint: str | None) -> str | None:
        named = checkpoint is not None and checkpoint.startswith(PUBLISHED)
        return place(checkpoint.removeprefix(PUBLISHED)) if named else checkpoint

    ingredients = {
        name: item.model_copy(update={"checkpoint": found(item.checkpoint)})
        for name, item in recipe.ingredients.items()
    }
    return recipe.model_copy(update={"ingredients": ingredients, "checkpoint": found(recipe.checkpoint)})


def slug(text: str) -> str:
    """Text for a file name: "Linf 8/255" -> "linf-8-255"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _candidates(soup: Soup, n: int) -> list[tuple[float, ...]]:
    try:
        return candidates(soup.method, n, soup.step, soup.max_soups)
    except RequestError as error:
        raise ValueError(str(error)) from None


def load_recipe(path: str | os.PathLike, sets: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe; sets: "a.b=value" overrides, values in TOML (a bare word is a string).

    extends = "other.toml", or several in a list, the last one first: what those files say, table by table, where this one says
    nothing else. They need not be whole recipes; their paths are relative to the recipe that is read.

    Raises RecipeError with the file, the key, what is wrong and, for an unknown key, the nearest valid one.
    """
    path = Path(path)
    content = _read(path, ())
    for setting in sets:
        _apply(content, setting)
    return parse_recipe(content, str(path), path.parent)


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a recipe with what it extends; `below`: who asked for it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such file; recipes are TOML files; `robustsoup demo` leaves one as runs/quickstart/recipe.toml"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file: {error}") from None
    if "extends" not in content:
        return content
    named = content.pop("extends")
    under: dict[str, Any] = {}
    for other in named if isinstance(named, list) else [named]:
        if not isinstance(other, str) or (path.parent / other).resolve() in {p.resolve() for p in (path, *below)}:
            raise RecipeError(f"{path}: extends: got {other!r}, expected the name of another recipe, in no circle")
        under = _merged(under, _read(path.parent / other, (path, *below)))
    return _merged(under, content)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with what `over` says: tables are merged, all else is replaced."""
    both = {k: _merged(under[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(under.get(k), dict)}
    return under | over | both


def parse_recipe(content: dict[str, Any], where: str, folder: Path) -> Recipe:
    """Validate a recipe that is at hand as a dict; paths are made relative to `folder`. Raises RecipeError."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from None
    return _resolve_paths(recipe, folder)


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    def absolute(path: str | None) -> str | None:
        if path is None or path.startswith(PUBLISHED):
            return path
        return str((folder / Path(path).expanduser()).resolve())

    ingredients = {
        name: ingredient.model_copy(update={"checkpoint": absolute(ingredient.checkpoint)})
        for name, ingredient in recipe.ingredients.items()
    }
    data = recipe.data
    if data.startswith("folder:"):
        data = f"folder:{absolute(data.removeprefix('folder:'))}"
    sections = {
        name: section and section.model_copy(update={"synthetic": absolute(section.synthetic)})
        for name, section in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune))
    }
    return recipe.model_copy(
        update={"ingredients": ingredients, "checkpoint": absolute(recipe.checkpoint), "data": data, **sections}
    )


def _apply(content: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals:
        raise RecipeError(f'--set {setting}: expected a.b=value, as in "soups.learned.epochs=2"')
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *tables, last = key.strip().split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise RecipeError(f"--set {setting}: {table} is not a table")
    content[last] = parsed


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key{_nearest(str(first['loc'][-1]), _keys_at(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{place}: missing"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f"; got {first['input']!r}"
    return f"{place}: {message}{got}" if place else f"{message}{got}"


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
    return f'; did you mean "{near[0]}"?' if near else f"; expected one of {', '.join(sorted(known))}"


def _keys_at(place: tuple) -> list[str]:
    """The valid keys of the table at `place` in a recipe."""
    tables = {"pretrain": Pretrain, "finetune": Training, "evaluate": Evaluate, "select": Select, "report": Report}
    if not place:
        return list(Recipe.model_fields)
    if place[-1] == "early_stop":
        return list(EarlyStop.model_fields)
    named = {"ingredients": Ingredient, "soups": Soup, "planes": Plane}
    return list((named[place[0]] if place[0] in named else tables[place[0]]).model_fields)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
