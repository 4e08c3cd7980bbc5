"""Reuse of points of other networks and of earlier evaluations; attacks on parts of samples."""

from dataclasses import replace

import pytest
import torch
from evaluated_networks import L1, L2, LINF, PARTS, WRONG, Counted, N, same_verdicts

from robustsoup.attacks import autoattack
from robustsoup.attacks.forward import pass_size, predict_logits
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data
from robustsoup.errors import RequestError
from robustsoup.evaluation import attackers
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.two_phase import attacked_rows, subset_rows
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.threats import ThreatModel

FIVE_STEPS = {"steps": 5, "seed": 3}


# pools of points


def test_points_of_one_network_are_tried_on_another(with_points, neighbour, data, passes):
    threats = [LINF, L2]
    alone = evaluate(neighbour, data, threats, **FIVE_STEPS)
    pooled = evaluate(
        Counted(neighbour), data, threats, pool=[with_points], keep_points=True, **FIVE_STEPS
    )
    assert pooled.record["broken_by"] == ["clean", "apgd-ce", "pool"]
    assert torch.equal(pooled.prediction, alone.prediction)
    correct, device = pooled.prediction == data.labels, data.images.device
    for name, verdicts in pooled.threats.items():
        points = with_points.threats[name].x_adv
        logits = predict_logits(neighbour, lambda at, p=points: p[at], N, pass_size(device), device)
        transferred = (logits.argmax(1) != data.labels) & correct
        assert 0 < int(transferred.sum()) < int(correct.sum())
        assert torch.equal(verdicts.by == 2, transferred)
        assert bool((verdicts.step[transferred] == -1).all())
        assert bool((verdicts.margin[transferred] < 0).all())
        assert torch.equal(verdicts.x_adv[transferred], points[transferred])
        norm = with_points.threats[name].norm
        assert torch.equal(verdicts.norm[transferred], norm[transferred])
        for part in PARTS:  # the rest was attacked as if there were no pool
            assert torch.equal(
                getattr(verdicts, part)[~transferred],
                getattr(alone.threats[name], part)[~transferred],
            )
        certificate = pooled.record["certificate"][name]
        assert certificate["points"] == int(correct.sum())
        assert certificate["outside"] == 0
    assert passes[True] > 0


def test_a_pool_must_have_points_of_the_same_samples_and_threats(
    with_points, evaluation, model, data
):
    for request in (
        {"pool": [evaluation]},
        {"pool": [with_points], "threats": ["Linf 0.2"]},
        {"pool": [with_points, evaluation]},
    ):
        with pytest.raises(
            RequestError,
            match=r"pool, others: an evaluation kept no points for .* again with keep_points=True",
        ):
            evaluate(model, data, **{"threats": [LINF], **request})
    shifted, longer = replace(data, ids=data.ids + 1), load_data("digits").test.first(N + 1)
    for request in ({"pool": [with_points]}, {"after": with_points}):
        for split in (shifted, longer):
            with pytest.raises(
                RequestError, match="pool, after and others must be evaluations of the same samples"
            ):
                evaluate(model, split, [LINF], **request)


def test_after_must_be_of_the_same_network(model, neighbour, data):
    checkpoint = Checkpoint.of(model)
    after = evaluate(checkpoint, data)
    for same in (checkpoint, model):  # the record of a module names no checkpoint
        assert torch.equal(evaluate(same, data, after=after).prediction, after.prediction)
    other = Checkpoint.of(neighbour)
    with pytest.raises(RequestError, match=f"after .* {after.record['checkpoint'][:12]}, expected"):
        evaluate(other, data, after=after)
    evaluate(other, data, after=evaluate(model, data))


def test_images_of_equal_ids_must_be_of_the_same_data(model):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 20, 1, 8, 8, generator=generator)
    y = torch.arange(20) % 10
    settings = {"threats": [LINF], "steps": 1}
    earlier = evaluate(model, (a, y), keep_points=True, **settings)
    for name, reused in (("pool", [earlier]), ("others", [earlier]), ("after", earlier)):
        evaluate(model, (a, y), **{name: reused}, **settings)
        for images, labels in ((b, y), (a, 9 - y)):
            with pytest.raises(RequestError, match="must be evaluations of the same samples"):
                evaluate(model, (images, labels), **{name: reused}, **settings)


# an earlier evaluation of the same network


def test_points_cannot_be_kept_after_an_evaluation_without_points(
    evaluation, with_points, model, data
):
    settings = {"keep_points": True, **FIVE_STEPS}
    for steps in (5, 6):
        changes = {**settings, "steps": steps}
        with pytest.raises(RequestError, match="keep_points: after kept no points"):
            evaluate(model, data, [LINF], after=evaluation, **changes)
        after = evaluate(model, data, [LINF], after=with_points, **changes)
        broken = ~with_points.threats[str(LINF)].robust
        points = with_points.threats[str(LINF)].x_adv[broken]
        assert torch.equal(after.threats[str(LINF)].x_adv[broken], points)
    clean = evaluate(model, data)
    assert evaluate(model, data, [LINF], after=clean, **settings).threats[str(LINF)].x_adv.any()


def test_after_the_very_same_attack_nothing_is_attacked_again(with_points, model, data, passes):
    network = Counted(model)
    repeated = evaluate(
        network, data, [LINF, L2, L1], after=with_points, keep_points=True, **FIVE_STEPS
    )
    assert passes == {True: 0, False: 2}  # does the network fit the data, in both memory formats?
    assert same_verdicts(repeated, with_points)
    assert torch.equal(repeated.prediction, with_points.prediction)
    assert torch.equal(repeated.margin, with_points.margin)
    for name, verdicts in repeated.threats.items():
        assert torch.equal(verdicts.x_adv, with_points.threats[name].x_adv)
    assert repeated.record["after"]["steps"] == 5
    fewer = evaluate(
        network, data, [L2], samples=20, after=with_points, masking_check=False, **FIVE_STEPS
    )
    assert torch.equal(fewer.threats["L2 0.5"].step, with_points.threats["L2 0.5"].step[:20])
    assert passes[True] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 10},
        {"seed": 4},
        {"loss": "dlr"},
        {"attack": "pgd"},
        {"restarts": 2},
        {"eot": 2},
        {"batch_size": 16},
        {"precision": "bfloat16"},
        {"loss": "targeted dlr", "targets": 2},
    ],
    ids=str,
)
def test_after_another_attack_broken_samples_stay_broken_and_the_rest_is_attacked(
    evaluation, model, data, passes, changes
):
    settings = {**FIVE_STEPS, **changes}
    repeated = evaluate(Counted(model), data, [LINF], after=evaluation, **settings)
    alone = evaluate(model, data, [LINF], **settings).threats["Linf 0.1"]
    earlier, verdicts = evaluation.threats["Linf 0.1"], repeated.threats["Linf 0.1"]
    assert passes[True] > 0
    assert torch.equal(verdicts.robust, earlier.robust & alone.robust)
    broken = ~earlier.robust
    for part in ("step", "norm", "margin"):
        ours, before, fresh = (getattr(v, part) for v in (verdicts, earlier, alone))
        assert torch.equal(ours[broken], before[broken])
        expected = torch.minimum(before, fresh) if part == "margin" else fresh
        assert torch.equal(ours[~broken], expected[~broken])
    names = repeated.record["broken_by"]
    assert {names[by] for by in verdicts.by[broken].tolist()} == {"clean", "apgd-ce"}
    assert torch.equal(repeated.prediction, evaluation.prediction)
    assert len(repeated.after_each(LINF)) == len(names) == len(set(names))


def test_a_threat_that_was_not_evaluated_earlier_is_attacked(evaluation, model, data):
    repeated = evaluate(model, data, ["Linf 0.05", L2], after=evaluation, **FIVE_STEPS)
    assert same_verdicts(repeated, evaluate(model, data, ["Linf 0.05", L2], **FIVE_STEPS))


def test_the_pool_keeps_its_name_in_later_evaluations(with_points, neighbour, data):
    pooled = evaluate(neighbour, data, [LINF], pool=[with_points], **FIVE_STEPS)
    repeated = evaluate(neighbour, data, [LINF], steps=8, loss="dlr", after=pooled)
    assert repeated.record["broken_by"] == ["clean", "apgd-dlr", "apgd-ce", "pool"]
    before, after = pooled.threats["Linf 0.1"].by, repeated.threats["Linf 0.1"].by
    assert torch.equal(after == 3, before == 2)
    assert torch.equal(after == 2, before == 1)
    assert bool((before[after == 1] == -1).all())


# AutoAttack


@pytest.fixture
def brief_autoattack(monkeypatch):
    """Replace AutoAttack's steps and queries by fewer than the standard has."""
    pytest.importorskip("pyautoattack")
    plan = attackers.plan_autoattack

    def plan_briefly(classes, threat):
        return replace(plan(classes, threat), queries=5, steps=2)

    monkeypatch.setattr(attackers, "plan_autoattack", plan_briefly)


def test_autoattack_follows_the_same_rules(model, data, passes, brief_autoattack):
    threats, network = [ThreatModel("Linf", 0.03)], Counted(model)
    evaluation = evaluate(network, data, threats, attack="autoattack", keep_points=True)
    assert evaluation.record["broken_by"] == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    verdicts = evaluation.threats["Linf 0.03"]
    assert torch.equal(verdicts.margin < 0, ~verdicts.robust)
    assert evaluation.record["certificate"]["Linf 0.03"]["outside"] == 0
    assert 0 < evaluation.accuracy["Linf 0.03"].hits < N - WRONG
    passes[True] = 0
    repeated = evaluate(network, data, threats, attack="autoattack", after=evaluation)
    assert passes[True] == 0
    assert same_verdicts(repeated, evaluation)


def test_autoattack_has_nothing_to_do_without_a_correct_sample(model, data, brief_autoattack):
    few = data.first(4)
    wrong = (evaluate(model, few, []).prediction + 1) % data.classes
    evaluation = evaluate(model, replace(few, labels=wrong), [LINF], attack="autoattack")
    assert evaluation.accuracy[str(LINF)].hits == 0


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_autoattack_resumes_after_the_last_attack_that_ended(
    model, data, tmp_path, monkeypatch, brief_autoattack, save_every_step, finished
):
    names, make_runner = [], autoattack._make_runner

    def note(name, *rest, **settings):
        names.append(name)
        return make_runner(name, *rest, **settings)

    monkeypatch.setattr(autoattack, "_make_runner", note)
    threats = [ThreatModel("Linf", 0.03)]
    settings = {"attack": "autoattack", "keep_points": True}
    whole = evaluate(model, data, threats, **settings)
    attacks = list(names)
    assert len(attacks) == 4

    def interrupt(done, total, figures):
        if len(names) == 4 + finished:
            raise KeyboardInterrupt

    settings["state_path"] = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, threats, on_progress=interrupt, **settings)
    names.clear()
    resumed = evaluate(model, data, threats, **settings)
    assert names == attacks[finished:]
    assert same_verdicts(resumed, whole)
    assert torch.equal(resumed.threats["Linf 0.03"].x_adv, whole.threats["Linf 0.03"].x_adv)


@pytest.mark.parametrize("reuse", ["pool", "after"])
def test_samples_broken_before_autoattack_stay_broken(neighbour, data, reuse, brief_autoattack):
    strong = evaluate(neighbour, data, [LINF], steps=50, restarts=3, keep_points=True)
    earlier = {"pool": [strong]} if reuse == "pool" else {"after": strong}
    evaluation = evaluate(neighbour, data, [LINF], attack="autoattack", **earlier)
    robust = [e.threats["Linf 0.1"].robust for e in (evaluation, strong)]
    assert bool((robust[0] <= robust[1]).all())


# a part of the samples


@pytest.fixture(scope="module")
def brief(model, data):
    return evaluate(model, data, [LINF, L2], steps=1, seed=3)


def test_a_subset_is_attacked_and_the_others_keep_their_verdicts(model, data, brief):
    threats, settings = [LINF, L2], {**FIVE_STEPS, "restarts": 2}
    complete = evaluate(model, data, threats, after=brief, **settings)
    size = N // 3
    part = evaluate(model, data, threats, after=brief, subset=size, **settings)
    rows = attacked_rows(data.ids, part.record)
    assert torch.equal(rows, subset_rows(data.ids, size, seed=3))
    assert int(rows.sum()) == size
    masks = [e.hits() for e in (part, complete, brief)]
    for name in (str(LINF), str(L2), "union"):
        mask, full, short = (hits[name] for hits in masks)
        assert torch.equal(mask[rows], full[rows])
        assert torch.equal(mask[~rows], short[~rows])
        missed = int((short & ~full)[rows].sum())
        accuracy = part.accuracy[name]
        assert (accuracy.hits, accuracy.n) == (int(short.sum()), N)
        assert (accuracy.drawn, accuracy.missed) == (int(short[rows].sum()), missed)
    assert "masking_check" not in part.record
    assert part.accuracy["clean"].drawn is None


def test_a_larger_subset_continues_and_the_rest_completes(model, data, brief):
    settings = {**FIVE_STEPS, "restarts": 2}
    threats = [LINF, L2]

    def attack(after, subset):
        return evaluate(model, data, threats, after=after, subset=subset, **settings)

    at_once, in_rounds = attack(brief, 30), attack(attack(attack(brief, 9), 20), 30)
    assert same_verdicts(at_once, in_rounds)
    for key in ("subset", "after", "broken_by"):
        assert at_once.record[key] == in_rounds.record[key]
    complete = attack(brief, None)
    assert same_verdicts(attack(in_rounds, None), complete)
    assert attack(in_rounds, None).record["after"] == complete.record["after"]
    assert "subset" not in complete.record
    assert "masking_check" in complete.record


def test_without_an_earlier_evaluation_the_others_keep_their_clean_verdicts(model, data):
    threats = [LINF, L2]
    complete = evaluate(model, data, threats, **FIVE_STEPS)
    part = evaluate(model, data, threats, subset=20, **FIVE_STEPS)
    rows = attacked_rows(data.ids, part.record)
    assert int(rows.sum()) == 20
    masks, full = part.hits(), complete.hits()
    for name in (str(LINF), str(L2), "union"):
        assert torch.equal(masks[name][rows], full[name][rows])
        assert torch.equal(masks[name][~rows], masks["clean"][~rows])
        kept = float(full[name][rows].sum() / full["clean"][rows].sum())
        estimate = part.accuracy[name].value
        assert estimate == pytest.approx(kept * part.accuracy["clean"].value)
    finished = evaluate(model, data, threats, after=part, **FIVE_STEPS)
    assert same_verdicts(finished, complete)
    for key in ("broken_by", "masking_check"):
        assert finished.record[key] == complete.record[key]
    for threat, counts in complete.record["certificate"].items():
        for key in ("points", "outside"):
            assert finished.record["certificate"][threat][key] == counts[key]
    assert "after" not in finished.record
    assert "subset" not in finished.record


def test_an_estimate_is_stored(model, data, brief, tmp_path):
    part = evaluate(model, data, [LINF, L2], after=brief, subset=9, **FIVE_STEPS)
    loaded = Evaluation.load(part.save(tmp_path / "e.json"))
    assert loaded.accuracy[LINF] == part.accuracy[LINF]
    assert Accuracy.from_json(part.accuracy[LINF].to_json()) == part.accuracy[LINF]


def test_a_subset_that_cannot_be_attacked_is_refused(model, data, brief):
    part = evaluate(model, data, [LINF, L2], after=brief, subset=9, **FIVE_STEPS)
    for request, message in (
        ({"subset": 0, "after": brief}, rf"subset: got 0, expected 1 to {N - 1} of {N}"),
        ({"subset": N, "after": brief}, rf"subset: got {N}, expected 1 to {N - 1} of {N}"),
        ({"subset": 9, "after": part}, "subset: got 9 after 9 samples; expected more"),
        ({"subset": 12, "after": part, "steps": 9}, "subset: got 12 after 9 samples"),
        ({"subset": 9, "after": brief, "attack": one_step}, "attacks each sample by itself"),
    ):
        with pytest.raises(RequestError, match=message):
            evaluate(model, data, [LINF, L2], **(FIVE_STEPS | request))
    with pytest.raises(RequestError, match="under the same threats"):
        evaluate(model, data, [LINF], after=brief, subset=9, **FIVE_STEPS)


def one_step(model, x, y, threat, *, seed):
    return x
