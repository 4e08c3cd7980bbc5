"""The greedy soup: add ingredients, best first, unless the score drops."""

from collections.abc import Callable, Sequence

from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.soups.goal import Score
from robustsoup.soups.grid import Alpha, alpha_name, corners
from robustsoup.soups.selection import Candidate


def greedy(
    ingredient_evaluations: Sequence[Evaluation],
    evaluate: Callable[[Alpha], Evaluation],
    score: Score | str,
) -> list[Candidate]:
    """Build the greedy soup of n ingredients.

    Args:
        ingredient_evaluations: Evaluation of each ingredient on held-out samples.
        evaluate: Evaluates the soup with coefficients (n,) on the same samples.
        score: An ingredient is added only if this score does not drop.

    Returns:
        The ingredients in their order, then every evaluated soup; the greedy soup is last.

    Raises:
        RequestError: If the score cannot be parsed, or needs an accuracy that was not evaluated.

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """
    score, n = Score.parse(score), len(ingredient_evaluations)
    scores = [score.of(evaluation.accuracy) for evaluation in ingredient_evaluations]
    tried = [
        Candidate(alpha_name(alpha), alpha, evaluation)
        for alpha, evaluation in zip(corners(n), ingredient_evaluations, strict=True)
    ]
    first, *others = sorted(range(n), key=lambda i: -scores[i])
    members, best, best_score = [first], tried[first], scores[first]
    for i in others:
        alpha = tuple(float(j in {*members, i}) / (len(members) + 1) for j in range(n))
        candidate = Candidate(alpha_name(alpha), alpha, evaluate(alpha))
        tried.append(candidate)
        candidate_score = score.of(candidate.evaluation.accuracy)
        if candidate_score >= best_score:
            members, best, best_score = [*members, i], candidate, candidate_score
    return [candidate for candidate in tried if candidate is not best] + [best]
