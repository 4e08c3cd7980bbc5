"""The planner: turns a recipe into steps, and extends the plan during the run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import assert_never

from robustsoup import distributed
from robustsoup.catalog import ATTACKS, BUFFER_POLICIES
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Data, Synthetic
from robustsoup.data.corruptions import CorruptionPart, open_corruptions
from robustsoup.data.sources import is_built_in
from robustsoup.errors import CheckpointError
from robustsoup.evaluation.masking import MOST_OTHERS, MOST_POINT_BYTES
from robustsoup.fingerprint import entry_fingerprint
from robustsoup.models import NetworkSettings, factory_fingerprint
from robustsoup.recipes import Plane, Recipe, Soup
from robustsoup.recipes.recipe import PRETRAINED
from robustsoup.recipes.sections import Subspace
from robustsoup.runs.examples import count_examples
from robustsoup.runs.plan import Plan, PlannedExamples, PlannedRow, Step, step_key
from robustsoup.runs.tasks import (
    AttackExamples,
    BuildGreedySoup,
    DoPart,
    EvaluateNetwork,
    EvaluationSettings,
    FittingTask,
    Key,
    LearnCoefficients,
    MapPlane,
    MeasureClean,
    MergeSoup,
    Mixing,
    MixSoup,
    ShiftedCopies,
    SteeringPart,
    TakeEnd,
    TakeSnapshot,
    Task,
    TrainNetwork,
    TrainSubspace,
    file_key,
    stopping_split,
)
from robustsoup.settings import BufferSettings, LearnSettings, TrainSettings
from robustsoup.soups.ancestry import common_ancestor
from robustsoup.soups.goal import Goal
from robustsoup.soups.screening import Contender, EvaluationRequest, Screening, short_attack
from robustsoup.soups.subspace import spans_subspace
from robustsoup.training.objectives import Objective
from robustsoup.training.sharing import SYNCHRONISED
from robustsoup.training.transforms import transform_fingerprint


def fingerprint_functions(task: Task) -> list[str | None]:
    """Return the fingerprints of the user's functions that a task names; None for built-in ones.

    A recipe names a function, but the output depends on the code of the function.
    """
    if isinstance(task, DoPart):
        task = task.whole
    match task:
        case TrainNetwork() | TrainSubspace():
            objective = Objective.parse(task.settings.objective).fingerprint
            return [objective, *_fingerprint_transform(task.settings)]
        case LearnCoefficients():
            objective = Objective.parse(task.settings.objective).fingerprint
            policy = entry_fingerprint(BUFFER_POLICIES, task.settings.buffers)
            return [objective, policy, *_fingerprint_transform(task.settings)]
        case MixSoup() | MergeSoup() | MeasureClean():
            return [entry_fingerprint(BUFFER_POLICIES, task.mixing.policy)]
        case EvaluateNetwork() | AttackExamples():
            return [entry_fingerprint(ATTACKS, str(task.settings.attack.attack))]
        case BuildGreedySoup():
            return [
                entry_fingerprint(BUFFER_POLICIES, task.mixing.policy),
                entry_fingerprint(ATTACKS, str(task.evaluation.attack.attack)),
            ]
        case TakeSnapshot() | TakeEnd() | MapPlane():
            return []
        case _:
            assert_never(task)


def _fingerprint_transform(settings: TrainSettings | LearnSettings) -> list[str | None]:
    fingerprint = transform_fingerprint(settings)
    return [] if fingerprint is None else [fingerprint]


def augments_images(task: Task) -> bool:
    """Return whether a task trains or measures running statistics on augmented images."""
    if isinstance(task, DoPart):
        task = task.whole
    match task:
        case TrainNetwork() | TrainSubspace() | LearnCoefficients():
            return True
        case MixSoup() | MergeSoup() | MeasureClean() | BuildGreedySoup():
            policy = task.mixing.policy
        case MapPlane():
            policy = task.settings.buffers
        case _:
            return False
    return measures_statistics(policy)


def _list_processes(task: Task) -> dict[str, object]:
    """Return the number of processes where each normalises its own share of a batch."""
    is_shared = isinstance(task, FittingTask) and task.settings.batchnorm != SYNCHRONISED
    world = distributed.world()
    return {"processes": world} if is_shared and world > 1 else {}


def measures_statistics(policy: str) -> bool:
    """Return whether a buffer policy reads training samples; a function of the user may."""
    entry = BUFFER_POLICIES.get(policy)
    return entry is None or "data" in entry.facts.get("needs", ())


class Planner:
    """Builds the plan of a recipe step by step.

    The `add_` methods add the steps that are missing and return a key; adding equal work twice
    gives one step. `robustsoup.runs.soup_rows` plans the soups of each method.

    Args:
        recipe: The recipe.
        data: Its data.
        network: How the network is built.
        precision: Arithmetic of training on this device.
        part_samples: Samples of the parts that evaluations are divided into, for many workers;
            planes are divided into rows. None divides nothing. Keys do not depend on it.
        stand_ins: Checkpoints in place of those that the recipe names, by place.

    Attributes:
        plan: The plan so far.
        networks: Keys of the base and the ingredients by name.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        network: NetworkSettings,
        precision: str,
        part_samples: int | None = None,
        *,
        stand_ins: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        self.recipe = recipe
        self.stand_ins = stand_ins or {}
        self.data, self.network = data, network
        self.precision = precision
        self.part_samples = part_samples
        self.plan = Plan(recipe)
        self.networks: dict[str, Key] = {}
        self._requests: dict[EvaluationRequest, Key] = {}
        self._surroundings: dict[str, object] = {
            "data": data.record["split_digest"],
            "model": network.as_record(),
            "code": factory_fingerprint(network.spec),
        }
        self._training_surroundings = self._surroundings.copy()
        if not is_built_in(recipe.data):  # whose digest covers the samples alone
            self._training_surroundings |= {
                "augmentation": data.train.augmentation.fingerprint,
                "normalize": [data.record["mean"], data.record["std"]],
            }

    # Steps of any kind.

    def add_step(self, name: str, task: Task) -> Key:
        """Add a task and return its key."""
        around = self._training_surroundings if augments_images(task) else self._surroundings
        around = around | {"functions": fingerprint_functions(task)}
        key = step_key(task, around | _list_processes(task))
        if key not in self.plan.steps_by_key:
            task = self._divide(name, task)
            self.plan.steps_by_key[key] = Step(key, name, task, task.count_passes(self.data))
        return key

    def _divide(self, name: str, task: Task) -> Task:
        """Add steps for the parts of a task, if it can be divided, and return the task with them.

        A task that has parts, as on a worker, keeps them.
        """
        if self.part_samples is None or not isinstance(task, EvaluateNetwork | MapPlane):
            return task
        count = task.count_parts(self.data, self.part_samples)
        if count == 1 or task.parts:
            return task
        parts = [DoPart(task, number, count) for number in range(count)]
        keys = [
            self.add_step(f"{name}.{number}of{count}", part) for number, part in enumerate(parts, 1)
        ]
        return dataclasses.replace(task, parts=tuple(keys))

    def add_file(self, path: str) -> Key:
        """Add a checkpoint that exists and return its key."""
        return self._add_checkpoint(self.recipe.opening.open(self.stand_ins.get(path, path)))

    def _add_checkpoint(self, checkpoint: Checkpoint) -> Key:
        key = self.file_key(checkpoint)
        self.plan.files.setdefault(key, checkpoint)
        return key

    def file_key(self, checkpoint: Checkpoint) -> Key:
        """Return the key of a checkpoint that exists."""
        return file_key(
            checkpoint,
            self.network,
            named=bool(self.recipe.model),
            constants_named=bool(self.recipe.normalize),
        )

    def add_row(self, row: PlannedRow) -> None:
        """Add a row, or replace the row of the same name."""
        self.plan.rows_by_name[row.name] = row

    # The base and the ingredients.

    def add_base(self) -> None:
        """Add the network that ingredients are fine-tuned from, if the recipe has one."""
        recipe, threat = self.recipe, None
        if recipe.checkpoint:
            key = self.add_file(recipe.checkpoint)
        elif recipe.pretrain:
            settings = recipe.pretrain.settings(seed=recipe.seed, precision=self.precision)
            key, threat = self._add_training(PRETRAINED, settings), str(settings.threat)
        else:
            return
        self.networks[PRETRAINED] = key
        self.add_row(PlannedRow(name=PRETRAINED, role="pretrained", network=key, threat=threat))

    def add_ingredient(self, name: str) -> None:
        """Add an ingredient: a checkpoint that exists, or a network to fine-tune."""
        ingredient = self.recipe.ingredients[name]
        if ingredient.checkpoint:
            key = self.add_file(ingredient.checkpoint)
            row = PlannedRow(name=name, role="ingredient", network=key)
        elif ingredient.subspace_end is not None and self.recipe.subspace is not None:
            key = self._add_end(name, self.recipe.subspace, ingredient.subspace_end)
            threat = self.recipe.subspace.threats[ingredient.subspace_end - 1]
            row = PlannedRow(name=name, role="ingredient", network=key, threat=str(threat))
        else:
            settings = self.recipe.training(name, precision=self.precision)
            key = self._add_finetuning(name, settings)
            row = PlannedRow(
                name=name,
                role="ingredient",
                network=key,
                threat=str(settings.threat),
                objective=str(settings.objective),
            )
        self.networks[name] = key
        self.add_row(row)

    def _add_end(self, name: str, subspace: Subspace, number: int) -> Key:
        settings = subspace.settings(seed=self.recipe.seed, precision=self.precision)
        task = TrainSubspace(
            settings,
            subspace.threats,
            subspace.by,
            self.networks[PRETRAINED],
            self.recipe.fits_on_val,
            subspace.at_ends,
        )
        return self.add_step(name, TakeEnd(self.add_step("subspace", task), number))

    def _add_finetuning(self, name: str, settings: TrainSettings) -> Key:
        ingredient, start = self.recipe.ingredients[name], self.networks[PRETRAINED]
        if ingredient.epoch is None:
            return self._add_training(name, settings, start)
        run_name, interval = name.removesuffix(f"-{ingredient.epoch}"), ingredient.checkpoint_every
        run = self._add_training(run_name, settings, start, checkpoint_every=interval)
        return self.add_step(name, TakeSnapshot(run, ingredient.epoch))

    def _add_training(
        self,
        name: str,
        settings: TrainSettings,
        start: Key | None = None,
        *,
        checkpoint_every: int | None = None,
    ) -> Key:
        digest = None
        if settings.synthetic:
            synthetic = Synthetic.open(settings.synthetic)
            synthetic.check_fit(self.data.train)
            digest = synthetic.digest
        stopping_split(settings.early_stop, None, self.data)  # DataError if val has too few samples
        task = TrainNetwork(
            settings,
            start,
            digest,
            checkpoint_every,
            fits_on_val=self.recipe.fits_on_val and settings.early_stop is None,
        )
        return self.add_step(name, task)

    # Soups.

    def ingredient_keys(self, soup: Soup) -> tuple[Key, ...]:
        """Return the keys of a soup's ingredients."""
        return tuple(self.networks[name] for name in self.recipe.ingredients_of(soup))

    def base_key(self, ingredients: Sequence[Key]) -> Key:
        """Return the checkpoint whose statistics the policy "base" takes.

        This is the base of the recipe, else the common ancestor of the ingredients, else the first.
        """
        return self._find_base(ingredients) or ingredients[0]

    def merging_base(self, soup: Soup) -> Key:
        """Return the checkpoint that a merging method takes differences from.

        Raises:
            CheckpointError: If the recipe has no base and no common ancestor is found.
        """
        base = self._find_base(self.ingredient_keys(soup))
        if base is None:
            raise CheckpointError(
                f'method "{soup.method}": requires the checkpoint that the ingredients were '
                "fine-tuned from, which lies beside none of them; "
                'set checkpoint = "base.safetensors" in the recipe (--base)'
            )
        return base

    def _find_base(self, ingredients: Sequence[Key]) -> Key | None:
        """Return the base of the recipe, else the common ancestor of the ingredients."""
        if PRETRAINED in self.networks:
            return self.networks[PRETRAINED]
        ancestor = common_ancestor([self.plan.files[key] for key in ingredients])
        return None if ancestor is None else self._add_checkpoint(ancestor)

    def mixing_of(self, soup: Soup) -> Mixing:
        """Return the buffer policy of a soup, and its base."""
        policy = "tracked" if soup.method == "learned" else "average"
        if soup.method != "learned" and self._mixes_subspace(soup):
            policy = "recalibrate"
        buffers = soup.buffer_settings(seed=self.recipe.seed, policy=policy)
        if not measures_statistics(str(buffers.buffers)):
            buffers = BufferSettings(buffers=buffers.buffers)  # the rest has no effect
        takes_base = buffers.buffers == "base"
        return Mixing(buffers, self.base_key(self.ingredient_keys(soup)) if takes_base else None)

    def _mixes_subspace(self, soup: Soup) -> bool:
        """Return whether the ingredients are ends of one subspace, planned or trained before."""
        names = self.recipe.ingredients_of(soup)
        planned = [self.recipe.ingredients.get(name) for name in names]
        if len(names) > 1 and all(item and item.subspace_end for item in planned):
            return True
        files = [self.plan.files.get(key) for key in self.ingredient_keys(soup)]
        return all(files) and spans_subspace([item for item in files if item])

    # Planes.

    def add_plane(self, name: str, section: Plane) -> None:
        """Add a plane of loss values."""
        split = self.recipe.evaluate.report_on
        settings = section.settings(
            threat=self.recipe.base_threat,
            seed=self.recipe.seed,
            samples=len(self.data.split(split)),
            precision=self.precision,
        )
        networks = tuple(self.networks[checkpoint] for checkpoint in section.checkpoints)
        base = self.networks.get(PRETRAINED, networks[0]) if settings.buffers == "base" else None
        self.plan.planes[name] = self.add_step(name, MapPlane(networks, settings, split, base))

    # Evaluations.

    def selecting_settings(self) -> EvaluationSettings:
        """Return the evaluation settings of the samples that steer the search and select."""
        settings = self.settings_of_all()
        return settings.of_part("search") if self.recipe.confirms else settings

    def settings_of_all(self) -> EvaluationSettings:
        """Return the evaluation settings of all samples that select."""
        recipe = self.recipe
        part: CorruptionPart = "all" if recipe.protocol == "paper" else "select"
        return self._evaluation_settings(recipe.select_on, recipe.select_samples, part)

    def steering_part(self) -> SteeringPart | None:
        """Return the part of `val` that steers the search; None for all of it."""
        settings = self.selecting_settings()
        if settings.part != "search" or settings.split != "val":
            return None
        return SteeringPart(settings.samples, settings.attack.seed)

    def confirming_settings(self) -> EvaluationSettings:
        """Return the evaluation settings of the samples that confirm finalists."""
        return self.settings_of_all().of_part("confirm")

    def add_clean_evaluation(self, row: PlannedRow) -> Key:
        """Add the evaluation of a row without an attack, on all samples that select."""
        settings = dataclasses.replace(self.settings_of_all(), threats=())
        return self.add_evaluation(f"{row.name}.clean", row.network, settings)

    def add_confirmation_of(self, row: PlannedRow) -> Key:
        """Add the full evaluation of a row on the samples that confirm finalists."""
        settings = self.confirming_settings()
        return self.add_evaluation(
            f"{row.name}.confirm", row.network, settings, ingredients=row.ingredients
        )

    def reporting_settings(self) -> EvaluationSettings:
        """Return the evaluation settings of the split that reports."""
        evaluate = self.recipe.evaluate
        part: CorruptionPart = "all" if self.recipe.protocol == "paper" else "report"
        return self._evaluation_settings(evaluate.report_on, evaluate.report_samples, part)

    def _evaluation_settings(
        self, split: str, samples: int | None, part: CorruptionPart
    ) -> EvaluationSettings:
        evaluated = self.data.split(split).first(samples)  # DataError if there are fewer
        evaluate = self.recipe.evaluate
        attack = evaluate.attack_settings(seed=self.recipe.seed, precision=self.precision)
        shift = None
        if evaluate.shift is not None:
            copies = open_corruptions(evaluate.shift, evaluated, part)
            if part != "report":  # requirements are judged on as many samples for each measure
                samples = min(len(evaluated), copies.count_images(evaluated))
                evaluated = evaluated.first(samples)
            count = copies.count_copies(evaluated)
            shift = ShiftedCopies(evaluate.shift, copies.digest, part, count)
        return EvaluationSettings(split, samples, evaluate.threats, attack, shift)

    def add_evaluation(
        self,
        name: str,
        network: Key,
        settings: EvaluationSettings,
        request: EvaluationRequest | None = None,
        *,
        ingredients: Sequence[str] | None = None,
    ) -> Key:
        """Add the evaluation of a network, in full unless a request names a subset.

        The masking check of a soup tries the adversarial points of the base and of the soup's
        `ingredients`, which are evaluated first.
        """
        keep_points, others = self.recipe.evaluate.keep_points, ()
        if request is not None and request.subset is not None:
            task = EvaluateNetwork(
                network, settings, keep_points=keep_points, subset=request.subset
            )
            return self.add_step(f"{name}.part.{settings.split}", task)
        begun = None
        if request is not None and request.after is not None:
            begun = self.add_evaluation(
                name, network, settings, request.after, ingredients=ingredients
            )
        if self._tries_points_of_others(settings):
            if network in self.networks.values():
                keep_points = True
            else:
                names = [n for n in self.networks if n in (PRETRAINED, *(ingredients or ()))]
                others = tuple(
                    self.add_evaluation(other, self.networks[other], settings)
                    for other in names[:MOST_OTHERS]
                )
        task = EvaluateNetwork(
            network, settings, keep_points=keep_points, others=others, begun=begun
        )
        return self.add_step(f"{name}.{settings.split}", task)

    def add_clean_verdicts(self, section: str, soup: Soup) -> Key:
        """Add the clean verdicts of all soups of a section on all samples that select."""
        task = MeasureClean(
            self.ingredient_keys(soup),
            tuple(self.recipe.alphas_of(soup)),
            self.mixing_of(soup),
            dataclasses.replace(self.settings_of_all(), threats=()),
        )
        return self.add_step(f"{section}.clean", task)

    def _tries_points_of_others(self, settings: EvaluationSettings) -> bool:
        """Return whether a split evaluates all networks, and their points are small."""
        recipe, size = self.recipe, settings.count_point_bytes(self.data)
        checks_soups = bool(recipe.soups) and settings.attack.masking_check
        selects = settings.split == recipe.select_on
        return checks_soups and selects and 0 < size <= MOST_POINT_BYTES

    def add_evaluations(self) -> None:
        """Add the evaluations of all rows that depend on no result.

        Raises:
            DataError: A split has fewer samples than the recipe evaluates, the split that reports
                the chosen soup among them.
        """
        if self.recipe.goal is not None:
            self.reporting_settings()
        for row in self.plan.rows:
            self.add_evaluated_row(row)

    def add_evaluated_row(self, row: PlannedRow) -> None:
        """Add a row with its first evaluation, and the report on it if all rows are reported."""
        if self.recipe.evaluate.screens:
            val = self.add_request(self.screening().opening_request(self.contender(row)))
        else:
            settings = self.selecting_settings()
            val = self.add_evaluation(
                row.name, row.network, settings, row.request, ingredients=row.ingredients
            )
        self.add_row(dataclasses.replace(row, val=val))
        if self.recipe.evaluate.report == "all":
            self.add_report(row.name)

    def add_report(self, name: str) -> None:
        """Add the evaluation of a row on the split that reports."""
        row = self.plan.row(name)
        settings = self.reporting_settings()
        test = self.add_evaluation(name, row.network, settings, ingredients=row.ingredients)
        self.add_row(dataclasses.replace(row, test=test))

    def add_examples(self, name: str) -> None:
        """Add the pictures of the chosen row, unless the recipe wants none or nothing attacks."""
        settings = self.reporting_settings()
        split = self.data.split(settings.split)
        count = count_examples(split, self.recipe.report.examples)
        if count and not all(threat.is_clean for threat in settings.threats):
            task = AttackExamples(
                self.plan.row(name).network,
                dataclasses.replace(settings, samples=count, shift=None),
            )
            self.plan.examples = PlannedExamples(name, self.add_step(f"{name}.examples", task))

    # Screening.

    def contender(self, row: PlannedRow) -> Contender:
        """Return the row as a contender of the screening."""
        ingredient = self.plan.find_ingredient(row.network)
        short = row.role in ("grid", "line") and ingredient is None
        return Contender(row.name, ingredient, "short" if short else "full")

    def screening(self) -> Screening:
        """Return the screening of the recipe's soups."""
        soups = [row for row in self.plan.rows if row.soup is not None]
        goal = self.recipe.goal or Goal()
        settings = self.selecting_settings()
        samples, seed = settings.count_samples(self.data), settings.attack.seed
        contenders = tuple(map(self.contender, soups))
        return Screening(self.recipe.mixed_networks, contenders, goal, samples, seed=seed)

    def add_request(self, request: EvaluationRequest) -> Key:
        """Add an evaluation that a screening requests, and the evaluations that it depends on."""
        if request not in self._requests:
            self._requests[request] = self._add_new_request(request)
        return self._requests[request]

    def _add_new_request(self, request: EvaluationRequest) -> Key:
        evaluate, name = self.recipe.evaluate, request.candidate
        settings = self.selecting_settings()
        if request.mode == "short":
            full = evaluate.attack_settings(seed=self.recipe.seed, precision=self.precision)
            attack = short_attack(full, evaluate["screen_steps"], precision=self.precision)
            settings = dataclasses.replace(settings, attack=attack)
        in_pool = request.keep_points
        task = EvaluateNetwork(
            self.networks[name] if in_pool else self.plan.row(name).network,
            settings,
            keep_points=in_pool or evaluate.keep_points,
            pool=tuple(map(self.add_request, request.pool)),
            after=None if request.after is None else self.add_request(request.after),
            attacked_before=request.after is not None and request.after.keep_points,
            short=request.mode == "short",
            subset=request.subset,
        )
        return self.add_step(f"{name}{'.pool' if in_pool else ''}.{settings.split}", task)

    def add_full_evaluation(self, request: EvaluationRequest) -> Key:
        """Add the full evaluation of a screened soup, and let its row refer to this evaluation."""
        key = self.add_request(request)
        self.add_row(dataclasses.replace(self.plan.row(request.candidate), val=key))
        return key
