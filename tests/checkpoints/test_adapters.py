"""LoRA adapters as ingredients: merged into their base before anything is mixed."""

import json
import math

import pytest
import torch
from hub_server import serving_hub
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import main
from robustsoup.errors import CheckpointError
from robustsoup.recipes import load_recipe
from robustsoup.soups.mixing import mix

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "use_rslora": False}


def make_base():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (4, 1, 3, 3),
        "conv.bias": (4,),
        "mid.weight": (5, 4),
        "mid.bias": (5,),
        "head.weight": (3, 5),
        "head.bias": (3,),
        "table.weight": (7, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_factors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "mid.lora_A.weight": (2, 4),
        "mid.lora_B.weight": (5, 2),
        "conv.lora_A.weight": (2, 1, 3, 3),
        "conv.lora_B.weight": (4, 2, 1, 1),
    }
    return {
        f"base_model.model.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def write_adapter(folder, factors, base="../base.safetensors", **config):
    folder.mkdir()
    Checkpoint(factors).save(folder / "adapter_model.safetensors")
    content = CONFIG | {"base_model_name_or_path": base} | config
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def base(tmp_path):
    tensors = make_base()
    Checkpoint(tensors, {"parameters": list(tensors)}).save(tmp_path / "base.safetensors")
    return tensors


def test_the_product_is_added_to_linear_and_convolution_weights(base, tmp_path):
    factors = make_factors()
    merged = Checkpoint.load(write_adapter(tmp_path / "a", factors))
    a, b = (factors[f"base_model.model.mid.lora_{letter}.weight"] for letter in "AB")
    assert torch.allclose(merged.tensors["mid.weight"], base["mid.weight"] + 3 * (b @ a))
    a, b = (factors[f"base_model.model.conv.lora_{letter}.weight"] for letter in "AB")
    delta = 3 * torch.einsum("orxy,rihw->oihw", b, a)
    assert torch.allclose(merged.tensors["conv.weight"], base["conv.weight"] + delta)
    for name in ("mid.bias", "head.weight", "head.bias", "conv.bias"):
        assert torch.equal(merged.tensors[name], base[name])
    assert merged.parameters == list(base)
    parent = Checkpoint.load(tmp_path / "base.safetensors")
    assert merged.provenance["parents"] == [{"digest": parent.digest, "file": "base.safetensors"}]


def test_the_scale(base, tmp_path):
    plain = Checkpoint.load(write_adapter(tmp_path / "a", make_factors()))
    rslora = Checkpoint.load(write_adapter(tmp_path / "b", make_factors(), use_rslora=True))
    pattern = {"alpha_pattern": {"mid": 12, "^conv": 24}}
    by_module = Checkpoint.load(write_adapter(tmp_path / "c", make_factors(), **pattern))
    for name, factor in (("mid.weight", 2), ("conv.weight", 4)):
        delta = plain.tensors[name] - base[name]
        assert torch.allclose(rslora.tensors[name] - base[name], delta * math.sqrt(2), atol=1e-5)
        assert torch.allclose(by_module.tensors[name] - base[name], delta * factor, atol=1e-5)


def test_transposed_weights_and_embeddings(base, tmp_path):
    Checkpoint(base | {"mid.weight": base["mid.weight"].T}).save(tmp_path / "base.safetensors")
    factors = {"mid.lora_A.weight": torch.randn(2, 4), "mid.lora_B.weight": torch.randn(5, 2)}
    merged = Checkpoint.load(write_adapter(tmp_path / "a", factors, fan_in_fan_out=True))
    delta = 3 * (factors["mid.lora_B.weight"] @ factors["mid.lora_A.weight"])
    assert torch.allclose(merged.tensors["mid.weight"], (base["mid.weight"] + delta).T, atol=1e-5)
    a, b = torch.randn(2, 7), torch.randn(4, 2)
    factors = {"table.lora_embedding_A": a, "table.lora_embedding_B": b}
    merged = Checkpoint.load(write_adapter(tmp_path / "b", factors))
    assert torch.allclose(merged.tensors["table.weight"], base["table.weight"] + 3 * (b @ a).T)


def test_biases_and_modules_that_are_saved_in_full(base, tmp_path):
    factors = make_factors() | {
        "base_model.model.mid.base_layer.bias": torch.full((5,), 9.0),
        "base_model.model.head.weight": torch.zeros(8, 5),
        "base_model.model.head.bias": torch.ones(8),
    }
    folder = write_adapter(tmp_path / "a", factors, bias="lora_only", modules_to_save=["head"])
    merged = Checkpoint.load(folder)
    assert merged.tensors["mid.bias"].tolist() == [9.0] * 5
    assert merged.tensors["head.weight"].shape == (8, 5)
    folder = write_adapter(tmp_path / "b", factors, bias="lora_only")
    with pytest.raises(CheckpointError, match=r"head\.\w+: the base has no such tensor"):
        Checkpoint.load(folder)


def test_low_precision_is_rounded_once(base, tmp_path):
    half = {name: tensor.half() for name, tensor in base.items()}
    Checkpoint(half).save(tmp_path / "base.safetensors")
    factors = make_factors()
    merged = Checkpoint.load(write_adapter(tmp_path / "a", factors))
    a, b = (factors[f"base_model.model.mid.lora_{letter}.weight"] for letter in "AB")
    exact = half["mid.weight"].float() + 3 * (b @ a)
    assert merged.tensors["mid.weight"].dtype == torch.float16
    assert torch.equal(merged.tensors["mid.weight"], exact.half())


def test_a_soup_of_adapters_averages_the_merged_weights(base, tmp_path):
    folders = [write_adapter(tmp_path / str(seed), make_factors(seed)) for seed in (1, 2)]
    soup = mix(folders, [0.25, 0.75])
    one, two = (Checkpoint.load(folder).tensors for folder in folders)
    for name in base:
        assert torch.allclose(soup.tensors[name], 0.25 * one[name] + 0.75 * two[name], atol=1e-6)
    factors = [make_factors(seed) for seed in (1, 2)]
    mean = {name: 0.25 * factors[0][name] + 0.75 * factors[1][name] for name in factors[0]}
    of_factors = Checkpoint.load(write_adapter(tmp_path / "mean", mean))
    assert not torch.allclose(of_factors.tensors["mid.weight"], soup.tensors["mid.weight"])


def test_a_base_below_a_prefix_and_a_base_that_is_named(base, tmp_path):
    other = {f"backbone.{name}": 2 * tensor for name, tensor in base.items()}
    folder = write_adapter(tmp_path / "a", make_factors())
    loaded = Checkpoint.load(folder / "adapter_model.safetensors", adapter_base=other)
    plain = Checkpoint.load(folder)
    delta = plain.tensors["mid.weight"] - base["mid.weight"]
    expected = 2 * base["mid.weight"] + delta
    assert torch.allclose(loaded.tensors["backbone.mid.weight"], expected, atol=1e-5)
    assert loaded.digest != plain.digest


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora: got True, which robustsoup does not merge"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"lora_bias": True}, "lora_bias: got True"),
        ({"invented_later": {"x": 1}}, "invented_later"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', expected LORA"),
        ({"r": 0}, "r: got 0, expected a number above 0"),
        ({"r": 3}, "expected rank 3"),
        (
            {"base": "absent.safetensors"},
            r"absent\S+ is not on this machine; set --adapter-base",
        ),
        ({"base": None}, "none is named; set --adapter-base"),
        ({"base": "../hostile\x1b.safetensors"}, r"hostile\\x1b\.safetensors is not on this"),
    ],
)
def test_what_is_not_understood_is_refused(base, tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(write_adapter(tmp_path / "a", make_factors(), **config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mid.lora_magnitude_vector": torch.ones(5)}, "is not understood"),
        ({"mid.lora_B.weight": None}, "expected one factor A and one factor B"),
        ({"mid.lora_B.weight": torch.ones(6, 2)}, "for a weight of shape"),
        ({"mid.lora_A.weight": torch.ones(2)}, "got factors of shapes"),
        (
            {"absent.lora_A.weight": torch.ones(2, 4)},
            r"adapts absent.weight, which its base lacks; .* transformers 5 name .*peft",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(base, tmp_path, changes, message):
    factors = make_factors()
    for name, tensor in changes.items():
        factors.pop(f"base_model.model.{name}", None)
        if tensor is not None:
            factors[f"base_model.model.{name}"] = tensor
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(write_adapter(tmp_path / "a", factors))


def test_commands_take_adapter_folders(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        write_adapter(tmp_path / f"a{seed}", make_factors(seed))
    with pytest.raises(SystemExit) as end:
        main(["mix", "a1", "a2", "-o", "soup.safetensors"])
    assert end.value.code == 0
    assert "a1: merged into its base, base.safetensors" in capsys.readouterr().err
    expected = mix(["a1", "a2"], [0.5, 0.5])
    assert Checkpoint.load("soup.safetensors").digest == expected.digest


def write_named_base(folder):
    """Write twice the base into a folder, as `save_pretrained` does, and return its tensors."""
    doubled = {name: 2 * tensor for name, tensor in make_base().items()}
    folder.mkdir()
    Checkpoint(doubled).save(folder / "model.safetensors")
    (folder / "optimizer.pt").write_bytes(b"left alone")
    return doubled


def test_the_base_of_the_command_replaces_that_of_the_files(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a1", make_factors(1))
    write_adapter(tmp_path / "a2", make_factors(2), base="org/absent")
    doubled = write_named_base(tmp_path / "doubled")
    words = ["mix", "a1", "a2", "doubled", "--adapter-base", "doubled", "-o", "soup.safetensors"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0, capsys.readouterr().err
    adapters = [Checkpoint.load(name, adapter_base="doubled") for name in ("a1", "a2")]
    expected = mix([*adapters, "doubled"], [1 / 3, 1 / 3, 1 / 3])
    soup = Checkpoint.load("soup.safetensors")
    assert soup.digest == expected.digest
    assert torch.equal(soup.tensors["head.bias"], doubled["head.bias"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["show", "a2", "--adapter-base", "doubled", "--json"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["digest"] == adapters[1].digest


def test_a_base_without_an_adapter_is_refused(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["mix", "base.safetensors", "base.safetensors", "--adapter-base", "base.safetensors"]
    with pytest.raises(SystemExit) as end:
        main([*words, "-o", "soup.safetensors"])
    assert end.value.code == 2
    assert "adapter_base: none of the checkpoints is a LoRA adapter" in capsys.readouterr().err


def test_a_hub_name_in_a_local_adapter_is_not_downloaded(base, tmp_path, monkeypatch):
    def refuse(address, **_):
        raise AssertionError(f"{address} was asked for")

    monkeypatch.setattr("robustsoup.checkpoints.remote.copy_remote", refuse)
    folder = write_adapter(tmp_path / "a", make_factors(), base="org/base")
    with pytest.raises(CheckpointError, match="org/base is not on this machine; set --ad"):
        Checkpoint.load(folder)


def test_a_recipe_names_the_base(tmp_path):
    (tmp_path / "inner").mkdir()
    write_adapter(tmp_path / "a", make_factors(), base="org/absent")
    write_named_base(tmp_path / "inner" / "doubled")
    text = 'name = "x"\ndata = "digits"\nadapter_base = "doubled"\n[ingredients]\na = "../a"\n'
    (tmp_path / "inner" / "recipe.toml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "inner" / "recipe.toml")
    opened = recipe.opening.open(recipe.ingredients["a"].checkpoint)
    expected = Checkpoint.load(tmp_path / "a", adapter_base=tmp_path / "inner" / "doubled")
    assert opened.digest == expected.digest


def test_a_folder_is_read_as_a_repository_is(tmp_path):
    doubled = write_named_base(tmp_path / "doubled")
    assert Checkpoint.load(tmp_path / "doubled").digest == Checkpoint(doubled).digest
    Checkpoint(doubled).save(tmp_path / "doubled" / "other.pth")
    (tmp_path / "doubled" / "model.safetensors").rename(tmp_path / "doubled" / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 3 checkpoints .*; name one: "):
        Checkpoint.load(tmp_path / "doubled")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: got a folder that holds no checkpoint"):
        Checkpoint.load(tmp_path / "empty")


class Net(nn.Module):
    """A network with a convolution, BatchNorm and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mid = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.mid(x)))


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["mid", "conv"]},
        {"target_modules": ["mid"], "use_rslora": True, "bias": "lora_only"},
        {"target_modules": ["mid"], "modules_to_save": ["head", "norm"]},
        {
            "target_modules": ["mid", "head"],
            "rank_pattern": {"mid": 2},
            "alpha_pattern": {"head": 32},
            "bias": "all",
        },
    ],
)
def test_the_merge_is_that_of_peft(tmp_path, options):
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Net()
        torch.save(network.state_dict(), tmp_path / "base.pth")
        adapted = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, **options))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    loaded = Checkpoint.load(tmp_path / "adapter", adapter_base=tmp_path / "base.pth")
    assert loaded.tensors.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(loaded.tensors[name], tensor, atol=1e-6), name


@pytest.mark.extras
def test_an_adapter_of_the_hub_brings_its_base(base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_adapter(tmp_path / "a", make_factors(), base="org/base")
    expected = Checkpoint.load(folder, adapter_base=tmp_path / "base.safetensors")
    with serving_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for file in folder.iterdir():
            hub.files["org/adapter", file.name] = file.read_bytes()
        hub.files["org/base", "model.safetensors"] = (tmp_path / "base.safetensors").read_bytes()
        assert Checkpoint.load("hf://org/adapter").digest == expected.digest


def test_adapters_that_are_their_own_base_are_refused(tmp_path):
    for name, base in (("a", "../b"), ("b", "../a"), ("c", "../c")):
        write_adapter(tmp_path / name, make_factors(), base=base)
    for name in "ac":
        with pytest.raises(CheckpointError, match="the adapter is its own base; set --adapter-b"):
            Checkpoint.load(tmp_path / name)


def test_factors_that_are_quantized_are_refused(base, tmp_path):
    factors = {name: factor.to(torch.int8) for name, factor in make_factors().items()}
    with pytest.raises(CheckpointError, match="got integers, expected factors from before quant"):
        Checkpoint.load(write_adapter(tmp_path / "a", factors))


@pytest.mark.parametrize("module", ["mid", "head"])
def test_a_base_that_ties_an_adapted_weight_is_refused(tmp_path, module):
    tensors = make_base()
    tensors |= {f"{name}_copy.weight": tensors[f"{name}.weight"] for name in ("mid", "head")}
    torch.save(tensors, tmp_path / "base.pth")
    factors = {name: t for name, t in make_factors().items() if "conv" in name or module == "mid"}
    if module == "head":
        factors["base_model.model.head.weight"] = torch.ones(3, 5)
    folder = write_adapter(tmp_path / "a", factors, base="../base.pth", modules_to_save=["head"])
    text = rf"changes {module}\.weight, but {module}.* are one weight in the base"
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_base_is_refused(tmp_path, dtype):
    tensors = make_base()
    for name in ("mid.weight", "head.weight"):
        tensors[name] = tensors[name].to(dtype)
    Checkpoint(tensors).save(tmp_path / "base.safetensors")
    saved = {name: t for name, t in make_factors().items() if "conv" in name}
    saved["base_model.model.head.weight"] = torch.ones(3, 5)
    for number, (name, factors) in enumerate({"mid": make_factors(), "head": saved}.items()):
        folder = write_adapter(tmp_path / str(number), factors, modules_to_save=["head"])
        text = rf"{name}\.weight is {str(dtype).removeprefix('torch.')} in the base.*before quant"
        with pytest.raises(CheckpointError, match=text):
            Checkpoint.load(folder)
