"""Comparisons: paired intervals that cover what they say, McNemar's exact p, and refusals of what cannot be compared."""

import json
import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.data import load_data
from robustsoup.errors import RequestError
from robustsoup.evaluation.comparison import Comparison, compare
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.intervals import Z95, Accuracy, Difference, mcnemar, tango, wilson
from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.models import load_model

few = settings(max_examples=60, deadline=None)
Z90 = 1.6448536269514722
LINF, L2, L1 = "Linf 8/255", "L2 0.5", "L1 12.0"
RECORD = {
    "split": "test",
    "data": {"name": "digits", "digest": "0123456789abcdef"},
    "attack": "apgd",
    "loss": "ce",
    "steps": 100,
    "restarts": 1,
    "seed": 0,
    "precision": "float32",
    "search_precision": "float32",
}


def made(right, ids=None, labels=None, record=None, **robust):
    """An evaluation with these verdicts: strings of 0 and 1, or masks; robust by Linf, L2, L1."""
    right = mask(right)
    n = len(right)
    labels = torch.arange(n) % 10 if labels is None else torch.tensor(labels)
    threats = {
        {"linf": LINF, "l2": L2, "l1": L1}[name]: Verdicts(
            robust=mask(verdict),
            by=torch.zeros(n, dtype=torch.int64),
            step=torch.zeros(n, dtype=torch.int64),
            norm=torch.zeros(n),
            margin=torch.zeros(n),
        )
        for name, verdict in robust.items()
    }
    return Evaluation(
        ids=torch.arange(n) if ids is None else torch.tensor(ids),
        labels=labels,
        prediction=torch.where(right, labels, (labels + 1) % 10),
        margin=torch.zeros(n),
        threats=threats,
        record=RECORD | {"threats": list(threats)} | (record or {}),
    )


def mask(verdict):
    return (
        torch.tensor([c == "1" for c in verdict])
        if isinstance(verdict, str)
        else torch.as_tensor(verdict)
    )


def tables(most=300):
    """(only_a, only_b, n) with only_a + only_b <= n and n >= 1."""
    counts = st.tuples(st.integers(0, most), st.integers(0, most), st.integers(0, most))
    return counts.filter(any).map(lambda c: (c[0], c[1], sum(c)))


# the interval


@pytest.mark.parametrize(
    ("only_a", "only_b", "n", "z", "low", "high", "digits"),
    [
        (
            1,
            0,
            44,
            Z90,
            -0.096,
            None,
            3,
        ),  # Tango 1998, section 6.1: lenses disinfected one way and the other
        (
            7,
            1,
            21,
            Z95,
            -0.517,
            -0.026,
            3,
        ),  # Fagerland et al. 2014, Statistics in Medicine 33:2850: Bentur
        (16, 6, 161, Z95, -0.1240, -0.0054, 4),  # the same authors' contingencytables for R: Cavo
        (60, 20, 1000, Z95, -0.0584, -0.0231, 4),  # PropCIs::scoreci.mp for R, as is the next
        (25, 28, 618, Z90, -0.0148, 0.0247, 4),
    ],
)
def test_published_intervals(only_a, only_b, n, z, low, high, digits):
    found = tango(only_a, only_b, n, z)
    assert round(found[0], digits) == low
    assert high is None or round(found[1], digits) == high


def statistic(only_a, only_b, n, d):
    """The score statistic of the difference d, with the likeliest nuisance found by search, not by formula."""

    def likelihood(
        q,
    ):  # q, q + d and 1 - 2 q - d: the shares that a alone, b alone and neither or both got right
        shares = ((only_a, q), (only_b, q + d), (n - only_a - only_b, 1 - 2 * q - d))
        return sum(
            count * math.log(share) if share > 0 else -math.inf for count, share in shares if count
        )

    low, high = max(0.0, -d), (1 - d) / 2
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if likelihood(left) > likelihood(right) else (left, high)
    return (only_b - only_a - n * d) / math.sqrt(n * (low + high + d - d * d))


@pytest.mark.parametrize(
    ("only_a", "only_b", "n"),
    [(3, 9, 40), (0, 4, 25), (4, 0, 25), (1, 1, 10), (20, 19, 40), (150, 210, 10_000)],
)
def test_an_interval_holds_just_what_the_score_test_keeps(only_a, only_b, n):
    low, high = tango(only_a, only_b, n)
    assert statistic(only_a, only_b, n, low) == pytest.approx(Z95, abs=1e-4)
    assert statistic(only_a, only_b, n, high) == pytest.approx(-Z95, abs=1e-4)
    for d in np.linspace(-0.999, 0.999, 101):
        assert (abs(statistic(only_a, only_b, n, d)) < Z95) == (low < d < high), d


@few
@given(tables())
def test_an_interval_holds_the_estimate_and_has_a_width(table):
    only_a, only_b, n = table
    low, high = tango(only_a, only_b, n)
    assert -1 <= low <= (only_b - only_a) / n <= high <= 1
    assert high - low > 1 / (n + 4)
    assert tango(only_b, only_a, n) == (-high, -low)


@pytest.mark.parametrize("n", [1, 10, 1000, 10_000])
def test_without_discordant_pairs_the_ends_are_those_of_none_out_of_n(n):
    end = wilson(0, n)[1]
    assert tango(0, 0, n) == pytest.approx((-end, end), abs=1e-15)


def test_the_interval_covers_what_it_says_by_enumeration():
    """Every table of n = 60 with its probability: no simulation error. Score intervals cover 95 % on average."""
    n, covered = 60, []
    every = [(x, y) for x in range(n + 1) for y in range(n + 1 - x)]
    x, y = np.array(every).T
    low, high = np.array([tango(a, b, n) for a, b in every]).T
    factorial = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    ways = factorial[n] - factorial[x] - factorial[y] - factorial[n - x - y]
    for p in (0.02, 0.05, 0.1, 0.2, 0.3):
        for q in (0.02, 0.05, 0.1, 0.2, 0.3):
            chance = np.exp(ways + x * np.log(p) + y * np.log(q) + (n - x - y) * np.log(1 - p - q))
            assert chance.sum() == pytest.approx(1)
            covered.append(chance[(low <= q - p) & (q - p <= high)].sum())
    assert min(covered) > 0.93
    assert max(covered) < 0.995
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


def test_the_interval_of_a_comparison_covers_the_true_difference():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        worse, better = (generator.random(200) < share for share in (0.12, 0.18))
        row = compare(made(~worse), made(~better)).rows["clean"]  # b is wrong on 6 points more
        covered += row.low <= -0.06 <= row.high
    assert 0.93 < covered / 1000 < 0.97


@pytest.mark.parametrize(("only_a", "only_b"), [(400, 300), (90, 130), (2000, 2050)])
def test_with_many_samples_the_interval_is_the_bootstrap_one(only_a, only_b):
    n = 10_000
    drawn = np.random.default_rng(0).multinomial(
        n, [only_a / n, only_b / n, 1 - (only_a + only_b) / n], size=200_000
    )
    expected = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [0.025, 0.975])
    low, high = tango(only_a, only_b, n)
    assert (low, high) == pytest.approx(expected, abs=0.03 * (high - low))


# the test


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (0, 10, 2 / 1024),
        (7, 1, 0.0703125),
        (
            6,
            16,
            0.052479,
        ),  # Fagerland et al., contingencytables for R: Cavo, the exact conditional test
        (10, 50_000, 0.0),
    ],
)
def test_known_p_values(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == pytest.approx(p, abs=5e-7)


@few
@given(st.integers(0, 400), st.integers(0, 400))
def test_p_is_the_sum_of_what_is_no_likelier(only_a, only_b):
    """Directly: the chance, at 1/2 each, of every split of the pairs that is at least as uneven."""
    pairs = only_a + only_b
    uneven = [k for k in range(pairs + 1) if abs(2 * k - pairs) >= abs(only_b - only_a)]
    assert mcnemar(only_a, only_b) == float(
        Fraction(sum(math.comb(pairs, k) for k in uneven), 2**pairs)
    )


@pytest.mark.parametrize("pairs", [1, 5, 6, 20, 101])
def test_equal_networks_are_told_apart_at_most_as_often_as_p_says(pairs):
    for level in (0.01, 0.05, 0.2):
        told = sum(math.comb(pairs, k) for k in range(pairs + 1) if mcnemar(k, pairs - k) <= level)
        assert told / 2**pairs <= level


@pytest.mark.parametrize(
    ("only_a", "only_b", "n", "text"),
    [
        (12, 24, 1000, "+1.2 points [+0.0, +2.5], p = 0.065"),
        (24, 12, 1000, "-1.2 points [-2.5, +0.0], p = 0.065"),
        (10, 40, 1000, "+3.0 points [+1.7, +4.5], p < 0.001"),
        (0, 0, 1000, "+0.0 points [-0.4, +0.4], p = 1"),
        (0, 0, 5000, "+0.0 points [-0.1, +0.1], p = 1"),
        (20, 29, 10_000, "+0.09 points [-0.05, +0.24], p = 0.25"),
        (0, 0, 10_000, "+0.00 points [-0.04, +0.04], p = 1"),
    ],
)
def test_a_difference_as_text(only_a, only_b, n, text):
    difference = Difference(
        Accuracy(n // 2 + only_a, n), Accuracy(n // 2 + only_b, n), only_a, only_b
    )
    assert str(difference) == text
    assert float(difference) == difference.value == (only_b - only_a) / n


# comparing


A = made("1111100000", linf="1110000000", l2="1101000000")
B = made("1111011000", linf="0000010000", l2="1101010000")


def test_a_comparison_by_hand():
    found = compare(A, B)
    assert found.n == 10
    assert list(found.rows) == ["clean", LINF, L2, "union"]
    ten = [Accuracy(hits, 10) for hits in range(11)]
    assert found.rows["clean"] == Difference(ten[5], ten[6], only_a=1, only_b=2)
    assert found.rows[LINF] == Difference(ten[3], ten[1], only_a=3, only_b=1)
    assert found.rows[L2] == Difference(ten[3], ten[4], only_a=0, only_b=1)
    assert found.rows["union"] == Difference(ten[2], ten[1], only_a=2, only_b=1)
    clean = found.rows["clean"]
    assert (clean.value, clean.p, (clean.low, clean.high)) == (0.1, 1.0, tango(1, 2, 10))
    for name, row in found.rows.items():
        assert (row.a, row.b) == (A.accuracy[name], B.accuracy[name])
    assert found.notes == ("4 comparisons; the p-values are not adjusted for their number",)


verdicts = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 6)
)


@few
@given(verdicts)
def test_swapping_two_evaluations_flips_signs_and_intervals(drawn):
    a, b = (made(*part[:1], linf=part[1], l2=part[2]) for part in (drawn[:3], drawn[3:]))
    forth, back = compare(a, b), compare(b, a)
    assert list(forth.rows) == list(back.rows) == ["clean", LINF, L2, "union"]
    for name, row in forth.rows.items():
        other = back.rows[name]
        assert (other.a, other.b, other.only_a, other.only_b) == (
            row.b,
            row.a,
            row.only_b,
            row.only_a,
        )
        assert (other.value, other.low, other.high, other.p) == (
            -row.value,
            -row.high,
            -row.low,
            row.p,
        )
        assert row.b.hits - row.a.hits == row.only_b - row.only_a
        assert row.low <= row.value <= row.high


@few
@given(verdicts)
def test_an_evaluation_does_not_differ_from_itself_but_by_chance(drawn):
    a = made(drawn[0], linf=drawn[1], l2=drawn[2])
    for row in compare(a, a).rows.values():
        assert (row.value, row.p, row.only_a, row.only_b) == (0, 1, 0, 0)
        assert row.low < 0 < row.high


@few
@given(verdicts, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(drawn, random):
    a, b = made(drawn[0], linf=drawn[1]), made(drawn[2], linf=drawn[3])
    order = list(range(len(drawn[2])))
    random.shuffle(order)
    right, robust = ([part[i] for i in order] for part in drawn[2:4])
    assert compare(
        a, made(right, ids=order, labels=[i % 10 for i in order], linf=robust)
    ) == compare(a, b)


def test_only_common_samples_are_compared():
    few_samples = made("0110", ids=[8, 3, 0, 77], labels=[8, 3, 0, 7], linf="0010")
    found = compare(A, few_samples)
    assert found.n == 3
    assert found.rows["clean"] == Difference(Accuracy(2, 3), Accuracy(2, 3), 0, 0)
    assert found.rows[LINF] == Difference(Accuracy(1, 3), Accuracy(1, 3), 0, 0)
    assert found.notes == (
        "on 3 common samples, of 10 in the first and 4 in the second",
        f"only the first has {L2}",
        "2 comparisons; the p-values are not adjusted for their number",
    )


def test_the_union_is_compared_where_it_is_of_the_same_threats():
    other_order = made("1111011000", l2="1101010000", linf="0000010000")
    assert compare(A, other_order).rows["union"] == compare(A, B).rows["union"]
    found = compare(A, made("1111011000", linf="0000010000", l1="1101010000"))
    assert list(found.rows) == ["clean", LINF]
    assert found.notes[:3] == (
        f"only the first has {L2}",
        f"only the second has {L1}",
        "no union: the threat models differ",
    )
    assert list(compare(A, made("1111011000")).rows) == ["clean"]


def test_one_row_needs_no_word_on_their_number():
    assert compare(made("10"), made("11")).notes == ()


def changed(evaluation, **record):
    """The evaluation with another record; a key that is given as ... is left out."""
    record = {key: value for key, value in (evaluation.record | record).items() if value is not ...}
    return replace(evaluation, record=record)


@pytest.mark.parametrize(
    ("key", "value", "note"),
    [
        ("steps", 20, "different steps: 100 and 20; the robust accuracies are not comparable"),
        (
            "attack",
            "square",
            "different attack: apgd and square; the robust accuracies are not comparable",
        ),
        ("loss", "dlr", "different loss: ce and dlr; the robust accuracies are not comparable"),
        (
            "restarts",
            5,
            "different restarts: 1 and 5; the robust accuracies are not comparable",
        ),
        ("seed", 1, "different seed: 0 and 1; the robust accuracies are not comparable"),
        (
            "precision",
            "bfloat16",
            "different precision: float32 and bfloat16; the accuracies are not comparable",
        ),
        (
            "search_precision",
            "bfloat16",
            "different search_precision: float32 and bfloat16; the robust accuracies are not comparable",
        ),
        (
            "screened",
            {"steps": 2},
            "the second was screened; its robust accuracies may be too high",
        ),
        ("stopped", True, "the second was stopped; its robust accuracies may be too high"),
        ("warnings", ["the gradients vanish"], "the second: the gradients vanish"),
    ],
)
def test_a_difference_in_the_protocol_is_noted(key, value, note):
    found = compare(A, changed(B, **{key: value}))
    assert found.notes[0] == note
    assert found.rows == compare(A, B).rows
    clean = compare(made("10"), changed(made("11"), **{key: value})).notes
    assert clean == ((note,) if key in ("precision", "warnings") else ())


@pytest.mark.parametrize("key", ["steps", "loss", "precision"])
def test_what_one_record_does_not_say_is_not_compared(key):
    assert compare(A, changed(B, **{key: ...})).notes == compare(A, B).notes


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            changed(B, split="val"),
            "compare: got test of digits (01234567) and val of digits (01234567), expected one split of the same data; "
            "evaluate both on the same split",
        ),
        (
            changed(B, data={"name": "cifar10", "digest": "fedcba9876543210"}),
            "compare: got test of digits (01234567) and test of cifar10 (fedcba98), expected one split of the same data; "
            "evaluate both on the same split",
        ),
        (
            made("111", ids=[10, 11, 12]),
            "compare: got no common sample among 10 in the first and 3 in the second; "
            "evaluate both on the same samples",
        ),
        (
            made("111", ids=[2, 1, 0], labels=[2, 5, 0]),
            "compare: sample 1: got label 1 in the first and 5 in the second, expected the same; "
            "number the classes alike",
        ),
        (
            changed(B, split=...),
            "compare: the record of the second names no data or split; evaluate it again",
        ),
        (
            changed(B, data=...),
            "compare: the record of the second names no data or split; evaluate it again",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(second, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        compare(A, second)


def test_a_comparison_as_json():
    found = compare(A, B)
    read = json.loads(json.dumps(found.to_json()))
    assert (read["n"], read["comparisons"], read["notes"]) == (10, 4, list(found.notes))
    assert list(read["rows"]) == list(found.rows)
    row = found.rows[LINF]
    assert read["rows"][LINF] == {
        "a": A.to_json()["accuracy"][LINF],
        "b": B.to_json()["accuracy"][LINF],
        "only_a": 3,
        "only_b": 1,
        "value": -0.2,
        "low": row.low,
        "high": row.high,
        "p": 0.625,
    }


def test_evaluations_from_files_are_compared(tmp_path):
    """Two random networks on the embedded digits, the second on fewer samples and with fewer steps."""
    test = load_data("digits").test
    saved = [
        evaluate(
            load_model(f"resnet9:width={width}", channels=1),
            test,
            ["Linf 0.01", "L2 0.1"],
            samples=n,
            steps=n,
        ).save(tmp_path / f"{width}.json")
        for width, n in ((2, 12), (3, 8))
    ]
    first, second = (Evaluation.load(path) for path in saved)
    found = compare(first, second)
    assert isinstance(found, Comparison)
    assert (found.n, list(found.rows)) == (8, ["clean", "Linf 0.01", "L2 0.1", "union"])
    assert {name: row.b for name, row in found.rows.items()} == second.accuracy
    assert found.notes[0] == "on 8 common samples, of 12 in the first and 8 in the second"
    assert "different steps: 12 and 8; the robust accuracies are not comparable" in found.notes
