"""The real CIFAR-10: loading, training and evaluation in float32 and bfloat16."""

import math
import os

import pytest
import torch
from markers import needs_cifar10
from trained_seed import trained_seed

from robustsoup.data import Augmentation, load_data
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model
from robustsoup.soups.learning import learn
from robustsoup.soups.mixing import mix
from robustsoup.training.train import train

pytestmark = needs_cifar10

LINF = "Linf 8/255"


@pytest.fixture(scope="module")
def data():
    return load_data("cifar10", root=os.environ["ROBUSTSOUP_DATA"])


def network(data):
    constants = {"mean": data.record["mean"], "std": data.record["std"]}
    return load_model("resnet9:width=4", seed=trained_seed(), **constants)


def trained(data, start=None, **changed):
    defaults = {
        "threat": LINF,
        "epochs": 2,
        "batch_size": 64,
        "lr": 0.05,
        "device": "cpu",
        "precision": "float32",
        "seed": trained_seed(),
    }
    return train(
        network(data) if start is None else start, data.train.first(256), **(defaults | changed)
    )


def test_the_whole_data_set_is_loaded(data):
    assert [len(data.train), len(data.val), len(data.test)] == [45000, 5000, 10000]
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.record["classes"][:3] == ["airplane", "automobile", "bird"]
    assert data.record["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    assert data.record["std"] == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-3)
    assert data.train.augmentation == Augmentation(pad=4, flip=True)
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert torch.bincount(torch.cat([data.train.labels, data.val.labels])).tolist() == [5000] * 10
    # The first samples of each split are representative.
    for split in (data.train, data.val, data.test):
        assert torch.bincount(split.labels[:1000], minlength=10).min() > 50


# Without instructions for bfloat16, a processor takes five times as long with it.
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_few_steps_of_training_and_learning(data, precision):
    base = trained(data, precision=precision, batch_size=32, lr=0.1)
    history = base.provenance["history"]
    assert base.provenance["training"]["precision"] == precision
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in base.tensors.values())
    # Guessing costs log 10 = 2.3. Seen over five seeds: 2.35 at most, and falls of 0.025 to 0.054.
    assert all(0.5 < entry["loss"] < 3 for entry in history)
    assert history[-1]["loss"] < history[0]["loss"]
    ingredients = [
        trained(data, base, threat=threat, lr=0.02, epochs=1, precision=precision)
        for threat in ("Linf 4/255", LINF)
    ]
    assert base.digest != ingredients[0].digest != ingredients[1].digest
    alpha = learn(
        ingredients,
        data.train.first(256),
        threat=LINF,
        epochs=1,
        batch_size=64,
        device="cpu",
        precision=precision,
    )
    assert math.isfinite(alpha.record["history"][0]["loss"])
    soup = mix(ingredients, alpha, buffers="tracked")
    evaluation = evaluate(
        soup, data.test, [LINF], steps=5, samples=64, device="cpu", precision=precision
    )
    clean, robust = evaluation.accuracy["clean"], evaluation.accuracy[LINF]
    assert clean.n == robust.n == 64
    assert 0 <= robust.hits <= clean.hits <= 64
    assert float(evaluation.threats[LINF].norm.max()) <= 8 / 255 + 1e-6


def test_bfloat16_is_near_float32(data):
    results = [
        trained(data, precision=precision, epochs=1).provenance["history"][0]["loss"]
        for precision in ("float32", "bfloat16")
    ]
    assert results[0] != results[1]
    assert results[0] == pytest.approx(results[1], rel=0.05)


@pytest.mark.skipif(
    resolve_precision("auto", resolve_device("cpu")) != "bfloat16",
    reason="this CPU has no bfloat16",
)
def test_auto_precision_is_bfloat16_where_the_device_has_it(data):
    auto, named = (
        trained(data, precision=precision, epochs=1) for precision in ("auto", "bfloat16")
    )
    assert auto.provenance["training"]["precision"] == "bfloat16"
    assert auto.digest == named.digest


def test_the_environment_names_the_folder(data):
    assert load_data("cifar10", seed=1).test.record["digest"] == data.record["digest"]
    assert load_data("cifar10", seed=1).record["split_digest"] != data.record["split_digest"]


def test_interrupted_training_resumes_bit_for_bit(data, tmp_path):
    """As for digits, but crops and mirror images are drawn again after the resume."""
    path = tmp_path / "state.pt"

    def stop(done, total, figures):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(data, state_path=path, on_progress=stop)
    seen = []
    resumed = trained(data, state_path=path, on_progress=lambda done, *_: seen.append(done))
    assert seen == [6, 7, 8]  # the interrupted step was saved
    assert resumed.digest == trained(data).digest
