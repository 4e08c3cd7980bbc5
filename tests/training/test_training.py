"""Adversarial training: its steps by hand, schedules, early stopping, kills, and records."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from markers import thinned
from trained_seed import trained_seed
from training_helpers import (
    DATA,
    DIGITS,
    LINF,
    STEPS_PER_EPOCH,
    VAL,
    Killed,
    fresh_network,
    interrupt_at,
    kill_at,
    train_digits,
)

from robustsoup.attacks import apgd_train
from robustsoup.attacks.folding import fold_batchnorm
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import batches, load_data, to_float
from robustsoup.errors import CheckpointError, Diverged, ModelError, RequestError, ThreatError
from robustsoup.settings import TrainSettings
from robustsoup.threats import CLEAN
from robustsoup.training.adversarial_loss import measure_robust_loss, objective_loss
from robustsoup.training.objectives import mixed
from robustsoup.training.schedules import check_schedule, learning_rate
from robustsoup.training.train import train


def mixed_loss_by_hand(model, x, x_adv, y, weight):
    """Compute Eq. 1 and 2 of the paper with PyTorch's own functions."""
    model.train()
    if weight in (0, 1):
        return F.cross_entropy(model(x if weight else x_adv), y)
    clean, attacked = model(torch.cat([x, x_adv])).split(len(x))
    return weight * F.cross_entropy(clean, y) + (1 - weight) * F.cross_entropy(attacked, y)


# objectives


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0]), st.integers(0, 10**6))
def test_the_objective_is_computed_on_one_concatenated_batch(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    x, x_adv = torch.rand(2, 16, 1, 8, 8, generator=generator)
    y = torch.randint(10, (16,), generator=generator)
    model = fresh_network(seed=seed).eval()
    by_hand = copy.deepcopy(model)
    expected = mixed_loss_by_hand(by_hand, x, x_adv, y, weight)
    got = objective_loss(model, x, x_adv, y, mixed(weight), precision="float32")
    assert torch.allclose(got, expected, rtol=1e-6)
    for name, tensor in model.state_dict().items():  # BatchNorm saw both batches, once
        assert torch.allclose(tensor, by_hand.state_dict()[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(("objective", "weight"), [("ce", 0), ("mixed 0.4", 0.4), ("mixed 1", 1)])
def test_two_steps_equal_those_written_by_hand(objective, weight):
    data, start = DATA.first(32), fresh_network()  # an epoch of one step
    got = train_digits(start, data, objective=objective, weight_decay=0.01, schedule="cosine")
    by_hand = copy.deepcopy(start)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for epoch in range(2):
        x, y, _ = next(iter(batches(data, 32, seed=0, epoch=epoch)))
        x_adv = x if weight == 1 else apgd_train(by_hand, x, y, LINF, steps=2)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 2))
        optimizer.zero_grad()
        mixed_loss_by_hand(by_hand, x, x_adv, y, weight).backward()
        optimizer.step()
    for name, tensor in by_hand.state_dict().items():
        assert torch.allclose(got.tensors[name], tensor, rtol=1e-3, atol=1e-5), name
    assert all(not torch.equal(got.tensors[name], p) for name, p in start.named_parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_robust_loss_is_computed_in_float32_on_the_attacked_images(precision):
    data = DIGITS.train.first(512)
    network = train_digits(fresh_network(4), data, epochs=3, lr=0.2).network().eval()
    x = to_float(VAL.images).contiguous(memory_format=torch.channels_last)
    attacked_network = network if precision == "float32" else fold_batchnorm(network, x[:2])
    x_adv = apgd_train(attacked_network, x, VAL.labels, LINF, steps=5, precision=precision)
    with torch.no_grad():
        clean, attacked = (F.cross_entropy(network(points), VAL.labels) for points in (x, x_adv))
        correct = (network(x_adv).argmax(1) == VAL.labels).float().mean()
    loss, accuracy = measure_robust_loss(network, VAL, LINF, steps=5, precision=precision)
    assert loss == pytest.approx(float(attacked), rel=1e-6)
    assert accuracy == pytest.approx(float(correct))
    assert float(attacked) > float(clean)
    clean_loss, _ = measure_robust_loss(network, VAL, CLEAN, precision=precision)
    assert clean_loss == pytest.approx(float(clean), rel=1e-6)


# schedules


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-4, 10), st.integers(1, 200), st.floats(0, 1))
def test_cosine_falls_from_lr_to_zero(lr, epochs, share):
    assert learning_rate("cosine", lr, 0, epochs) == lr
    assert learning_rate("cosine", lr, epochs, epochs) == pytest.approx(0, abs=1e-12 * lr)
    assert learning_rate("cosine", lr, epochs / 2, epochs) == pytest.approx(lr / 2)
    later = min(share + 0.01, 1)
    assert learning_rate("cosine", lr, share * epochs, epochs) >= learning_rate(
        "cosine", lr, later * epochs, epochs
    )


def test_a_milestone_counts_from_the_start_of_its_epoch():
    schedule = {"milestones": [75, 113], "gamma": 0.1}
    epochs = [0, 74.99, 75, 112.99, 113, 150]
    assert [learning_rate(schedule, 0.1, e, 150) for e in epochs] == pytest.approx(
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


def test_a_milestone_changes_only_the_epochs_after_it():
    frozen_after_one = {"milestones": [1], "gamma": 1e-20}
    one = train_digits(epochs=1, schedule="constant", momentum=0.0)
    two = train_digits(epochs=2, schedule=frozen_after_one, momentum=0.0)
    assert torch.equal(two.tensors["linear.weight"], one.tensors["linear.weight"])
    with_momentum = train_digits(epochs=1, schedule="constant")
    assert not torch.equal(with_momentum.tensors["linear.weight"], two.tensors["linear.weight"])


# early stopping


def train_until_wrecked(**changes):
    """Train for five epochs, the last two with a rate that ruins the network; stop early."""
    wrecking = {"milestones": [3], "gamma": 1000.0}
    arguments = {"epochs": 5, "lr": 0.1, "momentum": 0.0, "schedule": wrecking}
    return train_digits(val=VAL, early_stop={"steps": 2}, **(arguments | changes))


@pytest.mark.parametrize("seed", [0, 1])
def test_early_stopping_returns_the_epoch_of_the_lowest_robust_loss(seed):
    stopped = train_until_wrecked(seed=seed)
    history = stopped.provenance["history"]
    losses = [entry["robust_loss"] for entry in history]
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5]
    best = losses.index(min(losses)) + 1
    assert best <= 3
    assert stopped.provenance["early_stopped_at"] == best
    measured = measure_robust_loss(stopped.network(), VAL, LINF, steps=2)
    entry = history[best - 1]
    assert measured == pytest.approx((entry["robust_loss"], entry["robust_accuracy"]), rel=1e-4)


def test_early_stopping_measures_on_the_first_samples_of_val():
    few = train_digits(val=VAL.first(20), early_stop={"steps": 2})
    first = train_digits(val=VAL, early_stop={"steps": 2, "samples": 20})
    assert few.provenance["history"] == first.provenance["history"]
    assert few.digest == first.digest


def test_early_stopping_returns_networks_that_load_by_their_version():
    class Versioned(torch.nn.Sequential):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            assert local_metadata["version"] == 1
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    network = Versioned(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    stopped = train_digits(network, epochs=1, val=VAL, early_stop={"steps": 2})
    stopped.load_into(network)
    assert torch.equal(network[1].weight, stopped.tensors["1.weight"])


def test_without_early_stopping_val_is_only_measured_on():
    measured, alone = train_digits(val=VAL), train_digits()
    assert measured.digest == alone.digest
    assert measured.provenance["early_stopped_at"] is None
    assert all("robust_loss" in entry for entry in measured.provenance["history"])
    assert all("robust_loss" not in entry for entry in alone.provenance["history"])


def test_early_stopping_requires_val():
    with pytest.raises(RequestError, match="early_stop: requires a validation split to measure on"):
        train_digits(early_stop=True)


def test_a_first_loss_that_is_not_finite_is_no_lowest_loss(monkeypatch):
    measured = iter([(math.nan, 0.1), (math.inf, 0.1), (1.0, 0.2), (2.0, 0.3)])
    monkeypatch.setattr(
        "robustsoup.training.train.measure_robust_loss", lambda *_, **__: next(measured)
    )
    stopped = train_digits(val=VAL, early_stop=True, epochs=4)
    assert stopped.provenance["early_stopped_at"] == 3


# kill and resume


@thinned("kills", [[2, 5, 5, 7], [1], [2], [3], [4], [8], [15]], one_in=3)
def test_a_killed_run_resumes_bit_for_bit(save_every_step, tmp_path, kills):
    path, seen = tmp_path / "state.pt", []
    for step in kills:
        with pytest.raises(Killed):
            train_until_wrecked(state_path=path, on_progress=kill_at(step))
    assert path.exists() == (kills[-1] > 1)
    resumed = train_until_wrecked(
        state_path=path, on_progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen == [(done, 15) for done in range(kills[-1], 16)]
    complete_run = train_until_wrecked()
    assert resumed.digest == complete_run.digest
    assert resumed.provenance == complete_run.provenance


@thinned("step", [1, 2, 3, 4, 8, 15], one_in=2)
def test_an_interrupted_run_saves_every_step_that_it_took(tmp_path, step):
    """It saves on the way out, however long ago it saved last."""
    path, seen = tmp_path / "state.pt", []
    with pytest.raises(KeyboardInterrupt):
        train_until_wrecked(state_path=path, on_progress=interrupt_at(step))
    resumed = train_until_wrecked(state_path=path, on_progress=lambda done, *_: seen.append(done))
    assert seen == list(range(step + 1, 16))
    complete_run = train_until_wrecked()
    assert (resumed.digest, resumed.provenance) == (complete_run.digest, complete_run.provenance)


def test_the_state_is_saved_after_every_epoch(tmp_path):
    path, times = tmp_path / "state.pt", []
    train_digits(
        epochs=3,
        state_path=path,
        on_progress=lambda done, *_: times.append(path.exists() and path.stat().st_mtime_ns),
    )
    assert times[:STEPS_PER_EPOCH] == [False] * STEPS_PER_EPOCH
    assert all(times[STEPS_PER_EPOCH:])
    assert times[STEPS_PER_EPOCH] < times[-1]


def test_a_finished_run_takes_no_more_steps(tmp_path):
    path, seen = tmp_path / "state.pt", []
    complete_run = train_digits(state_path=path)
    repeated = train_digits(state_path=path, on_progress=lambda *event: seen.append(event))
    assert (seen, repeated.digest, repeated.provenance) == (
        [],
        complete_run.digest,
        complete_run.provenance,
    )


def frozen_network():
    """Return the network of `train_digits` with its first weight frozen."""
    network = fresh_network()
    next(network.parameters()).requires_grad_(False)
    return network


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.2},
        {"threat": "clean"},
        {"seed": 9},
        {"epochs": 3},
        {"objective": "mixed 0.5"},
        {"attack_steps": 3},
        {"schedule": "constant"},
        {"network": fresh_network(seed=1)},
        {"network": frozen_network()},
        {"data": load_data("digits", seed=1).train.first(96)},
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, changes):
    path = tmp_path / "state.pt"
    train_digits(state_path=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.pt.*other settings.*delete it"):
        train_digits(state_path=path, **changes)
    assert path.read_bytes() == before


def test_a_broken_state_is_named_and_not_deleted(tmp_path):
    path = tmp_path / "state.pt"
    train_digits(state_path=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"state\.pt.*cannot be read.*delete it") as caught:
        train_digits(state_path=path)
    assert "\n" not in str(caught.value)
    assert path.stat().st_size == 100


# inputs and results


def test_training_takes_settings_or_single_ones_by_name():
    chosen = TrainSettings(
        threat=LINF, epochs=1, batch_size=32, lr=0.1, seed=trained_seed(), precision="float32"
    )
    by_object = train(fresh_network(), DATA, chosen, device="cpu")
    assert by_object.digest == train_digits(epochs=1).digest
    changed = train(fresh_network(), DATA, chosen, epochs=2, device="cpu")
    assert changed.digest == train_digits(epochs=2).digest
    with pytest.raises(RequestError, match='unknown setting "learning_rate"'):
        train(fresh_network(), DATA, chosen, learning_rate=0.1)


def test_training_does_not_change_its_network():
    start = fresh_network()
    start.prep.eval()
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    modes = [module.training for module in start.modules()]
    generator = torch.random.get_rng_state()
    train_digits(start)
    assert torch.equal(generator, torch.random.get_rng_state())
    assert modes == [module.training for module in start.modules()]
    assert all(p.grad is None and p.requires_grad for p in start.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_the_seed_determines_the_result():
    first = train_digits(seed=1)
    assert first.digest == train_digits(seed=1).digest
    assert first.digest != train_digits(seed=2).digest


def test_the_record_holds_the_data_and_the_settings():
    record = train_digits(objective="mixed 0.4", seed=3).provenance
    assert record["data"] == DIGITS.record
    assert record["trained_on"] == ["train"]
    assert record["parents"] == []
    assert record["network"]["spec"] == "resnet9:width=2"
    assert record["seed"] == record["training"]["seed"] == 3
    expected = {
        "threat": "Linf 32/255",
        "objective": "mixed 0.4",
        "epochs": 2,
        "lr": 0.1,
        "attack_steps": 2,
    }
    assert expected.items() <= record["training"].items()
    assert [entry["epoch"] for entry in record["history"]] == [1, 2]


@pytest.mark.parametrize("start_from", ["checkpoint", "path"])
def test_fine_tuning_records_its_parent_and_all_its_splits(tmp_path, start_from):
    base = train_digits(data=VAL)
    path = base.save(tmp_path / "base.safetensors")
    start = Checkpoint.load(path) if start_from == "checkpoint" else path
    tuned = train_digits(start, lr=0.01)
    assert tuned.provenance["parents"] == [{"digest": base.digest, "file": "base.safetensors"}]
    assert tuned.provenance["trained_on"] == ["train", "val"]
    assert tuned.provenance["network"] == base.provenance["network"]
    assert tuned.digest == train_digits(base.network(), lr=0.01).digest != base.digest
    assert Checkpoint.load(path).digest == base.digest
    loaded = Checkpoint.load(tuned.save(tmp_path / "tuned.safetensors"))
    assert (loaded.digest, loaded.provenance) == (tuned.digest, tuned.provenance)


def test_fine_tuning_a_soup_drops_the_record_of_its_mixing():
    mixing = {"coefficients": [0.5, 0.5], "learned": {"x": 1}, "buffers": {"policy": "average"}}
    record = train_digits(train_digits().with_provenance(**mixing), lr=0.01).provenance
    assert not {"coefficients", "learned", "buffers"} & set(record)


def test_a_split_smaller_than_a_batch_is_one_step():
    seen = []
    train_digits(
        data=DATA.first(10), epochs=2, on_progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]


# what is refused


def test_an_absurd_learning_rate_diverges_with_an_error():
    with pytest.raises(Diverged, match=r"train: the loss became (nan|inf).*smaller lr"):
        train_digits(lr=1e30)


def test_a_network_with_other_classes_is_refused():
    with pytest.raises(ModelError, match=r"\(2, 7\).*expected 10 classes.*digits"):
        train_digits(fresh_network(classes=7))


def test_a_frozen_network_is_refused():
    with pytest.raises(ModelError, match="every parameter is frozen"):
        train_digits(fresh_network().requires_grad_(False))


def test_something_else_than_a_network_is_refused():
    with pytest.raises(RequestError, match="network: got int, expected"):
        train_digits(7)


def test_a_network_with_other_channels_is_refused():
    coloured = dataclasses.replace(DATA, images=DATA.images.repeat(1, 3, 1, 1))
    with pytest.raises(ModelError, match=r"does not take images of shape \(3, 8, 8\)") as caught:
        train_digits(data=coloured)
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
        {"precision": "int8"},
        {"device": "abacus"},
        {"attack_steps": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RequestError) as caught:
        train_digits(**wrong)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(next(iter(wrong)))


def test_a_negative_radius_is_refused():
    with pytest.raises(ThreatError, match="eps"):
        train_digits(threat="Linf -1/255")
