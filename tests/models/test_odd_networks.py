"""Networks other than plain stacks of convolutions and BatchNorms, and unusual files."""

import pytest
import torch
from ingredients import perturbed
from torch import nn

from robustsoup.attacks import apgd
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data, to_float
from robustsoup.diagnosis.check import check
from robustsoup.errors import (
    CheckpointError,
    CoefficientError,
    Diverged,
    ModelError,
    RequestError,
)
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.merging import merge
from robustsoup.soups.mixing import mix
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train

DATA = load_data("digits").train.first(96)
LINF = ThreatModel("Linf", 32 / 255)


def learned(items, **changed):
    """Coefficients for `items` after two epochs under the default settings but for `changed`."""
    settings = {
        "threat": LINF,
        "epochs": 2,
        "batch_size": 32,
        "device": "cpu",
        "precision": "float32",
        "detach": 0.5,
    }
    return learn(items, DATA, **(settings | changed))


class Odd(nn.Module):
    """A network of 64 pixels, 16 units and 10 classes, with one unusual property."""

    def __init__(self, kind):
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.norm = {"bare": nn.BatchNorm1d(16, affine=False), "none": nn.Identity()}.get(
            kind, nn.BatchNorm1d(16)
        )
        self.last = nn.Linear(16, 10)
        if kind == "unused":
            self.unused = nn.Linear(4, 4)
        if kind == "empty":
            self.empty = nn.Parameter(torch.empty(0))
        if kind == "tied":
            self.again = self.last
        if kind == "integers":
            self.order = nn.Parameter(torch.arange(3) + 1, requires_grad=False)
            self.same = self.order

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x.flatten(1)))))


def odd_ingredients(kind, n=3):
    torch.manual_seed(0)
    net = Odd(kind)
    return net, [perturbed(net, seed) for seed in range(n)]


@pytest.mark.parametrize("kind", ["plain", "none", "bare", "unused", "empty", "tied", "integers"])
@pytest.mark.parametrize("buffers", ["tracked", "average"])
def test_every_network_can_be_learned_mixed_and_checked(kind, buffers):
    net, items = odd_ingredients(kind)
    alpha = learned(items, network=net, buffers=buffers, detach=0.3)
    soup = mix(items, alpha, buffers=buffers, network=net)
    soup.load_into(Odd(kind))
    assert check(items, data=DATA.first(40), network=net).cost.layers == len(items[0].parameters)


def test_integer_parameters_are_copied():
    net, items = odd_ingredients("integers")
    assert "order" not in items[0].parameters
    fisher = merge(items, "fisher", data=DATA.first(4), threat=LINF, network=net)
    for soup in (mix(items, [0.3, 0.3, 0.4]), fisher):
        assert torch.equal(soup.tensors["order"], net.order)


def test_the_coefficients_of_an_unused_layer_do_not_move():
    net, items = odd_ingredients("unused")
    alpha = learned(items, network=net, detach=0.3)
    unused = [alpha.layers.index(name) for name in ("unused.weight", "unused.bias")]
    assert torch.equal(alpha.alpha[unused], alpha.start[unused])
    assert float(alpha.movement().max()) > 0


def test_statistics_without_weights_follow_the_layer_that_they_normalize():
    net, items = odd_ingredients("bare")
    alpha = learned(items, network=net, buffers="average")
    soup = mix(items, alpha, buffers="average", network=net)
    row = alpha.row("first.bias")
    for name in ("norm.running_mean", "norm.running_var"):
        expected = sum(a * item.tensors[name].double() for a, item in zip(row, items, strict=True))
        assert torch.allclose(soup.tensors[name].double(), expected, rtol=1e-5), name
        assert torch.equal(alpha.tracked[name], soup.tensors[name])
    reversed_soup = mix(
        items[::-1],
        alpha.for_ingredients([i.digest for i in items[::-1]]),
        buffers="average",
        network=net,
    )
    assert reversed_soup.digest == soup.digest
    dial = learn_dial(
        items,
        DATA,
        threat=LINF,
        epochs=2,
        batch_size=32,
        network=net,
        lr=100.0,
        detach=0.0,
        precision="float32",
        device="cpu",
    )
    ends = [
        mix(items, dial.at(t), buffers="average", network=net).tensors["norm.running_var"]
        for t in (0, 1)
    ]
    assert not torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("buffers", ["tracked", "average", "recalibrate"])
def test_a_soup_of_half_precision_files_can_be_mixed_with_them_again(tmp_path, dtype, buffers):
    net = load_model("resnet9:width=2", channels=1)
    items = [perturbed(net, seed, 0.1) for seed in range(2)]
    paths = []
    for i, item in enumerate(items):
        half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in item.tensors.items()}
        paths.append(Checkpoint(half, item.provenance).save(tmp_path / f"{i}.safetensors"))
    alpha = learned(paths, network=net)
    soup = mix(paths, alpha, buffers=buffers, network=net, calibrate_on=DATA)
    assert {t.dtype for t in soup.tensors.values() if t.is_floating_point()} == {dtype}
    mix([soup, paths[0]], [0.5, 0.5], buffers="average")


def test_tied_parameters_of_foreign_files_are_one_layer(tmp_path):
    net, items = odd_ingredients("tied")
    paths = []
    for i, item in enumerate(items):
        cloned = {name: tensor.clone() for name, tensor in item.tensors.items()}
        Checkpoint(cloned, {}).save(tmp_path / f"{i}.safetensors")
        paths.append(tmp_path / f"{i}.safetensors")
    alpha = learned(paths, network=net)
    assert "again.weight" not in alpha.layers
    soup = mix(paths, alpha, network=net)
    assert torch.equal(soup.tensors["again.weight"], soup.tensors["last.weight"])


def test_a_gradient_that_is_not_finite_is_named_even_if_the_loss_is_finite(tmp_path):
    class Rooted(Odd):
        def __init__(self):
            super().__init__("plain")
            self.root = nn.Parameter(torch.zeros(10))

        def forward(self, x):
            return super().forward(x) + self.root.sqrt()  # its slope at 0 is infinite

    torch.manual_seed(0)
    net = Rooted()
    items = [perturbed(net, seed) for seed in range(2)]
    items = [Checkpoint({**i.tensors, "root": torch.zeros(10)}, i.provenance) for i in items]
    with pytest.raises(Diverged, match="learn: the gradient of layer root is not finite at step 0"):
        learned(items, network=net, detach=0.0, state_path=tmp_path / "s.pt")
    assert not (tmp_path / "s.pt").exists()


@pytest.mark.parametrize("work", ["learn", "train"])
def test_a_saved_state_is_refused_for_another_network(tmp_path, monkeypatch, work):
    monkeypatch.setattr(SavedState, "due", lambda self: self.path is not None)

    def normalising(mean):
        return load_model("resnet9:width=2", channels=1, normalize=([mean], [0.5]))

    def run_work(mean, **more):
        net = normalising(mean)
        if work == "train":
            return train(
                net, DATA, threat=LINF, epochs=2, batch_size=32, lr=0.01, device="cpu", **more
            )
        items = [perturbed(normalising(0.1), seed, 0.1) for seed in range(2)]
        return learned(items, network=net, **more)

    def stop(done, total, figures):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_work(0.1, state_path=tmp_path / "s.pt", on_progress=stop)
    with pytest.raises(CheckpointError, match="other settings"):
        run_work(0.9, state_path=tmp_path / "s.pt")
    run_work(0.1, state_path=tmp_path / "s.pt")


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_averaged_statistics_do_not_depend_on_files_that_are_in_memory(tmp_path, damage):
    items = [perturbed(load_model("resnet9:width=2", channels=1), seed, 0.1) for seed in range(2)]
    paths = [item.save(tmp_path / f"{i}.safetensors") for i, item in enumerate(items)]

    def damage_file(done, total, figures):
        if done == 2:
            size = paths[0].stat().st_size
            with paths[0].open("r+b") as file:
                file.truncate(200) if damage == "cut" else file.write(b"\0" * size)

    learned_beside_damage = learned(
        paths, buffers="average", place="memory", on_progress=damage_file
    )
    assert torch.equal(learned_beside_damage.alpha, learned(items, buffers="average").alpha)
    assert all(bool(tensor.isfinite().all()) for tensor in learned_beside_damage.tracked.values())


def test_tracked_statistics_require_a_learned_soup():
    items = [perturbed(load_model("resnet9:width=2", channels=1), seed, 0.1) for seed in range(2)]
    with pytest.raises(RequestError, match="tracked"):
        mix(items, [0.5, 0.5], buffers="tracked")


def test_coefficients_are_refused_as_an_ingredient(tmp_path):
    path = Coefficients.of([0.5, 0.5]).save(tmp_path / "alpha.safetensors")
    for read in (Checkpoint.load, Checkpoint.open):
        with pytest.raises(
            CheckpointError, match=r"alpha\.safetensors: holds coefficients.*--coefficients"
        ):
            read(path)


def test_the_error_for_a_sparse_tensor_names_it(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(CheckpointError, match=r"sparse\.pt.*a tensor that is sparse"):
        Checkpoint.load(tmp_path / "sparse.pt")


def test_an_eight_bit_float_file_is_read(tmp_path):
    tensors = {"w": torch.randn(6).to(torch.float8_e4m3fn)}
    torch.save(tensors, tmp_path / "small.pt")
    Checkpoint(tensors, {}).save(tmp_path / "small.safetensors")
    for name in ("small.pt", "small.safetensors"):
        for read in (Checkpoint.load, Checkpoint.open):
            assert torch.equal(read(tmp_path / name).tensors["w"].float(), tensors["w"].float())


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": torch.ones(3), "n.num_batches_tracked": torch.tensor(0)},
        {"w": torch.ones(3), "n.running_var": torch.ones(3)},
        {
            "w": torch.ones(3),
            "n.running_mean": torch.ones(3),
            "n.num_batches_tracked": torch.tensor(0),
        },
    ],
)
def test_check_accepts_incomplete_batchnorm_statistics(tensors):
    result = check([Checkpoint(tensors, {}), Checkpoint({**tensors, "w": torch.zeros(3)}, {})])
    assert result.statistics is not None


@pytest.mark.parametrize(
    "wrong", [{"lr": float("inf")}, {"buffers": "recalibrate-adversarial", "threat": "clean"}]
)
def test_learning_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RequestError):
        learned(
            [perturbed(load_model("resnet9:width=2", channels=1), s, 0.1) for s in range(2)],
            **wrong,
        )


def test_coefficients_of_other_layers_are_refused():
    net, items = odd_ingredients("plain")
    with pytest.raises(CoefficientError, match="none for layer first"):
        mix(
            items,
            Coefficients(torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64), ("other",)),
            network=net,
        )


class WithoutMode(Odd):
    """Overrides train without the argument by which PyTorch chooses eval mode."""

    def train(self):
        super().train()
        self.norm.eval()
        return self


@pytest.mark.parametrize(
    "function", ["apgd", "evaluate", "train", "learn", "mix", "merge", "check"]
)
def test_a_train_without_a_mode_is_refused_in_one_line(function):
    items = odd_ingredients("plain")[1]
    network, uniform = WithoutMode("plain"), [1 / 3] * 3
    calls = {
        "apgd": lambda: apgd(network, to_float(DATA.images), DATA.labels, LINF, steps=1),
        "evaluate": lambda: evaluate(network, DATA, [LINF], steps=1),
        "train": lambda: train(network, DATA, threat=LINF, epochs=1, device="cpu"),
        "learn": lambda: learned(items, network=network, epochs=1),
        "mix": lambda: mix(
            items, uniform, buffers="recalibrate", calibrate_on=DATA, network=network
        ),
        "merge": lambda: merge(items, "regmean", uniform, data=DATA, threat=LINF, network=network),
        "check": lambda: check(items, data=DATA, network=network),
    }
    with pytest.raises(ModelError, match=r"must take mode=True") as caught:
        calls[function]()
    assert "\n" not in str(caught.value)


def _own_method(name, method):
    return type("Own", (Odd,), {name: method})("plain")


def test_a_method_to_without_a_memory_format_is_left_alone():
    network = _own_method("to", lambda self, device: self)
    assert evaluate(network, DATA, [LINF], steps=1, device="cpu").accuracy["clean"].n == len(DATA)


@pytest.mark.parametrize(
    ("name", "method", "text"),
    [
        ("state_dict", lambda self: {}, r"state_dict cannot be read: .*keep_vars.* take the arg"),
        ("forward", lambda self, x: Odd.forward(self, x).to_sparse(), "expected dense logits"),
    ],
)
def test_other_methods_of_the_users_own_end_in_one_line(name, method, text):
    with pytest.raises(ModelError, match=text):
        train(_own_method(name, method), DATA, threat=LINF, epochs=1, device="cpu")
