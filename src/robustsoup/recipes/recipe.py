"""A whole recipe: its tables, and what is wrong with them together."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import tomli_w
from pydantic import Field, field_validator, model_validator

from robustsoup.errors import RequestError
from robustsoup.recipes.sections import (
    Evaluate,
    Ingredient,
    Plane,
    Pretrain,
    Report,
    Section,
    Select,
    Soup,
    Training,
    nearest,
)
from robustsoup.soups.grid import alpha_name, candidates, grid_size
from robustsoup.soups.selection import Score
from robustsoup.threats import ThreatModel


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
    soups: dict[str, Soup] = Field({})
    planes: dict[str, Plane] = Field({})
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
        left = [item for name, table in tables.items() for item in _left(name, table, default)]
        for name in dict(left):
            if sum(name == other for other, _ in left) > 1:
                raise ValueError(f"two ingredients would be called {name!r}; rename one")
        return content | {"ingredients": dict(left)}

    @field_validator("ingredients", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: {"checkpoint": v} if isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        self._check_ingredients()
        known = {*self.ingredients, *(["pretrained"] if self.pretrain or self.checkpoint else [])}
        for name, soup in self.soups.items():
            self._check_known(f"soups.{name}.ingredients", soup.ingredients or (), known)
            if len(set(soup.ingredients or ())) < len(soup.ingredients or ()):
                raise ValueError(
                    f"soups.{name}.ingredients: got {list(soup.ingredients)}, expected each once"
                )
            self._check_count(name, soup)
            if soup.early_stop and self.protocol == "paper":
                raise ValueError(
                    f'soups.{name}.early_stop: by protocol = "paper" ingredients are fitted on val too, so nothing is left to '
                    "stop on; leave it out"
                )
        for name, plane in self.planes.items():
            if len(set(plane.checkpoints)) < 3:
                raise ValueError(
                    f"planes.{name}.checkpoints: got {list(plane.checkpoints)}, expected three different ones"
                )
            self._check_known(f"planes.{name}.checkpoints", plane.checkpoints, known)
        if self.evaluate.screen and self.protocol == "paper":
            raise ValueError(
                'evaluate.screen: by protocol = "paper" the split that selects is reported too, and is judged in full'
            )
        self._check_names()
        self._check_select()
        for name, soup in self.soups.items():
            self._check_measured(name, soup)
        return self

    def _check_ingredients(self) -> None:
        if self.pretrain and self.checkpoint:
            raise ValueError("got both pretrain and checkpoint, expected one of them")
        trained = [
            name for name, ingredient in self.ingredients.items() if not ingredient.checkpoint
        ]
        if trained and not (self.pretrain or self.checkpoint):
            raise ValueError(
                f"ingredients.{trained[0]} is to be fine-tuned, but from what? give [pretrain] or checkpoint"
            )
        for name in trained:
            epoch, epochs = (
                self.ingredients[name].epoch,
                self.ingredients[name].epochs or self.finetune.epochs,
            )
            if epoch is not None and self.finetune.early_stop:
                raise ValueError(
                    f"ingredients.{name}: a run that leaves checkpoints is not stopped early; set finetune.early_stop = false"
                )
            if epoch is not None and epoch > epochs:
                raise ValueError(
                    f"ingredients.{name}.epoch: got {epoch}, expected one of the {epochs} epochs of its run"
                )
            try:
                self.finetune.overridden(self.ingredients[name]).check_together()
            except ValueError as error:
                raise ValueError(f"ingredients.{name}: {error}") from None
        if self.pretrain and not self.model:
            raise ValueError(
                'model: missing; [pretrain] needs one, as in model = "resnet9:width=16"'
            )
        for name in [*self.ingredients, *self.soups, *self.planes]:
            if not re.fullmatch(r"[\w.-]+", name) or name == "pretrained":
                raise ValueError(
                    f"{name!r}: not a usable name; letters, digits, - and _ only, and not pretrained"
                )

    def _check_known(self, place: str, names: Iterable[str], known: set[str]) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{place}: {name!r} is unknown{nearest(name, known)}")

    def _check_count(self, name: str, soup: Soup) -> None:
        count = len(soup.ingredients or self.ingredients)
        if soup.method == "line" and count != 2:
            raise ValueError(f'soups.{name}: method = "line" joins 2 ingredients, got {count}')
        if (
            soup.method in ("grid", "line")
            and (made := grid_size(count, soup.step)) > soup.max_soups
        ):
            attacks = sum(threat != "clean" for threat in self.evaluate.threats)
            passes = made * 1000 * (1 + 2 * attacks * self.evaluate.steps * self.evaluate.restarts)
            raise ValueError(
                f"soups.{name}: step {soup.step:g} makes {made:,} soups, each to be mixed and judged: up to {passes:.1e} "
                f"forward passes for every 1,000 samples. max_soups is {soup.max_soups:,}; take a larger step or a learned "
                "soup, or raise it"
            )

    def _check_measured(self, name: str, soup: Soup) -> None:
        for key in Score.parse(self.score_of(soup)).keys if soup.method == "greedy" else ():
            if key not in self._measures():
                raise ValueError(
                    f'soups.{name}.score: "{key}" is not evaluated; expected {", ".join(self._measures())}'
                )
        if soup.method == "dial" and "clean" in self.threats_of(soup):
            raise ValueError(
                f"soups.{name}.threats: a dial turns from robust to clean; expected threats, got clean"
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
                raise ValueError(
                    f"two networks would be called {name!r}; rename a soup or an ingredient"
                )

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
            return [
                f"{section}{f'-{slug(threat)}' * (len(threats) > 1)}-t{t:g}"
                for threat in threats
                for t in soup.at
            ]
        if soup.method == "learned":
            several = len(soup.objectives) > 1
            return [
                f"{section}-{slug(threat)}" + (f"-{slug(objective)}" if several else "")
                for threat in self.threats_of(soup)
                for objective in soup.objectives
            ]
        return [
            f"{section}-{alpha_name(alpha)}"
            for alpha in _candidates(soup, len(soup.ingredients or self.ingredients))
        ]

    def score_of(self, soup: Soup) -> str:
        """What a greedy soup must not lose: as its section says, else what the recipe maximises."""
        return (
            soup.score
            or (self.select and self.select.maximise)
            or next(iter(self.evaluate.threats), "clean")
        )

    def _measures(self) -> list[str]:
        """What an evaluation will have: "clean", each threat, and "union" where there are several."""
        threats = list(
            dict.fromkeys(str(ThreatModel.parse(text)) for text in self.evaluate.threats)
        )
        attacks = [text for text in threats if text != "clean"]
        return ["clean", *attacks, *(["union"] if len(attacks) > 1 else [])]

    def _check_select(self) -> None:
        if self.select is None:
            return
        known = self._measures()
        if self.select.maximise is None and not self.evaluate.threats:
            raise ValueError(
                "select.maximise: missing, and evaluate.threats is empty; by what is to be selected?"
            )
        for key in self.select.looked_at():
            if key not in known:
                raise ValueError(
                    f'select: "{key}" is not evaluated; expected one of {", ".join(known)}'
                )

    def to_toml(self) -> str:
        """The resolved recipe as TOML, every default written out; reading it back gives the same recipe."""
        content = self.model_dump(mode="json")
        for name, soup in self.soups.items():
            content["soups"][name] = {
                k: v for k, v in content["soups"][name].items() if k in soup.settable
            }
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
        raise ValueError(
            f"ingredients.{name}.checkpoint_every: got {every}, expected a part of its {epochs} epochs"
        )
    return [
        (f"{name}-{epoch}", {**table, "epoch": epoch}) for epoch in range(every, epochs + 1, every)
    ]


def slug(text: str) -> str:
    """Text for a file name: "Linf 8/255" -> "linf-8-255"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _candidates(soup: Soup, n: int) -> list[tuple[float, ...]]:
    try:
        return candidates(soup.method, n, soup.step, soup.max_soups)
    except RequestError as error:
        raise ValueError(str(error)) from None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
