"""The answer of a search: what it says, and that it survives JSON."""

import json
from dataclasses import replace
from statistics import NormalDist

import pytest
from soup_candidates import L2, LINF, N, candidate

from robustsoup.soups.answer import Answer
from robustsoup.soups.explanation import (
    Explained,
    describe_gaps,
    describe_soup,
    explain,
    with_test,
)
from robustsoup.soups.selection import select
from robustsoup.soups.time_limit import Late


@pytest.mark.parametrize(
    ("alpha", "options", "words"),
    [
        ((1.0, 0.0, 0.0), {"ingredient": "eps2"}, "eps2 itself"),
        ((1.0, 0.0, 0.0), {}, "eps2 with the soup's BatchNorm statistics"),
        ((1.0, 0.0, 0.0), {"merged_by": "ties"}, "ties of eps2"),
        ((0.25, 0.75, 0.0), {"merged_by": "slerp"}, "slerp of 0.25 of eps2 and 0.75 of eps4"),
        ((0.0, 0.4, 0.6), {}, "0.4 of eps4 and 0.6 of eps8"),
        ((0.2, 0.3, 0.5), {}, "0.2 of eps2, 0.3 of eps4 and 0.5 of eps8"),
        ((1 / 3, 1 / 3, 1 / 3), {}, "equal parts of eps2, eps4 and eps8"),
        ((0.5, 0.0, 0.5), {}, "equal parts of eps2 and eps8"),
        ((0.123456, 0.876544, 0.0), {}, "0.123 of eps2 and 0.877 of eps4"),
        ((), {"method": "learned"}, "a learned soup of eps2, eps4 and eps8"),
        (
            (),
            {"method": "learned", "threats": ("Linf 8/255", "L2 0.5")},
            "a learned soup of eps2, eps4 and eps8, learned against Linf 8/255 and L2 0.5",
        ),
        (
            (),
            {"method": "dial", "at": 0.35, "threats": ("Linf 8/255",)},
            "the dial of eps2, eps4 and eps8 at t = 0.35 (0 is robust, 1 is clean)",
        ),
    ],
)
def test_a_soup_is_described_in_words(alpha, options, words):
    assert describe_soup(alpha, ["eps2", "eps4", "eps8"], **options) == words


def ingredient(name, *hits, **record):
    """Return a candidate that is an ingredient."""
    return replace(candidate(name, *hits, **record), ingredient=name, description=f"{name} itself")


def answer_of(candidates, *, maximise=LINF, require=(), point=False, **context):
    """Return the answer of a search; the ingredients are those among the candidates."""
    selection = select(candidates, maximise=maximise, require=require, point=point)
    known = {c.ingredient: c.evaluation for c in candidates if c.ingredient}
    return explain(selection, Explained(**({"ingredients": known} | context)))


def test_a_soup_that_is_clearly_better_is_distinguishable():
    answer = answer_of([ingredient("a", 190, 60), candidate("soup", 185, 100)])
    assert (answer.chosen, answer.best_ingredient) == ("soup", "a")
    assert (answer.distinguishable, answer.better_soup) == (True, "soup")
    assert answer.lines()[0] == (
        f"the chosen soup is better in {LINF} than every ingredient, of which a is best"
    )


def test_without_a_distinguishable_soup_the_answer_names_the_ingredient():
    answer = answer_of(
        [ingredient("a", 190, 60), ingredient("b", 150, 90), candidate("s", 180, 92)]
    )
    assert answer.chosen == "s"
    assert (answer.distinguishable, answer.better_soup) == (False, None)
    # the first 180 samples against the first 150: so many are better by any interval
    assert answer.lines()[0] == (
        f"no soup is distinguishable from b in {LINF}; the chosen soup is better in clean"
    )
    close = answer_of([ingredient("b", 150, 90), candidate("s", 151, 92)])
    assert close.lines()[0] == f"no soup is distinguishable from b in {LINF}: use that"


def test_what_the_time_limit_left_out_is_said():
    lines = answer_of([ingredient("a", 190, 60), candidate("s", 185, 100)], late=Late(2, 3)).lines()
    assert "the time limit left out 2 soups that no attack was tried on" in lines
    text = "the time limit came before 3 soups that could still win met the full attack"
    assert f"{text} on all samples" in lines


def test_the_first_sentence_and_the_intervals_agree():
    """Alone, 6 samples of 200 that only the soup gets right tell two apart; among many they do not.

    Correlated soups cost little, so each of the others is right on samples of its own.
    """
    rival = ingredient("a", 150, 60)
    tried = [rival, with_hits("s", [*range(66)])]
    alone = answer_of(tried)
    assert (alone.comparisons, alone.distinguishable) == (1, True)
    assert alone.against[0].differences[LINF].low > 0
    assert not any("at once" in line for line in alone.lines())
    others = [with_hits(f"o{i}", [*range(54), *range(70 + 6 * i, 76 + 6 * i)]) for i in range(20)]
    among = answer_of([*tried, *others])
    assert (among.chosen, among.comparisons, among.distinguishable) == ("s", 21, False)
    difference = among.against[0].differences[LINF]
    assert difference.low < 0 < difference.value
    assert difference.z > 1.96
    assert f"no soup is distinguishable from a in {LINF}: use that" in among.lines()
    assert (
        "differences of the chosen one, by intervals that hold for all 21 comparisons of a "
        "candidate with an ingredient at once (95 %):"
    ) in among.lines()


@pytest.mark.parametrize(
    ("maximise", "measure"),
    [
        (LINF, LINF),
        (f"0.5 clean + 0.5 {LINF}", f"0.5 clean + 0.5 {LINF}"),
        ("knee", "the knee's score"),
    ],
)
def test_the_first_sentence_names_ingredients_that_the_choice_does_not_beat(maximise, measure):
    """It beats the best ingredient on nearly the same samples, not a worse one on others."""
    best = replace(with_hits("best", range(60)), ingredient="best")
    other = replace(with_hits("other", range(90, 149)), ingredient="other")
    answer = answer_of([best, other, with_hits("s", range(70))], maximise=maximise)
    assert (answer.chosen, answer.best_ingredient, answer.distinguishable) == ("s", "best", False)
    assert answer.lines()[0] == (
        f"no soup is shown to be better in {measure} than every ingredient: the chosen one is "
        "better than best, but not shown to be better than other"
    )


def test_soups_that_were_looked_at_but_not_attacked_in_full_count_in_comparisons():
    """The same samples decided which soups are attacked in full."""
    tried = [ingredient("a", 150, 60), with_hits("s", [*range(66)])]
    short = [candidate(f"o{k}", 150, 50, screened=True) for k in range(100)]
    alone, among = answer_of(tried), answer_of([*tried, *short])
    assert (alone.comparisons, alone.distinguishable) == (1, True)
    assert (among.chosen, among.comparisons, among.distinguishable) == ("s", 101, False)
    assert among.against[0].differences[LINF].z == pytest.approx(
        NormalDist().inv_cdf(1 - 0.05 / (2 * 101))
    )


def test_a_soup_that_is_better_need_not_be_the_chosen_one():
    """It gains less, but on no sample loses."""
    a = with_hits("a", range(60))
    noisy = with_hits("noisy", [*range(30), *range(100, 143)])  # 43 gained, 30 lost
    tried = [replace(a, ingredient="a"), noisy, with_hits("sure", range(72))]
    answer = answer_of(tried)
    assert (answer.chosen, answer.better_soup) == ("noisy", "sure")
    assert answer.lines()[0] == (
        f"sure is better in {LINF} than every ingredient, of which a is best"
    )


def test_ingredients_that_miss_the_requirement_are_not_called_worse():
    tried = [ingredient("a", 190, 60), ingredient("b", 90, 130), candidate("soup", 185, 100)]
    answer = answer_of(tried, require=["clean>=0.6"])
    assert answer.chosen == "soup"
    assert answer.lines()[0] == (
        f"the chosen soup is better in {LINF} than every ingredient that is shown to meet the "
        "requirement, of which a is best"
    )


def test_of_equal_ingredients_the_chosen_one_is_called_best():
    first, second = ingredient("a", 190, 60), ingredient("b", 190, 60)
    evaluations = {"b": second.evaluation, "a": first.evaluation}
    answer = answer_of([first, second], ingredients=evaluations)
    assert (answer.chosen, answer.best_ingredient) == ("a", "a")


def test_the_runner_up_of_the_knee_is_told_in_ranges_not_points():
    tried = [ingredient("a", 190, 40), candidate("bent", 170, 100), ingredient("b", 120, 110)]
    why = answer_of(tried, maximise="knee").runner_up.why
    assert why.startswith("the knee's score ")
    assert "] (1 is the range of an accuracy) from the chosen one" in why
    assert "points" not in why


def test_the_knee_is_named():
    tried = [ingredient("a", 190, 60), candidate("s", 188, 62), candidate("t", 150, 70)]
    answer = answer_of(tried, maximise="knee")
    assert answer.lines()[0].startswith("no soup is distinguishable from a in the knee's score")


def with_hits(name, robust, clean=150):
    """Return a candidate that is right under attack on the given samples."""
    item = candidate(name, clean, 0)
    item.evaluation.threats[LINF].robust[list(robust)] = True
    return item


def test_answers_of_older_runs_have_intervals_of_each_pair():
    content = answer_of([ingredient("a", 190, 60), candidate("s", 188, 62)]).to_json()
    difference = content["against"][0]["differences"][LINF]
    difference.pop("z", None)
    assert Answer.from_json(content).against[0].differences[LINF].z == pytest.approx(1.96, abs=1e-3)


def test_an_ingredient_that_fails_the_requirement_is_no_rival():
    tried = [ingredient("robust", 120, 100), candidate("soup", 190, 80)]
    answer = answer_of(tried, require=["clean>=0.8"])
    assert (answer.chosen, answer.best_ingredient) == ("soup", None)
    assert answer.distinguishable is None
    assert answer.lines()[0].startswith("on val: chosen: soup (clean 95.0%")
    (against,) = answer.against
    assert (against.ingredient, against.meets) == ("robust", False)
    assert against.differences[LINF].value == pytest.approx(-0.1)
    assert against.differences["clean"].value == pytest.approx(0.35)
    assert any("against robust (not shown to meet the requirement)" in s for s in answer.lines())


def test_the_requirement_stands_beside_its_bound():
    tried = [ingredient("a", 190, 60), candidate("s", 188, 70), candidate("t", 185, 65)]
    answer = answer_of(tried, require=["clean>=0.8"])
    (check,) = answer.checks
    assert check.met
    assert 0.8 <= check.low < check.estimate.value
    assert answer.guarantee.method == "max-t"
    assert answer.guarantee.candidates == 3
    assert any(
        s.startswith("clean>=0.8 is met: 94.0% of 200 samples, at least ")
        and s.endswith("(one-sided 95 % bound over 3 candidates)")
        for s in answer.lines()
    )


def test_estimates_guarantee_nothing():
    answer = answer_of(
        [candidate("s", 161, 70)], require=["clean>=0.8"], point=True, ingredients={}
    )
    assert answer.guarantee.method == "point"
    assert "clean>=0.8 is met: 80.5% of 200 samples, an estimate, which guarantees nothing" in (
        answer.lines()
    )


def test_the_runner_up_and_what_the_requirement_refused():
    tried = [
        ingredient("a", 196, 60),
        candidate("s", 194, 90),
        candidate("t", 193, 88),
        candidate("robust", 150, 110),
    ]
    answer = answer_of(tried, require=["clean>=0.85"])
    assert answer.chosen == "s"
    runner_up, refused = answer.runner_up, answer.refused
    assert (runner_up.name, refused.name) == ("t", "robust")
    assert runner_up.gain.value == pytest.approx(0.01)
    assert not runner_up.gain.distinguishable
    assert runner_up.why == (
        f"{LINF} {runner_up.gain.reversed()} from the chosen one (this pair alone), "
        "not distinguishable"
    )
    assert runner_up.samples_to_separate > N
    assert refused.gain.value == pytest.approx(-0.1)
    assert refused.why.startswith(f"{LINF} +10.0 points [")
    assert "but not shown to meet clean>=0.85: 75.0%, at least " in refused.why
    assert any(s.startswith("about ") and "tell these two apart" in s for s in answer.lines())


def test_equal_soups_are_said_to_be_equal():
    answer = answer_of([candidate("s", 180, 90), candidate("t", 170, 90)], ingredients={})
    assert (answer.chosen, answer.runner_up.name) == ("s", "t")
    assert "the same estimate" in answer.runner_up.why
    assert answer.runner_up.samples_to_separate is None


def test_when_nothing_meets_the_requirement_the_answer_says_how_many_samples_it_takes():
    answer = answer_of([candidate("s", 172, 90)], require=["clean>=0.85"], ingredients={})
    assert (answer.met, answer.exit_code) == (False, 3)
    assert answer.message.startswith(
        "no candidate meets clean>=0.85 by its 95 % lower bound; the closest is s (clean 86.0%"
    )
    assert answer.obstacle == "of 1 candidates, clean>=0.85 is met by none"
    assert answer.samples_to_prove > N
    hopeless = answer_of([candidate("s", 160, 90)], require=["clean>=0.85"], ingredients={})
    assert hopeless.samples_to_prove is None


def test_soups_that_meet_the_requirements_but_were_not_attacked_in_full_are_counted():
    """As where the time limit came before their full attack."""
    others = [candidate(name, 198, 90, screened=True) for name in "tu"]
    tried = [candidate("s", 170, 90), *others]
    answer = answer_of(tried, require=["clean>=0.9", f"{LINF}>=0"], ingredients={})
    assert (answer.chosen, answer.met) == ("s", False)
    assert answer.message.startswith(
        f"no candidate that was attacked in full meets clean>=0.9 and {LINF}>=0 by its 95 % lower "
        "bound (2 others do); the closest is s (clean 85.0%"
    )
    assert answer.obstacle == f"of 3 candidates, clean>=0.9 is met by 2, {LINF}>=0 is met by 3"
    one = answer_of(tried[:2], require=["clean>=0.9"], point=True, ingredients={})
    assert "by its estimate (1 other does); the closest is s" in one.message
    assert select(tried[:2], maximise=LINF, require=["clean>=0.9"]).message.startswith(
        "no candidate that was attacked in full meets clean>=0.9 by its 95 % lower bound (1 other"
    )


def test_samples_to_prove_are_known_where_exact_tests_decide():
    """At 200 samples and a threshold of 95 %, 10 misses are expected."""
    tried = [candidate("s", 192, 90), candidate("t", 180, 95)]
    answer = answer_of(tried, require=["clean>=0.95"], ingredients={})
    assert answer.guarantee.method == "exact"
    assert answer.samples_to_prove > N


def test_requirements_that_only_different_soups_meet_conflict():
    tried = [candidate("clean", 190, 40), candidate("robust", 120, 100)]
    answer = answer_of(tried, require=["clean>=0.8", f"{LINF}>=0.35"], ingredients={})
    assert not answer.met
    assert answer.obstacle == (
        f"of 2 candidates, clean>=0.8 is met by 1, {LINF}>=0.35 is met by 1; "
        "none meets all: the requirements conflict here"
    )


def test_the_test_split_tests_the_chosen_soup_alone():
    answer = answer_of([candidate("s", 190, 90)], require=["clean>=0.85"], ingredients={})
    assert (answer.held_on_test, answer.exit_code) == (None, 0)
    held = with_test(answer, candidate("s", 171, 85).evaluation)
    assert (held.held_on_test, held.exit_code) == (True, 0)
    assert held.fresh_accuracy[LINF].hits == 85
    assert held.test[0].low < 0.85  # the estimate holds, its bound does not
    failed = with_test(answer, candidate("s", 169, 85).evaluation)
    assert (failed.held_on_test, failed.exit_code) == (False, 4)
    assert any("clean>=0.85 did NOT hold on test: 84.5%, at least " in s for s in failed.lines())
    other = with_test(answer, candidate("s", 169, 85).evaluation, split="held out").lines()
    assert any(line.startswith("on held out, which chose nothing: clean 84.5%") for line in other)
    assert any("clean>=0.85 did NOT hold on held out: 84.5%, at least " in line for line in other)
    shifted = replace(held, maximise="0.5 clean + 0.5 shift")
    copies = "where corrupted copies of half of the images chose the soup"
    assert any(line.startswith(f"on test, {copies}: clean 85.5%") for line in shifted.lines())
    without = with_test(replace(answer, require=(), checks=()), candidate("s", 1, 0).evaluation)
    assert (without.held_on_test, without.exit_code) == (None, 0)


def test_two_guarantees_are_said_not_to_hold_together():
    (gap,) = describe_gaps("val", separate=True)
    assert gap.startswith("that all requirements hold together: those with an attack do with 95 %")


def test_what_the_guarantee_leaves_out_is_said_last():
    gap = "a stopped training early by the loss on val"
    answer = answer_of([candidate("s", 190, 90)], ingredients={}, leaves_out=(gap,))
    assert answer.lines()[-1] == f"the guarantee leaves out: {gap}"


@pytest.mark.parametrize("maximise", [LINF, "0.5 clean + 0.5 L2 0.5", "knee", "union"])
def test_an_answer_survives_json(maximise):
    tried = [
        ingredient("a", 196, 60, 50),
        ingredient("b", 150, 100, 90),
        candidate("s", 190, 90, 80),
        candidate("t", 185, 85, 85),
    ]
    answer = answer_of(tried, maximise=maximise, require=["clean>=0.85", f"{L2}>=0.1"])
    answer = with_test(answer, candidate("s", 180, 85, 80).evaluation)
    assert answer.maximise == maximise
    content = json.loads(json.dumps(answer.to_json()))
    again = Answer.from_json(content)
    assert again == answer
    assert again.lines() == content["lines"]
    assert content["message"] == answer.message
    assert (content["held_on_test"], again.exit_code) == (True, 0)


def test_names_with_markup_are_escaped_in_notebooks():
    tried = [replace(candidate("<b>", 180, 90), description="0.5 of <script> and 0.5 of b")]
    page = answer_of(tried, ingredients={})._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_gains_of_weighted_sums_are_paired():
    a, b = candidate("a", 180, 90), candidate("b", 170, 100)
    answer = answer_of([a, b], maximise="0.5 clean + 0.5 Linf 8/255", ingredients={})
    gain = answer.runner_up.gain
    assert gain.value == pytest.approx(0.0)
    assert gain.low < 0 < gain.high


def test_where_nothing_meets_the_requirement_the_runner_up_misses_it_least():
    tried = [candidate("far", 100, 150), candidate("near", 165, 60), candidate("nearest", 170, 50)]
    answer = answer_of(tried, require=["clean>=0.9"], ingredients={})
    assert (answer.chosen, answer.met, answer.runner_up.name) == ("nearest", False, "near")


def test_a_soup_that_was_not_attacked_in_full_is_not_compared():
    record = {"screened": {"steps": 10}}
    known = {"a": ingredient("a", 190, 60).evaluation}
    tried = [candidate("s", 185, 100, **record), candidate("t", 184, 99, **record)]
    answer = answer_of(tried, ingredients=known)
    assert (answer.against, answer.better_soup, answer.distinguishable) == ((), None, None)
    assert (answer.runner_up, answer.comparisons) == (None, 0)
    assert sum("its robust accuracies are upper bounds" in line for line in answer.lines()) == 1
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer
