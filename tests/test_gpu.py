"""On a GPU: the results of the CPU up to rounding, and steps that never wait for the device."""

import copy
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from digits import check_inside, digits_network
from torch import nn

from robustsoup.attacks import apgd_train, run_attack
from robustsoup.attacks.attempts import list_attempts
from robustsoup.attacks.cuda_graph import ReplayedCall, capture_step
from robustsoup.attacks.engine import DeviceRows, Search, begin_search, take_step
from robustsoup.attacks.forward import frozen_eval, input_gradient, predict_logits
from robustsoup.attacks.losses import ce
from robustsoup.attacks.outcome import AttackedSamples
from robustsoup.attacks.projections import norms
from robustsoup.attacks.steps import StepSchedule
from robustsoup.catalog import LOSSES
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data, to_float
from robustsoup.diagnosis.landscape import landscape
from robustsoup.errors import ModelError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.settings import AttackSettings
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.mixing import mix
from robustsoup.soups.subspace import train_subspace
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
    """A small network that classifies digits, and 200 digits, on the CPU."""
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


def check_broken(model, result, x, y, threat, size=500):
    """Broken is exactly what the network misclassifies in float32 at x_adv, inside the ball."""
    with frozen_eval(model):
        logits = predict_logits(model, lambda at: result.x_adv[at.cuda()], len(x), size, x.device)
    assert torch.equal(result.broken.cpu(), logits.argmax(1) != y.cpu())
    check_inside(result.x_adv, x, threat)


@by_precision
@pytest.mark.parametrize("loss", LOSSES)
@by_threat
def test_verdicts_equal_those_of_the_cpu_up_to_rounding(trained, on_gpu, threat, loss, precision):
    settings = AttackSettings(steps=20, loss=loss, targets=2, restarts=2, precision=precision)
    cpu, gpu = run_attack(*trained, threat, settings), run_attack(*on_gpu, threat, settings)
    assert gpu.attempts == cpu.attempts
    check_broken(on_gpu[0], gpu, *on_gpu[1:], threat)
    assert 0 < int(gpu.broken.sum()) < N
    different = int((cpu.broken ^ gpu.broken.cpu()).sum())
    assert different <= (0.02 if precision == "float32" else 0.05) * N


@by_precision
@by_threat
def test_verdicts_do_not_depend_on_other_samples(on_gpu, threat, precision):
    model, x, y = on_gpu
    settings, ids = AttackSettings(steps=20, precision=precision), torch.arange(N) * 7
    whole = run_attack(model, x, y, threat, settings, ids=ids)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for rows in (order, *order.split(120)):
        at = rows.to(x.device)
        part = run_attack(model, x[at], y[at], threat, settings, ids=ids[rows])
        assert torch.equal(part.broken, whole.broken[rows])
        assert torch.equal(part.step, whole.step[rows])


@by_precision
@by_threat
def test_the_same_attack_twice_gives_the_same_bits(on_gpu, threat, precision):
    settings = AttackSettings(steps=20, precision=precision)
    first, second = (run_attack(*on_gpu, threat, settings) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv)
    assert torch.equal(first.step, second.step)


@pytest.mark.parametrize("steps", [1, 7, 20, 97])
@by_threat
def test_a_window_of_steps_finds_what_single_steps_find(on_gpu, threat, steps, monkeypatch):
    model, x, y = on_gpu
    settings = AttackSettings(steps=steps)
    windowed = run_attack(model, x, y, threat, settings)
    monkeypatch.setattr("robustsoup.attacks.engine.MAX_WINDOW", 1)
    single = run_attack(model, x, y, threat, settings)
    assert torch.equal(windowed.broken, single.broken)
    assert torch.equal(windowed.step, single.step)
    torch.testing.assert_close(windowed.x_adv, single.x_adv, rtol=0, atol=1e-6)


# CUDA graphs


@by_precision
@by_threat
def test_a_captured_step_equals_the_step(on_gpu, threat, precision, monkeypatch):
    model, x, y = on_gpu
    settings = AttackSettings(steps=20, precision=precision)
    captured = run_attack(model, x, y, threat, settings)
    monkeypatch.setattr("robustsoup.attacks.engine.capture_step", lambda step, state, result: step)
    plain = run_attack(model, x, y, threat, settings)
    assert torch.equal(captured.broken, plain.broken)
    torch.testing.assert_close(captured.x_adv, plain.x_adv, rtol=0, atol=1e-6)


def step_of(model, x, y, threat, loss="ce", steps=20):
    """The search of the first 64 samples, its rows at their starting points, and its step."""
    with torch.no_grad():
        logits = model(x).cpu()
    samples = AttackedSamples(lambda at: x[at.to(x.device)], y.cpu(), torch.arange(len(x)), logits)
    search = Search(
        model=model,
        search_model=model,
        samples=samples,
        attempt=list_attempts(AttackSettings(loss=loss), 10)[0],
        index=0,
        attempts=1,
        schedule=StepSchedule.for_threat(threat, steps),
        seed=0,
        precision="float32",
        eot=1,
        pass_size=64,
        device=x.device,
    )
    with torch.no_grad():
        rows = DeviceRows.from_state(begin_search(search, torch.arange(64)).state)
    periods = search.schedule.check_periods().to(x.device)
    return search, rows, partial(take_step, search, rows, periods)


def capture(rows, step):
    return capture_step(step, rows.tensors(), rows.state.loss_best)


@pytest.mark.parametrize("loss", LOSSES)
@by_threat
def test_a_step_does_not_wait_for_the_device(on_gpu, threat, loss):
    search, rows, step = step_of(*on_gpu, threat, loss)
    assert search.window > 1
    with torch.no_grad():
        step()  # libraries initialise themselves
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(search.window):
                step()
            with pytest.raises(RuntimeError, match="synchroniz"):
                bool(rows.hit.any())  # the mode does detect a wait
        finally:
            torch.cuda.set_sync_debug_mode("default")


@by_threat
def test_capturing_a_step_restores_the_state(on_gpu, threat):
    _, rows, step = step_of(*on_gpu, threat)
    state = rows.tensors()
    with torch.no_grad():
        before = [tensor.clone() for tensor in state]
        replay = capture(rows, step)
        assert replay is not step
        assert all(torch.equal(tensor, value) for tensor, value in zip(state, before, strict=True))
        replay()
        replayed = [tensor.clone() for tensor in state]
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        step()
        for tensor, value in zip(state, replayed, strict=True):
            torch.testing.assert_close(tensor, value, rtol=1e-5, atol=1e-6, equal_nan=True)


class Synchronises(nn.Module):
    """A network that reads a value from the device in every pass, so it cannot be captured."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x) * (1.0 if float(x.detach().sum()) > -1 else 2.0)


class HostNoise(nn.Module):
    """A stochastic defence that draws a number on the host, which a graph would record once."""

    def __init__(self, network):
        super().__init__()
        self.network, self.random = network, random.Random(0)

    def forward(self, x):
        return self.network(x) * (1 + self.random.random())


class DeviceNoise(nn.Module):
    """A stochastic defence that draws its noise on the device, which a graph draws again."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x + 0.01 * torch.randn_like(x))


def test_a_network_that_synchronises_is_attacked_without_a_graph(on_gpu):
    model, x, y = on_gpu
    threat = THREATS[0]
    result = run_attack(Synchronises(model), x, y, threat, AttackSettings(steps=10))
    check_broken(model, result, x, y, threat)
    plain = run_attack(model, x, y, threat, AttackSettings(steps=10))
    assert int((result.broken ^ plain.broken).sum()) <= 0.02 * N


def test_a_failed_capture_leaves_stream_random_numbers_and_memory_as_they_were(on_gpu):
    model, x, y = on_gpu
    _, rows, step = step_of(Synchronises(model), x, y, THREATS[0])
    stream, state = torch.cuda.current_stream(), torch.cuda.get_rng_state()
    with torch.no_grad():
        before = [tensor.clone() for tensor in rows.tensors()]
        assert capture(rows, step) is step
        values = zip(rows.tensors(), before, strict=True)
        assert all(torch.equal(tensor, value) for tensor, value in values)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.rand(10, device=GPU).isfinite().all()  # the generator is not in capture mode
    _, rows, step = step_of(model, x, y, THREATS[0])
    with torch.no_grad():
        assert capture(rows, step) is not step  # a later capture succeeds
    torch.cuda.empty_cache()


def test_noise_of_the_host_is_not_frozen_into_a_graph(on_gpu):
    model, x, y = on_gpu
    for network, is_captured in ((HostNoise(model), False), (DeviceNoise(model), True)):
        _, rows, step = step_of(network, x, y, THREATS[0])
        with torch.no_grad():
            assert (capture(rows, step) is not step) == is_captured


def test_a_step_that_raises_leaves_the_state_as_it_was(on_gpu):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 2:
                raise ZeroDivisionError
            return model(x)

    model, x, y = on_gpu
    _, rows, step = step_of(model, x, y, THREATS[0])
    before = [tensor.clone() for tensor in rows.tensors()]
    search = replace(step.args[0], search_model=Fails())
    failing = partial(take_step, search, rows, step.args[2])
    with torch.no_grad(), pytest.raises(ModelError, match="ZeroDivisionError"):
        capture(rows, failing)
    values = zip(rows.tensors(), before, strict=True)
    assert all(torch.equal(tensor, value) for tensor, value in values)


def test_an_attack_runs_on_the_callers_stream(on_gpu):
    """Images that the caller's stream is still computing are attacked as they will be."""
    model, x, y = on_gpu
    settings = AttackSettings(steps=10)
    expected = run_attack(model, x, y, THREATS[0], settings)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)  # cycles of the device
        late.copy_(x)
        result = run_attack(model, late, y, THREATS[0], settings)
        assert torch.cuda.current_stream() == side
    side.synchronize()
    assert torch.equal(result.broken, expected.broken)
    torch.testing.assert_close(result.x_adv, expected.x_adv, rtol=0, atol=1e-6)


def test_a_float32_attack_ignores_the_callers_autocast(on_gpu):
    model, x, y = on_gpu
    expected = apgd_train(model, x, y, THREATS[1])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        torch.testing.assert_close(apgd_train(model, x, y, THREATS[1]), expected)
        logits, _, _ = input_gradient(model, x, y, ce, "float32")
    assert logits.dtype == torch.float32


def allow_tf32_by_old_flags():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def allow_tf32_by_operator():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def allow_tf32_everywhere():
    torch.backends.fp32_precision = "tf32"


HAS_OPERATOR_FLAGS = hasattr(torch.backends.cuda.matmul, "fp32_precision")
TF32_FLAGS = [
    allow_tf32_by_old_flags,
    *([allow_tf32_by_operator, allow_tf32_everywhere] if HAS_OPERATOR_FLAGS else []),
]


@pytest.fixture
def flags_of_pytorch():
    yield
    if HAS_OPERATOR_FLAGS:
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


class RecordsLogits(nn.Module):
    """A network with large products that records its inputs and logits."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 128, 3, padding=1)
        self.middle = nn.Conv2d(128, 128, 3)
        self.linear = nn.Linear(128 * 14 * 14, 10)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        self.calls = []

    def compute(self, x):
        return self.linear(self.middle(self.conv(x).relu()).relu().flatten(1))

    def forward(self, x):
        logits = self.compute(x)
        if not torch.cuda.is_current_stream_capturing():
            self.calls.append((x.detach().clone(), logits.detach().clone()))
        return logits


@pytest.mark.parametrize("allow_tf32", TF32_FLAGS)
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_a_float32_attack_are_float32(flags_of_pytorch, allow_tf32, autocast):
    model = RecordsLogits().cuda()
    x = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(1)).cuda()
    y = model.compute(x).argmax(1)
    allow_tf32()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        run_attack(model, x, y, THREATS[0], AttackSettings(steps=10))
        apgd_train(model, x, y, THREATS[1])
    calls = model.calls
    exact = copy.deepcopy(model).double()
    assert len(calls) > 5
    for point, logits in calls:
        assert logits.dtype == torch.float32
        expected = exact.compute(point.double())
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device_has_a_graph_of_its_own(on_gpu):
    """After a capture on the first device, the default capture stream belongs to that device."""
    model, x, y = on_gpu
    settings = AttackSettings(steps=10)
    first = run_attack(model, x, y, THREATS[0], settings)
    second = run_attack(
        copy.deepcopy(model).to("cuda:1"), x.to("cuda:1"), y.to("cuda:1"), THREATS[0], settings
    )
    assert torch.equal(second.broken, first.broken)


@by_precision
@by_threat
def test_the_training_attack_is_as_strong_as_on_the_cpu(trained, on_gpu, threat, precision):
    model, x, y = trained
    cpu = apgd_train(model, x, y, threat, precision=precision)
    gpu = apgd_train(*on_gpu, threat, precision=precision)
    assert gpu.device.type == "cuda"
    length = norms(gpu.cpu().double() - x.double(), threat.norm)
    assert float(length.max()) <= threat.eps + 1e-6 * max(1, threat.eps)
    with torch.no_grad():
        losses = [float(ce(model(point), y).mean()) for point in (x, cpu, gpu.cpu())]
    assert losses[2] - losses[0] >= 0.9 * (losses[1] - losses[0]) > 0


@by_precision
def test_evaluate_runs_on_the_requested_device(trained, precision):
    data = load_data("digits").test.first(N)
    cpu, gpu = (
        evaluate(trained[0], data, THREATS, steps=20, precision=precision, device=device)
        for device in ("cpu", "cuda")
    )
    assert (cpu.record["device"], gpu.record["device"]) == ("cpu", "cuda")
    for name, verdicts in gpu.threats.items():
        assert (
            int((verdicts.robust ^ cpu.threats[name].robust).sum())
            <= (0.02 if precision == "float32" else 0.05) * N
        )
        assert gpu.record["certificate"][name]["outside"] == 0
    resumed = evaluate(
        trained[0], data, THREATS, steps=20, precision=precision, device="cuda", after=gpu
    )
    assert resumed.accuracy == gpu.accuracy


# training, learning and landscapes: a few steps in float32, before rounding errors grow


DATA = load_data("digits")
FEW = {"threat": "Linf 16/255", "batch_size": 64, "precision": "float32", "seed": 0}


@pytest.fixture(scope="module")
def start(trained):
    """The small network as a checkpoint."""
    return Checkpoint.of(trained[0])


@pytest.fixture(scope="module")
def ingredients(start):
    """Three checkpoints, fine-tuned separately on the CPU."""
    few = DATA.train.first(512)
    return [
        train(start, few, **{**FEW, "threat": f"Linf {eps}/255"}, epochs=2, lr=0.02, device="cpu")
        for eps in (0, 16, 64)
    ]


def check_near(cpu, gpu, within=1e-3):
    assert cpu.tensors.keys() == gpu.tensors.keys()
    for name, tensor in gpu.tensors.items():
        assert tensor.device.type == "cpu"
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, cpu.tensors[name], rtol=within, atol=within)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"objective": "mixed 0.4"},
        {"objective": "trades 6"},
        {"threat": "clean"},
        {"threat": "L2 0.5"},
        {"also": ("L2 0.5",), "combine": "max"},
        {"accumulate": 2},
        {"recompute_activations": True},
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
def test_training_takes_the_steps_of_the_cpu(start, more):
    settings, few = {**FEW, "epochs": 1, "lr": 0.01, **more}, DATA.train.first(256)
    cpu, gpu = (train(start, few, **settings, device=device) for device in ("cpu", GPU))
    # The attack of "trades" starts where the gradient is almost 0, so rounding changes its signs.
    check_near(cpu, gpu, within=2e-2 if "trades" in more.get("objective", "") else 1e-3)
    assert gpu.provenance["versions"]["device"] == GPU


@by_precision
@pytest.mark.parametrize("setting", [{"recompute_activations": True}, {"accumulate": 4}], ids=str)
def test_settings_that_save_memory_need_less_of_it_on_the_gpu(setting, precision):
    """The peak of PyTorch's allocator in one step of 512 images, without and with the setting."""
    network = load_model("resnet9:width=32", channels=1)
    few, peaks = DATA.train.first(512), []
    settings = FEW | {"batch_size": 512, "precision": precision, "epochs": 1, "lr": 0.01}
    for more in ({}, setting):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(network, few, **settings, **more, device=GPU)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.9 * peaks[0]


def test_a_subspace_is_trained_as_on_the_cpu(start):
    settings = FEW | {"epochs": 1, "lr": 0.01}
    del settings["threat"]
    cpu, gpu = (
        train_subspace(start, DATA.train.first(256), ["Linf 16/255", "clean"], **settings, device=d)
        for d in ("cpu", GPU)
    )
    for one, other in zip(cpu, gpu, strict=True):
        check_near(one, other)


@pytest.mark.parametrize("more", [{"affine": True}, {"average_last": 0.5}], ids=str)
def test_more_ways_of_learning_take_the_steps_of_the_cpu(ingredients, more):
    settings = FEW | {"epochs": 1, "lr": 1.0, "init": "zeros", **more}
    cpu, gpu = (
        learn(ingredients, DATA.train.first(512), **settings, device=device)
        for device in ("cpu", GPU)
    )
    torch.testing.assert_close(gpu.alpha, cpu.alpha, rtol=0, atol=2e-3)


@pytest.mark.parametrize("objective", ["ce", "mixed 0.4", "trades 6"])
@by_precision
def test_a_replayed_training_attack_equals_the_attack(start, monkeypatch, objective, precision):
    settings = FEW | {"precision": precision, "objective": objective, "epochs": 1, "lr": 0.01}
    recorded = []

    def count_and_capture(step, state, result):
        recorded.append(capture_step(step, state, result))
        assert recorded[-1] is not step
        return recorded[-1]

    monkeypatch.setattr("robustsoup.attacks.cuda_graph.capture_step", count_and_capture)
    replayed = train(start, DATA.train.first(512), **settings, device=GPU)
    assert len(recorded) == 1
    monkeypatch.setattr(
        ReplayedCall, "__call__", lambda self, function, inputs, *rest: function(**inputs)
    )
    plain = train(start, DATA.train.first(512), **settings, device=GPU)
    check_near(plain, replayed, within=2e-2)


def test_a_replayed_call_follows_weights_and_shapes(on_gpu):
    model, x, y = on_gpu
    attack = partial(apgd_train, model, threat="L2 0.5")
    replayed = ReplayedCall()
    for rows in (64, 64, 64, 32, 32, 64):
        inputs = {"x": x[:rows], "y": y[:rows]}
        result = replayed(attack, inputs, model, "L2 0.5").clone()
        torch.testing.assert_close(result, attack(**inputs), rtol=0, atol=1e-5)
        with torch.no_grad():
            model.linear.weight.mul_(1.1)
    model.linear.weight = nn.Parameter(-model.linear.weight)
    inputs = {"x": x[:64], "y": y[:64]}
    result = replayed(attack, inputs, model, "L2 0.5")
    torch.testing.assert_close(result, attack(**inputs), rtol=0, atol=1e-5)


@by_precision
def test_training_on_the_gpu_lowers_the_robust_loss(start, precision):
    settings = FEW | {"precision": precision, "threat": "Linf 64/255"}
    trained = train(
        start, DATA.train.first(512), **settings, epochs=4, lr=0.05, val=DATA.val, device=GPU
    )
    assert (
        trained.provenance["history"][-1]["robust_loss"]
        < trained.provenance["history"][0]["robust_loss"]
    )


@pytest.mark.parametrize("work", ["train", "learn"])
def test_interrupted_work_resumes(start, ingredients, tmp_path, monkeypatch, work):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    few, settings = DATA.train.first(512), FEW | {"device": GPU, "epochs": 3}

    def run(**more):
        if work == "train":
            return train(start, few, **settings, lr=0.01, **more).tensors["linear.weight"]
        return learn(ingredients, few, **settings, lr=1.0, **more).alpha

    def stop(done, total, figures):
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(state_path=tmp_path / "state.pt", on_progress=stop)
    steps = []
    resumed = run(
        state_path=tmp_path / "state.pt",
        on_progress=lambda done, total, figures: steps.append(done),
    )
    assert steps[0] == 14  # the interrupted step was saved
    torch.testing.assert_close(resumed, run(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("place", ["device", "memory", "files"])
@pytest.mark.parametrize("granularity", ["parameter", "block", "model"])
def test_learning_takes_the_steps_of_the_cpu_wherever_the_ingredients_are(
    ingredients, tmp_path, place, granularity
):
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for item, file in zip(ingredients, files, strict=True):
        item.save(file)
    settings = FEW | {"epochs": 1, "lr": 1.0, "granularity": granularity}
    cpu = learn(files, DATA.train.first(512), **settings, device="cpu")
    gpu = learn(files, DATA.train.first(512), **settings, device=GPU, place=place)
    torch.testing.assert_close(gpu.alpha, cpu.alpha, rtol=0, atol=1e-3)
    check_near(mix(files, cpu), mix(files, gpu))


def test_a_dial_is_learned_as_on_the_cpu(ingredients):
    settings = FEW | {"epochs": 1, "lr": 1.0}
    cpu, gpu = (
        learn_dial(ingredients, DATA.train.first(512), **settings, device=device)
        for device in ("cpu", GPU)
    )
    torch.testing.assert_close(gpu.line, cpu.line, rtol=0, atol=1e-3)


@by_precision
def test_a_landscape_equals_that_of_the_cpu(ingredients, precision):
    settings = {
        "threat": "Linf 32/255",
        "points": 2,
        "samples": 100,
        "calibrate_on": DATA.train,
        "precision": precision,
    }
    cpu, gpu = (
        landscape(ingredients, DATA.test, **settings, device=device) for device in ("cpu", GPU)
    )
    within = 0.02 if precision == "float32" else 0.05
    for measure in ("loss", "clean_loss", "accuracy", "clean_accuracy"):
        wanted = torch.tensor(getattr(cpu, measure))
        torch.testing.assert_close(
            torch.tensor(getattr(gpu, measure)), wanted, rtol=within, atol=within
        )
