"""float32 is float32 under every precision flag of PyTorch, and the flags are restored."""

import contextlib
import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import robustsoup as rs
from robustsoup.attacks.forward import frozen_eval, predict_logits
from robustsoup.precision import full_float32
from robustsoup.soups.batchnorm import recalibrate
from robustsoup.training.adversarial_loss import measure_robust_loss

CPU = torch.device("cpu")
OPERATORS = [
    (backend, operator)
    for backend, operators in (
        ("generic", ("all",)),
        ("cuda", ("all", "matmul", "conv", "rnn")),
        ("mkldnn", ("all", "matmul", "conv", "rnn")),
    )
    for operator in operators
]
HAS_OPERATORS = hasattr(torch._C, "_set_fp32_precision_setter")
by_operator = pytest.mark.skipif(not HAS_OPERATORS, reason="PyTorch 2.9 added these flags")


def read_flags():
    """Return every flag as a caller can read it; flags that disagree raise, which is a state too.

    Operators inherit from backends and backends from all, so they are also read while what they
    inherit from differs.
    """
    flags = {"default dtype": torch.get_default_dtype()}
    for name, read in (
        ("matmul", torch.get_float32_matmul_precision),
        ("cudnn", lambda: torch.backends.cudnn.allow_tf32),
        ("cublas", lambda: torch.backends.cuda.matmul.allow_tf32),
    ):
        try:
            flags[name] = read()
        except RuntimeError as error:
            flags[name] = str(error).split(".")[0]
    matmul = torch.backends.cuda.matmul
    for name in (
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    ):
        with contextlib.suppress(AttributeError):
            flags[name] = getattr(matmul, name)
    if HAS_OPERATORS:
        flags |= {key: torch._C._get_fp32_precision_getter(*key) for key in OPERATORS}
    return flags


def read_inheriting_flags():
    """Return the flags of operators while `torch.backends.fp32_precision` is "tf32"."""
    if not HAS_OPERATORS:
        return None
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    try:
        return read_flags()
    finally:
        torch.backends.fp32_precision = before


@pytest.fixture(autouse=True)
def default_flags():
    """Restore PyTorch's own defaults after each test."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    matmul.allow_fp16_reduced_precision_reduction = True
    if HAS_OPERATORS:
        for key in OPERATORS:
            is_cudnn = key in (("cuda", "conv"), ("cuda", "rnn"))
            torch._C._set_fp32_precision_setter(*key, "tf32" if is_cudnn else "none")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).eval()


def images(n=32):
    return torch.rand(
        n, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def expected():
    model, x = network(), images()
    y = predict_logits(model, lambda rows: x[rows], len(x), 32, CPU).argmax(1)
    return model, x, y, attack_results(model, x, y)


def attack_results(model, x, y):
    """Return logits, points of both forms of the attack, and verdicts."""
    logits = predict_logits(model, lambda rows: x[rows], len(x), 32, CPU)
    points = rs.apgd(model, x, y, "Linf 0.05", steps=2, ids=torch.arange(len(x)))
    with frozen_eval(model), torch.no_grad():
        attacked = model(points)
    return logits, points, attacked, rs.apgd_train(model, x, y, "L2 0.5")


def set_operator(key, value):
    def apply():
        torch._C._set_fp32_precision_setter(*key, value)

    return pytest.param(apply, id=f"{'.'.join(key)}={value}", marks=by_operator)


def set_attribute(owner, name, value):
    def apply():
        setattr(owner, name, value)

    return pytest.param(apply, id=f"{name}={value}")


def valid(key, value):
    return not (key[0] == "cuda" and value == "bf16")


OLD_FLAGS = [
    *(
        pytest.param(lambda p=p: torch.set_float32_matmul_precision(p), id=p)
        for p in ("highest", "high", "medium")
    ),
    *(set_attribute(torch.backends.cudnn, "allow_tf32", value) for value in (True, False)),
    *(set_attribute(torch.backends.cuda.matmul, "allow_tf32", value) for value in (True, False)),
    set_attribute(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    set_attribute(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    *(
        pytest.param(lambda d=d: torch.set_default_dtype(d), id=str(d))
        for d in (torch.float64, torch.bfloat16, torch.float16)
    ),
]
NEW_FLAGS = [
    set_operator(key, value)
    for key in OPERATORS
    for value in ("none", "ieee", "tf32", "bf16")
    if valid(key, value)
]


@pytest.mark.parametrize("set_flag", [*OLD_FLAGS, *NEW_FLAGS])
def test_a_float32_attack_gives_the_same_bits_under_each_flag(expected, set_flag):
    model, x, y, results = expected
    set_flag()
    before, inherited = read_flags(), read_inheriting_flags()
    found = attack_results(model, x, y)
    assert (read_flags(), read_inheriting_flags()) == (before, inherited)
    for value, result in zip(found, results, strict=True):
        assert torch.equal(value, result)


@pytest.mark.parametrize("old", OLD_FLAGS[:7])
@pytest.mark.parametrize("new", NEW_FLAGS)
@pytest.mark.parametrize("old_first", [True, False])
def test_flags_that_disagree_are_set_and_restored(old, new, old_first):
    for set_flag in (old, new) if old_first else (new, old):
        set_flag()
    check_set_and_restored()


@by_operator
@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
def test_all_combinations_of_two_operators_are_restored(matmul):
    values = ("none", "ieee", "tf32", "bf16")
    for first, second in itertools.combinations(OPERATORS, 2):
        for a, b in itertools.product(values, values):
            if valid(first, a) and valid(second, b):
                torch.set_float32_matmul_precision(matmul)
                torch._C._set_fp32_precision_setter(*first, a)
                torch._C._set_fp32_precision_setter(*second, b)
                check_set_and_restored()


def check_set_and_restored():
    before, inherited = read_flags(), read_inheriting_flags()
    with full_float32():
        inside = read_flags()
    assert (read_flags(), read_inheriting_flags()) == (before, inherited)
    assert inside["matmul"] == "highest"
    assert not inside["cudnn"]
    assert not inside["cublas"]
    assert inside["default dtype"] == torch.float32
    for key in OPERATORS if HAS_OPERATORS else ():
        assert inside[key] in (("ieee",) if key[1] != "all" else ("ieee", "none"))


def lower_every_precision():
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    if HAS_OPERATORS:
        torch.backends.fp32_precision = "bf16"
        for key in OPERATORS[5:]:
            torch._C._set_fp32_precision_setter(*key, "bf16")


def test_flags_are_restored_after_an_error_and_when_nested():
    lower_every_precision()
    before = read_flags()
    with pytest.raises(ZeroDivisionError), full_float32(), full_float32():
        raise ZeroDivisionError
    assert read_flags() == before
    with full_float32():
        inside = read_flags()
        with full_float32():
            assert read_flags() == inside
        assert read_flags() == inside
    assert read_flags() == before


def test_flags_stay_set_until_the_last_of_several_threads_leaves():
    lower_every_precision()
    before = read_flags()
    entered, leave, inside = threading.Event(), threading.Event(), []

    def second():
        with full_float32():
            entered.set()
            leave.wait(60)
            inside.append(read_flags())

    thread = threading.Thread(target=second)
    with full_float32():
        pinned = read_flags()
        thread.start()
        assert entered.wait(60)
    leave.set()
    thread.join()
    assert inside == [pinned]
    assert read_flags() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_callers_autocast_reaches_no_pass(expected, dtype):
    model, x, y, results = expected
    with torch.autocast("cpu", dtype=dtype):
        found = attack_results(model, x, y)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype
    for value, result in zip(found, results, strict=True):
        assert torch.equal(value, result)


Measure = Callable[[nn.Module, rs.Split], object]


def evaluate_arrays(model, split):
    evaluation = rs.evaluate(model, split, ["Linf 0.1"], steps=2, samples=40)
    verdicts = evaluation.threats["Linf 0.1"]
    return evaluation.margin.tolist(), verdicts.margin.tolist(), verdicts.norm.tolist()


def recalibrated(model, split):
    statistics = recalibrate(model, split, threat=rs.ThreatModel("Linf", 0.1), samples=64)
    return {name: tensor.tolist() for name, tensor in statistics.items()}


MEASURES: dict[str, Measure] = {
    "evaluate": evaluate_arrays,
    "robust loss": lambda model, split: measure_robust_loss(
        model, split.first(64), rs.ThreatModel("Linf", 0.1), steps=2
    ),
    "recalibrate": recalibrated,
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("use_autocast", [False, True])
def test_measurements_are_in_float32_under_every_flag(name, use_autocast):
    model, split = network(), rs.load_data("digits").val
    expected = MEASURES[name](model, split)
    lower_every_precision()
    torch.set_default_dtype(torch.bfloat16)
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_autocast)
    with context:
        assert MEASURES[name](model, split) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_and_draws_are_float32_under_any_default_dtype(dtype):
    data = rs.load_data("digits").val
    settings = {"epochs": 1, "lr": 0.05, "batch_size": 256, "threat": "Linf 0.1"}

    def trained():
        model = rs.load_model("resnet9:width=4", channels=1)
        return rs.train(model, data, **settings)

    expected = trained()
    torch.set_default_dtype(dtype)
    found = trained()
    assert all(t.dtype == expected.tensors[n].dtype for n, t in found.tensors.items())
    assert found.digest == expected.digest


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("benchmark", [False, True])
def test_cudnn_is_deterministic_inside_and_restored(monkeypatch, deterministic, benchmark):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", deterministic)
    monkeypatch.setattr(cudnn, "benchmark", benchmark)
    with full_float32():
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert (cudnn.deterministic, cudnn.benchmark) == (deterministic, benchmark)
