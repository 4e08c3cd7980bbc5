"""compare: paired differences of two evaluations, notes, and invalid requests."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.data import load_data
from robustsoup.errors import RequestError
from robustsoup.evaluation.comparison import Comparison, compare
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.intervals import Accuracy, Difference, tango
from robustsoup.evaluation.verdicts import Evaluation, Verdicts
from robustsoup.models import load_model

few_examples = settings(max_examples=60, deadline=None)
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


def make_evaluation(right, ids=None, labels=None, record=None, **robust):
    """Return an evaluation with the given verdicts.

    Args:
        right: clean verdicts, a string of 0 and 1 or a mask.
        ids: indices of the samples; default: 0, 1, 2, ...
        labels: labels of the samples; default: the last digit of the index.
        record: changes of the record.
        **robust: verdicts under linf, l2, l1.
    """
    right = to_mask(right)
    n = len(right)
    labels = torch.arange(n) % 10 if labels is None else torch.tensor(labels)
    threats = {
        {"linf": LINF, "l2": L2, "l1": L1}[name]: Verdicts(
            robust=to_mask(verdict),
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


def to_mask(verdict):
    return (
        torch.tensor([c == "1" for c in verdict])
        if isinstance(verdict, str)
        else torch.as_tensor(verdict)
    )


def test_the_interval_of_a_comparison_covers_the_true_difference():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        wrong_a, wrong_b = (generator.random(200) < share for share in (0.12, 0.18))
        row = compare(make_evaluation(~wrong_a), make_evaluation(~wrong_b)).rows["clean"]
        covered += row.low <= -0.06 <= row.high
    assert 0.93 < covered / 1000 < 0.97


A = make_evaluation("1111100000", linf="1110000000", l2="1101000000")
B = make_evaluation("1111011000", linf="0000010000", l2="1101010000")


def test_a_comparison_by_hand():
    comparison = compare(A, B)
    assert comparison.n == 10
    assert list(comparison.rows) == ["clean", LINF, L2, "union"]
    ten = [Accuracy(hits, 10) for hits in range(11)]
    assert comparison.rows["clean"] == Difference(ten[5], ten[6], only_a=1, only_b=2)
    assert comparison.rows[LINF] == Difference(ten[3], ten[1], only_a=3, only_b=1)
    assert comparison.rows[L2] == Difference(ten[3], ten[4], only_a=0, only_b=1)
    assert comparison.rows["union"] == Difference(ten[2], ten[1], only_a=2, only_b=1)
    clean = comparison.rows["clean"]
    assert (clean.value, clean.p, (clean.low, clean.high)) == (0.1, 1.0, tango(1, 2, 10))
    for name, row in comparison.rows.items():
        assert (row.a, row.b) == (A.accuracy[name], B.accuracy[name])
    assert comparison.notes == ("4 comparisons; the p-values are not adjusted for their number",)


verdicts = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 6)
)


@few_examples
@given(verdicts)
def test_swapping_two_evaluations_flips_signs_and_intervals(drawn):
    a, b = (make_evaluation(*part[:1], linf=part[1], l2=part[2]) for part in (drawn[:3], drawn[3:]))
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


@few_examples
@given(verdicts)
def test_an_evaluation_does_not_differ_from_itself(drawn):
    a = make_evaluation(drawn[0], linf=drawn[1], l2=drawn[2])
    for row in compare(a, a).rows.values():
        assert (row.value, row.p, row.only_a, row.only_b) == (0, 1, 0, 0)
        assert row.low < 0 < row.high


@few_examples
@given(verdicts, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(drawn, random):
    a, b = make_evaluation(drawn[0], linf=drawn[1]), make_evaluation(drawn[2], linf=drawn[3])
    order = list(range(len(drawn[2])))
    random.shuffle(order)
    right, robust = ([part[i] for i in order] for part in drawn[2:4])
    assert compare(
        a, make_evaluation(right, ids=order, labels=[i % 10 for i in order], linf=robust)
    ) == compare(a, b)


def test_only_common_samples_are_compared():
    few_samples = make_evaluation("0110", ids=[8, 3, 0, 77], labels=[8, 3, 0, 7], linf="0010")
    comparison = compare(A, few_samples)
    assert comparison.n == 3
    assert comparison.rows["clean"] == Difference(Accuracy(2, 3), Accuracy(2, 3), 0, 0)
    assert comparison.rows[LINF] == Difference(Accuracy(1, 3), Accuracy(1, 3), 0, 0)
    assert comparison.notes == (
        "on 3 common samples, of 10 in the first and 4 in the second",
        f"only the first has {L2}",
        "2 comparisons; the p-values are not adjusted for their number",
    )


def test_the_union_is_compared_if_it_is_of_the_same_threats():
    other_order = make_evaluation("1111011000", l2="1101010000", linf="0000010000")
    assert compare(A, other_order).rows["union"] == compare(A, B).rows["union"]
    comparison = compare(A, make_evaluation("1111011000", linf="0000010000", l1="1101010000"))
    assert list(comparison.rows) == ["clean", LINF]
    assert comparison.notes[:3] == (
        f"only the first has {L2}",
        f"only the second has {L1}",
        "no union: the threat models differ",
    )
    assert list(compare(A, make_evaluation("1111011000")).rows) == ["clean"]


def test_one_row_needs_no_note_on_the_number_of_comparisons():
    assert compare(make_evaluation("10"), make_evaluation("11")).notes == ()


def with_record(evaluation, **record):
    """Return the evaluation with another record; a key whose value is ... is left out."""
    record = {key: value for key, value in (evaluation.record | record).items() if value is not ...}
    return replace(evaluation, record=record)


TOO_HIGH = "its robust accuracies may be too high"


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
            (
                "different search_precision: float32 and bfloat16; "
                "the robust accuracies are not comparable"
            ),
        ),
        (
            "screened",
            {"steps": 2},
            "the second was screened; its robust accuracies may be too high",
        ),
        (
            "subset",
            {"samples": 2, "seed": 0, "missed": {}},
            f"the second was attacked in full on 2 samples alone; {TOO_HIGH}",
        ),
        ("warnings", ["the gradients vanish"], "the second: the gradients vanish"),
    ],
)
def test_a_difference_in_the_protocol_is_noted(key, value, note):
    comparison = compare(A, with_record(B, **{key: value}))
    assert comparison.notes[0] == note
    assert comparison.rows == compare(A, B).rows
    clean = compare(make_evaluation("10"), with_record(make_evaluation("11"), **{key: value})).notes
    assert clean == ((note,) if key in ("precision", "warnings") else ())


@pytest.mark.parametrize("key", ["steps", "loss", "precision"])
def test_a_setting_that_one_record_lacks_is_not_compared(key):
    assert compare(A, with_record(B, **{key: ...})).notes == compare(A, B).notes


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            with_record(B, split="val"),
            (
                "compare: got test of digits (01234567) and val of digits (01234567), "
                "expected one split of the same data; evaluate both on the same split"
            ),
        ),
        (
            with_record(B, data={"name": "cifar10", "digest": "fedcba9876543210"}),
            (
                "compare: got test of digits (01234567) and test of cifar10 (fedcba98), "
                "expected one split of the same data; evaluate both on the same split"
            ),
        ),
        (
            make_evaluation("111", ids=[10, 11, 12]),
            (
                "compare: got no common sample among 10 in the first and 3 in the second; "
                "evaluate both on the same samples"
            ),
        ),
        (
            make_evaluation("111", ids=[2, 1, 0], labels=[2, 5, 0]),
            (
                "compare: sample 1: got label 1 in the first and 5 in the second, "
                "expected the same; use one class numbering"
            ),
        ),
        (
            with_record(B, split=...),
            "compare: the record of the second names no data or split; evaluate it again",
        ),
        (
            with_record(B, data=...),
            "compare: the record of the second names no data or split; evaluate it again",
        ),
    ],
)
def test_evaluations_that_do_not_compare_are_refused(second, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        compare(A, second)


def test_a_comparison_as_json():
    comparison = compare(A, B)
    content = json.loads(json.dumps(comparison.to_json()))
    assert (content["n"], content["comparisons"], content["notes"]) == (
        10,
        4,
        list(comparison.notes),
    )
    assert list(content["rows"]) == list(comparison.rows)
    row = comparison.rows[LINF]
    assert content["rows"][LINF] == {
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
    """Two random networks; the second is evaluated on fewer samples and with fewer steps."""
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
    comparison = compare(first, second)
    assert isinstance(comparison, Comparison)
    assert (comparison.n, list(comparison.rows)) == (8, ["clean", "Linf 0.01", "L2 0.1", "union"])
    assert {name: row.b for name, row in comparison.rows.items()} == second.accuracy
    assert comparison.notes[0] == "on 8 common samples, of 12 in the first and 8 in the second"
    assert "different steps: 12 and 8; the robust accuracies are not comparable" in comparison.notes
