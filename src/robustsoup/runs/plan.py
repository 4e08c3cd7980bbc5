"""A plan: the steps of a run and the networks that it reports. Planning runs no step."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.digests import digest_json
from robustsoup.recipes import Recipe
from robustsoup.runs.tasks import (
    EvaluateNetwork,
    Key,
    MapPlane,
    MixSoup,
    Task,
    list_bases,
    task_record,
)
from robustsoup.soups.screening import EvaluationRequest


@dataclass(frozen=True)
class Step:
    """One task with its key.

    Attributes:
        key: Digest of the task, its parents, the data and the network.
        name: Readable name of the output.
        task: What to do.
        passes: Cost in forward passes of one sample; a backward pass to the input counts as 1, a
            backward pass to the weights as 2.
    """

    key: Key
    name: str
    task: Task
    passes: int

    @property
    def kind(self) -> str:
        """Name of the kind of task."""
        return self.task.kind

    @property
    def parents(self) -> tuple[Key, ...]:
        """Keys of the steps and files that the step is derived from."""
        return self.task.parents

    @property
    def inputs(self) -> tuple[Key, ...]:
        """Keys of all steps and files that the step reads: its parents, bases and parts."""
        return (*self.parents, *list_bases(self.task), *self.parts)

    @property
    def parts(self) -> tuple[Key, ...]:
        """Keys of the steps that do parts of the step beforehand."""
        begun = self.task.begun if isinstance(self.task, EvaluateNetwork) else None
        parts = self.task.parts if isinstance(self.task, EvaluateNetwork | MapPlane) else ()
        return parts if begun is None else (*parts, begun)

    def without_parts(self) -> "Step":
        """Return the step with a task that takes nothing from its parts."""
        if isinstance(self.task, EvaluateNetwork | MapPlane):
            return replace(self, task=replace(self.task, parts=()))
        return self


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """A network that the run reports, with the keys of the steps that make and evaluate it.

    Attributes:
        name: Unique name of the row.
        role: "pretrained", "ingredient" or the method of a soup.
        network: Checkpoint of the network.
        soup: Section of the recipe that makes the soup.
        ingredients: Names of the soup's ingredients.
        coefficients: One coefficient for each ingredient, where one vector describes the soup.
        threat: Threat model that the network or its coefficients are trained against, as text.
        objective: Objective that they are trained with.
        at: Position on a dial.
        learned: Step whose output holds coefficients by layer.
        dial: Step whose output holds the dial.
        val: Evaluation on the split that selects.
        test: Evaluation on the split that reports.
        request: The evaluation on the split that selects that a surrogate requests; in full if
            None.
    """

    name: str
    role: str
    network: Key
    soup: str | None = None
    ingredients: tuple[str, ...] | None = None
    coefficients: tuple[float, ...] | None = None
    threat: str | None = None
    objective: str | None = None
    at: float | None = None
    learned: Key | None = None
    dial: Key | None = None
    val: Key | None = None
    test: Key | None = None
    request: EvaluationRequest | None = None

    @property
    def keys(self) -> list[Key]:
        """The steps and files that the row refers to."""
        keys = (self.network, self.learned, self.dial, self.val, self.test)
        return [key for key in keys if key is not None]


@dataclass(frozen=True)
class PlannedExamples:
    """Attacked samples of one row, for pictures.

    Attributes:
        row: Name of the row.
        key: The step that attacks them.
    """

    row: str
    key: Key


@dataclass
class Plan:
    """The steps of a recipe, in an order in which they can run, and what the run reports.

    A planner fills the plan, and may extend it during the run.

    Attributes:
        recipe: The recipe.
        steps_by_key: The steps by key, parents first.
        rows_by_name: The reported networks by name.
        files: Checkpoints that existed before the run, by key.
        planes: Steps of the planes, by section.
        surrogates: Steps that measure the clean verdicts of a surrogate's soups, by section.
        examples: Attacked samples of the chosen row, or None.
        warnings: Doubts about the checkpoints that the recipe names.
    """

    recipe: Recipe
    steps_by_key: dict[Key, Step] = field(default_factory=dict)
    rows_by_name: dict[str, PlannedRow] = field(default_factory=dict)
    files: dict[Key, Checkpoint] = field(default_factory=dict)
    planes: dict[str, Key] = field(default_factory=dict)
    surrogates: dict[str, Key] = field(default_factory=dict)
    examples: PlannedExamples | None = None
    warnings: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps, parents first."""
        return tuple(self.steps_by_key.values())

    @property
    def rows(self) -> tuple[PlannedRow, ...]:
        """The reported networks, in the order of the recipe."""
        return tuple(self.rows_by_name.values())

    def list_missing(self, has: Callable[[Key], bool]) -> list[Step]:
        """Return the steps that must run: those not finished, but no part of a finished step.

        Args:
            has: Returns whether a step is finished.
        """
        finished = {key for key in self.steps_by_key if has(key)}
        spare = {part for key in finished for part in self.steps_by_key[key].parts}
        return [step for step in self.steps if step.key not in finished | spare]

    def step(self, key: Key) -> Step:
        """Return the step with a key."""
        return self.steps_by_key[key]

    def row(self, name: str) -> PlannedRow:
        """Return the row called `name`."""
        return self.rows_by_name[name]

    @property
    def ingredient_rows(self) -> list[PlannedRow]:
        """The rows of the networks that soups are made of, the pre-trained one included."""
        rows = map(self.rows_by_name.get, self.recipe.mixed_networks)
        return [row for row in rows if row is not None]

    def selecting_evaluation(self, row: PlannedRow) -> Key | None:
        """Return the evaluation of a row on the split that selects.

        Where one split selects and reports, a soup may be attacked in part for the selection and in
        full for the report; the full evaluation counts.
        """
        same_split = self.recipe.select_on == self.recipe.evaluate.report_on
        return row.test if same_split and row.test is not None else row.val

    def find_ingredient(self, network: Key) -> str | None:
        """Return the name of the ingredient that has a network, the first one; None without one."""
        rows = self.ingredient_rows
        return next((row.name for row in rows if row.network == network), None)

    def find_equal_ingredient(
        self, row: PlannedRow, coefficients: Sequence[float] | None
    ) -> str | None:
        """Return the ingredient that a soup equals bit for bit, if it is one.

        Args:
            row: A row; None is returned for one that is no soup.
            coefficients: One for each ingredient, as a greedy soup may have kept one ingredient;
                None if they differ by layer.
        """
        if row.soup is None:
            return None
        if row.role == "greedy" and 1.0 in (coefficients or ()):
            task = self.step(row.network).task
            if isinstance(task, MixSoup) and task.mixing.policy == "average":
                return (row.ingredients or ())[(coefficients or ()).index(1.0)]
        return self.find_ingredient(row.network)

    def part(self, rows: Iterable[PlannedRow] = (), *, keys: Iterable[Key] = ()) -> "Plan":
        """Return the plan with those steps alone that some rows or keys need.

        Without `keys`, planes and the clean verdicts of surrogates are in every part.
        """
        wanted = list(keys) or [*self.planes.values(), *self.surrogates.values()]
        wanted += [key for row in rows for key in row.keys]
        needed: set[Key] = set()
        while wanted:
            key = wanted.pop()
            if key in self.steps_by_key and key not in needed:
                needed.add(key)
                wanted += self.steps_by_key[key].inputs
        steps = {key: step for key, step in self.steps_by_key.items() if key in needed}
        return replace(self, steps_by_key=steps)

    def leave_out(self, names: Iterable[str]) -> None:
        """Remove rows, and the steps that no other row needs."""
        for name in names:
            del self.rows_by_name[name]
        self.steps_by_key = self.part(self.rows).steps_by_key


def step_key(task: Task, surroundings: dict[str, object]) -> Key:
    """Return the key of a task: a digest of the task, its parents and its surroundings.

    Args:
        task: The task.
        surroundings: JSON-able description of all else that its output depends on: data, network
            and code.
    """
    content = {
        "kind": task.kind,
        "task": task_record(task),
        "parents": list(task.parents),
        **surroundings,
    }
    return digest_json(content)[:32]
