"""What a search by surrogate found, as stored in results.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import CLEAN_KEY
from robustsoup.soups.surrogate_refits import HitsByName
from robustsoup.soups.surrogate_search import SurrogateSearch, count_late
from robustsoup.soups.time_limit import Late


@dataclass(frozen=True, kw_only=True)
class PredictedRow:
    """The prediction for one soup.

    Attributes:
        name: Name of the soup.
        coefficients: One coefficient for each ingredient.
        clean: Measured clean accuracy.
        attacked: Whether the soup was attacked; its row then has measured accuracies.
        predicted: Predicted accuracy and the ends of its 95 % band, by attacked measure.
    """

    name: str
    coefficients: tuple[float, ...]
    clean: Accuracy
    attacked: bool
    predicted: Mapping[str, tuple[float, float, float]]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {
            "name": self.name,
            "coefficients": list(self.coefficients),
            "attacked": self.attacked,
            CLEAN_KEY: self.clean.to_json(),
            "predicted": {
                key: dict(zip(("value", "low", "high"), band, strict=True))
                for key, band in self.predicted.items()
            },
        }


@dataclass(frozen=True, kw_only=True)
class SurrogateResult:
    """How a search by surrogate ended, and its predictions.

    Attributes:
        section: Section of the recipe.
        stage: "settled", "grid" where the model failed and the grid was attacked, or "late" where
            the time limit ended the search.
        attacked: Number of attacked soups.
        in_full: How many of them were attacked on all samples.
        soups: Number of soups.
        samples: Number of samples.
        part: Samples that the other attacked soups were attacked on; None if there is no part.
        tolerance: Accuracy that the answer may lose to the best soup.
        chance: Chance that a soup beats those that were attacked on all samples by more.
        p_value: p-value of the test of the model's fit.
        rows: The predictions; empty where the model was not used.
        late: What the time limit kept the search from attacking.
    """

    section: str
    stage: str
    attacked: int
    in_full: int
    soups: int
    samples: int
    part: int | None
    tolerance: float
    chance: float
    p_value: float
    rows: tuple[PredictedRow, ...] = ()
    late: Late = field(default_factory=Late)

    @classmethod
    def of(
        cls, section: str, search: SurrogateSearch, attacked: HitsByName, *, late: bool
    ) -> "SurrogateResult":
        """Return the result of a search that ended.

        Args:
            section: Section of the recipe.
            search: The search.
            attacked: The verdicts of the attacked soups.
            late: Whether the time limit ended it.
        """
        state = search.state(attacked)
        return cls(
            section=section,
            stage="late" if late else state.stage,
            attacked=len(attacked),
            in_full=sum(map(search.is_in_full, attacked.values())),
            soups=len(search.names),
            samples=search.samples,
            part=search.part_size,
            tolerance=search.tolerance,
            chance=state.chance,
            p_value=state.p_value,
            rows=tuple(
                PredictedRow(
                    name=item.name,
                    coefficients=item.alpha,
                    clean=item.clean,
                    attacked=item.attacked,
                    predicted=item.accuracy,
                )
                for item in search.predict(attacked)
            ),
            late=count_late(search, attacked) if late else Late(),
        )

    @property
    def message(self) -> str:
        """What was attacked and how sure the answer is, in one line."""
        attacked = f"{self.section}: attacked {self.attacked} of {self.soups} soups"
        if self.in_full < self.attacked:
            attacked += f", {self.in_full} on all {self.samples:,} samples"
            attacked += f" and the others on {self.part:,}"
        chance = (
            f"another soup is more than {100 * self.tolerance:g} points better on these samples "
            f"with a chance of {self.chance:.0%}"
        )
        if self.stage == "settled":
            return f"{attacked}; {chance}"
        if self.stage == "late" and not self.rows:
            return f"{attacked}, then the time limit was reached; too few to predict the others"
        if self.stage == "late":
            return f"{attacked}, then the time limit was reached; {chance}"
        if not self.rows:
            return f"{attacked}, too few to leave some out"
        unsettled = f"the model did not settle the answer (p = {self.p_value:.2g} that it fits)"
        if self.attacked == self.soups:
            return f"{attacked}: {unsettled}, so the whole grid was attacked"
        return (
            f"{attacked}: {unsettled} and no longer counts; of the coarse grid, all soups that can "
            "meet a requirement on clean accuracy were attacked"
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        names = ("section", "stage", "attacked", "in_full", "soups", "samples", "part", "tolerance")
        return {
            **{name: getattr(self, name) for name in (*names, "chance", "p_value")},
            "message": self.message,
            "rows": [row.to_json() for row in self.rows],
        }
