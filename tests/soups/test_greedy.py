"""The greedy soup, from scores that are given."""

import pytest
from soup_candidates import L2, LINF, candidate

from robustsoup.errors import RequestError
from robustsoup.soups.greedy import greedy


def greedy_soup(alone, soups, score=LINF):
    """Make the greedy soup of ingredients whose hits (clean, robust) are given.

    Args:
        alone: hits of each ingredient.
        soups: hits by the indices of a soup's members.
        score: the score.

    Returns:
        The candidates, and the members of each soup that was evaluated, in order.
    """
    evaluated = []

    def evaluate(alpha):
        members = tuple(i for i, share in enumerate(alpha) if share)
        assert all(alpha[i] == pytest.approx(1 / len(members)) for i in members)
        evaluated.append(members)
        return candidate("soup", *soups[members]).evaluation

    evaluations = [candidate("ingredient", *hits).evaluation for hits in alone]
    return greedy(evaluations, evaluate, score), evaluated


def test_the_greedy_soup_starts_from_the_best_ingredient_and_never_scores_lower():
    alone = [(100, 50), (100, 80), (100, 60), (100, 70)]
    soups = {(1, 3): (100, 79), (1, 2): (100, 80), (0, 1, 2): (100, 90)}
    candidates, evaluated = greedy_soup(alone, soups)
    assert evaluated == [(1, 3), (1, 2), (0, 1, 2)]
    assert candidates[-1].alpha == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0))
    assert [c.alpha.index(1.0) for c in candidates[:4]] == [0, 1, 2, 3]
    assert len(candidates) == 7


def test_the_greedy_soup_may_be_its_best_ingredient():
    candidates, _ = greedy_soup([(100, 50), (100, 80)], {(0, 1): (100, 79)})
    assert candidates[-1].alpha == (0.0, 1.0)
    assert len(candidates) == 3


def test_the_score_decides():
    alone, soups = [(150, 50), (100, 80)], {(0, 1): (140, 70)}
    assert greedy_soup(alone, soups, "clean")[0][-1].alpha == (1.0, 0.0)
    assert greedy_soup(alone, soups, LINF)[0][-1].alpha == (0.0, 1.0)
    weighted = "0.5 clean + 0.5 Linf 8/255"
    assert greedy_soup(alone, soups, weighted)[0][-1].alpha == (0.5, 0.5)


def test_a_score_that_was_not_evaluated_is_refused():
    with pytest.raises(RequestError, match=r'score: "L2 0\.5" was not evaluated'):
        greedy_soup([(150, 50), (100, 80)], {}, L2)
