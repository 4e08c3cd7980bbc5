"""Files of other programs: names are fitted, sets are chosen, and what cannot be read is named."""

import argparse
import datetime
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.fitting import fit_names
from robustsoup.checkpoints.opening import Opening
from robustsoup.checkpoints.weight_sets import read_versions
from robustsoup.checkpoints.wrapping import soup_ending
from robustsoup.diagnosis.check import check
from robustsoup.errors import CheckpointError, IngredientMismatch, ModelError, RequestError
from robustsoup.models import load_model
from robustsoup.models.normalize import normalize_inputs
from robustsoup.soups.constants import describe_differing_constants
from robustsoup.soups.mixing import mix


class Net(nn.Module):
    """A network with BatchNorm and a head that is tied to a second one."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.head, self.tied = nn.Linear(2, 3), nn.Linear(2, 3)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def prefixed(prefix, state=None):
    state = network().state_dict() if state is None else state
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def check_fits(checkpoint, seed=0):
    """Check that a checkpoint loads into a network, and return it under the network's names."""
    fresh = Net()
    checkpoint.load_into(fresh)
    for name, tensor in network(seed).state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    return checkpoint.with_names_of(fresh)


PREFIXES = ["_orig_mod.", "module._orig_mod.", "net.", "model.net.", "backbone.0.", "a.b.c.d."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_any_chain_of_prefixes_is_fitted(tmp_path, prefix, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".pth":
        torch.save({"weights of mine": prefixed(prefix), "n": 1}, path)
    else:
        save_file(prefixed(prefix), path)
    read = Checkpoint.load(path)
    assert check_fits(read).digest == read.digest


def test_parts_of_wrappers_within_names_are_looked_through(tmp_path):
    state = network().state_dict()
    for part in ("_orig_mod", "_fsdp_wrapped_module", "module"):
        inner = {name.replace("conv.", f"conv.{part}."): t for name, t in state.items()}
        torch.save(inner, tmp_path / "a.pth")
        check_fits(Checkpoint.load(tmp_path / "a.pth"))


def test_a_network_may_have_a_prefix_that_the_file_lacks():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"net": Net()})

    outer = Outer()
    Checkpoint(network().state_dict()).load_into(outer)
    assert torch.equal(outer.inner["net"].conv.weight, network().conv.weight)


SURPLUS = {
    "n_averaged": lambda: AveragedModel(network()).state_dict(),
    "criterion.weight": lambda: prefixed("model.") | {"criterion.weight": torch.ones(3)},
    "module.normalizer.mean": lambda: (
        prefixed("module.model.") | {"module.normalizer.mean": torch.zeros(1)}
    ),
    "conv.total_ops": lambda: prefixed("") | {"conv.total_ops": torch.ones(1)},
    "bn.index": lambda: prefixed("") | {"bn.index": torch.arange(3)},
}


@pytest.mark.parametrize("names", [("0.mean", "0.std"), ("normalizer.mu", "normalizer.sigma")])
def test_constants_that_are_set_aside_are_given_for_normalize(tmp_path, names):
    values = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([0.25, 0.5, 0.75])
    constants = {name: value.view(1, 3, 1, 1) for name, value in zip(names, values, strict=True)}
    torch.save(prefixed("1.") | constants, tmp_path / "a.pth")
    read = Checkpoint.load(tmp_path / "a.pth").with_names_of(Net())
    assert read.notes[-1].endswith("give --normalize 0.5,0.25,0.125 0.25,0.5,0.75")
    assert read.with_names_of(Net()).notes == read.notes
    normalising = normalize_inputs(Net(), [0.5], [0.5])
    fitted = Checkpoint.load(tmp_path / "a.pth").with_names_of(normalising)
    assert "--normalize" not in " ".join(fitted.notes)


def test_constants_that_change_nothing_are_set_aside_without_advice(tmp_path):
    neutral = {"norm.mean": torch.zeros(3), "norm.std": torch.ones(3)}
    torch.save(prefixed("model.") | neutral, tmp_path / "a.pth")
    (note,) = Checkpoint.load(tmp_path / "a.pth").with_names_of(Net()).notes
    assert "set aside norm.mean, norm.std" in note


@pytest.mark.parametrize("name", SURPLUS)
def test_surplus_entries_are_set_aside_and_named(tmp_path, name):
    torch.save({"state_dict": SURPLUS[name]()}, tmp_path / "a.ckpt")
    read = check_fits(Checkpoint.load(tmp_path / "a.ckpt"))
    assert set(read.tensors) == set(Net().state_dict())
    assert read.notes == (f"a.ckpt: set aside {name}: the network lacks them",)
    saved = torch.load(read.save(tmp_path / "b.ckpt"))["state_dict"]
    assert saved.keys() == SURPLUS[name]().keys()


def test_a_deeper_network_is_not_cut_down():
    deep = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ModelError, match="the file has this tensor"):
        Checkpoint.of(deep).load_into(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    state = prefixed("") | {"conv.second.weight": torch.ones(2)}
    with pytest.raises(ModelError, match=r"conv\.second\.weight: the file has this tensor"):
        Checkpoint(state).load_into(Net())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("spec", ["resnet18:width=2", "resnet9:width=2"])
def test_a_built_in_network_takes_files_without_constants_of_normalisation(tmp_path, spec, prefix):
    state = load_model(spec, mean=[0.5] * 3, std=[0.25] * 3).state_dict()
    constants = {"normalize.mean": 0, "normalize.std": 1}
    foreign = {name: tensor for name, tensor in state.items() if name not in constants}
    torch.save({"net": prefixed(prefix, foreign)}, tmp_path / "a.pth")
    checkpoint = Checkpoint.load(tmp_path / "a.pth").with_network(spec)
    filled = checkpoint.network()
    for name, tensor in filled.state_dict().items():
        expected = torch.full_like(tensor, constants[name]) if name in constants else state[name]
        assert torch.equal(tensor, expected)
    described = checkpoint.with_parameters_of(filled)
    assert "parameters" in described.provenance
    note = "a.pth: has no normalize.mean, normalize.std: the network's inputs are not normalised"
    assert described.notes[-1].startswith(note)
    assert described.with_parameters_of(filled).notes == described.notes
    assert described.digest == checkpoint.digest
    named = checkpoint.with_network(normalize=([0.5] * 3, [0.25] * 3))
    assert named.with_parameters_of(named.network()).notes == checkpoint.notes
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(named.network()(x), filled((x - 0.5) / 0.25))
    soup = mix([named, named], [0.5, 0.5]).save(tmp_path / "soup.pth")
    assert set(torch.load(soup)["net"]) == set(prefixed(prefix, foreign))


@pytest.mark.parametrize("first", ["base.pth", "tuned.safetensors"])
def test_a_foreign_file_mixes_with_a_network_fine_tuned_from_it(tmp_path, first):
    """The fine-tuned one has constants of normalisation that change nothing."""
    base, tuned, other = (
        load_model("resnet9:width=2", mean=[mean] * 3, std=[1.0] * 3, seed=seed)
        for seed, mean in enumerate((0.0, 0.0, 0.5))
    )
    foreign = {n: t for n, t in base.state_dict().items() if not n.startswith("normalize.")}
    torch.save(prefixed("module.", foreign), tmp_path / "base.pth")
    Checkpoint.of(tuned).save(tmp_path / "tuned.safetensors")
    files = sorted([tmp_path / "base.pth", tmp_path / "tuned.safetensors"])
    files = files if files[0].name == first else files[::-1]
    soup = mix(files, [0.5, 0.5])
    assert set(soup.tensors) == set(foreign if first == "base.pth" else base.state_dict())
    expected = mix([Checkpoint.of(base), Checkpoint.of(tuned)], [0.5, 0.5])
    for name, tensor in soup.tensors.items():
        assert torch.equal(tensor, expected.tensors[name])
    assert check(files).differences == {}
    assert list(describe_differing_constants([Checkpoint.load(path) for path in files])) == []
    with pytest.raises(IngredientMismatch, match=r"normalize\.mean"):
        mix([tmp_path / "base.pth", other], [0.5, 0.5])


def test_a_file_must_have_both_constants_of_normalisation_or_none():
    spec = "resnet9:width=2"
    state = dict(load_model(spec).state_dict())
    del state["normalize.std"]
    with pytest.raises(ModelError, match=r"normalize\.std: the network has this tensor"):
        Checkpoint.load(state).network(spec)


def test_aliases_of_tied_weights_are_filled_in(tmp_path):
    for missing in ("head.weight", "tied.weight"):
        state = {name: t for name, t in prefixed("net.").items() if name != f"net.{missing}"}
        save_file(state, tmp_path / "a.safetensors")
        read = check_fits(Checkpoint.load(tmp_path / "a.safetensors"))
        assert read.with_parameters_of(Net()).tied == {"tied.weight": "head.weight"}
        read.save(tmp_path / "b.safetensors")
        assert load_file(tmp_path / "b.safetensors").keys() == state.keys()


def test_a_repeated_network_is_mixed_in_both_places(tmp_path):
    for seed in (0, 1):
        state = network(seed).state_dict()
        both = prefixed("module.model.", state) | prefixed("module.attacker.model.", state)
        torch.save({"model": both}, tmp_path / f"{seed}.pt")
    soup = mix([tmp_path / "0.pt", tmp_path / "1.pt"], [0.5, 0.5], network=Net())
    saved = torch.load(soup.save(tmp_path / "soup.pt"))["model"]
    mean = (network(0).conv.weight + network(1).conv.weight) / 2
    for prefix in ("module.model.", "module.attacker.model."):
        torch.testing.assert_close(saved[f"{prefix}conv.weight"], mean)


def test_ingredients_in_different_wrappings_are_aligned(tmp_path):
    torch.save({"state_dict": prefixed("module.")}, tmp_path / "a.pth")
    save_file(prefixed("net.", network(1).state_dict()), tmp_path / "b.safetensors")
    soup = mix([tmp_path / "a.pth", tmp_path / "b.safetensors"], [0, 1])
    assert torch.equal(soup.tensors["conv.weight"], network(1).conv.weight)
    other = prefixed("net.") | {"more": torch.ones(1)}
    save_file(other, tmp_path / "c.safetensors")
    with pytest.raises(IngredientMismatch, match="not the same network"):
        mix([tmp_path / "a.pth", tmp_path / "c.safetensors"], [0.5, 0.5])


def test_the_set_of_a_key_is_read(tmp_path):
    content = {"state_dict": prefixed(""), "ema": {"shadow": network(1).state_dict()}, "n": 3}
    torch.save(content, tmp_path / "a.pth")
    first = Checkpoint.load(tmp_path / "a.pth")
    check_fits(first)
    assert first.notes == ("a.pth: read state_dict; ema.shadow is complete too (--key ema.shadow)",)
    for source in (tmp_path / "a.pth", content):
        for key in ("ema.shadow", "shadow"):
            check_fits(Checkpoint.load(source, key=key), seed=1)
        with pytest.raises(CheckpointError, match=r'under "teacher"; got state_dict, ema\.shadow'):
            Checkpoint.load(source, key="teacher")


def test_weights_in_memory_refuse_what_they_cannot_honour():
    module = network()
    for source in (module, Checkpoint.of(module)):
        with pytest.raises(RequestError, match="key: requires a file or a state dict, got"):
            Checkpoint.open(source, key="ema")
    for source in (module, Checkpoint.of(module), module.state_dict()):
        with pytest.raises(RequestError, match="adapter_base: requires the folder of an adapter"):
            Checkpoint.load(source, adapter_base=module)
    opened = Checkpoint.of(module)
    assert Opening(key="ema").open(opened) is opened


def test_a_key_may_be_a_prefix(tmp_path):
    state = prefixed("student.") | prefixed("teacher.", network(1).state_dict())
    torch.save(state, tmp_path / "a.pth")
    fitted = Checkpoint.load(tmp_path / "a.pth").with_names_of(Net())
    assert "read the weights under student." in fitted.notes[0]
    assert "--key teacher" in fitted.notes[0]
    check_fits(Checkpoint.load(tmp_path / "a.pth", key="teacher"), seed=1)


def write_shards(folder, ending):
    names = list(network().state_dict())
    files = {name: f"model-{int(i > 3)}{ending}" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {
            name: t.clone() for name, t in network().state_dict().items() if files[name] == file
        }
        if ending == ".bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    index = folder / f"model{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_shards_are_read_by_their_index(tmp_path, ending):
    index = write_shards(tmp_path, ending)
    read = check_fits(Checkpoint.open(index))
    soup = mix([index, index], [0.5, 0.5])
    assert soup.digest == read.digest
    assert soup_ending(index, soup.wrapping) == (".pth" if ending == ".bin" else ending)
    (tmp_path / f"model-1{ending}").unlink()
    with pytest.raises(CheckpointError, match=r"model-1.*no such file"):
        Checkpoint.load(index)


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"weight_map": {"a": "../a.bin"}}', '{"weight_map": {"a": 5}}']
)
def test_a_wrong_index_is_refused(tmp_path, content):
    (tmp_path / "a.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"a\.index\.json: "):
        Checkpoint.load(tmp_path / "a.index.json")


# what is beside the weights


def test_harmless_types_are_read(tmp_path):
    content = {
        "state_dict": network().state_dict(),
        "best": np.float64(0.5),
        "name": np.str_("net"),
        "curve": np.arange(6.0).reshape(2, 3),
        "args": argparse.Namespace(lr=0.1, folder=Path("data")),
        "version": torch.__version__,
        "generator": np.random.default_rng(0).bit_generator.state,
    }
    torch.save(content, tmp_path / "a.pth")
    read = Checkpoint.load(tmp_path / "a.pth")
    kept = torch.load(read.save(tmp_path / "b.pth"), weights_only=False)
    assert (kept["best"], kept["name"], kept["args"].lr) == (0.5, "net", 0.1)
    assert np.array_equal(kept["curve"], content["curve"])
    assert kept["generator"] == content["generator"]
    Checkpoint.load(tmp_path / "b.pth")


def test_names_of_code_are_set_aside_and_not_written(tmp_path):
    for seed in (0, 1):
        content = {
            "state_dict": network(seed).state_dict(),
            "class of the network": torch.optim.SGD,
            "types": [torch.FloatTensor, torch.FloatStorage],
            "hyper_parameters": {"lr": 0.1, "activation": nn.functional.relu},
            "callbacks": {torch.optim.SGD: {"best": 1}},
            "dtype": torch.float16,
        }
        torch.save(content, tmp_path / f"{seed}.pth")
    items = [Checkpoint.load(tmp_path / f"{seed}.pth") for seed in (0, 1)]
    assert "0.pth: set aside class of the network, types, activation, " in items[0].notes[0]
    written = [mix(items, [0.5, 0.5]).save(tmp_path / "soup.pth")]
    written.append(items[0].save(tmp_path / "again.pth"))
    for path in written:
        saved = torch.load(path, weights_only=True)
        assert saved["hyper_parameters"] == {"lr": 0.1}
        assert saved["dtype"] == torch.float16
        assert Checkpoint.load(path).notes == ()


def test_a_mapping_that_holds_itself_and_names_of_code_is_read(tmp_path):
    settings = {"kind": torch.optim.SGD, "lr": 0.1}
    settings["again"] = settings
    torch.save({"state_dict": network().state_dict(), "settings": settings}, tmp_path / "a.pth")
    assert "set aside kind" in Checkpoint.load(tmp_path / "a.pth").notes[0]


def test_weights_that_are_conjugated_or_negated_when_read_are_so(tmp_path):
    numbers = torch.view_as_complex(torch.randn(4, 2))
    weights = {"conjugated": numbers.conj(), "negated": torch._neg_view(torch.ones(2))}
    torch.save(weights, tmp_path / "a.pth")
    tensors = Checkpoint.load(tmp_path / "a.pth").tensors
    assert torch.equal(tensors["conjugated"], numbers.conj().resolve_conj())
    assert tensors["negated"].tolist() == [-1, -1]
    again = Checkpoint.load(Checkpoint(tensors).save(tmp_path / "b.safetensors")).tensors
    assert torch.equal(again["conjugated"], tensors["conjugated"])


@pytest.mark.parametrize(
    ("key", "is_read"),
    [
        *[(key, True) for key in ("optimal_state_dict", "model_optimized")],
        *[(key, False) for key in ("optimizer", "optim", "optimizer_states", "g.optimizers")],
    ],
)
def test_the_state_of_an_optimizer_is_no_set_of_weights(tmp_path, key, is_read):
    torch.save({key: network().state_dict()}, tmp_path / "a.pth")
    if is_read:
        check_fits(Checkpoint.load(tmp_path / "a.pth"))
    else:
        with pytest.raises(CheckpointError, match="found no state dict"):
            Checkpoint.load(tmp_path / "a.pth")


def test_a_newer_pickle_says_how_to_save_it(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"a pickle of protocol 4; .* save it again"):
        Checkpoint.load(tmp_path / "a.pth")


def test_a_soup_keeps_shared_settings_alone(tmp_path):
    for seed in (0, 1):
        content = {
            "state_dict": network(seed).state_dict(),
            "state_dict_ema": network(seed).state_dict(),
            "hyper_parameters": {"width": 2, "sizes": [1, 2]},
            "seed of mine": seed,
            "epoch": 3,
            "best_acc1": torch.tensor(0.5),
            "scaler": {"scale": 2.0},
        }
        torch.save(content, tmp_path / f"{seed}.pth.tar")
    soup = mix([tmp_path / "0.pth.tar", tmp_path / "1.pth.tar"], [0.5, 0.5])
    saved = torch.load(soup.save(tmp_path / "soup.pth.tar"))
    assert saved.keys() == {"state_dict", "hyper_parameters"}
    left_out = "state_dict_ema, seed of mine, epoch, best_acc1, scaler"
    assert soup.notes[-1] == f"soup: left out {left_out} (not mixed)"


@pytest.mark.parametrize("make", [dict, argparse.Namespace])
@pytest.mark.parametrize("beside", [False, True])
def test_of_tables_that_differ_a_soup_keeps_the_equal_entries(tmp_path, make, beside):
    for seed in (0, 1):
        state = network(seed).state_dict()
        table = make(arch="net", eps=4 + seed, model=make(width=2, name=seed), mine=[seed])
        table = {"settings": table, "other": make(**{f"seed of {seed}": 1})}
        content = {**state, **table} if beside else {"state_dict": state, **table}
        torch.save(content, tmp_path / f"{seed}.pth")
    soup = mix([tmp_path / "0.pth", tmp_path / "1.pth"], [0.5, 0.5])
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(soup.save(tmp_path / "soup.pth"))
    assert saved["settings"] == make(arch="net", model=make(width=2))
    assert "other" not in saved
    left_out = "settings.eps, settings.model.name, settings.mine, other"
    assert soup.notes[-1] == f"soup: left out {left_out} (not mixed)"


def test_of_a_table_that_holds_itself_a_soup_keeps_the_equal_entries(tmp_path):
    for seed in (0, 1):
        table = {"width": 2, "seed": seed}
        table["again"] = table
        torch.save({"state_dict": network().state_dict(), "table": table}, tmp_path / f"{seed}.pth")
    soup = mix([tmp_path / "0.pth", tmp_path / "1.pth"], [0.5, 0.5])
    assert torch.load(soup.save(tmp_path / "soup.pth"))["table"] == {"width": 2}


@pytest.mark.parametrize("prefix", ["net.", "model.0.", "module.", "module._orig_mod.net."])
def test_without_a_network_a_safetensors_file_has_the_names_of_the_pickled_one(tmp_path, prefix):
    torch.save({"state_dict": prefixed(prefix), "note": "mine"}, tmp_path / "a.pth")
    soup = mix([tmp_path / "a.pth"] * 2, [0.5, 0.5])
    written = soup.save(tmp_path / "soup.safetensors")
    kept = prefix.removeprefix("module.").removeprefix("_orig_mod.")
    assert load_file(written).keys() == prefixed(kept).keys()
    check_fits(Checkpoint.load(written))
    described = Checkpoint.load(tmp_path / "a.pth").with_parameters_of(network())
    assert load_file(described.save(tmp_path / "own.safetensors")).keys() >= {"conv.weight"}


def test_metadata_of_safetensors_is_kept(tmp_path):
    for seed in (0, 1):
        metadata = {"format": "pt", "author": "me", "run": str(seed)}
        save_file(
            prefixed("", network(seed).state_dict()), tmp_path / f"{seed}.safetensors", metadata
        )
    soup = mix([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], [0.5, 0.5])
    with safe_open(soup.save(tmp_path / "soup.safetensors"), "pt") as file:
        metadata = file.metadata()
        assert (metadata["format"], metadata["author"]) == ("pt", "me")
        assert "run" not in metadata
        assert torch.equal(file.get_tensor("conv.weight"), soup.tensors["conv.weight"])
    again = Checkpoint.load(tmp_path / "soup.safetensors")
    assert (
        again.save(tmp_path / "b.safetensors").read_bytes()
        == (tmp_path / "soup.safetensors").read_bytes()
    )


# files of other kinds


def write_kinds(folder):
    scripted = folder / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), scripted)
    np.savez(folder / "arrays.npz", a=np.ones(2))
    (folder / "arrays.npz").rename(folder / "arrays.pth")
    save_file({"a": torch.ones(2)}, folder / "named.safetensors")
    (folder / "named.safetensors").rename(folder / "named.pth")
    torch.save({"a": torch.ones(2)}, folder / "saved.safetensors")
    torch.save(network(), folder / "whole.pth")
    torch.save({"w": torch.ones(1), "device": CODE}, folder / "object.pth")
    contents = {
        "page.pth": b"\n <!DOCTYPE html><html>Sign in</html>",
        "page.safetensors": b"<html><body>Virus scan warning</body></html>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "text.pth": b"Entry not found: no such file on this server",
        "error.safetensors": b'{"error": "not found", "status": 404}',
        "net.onnx": b"\x08\x07\x12\x07pytorch\x1a\x052.4.0:",
        "net.pth.gz": b"\x1f\x8b\x08\0\0",
        "empty.pth": b"",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)


class Code:
    """A class that no reader knows."""


CODE = Code()
KINDS = {
    "script.pt": "a TorchScript file",
    "arrays.pth": "an archive of NumPy arrays",
    "named.pth": r"a \.safetensors file under another name",
    "saved.safetensors": r"a \.pth file under another name",
    "whole.pth": r"a whole network \(.*Net\)",
    "object.pth": r"an object of the class .*Code",
    "page.pth": "an HTML page",
    "page.safetensors": "an HTML page",
    "pointer.safetensors": "a Git LFS pointer",
    "text.pth": "is text, perhaps the error message of a server",
    "error.safetensors": "JSON text",
    "net.onnx": "an ONNX model",
    "net.pth.gz": "compressed with gzip",
    "empty.pth": "an empty file",
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    write_kinds(folder)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", KINDS)
def test_files_of_other_kinds_are_named(kinds, name):
    with pytest.raises(CheckpointError, match=KINDS[name]) as caught:
        Checkpoint.load(kinds / name)
    assert str(caught.value).isprintable()


def test_the_repr_is_one_short_line():
    text = repr(Checkpoint.of(network()))
    assert text == "Checkpoint(in memory: 11 tensors, 47 numbers, no recorded network)"


def test_fitting_prefers_the_right_shapes():
    wanted = {"a": torch.ones(2), "b": torch.ones(2)}
    file = {
        "x.a": torch.ones(3),
        "x.b": torch.ones(3),
        "long.a": torch.ones(2),
        "long.b": wanted["b"],
    }
    fit = fit_names(file, wanted)
    assert fit is not None
    assert fit.names == {"a": "long.a", "b": "long.b"}


def test_weights_that_are_lazy_take_those_of_a_file(tmp_path):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d()
            self.head = nn.LazyLinear(3)

    state = {name: t for name, t in network().state_dict().items() if "tied" not in name}
    torch.save(prefixed("module.", state), tmp_path / "a.pth")
    lazy = Lazy()
    Checkpoint.load(tmp_path / "a.pth").load_into(lazy)
    assert torch.equal(lazy.conv.weight, state["conv.weight"])


def test_a_network_that_cannot_take_its_weights_is_refused_in_one_line():
    fixed = network()
    fixed.head.bias = nn.Parameter(torch.zeros(1).expand(3))
    with pytest.raises(ModelError, match=r"not take these weights: .*head\.bias") as caught:
        Checkpoint(network(1).state_dict()).load_into(fixed)
    assert "\n" not in str(caught.value)


class Versioned(Net):
    """Loads weights that say their version alone, as MNASNet of torchvision does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") not in (1, 2):
            raise ValueError("no version")
        self.loaded = local_metadata["version"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("version", [1, 2])
def test_modules_load_by_the_version_of_the_file(tmp_path, version):
    for number in range(2):
        wrapped = nn.DataParallel(Versioned())
        wrapped.module._version = version
        torch.save({"model": wrapped.state_dict()}, tmp_path / f"{number}.pth")
    soup = mix([tmp_path / "0.pth", tmp_path / "1.pth"], [0.5, 0.5])
    fresh = Versioned()
    soup.load_into(fresh)
    assert fresh.loaded == version
    soup.save(tmp_path / "soup.pth")
    theirs = nn.DataParallel(Versioned())
    theirs.load_state_dict(torch.load(tmp_path / "soup.pth")["model"])
    assert theirs.module.loaded == version


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_files_without_versions_load_by_that_of_the_network(tmp_path, ending):
    source = Versioned()
    path = Checkpoint.of(source).save(tmp_path / f"a{ending}")
    for item in (Checkpoint.load(path), Checkpoint(source.state_dict())):
        fresh = Versioned()
        item.load_into(fresh)
        assert fresh.loaded == 2
    if ending == ".pth":
        Versioned().load_state_dict(torch.load(path))


def test_versions_of_files_that_are_no_numbers_are_left_out():
    state = Net().state_dict()
    state._metadata = {"": {"version": "1", "assign_to_params_buffers": True}, "conv": 2, 3: {}}
    check = Net()
    Checkpoint.load(state).load_into(check)
    assert check.conv.weight is not state["conv.weight"]
    assert read_versions(state) == {}


@pytest.mark.parametrize("prefixes", [("ema.", "model."), ("teacher.", "student.")])
def test_a_copy_beside_the_network_is_not_read_by_default(tmp_path, prefixes):
    other, own = prefixes
    state = prefixed(other, network(1).state_dict()) | prefixed(own)
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    read = check_fits(Checkpoint.load(tmp_path / "a.safetensors"))
    assert f"(--key {other.rstrip('.')})" in read.notes[0]
    sets = {other.rstrip("."): network(1).state_dict(), own.rstrip("."): network().state_dict()}
    torch.save(sets, tmp_path / "b.pth")
    check_fits(Checkpoint.load(tmp_path / "b.pth"))


def quantized(seed):
    state = network(seed).state_dict()
    return state | {"conv.weight": (state["conv.weight"] * 100).to(torch.int8)}


def test_integers_are_not_taken_for_weights(tmp_path):
    for seed in (0, 1):
        torch.save(quantized(seed), tmp_path / f"{seed}.pth")
    paths = [tmp_path / "0.pth", tmp_path / "1.pth"]
    with pytest.raises(ModelError, match=r"conv\.weight: got int8, the network expects float32"):
        Checkpoint.load(paths[0]).load_into(Net())
    for given in (None, Net()):
        with pytest.raises(IngredientMismatch, match=r"conv\.weight: differs .* not averaged"):
            mix(paths, [0.5, 0.5], network=given)
    soup = mix([paths[0], paths[0]], [0.5, 0.5])  # the same numbers are kept
    assert torch.equal(soup.tensors["conv.weight"], quantized(0)["conv.weight"])


@pytest.mark.parametrize("scale", ["fc.weight_scale", "fc.weight_scale_inv", "fc.SCB", None])
def test_float8_numbers_are_averaged_unless_they_have_scales(scale):
    items = [
        Checkpoint(
            {"fc.weight": torch.full((2, 2), value).to(torch.float8_e4m3fn)}
            | ({scale: torch.tensor([value])} if scale else {})
        )
        for value in (1.0, 2.0)
    ]
    if scale is None:
        assert torch.equal(
            mix(items, [0.5, 0.5]).tensors["fc.weight"].float(), 1.5 * torch.ones(2, 2)
        )
    else:
        with pytest.raises(IngredientMismatch, match=r"fc\.weight: differs .* before quantization"):
            mix(items, [0.5, 0.5])


def pruned(seed):
    model = network(seed)
    prune.l1_unstructured(model.conv, "weight", 0.5)
    return Checkpoint(model.state_dict())


def test_networks_that_were_pruned_differently_are_not_mixed():
    first, other = pruned(0), pruned(1)
    assert "conv.weight_mask" not in first.parameters
    with pytest.raises(IngredientMismatch, match=r"conv\.weight_mask: differs.*prune\.remove"):
        mix([first, other], [0.5, 0.5])
    same = Checkpoint(
        {**other.tensors, "conv.weight_mask": first.tensors["conv.weight_mask"].clone()}
    )
    soup = mix([first, same], [0.5, 0.5])
    assert torch.equal(soup.tensors["conv.weight_mask"], first.tensors["conv.weight_mask"])


def test_an_address_of_this_machine_is_read(tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("ROBUSTSOUP_CACHE", str(tmp_path / "cache"))
    save_file(prefixed(""), tmp_path / "a.safetensors")
    check_fits(Checkpoint.load(f"file://{tmp_path}/a.safetensors"))


def test_other_content_is_named(tmp_path):
    torch.save({name: t.numpy() for name, t in network().state_dict().items()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"\(ndarray\), expected tensors by name"):
        Checkpoint.load(tmp_path / "a.pth")
    torch.save({"state_dict": {}, "when": datetime.date(2020, 1, 1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"datetime\.date.*save the state_dict\(\) alone"):
        Checkpoint.load(tmp_path / "a.pth")


BROKEN_SURPLUS = {
    "criterion.weight": lambda: prefixed("model."),
    "optimizer.0.exp_avg": lambda: prefixed("model."),
    "module.attack.delta": lambda: prefixed("module.model."),
    "loss_fn.pos_weight": lambda: prefixed(""),
    "ema.conv.weight": lambda: prefixed("model."),
}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", BROKEN_SURPLUS)
def test_surplus_entries_that_are_broken_are_set_aside_too(tmp_path, name, ending):
    path = tmp_path / f"a{ending}"
    tensors = BROKEN_SURPLUS[name]() | {name: torch.full((2,), torch.nan)}
    save_file(tensors, path) if ending == ".safetensors" else torch.save(tensors, path)
    read = check_fits(Checkpoint.load(path))
    assert read.notes == (f"a{ending}: set aside {name}: the network lacks them",)
    soup = mix([path, path], [0.5, 0.5], network=network())
    assert name not in torch.load(soup.save(tmp_path / "soup.pth"))


def test_a_weight_of_the_network_that_is_broken_is_refused_under_any_name(tmp_path):
    model = nn.ModuleDict({"normalizer": nn.Linear(3, 3)})
    state = model.state_dict() | {"normalizer.bias": torch.full((3,), torch.inf)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: normalizer\.bias holds NaN or infinity"):
        Checkpoint.load(tmp_path / "a.pth").load_into(model)
    with pytest.raises(CheckpointError, match=r"normalizer\.bias holds NaN or infinity"):
        mix([tmp_path / "a.pth"] * 2, [0.5, 0.5])
