"""On a GPU: what the CPU finds but for rounding, and no waiting for the device within a window of steps."""

import pytest
import torch
from digits import check_inside, digits_network
from torch import nn

from robustsoup.attacks import Settings, apgd_train, run_attack
from robustsoup.attacks.engine import Job, Outcome, _captured, _Lane
from robustsoup.attacks.forward import frozen_eval, predict
from robustsoup.attacks.losses import LOSSES, ce
from robustsoup.attacks.projections import norms
from robustsoup.attacks.steps import Schedule
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data, to_float
from robustsoup.diagnosis.landscape import landscape
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.mixing import mix
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = needs_gpu

GPU = "cuda"
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
    assert (
        int((here.broken ^ there.broken.cpu()).sum())
        <= (0.02 if precision == "float32" else 0.05) * N
    )


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
    monkeypatch.setattr("robustsoup.attacks.engine._captured", lambda step, state: step)
    plain = run_attack(model, x, y, threat, Settings(steps=20))
    assert torch.equal(captured.broken, plain.broken)
    torch.testing.assert_close(captured.x_adv, plain.x_adv, rtol=0, atol=1e-6)


def lane_of(model, x, y, threat, loss="ce", steps=20):
    schedule = Schedule.of(threat, steps)
    samples = list(range(len(x)))
    job = Job(
        model,
        lambda at: x[at.to(x.device)],
        y.cpu(),
        torch.arange(len(x)),
        samples,
        Settings(loss=loss).attempts(10)[0],
        0,
        1,
        schedule,
        Outcome.blank(len(x)),
        seed=0,
        rows=64,
        precision="float32",
        eot=1,
        targets=(y.cpu() + 1) % 10 if loss == "targeted dlr" else None,
        device=x.device,
    )
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
        evaluate(trained[0], data, THREATS, steps=20, precision=precision, device=device)
        for device in ("cpu", "cuda")
    )
    assert (here.record["device"], there.record["device"]) == ("cpu", "cuda")
    for name, verdicts in there.threats.items():
        assert (
            int((verdicts.robust ^ here.threats[name].robust).sum())
            <= (0.02 if precision == "float32" else 0.05) * N
        )
        assert there.record["certificate"][name]["outside"] == 0
    resumed = evaluate(
        trained[0], data, THREATS, steps=20, precision=precision, device="cuda", after=there
    )
    assert resumed.accuracy == there.accuracy


# training, learning, planes: a few steps in float32, before rounding has grown


DATA = load_data("digits")
FEW = {"threat": "Linf 16/255", "batch_size": 64, "precision": "float32", "seed": 0}


@pytest.fixture(scope="module")
def start(trained):
    """The small network as a checkpoint."""
    return Checkpoint.of(trained[0])


@pytest.fixture(scope="module")
def three(start):
    """Checkpoints that were fine-tuned apart, on the CPU."""
    few = DATA.train.first(512)
    return [
        train(start, few, **{**FEW, "threat": f"Linf {eps}/255"}, epochs=2, lr=0.02, device="cpu")
        for eps in (0, 16, 64)
    ]


def check_near(here, there, within=1e-3):
    assert here.tensors.keys() == there.tensors.keys()
    for name, tensor in there.tensors.items():
        assert tensor.device.type == "cpu"
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, here.tensors[name], rtol=within, atol=within)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"objective": "mixed 0.4"},
        {"objective": "trades 6"},
        {"threat": "clean"},
        {"threat": "L2 0.5"},
        {
            "ema": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "weight_decay_bn": False,
            "clip_grad": 1.0,
            "label_smoothing": 0.1,
        },
    ],
    ids=str,
)
def test_training_takes_the_cpus_steps(start, more):
    settings, few = {**FEW, "epochs": 1, "lr": 0.01, **more}, DATA.train.first(256)
    here, there = (train(start, few, **settings, device=device) for device in ("cpu", GPU))
    check_near(here, there)
    assert there.provenance["versions"]["device"] == GPU


@by_precision
def test_training_there_lowers_the_robust_loss(start, precision):
    settings = FEW | {"precision": precision, "threat": "Linf 64/255"}
    got = train(
        start, DATA.train.first(512), **settings, epochs=4, lr=0.05, val=DATA.val, device=GPU
    )
    assert (
        got.provenance["history"][-1]["robust_loss"] < got.provenance["history"][0]["robust_loss"]
    )


@pytest.mark.parametrize("work", ["train", "learn"])
def test_what_is_stopped_there_goes_on(start, three, tmp_path, monkeypatch, work):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    few, settings = DATA.train.first(512), FEW | {"device": GPU, "epochs": 3}

    def do(**more):
        if work == "train":
            return train(start, few, **settings, lr=0.01, **more).tensors["linear.weight"]
        return learn(three, few, **settings, lr=1.0, **more).alpha

    def stop(done, total, figures):
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(state_path=tmp_path / "state.pt", on_progress=stop)
    seen = []
    resumed = do(
        state_path=tmp_path / "state.pt", on_progress=lambda done, total, figures: seen.append(done)
    )
    assert seen[0] == 13
    torch.testing.assert_close(resumed, do(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("place", ["device", "memory", "files"])
@pytest.mark.parametrize("granularity", ["parameter", "block", "model"])
def test_learning_takes_the_cpus_steps_wherever_the_ingredients_are(
    three, tmp_path, place, granularity
):
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for item, file in zip(three, files, strict=True):
        item.save(file)
    settings = FEW | {"epochs": 1, "lr": 1.0, "granularity": granularity}
    here = learn(files, DATA.train.first(512), **settings, device="cpu")
    there = learn(files, DATA.train.first(512), **settings, device=GPU, place=place)
    torch.testing.assert_close(there.alpha, here.alpha, rtol=0, atol=1e-3)
    check_near(mix(files, here), mix(files, there))


def test_a_dial_is_learned_there(three):
    settings = FEW | {"epochs": 1, "lr": 1.0}
    here, there = (
        learn_dial(three, DATA.train.first(512), **settings, device=device)
        for device in ("cpu", GPU)
    )
    torch.testing.assert_close(there.line, here.line, rtol=0, atol=1e-3)


@by_precision
def test_a_plane_is_the_cpus(three, precision):
    settings = {
        "threat": "Linf 32/255",
        "points": 2,
        "samples": 100,
        "calibrate_on": DATA.train,
        "precision": precision,
    }
    here, there = (
        landscape(three, DATA.test, **settings, device=device) for device in ("cpu", GPU)
    )
    for measure in ("loss", "clean_loss", "accuracy", "clean_accuracy"):
        wanted = torch.tensor(getattr(here, measure))
        torch.testing.assert_close(
            torch.tensor(getattr(there, measure)), wanted, rtol=0.02, atol=0.02
        )
