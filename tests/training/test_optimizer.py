"""SGD with each option against PyTorch or a formula by hand, schedules, and weight averages."""

import copy
import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from markers import thinned
from torch import nn
from training_helpers import (
    DATA,
    LINF,
    VAL,
    Killed,
    fresh_network,
    interrupt_at,
    kill_at,
    train_digits,
)

from robustsoup.attacks import apgd_train
from robustsoup.data import batches
from robustsoup.errors import RequestError
from robustsoup.settings import TrainSettings
from robustsoup.training.adversarial_loss import measure_robust_loss
from robustsoup.training.optimizer import (
    WeightAverage,
    clip_gradients,
    make_optimizer,
    norm_parameters,
)
from robustsoup.training.schedules import learning_rate

ALL_OPTIONS = {
    "label_smoothing": 0.1,
    "weight_decay": 0.01,
    "weight_decay_bn": False,
    "nesterov": True,
    "clip_grad": 0.05,
    "bn_momentum": 0.3,
    "ema": 0.9,
    "schedule": "one-cycle",
}


# schedules


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(1, 40),
    st.floats(1e-3, 1),
    st.sampled_from([None, 0.025, 0.1, 0.5]),
)
def test_one_cycle_equals_pytorchs_step_by_step(epochs, per_epoch, lr, share):
    steps, warm_up = epochs * per_epoch, share or 0.25
    if warm_up * steps <= 1:
        return  # PyTorch's divides by zero or rises in no step
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=lr,
        pct_start=warm_up,
        steps_per_epoch=per_epoch,
        epochs=epochs,
        cycle_momentum=False,
    )
    schedule = "one-cycle" if share is None else f"one-cycle {share}"
    for step in range(steps):
        rate = learning_rate(schedule, lr, step / per_epoch, epochs, per_epoch)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_one_cycle_works_for_a_few_steps(steps):
    rates = [learning_rate("one-cycle", 0.4, step, steps, 1) for step in range(steps)]
    assert all(0 < r <= 0.4 for r in rates)
    assert max(rates) == pytest.approx(0.4, rel=0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.floats(1e-3, 1))
def test_cyclic_equals_the_triangle_of_wong_et_al(epochs, per_epoch, lr):
    for step in range(0, epochs * per_epoch, 3):
        at = (step + 1) / per_epoch
        expected = numpy.interp(at, [0, 0.4 * epochs, epochs], [0, lr, 0])
        assert learning_rate("cyclic", lr, step / per_epoch, epochs, per_epoch) == pytest.approx(
            expected, abs=1e-9
        )


@pytest.mark.parametrize(
    "schedule", ["one-cycle x", "one-cycle 0", "one-cycle 1", "onecycle", "cyclic 0.4"]
)
def test_wrong_schedules_are_refused(schedule):
    with pytest.raises(RequestError, match=r"schedule: got .*one-cycle"):
        train_digits(schedule=schedule)


# SGD


def test_weight_decay_can_exempt_batchnorm():
    model = fresh_network()
    norms = {
        id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    }
    assert norms
    assert {id(p) for p in norm_parameters(model)} == norms
    for include_norms in (True, False):
        optimizer = make_optimizer(
            model, TrainSettings(lr=0.1, weight_decay=0.1, weight_decay_bn=include_norms)
        )
        decay = {
            id(p): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert set(decay) == {id(p) for p in model.parameters()}
        assert all(
            value == (0.1 if include_norms or key not in norms else 0.0)
            for key, value in decay.items()
        )
    # With zero gradients, only weight decay changes weights.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (1.0 if id(p) in norms else 0.99)), name


def test_two_steps_with_all_options_equal_those_written_by_hand():
    data, start = DATA.first(32), fresh_network()  # an epoch of one step
    options = ALL_OPTIONS | {"schedule": "constant"}
    got = train_digits(start, data, **options)
    network = copy.deepcopy(start)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    norms = norm_parameters(network)
    groups = [
        {
            "params": [p for p in network.parameters() if (p in norms) == which],
            "weight_decay": 0.0 if which else 0.01,
        }
        for which in (False, True)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    average = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for epoch in range(2):
        x, y, _ = next(iter(batches(data, 32, seed=0, epoch=epoch)))
        x_adv = apgd_train(network, x, y, LINF, steps=2)
        network.train()
        optimizer.zero_grad()
        F.cross_entropy(network(x_adv), y, label_smoothing=0.1).backward()
        assert nn.utils.clip_grad_norm_(network.parameters(), 0.05) > 0.05  # clipping takes effect
        optimizer.step()
        d = min(0.9, (1 + epoch) / (10 + epoch))
        for name, tensor in network.state_dict().items():
            average[name] = (
                d * average[name] + (1 - d) * tensor
                if tensor.is_floating_point()
                else tensor.clone()
            )
    for name, tensor in average.items():
        assert torch.allclose(got.tensors[name], tensor, rtol=1e-3, atol=1e-5), name
    assert all(got.provenance["training"][key] == value for key, value in options.items())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 5), st.floats(0.01, 100))
def test_clipping_bounds_the_norm_and_keeps_the_direction(seed, limit, size):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    clip_gradients(model, limit)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float(after.norm()) <= limit * (1 + 1e-5) or torch.equal(before, after)
    assert torch.allclose(after, before * min(1.0, limit / float(before.norm())), rtol=1e-4)
    clip_gradients(model, None)
    assert torch.equal(after, torch.cat([p.grad.flatten() for p in model.parameters()]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"ema": 1.0},
        {"ema": -0.5},
        {"ema": float("nan")},
        {"clip_grad": 0.0},
        {"clip_grad": -1.0},
        {"clip_grad": float("inf")},
        {"bn_momentum": 0.0},
        {"bn_momentum": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RequestError, match=rf"^{next(iter(wrong))}: got .*expected") as caught:
        train_digits(**wrong)
    assert "\n" not in str(caught.value)


def test_nesterov_requires_momentum():
    with pytest.raises(RequestError, match="nesterov: requires momentum above 0; got momentum 0"):
        train_digits(nesterov=True, momentum=0.0)


def test_the_record_holds_every_setting():
    record = train_digits(
        objective="mixed 0.40", early_stop={"steps": 3}, val=VAL, epochs=1
    ).provenance
    names = [field.name for field in dataclasses.fields(TrainSettings)]
    unset = {"also", "combine", "transform", "accumulate", "recompute_activations"}
    assert list(record["training"]) == [name for name in names if name not in unset]
    assert record["training"]["objective"] == "mixed 0.4"
    assert record["training"]["early_stop"] == {"steps": 3, "samples": None}


# the weight average


@settings(max_examples=10, deadline=None)
@given(st.floats(0.01, 0.999), st.integers(0, 1000), st.integers(0, 10**6))
def test_the_average_follows_its_recurrence_and_owns_its_buffers(decay, first, seed):
    network = fresh_network(seed=seed % 7)
    average = WeightAverage(network, decay)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for step in range(first, first + 3):
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.rand(tensor.shape, generator=generator))
                else:
                    tensor.add_(1)
        average.update(network, step)
        d = min(decay, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            expected[name] = (
                d * expected[name] + (1 - d) * tensor
                if tensor.is_floating_point()
                else tensor.clone()
            )
    for name, tensor in average.model.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6), (
            name
        )  # weights of order 1, sums of 3 steps
    own_memory = {tensor.data_ptr() for tensor in average.model.state_dict().values()}
    assert not own_memory & {tensor.data_ptr() for tensor in network.state_dict().values()}


def test_the_average_is_measured_saved_and_returned():
    got = train_digits(val=VAL, ema=0.9, epochs=3)
    plain = train_digits(val=VAL, epochs=3)
    assert [e["loss"] for e in got.provenance["history"]] == [
        e["loss"] for e in plain.provenance["history"]
    ]
    assert got.digest != plain.digest
    last = got.provenance["history"][-1]
    measured = measure_robust_loss(got.network(), VAL, LINF, steps=10)
    assert measured == pytest.approx((last["robust_loss"], last["robust_accuracy"]), rel=1e-4)
    stopped = train_digits(
        val=VAL, early_stop={"steps": 2}, ema=0.9, epochs=5, lr=0.6, schedule="constant"
    )
    best = stopped.provenance["history"][stopped.provenance["early_stopped_at"] - 1]
    assert measure_robust_loss(stopped.network(), VAL, LINF, steps=2)[0] == pytest.approx(
        best["robust_loss"], rel=1e-4
    )


# kill and resume, and checkpoints during training


@thinned("kills", [[2, 5, 7], [1], [2], [9], [3], [4]], one_in=3)
def test_a_killed_run_with_all_options_resumes_bit_for_bit(save_every_step, tmp_path, kills):
    arguments = ALL_OPTIONS | {
        "objective": "trades",
        "val": VAL,
        "early_stop": {"steps": 2},
        "epochs": 3,
    }
    for step in kills:
        with pytest.raises(KeyboardInterrupt):
            train_digits(state_path=tmp_path / "s.pt", on_progress=interrupt_at(step), **arguments)
    resumed, whole = (
        train_digits(state_path=tmp_path / "s.pt", **arguments),
        train_digits(**arguments),
    )
    assert (resumed.digest, resumed.provenance) == (whole.digest, whole.provenance)


@pytest.mark.parametrize(
    "changed", [{key: value} for key, value in ALL_OPTIONS.items() if key != "schedule"]
)
def test_the_state_of_other_settings_is_refused(tmp_path, changed):
    train_digits(weight_decay=0.1, state_path=tmp_path / "s.pt")
    with pytest.raises(RequestError, match="other settings"):
        train_digits(**({"weight_decay": 0.1} | changed), state_path=tmp_path / "s.pt")


@pytest.mark.parametrize(
    ("every", "epochs"), [(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5]), (5, [5]), (9, [5])]
)
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_checkpoints_during_training_belong_to_their_epochs(every, epochs, ema):
    received = {}
    got = train_digits(
        epochs=5,
        ema=ema,
        val=VAL,
        early_stop={"steps": 2},
        checkpoint_every=every,
        on_checkpoint=received.__setitem__,
    )
    assert list(received) == epochs
    for epoch, checkpoint in received.items():
        assert checkpoint.provenance["epoch"] == epoch
        assert [entry["epoch"] for entry in checkpoint.provenance["history"]] == list(
            range(1, epoch + 1)
        )
        measured = measure_robust_loss(checkpoint.network(), VAL, LINF, steps=2)[0]
        assert measured == pytest.approx(
            checkpoint.provenance["history"][-1]["robust_loss"], rel=1e-4
        )
    alone = train_digits(epochs=5, ema=ema, val=VAL, early_stop={"steps": 2})
    assert (got.digest, got.provenance) == (alone.digest, alone.provenance)
    tuned = train_digits(received[epochs[0]], epochs=1, lr=0.01)
    assert "epoch" not in tuned.provenance
    assert tuned.provenance["parents"][0]["digest"] == received[epochs[0]].digest


@thinned("kills", [[3, 6, 6, 9], [1], [4], [6], [7], [10], [15]], one_in=3)
def test_a_resumed_run_passes_each_checkpoint_once(save_every_step, tmp_path, kills):
    received, whole = [], {}
    arguments = {"epochs": 5, "checkpoint_every": 2, "ema": 0.5}
    train_digits(on_checkpoint=whole.__setitem__, **arguments)

    def take(epoch, checkpoint):
        received.append(epoch)
        assert checkpoint.digest == whole[epoch].digest
        assert checkpoint.provenance == whole[epoch].provenance

    for step in kills:
        with pytest.raises(Killed):
            train_digits(
                state_path=tmp_path / "s.pt",
                on_progress=kill_at(step),
                on_checkpoint=take,
                **arguments,
            )
    train_digits(state_path=tmp_path / "s.pt", on_checkpoint=take, **arguments)
    train_digits(
        state_path=tmp_path / "s.pt", on_checkpoint=take, **arguments
    )  # a finished run passes none
    assert received == [2, 4, 5]


@pytest.mark.parametrize("failing", [2, 4, 5])
def test_a_checkpoint_that_was_not_received_is_passed_again(tmp_path, failing):
    received = []

    def fail_at_epoch(epoch, checkpoint):
        if epoch == failing:
            raise KeyboardInterrupt  # as if killed before the caller wrote the checkpoint
        received.append(epoch)

    arguments = {"epochs": 5, "checkpoint_every": 2, "state_path": tmp_path / "s.pt"}
    with pytest.raises(KeyboardInterrupt):
        train_digits(on_checkpoint=fail_at_epoch, **arguments)
    train_digits(on_checkpoint=lambda epoch, checkpoint: received.append(epoch), **arguments)
    assert received == [2, 4, 5]


def test_checkpoint_every_requires_on_checkpoint():
    for wrong in (
        {"checkpoint_every": 2},
        {"on_checkpoint": print},
        {"checkpoint_every": 0, "on_checkpoint": print},
    ):
        with pytest.raises(RequestError, match=r"checkpoint_every: got .*expected both"):
            train_digits(**wrong)


def test_the_average_copies_the_vectors_of_spectral_norm_and_averages_complex_weights():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    model.phase = nn.Parameter(torch.tensor([1 + 1j]))
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.phase.mul_(-1)
        model(torch.ones(2, 4))
    average.update(model, 100)
    vectors = [name for name in model.state_dict() if name.endswith(("_u", "_v"))]
    assert len(vectors) == 2
    for name in vectors:
        assert torch.equal(average.model.state_dict()[name], model.state_dict()[name])
    assert average.model.phase.abs().item() < 1e-6
