"""Which accuracies of a stored run are shown."""

import pytest
from synthetic_results import THREAT, make_accuracies, make_results, make_row, parse_row

from robustsoup.reports.learned_curves import group_into_curves
from robustsoup.reports.measures import choose_split, find_two_best, list_caveats
from robustsoup.runs.results import EvaluationProtocol, ResultRow, Results

PROTOCOL = EvaluationProtocol(select_on="val", report_on="test", threats=(THREAT,))


def names_of_two_best(rows):
    return [row.name for row in find_two_best(map(parse_row, rows), THREAT, PROTOCOL)]


def test_the_two_best_are_chosen_on_val_even_if_test_disagrees():
    rows = [
        make_row("a", "grid", 0.80, 0.20),
        make_row("b", "grid", 0.70, 0.30),
        make_row("c", "grid", 0.75, 0.25),
    ]
    rows[2]["test"] = make_accuracies(0.95, 0.60)
    assert names_of_two_best(rows) == ["a", "b"]
    rows[0]["val"] = None
    assert names_of_two_best(rows) == ["c", "c"]
    assert find_two_best([], THREAT, PROTOCOL) is None


def test_ties_go_to_the_row_that_is_better_at_the_other_measure():
    rows = [
        make_row("a", "grid", 0.80, 0.20),
        make_row("b", "grid", 0.80, 0.25),
        make_row("c", "grid", 0.70, 0.25),
    ]
    assert names_of_two_best(rows) == ["b", "b"]


def test_an_estimate_is_the_most_robust_only_where_nothing_was_attacked_in_full():
    rows = [
        make_row("a", "grid", 0.80, 0.30, screened=True, test=None),
        make_row("b", "grid", 0.70, 0.20, test=None),
    ]
    assert names_of_two_best(rows) == ["a", "b"]
    rows[1]["screened"] = True
    assert names_of_two_best(rows) == ["a", "a"]


@pytest.mark.parametrize("maximise", ["shift", "0.5 shift + 0.5 Linf 8/255", "knee"])
@pytest.mark.parametrize("require", [(), ("shift >= 40%",)])
def test_a_choice_by_corrupted_test_images_is_a_caveat(tmp_path, maximise, require):
    content = make_results(tmp_path)
    content["selection"] |= {"maximise": maximise, "require": list(require)}
    caveats = list_caveats(Results.from_json(content, "results.json"))
    assert any("corrupted" in caveat for caveat in caveats) == ("shift" in f"{maximise} {require}")


def test_the_reporting_split_is_shown_only_if_all_measured_rows_have_it():
    rows = [parse_row(make_row("a", "grid", 0.8, 0.2)) for _ in range(2)]
    unmeasured = ResultRow(name="c", role="grid")
    assert choose_split([*rows, unmeasured], PROTOCOL) == "test"
    rows.append(parse_row(make_row("b", "grid", 0.8, 0.2, test=None)))
    assert choose_split(rows, PROTOCOL) == "val"


def learned_row(threat, objective="ce"):
    return ResultRow(
        name=f"{threat} {objective}", role="learned", threat=threat, objective=objective
    )


def labels_by_curve(rows):
    return [(curve.name, list(curve.labels)) for curve in group_into_curves(rows)]


def test_learned_soups_are_ordered_by_eps_or_by_clean_weight():
    by_eps = [learned_row("Linf 16/255"), learned_row("clean"), learned_row("Linf 4/255")]
    assert labels_by_curve(by_eps) == [("", ["clean", "4/255", "16/255"])]
    (curve,) = group_into_curves(by_eps)
    assert [row.threat for row in curve.rows] == ["clean", "Linf 4/255", "Linf 16/255"]
    by_weight = [
        learned_row(THREAT, "mixed 0.4"),
        learned_row(THREAT),
        learned_row(THREAT, "mixed 1"),
    ]
    assert labels_by_curve(by_weight) == [("", ["0", "0.4", "1"])]
    objectives = [
        learned_row(THREAT, objective)
        for objective in ("trades 5", "mixed 0.4", "ce", "no.such:fn")
    ]
    assert labels_by_curve(objectives) == [
        ("mixed", ["0", "0.4"]),
        ("trades 5", ["trades 5"]),
        ("no.such:fn", ["no.such:fn"]),
    ]
    norms = [learned_row("L2 0.5"), learned_row("Linf 8/255"), learned_row("L2 0.25")]
    assert labels_by_curve(norms) == [("L2", ["0.25", "0.5"]), ("Linf", ["8/255"])]


def dial_row(t, threat=THREAT):
    return ResultRow(name=f"{t}", role="dial", threat=threat, at=t)


def test_a_dial_is_one_curve_for_each_threat_in_order_of_t():
    assert labels_by_curve([dial_row(1.0), dial_row(0.0), dial_row(0.25)]) == [
        ("t", ["0", "0.25", "1"])
    ]
    two_threats = [
        dial_row(1, "Linf 16/255"),
        dial_row(0.5),
        dial_row(0, "Linf 16/255"),
        dial_row(0),
    ]
    assert labels_by_curve(two_threats) == [
        ("t, Linf 16/255", ["0", "1"]),
        (f"t, {THREAT}", ["0", "0.5"]),
    ]
    with_learned = labels_by_curve([dial_row(0), learned_row("clean")])
    assert [label for _, labels in with_learned for label in labels] == ["0", "clean"]
