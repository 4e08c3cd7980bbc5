"""Training: the step is the objective's, early stopping keeps the best epoch, a kill changes no bit, records are kept."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from robustsoup.attacks import apgd_train
from robustsoup.attacks.folding import fold_batchnorm
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import batches, load_data, to_float
from robustsoup.errors import CheckpointError, Diverged, ModelError, RequestError
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.threats import CLEAN, ThreatModel
from robustsoup.training.adversarial_loss import measure_robust_loss, objective_loss
from robustsoup.training.objectives import mixed
from robustsoup.training.schedules import check_schedule, learning_rate
from robustsoup.training.train import train

DIGITS = load_data("digits")
DATA, VAL = DIGITS.train.first(96), DIGITS.val.first(64)
LINF = ThreatModel("Linf", 32 / 255)
PER_EPOCH = 3


def fresh(**options):
    return load_model("resnet9:width=2", channels=1, **options)


def trained(network=None, data=DATA, **changed):
    chosen = {
        "threat": LINF,
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.1,
        "device": "cpu",
        "precision": "float32",
    }
    return train(fresh() if network is None else network, data, **(chosen | changed))


def stop_at(step):
    def on_progress(done, total, figures):
        if done == step:
            raise KeyboardInterrupt

    return on_progress


def loss_by_hand(model, x, x_adv, y, weight):
    """Eq. 1 and 2 of the paper, in torch's own words."""
    model.train()
    if weight in (0, 1):
        return F.cross_entropy(model(x if weight else x_adv), y)
    logits = model(torch.cat([x, x_adv]))
    return weight * F.cross_entropy(logits[: len(x)], y) + (1 - weight) * F.cross_entropy(
        logits[len(x) :], y
    )


# objectives


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0]), st.integers(0, 10**6))
def test_the_objective_is_its_losses_on_one_concatenated_batch(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    x, x_adv = torch.rand(2, 16, 1, 8, 8, generator=generator)
    y = torch.randint(10, (16,), generator=generator)
    model = fresh(seed=seed).eval()
    by_hand = copy.deepcopy(model)
    expected = loss_by_hand(by_hand, x, x_adv, y, weight)
    got = objective_loss(model, x, x_adv, y, mixed(weight), "float32")
    assert torch.allclose(got, expected, rtol=1e-6)
    for name, tensor in model.state_dict().items():  # the running statistics saw both batches, once
        assert torch.allclose(tensor, by_hand.state_dict()[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(("objective", "weight"), [("ce", 0), ("mixed 0.4", 0.4), ("mixed 1", 1)])
def test_two_steps_are_those_written_by_hand(objective, weight):
    data, start = DATA.first(32), fresh()  # an epoch of one step
    got = trained(start, data, objective=objective, weight_decay=0.01, schedule="cosine")
    by_hand = copy.deepcopy(start)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for epoch in range(2):
        x, y, _ = next(iter(batches(data, 32, seed=0, epoch=epoch)))
        x_adv = x if weight == 1 else apgd_train(by_hand, x, y, LINF, steps=2)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 2))
        optimizer.zero_grad()
        loss_by_hand(by_hand, x, x_adv, y, weight).backward()
        optimizer.step()
    for name, tensor in by_hand.state_dict().items():
        assert torch.allclose(got.tensors[name], tensor, rtol=1e-3, atol=1e-5), name
    assert all(not torch.equal(got.tensors[name], p) for name, p in start.named_parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_robust_loss_is_float32s_on_the_points_of_the_attack(precision):
    start = load_model("resnet9:width=4", channels=1)
    network = trained(start, DIGITS.train.first(512), epochs=3, lr=0.2).network().eval()
    x = to_float(VAL.images).contiguous(memory_format=torch.channels_last)
    searched = network if precision == "float32" else fold_batchnorm(network, x[:2])
    x_adv = apgd_train(
        searched, x, VAL.labels, ThreatModel.parse(LINF), steps=5, precision=precision
    )
    with torch.no_grad():
        clean, attacked = (F.cross_entropy(network(points), VAL.labels) for points in (x, x_adv))
        right = (network(x_adv).argmax(1) == VAL.labels).float().mean()
    loss, accuracy = measure_robust_loss(
        network, VAL, ThreatModel.parse(LINF), steps=5, precision=precision
    )
    assert loss == pytest.approx(float(attacked), rel=1e-6)
    assert accuracy == pytest.approx(float(right))
    assert float(attacked) > float(clean) + 0.01
    assert measure_robust_loss(network, VAL, CLEAN, precision=precision)[0] == pytest.approx(
        float(clean), rel=1e-6
    )


def test_training_lowers_the_robust_loss():
    start = load_model("resnet9:width=4", channels=1)
    before = measure_robust_loss(start, VAL, LINF, steps=5)
    got = trained(start, DIGITS.train.first(512), epochs=6, lr=0.2)
    after = measure_robust_loss(got.network(), VAL, LINF, steps=5)
    assert after[0] < before[0] - 0.3
    assert after[1] > before[1] + 0.2


# schedules


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-4, 10), st.integers(1, 200), st.floats(0, 1))
def test_cosine_falls_from_lr_to_zero(lr, epochs, part):
    assert learning_rate("cosine", lr, 0, epochs) == lr
    assert learning_rate("cosine", lr, epochs, epochs) == pytest.approx(0, abs=1e-12 * lr)
    assert learning_rate("cosine", lr, epochs / 2, epochs) == pytest.approx(lr / 2)
    assert learning_rate("cosine", lr, part * epochs, epochs) >= learning_rate(
        "cosine", lr, min(part + 0.01, 1) * epochs, epochs
    )


def test_milestones_count_from_their_epoch_on():
    schedule = {"milestones": [75, 113], "gamma": 0.1}
    at = [0, 74.99, 75, 112.99, 113, 150]
    assert [learning_rate(schedule, 0.1, e, 150) for e in at] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    assert learning_rate("constant", 0.1, 149.9, 150) == 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        "linear",
        "",
        {"milestones": [1]},
        {"milestones": [1], "gamma": 1, "x": 2},
        None,
        3,
        {"milestones": 5, "gamma": 0.1},
        {"milestones": ["5"], "gamma": 0.1},
        {"milestones": [5], "gamma": "0.1"},
    ],
)
def test_other_schedules_are_refused(schedule):
    with pytest.raises(RequestError, match=r"schedule: got .*cosine.*milestones"):
        check_schedule(schedule)


def test_a_milestone_at_the_start_of_an_epoch_changes_the_rest_alone():
    falling = {"milestones": [1], "gamma": 1e-20}  # the second epoch moves nothing
    one = trained(epochs=1, schedule="constant")
    two = trained(epochs=2, schedule=falling, momentum=0.0)
    assert torch.equal(
        two.tensors["linear.weight"],
        trained(epochs=1, schedule="constant", momentum=0.0).tensors["linear.weight"],
    )
    assert not torch.equal(one.tensors["linear.weight"], two.tensors["linear.weight"])


# early stopping


def early(**changed):
    return trained(
        val=VAL,
        early_stop={"steps": 2},
        **({"epochs": 5, "lr": 0.6, "schedule": "constant"} | changed),
    )


def test_early_stopping_keeps_the_epoch_of_least_robust_loss():
    best_before_last = 0
    for seed in range(4):
        got = early(seed=seed)
        history = got.provenance["history"]
        losses = [entry["robust_loss"] for entry in history]
        assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5]
        assert got.provenance["early_stopped_at"] == losses.index(min(losses)) + 1
        loss, accuracy = measure_robust_loss(got.network(), VAL, LINF, steps=2)
        entry = history[got.provenance["early_stopped_at"] - 1]
        assert (loss, accuracy) == pytest.approx(
            (entry["robust_loss"], entry["robust_accuracy"]), rel=1e-4
        )
        best_before_last += losses.index(min(losses)) < 4
    assert best_before_last > 0


def test_without_early_stopping_the_last_epoch_is_kept_and_val_only_watched():
    watched, alone = trained(val=VAL), trained()
    assert watched.digest == alone.digest
    assert watched.provenance["early_stopped_at"] is None
    assert all("robust_loss" in entry for entry in watched.provenance["history"])
    assert all("robust_loss" not in entry for entry in alone.provenance["history"])


def test_early_stopping_needs_something_to_watch():
    with pytest.raises(RequestError, match="give val"):
        trained(early_stop=True)


# kill and resume


@pytest.mark.parametrize("kills", [[1], [2], [3], [4], [8], [2, 5, 5, 7], [15]])
def test_a_killed_run_goes_on_bit_for_bit(monkeypatch, tmp_path, kills):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    path, seen = tmp_path / "state.pt", []
    for step in kills:
        with pytest.raises(KeyboardInterrupt):
            early(state_path=path, on_progress=stop_at(step))
    assert path.exists() == (kills[-1] > 1)
    resumed = early(state_path=path, on_progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(done, 15) for done in range(kills[-1], 16)]
    whole = early()
    assert resumed.digest == whole.digest
    assert resumed.provenance == whole.provenance


def test_a_state_is_kept_only_now_and_then_but_after_every_epoch(tmp_path):
    path, kept = tmp_path / "state.pt", []
    trained(
        epochs=3,
        state_path=path,
        on_progress=lambda done, *_: kept.append(path.exists() and path.stat().st_mtime_ns),
    )
    assert kept[:PER_EPOCH] == [False] * PER_EPOCH
    assert len(set(kept[PER_EPOCH:])) == 2


def test_a_finished_run_is_not_done_again(tmp_path):
    path, seen = tmp_path / "state.pt", []
    whole = trained(state_path=path)
    again = trained(state_path=path, on_progress=lambda *now: seen.append(now))
    assert (seen, again.digest, again.provenance) == ([], whole.digest, whole.provenance)


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 0.2},
        {"threat": "clean"},
        {"seed": 9},
        {"epochs": 3},
        {"objective": "mixed 0.5"},
        {"attack_steps": 3},
        {"schedule": "constant"},
        {"network": fresh(seed=1)},
        {"data": load_data("digits", seed=1).train.first(96)},
    ],
)
def test_a_state_of_other_work_is_refused(tmp_path, changed):
    path = tmp_path / "state.pt"
    trained(state_path=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.pt.*other settings.*delete it"):
        trained(state_path=path, **changed)
    assert path.read_bytes() == before


def test_a_broken_state_is_named_and_kept(tmp_path):
    path = tmp_path / "state.pt"
    trained(state_path=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"state\.pt.*cannot be read.*delete it") as caught:
        trained(state_path=path)
    assert "\n" not in str(caught.value)
    assert path.stat().st_size == 100


# what goes in and what comes out


def test_the_network_that_is_given_is_not_changed():
    start = fresh()
    start.prep.eval()
    start.linear.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    modes = [module.training for module in start.modules()]
    generator = torch.random.get_rng_state()
    trained(start)
    assert torch.equal(generator, torch.random.get_rng_state())
    assert modes == [module.training for module in start.modules()]
    assert all(p.grad is None and p.requires_grad for p in start.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_the_seed_decides():
    first = trained(seed=1)
    assert first.digest == trained(seed=1).digest
    assert first.digest != trained(seed=2).digest


def test_the_record_says_what_it_was_fitted_on_and_how():
    record = trained(objective="mixed 0.4", seed=3).provenance
    assert record["data"] == DIGITS.record
    assert record["trained_on"] == ["train"]
    assert record["parents"] == []
    assert record["network"]["spec"] == "resnet9:width=2"
    assert record["seed"] == record["training"]["seed"] == 3
    asked = {
        "threat": "Linf 32/255",
        "objective": "mixed 0.4",
        "epochs": 2,
        "lr": 0.1,
        "attack_steps": 2,
    }
    assert asked.items() <= record["training"].items()
    assert [entry["epoch"] for entry in record["history"]] == [1, 2]


@pytest.mark.parametrize("given_as", ["checkpoint", "path"])
def test_fine_tuning_records_its_parent_and_all_splits_it_saw(tmp_path, given_as):
    base = trained(data=VAL)
    path = base.save(tmp_path / "base.safetensors")
    start = Checkpoint.load(path) if given_as == "checkpoint" else path
    tuned = trained(start, lr=0.01)
    assert tuned.provenance["parents"] == [{"digest": base.digest, "file": "base.safetensors"}]
    assert tuned.provenance["trained_on"] == ["train", "val"]
    assert tuned.provenance["network"] == base.provenance["network"]
    assert tuned.digest == trained(base.network(), lr=0.01).digest != base.digest
    assert Checkpoint.load(path).digest == base.digest
    read = Checkpoint.load(tuned.save(tmp_path / "tuned.safetensors"))
    assert (read.digest, read.provenance) == (tuned.digest, tuned.provenance)


def test_a_soups_history_is_not_passed_on():
    soup = trained().with_provenance(
        coefficients=[0.5, 0.5], learned={"x": 1}, buffers={"policy": "average"}
    )
    record = trained(soup, lr=0.01).provenance
    assert not {"coefficients", "learned", "buffers"} & set(record)


def test_a_split_smaller_than_a_batch_is_one_step():
    seen = []
    trained(
        data=DATA.first(10), epochs=2, on_progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]


# what is refused


def test_an_absurd_rate_diverges_with_an_error():
    with pytest.raises(Diverged, match=r"train: the loss became (nan|inf).*smaller lr"):
        trained(lr=1e30)


def test_a_network_of_other_classes_is_an_error():
    with pytest.raises(ModelError, match=r"\(2, 7\).*expected 10 classes.*digits"):
        trained(fresh(classes=7))


def test_a_frozen_network_is_refused():
    with pytest.raises(ModelError, match="every parameter is frozen"):
        trained(fresh().requires_grad_(False))


def test_a_network_of_other_channels_is_an_error():
    coloured = dataclasses.replace(DATA, images=DATA.images.repeat(1, 3, 1, 1))
    with pytest.raises(ModelError, match=r"does not take images of shape \(3, 8, 8\)") as caught:
        trained(data=coloured)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"schedule": "linear"},
        {"objective": "trade"},
        {"threat": "Linf -1/255"},
        {"precision": "int8"},
        {"device": "abacus"},
        {"attack_steps": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RequestError) as caught:
        trained(**wrong)
    assert "\n" not in str(caught.value)
    assert next(iter(wrong)).split("_")[0] in str(caught.value) or "eps" in str(caught.value)
