"""Learning with the ingredients anywhere, at any granularity, within the memory of one network, and when a file is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_learning import (
    DATA,
    LINF,
    error,
    ingredients,
    learned,
    perturbed,
    same,
    small_ingredients,
    stop_at,
)
from torch.func import functional_call

from robustsoup.attacks.losses import ce
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import batches, load_data
from robustsoup.errors import CheckpointError, LeakageError, RequestError
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.settings import LearnSettings
from robustsoup.soups.granularity import layer_groups
from robustsoup.soups.ingredients import Ingredients, choose_place, total_bytes
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.learning_run import LearningInputs, LearningRun
from robustsoup.soups.mixing import mix
from robustsoup.threats import CLEAN
from robustsoup.training.adversarial_loss import measure_objective, measure_robust_loss
from robustsoup.training.objectives import Objective

CPU = torch.device("cpu")


def saved(folder, items, dtype=torch.float32):
    """Files of the ingredients, with their parameters in `dtype`."""
    paths = []
    for i, item in enumerate(items):
        tensors = {n: t.to(dtype) if n in item.parameters else t for n, t in item.tensors.items()}
        paths.append(Checkpoint(tensors, item.provenance).save(folder / f"{i}.safetensors"))
    return paths


# gradients at every granularity


@pytest.mark.parametrize(
    "granularity", ["parameter", "module", "block", "model", r"re:(conv|norm)"]
)
def test_gradients_are_those_of_autograd_with_all_networks_in_the_graph(granularity):
    net, items = small_ingredients(4)
    names = [name for name, _ in net.named_parameters()]
    groups = layer_groups(net, granularity)
    x, y, _ = next(iter(batches(DATA, 32, seed=0, epoch=0)))
    torch.manual_seed(1)
    logits = {layer: torch.randn(4, dtype=torch.float64, requires_grad=True) for layer in groups}
    alpha = {
        name: torch.softmax(logits[layer], 0) for layer, inner in groups.items() for name in inner
    }
    theta = {
        n: sum(a * item.tensors[n] for a, item in zip(alpha[n], items, strict=True)) for n in names
    }
    loss = ce(functional_call(net.train(), theta, (x,)), y).mean()
    expected = torch.autograd.grad(loss, list(logits.values()))

    run = running(items, net, granularity, "memory")
    weights = torch.stack([logits[layer].detach() for layer in run.layers])
    run.line = weights[:, torch.tensor(run.order)].unsqueeze(0)
    run.velocity = torch.zeros_like(run.line)
    run.mix_layers(range(len(run.layers)))
    grads = torch.autograd.grad(ce(run.model.train()(x), y).mean(), list(run.parameters.values()))
    run.update_line(
        list(range(len(run.layers))), dict(zip(run.parameters, grads, strict=True)), lr=1.0
    )
    for i, wanted in enumerate(expected):
        got = run.velocity[0, i][torch.tensor(run._columns())]
        if groups[run.layers[i]] == [
            "conv1.bias"
        ]:  # BatchNorm takes it away again: both gradients are rounding
            assert got.abs().max() < 1e-12 > wanted.abs().max()
        else:
            assert error(got, wanted) < 1e-9, run.layers[i]


def test_detaching_other_layers_changes_no_gradient_of_a_layer():
    """In the paper's own graph: no layer's gradient passes through another layer's softmax, so none can vanish in them."""
    net, items = small_ingredients(3)
    names = [name for name, _ in net.named_parameters()]
    x, y, _ = next(iter(batches(DATA, 32, seed=0, epoch=0)))

    def slope(layer, alone):
        torch.manual_seed(2)
        logits = {name: torch.randn(3, dtype=torch.float64, requires_grad=True) for name in names}
        alpha = {
            name: torch.softmax(row.detach() if alone and name != layer else row, 0)
            for name, row in logits.items()
        }
        theta = {
            n: sum(a * item.tensors[n] for a, item in zip(alpha[n], items, strict=True))
            for n in names
        }
        loss = ce(functional_call(net.train(), theta, (x,)), y).mean()
        return torch.autograd.grad(loss, logits[layer])[0]

    for layer in ("conv1.weight", "norm2.weight", "linear.weight"):
        alone, together = slope(layer, True), slope(layer, False)
        assert float(alone.norm()) > 0
        assert error(alone, together) < 1e-12


def running(items, net, granularity, place):
    """Return a learning run at its start."""
    chosen = LearnSettings(
        threat=LINF,
        objective=Objective.parse("ce"),
        epochs=1,
        batch_size=32,
        lr=5.0,
        schedule="constant",
        detach=0.5,
        granularity=granularity,
        precision="float32",
    )
    return LearningRun(LearningInputs(items, DATA, None, net, None, place, CPU), chosen)


@pytest.mark.parametrize("granularity", ["module", "block", "model", "re:weight"])
def test_a_coarser_soup_has_fewer_rows_and_mixes(granularity):
    items = ingredients()
    alpha = learned(items, granularity=granularity)
    groups = layer_groups(items[0].network(), granularity)
    assert alpha.layers == tuple(groups)
    soup = mix(items, alpha, buffers="average")
    for row, names in zip(alpha.alpha, groups.values(), strict=True):
        for name in names:
            wanted = sum(
                a * item.tensors[name].double() for a, item in zip(row, items, strict=True)
            )
            assert torch.allclose(soup.tensors[name].double(), wanted, atol=1e-6), name


def test_one_coefficient_a_network_is_the_sum_over_its_layers():
    net, items = small_ingredients(3)
    fine, coarse = (
        running(items, net, "parameter", "memory"),
        running(items, net, "model", "memory"),
    )
    for run in (fine, coarse):
        run.line, run.velocity = (
            torch.zeros_like(run.line).double(),
            torch.zeros_like(run.velocity).double(),
        )
        run.mix_layers(range(len(run.layers)))
        x, y, _ = next(iter(batches(DATA, 32, seed=0, epoch=0)))
        grads = torch.autograd.grad(
            ce(run.model.train()(x), y).mean(), list(run.parameters.values())
        )
        run.update_line(
            list(range(len(run.layers))), dict(zip(run.parameters, grads, strict=True)), lr=1.0
        )
    assert error(coarse.velocity[0, 0], fine.velocity[0].sum(0)) < 1e-9


# where the ingredients are


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("detach", [0.0, 0.6])
def test_streamed_is_resident_bit_for_bit(tmp_path, dtype, detach):
    paths = saved(tmp_path, ingredients(4), dtype)
    net = load_model("resnet9:width=2", channels=1)
    loaded = [Checkpoint.load(path) for path in paths]
    runs = [
        learned(given, network=net, detach=detach, place=place)
        for given, place in (
            (paths, "files"),
            (paths, "memory"),
            (paths, "device"),
            (loaded, "auto"),
        )
    ]
    for other in runs[1:]:
        same(runs[0], other)
        assert runs[0].record == other.record
    assert not torch.equal(runs[0].alpha, runs[0].start)


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_where_a_tensor_lies_changes_no_bit(shift):
    torch.manual_seed(0)
    grads = {"w": torch.randn(1003)}
    rows = [torch.randn(1003 + shift) for _ in range(3)]
    apart = [Checkpoint({"w": row[shift:]}, {"parameters": ["w"]}) for row in rows]
    copied = [Checkpoint({"w": row[shift:].clone()}, {"parameters": ["w"]}) for row in rows]
    one, two = (Ingredients(items, ["w"], CPU, "memory") for items in (apart, copied))
    assert torch.equal(one.inner(grads), two.inner(grads))
    mixed = [torch.empty(1003), torch.empty(1003)]
    for held, out in zip((one, two), mixed, strict=True):
        held.mix_into("w", [0.3, 0.3, 0.4], out)
    assert torch.equal(*mixed)


def test_layers_longer_than_a_stretch_are_the_same(monkeypatch):
    from robustsoup.soups import ingredients as module

    grads = {
        "linear.weight": torch.randn(10, 16, dtype=torch.float64),
        "prep.0.weight": torch.randn(2, 1, 3, 3).double(),
    }
    items = [
        Checkpoint({n: t.double() for n, t in item.tensors.items()}, item.provenance)
        for item in ingredients()
    ]
    whole = Ingredients(items, list(grads), CPU, "memory").inner(grads)
    monkeypatch.setitem(module.CHUNK, "cpu", 7)
    parts = Ingredients(items, list(grads), CPU, "memory")
    assert torch.allclose(parts.inner(grads), whole, rtol=1e-12)
    wanted = torch.stack(
        [torch.stack([(g * item.tensors[n]).sum() for item in items]) for n, g in grads.items()]
    )
    assert torch.allclose(whole, wanted, rtol=1e-12)
    mixed = torch.empty(10, 16)
    parts.mix_into("linear.weight", [0.2, 0.5, 0.3], mixed)
    exact = sum(
        a * item.tensors["linear.weight"] for a, item in zip([0.2, 0.5, 0.3], items, strict=True)
    )
    assert torch.allclose(mixed, exact.float(), rtol=1e-6)


def test_the_network_that_is_trained_is_the_soup(tmp_path):
    items = ingredients()
    run = running(items, items[0].network(), "parameter", "memory")
    for x, y, _ in batches(DATA, 32, seed=0, epoch=0):
        run.take_step(x, y)
        run.step += 1
    soup = mix(items, run.coefficients(), buffers="tracked")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, soup.tensors[name]), name


def test_lazy_mixing_is_full_mixing_bit_for_bit(monkeypatch):
    items, remixed = ingredients(), []
    lazy = learned(items, detach=0.7)
    real = LearningRun.mix_layers

    def full(self, active):
        remixed.append((len(active), len(self.layers)))
        real(self, range(len(self.layers)))

    monkeypatch.setattr(LearningRun, "mix_layers", full)
    same(lazy, learned(items, detach=0.7))
    assert 0 < sum(few for few, _ in remixed[1:]) < 0.5 * sum(every for _, every in remixed[1:])


def test_the_budget_decides(tmp_path):
    paths = saved(tmp_path, ingredients(3))
    opened = [Checkpoint.open(path) for path in paths]
    size = total_bytes(opened)
    assert size == sum(3 * opened[0].tensors[name].nbytes for name in opened[0].parameters)
    assert choose_place("auto", size / 2**30, opened, CPU) == "device"
    assert choose_place("auto", (size - 1) / 2**30, opened, CPU) == "files"
    assert choose_place("auto", None, opened, CPU) == "device"
    assert choose_place("memory", 0, opened, CPU) == "memory"
    for wrong in ({"place": "disk"}, {"budget": -1.0}, {"budget": float("nan")}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            choose_place(
                **({"place": "auto", "budget": None, "checkpoints": opened, "device": CPU} | wrong)
            )


CHILD = """
import resource, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
import robustsoup as rs

mode, folder, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
data = rs.load_data("digits").train.first(64)
rs.apgd_train(rs.load_model("resnet18:width=8", channels=1), torch.rand(32, 1, 8, 8), torch.zeros(32, dtype=torch.long),
              rs.ThreatModel("Linf", 0.1), precision="float32")

def now():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmData"))) * 1024

resource.setrlimit(resource.RLIMIT_DATA, (now() + limit, resource.RLIM_INFINITY))
given = sorted(folder.glob("*.safetensors"))
if mode == "memory":
    given = [rs.Checkpoint.load(path) for path in given]
alpha = rs.learn(given, data, threat="Linf 32/255", epochs=1, batch_size=32, place=mode, precision="float32", device="cpu")
print(len(alpha.ingredients), now())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RLIMIT_DATA is Linux's")
def test_72_ingredients_under_a_limit_of_the_operating_system(tmp_path):
    base = load_model("resnet18:width=16", channels=1)
    paths = saved(tmp_path, [perturbed(base, seed, 0.02) for seed in range(72)])
    total = total_bytes([Checkpoint.open(path) for path in paths])
    limit = 64 << 20
    assert total > 2.5 * limit  # so that they cannot all be in memory

    def child(mode):
        command = [
            sys.executable,
            "-c",
            CHILD.format(tests=str(Path(__file__).parents[1])),
            mode,
            str(tmp_path),
            str(limit),
        ]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    streamed = child("files")
    assert streamed.returncode == 0, streamed.stderr[-2000:]
    assert streamed.stdout.startswith("72 ")
    assert child("memory").returncode != 0  # the limit bites


# files that are lost on the way


@pytest.mark.parametrize("loss", ["gone", "cut", "other"])
def test_a_file_lost_on_the_way_is_named_and_the_run_goes_on_when_it_is_back(
    tmp_path, monkeypatch, loss
):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    paths, state = saved(tmp_path, ingredients()), tmp_path / "state.pt"
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
        CheckpointError, match=r"1\.safetensors: (the file is gone|cut short|the file was changed)"
    ):
        learned(paths, epochs=3, place="files", state_path=state, on_progress=damage)
    if loss != "other":
        with pytest.raises(CheckpointError, match=r"1\.safetensors"):
            learned(paths, epochs=3, place="files", state_path=state)
    paths[1].write_bytes(whole)
    seen = []
    resumed = learned(
        paths,
        epochs=3,
        place="files",
        state_path=state,
        on_progress=lambda done, *_: seen.append(done),
    )
    assert seen[0] >= 4
    same(resumed, learned(paths, epochs=3, place="files"))


def test_a_loss_that_breaks_on_the_way_keeps_the_state_before_it(tmp_path, monkeypatch):
    from robustsoup.errors import Diverged
    from robustsoup.soups import learning_run

    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    items, state, real, steps = ingredients(), tmp_path / "state.pt", learning_run.attack_batch, []

    def poisoned(model, x, *rest, **options):
        steps.append(1)
        return x * float("nan") if len(steps) == 5 else real(model, x, *rest, **options)

    monkeypatch.setattr(learning_run, "attack_batch", poisoned)
    with pytest.raises(
        Diverged, match=r"learn: the loss became nan at step 4, first in layer normalize"
    ):
        learned(items, epochs=3, state_path=state)
    kept = torch.load(state, weights_only=True)
    assert kept["step"] == 4
    assert all(torch.isfinite(kept[name]).all() for name in ("line", "velocity", "loss_sum"))
    assert all(
        torch.isfinite(tensor).all()
        for tensor in kept["buffers"].values()
        if tensor.is_floating_point()
    )
    same(learned(items, epochs=3, state_path=state), learned(items, epochs=3))


# splits and single ingredients


def test_ingredients_of_another_split_are_refused_and_explained():
    other = load_data("digits", seed=1).train
    items = [
        item.with_provenance(data=DATA.record, trained_on=["train"]) for item in ingredients(2)
    ]
    learned(items)
    mixed = [items[0], items[1].with_provenance(data=other.record)]
    with pytest.raises(
        LeakageError,
        match=r"another split of digits \(seed 1\) than this one \(seed 0\).*no sample is fresh",
    ):
        learned(mixed)
    learned(mixed, allow_leakage=True)
    everything = load_data("digits").unsplit().first(64)  # of which nothing is held out
    learn(mixed, everything, threat=LINF, epochs=1, batch_size=32, device="cpu")


def test_a_single_ingredient_works_and_warns():
    alpha = learned(ingredients(1))
    assert torch.equal(alpha.alpha, torch.ones(25, 1, dtype=torch.float64))
    assert alpha.record["warnings"] == [
        "a single ingredient: there is nothing to learn; the soup is the ingredient"
    ]
    assert "warnings" not in learned(ingredients(2)).record


# BatchNorm statistics while learning


def statistics(alpha):
    return {
        name: tensor
        for name, tensor in alpha.tracked.items()
        if not name.endswith("num_batches_tracked")
    }


def test_averaged_statistics_follow_the_coefficients():
    items = ingredients()
    alpha = learned(items, buffers="average", granularity="module")
    assert not torch.equal(alpha.alpha, alpha.start)
    wanted = mix(items, alpha, buffers="average").tensors
    for name, tensor in statistics(alpha).items():
        assert torch.equal(tensor, wanted[name]), name


def test_statistics_of_the_base_stay():
    items, base = ingredients(), ingredients(5)[4]
    alpha = learned(items, buffers="base", base=base)
    assert all(
        torch.equal(tensor, base.tensors[name]) for name, tensor in statistics(alpha).items()
    )
    assert alpha.record["learning"]["base"] == base.digest
    first = learned(items, buffers="base")  # no ancestor is known
    assert all(
        torch.equal(tensor, items[0].tensors[name]) for name, tensor in statistics(first).items()
    )
    assert not torch.equal(first.alpha, alpha.alpha)


@pytest.mark.parametrize(
    ("policy", "threat"), [("recalibrate", CLEAN), ("recalibrate-adversarial", LINF)]
)
def test_recalibrated_statistics_are_measured_after_each_epoch(policy, threat):
    items = ingredients()
    alpha = learned(items, buffers=policy)
    soup = mix(items, alpha, buffers="average")
    once = mix(items, alpha, buffers=policy, calibrate_on=DATA, threat=threat).tensors
    if threat.is_clean:
        for name, tensor in statistics(alpha).items():
            assert torch.allclose(tensor, once[name], rtol=1e-4, atol=1e-5), name
    else:  # the attack saw the statistics of the epoch before
        name = next(iter(statistics(alpha)))
        assert not torch.equal(alpha.tracked[name], soup.tensors[name])
        assert (alpha.tracked[name] - once[name]).abs().max() < (
            alpha.tracked[name] - soup.tensors[name]
        ).abs().max()


@pytest.mark.parametrize("policy", ["average", "base", "recalibrate"])
def test_every_policy_survives_a_kill(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            learned(
                epochs=3, buffers=policy, state_path=tmp_path / "s.pt", on_progress=stop_at(step)
            )
    same(
        learned(epochs=3, buffers=policy, state_path=tmp_path / "s.pt"),
        learned(epochs=3, buffers=policy),
    )
    with pytest.raises(RequestError, match="buffers"):
        learned(buffers="mean")


# early stopping


def test_early_stopping_returns_the_epoch_of_the_least_loss_on_val():
    val, items = load_data("digits").val.first(64), ingredients()
    every = [
        learned(items, epochs=n, lr=60.0, schedule="constant", detach=0.0, val=val)
        for n in range(1, 6)
    ]
    history = every[-1].record["history"]
    losses = [entry["val_loss"] for entry in history]
    best = losses.index(min(losses))
    stopped = learned(
        items,
        epochs=5,
        lr=60.0,
        schedule="constant",
        detach=0.0,
        val=val,
        early_stop={"steps": 3},
    )
    assert stopped.record["early_stopped_at"] == best + 1
    assert best + 1 < 5  # else nothing was shown
    assert torch.equal(stopped.alpha, every[best].alpha)
    assert all(torch.equal(t, every[best].tracked[name]) for name, t in stopped.tracked.items())
    assert every[-1].record["early_stopped_at"] is None


def test_the_loss_on_val_is_the_objective():
    from robustsoup.training.objectives import mixed

    net, val = load_model("resnet9:width=2", channels=1), load_data("digits").val.first(64)
    clean, robust = (
        measure_robust_loss(net, val, CLEAN)[0],
        measure_robust_loss(net, val, LINF, steps=3)[0],
    )
    assert robust > clean
    for weight in (0.0, 0.3, 1.0):
        got = measure_objective(net, val, LINF, mixed(weight), steps=3)
        assert got == pytest.approx(weight * clean + (1 - weight) * robust)


def test_early_stopping_needs_a_split_and_survives_a_kill(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="early_stop: no validation split"):
        learned(early_stop=True)
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    chosen = {
        "epochs": 4,
        "lr": 60.0,
        "val": load_data("digits").val.first(64),
        "early_stop": {"steps": 2},
    }
    for step in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            learned(state_path=tmp_path / "s.pt", on_progress=stop_at(step), **chosen)
    resumed, whole = learned(state_path=tmp_path / "s.pt", **chosen), learned(**chosen)
    same(resumed, whole)
    assert resumed.record == whole.record


# what was learned


def test_movement_and_slopes_tell_what_happened():
    stuck, moved = learned(detach=1.0), learned(detach=0.0)
    assert torch.equal(stuck.start, stuck.alpha)
    assert float(stuck.movement().max()) == 0
    assert float(stuck.slopes.max()) == 0
    assert torch.allclose(moved.movement(), (moved.alpha - moved.start).abs().sum(1) / 2)
    assert float(moved.movement().max()) > 0.01
    assert (moved.slopes > 0).sum() > 20


def test_the_first_slope_is_the_norm_of_the_gradient():
    data = DATA.first(32)
    alpha = learn(
        ingredients(),
        data,
        threat=LINF,
        epochs=1,
        batch_size=32,
        lr=1e-3,
        momentum=0.0,
        detach=0.0,
        init="zeros",
        schedule="constant",
        device="cpu",
        precision="float32",
    )
    steps = torch.log(alpha.alpha) - torch.log(alpha.alpha).mean(
        1, keepdim=True
    )  # from zero, -lr times the gradient
    assert torch.allclose(steps.norm(dim=1) / 1e-3, alpha.slopes, rtol=1e-3, atol=1e-6)


# the dial


def dialled(items=None, **changed):
    chosen = {
        "threat": LINF,
        "epochs": 2,
        "batch_size": 32,
        "device": "cpu",
        "precision": "float32",
        "detach": 0.3,
    }
    return learn_dial(items or ingredients(), DATA, **(chosen | changed))


def test_a_dial_is_a_line_of_logits():
    from robustsoup.soups.coefficients import Coefficients

    dial = dialled()
    low, middle, high = (dial.at(t) for t in (0.0, 0.5, 1.0))
    assert isinstance(low, Coefficients)
    assert torch.allclose(middle.alpha, torch.softmax(dial.line[0], 1))
    for t in (0.0, 0.25, 0.9):
        logits = dial.line[0] + (2 * t - 1) * dial.line[1]
        assert torch.allclose(dial.at(t).alpha, torch.softmax(logits, 1))
    assert not torch.equal(low.alpha, high.alpha)
    assert torch.equal(dial.start[1], torch.zeros(25, 3, dtype=torch.float64))
    assert low.record["at"] == 0.0
    low.check(3)


def test_a_dial_that_is_never_turned_learns_no_slope_along_it(monkeypatch):
    monkeypatch.setattr(
        torch,
        "rand",
        lambda *a, real=torch.rand, **k: real(*a, **k) * 0 + 0.5 if a == ((),) else real(*a, **k),
    )
    dial, soup = dialled(), learned(objective="mixed 0.5", detach=0.3)
    assert float(dial.line[1].abs().max()) == 0
    assert torch.equal(dial.at(0.5).alpha, soup.alpha)


@pytest.mark.parametrize("by", ["objective", "eps"])
@pytest.mark.parametrize("kills", [[2], [3, 5]])
def test_a_killed_dial_goes_on_bit_for_bit(monkeypatch, tmp_path, by, kills):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)
    for step in kills:
        with pytest.raises(KeyboardInterrupt):
            dialled(by=by, turn_every=2, state_path=tmp_path / "s.pt", on_progress=stop_at(step))
    resumed, whole = (
        dialled(by=by, turn_every=2, state_path=tmp_path / "s.pt"),
        dialled(by=by, turn_every=2),
    )
    assert torch.equal(resumed.line, whole.line)
    assert resumed.record == whole.record
    assert not torch.equal(
        dialled(by="eps" if by == "objective" else "objective", turn_every=2).line, whole.line
    )


def test_a_dial_goes_through_a_file_and_permutes(tmp_path):
    from robustsoup.errors import CoefficientError
    from robustsoup.soups.coefficients import Coefficients, Dial, load_coefficients

    items = ingredients()
    dial = dialled(items, granularity="module")
    path = dial.save(tmp_path / "dial.safetensors")
    read = Dial.load(path)
    assert torch.equal(read.line, dial.line)
    assert (read.layers, read.ingredients, read.parameters, read.record) == (
        dial.layers,
        dial.ingredients,
        dial.parameters,
        dial.record,
    )
    assert torch.equal(load_coefficients(path, 0.7).alpha, dial.at(0.7).alpha)
    with pytest.raises(CoefficientError, match=r"dial\.safetensors: a dial.*--at"):
        Coefficients.load(path)
    alpha = dial.at(0.2).save(tmp_path / "alpha.safetensors")
    with pytest.raises(
        CoefficientError, match=r"alpha\.safetensors: not a dial file.*learn --dial"
    ):
        load_coefficients(alpha, 0.2)
    turned = dialled(items[::-1], granularity="module")
    assert torch.equal(turned.at(0.3).alpha, dial.at(0.3).alpha[:, [2, 1, 0]])
    soups = [mix(items, c.at(0.3), buffers="average").digest for c in (dial, turned)]
    assert soups[0] == soups[1]


def test_a_dial_learns_to_trade():
    """One ingredient is good on clean images alone, one under attack alone: the ends of the dial find them."""
    from robustsoup.training.train import train

    data = load_data("digits").train.first(512)
    fresh = load_model("resnet9:width=4", channels=1)
    base = train(
        fresh,
        data,
        threat="Linf 32/255",
        epochs=12,
        batch_size=64,
        lr=0.1,
        precision="float32",
        device="cpu",
    )
    soft, hard = (
        train(
            base,
            data,
            threat=threat,
            epochs=8,
            batch_size=64,
            lr=0.05,
            precision="float32",
            device="cpu",
        )
        for threat in ("clean", "Linf 48/255")
    )
    dial = learn_dial(
        [soft, hard],
        data,
        threat="Linf 48/255",
        epochs=6,
        batch_size=64,
        lr=3.0,
        detach=0.0,
        granularity="model",
        device="cpu",
        precision="float32",
    )
    clean = [float(dial.at(t).alpha[0, 0]) for t in (0.0, 0.5, 1.0)]
    assert clean[0] < clean[1] < clean[2]
    assert clean[0] < 0.2
    assert clean[2] > 0.8


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"by": "alpha"}, 'by: got "alpha", expected one of objective, eps'),
        ({"turn_every": 0}, "turn_every"),
        ({"threat": "clean"}, "got clean, expected a threat"),
        ({"detach": 2.0}, "detach"),
        ({"granularity": "row"}, "granularity"),
    ],
)
def test_dials_that_make_no_sense_are_refused(wrong, text):
    with pytest.raises(RequestError) as caught:
        dialled(**wrong)
    assert text in str(caught.value)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_a_dial_turns_from_0_to_1(t):
    from robustsoup.errors import CoefficientError

    with pytest.raises(CoefficientError, match="--at"):
        dialled().at(t)
