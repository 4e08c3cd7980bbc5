"""plan: from a recipe to keyed steps. Pure: it runs nothing and writes nothing."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Data, Synthetic
from robustsoup.errors import DataError
from robustsoup.models import NetworkSettings, code_fingerprint
from robustsoup.recipes import Ingredient, Plane, Recipe, Soup, Training
from robustsoup.soups.ancestry import common_ancestor
from robustsoup.soups.grid import candidates
from robustsoup.training.objectives import Objective

VERSIONS = {
    "pretrain": 1,
    "finetune": 1,
    "snapshot": 1,
    "learn": 2,
    "dial": 1,
    "greedy": 1,
    "mix": 1,
    "evaluate": 2,
    "plane": 1,
}
"""The version of each kind of step, part of its key: raised by hand when the meaning of a step changes."""

DEFAULT_BUFFERS = {"learned": "tracked"}


@dataclass(frozen=True)
class Step:
    """One piece of work: its output depends on its settings, its parents' outputs and the data alone, as its key does.

    kind: a key of VERSIONS; name: what people call the output; parents: the keys of
    steps, or "file:DIGEST" for checkpoints that exist; passes: how many forward passes of one sample it is worth (a
    backward pass by the input counts 1, one by the weights too, 2).
    """

    key: str
    kind: str
    name: str
    settings: dict[str, Any]
    parents: tuple[str, ...]
    passes: int


@dataclass(frozen=True)
class Row:
    """A checkpoint that is judged: who made it and where its results are."""

    name: str
    role: str
    key: str
    soup: str | None = None
    ingredients: tuple[str, ...] | None = None
    coefficients: tuple[float, ...] | None = None
    learned: str | None = None
    threat: str | None = None
    objective: str | None = None
    at: float | None = None
    dial: str | None = None
    val: str | None = None
    test: str | None = None


@dataclass(frozen=True)
class Plan:
    """The steps of a recipe in an order in which they can be run, the rows of its table of results, and its planes' keys."""

    recipe: Recipe
    steps: tuple[Step, ...]
    rows: tuple[Row, ...]
    files: dict[str, Checkpoint]
    planes: dict[str, str]

    def step(self, key: str) -> Step:
        """The step with that key."""
        return next(step for step in self.steps if step.key == key)


def make_plan(recipe: Recipe, data: Data, model_settings: NetworkSettings, precision: str) -> Plan:
    """All steps that a recipe asks for, keyed.

    model_settings: how the network is built; precision: what training runs in on this device (both are in the keys).
    Reads the checkpoints and synthetic images that the recipe names; raises CheckpointError, CoefficientError, DataError.
    """
    return _Planner(recipe, data, model_settings, precision).plan()


class _Planner:
    def __init__(
        self, recipe: Recipe, data: Data, model_settings: NetworkSettings, precision: str
    ) -> None:
        self.recipe, self.data, self.model, self.precision = recipe, data, model_settings, precision
        self.code = code_fingerprint(model_settings.spec)
        self.steps: dict[str, Step] = {}
        self.files: dict[str, Checkpoint] = {}
        self.checkpoints: dict[str, str] = {}

    def plan(self) -> Plan:
        rows = self._ingredient_rows()
        for name, soup in self.recipe.soups.items():
            makers = {
                "learned": self._learned_rows,
                "dial": self._dial_rows,
                "greedy": self._greedy_rows,
            }
            rows += makers.get(soup.method, self._mixed_rows)(name, soup)
        judged = [self._judged(row) for row in rows]
        planes = {name: self._plane(name, section) for name, section in self.recipe.planes.items()}
        return Plan(self.recipe, tuple(self.steps.values()), tuple(judged), self.files, planes)

    def _add(
        self, kind: str, name: str, settings: dict[str, Any], parents: Sequence[str], passes: int
    ) -> str:
        content = {
            "kind": kind,
            "version": VERSIONS[kind],
            "settings": settings,
            "parents": list(parents),
            "data": self.data.record["split_digest"],
            "model": self.model.as_record(),
        }
        if (mark := Objective.parse(settings.get("objective", "ce")).fingerprint) is not None:
            content["objective"] = mark  # the text names a function; this says which one it is now
        if self.code is not None:
            content["code"] = self.code  # the same of a network
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
        self.steps.setdefault(key, Step(key, kind, name, settings, tuple(parents), passes))
        return key

    def _file(self, path: str) -> str:
        checkpoint = Checkpoint.open(path)
        key = f"file:{checkpoint.digest}"
        self.files[key] = checkpoint
        return key

    def _ingredient_rows(self) -> list[Row]:
        recipe, rows = self.recipe, []
        if recipe.checkpoint:
            self.checkpoints["pretrained"] = self._file(recipe.checkpoint)
        elif recipe.pretrain:
            self.checkpoints["pretrained"] = self._training(
                "pretrain", "pretrained", recipe.pretrain, ()
            )
        if "pretrained" in self.checkpoints:
            threat = recipe.pretrain.threat if recipe.pretrain else None
            rows.append(
                Row("pretrained", "pretrained", self.checkpoints["pretrained"], threat=threat)
            )
        for name, ingredient in recipe.ingredients.items():
            settings = None
            if ingredient.checkpoint:
                key = self._file(ingredient.checkpoint)
            else:
                settings = recipe.finetune.overridden(ingredient)
                key = self._finetuning(name, settings, ingredient)
            self.checkpoints[name] = key
            rows.append(
                Row(
                    name,
                    "ingredient",
                    key,
                    threat=settings and settings.threat,
                    objective=settings and settings.objective,
                )
            )
        return rows

    def _finetuning(self, name: str, training: Training, ingredient: Ingredient) -> str:
        """The run of an ingredient, and, where it leaves several checkpoints, the step that takes the one that is meant."""
        parents, every = (self.checkpoints["pretrained"],), ingredient.checkpoint_every
        if every is None:
            return self._training("finetune", name, training, parents)
        run = self._training(
            "finetune",
            name.removesuffix(f"-{ingredient.epoch}"),
            training,
            parents,
            checkpoint_every=every,
        )
        return self._add("snapshot", name, {"epoch": ingredient.epoch}, (run,), 0)

    def _training(
        self,
        kind: str,
        name: str,
        training: Training,
        parents: Sequence[str],
        checkpoint_every: int | None = None,
    ) -> str:
        settings = training.settings() | {
            "precision": self.precision,
            "seed": self._seed(training.seed),
        }
        if training.synthetic:
            synthetic = Synthetic.open(training.synthetic)
            synthetic.check_fit(self.data.train)
            settings |= {
                "synthetic": synthetic.digest,
                "synthetic_fraction": training.synthetic_fraction,
            }
        if checkpoint_every is not None:
            settings["checkpoint_every"] = checkpoint_every
        if not training.early_stop:
            settings |= self._everything()
        n = self._fitted(settings) * training.epochs
        passes = n * _step_passes(training.threat, training.objective, training.attack_steps)
        if training.early_stop:
            stop = training.early_stop
            self._enough("val", stop.samples)
            passes += training.epochs * (stop.samples or len(self.data.val)) * (2 * stop.steps + 2)
        return self._add(kind, name, settings, parents, passes)

    def _learned_rows(self, section: str, soup: Soup) -> list[Row]:
        names, parents = soup.ingredients or tuple(self.recipe.ingredients), self._parents(soup)
        rows = []
        pairs = itertools.product(self.recipe.threats_of(soup), soup.objectives)
        for label, (threat, objective) in zip(self.recipe.soup_names(section), pairs, strict=True):
            settings = self._learning(soup, threat) | {"objective": objective}
            passes = (
                self._fitted(settings)
                * soup.epochs
                * _step_passes(threat, objective, soup.attack_steps)
            )
            if stop := soup.early_stop:
                self._enough("val", stop.samples)
                settings["early_stop"] = stop.model_dump(mode="json")
                passes += soup.epochs * (stop.samples or len(self.data.val)) * (2 * stop.steps + 2)
            learned = self._add("learn", label, settings, parents, passes)
            key = self._mix(label, soup, [*parents, learned], None, "learned")
            rows.append(
                Row(label, "learned", key, section, names, None, learned, threat, objective)
            )
        return rows

    def _learning(self, soup: Soup, threat: str) -> dict[str, Any]:
        fields = (
            "attack_steps",
            "epochs",
            "batch_size",
            "lr",
            "momentum",
            "schedule",
            "detach",
            "init",
            "granularity",
        )
        settings = soup.model_dump(mode="json", include=set(fields))
        if soup.learning_buffers != "tracked":
            settings["buffers"] = soup.learning_buffers
        if soup.learning_buffers == "base":
            settings["base"] = self._base(self._parents(soup))
        if not soup.early_stop:
            settings |= self._everything()
        return settings | {
            "threat": threat,
            "precision": self.precision,
            "seed": self._seed(soup.seed),
        }

    def _parents(self, soup: Soup) -> list[str]:
        return [self.checkpoints[name] for name in soup.ingredients or self.recipe.ingredients]

    def _base(self, parents: Sequence[str]) -> str:
        """Whose statistics the policy "base" takes: the pre-trained network's, else those that `mix` would find by itself."""
        if "pretrained" in self.checkpoints:
            return self.checkpoints["pretrained"]
        found = common_ancestor([self.files[key] for key in parents])
        if found is None:
            return parents[0]
        key = f"file:{found.digest}"
        self.files.setdefault(key, found)
        return key

    def _everything(self) -> dict[str, Any]:
        """The setting that adds val to train, where the recipe follows the paper's protocol; else nothing."""
        return {"everything": True} if self.recipe.protocol == "paper" else {}

    def _fitted(self, settings: dict[str, Any]) -> int:
        return len(self.data.train) + len(self.data.val) * ("everything" in settings)

    def _dial_rows(self, section: str, soup: Soup) -> list[Row]:
        names, parents = soup.ingredients or tuple(self.recipe.ingredients), self._parents(soup)
        labels, rows = iter(self.recipe.soup_names(section)), []
        for threat in self.recipe.threats_of(soup):
            settings = self._learning(soup, threat) | {
                "by": soup.dial,
                "turn_every": soup.turn_every,
            }
            both = "ce" if soup.dial == "eps" else "mixed 0.5"
            passes = (
                self._fitted(settings) * soup.epochs * _step_passes(threat, both, soup.attack_steps)
            )
            dial = self._add("dial", f"{section} {threat}", settings, parents, passes)
            for t in soup.at:
                label = next(labels)
                key = self._mix(label, soup, [*parents, dial], None, "dial", at=t)
                rows.append(
                    Row(label, "dial", key, section, names, None, key, threat, None, t, dial)
                )
        return rows

    def _greedy_rows(self, section: str, soup: Soup) -> list[Row]:
        names, parents = soup.ingredients or tuple(self.recipe.ingredients), self._parents(soup)
        split, samples = self._selects()
        alone = [
            self._evaluation(Row(name, "ingredient", key), split, samples)
            for name, key in zip(names, parents, strict=True)
        ]
        judged, (mixing, passes) = self.steps[alone[0]], self._mixing(soup, "greedy")
        if mixing["buffers"] != "average":  # then an ingredient by itself is not judged as it is
            alone = []
        settings = {"score": self.recipe.score_of(soup), "mix": mixing, "evaluate": judged.settings}
        rounds = len(names) - 1 if alone else 2 * len(names) - 1
        chosen = self._add(
            "greedy", section, settings, [*parents, *alone], (judged.passes + passes) * rounds
        )
        key = self._mix(section, soup, [*parents, chosen], None, "greedy")
        return [Row(section, "greedy", key, section, names, None, chosen)]

    def _mixed_rows(self, section: str, soup: Soup) -> list[Row]:
        names, parents = soup.ingredients or tuple(self.recipe.ingredients), self._parents(soup)
        rows = []
        points = candidates(soup.method, len(names), soup.step, soup.max_soups)
        for label, alpha in zip(self.recipe.soup_names(section), points, strict=True):
            if (
                1.0 in alpha and (soup.buffers or "average") == "average"
            ):  # the ingredient itself, bit for bit
                key = parents[alpha.index(1.0)]
            else:
                key = self._mix(label, soup, parents, alpha, soup.method)
            rows.append(Row(label, soup.method, key, section, names, alpha))
        return rows

    def _mix(
        self,
        label: str,
        soup: Soup,
        parents: list[str],
        alpha: Sequence[float] | None,
        method: str,
        at: float | None = None,
    ) -> str:
        settings, passes = self._mixing(soup, method)
        settings["alpha"] = alpha and list(alpha)
        if at is not None:
            settings["at"] = at
        return self._add("mix", label, settings, parents, passes)

    def _mixing(self, soup: Soup, method: str) -> tuple[dict[str, Any], int]:
        """The settings of a mix apart from its coefficients, and what it is worth in passes."""
        buffers, passes = soup.buffers or DEFAULT_BUFFERS.get(method, "average"), 0
        settings = {"buffers": buffers, "seed": self._seed(soup.seed)}
        if buffers.startswith("recalibrate"):
            settings["samples"] = passes = min(soup.calibrate_samples, len(self.data.train))
        if buffers == "recalibrate-adversarial":
            settings |= {"threat": soup.calibrate_threat, "attack_steps": soup.attack_steps}
            passes *= 2 + 2 * soup.attack_steps
        if buffers == "base":
            settings["base"] = self._base(self._parents(soup))
        return settings, passes

    def _plane(self, name: str, section: Plane) -> str:
        split = self.recipe.evaluate.report_on
        settings = section.model_dump(mode="json", exclude={"checkpoints"})
        settings |= {"precision": self.precision, "seed": self._seed(section.seed), "split": split}
        settings["samples"] = min(section.samples, len(self.data.split(split)))
        settings["threat"] = section.threat or (self.recipe.pretrain or self.recipe.finetune).threat
        parents = [self.checkpoints[checkpoint] for checkpoint in section.checkpoints]
        if section.buffers == "base":
            settings["base"] = self.checkpoints.get("pretrained", parents[0])
        each = settings["samples"] * (2 * section.attack_steps + 3)
        each += min(section.calibrate_samples, len(self.data.train)) * section.buffers.startswith(
            "recalibrate"
        )
        return self._add("plane", name, settings, parents, section.points**2 * each)

    def _judged(self, row: Row) -> Row:
        evaluate = self.recipe.evaluate
        keys = {"val": self._selecting(row)}
        if evaluate.report == "all":
            keys["test"] = self._evaluation(row, evaluate.report_on, evaluate.report_samples)
        return Row(**{**vars(row), **keys})

    def _selecting(self, row: Row) -> str:
        """The evaluation that selects; where soups are screened, every one is tried with the same pool of points."""
        evaluate = self.recipe.evaluate
        split, samples = self._selects()
        if not evaluate.screen:
            return self._evaluation(row, split, samples)
        pool = {name: self._pool(name) for name in self.recipe.ingredients}
        own = next((key for name, key in pool.items() if self.checkpoints[name] == row.key), None)
        short = own is None and row.role in ("grid", "line")
        return self._evaluation(
            row, split, samples, pool=tuple(pool.values()), after=own, short=short
        )

    def _selects(self) -> tuple[str, int | None]:
        """The split that selects, and how many of its samples: on the reporting split, those that are reported."""
        evaluate = self.recipe.evaluate
        if self.recipe.protocol == "paper":
            return evaluate.report_on, evaluate.report_samples
        return evaluate.select_on, evaluate.select_samples

    def _pool(self, ingredient: str) -> str:
        row = Row(f"{ingredient}.pool", "ingredient", self.checkpoints[ingredient])
        return self._evaluation(row, *self._selects(), keep_points=True)

    def _evaluation(
        self,
        row: Row,
        split: str,
        samples: int | None,
        *,
        pool: tuple[str, ...] = (),
        after: str | None = None,
        short: bool = False,
        keep_points: bool | None = None,
    ) -> str:
        evaluate, n = self.recipe.evaluate, self._enough(split, samples)
        settings = {
            "split": split,
            "threats": list(evaluate.threats),
            "attack": evaluate.attack,
            "loss": evaluate.loss,
            "steps": evaluate.screen_steps if short else evaluate.steps,
            "restarts": 1 if short else evaluate.restarts,
            "eot": evaluate.eot,
            "samples": samples,
            "batch_size": evaluate.batch_size,
            "precision": self.precision
            if short or evaluate.precision == "auto"
            else evaluate.precision,
            "keep_points": evaluate.keep_points if keep_points is None else keep_points,
            "seed": self._seed(evaluate.seed),
            "pool": list(pool),
            "after": after,
            "screened": short,
        }
        attacks = sum(threat != "clean" for threat in evaluate.threats)
        passes = n * (
            1
            + attacks
            * (
                len(pool) // 2
                + (0 if after and not short else settings["steps"] * settings["restarts"])
            )
        )
        parents = [row.key, *pool, *([after] if after and after not in pool else [])]
        return self._add("evaluate", f"{row.name}.{split}", settings, parents, passes)

    def _enough(self, split: str, samples: int | None) -> int:
        """How many samples of a split are meant; None is all. Raises DataError if it has fewer."""
        there = len(self.data.split(split))
        if samples is not None and samples > there:
            raise DataError(
                f"{self.recipe.data} {split}: requested {samples} samples, expected 1 to {there}"
            )
        return samples or there

    def _seed(self, own: int | None) -> int:
        return self.recipe.seed if own is None else own


def chosen_on_test(
    plan: Plan, data: Data, name: str, model_settings: NetworkSettings, precision: str
) -> Plan:
    """The same plan with the row `name` judged on the reporting split too."""
    evaluate = plan.recipe.evaluate

    def judged(planner: _Planner, row: Row) -> dict[str, str]:
        return {"test": planner._evaluation(row, evaluate.report_on, evaluate.report_samples)}

    return _extended(plan, data, [name], model_settings, precision, judged)


def confirmed(
    plan: Plan, data: Data, names: Sequence[str], model_settings: NetworkSettings, precision: str
) -> Plan:
    """The same plan with the screened rows `names` judged in full on the split that selects, on top of the screening."""

    def judged(planner: _Planner, row: Row) -> dict[str, str]:
        pool = tuple(plan.step(row.val).settings["pool"])
        return {"val": planner._evaluation(row, *planner._selects(), pool=pool, after=row.val)}

    return _extended(plan, data, names, model_settings, precision, judged)


def _extended(
    plan: Plan,
    data: Data,
    names: Sequence[str],
    model_settings: NetworkSettings,
    precision: str,
    judged: Callable[["_Planner", Row], dict[str, str]],
) -> Plan:
    planner = _Planner(plan.recipe, data, model_settings, precision)
    planner.steps = {step.key: step for step in plan.steps}
    rows = tuple(
        Row(**{**vars(row), **judged(planner, row)}) if row.name in names else row
        for row in plan.rows
    )
    return replace(plan, steps=tuple(planner.steps.values()), rows=rows)


def _step_passes(threat: str, objective: str, attack_steps: int) -> int:
    """Passes for each sample of a training step: the attack's, a pass that it compares with, and the weights' of each batch."""
    parsed = Objective.parse(objective)
    attacked = threat != "clean" and parsed.uses_attacked
    return (2 * attack_steps + 1 + parsed.attack_compares_with_clean) * attacked + 3 * (
        1 + (attacked and parsed.uses_clean)
    )
