"""The built-in networks: sizes, tensor names, and equality with the published definitions."""

import importlib.util
import re
from functools import cache

import pytest
import torch
from ingredients import perturbed
from markers import model_zoo, needs_robustbench
from torch import nn

from robustsoup.attacks.folding import fold_batchnorm
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main
from robustsoup.data import load_data
from robustsoup.errors import ModelError
from robustsoup.evaluation.evaluate import evaluate
from robustsoup.models import load_model
from robustsoup.models.wide_resnet import PUBLISHED_MEAN, PUBLISHED_STD
from robustsoup.soups.batchnorm import recalibrate
from robustsoup.soups.mixing import mix
from robustsoup.training.train import train

DATA = load_data("digits")
SMALL = {
    "resnet9": "resnet9:width=4",
    "resnet18": "resnet18:width=4",
    "resnet50": "resnet50:width=2",
    "wide_resnet": "wide_resnet:depth=10,width=2",
    "preact_resnet18": "preact_resnet18:width=4",
}
PREACTIVATED = ("wide_resnet", "preact_resnet18")


def randomised(model, seed=0):
    """The network in eval mode with statistics and BatchNorm weights that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.num_batches_tracked.fill_(7)
    return model.eval()


def images(n=2, channels=3, size=32):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model, x):
    return model.eval()(x)


# sizes and names


@pytest.mark.parametrize(
    ("spec", "numbers", "named"),
    [
        ("resnet9", 6_573_120, 25),
        ("resnet18", 11_173_962, 62),
        ("resnet50", 23_520_842, 161),
        ("wide_resnet", 36_479_194, 80),
        ("preact_resnet18", 12_548_426, 56),
        ("wide_resnet:depth=16,width=4", 2_748_890, 44),
    ],
)
def test_parameters_are_as_published(spec, numbers, named):
    parameters = dict(load_model(spec).named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == numbers
    assert len(parameters) == named


def test_a_wide_resnet_has_the_names_of_the_published_files():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {
        "init_conv.weight",
        "logits.weight",
        "logits.bias",
        *(f"batchnorm.{kind}" for kind in norm),
    }
    for group in range(3):
        expected.add(f"layer.{group}.block.0.shortcut.weight")
        for block in range(4):
            start = f"layer.{group}.block.{block}"
            expected |= {f"{start}.conv_{i}.weight" for i in range(2)}
            expected |= {f"{start}.batchnorm_{i}.{kind}" for i in range(2) for kind in norm}
    assert set(load_model("wide_resnet:width=2").state_dict()) == expected


def test_a_shortcut_of_a_wide_resnet_is_only_where_channels_change():
    names = load_model("wide_resnet:depth=10,width=1").state_dict()
    assert [name for name in names if "shortcut" in name] == [
        f"layer.{g}.block.0.shortcut.weight" for g in (1, 2)
    ]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_images_become_logits(name, channels, size):
    model = load_model(SMALL[name], channels=channels, classes=7)
    assert logits(model, images(3, channels, size)).shape == (3, 7)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("resnet9:width=0", "width: got 0, expected an integer from 1 to 65,536"),
        ("resnet18:width=x", "width: got x"),
        ("wide_resnet:width=1.5", "width: got 1.5"),
        ("resnet9:width=8,width=4", "got width twice"),
    ],
)
def test_sizes_that_no_network_has_are_refused(spec, text):
    with pytest.raises(ModelError, match=re.escape(text)):
        load_model(spec)


@pytest.mark.parametrize("depth", [4, 9, 27])
def test_a_wide_resnet_of_an_impossible_depth_is_refused(depth):
    with pytest.raises(ModelError, match=rf"depth: got {depth}, expected 10, 16, 22, 28"):
        load_model(f"wide_resnet:depth={depth}")


@pytest.mark.parametrize("name", PREACTIVATED)
def test_the_momentum_of_batchnorm_is_an_option(name):
    for text, momentum in (("", 0.1), (",bn_momentum=0.01", 0.01)):
        model = load_model(SMALL[name] + text)
        assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {momentum}


# normalisation: in the code, where the published files do not hold it


@pytest.mark.parametrize("name", PREACTIVATED)
def test_the_published_constants_are_used_and_not_stored(name):
    model = load_model(SMALL[name])
    assert model.normalize.mean.flatten().tolist() == pytest.approx(PUBLISHED_MEAN)
    assert model.normalize.std.flatten().tolist() == pytest.approx(PUBLISHED_STD)
    assert not [key for key in model.state_dict() if "normalize" in key]
    assert model.network_settings.normalize is None
    explicit = load_model(SMALL[name], mean=PUBLISHED_MEAN, std=PUBLISHED_STD)
    assert explicit.network_settings == model.network_settings


@pytest.mark.parametrize("name", PREACTIVATED)
@pytest.mark.parametrize(
    "given",
    [
        {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4)},
        {
            "normalize": ((0.3, 0.4, 0.5), (0.2, 0.3, 0.4)),
            "mean": PUBLISHED_MEAN,
            "std": PUBLISHED_STD,
        },
    ],
)
def test_other_constants_are_recorded_and_come_back(name, given, tmp_path):
    model = randomised(load_model(SMALL[name], **given))
    assert model.normalize.mean.flatten().tolist() == pytest.approx([0.3, 0.4, 0.5])
    path = Checkpoint.of(model).save(tmp_path / "model.safetensors")
    reloaded = Checkpoint.load(path).network()
    assert torch.equal(logits(reloaded, images()), logits(model, images()))
    assert not torch.equal(logits(load_model(SMALL[name]), images()), logits(model, images()))


@pytest.mark.parametrize("name", PREACTIVATED)
def test_published_constants_given_as_normalize_are_applied_once(name):
    plain = load_model(SMALL[name])
    outside = load_model(SMALL[name], normalize=(PUBLISHED_MEAN, PUBLISHED_STD))
    assert torch.equal(logits(plain, images()), logits(outside, images()))


@pytest.mark.parametrize("name", PREACTIVATED)
def test_a_network_trained_on_other_data_keeps_its_constants(name, tmp_path):
    record = DATA.record
    model = load_model(SMALL[name], channels=1, mean=record["mean"], std=record["std"])
    trained = train(
        model, DATA.train.first(64), threat="clean", epochs=1, batch_size=32, lr=0.1, device="cpu"
    )
    loaded = Checkpoint.load(trained.save(tmp_path / "model.safetensors")).network()
    assert loaded.normalize.mean.flatten().tolist() == pytest.approx(record["mean"])
    assert loaded.normalize.std.flatten().tolist() == pytest.approx(record["std"])


def test_the_train_command_records_the_constants_of_the_data(tmp_path):
    path = tmp_path / "wide.safetensors"
    options = "--model wide_resnet:depth=10,width=1 --data digits --threat clean --epochs 1"
    with pytest.raises(SystemExit) as end:
        main(["train", *options.split(), "--device", "cpu", "-o", str(path)])
    assert end.value.code == 0
    network = Checkpoint.load(path).provenance["network"]
    assert network["normalize"] == [DATA.record["mean"], DATA.record["std"]]


def test_constants_of_another_number_are_refused():
    with pytest.raises(ModelError, match=r"normalize: got mean \[0\.5\] and std \[0\.2, 0\.3\]"):
        load_model(SMALL["wide_resnet"], normalize=([0.5], [0.2, 0.3]))


# they train, fold, mix


@pytest.mark.parametrize("name", ["resnet50", *PREACTIVATED])
def test_a_step_of_training_in_bfloat16(name):
    base = load_model(SMALL[name], channels=1)
    options = {"batch_size": 16, "lr": 0.1, "device": "cpu", "precision": "bfloat16"}
    trained = train(base, DATA.train.first(32), threat="Linf 8/255", epochs=1, **options)
    assert trained.provenance["training"]["precision"] == "bfloat16"
    assert all(tensor.isfinite().all() for tensor in trained.tensors.values())
    moved = [
        name
        for name in trained.parameters
        if not torch.equal(trained.tensors[name], base.state_dict()[name])
    ]
    assert len(moved) == len(trained.parameters)


@pytest.mark.parametrize("name", ["resnet50", *PREACTIVATED])
def test_channels_last_gives_the_same_logits(name):
    model = randomised(load_model(SMALL[name]))
    x = images(4)
    got = logits(model, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, logits(model, x), rtol=1e-4, atol=1e-6)


def batchnorms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        ("resnet50:width=2", 0),
        ("wide_resnet:depth=16,width=2", 6),
        ("wide_resnet:depth=10,width=1", 4),
        ("preact_resnet18:width=4", 9),
    ],
)
def test_batchnorm_after_a_convolution_is_folded(spec, left):
    """A BatchNorm before a convolution stays: the first of each block and the last."""
    model = randomised(load_model(spec))
    x = images(16)
    light = fold_batchnorm(model, x[:8])
    assert batchnorms(light) == left < batchnorms(model)
    torch.testing.assert_close(logits(light, x), logits(model, x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet50", *PREACTIVATED])
def test_built_in_networks_can_be_mixed(name):
    net = randomised(load_model(SMALL[name]))
    items = [Checkpoint.of(net), perturbed(net, 1)]
    one_hot = mix(items, [0.0, 1.0], buffers="average")
    assert one_hot.digest == items[1].digest
    soup = mix(items, [0.5, 0.5], buffers="average").network()
    for key, got in soup.named_parameters():
        torch.testing.assert_close(got.data, sum(item.tensors[key] for item in items) / 2, msg=key)


# against RobustBench's definitions


@cache
def deepmind():
    """RobustBench's module of these networks, loaded by path: the package needs torchvision."""
    spec = importlib.util.spec_from_file_location(
        "dm_wide_resnet", model_zoo() / "architectures" / "dm_wide_resnet.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPINGS = {
    "nothing": lambda state: state,
    "DataParallel": lambda state: under("module.", state),
    "state_dict": lambda state: {"state_dict": under("module.", state), "epoch": 3},
    "model": lambda state: under("model.", state),
    "Wang": lambda state: {
        key: under("module.0.", state)
        for key in ("model_state_dict", "unaveraged_model_state_dict")
    },
    "no counters": lambda state: {
        name: tensor for name, tensor in state.items() if "num_batches" not in name
    },
}
REFERENCES = {
    "wide_resnet": lambda act: deepmind().DMWideResNet(activation_fn=act),
    "wide_resnet:depth=16,width=2": lambda act: deepmind().DMWideResNet(
        depth=16, width=2, activation_fn=act
    ),
    "wide_resnet:depth=10,width=1": lambda act: deepmind().DMWideResNet(
        depth=10, width=1, activation_fn=act
    ),
    "preact_resnet18": lambda act: deepmind().DMPreActResNet(activation_fn=act),
}


@needs_robustbench
@pytest.mark.parametrize(
    ("spec", "wrapping"),
    [
        ("wide_resnet", "Wang"),
        ("preact_resnet18", "DataParallel"),
        ("wide_resnet:depth=10,width=1", "nothing"),
        *(("wide_resnet:depth=16,width=2", wrapping) for wrapping in WRAPPINGS),
    ],
)
def test_the_logits_are_those_of_robustbench(spec, wrapping, tmp_path):
    reference = randomised(REFERENCES[spec](nn.SiLU))
    path = tmp_path / "published.pt"
    torch.save(WRAPPINGS[wrapping](reference.state_dict()), path)
    ours = Checkpoint.load(path).network(spec)
    assert torch.equal(logits(ours, images()), logits(reference, images()))


@needs_robustbench
@pytest.mark.parametrize("spec", list(REFERENCES)[1:])
def test_the_swish_of_robustbench_differs_only_in_rounding(spec):
    """Gowal et al.'s networks compute SiLU as x * sigmoid(x)."""
    reference = randomised(REFERENCES[spec](deepmind().Swish))
    ours = load_model(spec)
    ours.load_state_dict(reference.state_dict())
    torch.testing.assert_close(
        logits(ours, images()), logits(reference, images()), rtol=1e-5, atol=1e-6
    )


# files without BatchNorm's counters, as those from before PyTorch 0.4.1


def without_counters(model, path):
    state = {
        name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name
    }
    torch.save({"state_dict": under("module.", state)}, path)
    return path


@pytest.mark.parametrize("name", ["resnet9", "wide_resnet"])
def test_a_file_without_counters_is_loaded_mixed_and_saved(name, tmp_path):
    models = [randomised(load_model(SMALL[name], channels=1), seed) for seed in range(2)]
    paths = [
        without_counters(model, tmp_path / f"{number}.pth") for number, model in enumerate(models)
    ]
    items = [Checkpoint.load(path) for path in paths]
    network = items[1].network(SMALL[name], channels=1)
    assert torch.equal(logits(network, images(2, 1, 8)), logits(models[1], images(2, 1, 8)))
    described = [item.with_parameters_of(network) for item in items]
    assert described[0].parameters == [key for key, _ in network.named_parameters()]
    soup = mix(described, [0.5, 0.5], buffers="average", network=network)
    soup.save(tmp_path / "soup.pth")
    assert set(torch.load(tmp_path / "soup.pth")["state_dict"]) == set(
        torch.load(paths[0])["state_dict"]
    )
    soup.load_into(network)
    assert recalibrate(network, DATA.train.first(64), samples=64)
    assert evaluate(network, DATA.test, [], samples=8, device="cpu").accuracy["clean"].n == 8


def test_a_file_that_lacks_more_than_counters_is_refused(tmp_path):
    model = load_model(SMALL["wide_resnet"])
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("running_var")
    }
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(
        ModelError,
        match=r"half\.pth: .*running_var: the network has this tensor, the file does not",
    ):
        Checkpoint.load(tmp_path / "half.pth").network(SMALL["wide_resnet"])
