"""The engine on a GPU: the CPU's verdicts but for rounding, and no waiting for the device within a window of steps."""

import pytest
import torch
from digits import check_inside, digits_network
from torch import nn

from robustsoup.attacks import Settings, apgd_train, run_attack
from robustsoup.attacks.forward import frozen_eval, predict
from robustsoup.attacks.queue import Job, Outcome, _captured, _Lane
from robustsoup.attacks.rows import Schedule
from robustsoup.data import load_data, to_float
from robustsoup.evaluation import evaluate
from robustsoup.losses import LOSSES, ce
from robustsoup.models import load_model
from robustsoup.threats import ThreatModel, norms

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = needs_gpu

N = 200
THREATS = [ThreatModel("Linf", 0.07), ThreatModel("L2", 0.5), ThreatModel("L1", 1.0)]
by_threat = pytest.mark.parametrize("threat", THREATS, ids=str)
by_precision = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def trained():
    """A small network that tells the digits apart, and 200 of them, on the CPU."""
    data = load_data("digits")
    model = digits_network(8)
    return model, to_float(data.test.images[:N]), data.test.labels[:N]


@pytest.fixture
def on_gpu(trained):
    """The same on the GPU."""
    model, x, y = trained
    copied = load_model("resnet9:width=8", channels=1)
    copied.load_state_dict(model.state_dict())
    return copied.eval().requires_grad_(False).cuda(), x.cuda(), y.cuda()


def check_broken(model, result, x, y, threat, rows=500):
    with frozen_eval(model):
        logits = predict(model, lambda at: result.x_adv[at.to(x.device)], len(x), rows, x.device)
    assert torch.equal(result.broken.cpu(), logits.argmax(1) != y.cpu())
    check_inside(result.x_adv, x, threat)


@by_precision
@pytest.mark.parametrize("loss", LOSSES)
@by_threat
def test_verdicts_are_the_cpus_but_for_rounding(trained, on_gpu, threat, loss, precision):
    settings = Settings(steps=20, loss=loss, targets=2, restarts=2, precision=precision)
    here, there = run_attack(*trained, threat, settings), run_attack(*on_gpu, threat, settings)
    assert there.attempts == here.attempts
    check_broken(on_gpu[0], there, *on_gpu[1:], threat)
    assert 0 < int(there.broken.sum()) < N
    assert int((here.broken ^ there.broken.cpu()).sum()) <= (0.02 if precision == "float32" else 0.05) * N


@by_precision
@by_threat
def test_verdicts_do_not_depend_on_the_company(on_gpu, threat, precision):
    model, x, y = on_gpu
    settings, ids = Settings(steps=20, precision=precision), torch.arange(N) * 7
    whole = run_attack(model, x, y, threat, settings, ids=ids)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for rows in (order, *order.split(120)):
        at = rows.to(x.device)
        again = run_attack(model, x[at], y[at], threat, settings, ids=ids[rows])
        assert torch.equal(again.broken, whole.broken[rows])
        assert torch.equal(again.step, whole.step[rows])


@pytest.mark.parametrize("steps", [1, 7, 20, 97])
@by_threat
def test_a_window_of_steps_finds_what_single_steps_find(on_gpu, threat, steps, monkeypatch):
    model, x, y = on_gpu
    settings = Settings(steps=steps)
    windowed = run_attack(model, x, y, threat, settings)
    make = Job.__init__

    def one_by_one(self, *arguments, **more):
        make(self, *arguments, **more)
        self.window = 1

    monkeypatch.setattr(Job, "__init__", one_by_one)
    single = run_attack(model, x, y, threat, settings)
    assert torch.equal(windowed.broken, single.broken)
    assert torch.equal(windowed.step, single.step)
    assert torch.equal(windowed.x_adv, single.x_adv)


@by_threat
def test_a_captured_step_is_the_step(on_gpu, threat, monkeypatch):
    """As a CUDA graph or launch by launch: the same points."""
    model, x, y = on_gpu
    captured = run_attack(model, x, y, threat, Settings(steps=20))
    monkeypatch.setattr("robustsoup.attacks.queue._captured", lambda step, state: step)
    plain = run_attack(model, x, y, threat, Settings(steps=20))
    assert torch.equal(captured.broken, plain.broken)
    torch.testing.assert_close(captured.x_adv, plain.x_adv, rtol=0, atol=1e-6)


def lane_of(model, x, y, threat, loss="ce", steps=20):
    schedule = Schedule.of(threat, steps)
    samples = list(range(len(x)))
    job = Job(
        model, lambda at: x[at.to(x.device)], y.cpu(), torch.arange(len(x)), samples, Settings(loss=loss).attempts(10)[0], 0, 1,
        schedule, Outcome.blank(len(x)), seed=0, rows=64, precision="float32", eot=1,
        targets=(y.cpu() + 1) % 10 if loss == "targeted dlr" else None, device=x.device,
    )  # fmt: skip
    lane = _Lane(job)
    with torch.no_grad():
        lane._fill()
    return lane


@pytest.mark.parametrize("loss", LOSSES)
@by_threat
def test_a_step_does_not_wait_for_the_device(on_gpu, threat, loss):
    lane = lane_of(*on_gpu, threat, loss)
    with torch.no_grad():
        lane._step()  # libraries set themselves up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(lane.job.window):
                lane._step()
            with pytest.raises(RuntimeError, match="synchroniz"):
                bool(lane.found.any())  # the probe works
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert lane.job.window > 1


@by_threat
def test_a_step_can_be_captured_and_leaves_the_state_as_it_was(on_gpu, threat):
    lane = lane_of(*on_gpu, threat)
    state = [*lane.rows.tensors(), lane.found, lane.points, lane.found_step]
    with torch.no_grad():
        before = [tensor.clone() for tensor in state]
        replay = _captured(lane._step, state)
        assert replay != lane._step
        assert all(torch.equal(tensor, was) for tensor, was in zip(state, before, strict=True))
        replay()
        replayed = [tensor.clone() for tensor in state]
        for tensor, was in zip(state, before, strict=True):
            tensor.copy_(was)
        lane._step()
        for tensor, was in zip(state, replayed, strict=True):
            torch.testing.assert_close(tensor, was, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_network_that_cannot_be_captured_is_attacked_all_the_same(on_gpu):
    model, x, y = on_gpu

    class Asks(nn.Module):
        def forward(self, x):
            return model(x) * (1.0 if float(x.sum()) > -1 else 2.0)

    threat = THREATS[0]
    found = run_attack(Asks(), x, y, threat, Settings(steps=10))
    check_broken(model, found, x, y, threat)
    plain = run_attack(model, x, y, threat, Settings(steps=10))
    assert int((found.broken ^ plain.broken).sum()) <= 0.02 * N


@by_precision
@by_threat
def test_training_perturbs_as_on_the_cpu(trained, on_gpu, threat, precision):
    model, x, y = trained
    here = apgd_train(model, x, y, threat, precision=precision)
    there = apgd_train(*on_gpu, threat, precision=precision)
    assert there.device.type == "cuda"
    length = norms(there.cpu().double() - x.double(), threat.norm)
    assert float(length.max()) <= threat.eps + 1e-6 * max(1, threat.eps)
    with torch.no_grad():
        losses = [float(ce(model(point), y).mean()) for point in (x, here, there.cpu())]
    assert losses[2] - losses[0] >= 0.9 * (losses[1] - losses[0]) > 0


@by_precision
def test_evaluate_runs_where_the_device_is(trained, precision):
    data = load_data("digits").test.first(N)
    here, there = (
        evaluate(trained[0], data, THREATS, steps=20, precision=precision, device=device) for device in ("cpu", "cuda")
    )
    assert (here.record["device"], there.record["device"]) == ("cpu", "cuda")
    for name, verdicts in there.threats.items():
        assert (
            int((verdicts.robust ^ here.threats[name].robust).sum()) <= (0.02 if precision == "float32" else 0.05) * N
        )
        assert there.record["certificate"][name]["outside"] == 0
    resumed = evaluate(trained[0], data, THREATS, steps=20, precision=precision, device="cuda", after=there)
    assert resumed.accuracy == there.accuracy
