"""Compare candidates with ingredients on the same samples, by intervals that hold at once.

A search chooses among many candidates, so an interval of the chosen one against an ingredient, made
as if it were the only one, excludes 0 by luck too often. The intervals here hold for every pair of
a candidate and an ingredient together, and what an answer says about them follows from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from robustsoup.evaluation.comparison import pair_hits
from robustsoup.evaluation.intervals import Z95, Difference
from robustsoup.evaluation.simultaneous import Floats, bonferroni_quantile, difference_quantile
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.soups.answer import Gain
from robustsoup.soups.goal import Score
from robustsoup.soups.selection import Candidate, sample_scores


@dataclass(frozen=True)
class Comparisons:
    """All pairs of a candidate and an ingredient.

    The intervals under one measure hold together with a probability of 95 %. If the same samples
    decided which candidates were attacked in full, all that were looked at count: Bonferroni's
    correction needs no verdicts of the others.

    Attributes:
        candidates: The candidates, evaluated on the same samples.
        ingredients: The ingredients by name, evaluated on these samples too.
        seed: Seed of the quantiles.
        looked_at: Number of candidates that were looked at on these samples, if it is higher.
    """

    candidates: Sequence[Candidate]
    ingredients: Mapping[str, Evaluation]
    seed: int = 0
    looked_at: int = 0

    @property
    def count(self) -> int:
        """Number of pairs; an ingredient among the candidates is not compared with itself."""
        if not self.candidates:
            return 0
        same = sum(item.ingredient in self.ingredients for item in self.candidates)
        return max(len(self.candidates), self.looked_at) * len(self.ingredients) - same

    def differences(self, chosen: Evaluation) -> dict[str, dict[str, Difference]]:
        """Return one candidate less each ingredient, by ingredient and measure."""
        hits = chosen.hits()
        others = {name: item.hits() for name, item in self.ingredients.items()}
        keys = [key for key in hits if all(key in item for item in others.values())]
        quantiles = {key: self._quantile(Score.parse(key)) for key in keys} if others else {}
        return {
            name: {key: replace(pair_hits(item[key], hits[key]), z=quantiles[key]) for key in keys}
            for name, item in others.items()
        }

    def better_than_all(
        self, score: Score, candidates: Sequence[Candidate], ingredients: Sequence[str]
    ) -> list[Candidate]:
        """Return those of the candidates whose score was shown to be above all given ingredients'.

        Args:
            score: The score.
            candidates: Some of the candidates.
            ingredients: Names of some of the ingredients.
        """
        if not candidates or not ingredients:
            return []
        z = self._quantile(score)
        return [item for item in candidates if not self._unbeaten(score, item, ingredients, z=z)]

    def unbeaten(self, score: Score, candidate: Candidate, ingredients: Sequence[str]) -> list[str]:
        """Return those of the given ingredients that a candidate's score is not shown to exceed."""
        z = self._quantile(score) if ingredients else 0.0
        return self._unbeaten(score, candidate, ingredients, z=z)

    def _unbeaten(
        self, score: Score, candidate: Candidate, ingredients: Sequence[str], *, z: float
    ) -> list[str]:
        evaluation = candidate.evaluation
        return [
            name
            for name in ingredients
            if measure_gain(score, evaluation, self.ingredients[name], z=z).low <= 0
        ]

    def _quantile(self, score: Score) -> float:
        def stack(evaluations: Sequence[Evaluation]) -> Floats:
            return np.stack([sample_scores(score, item) for item in evaluations], axis=1)

        first = stack([item.evaluation for item in self.candidates])
        z = difference_quantile(first, stack([*self.ingredients.values()]), seed=self.seed)
        if self.looked_at <= len(self.candidates):
            return z
        return max(z, bonferroni_quantile(self.count))


def measure_gain(score: Score, a: Evaluation, b: Evaluation, *, z: float = Z95) -> Gain:
    """Return the score of a less that of b on the same samples, with an interval.

    Args:
        score: The score.
        a: The first evaluation.
        b: The second evaluation.
        z: Quantile of the interval; by default that of one pair alone.
    """
    if len(score.terms) == 1 and score.terms[0][0] == 1:
        key = score.terms[0][1]
        difference = replace(pair_hits(b.hits()[key], a.hits()[key]), z=z)
        return Gain(value=difference.value, low=difference.low, high=difference.high)
    differences = sample_scores(score, a) - sample_scores(score, b)
    mean, half = float(differences.mean()), z * float(differences.std()) / len(differences) ** 0.5
    return Gain(value=mean, low=mean - half, high=mean + half)
