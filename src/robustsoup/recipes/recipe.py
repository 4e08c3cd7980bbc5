"""The recipe: all tables together, and the checks across them."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, Field, field_validator, model_validator

from robustsoup.catalog import DATA_SOURCES, SOUP_METHODS
from robustsoup.checkpoints.opening import Opening
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
    Subspace,
    Training,
    check_training,
    one_of,
    raises_value_error,
)
from robustsoup.settings import (
    MOST_SOUPS,
    PRECISIONS,
    SEED_LIMIT,
    TrainSettings,
    suggest,
)
from robustsoup.soups.confirmation import ADAPTIVE_METHODS, requires_confirmation
from robustsoup.soups.goal import KNEE, Goal, Score, default_measure, list_measures
from robustsoup.soups.grid import Alpha, alpha_name, format_count, grid_size, list_alphas
from robustsoup.soups.learned_search import (
    LEARNING,
    name_learned,
    name_positions,
    threat_slug,
)
from robustsoup.soups.surrogate_search import check_modelled
from robustsoup.threats import ThreatModel

PRETRAINED = "pretrained"
"""Name of the network that [pretrain] trains or `checkpoint` names."""
MAX_INGREDIENTS = 1_000
"""Most ingredients of a recipe, each checkpoint of `checkpoint_every` counted."""

MAX_NAME_BYTES = 200
"""Longest name of a run, a network or a plane; file systems allow 255 bytes with what is added."""

_NO_SOUPS: dict[str, Soup] = {}
_NO_PLANES: dict[str, Plane] = {}


class Recipe(Section):
    """All settings of a run, validated and parsed.

    With protocol "split", networks are trained on `train` and soups are selected on `val`. With
    protocol "paper", networks are fine-tuned and soups learned on both together, and soups are
    selected on `test`, as in the paper; every table and figure then says so. Pre-training with
    early stopping uses `train` alone in both.
    """

    name: str = Field(pattern=r"^[\w.-]+$", description="Name of the run.")
    data: str = Field(description=f"Data set: {DATA_SOURCES.spellings()}.")
    model: str | None = Field(
        None,
        description="Network, such as resnet9:width=16 or package.module:factory; by default the "
        "one that the checkpoints record.",
    )
    seed: int = Field(
        0, ge=0, lt=SEED_LIMIT, description="Seed of the split and of tables without their own."
    )
    image_size: int | None = Field(
        None, ge=8, description="Side length of images in pixels, for image files."
    )
    channels: Literal[1, 3] | None = Field(
        None,
        description="Channels of images, for image files; by default 1 if every image is grey.",
    )
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = Field(
        None, description="Mean and standard deviation by channel that the network expects."
    )
    key: str | None = Field(
        None,
        description="Which weights to read from checkpoint files that hold several sets, such as "
        "state_dict_ema.",
    )
    adapter_base: str | None = Field(
        None,
        description="Base of the LoRA adapters among the checkpoints: a file, a folder or an "
        "address; by default the one that adapter_config.json names.",
    )
    precision: Annotated[str, AfterValidator(one_of(PRECISIONS))] = Field(
        "auto", description="Arithmetic of training, learning, screening and planes."
    )
    allow_leakage: bool = Field(
        False, description="Accept checkpoints that were trained on samples used to evaluate them."
    )
    protocol: Annotated[str, AfterValidator(one_of(("split", "paper")))] = Field(
        "split", description="split selects on val; paper fits on val too and selects on test."
    )
    checkpoint: str | None = Field(
        None, description="Checkpoint to fine-tune ingredients from, instead of [pretrain]."
    )
    pretrain: Pretrain | None = Field(None, description="Training from fresh weights.")
    finetune: Training = Field(Training(), description="How ingredients are fine-tuned.")
    subspace: Subspace | None = Field(
        None, description="A line or a triangle of networks, whose ends are ingredients."
    )
    ingredients: dict[str, Ingredient] = Field(
        min_length=1,
        description="The ingredients: paths of checkpoints, or tables of training settings.",
    )
    soups: dict[str, Soup] = Field(_NO_SOUPS, description="The soups.")
    planes: dict[str, Plane] = Field(_NO_PLANES, description="Planes of loss values.")
    evaluate: Evaluate = Field(Evaluate(), description="How networks are evaluated.")
    select: Select | None = Field(
        None, description="Which soup to choose; no soup is chosen without this table."
    )
    report: Report = Field(Report(), description="Which figures to draw.")

    @model_validator(mode="before")
    @classmethod
    def _expand_checkpoint_every(cls, content: Any) -> Any:
        """Replace an ingredient with `checkpoint_every` by one ingredient for each checkpoint."""
        tables, finetune = _with_subspace_ends(content), content.get("finetune")
        if not isinstance(tables, dict):
            return content
        default = TrainSettings().epochs
        epochs = finetune.get("epochs", default) if isinstance(finetune, dict) else default
        items = [
            item
            for name, table in tables.items()
            for item in _expand_ingredient(name, table, epochs)
        ]
        if len(items) > MAX_INGREDIENTS:
            raise ValueError(
                f"ingredients: got {len(items):,}, expected at most {MAX_INGREDIENTS:,}"
            )
        if duplicate := _first_duplicate(name for name, _ in items):
            raise ValueError(f'two ingredients would be called "{duplicate}"; rename one')
        return content | {"ingredients": dict(items)}

    @field_validator("ingredients", mode="before")
    @classmethod
    def _accept_paths(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: {"checkpoint": v} if isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _check_tables_together(self) -> "Recipe":
        self._check_starting_points()
        self._check_ingredients()
        self._check_names()
        for name, soup in self.soups.items():
            self._check_soup(name, soup)
        self._check_soup_count()
        for name, plane in self.planes.items():
            self._check_plane(name, plane)
        self._check_row_names()
        self._check_protocol()
        self._check_measures()
        return self

    # Derived values.

    @property
    def opening(self) -> Opening:
        """How the checkpoints of the recipe are opened."""
        return Opening(self.key, self.adapter_base)

    @property
    def select_on(self) -> str:
        """The split that selects soups."""
        evaluate = self.evaluate
        return evaluate.report_on if self.protocol == "paper" else evaluate.select_on

    @property
    def select_samples(self) -> int | None:
        """Number of samples that select; None for all."""
        evaluate = self.evaluate
        return evaluate.report_samples if self.protocol == "paper" else evaluate.select_samples

    @property
    def fits_on_val(self) -> bool:
        """Whether networks are fine-tuned, and soups learned, on `val` too."""
        return self.protocol == "paper"

    @property
    def base_threat(self) -> ThreatModel:
        """The threat model of [pretrain], else of [finetune]."""
        return (self.pretrain or self.finetune)["threat"]

    @property
    def measures(self) -> list[str]:
        """The evaluated measures: "clean", each threat, "union" for several, and "shift"."""
        return list_measures(self.evaluate.threats, shift=bool(self.evaluate.shift))

    @property
    def default_measure(self) -> str:
        """The measure to maximise unless the recipe names one: the first threat."""
        return default_measure(self.evaluate.threats)

    @property
    def goal(self) -> Goal | None:
        """What the selection maximises and requires; None if the recipe selects no soup."""
        return None if self.select is None else self.select.goal(self.default_measure)

    @property
    def confirms(self) -> bool:
        """Whether finalists are confirmed on samples that no attack of the search looked at.

        They are if attacks decide which soups are attacked in full, or which soups exist, and the
        recipe requires an accuracy under attack.
        """
        adaptive = self.evaluate.screens or any(
            soup.method in ADAPTIVE_METHODS for soup in self.soups.values()
        )
        fixed = self.protocol == "paper" or self.goal is None
        return adaptive and not fixed and requires_confirmation(self.goal or Goal())

    def training(self, name: str, *, precision: str = "auto") -> TrainSettings:
        """Return the training settings of an ingredient: [finetune] with the ingredient's values.

        Raises:
            RequestError: The values contradict each other.
        """
        overrides = self.ingredients[name].overrides()
        return self.finetune.settings(seed=self.seed, precision=precision, overrides=overrides)

    def ingredients_of(self, soup: Soup) -> tuple[str, ...]:
        """Return the names of a soup's ingredients; by default all ingredients of the recipe."""
        return soup.ingredients or tuple(self.ingredients)

    @property
    def mixed_networks(self) -> tuple[str, ...]:
        """Names of the ingredients, and of the pre-trained network if a soup is made of it."""
        names = {name for soup in self.soups.values() for name in self.ingredients_of(soup)}
        return (*self.ingredients, *([PRETRAINED] if PRETRAINED in names else []))

    def threats_of(self, soup: Soup) -> tuple[ThreatModel, ...]:
        """Return the threats to learn soups against; by default the threat of the base."""
        return soup.threats or (self.base_threat,)

    def score_of(self, soup: Soup) -> Score:
        """Return the score that a greedy soup must not lower; by default the maximised measure."""
        maximised = self.select["maximise"] if self.select else None
        target = self.default_measure if maximised in (None, KNEE) else maximised
        return soup["score"] or Score.parse(target)

    def list_named_functions(self) -> list[str]:
        """Return what may name code of the user's, "package.module:name", beside objectives."""
        attack = str(self.evaluate.attack_settings(seed=self.seed).attack)
        keys = ("buffers", "learning_buffers")
        names: list[str | None] = [self.model, self.data, attack]
        for soup in self.soups.values():
            names += [soup.method, *map(soup.__getitem__, keys)]
        return [name for name in names if name and ":" in name]

    def soup_names(self, section: str) -> list[str]:
        """Return the names of the soups of a section, in order."""
        soup = self.soups[section]
        default = _name_by_threat_and_weights if soup.merges else _name_by_coefficients
        name_soups = _SOUP_NAMES.get(soup.method, default)
        return name_soups(self, section)

    def alphas_of(self, soup: Soup) -> list[Alpha]:
        """Return the coefficients of a method that lists them, such as "uniform" or "grid"."""
        return list_alphas(soup.method, soup.search_settings(), len(self.ingredients_of(soup)))

    def to_toml(self) -> str:
        """Return the recipe as TOML with every default; reading it returns an equal recipe."""
        content = self.model_dump(mode="json")
        for name, soup in self.soups.items():
            content["soups"][name] = {
                k: v for k, v in content["soups"][name].items() if k in soup.settable
            }
        for section in ("pretrain", "finetune"):
            if content[section] and content[section]["synthetic"] is None:
                del content[section]["synthetic_fraction"]
        return tomli_w.dumps(_without_none(content))

    # Checks across the tables.

    def _check_starting_points(self) -> None:
        if self.pretrain and self.checkpoint:
            raise ValueError("got both [pretrain] and checkpoint, expected one of them")
        if self.pretrain and not self.model:
            raise ValueError(
                'model: missing; [pretrain] requires a network, such as model = "resnet9:width=16"'
            )
        for name, ingredient in self.ingredients.items():
            if not (ingredient.checkpoint or self.pretrain or self.checkpoint):
                raise ValueError(
                    f"ingredients.{name}: needs a starting point; "
                    "add a [pretrain] table or set checkpoint"
                )

    def _check_ingredients(self) -> None:
        for name, ingredient in self.ingredients.items():
            if ingredient.subspace_end is not None:
                self._check_end(name, ingredient.subspace_end)
            if ingredient.checkpoint or ingredient.subspace_end is not None:
                continue
            try:
                settings = self.training(name)
                check_training(settings)
            except (RequestError, ValueError) as error:
                raise ValueError(f"ingredients.{name}: {error}") from None
            if ingredient.epoch is None:
                continue
            if settings.early_stop:
                raise ValueError(
                    f"ingredients.{name}: checkpoint_every does not go with early stopping; "
                    "set finetune.early_stop = false"
                )
            if ingredient.epoch > settings.epochs:
                raise ValueError(
                    f"ingredients.{name}.epoch: got {ingredient.epoch}, "
                    f"expected one of the {settings.epochs} epochs of its run"
                )

    def _check_end(self, name: str, number: int) -> None:
        ends = len(self.subspace.threats) if self.subspace else 0
        if number > ends:
            raise ValueError(
                f"ingredients.{name}.subspace_end: got {number}, but [subspace] has {ends} ends"
            )

    def _check_names(self) -> None:
        if self.name in (".", ".."):
            raise ValueError(f'name: got "{self.name}", expected a name, not a folder')
        for name in [*self.ingredients, *self.soups, *self.planes]:
            if not re.fullmatch(r"[\w.-]+", name) or name == PRETRAINED:
                raise ValueError(
                    f'"{name}": not a valid name; expected letters, digits, ".", "-" and "_", '
                    f'and not "{PRETRAINED}"'
                )

    def _check_known_networks(self, place: str, names: Iterable[str]) -> None:
        base = [PRETRAINED] if self.pretrain or self.checkpoint else []
        networks = sorted([*self.ingredients, *base])
        for name in names:
            if name not in networks:
                raise ValueError(f'{place}: "{name}" is unknown{suggest(name, networks)}')

    def _check_soup(self, name: str, soup: Soup) -> None:
        names = soup.ingredients or ()
        self._check_known_networks(f"soups.{name}.ingredients", names)
        if len(set(names)) < len(names):
            raise ValueError(f"soups.{name}.ingredients: got {list(names)}, expected each once")
        if soup.method == "line" and len(self.ingredients_of(soup)) != 2:
            raise ValueError(
                f'soups.{name}: method = "line" requires 2 ingredients, '
                f"got {len(self.ingredients_of(soup))}"
            )
        if soup.merges:
            self._check_merge(name, soup)
        listed = soup.method in ("grid", "line", "surrogate")
        if listed or (soup.merges and self._weighs_by_grid(soup)):
            self._check_grid_size(name, soup)
        if soup.method == "surrogate" and self.goal is not None:
            raises_value_error(check_modelled)(self.goal)
        if soup.method == "surrogate" and self.evaluate.screens:
            raise ValueError(
                f'soups.{name}: method = "surrogate" attacks few soups by a rule of its own; '
                "remove evaluate.screen"
            )
        if soup.method in LEARNING:
            self._check_learning(name, soup)
        if soup.method == "dial" and any(threat.is_clean for threat in self.threats_of(soup)):
            raise ValueError(
                f"soups.{name}.threats: got clean, expected threats with a radius above 0; "
                "a dial turns from robust to clean"
            )

    def _check_learning(self, name: str, soup: Soup) -> None:
        """Check the settings of learning that depend on each other or on the ingredients."""
        try:
            for threat, objective in itertools.product(self.threats_of(soup), soup.objectives):
                settings = soup.learn_settings(threat, objective, seed=0, precision="auto")
                settings.check_start(len(self.ingredients_of(soup)))
        except RequestError as error:
            raise ValueError(f"soups.{name}.{error}") from None

    def _weighs_by_grid(self, soup: Soup) -> bool:
        """Return whether a merging method is tried with a grid of weights."""
        uniform = SOUP_METHODS[soup.method].facts.get("weights") == "uniform"
        return soup["weights"] == "grid" and not uniform

    def _check_merge(self, name: str, soup: Soup) -> None:
        """Check what the merging method of a table requires."""
        count, expected = len(self.ingredients_of(soup)), SOUP_METHODS[soup.method].facts
        if expected.get("ingredients", count) != count:
            raise ValueError(
                f'soups.{name}: method = "{soup.method}" merges {expected["ingredients"]} '
                f"ingredients, got {count}"
            )
        if soup.requires("blocks") and not soup["blocks"]:
            raise ValueError(
                f'soups.{name}.blocks: missing; method = "{soup.method}" requires the blocks to '
                'take from the second ingredient, such as ["residual1"]'
            )
        if soup.requires("threat") and any(t.is_clean for t in self.threats_of(soup)):
            raise ValueError(
                f"soups.{name}.threats: got clean, expected threats with a radius above 0; "
                f"{soup.method} measures on attacked images"
            )

    def _check_soup_count(self) -> None:
        count = sum(map(self._count_soups, self.soups.values()))
        if count > MOST_SOUPS:
            raise ValueError(f"soups: got {format_count(count)}, expected at most {MOST_SOUPS:,}")

    def _count_soups(self, soup: Soup) -> int:
        """Return the number of soups of a section, without listing them."""
        match soup.method:
            case "grid" | "line" | "surrogate":
                return grid_size(len(self.ingredients_of(soup)), soup.search_settings().step)
            case "learned":
                return len(self.threats_of(soup)) * len(soup.objectives)
            case "dial":
                return len(self.threats_of(soup)) * len(soup.at)
            case _ if soup.merges and self._weighs_by_grid(soup):
                threats = len(self.threats_of(soup)) if soup.requires("threat") else 1
                settings = soup.search_settings()
                return threats * grid_size(len(self.ingredients_of(soup)), settings.step)
            case _:
                return 1

    def _check_grid_size(self, name: str, soup: Soup) -> None:
        settings, attack = soup.search_settings(), self.evaluate.attack_settings(seed=0)
        count = grid_size(len(self.ingredients_of(soup)), settings.step)
        if count <= settings.max_soups:
            return
        attacks = sum(not threat.is_clean for threat in self.evaluate.threats)
        most = attack.most_passes(classes=1000)  # how many the data has is not known yet
        passes = count * 1000 * (1 + attacks * most)
        raise ValueError(
            f"soups.{name}: step {settings.step:g} makes {format_count(count)} soups; mixing and "
            f"evaluating them takes up to {Decimal(passes):.1e} forward passes for every 1,000 "
            f"samples. max_soups is {settings.max_soups:,}; choose a larger step or a learned "
            "soup, or raise max_soups in a recipe"
        )

    def _check_plane(self, name: str, plane: Plane) -> None:
        if len(set(plane.checkpoints)) < 3:
            raise ValueError(
                f"planes.{name}.checkpoints: got {list(plane.checkpoints)}, "
                "expected three different networks"
            )
        self._check_known_networks(f"planes.{name}.checkpoints", plane.checkpoints)

    def _check_row_names(self) -> None:
        names = [PRETRAINED, *self.ingredients]
        for section in self.soups:
            names += self.soup_names(section)
        for name in [*names, *self.planes, self.name]:
            if len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError(
                    f'"{name[:20]}...": got a name of {len(name.encode()):,} bytes, expected at '
                    f"most {MAX_NAME_BYTES}, as files are named after it; shorten it"
                )
        if duplicate := _first_duplicate(names):
            raise ValueError(
                f'two networks would be called "{duplicate}"; rename a soup or an ingredient'
            )
        if duplicate := _first_duplicate([name.casefold() for name in names]):
            first, second, *_ = [name for name in names if name.casefold() == duplicate]
            raise ValueError(
                f'"{first}" and "{second}": files are named after networks, and some file systems '
                "cannot tell these names apart; rename one"
            )

    def _check_protocol(self) -> None:
        if self.protocol != "paper":
            return
        for name, soup in self.soups.items():
            if soup["early_stop"]:
                raise ValueError(
                    f'soups.{name}.early_stop: with protocol = "paper", ingredients are fitted on '
                    "val too, so no held-out samples are left to stop on; remove early_stop"
                )
        if self.evaluate.screens:
            raise ValueError(
                'evaluate.screen: with protocol = "paper", the split that selects is also '
                "reported and must be evaluated in full; remove screen"
            )

    def _check_measures(self) -> None:
        if self.select and self.select["maximise"] is None and not self.evaluate.threats:
            raise ValueError(
                "select.maximise: missing; evaluate.threats is empty, so there is no default"
            )
        goal = self.goal
        self._check_measured("select", goal.measures if goal else [])
        for name, soup in self.soups.items():
            if soup.method == "greedy":
                self._check_measured(f"soups.{name}.score", self.score_of(soup).keys)

    def _check_measured(self, place: str, keys: Iterable[str]) -> None:
        for key in keys:
            if key not in self.measures:
                hint = "; set evaluate.shift (search --shift FOLDER)" if key == "shift" else ""
                raise ValueError(
                    f'{place}: "{key}" is not evaluated; expected one of '
                    f"{', '.join(self.measures)}{hint}"
                )


def _name_one_soup(_recipe: Recipe, section: str) -> list[str]:
    return [section]


def _name_by_coefficients(recipe: Recipe, section: str) -> list[str]:
    alphas = raises_value_error(recipe.alphas_of)(recipe.soups[section])
    return [f"{section}-{alpha_name(alpha)}" for alpha in alphas]


def _name_by_threat_and_objective(recipe: Recipe, section: str) -> list[str]:
    soup = recipe.soups[section]
    return name_learned(section, recipe.threats_of(soup), soup.objectives)


def _name_by_threat_and_weights(recipe: Recipe, section: str) -> list[str]:
    soup = recipe.soups[section]
    threats = recipe.threats_of(soup) if soup.requires("threat") else ()
    names = _name_by_coefficients(recipe, section)
    if len(names) == 1:
        names = [section]
    if len(threats) < 2:
        return names
    return [
        name.replace(section, f"{section}-{threat_slug(threat)}", 1)
        for threat in threats
        for name in names
    ]


def _name_by_position(recipe: Recipe, section: str) -> list[str]:
    soup = recipe.soups[section]
    return name_positions(section, recipe.threats_of(soup), soup.at)


_SOUP_NAMES: Mapping[str, Callable[[Recipe, str], list[str]]] = {
    "uniform": _name_one_soup,
    "greedy": _name_one_soup,
    "learned": _name_by_threat_and_objective,
    "dial": _name_by_position,
}


def _with_subspace_ends(content: Any) -> Any:
    """Return the tables of the ingredients, with one for each end of [subspace]."""
    tables, subspace = content.get("ingredients"), content.get("subspace")
    threats = subspace.get("threats") if isinstance(subspace, dict) else None
    if not isinstance(threats, (list, tuple)) or not isinstance(tables, (dict, type(None))):
        return tables
    ends = {f"end{number}": {"subspace_end": number} for number in range(1, len(threats) + 1)}
    listed = tables or {}
    for name, end in ends.items():
        if listed.get(name, end) != end:
            raise ValueError(f'two ingredients would be called "{name}"; rename one')
    return {**listed, **ends}


def _expand_ingredient(name: str, table: Any, default_epochs: Any) -> list[tuple[str, Any]]:
    """Return the ingredients that a table stands for: itself, or one for each checkpoint."""
    interval = table.get("checkpoint_every") if isinstance(table, dict) else None
    if not isinstance(interval, int) or interval < 1 or "epoch" in table:
        return [(name, table)]
    epochs = table.get("epochs", default_epochs)
    if isinstance(epochs, int) and epochs < 1:
        return [(name, table)]  # the check of `epochs` refuses it
    if not isinstance(epochs, int) or epochs % interval:
        raise ValueError(
            f"ingredients.{name}.checkpoint_every: got {interval}, "
            f"expected a divisor of its {epochs} epochs"
        )
    if epochs // interval > MAX_INGREDIENTS:
        raise ValueError(
            f"ingredients.{name}.checkpoint_every: got {interval}, which makes "
            f"{epochs // interval:,} ingredients, expected at most {MAX_INGREDIENTS:,}"
        )
    return [
        (f"{name}-{epoch}", {**table, "epoch": epoch})
        for epoch in range(interval, epochs + 1, interval)
    ]


def _first_duplicate(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
