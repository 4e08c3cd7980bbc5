"""How weights are moved: each option of SGD against torch's own or a formula by hand, the average, the schedules."""

import copy
import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustsoup.attacks import apgd_train
from robustsoup.data import batches, load_data
from robustsoup.errors import RequestError
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.settings import TrainSettings
from robustsoup.threats import ThreatModel
from robustsoup.training.adversarial_loss import measure_robust_loss
from robustsoup.training.optimizer import (
    WeightAverage,
    clip_gradients,
    make_optimizer,
    norm_parameters,
)
from robustsoup.training.schedules import learning_rate
from robustsoup.training.train import train

DIGITS = load_data("digits")
DATA, VAL = DIGITS.train.first(96), DIGITS.val.first(64)
LINF = ThreatModel("Linf", 32 / 255)
ALL = {
    "label_smoothing": 0.1,
    "weight_decay": 0.01,
    "weight_decay_bn": False,
    "nesterov": True,
    "clip_grad": 0.5,
    "bn_momentum": 0.3,
    "ema": 0.9,
    "schedule": "one-cycle",
}


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


# schedules


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(1, 40),
    st.floats(1e-3, 1),
    st.sampled_from([None, 0.025, 0.1, 0.5]),
)
def test_one_cycle_is_torchs_step_by_step(epochs, per_epoch, lr, share):
    steps, share_of = epochs * per_epoch, share or 0.25
    if share_of * steps <= 1:
        return  # torch divides by zero or rises in no step
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=lr,
        pct_start=share_of,
        steps_per_epoch=per_epoch,
        epochs=epochs,
        cycle_momentum=False,
    )
    schedule = "one-cycle" if share is None else f"one-cycle {share}"
    for step in range(steps):
        ours = learning_rate(schedule, lr, step / per_epoch, epochs, per_epoch)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        if step + 1 < steps:
            theirs.step()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_one_cycle_of_a_few_steps_has_rates(steps):
    rates = [learning_rate("one-cycle", 0.4, step, steps, 1) for step in range(steps)]
    assert all(0 < r <= 0.4 for r in rates)
    assert max(rates) == pytest.approx(0.4, rel=0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.floats(1e-3, 1))
def test_cyclic_is_the_triangle_of_wong_et_al(epochs, per_epoch, lr):
    for step in range(0, epochs * per_epoch, 3):
        at = (step + 1) / per_epoch
        wanted = numpy.interp(at, [0, 0.4 * epochs, epochs], [0, lr, 0])
        assert learning_rate("cyclic", lr, step / per_epoch, epochs, per_epoch) == pytest.approx(
            wanted, abs=1e-9
        )


@pytest.mark.parametrize(
    "schedule", ["one-cycle x", "one-cycle 0", "one-cycle 1", "onecycle", "cyclic 0.4"]
)
def test_wrong_schedules_are_refused(schedule):
    with pytest.raises(RequestError, match=r"schedule: got .*one-cycle"):
        trained(schedule=schedule)


# SGD


def test_decay_leaves_batchnorm_alone_if_told_to():
    model = fresh()
    norms = {
        id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    }
    assert norms
    assert {id(p) for p in norm_parameters(model)} == norms
    for everything in (True, False):
        optimizer = make_optimizer(
            model, TrainSettings(lr=0.1, weight_decay=0.1, weight_decay_bn=everything)
        )
        decay = {
            id(p): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert set(decay) == {id(p) for p in model.parameters()}
        assert all(
            value == (0.1 if everything or key not in norms else 0.0)
            for key, value in decay.items()
        )
    # at a gradient of zero decay alone moves weights
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (1.0 if id(p) in norms else 0.99)), name


def test_two_steps_with_everything_on_are_those_written_by_hand():
    data, start = DATA.first(32), fresh()  # an epoch of one step
    chosen = ALL | {"schedule": "constant"}
    got = trained(start, data, **chosen)
    live = copy.deepcopy(start)
    for module in live.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    norms = norm_parameters(live)
    groups = [
        {
            "params": [p for p in live.parameters() if (p in norms) == which],
            "weight_decay": 0.0 if which else 0.01,
        }
        for which in (False, True)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    average = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    for epoch in range(2):
        x, y, _ = next(iter(batches(data, 32, seed=0, epoch=epoch)))
        x_adv = apgd_train(live, x, y, LINF, steps=2)
        live.train()
        optimizer.zero_grad()
        F.cross_entropy(live(x_adv), y, label_smoothing=0.1).backward()
        assert nn.utils.clip_grad_norm_(live.parameters(), 0.5) > 0.5  # else nothing was shown
        optimizer.step()
        d = min(0.9, (1 + epoch) / (10 + epoch))
        for name, tensor in live.state_dict().items():
            average[name] = (
                d * average[name] + (1 - d) * tensor
                if tensor.is_floating_point()
                else tensor.clone()
            )
    for name, tensor in average.items():
        assert torch.allclose(got.tensors[name], tensor, rtol=1e-3, atol=1e-5), name
    assert all(got.provenance["training"][key] == value for key, value in chosen.items())


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
        trained(**wrong)
    assert "\n" not in str(caught.value)


def test_nesterov_requires_momentum():
    with pytest.raises(RequestError, match="nesterov: requires momentum above 0; got momentum 0"):
        trained(nesterov=True, momentum=0.0)


def test_the_record_holds_every_setting():
    record = trained(objective="mixed 0.40", early_stop={"steps": 3}, val=VAL, epochs=1).provenance
    names = [field.name for field in dataclasses.fields(TrainSettings)]
    assert list(record["training"]) == names
    assert record["training"]["objective"] == "mixed 0.4"
    assert record["training"]["early_stop"] == {"steps": 3, "samples": None}


# the average


@settings(max_examples=10, deadline=None)
@given(st.floats(0.01, 0.999), st.integers(0, 1000), st.integers(0, 10**6))
def test_the_average_is_its_recurrence_with_buffers_of_its_own(decay, first, seed):
    live = fresh(seed=seed % 7)
    average = WeightAverage(live, decay)
    wanted = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for step in range(first, first + 3):
        with torch.no_grad():
            for tensor in live.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.rand(tensor.shape, generator=generator))
                else:
                    tensor.add_(1)
        average.update(live, step)
        d = min(decay, (1 + step) / (10 + step))
        for name, tensor in live.state_dict().items():
            wanted[name] = (
                d * wanted[name] + (1 - d) * tensor
                if tensor.is_floating_point()
                else tensor.clone()
            )
    for name, tensor in average.model.state_dict().items():
        assert torch.allclose(tensor, wanted[name], rtol=1e-5, atol=1e-6), (
            name
        )  # weights of order 1, sums of 3 steps
    mine = {tensor.data_ptr() for tensor in average.model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in live.state_dict().values()}


def test_what_is_measured_kept_and_returned_is_the_average():
    got = trained(val=VAL, ema=0.9, epochs=3)
    plain = trained(val=VAL, epochs=3)
    assert [e["loss"] for e in got.provenance["history"]] == [
        e["loss"] for e in plain.provenance["history"]
    ]
    assert got.digest != plain.digest
    last = got.provenance["history"][-1]
    found = measure_robust_loss(got.network(), VAL, LINF, steps=10)
    assert found == pytest.approx((last["robust_loss"], last["robust_accuracy"]), rel=1e-4)
    stopped = trained(
        val=VAL, early_stop={"steps": 2}, ema=0.9, epochs=5, lr=0.6, schedule="constant"
    )
    best = stopped.provenance["history"][stopped.provenance["early_stopped_at"] - 1]
    assert measure_robust_loss(stopped.network(), VAL, LINF, steps=2)[0] == pytest.approx(
        best["robust_loss"], rel=1e-4
    )


# kill and resume, and checkpoints on the way


def stop_at(step):
    def on_progress(done, total, figures):
        if done == step:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.parametrize("kills", [[1], [2], [3], [4], [2, 5, 7], [9]])
def test_with_everything_on_a_killed_run_goes_on_bit_for_bit(monkeypatch, tmp_path, kills):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    chosen = ALL | {
        "objective": "trades",
        "val": VAL,
        "early_stop": {"steps": 2},
        "epochs": 3,
    }
    for step in kills:
        with pytest.raises(KeyboardInterrupt):
            trained(state_path=tmp_path / "s.pt", on_progress=stop_at(step), **chosen)
    resumed, whole = trained(state_path=tmp_path / "s.pt", **chosen), trained(**chosen)
    assert (resumed.digest, resumed.provenance) == (whole.digest, whole.provenance)


@pytest.mark.parametrize(
    "changed", [{key: value} for key, value in ALL.items() if key != "schedule"]
)
def test_a_state_of_other_settings_is_refused(tmp_path, changed):
    trained(weight_decay=0.1, state_path=tmp_path / "s.pt")
    with pytest.raises(RequestError, match="other settings"):
        trained(**({"weight_decay": 0.1} | changed), state_path=tmp_path / "s.pt")


@pytest.mark.parametrize(
    ("every", "epochs"), [(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5]), (5, [5]), (9, [5])]
)
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_checkpoints_on_the_way_are_those_of_their_epochs(every, epochs, ema):
    handed = {}
    got = trained(
        epochs=5,
        ema=ema,
        val=VAL,
        early_stop={"steps": 2},
        checkpoint_every=every,
        on_checkpoint=handed.__setitem__,
    )
    assert list(handed) == epochs
    for epoch, checkpoint in handed.items():
        assert checkpoint.provenance["epoch"] == epoch
        assert [entry["epoch"] for entry in checkpoint.provenance["history"]] == list(
            range(1, epoch + 1)
        )
        found = measure_robust_loss(checkpoint.network(), VAL, LINF, steps=2)[0]
        assert found == pytest.approx(checkpoint.provenance["history"][-1]["robust_loss"], rel=1e-4)
    alone = trained(epochs=5, ema=ema, val=VAL, early_stop={"steps": 2})
    assert (got.digest, got.provenance) == (alone.digest, alone.provenance)
    tuned = trained(handed[epochs[0]], epochs=1, lr=0.01)
    assert "epoch" not in tuned.provenance
    assert tuned.provenance["parents"][0]["digest"] == handed[epochs[0]].digest


@pytest.mark.parametrize("kills", [[1], [4], [6], [7], [10], [3, 6, 6, 9], [15]])
def test_a_resumed_run_hands_over_what_is_still_owed(monkeypatch, tmp_path, kills):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    handed, whole = [], {}
    chosen = {"epochs": 5, "checkpoint_every": 2, "ema": 0.5}
    trained(on_checkpoint=whole.__setitem__, **chosen)

    def take(epoch, checkpoint):
        handed.append(epoch)
        assert checkpoint.digest == whole[epoch].digest
        assert checkpoint.provenance == whole[epoch].provenance

    for step in kills:
        with pytest.raises(KeyboardInterrupt):
            trained(
                state_path=tmp_path / "s.pt",
                on_progress=stop_at(step),
                on_checkpoint=take,
                **chosen,
            )
    trained(state_path=tmp_path / "s.pt", on_checkpoint=take, **chosen)
    trained(state_path=tmp_path / "s.pt", on_checkpoint=take, **chosen)  # finished: nothing is owed
    assert handed == [2, 4, 5]


@pytest.mark.parametrize("owed", [2, 4, 5])
def test_a_checkpoint_that_could_not_be_taken_is_handed_over_again(tmp_path, owed):
    handed = []

    def fails(epoch, checkpoint):
        if epoch == owed:
            raise KeyboardInterrupt  # as a kill between the end of the epoch and the caller's own writing
        handed.append(epoch)

    chosen = {"epochs": 5, "checkpoint_every": 2, "state_path": tmp_path / "s.pt"}
    with pytest.raises(KeyboardInterrupt):
        trained(on_checkpoint=fails, **chosen)
    trained(on_checkpoint=lambda epoch, checkpoint: handed.append(epoch), **chosen)
    assert handed == [2, 4, 5]


def test_checkpoints_need_somebody_to_take_them():
    for wrong in (
        {"checkpoint_every": 2},
        {"on_checkpoint": print},
        {"checkpoint_every": 0, "on_checkpoint": print},
    ):
        with pytest.raises(RequestError, match=r"checkpoint_every: got .*expected both"):
            trained(**wrong)
