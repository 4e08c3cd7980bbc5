"""The answer of a search: what to use, what is proven about it, and what was given up."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from robustsoup.display import html_table
from robustsoup.evaluation.intervals import Accuracy, Difference
from robustsoup.evaluation.verdicts import SHIFT_KEY
from robustsoup.printable import make_printable
from robustsoup.soups.goal import KNEE, Goal
from robustsoup.soups.selection import FIXED_SEQUENCE, RequirementCheck, describe_unmet


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How much more of the maximised score one network has than another, on the same samples.

    Attributes:
        value: Mean difference: of accuracies, or of weighted sums of accuracies.
        low: Lower end of its 95 % interval; in an answer, that of this pair alone.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def reversed(self) -> "Gain":
        """Return how much more of the score the other network has."""
        return Gain(value=-self.value, low=-self.high, high=-self.low)

    def __str__(self) -> str:
        """Return the difference and its interval in points."""
        value, low, high = (f"{100 * part:+z.1f}" for part in (self.value, self.low, self.high))
        return f"{value} points [{low}, {high}]"


@dataclass(frozen=True, kw_only=True)
class AgainstIngredient:
    """The chosen soup less one ingredient, on the samples that select.

    Attributes:
        ingredient: Name of the ingredient.
        meets: Whether the ingredient was shown to meet the requirements.
        differences: Paired differences by measure; positive where the soup is better. Their
            intervals hold at once for all candidates and ingredients.
    """

    ingredient: str
    meets: bool
    differences: Mapping[str, Difference]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        differences = {key: item.to_json() for key, item in self.differences.items()}
        return {"ingredient": self.ingredient, "meets": self.meets, "differences": differences}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AgainstIngredient":
        """Read what `to_json` returned."""
        differences = {
            key: Difference.from_json(item) for key, item in content["differences"].items()
        }
        return cls(
            ingredient=content["ingredient"], meets=content["meets"], differences=differences
        )


@dataclass(frozen=True, kw_only=True)
class OtherCandidate:
    """A candidate that was not chosen, and why.

    Attributes:
        name: Name of the candidate.
        description: What it is, in words.
        gain: The maximised score of the chosen candidate less that of this one.
        why: Why it was not chosen, in words.
        samples_to_separate: Samples that would tell it apart from the chosen one with a
            probability of 80 %; None where the estimates are equal.
    """

    name: str
    description: str
    gain: Gain
    why: str
    samples_to_separate: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return _field_values(self) | {"gain": _field_values(self.gain)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "OtherCandidate":
        """Read what `to_json` returned."""
        return cls(**_known(cls, content) | {"gain": Gain(**_known(Gain, content["gain"]))})


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What holds with 95 % confidence, and what it leaves out.

    Attributes:
        method: "max-t", "exact", "fixed sequence", two of them joined by "and", "point" (nothing is
            guaranteed) or "none" (there is no requirement).
        candidates: Number of candidates that count.
        samples: Number of samples that the requirements are tested on.
        seed: Seed of the multiplier bootstrap and of the confirm part.
        critical: Quantile in the place of 1.645 of a single bound.
        leaves_out: What the guarantee does not cover, one sentence each.
    """

    method: str = "none"
    candidates: int = 0
    samples: int = 0
    seed: int = 0
    critical: float | None = None
    leaves_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return _field_values(self) | {"leaves_out": list(self.leaves_out)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Guarantee":
        """Read what `to_json` returned."""
        return cls(**_known(cls, content) | {"leaves_out": tuple(content.get("leaves_out", ()))})


@dataclass(frozen=True, kw_only=True, repr=False)
class Answer:
    """What a search chose, what is proven about it, and what it costs.

    Attributes:
        chosen: Name of the chosen candidate; the closest one where `met` is False.
        description: What it is, in words: "eps2 itself", "0.4 of eps4 and 0.6 of eps16".
        maximise: What was maximised: a measure, a weighted sum of measures, or "knee".
        require: The requirements as text.
        met: Whether the chosen candidate was shown to meet every requirement.
        meeting_unconfirmed: Number of candidates that meet the requirements but were not attacked
            in full, as before a time limit, where the chosen one does not meet them.
        doubt: What its robust accuracies are if the full attack on all samples did not run, as
            before a time limit: "estimates" or "upper bounds"; None if it ran.
        point: Whether estimates were compared with the thresholds, which guarantees nothing.
        selected_on: Name of the split that selects.
        best_ingredient: The best ingredient by the same rule; None if none was shown to meet the
            requirements.
        distinguishable: Whether some soup was shown to have more of what is maximised than every
            ingredient that meets the requirements, by intervals that hold at once for all
            candidates and ingredients; None if no ingredient meets them.
        better_soup: The soup that was shown to, in words: the chosen one if it was; None without.
        unbeaten: Ingredients that meet the requirements and that the chosen candidate was not shown
            to beat in what is maximised; empty unless it was shown to beat the best of them.
        comparisons: Number of pairs of a candidate and an ingredient that the intervals of
            `against` hold for at once.
        left_out: Number of soups that the time limit left out; they are no candidates.
        unfinished: Number of soups that were attacked in part and could still win when the time
            limit was reached.
        checks: One check for each requirement, on the samples that select or confirm.
        accuracy: Accuracies of the chosen candidate on the samples that select, by measure.
        fresh_accuracy: Its accuracies on samples that did not steer the search, by measure; None
            without such samples.
        fresh_split: Name of the split or part that `fresh_accuracy` is from.
        against: The chosen candidate less each ingredient.
        runner_up: The second best candidate by the same rule.
        refused: The candidate with the highest score among those that do not meet the requirements,
            if its score is above that of the chosen one.
        samples_to_prove: Samples that would show the requirements for the chosen candidate with a
            probability of 80 %; None if they are met, or if an estimate is below its threshold.
        obstacle: Why no candidate meets the requirements, in words; None if one does.
        test: One check for each requirement on `test`, for the chosen candidate alone; None if
            `test` was not evaluated, or selected.
        guarantee: What holds, and what it leaves out.
    """

    chosen: str
    description: str = ""
    maximise: str
    require: tuple[str, ...] = ()
    met: bool = True
    meeting_unconfirmed: int = 0
    doubt: str | None = None
    point: bool = False
    selected_on: str = "val"
    best_ingredient: str | None = None
    distinguishable: bool | None = None
    better_soup: str | None = None
    unbeaten: tuple[str, ...] = ()
    comparisons: int = 0
    left_out: int = 0
    unfinished: int = 0
    checks: tuple[RequirementCheck, ...] = ()
    accuracy: Mapping[str, Accuracy] = field(default_factory=dict)
    fresh_accuracy: Mapping[str, Accuracy] | None = None
    fresh_split: str | None = None
    against: tuple[AgainstIngredient, ...] = ()
    runner_up: OtherCandidate | None = None
    refused: OtherCandidate | None = None
    samples_to_prove: int | None = None
    obstacle: str | None = None
    test: tuple[RequirementCheck, ...] | None = None
    guarantee: Guarantee = Guarantee()

    @property
    def held_on_test(self) -> bool | None:
        """Whether the estimates on `test` reach the thresholds; None if that was not tested."""
        if not self.test:
            return None
        return all(c.estimate.value >= c.requirement.threshold for c in self.test)

    @property
    def exit_code(self) -> int:
        """3 if nothing meets the requirements, 4 if they did not hold on `test`, else 0."""
        if not self.met:
            return 3
        return 4 if self.held_on_test is False else 0

    @property
    def choice_word(self) -> str:
        """What to call the choice: "chosen", or "closest" if nothing meets the requirements."""
        return "chosen" if self.met else "closest"

    @property
    def message(self) -> str:
        """The choice in one line."""
        figures = ", ".join(f"{key} {accuracy}" for key, accuracy in self.accuracy.items())
        name = self.chosen if not self.description else f"{self.chosen}, {self.description}"
        if self.met:
            return f"chosen: {name} ({figures})"
        unmet = describe_unmet(self.require, point=self.point, unconfirmed=self.meeting_unconfirmed)
        return f"{unmet}; the closest is {name} ({figures})"

    def lines(self) -> list[str]:
        """Return the answer in sentences, one a line, in the order of their weight."""
        return [line for part in _PARTS for line in part(self)]

    def __str__(self) -> str:
        """Return the sentences."""
        return "\n".join(self.lines())

    def __repr__(self) -> str:
        """Return one line: the message."""
        return make_printable(f"Answer({self.message})")

    def _repr_html_(self) -> str:
        measures = list(self.accuracy)
        rows = [(self.chosen, *map(str, self.accuracy.values()))]
        for item in self.against:
            changes = (item.differences.get(key) for key in measures)
            cells = ("" if change is None else _points(change) for change in changes)
            rows.append((f"less {item.ingredient}", *cells))
        return html_table(self.description or self.chosen, ("", *measures), rows, self.lines())

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values, with the sentences as "lines"."""
        return _field_values(self) | {
            "require": list(self.require),
            "unbeaten": list(self.unbeaten),
            "checks": [check.to_json() for check in self.checks],
            "accuracy": _accuracies_to_json(self.accuracy),
            "fresh_accuracy": self.fresh_accuracy and _accuracies_to_json(self.fresh_accuracy),
            "against": [item.to_json() for item in self.against],
            "runner_up": self.runner_up and self.runner_up.to_json(),
            "refused": self.refused and self.refused.to_json(),
            "test": None if self.test is None else [check.to_json() for check in self.test],
            "guarantee": self.guarantee.to_json(),
            "held_on_test": self.held_on_test,
            "message": self.message,
            "lines": self.lines(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Answer":
        """Read what `to_json` returned; entries that follow from others are computed again."""
        test, fresh = content.get("test"), content.get("fresh_accuracy")
        runner_up, refused = content.get("runner_up"), content.get("refused")
        parsed: dict[str, Any] = {
            "require": tuple(content.get("require", ())),
            "unbeaten": tuple(content.get("unbeaten", ())),
            "checks": _checks_from_json(content.get("checks", [])),
            "accuracy": _accuracies_from_json(content.get("accuracy", {})),
            "fresh_accuracy": None if fresh is None else _accuracies_from_json(fresh),
            "against": tuple(map(AgainstIngredient.from_json, content.get("against", ()))),
            "runner_up": OtherCandidate.from_json(runner_up) if runner_up else None,
            "refused": OtherCandidate.from_json(refused) if refused else None,
            "test": None if test is None else _checks_from_json(test),
            "guarantee": Guarantee.from_json(content.get("guarantee", {})),
        }
        return cls(**_known(cls, content) | parsed)


def _say_distinguishable(answer: Answer) -> Iterator[str]:
    if not answer.met or answer.distinguishable is None:
        return
    best = answer.best_ingredient
    maximised = "the knee's score" if answer.maximise == KNEE else answer.maximise
    if not answer.distinguishable and answer.unbeaten:
        unbeaten = " and ".join(answer.unbeaten)
        yield (
            f"no soup is shown to be better in {maximised} than every ingredient: the chosen one "
            f"is better than {best}, but not shown to be better than {unbeaten}"
        )
        return
    if not answer.distinguishable:
        elsewhere = _list_gains_elsewhere(answer)
        advice = (
            f"; the chosen soup is better in {' and in '.join(elsewhere)}"
            if elsewhere
            else ": use that"
        )
        yield f"no soup is distinguishable from {best} in {maximised}{advice}"
        return
    chosen = answer.description or answer.chosen
    soup = "the chosen soup" if answer.better_soup == chosen else str(answer.better_soup)
    everyone = all(item.meets for item in answer.against)
    which = "" if everyone else " that is shown to meet the requirement"
    yield f"{soup} is better in {maximised} than every ingredient{which}, of which {best} is best"


def _list_gains_elsewhere(answer: Answer) -> list[str]:
    """Return in which measures, beside what is maximised, the choice beats the best ingredient."""
    return [
        key
        for item in answer.against
        if item.ingredient == answer.best_ingredient
        for key, difference in item.differences.items()
        if key != answer.maximise and difference.low > 0
    ]


def _say_chosen(answer: Answer) -> Iterator[str]:
    yield f"on {answer.selected_on}: {answer.message}"
    if answer.doubt:
        yield (
            f"its robust accuracies are {answer.doubt}, since the full attack on all samples did "
            "not run; it is not compared with the ingredients"
        )


def _say_late(answer: Answer) -> Iterator[str]:
    if answer.left_out:
        yield f"the time limit left out {_count_soups(answer.left_out)} that no attack was tried on"
    if answer.unfinished:
        yield (
            f"the time limit came before {_count_soups(answer.unfinished)} that could still win "
            "met the full attack on all samples"
        )


def _count_soups(count: int) -> str:
    return f"{count:,} soup{'' if count == 1 else 's'}"


def _say_requirements(answer: Answer) -> Iterator[str]:
    guarantee = answer.guarantee
    for check in answer.checks:
        verdict = "is met" if check.met else "is not shown"
        figures = f"{check.estimate.value:.1%} of {check.estimate.n:,} samples"
        if answer.point:
            yield f"{check.requirement} {verdict}: {figures}, an estimate, which guarantees nothing"
            continue
        among = "one-sided 95 % bound"
        if FIXED_SEQUENCE in guarantee.method and check.requirement.is_attacked:
            among += " of this finalist alone"
        elif guarantee.candidates > 1:
            among += f" over {guarantee.candidates} candidates"
        yield f"{check.requirement} {verdict}: {figures}, at least {check.low:.1%} ({among})"
    if answer.obstacle:
        yield answer.obstacle
    if answer.samples_to_prove:
        count = _round(answer.samples_to_prove)
        yield f"about {count} samples would show it, if the estimate is right"


def _say_against(answer: Answer) -> Iterator[str]:
    if answer.against and answer.comparisons > 1:
        yield (
            f"differences of the {answer.choice_word} one, by intervals that hold for all "
            f"{answer.comparisons} comparisons of a candidate with an ingredient at once (95 %):"
        )
    for item in answer.against:
        changes = ", ".join(
            f"{key} {_points(difference)}" for key, difference in item.differences.items()
        )
        note = "" if item.meets or not answer.require else " (not shown to meet the requirement)"
        yield f"against {item.ingredient}{note}: {changes}"


def _say_others(answer: Answer) -> Iterator[str]:
    for label, other in (("runner-up", answer.runner_up), ("refused", answer.refused)):
        if other is None:
            continue
        yield f"{label}: {other.description}: {other.why}"
        if label == "runner-up" and other.samples_to_separate and not other.gain.distinguishable:
            yield f"about {_round(other.samples_to_separate)} samples would tell these two apart"


def _say_test(answer: Answer) -> Iterator[str]:
    if answer.test is None:
        return
    split = answer.fresh_split or "test"
    if answer.fresh_accuracy:
        figures = ", ".join(f"{key} {value}" for key, value in answer.fresh_accuracy.items())
        steered = SHIFT_KEY in Goal.parse(answer.maximise, answer.require).measures
        copies = "where corrupted copies of half of the images chose the soup"
        yield f"on {split}, {copies if steered else 'which chose nothing'}: {figures}"
    for check in answer.test:
        held = "held" if check.estimate.value >= check.requirement.threshold else "did NOT hold"
        yield (
            f"{check.requirement} {held} on {split}: {check.estimate.value:.1%}, "
            f"at least {check.low:.1%} (one-sided 95 % bound)"
        )


def _say_guarantee(answer: Answer) -> Iterator[str]:
    for sentence in answer.guarantee.leaves_out:
        yield f"the guarantee leaves out: {sentence}"


_PARTS = (
    _say_distinguishable,
    _say_chosen,
    _say_late,
    _say_requirements,
    _say_against,
    _say_others,
    _say_test,
    _say_guarantee,
)


def _round(count: int) -> str:
    """Return a number of samples with two digits: 13,979 is "14,000"."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return f"{round(count / unit) * unit:,}"


def _points(difference: Difference) -> str:
    gain = Gain(value=difference.value, low=difference.low, high=difference.high)
    return str(gain)


def _accuracies_to_json(accuracies: Mapping[str, Accuracy]) -> dict[str, dict[str, float]]:
    return {key: accuracy.to_json() for key, accuracy in accuracies.items()}


def _accuracies_from_json(content: Mapping[str, Mapping[str, float]]) -> dict[str, Accuracy]:
    return {key: Accuracy.from_json(item) for key, item in content.items()}


def _checks_from_json(content: list[Mapping[str, Any]]) -> tuple[RequirementCheck, ...]:
    return tuple(map(RequirementCheck.from_json, content))


def _field_values(record: Any) -> dict[str, Any]:
    return {item.name: getattr(record, item.name) for item in fields(record)}


def _known(record_type: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: content[item.name] for item in fields(record_type) if item.name in content}
