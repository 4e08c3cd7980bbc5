"""Where ingredients are kept: the same bits everywhere, within a memory limit, and lost files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ingredients import perturbed
from learning_helpers import assert_same_coefficients, learn_digits, resnet_ingredients
from training_helpers import fresh_network

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import CheckpointError, RequestError
from robustsoup.soups import ingredients as ingredients_module
from robustsoup.soups.ingredients import Ingredients, choose_place, total_bytes

CPU = torch.device("cpu")


def save_ingredients(folder, items, dtype=torch.float32):
    """Write files of the ingredients, with their parameters in `dtype`."""
    paths = []
    for i, item in enumerate(items):
        tensors = {n: t.to(dtype) if n in item.parameters else t for n, t in item.tensors.items()}
        paths.append(Checkpoint(tensors, item.provenance).save(folder / f"{i}.safetensors"))
    return paths


# bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("detach", [0.0, 0.6])
def test_learning_gives_the_same_bits_wherever_ingredients_are_kept(tmp_path, dtype, detach):
    paths = save_ingredients(tmp_path, resnet_ingredients(4), dtype)
    loaded = [Checkpoint.load(path) for path in paths]
    runs = [
        learn_digits(items, network=fresh_network(), detach=detach, place=place)
        for items, place in (
            (paths, "files"),
            (paths, "memory"),
            (paths, "device"),
            (loaded, "auto"),
        )
    ]
    for other in runs[1:]:
        assert_same_coefficients(runs[0], other)
        assert runs[0].record == other.record
    assert not torch.equal(runs[0].alpha, runs[0].start)


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_the_memory_alignment_of_a_tensor_changes_no_bit(shift):
    torch.manual_seed(0)
    grads = {"w": torch.randn(1003)}
    rows = [torch.randn(1003 + shift) for _ in range(3)]
    shifted = [Checkpoint({"w": row[shift:]}, {"parameters": ["w"]}) for row in rows]
    aligned = [Checkpoint({"w": row[shift:].clone()}, {"parameters": ["w"]}) for row in rows]
    a, b = (Ingredients(items, ["w"], CPU, "memory") for items in (shifted, aligned))
    assert torch.equal(a.inner(grads), b.inner(grads))
    mix_a, mix_b = torch.empty(1003), torch.empty(1003)
    a.mix_into("w", [0.3, 0.3, 0.4], mix_a)
    b.mix_into("w", [0.3, 0.3, 0.4], mix_b)
    assert torch.equal(mix_a, mix_b)


def test_parameters_longer_than_a_chunk_give_the_same_results(monkeypatch):
    grads = {
        "linear.weight": torch.randn(10, 16, dtype=torch.float64),
        "prep.0.weight": torch.randn(2, 1, 3, 3).double(),
    }
    items = [
        Checkpoint({n: t.double() for n, t in item.tensors.items()}, item.provenance)
        for item in resnet_ingredients()
    ]
    whole = Ingredients(items, list(grads), CPU, "memory").inner(grads)
    monkeypatch.setitem(ingredients_module.CHUNK_NUMBERS, "cpu", 7)
    chunked = Ingredients(items, list(grads), CPU, "memory")
    assert torch.allclose(chunked.inner(grads), whole, rtol=1e-12)
    expected = torch.stack(
        [torch.stack([(g * item.tensors[n]).sum() for item in items]) for n, g in grads.items()]
    )
    assert torch.allclose(whole, expected, rtol=1e-12)
    mix, weights = torch.empty(10, 16), [0.2, 0.5, 0.3]
    chunked.mix_into("linear.weight", weights, mix)
    exact = sum(a * item.tensors["linear.weight"] for a, item in zip(weights, items, strict=True))
    assert torch.allclose(mix, exact.float(), rtol=1e-6)


# memory


def test_the_budget_decides_where_ingredients_are_kept(tmp_path):
    paths = save_ingredients(tmp_path, resnet_ingredients(3))
    opened = [Checkpoint.open(path) for path in paths]
    size = total_bytes(opened)
    assert size == sum(3 * opened[0].tensors[name].nbytes for name in opened[0].parameters)
    assert choose_place("auto", size / 2**30, opened, CPU) == "device"
    assert choose_place("auto", (size - 1) / 2**30, opened, CPU) == "files"
    assert choose_place("auto", None, opened, CPU) == "device"
    assert choose_place("memory", 0, opened, CPU) == "memory"
    with pytest.raises(RequestError, match='place: got "disk"'):
        choose_place("disk", None, opened, CPU)
    for budget in (-1.0, float("nan")):
        with pytest.raises(RequestError, match="budget"):
            choose_place("auto", budget, opened, CPU)


LEARN_WITHIN_LIMIT = """
import resource, sys
from pathlib import Path

import torch
torch.set_num_threads(1)
import robustsoup as rs

place, folder, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
data = rs.load_data("digits").train.first(64)
warm_up = rs.load_model("resnet9:width=8", channels=1)
x, y = torch.rand(32, 1, 8, 8), torch.zeros(32, dtype=torch.long)
rs.apgd_train(warm_up, x, y, rs.ThreatModel("Linf", 0.1), precision="float32")

status = Path("/proc/self/status").read_text().splitlines()
used = int(next(line.split()[1] for line in status if line.startswith("VmData"))) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, resource.RLIM_INFINITY))
items = sorted(folder.glob("*.safetensors"))
if place == "memory":
    items = [rs.Checkpoint.load(path) for path in items]
alpha = rs.learn(items, data, threat="Linf 32/255", epochs=1, batch_size=32, place=place,
                 precision="float32", device="cpu")
print(len(alpha.ingredients))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RLIMIT_DATA is Linux's")
def test_72_ingredients_are_learned_within_a_memory_limit(tmp_path):
    base = fresh_network(20)
    paths = save_ingredients(tmp_path, [perturbed(base, seed, 0.02) for seed in range(4)])
    for number in range(4, 72):  # every path is a checkpoint of its own to the library
        os.link(paths[number % 4], tmp_path / f"{number}.safetensors")
    total, limit = 18 * total_bytes([Checkpoint.open(path) for path in paths]), 64 << 20
    assert total > 2.5 * limit  # they do not fit into memory at once

    command = [sys.executable, "-c", LEARN_WITHIN_LIMIT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    from_files, in_memory = (
        subprocess.Popen(
            [*command, place, str(tmp_path), str(limit)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for place in ("files", "memory")
    )
    output, errors = from_files.communicate()
    assert from_files.returncode == 0, errors[-2000:]
    assert output == "72\n"
    in_memory.communicate()
    assert in_memory.returncode != 0  # the limit takes effect


# lost files


@pytest.mark.parametrize("loss", ["gone", "cut", "other"])
def test_a_file_lost_during_the_run_is_named_and_the_run_resumes_once_it_is_back(
    tmp_path, save_every_step, loss
):
    paths, state = save_ingredients(tmp_path, resnet_ingredients()), tmp_path / "state.pt"
    whole = paths[1].read_bytes()

    def damage(done, total, figures):
        if done == 4:
            if loss == "gone":
                paths[1].unlink()
            elif loss == "cut":
                os.truncate(paths[1], len(whole) // 2)
            else:
                paths[1].write_bytes(whole + b" ")

    with pytest.raises(
        CheckpointError, match=r"1\.safetensors: the file was (removed|cut short|changed)"
    ):
        learn_digits(paths, epochs=3, place="files", state_path=state, on_progress=damage)
    if loss != "other":
        with pytest.raises(CheckpointError, match=r"1\.safetensors"):
            learn_digits(paths, epochs=3, place="files", state_path=state)
    paths[1].write_bytes(whole)
    seen = []
    resumed = learn_digits(
        paths,
        epochs=3,
        place="files",
        state_path=state,
        on_progress=lambda done, *_: seen.append(done),
    )
    assert seen[0] >= 4
    assert_same_coefficients(resumed, learn_digits(paths, epochs=3, place="files"))
