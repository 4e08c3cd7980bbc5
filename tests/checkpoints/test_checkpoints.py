"""Checkpoints: round trips, foreign files in their wrapping, and the errors of broken files."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint, as_network
from robustsoup.errors import CheckpointError, ModelError, RequestError, StorageError
from robustsoup.models import load_model
from robustsoup.stamp import stamp_record

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator).to(dtype),
        "bn.weight": torch.randn(4, generator=generator).to(dtype),
        "bn.bias": torch.randn(4, generator=generator).to(dtype),
        "bn.running_mean": torch.randn(4, generator=generator).to(dtype),
        "bn.running_var": torch.rand(4, generator=generator).to(dtype),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def same(left, right):
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def files(folder):
    """The contents of a folder, to check that nothing was changed or left behind."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Tied(nn.Module):
    """An embedding and an output layer that share one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(x) + self.embed(x)


# safetensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_come_back_bit_for_bit_with_their_provenance(tmp_path, dtype):
    state = {
        "w": (torch.arange(24).view(2, 3, 4) * 3.7).to(dtype),
        "one": torch.tensor(1.0).to(dtype),
        "none": torch.empty(0, 3, dtype=dtype),
        "turned": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype).t(),
    }
    provenance = {
        "network": {"spec": "résumé", "classes": 10},
        "eps": 8 / 255,
        "parents": [{"digest": "ab", "file": None}],
    }
    checkpoint = Checkpoint(state, provenance)
    assert checkpoint.save(tmp_path / "new" / "a.safetensors") == tmp_path / "new" / "a.safetensors"
    read = Checkpoint.load(tmp_path / "new" / "a.safetensors")
    assert same(dict(sorted(read.tensors.items())), dict(sorted(state.items())))
    assert read.provenance == provenance
    assert read.digest == checkpoint.digest
    assert read.path == tmp_path / "new" / "a.safetensors"
    assert Checkpoint.load(read) is read
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "a.safetensors"]


def test_negative_zero_and_subnormal_numbers_survive(tmp_path):
    Checkpoint({"w": torch.tensor([-0.0, 1e-45])}).save(tmp_path / "a.safetensors")
    read = Checkpoint.load(tmp_path / "a.safetensors").tensors["w"]
    assert torch.equal(read.view(torch.int32), torch.tensor([-0.0, 1e-45]).view(torch.int32))


def test_a_foreign_safetensors_file_has_no_provenance(tmp_path):
    save_file(tensors(), tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    read = Checkpoint.load(tmp_path / "foreign.safetensors")
    assert read.provenance == {}
    assert same(dict(sorted(read.tensors.items())), dict(sorted(tensors().items())))


def test_a_saved_network_computes_the_same(tmp_path):
    model = load_model("resnet9:width=2", channels=1, seed=3).eval()
    checkpoint = Checkpoint.of(model)
    read = Checkpoint.load(checkpoint.save(tmp_path / "a.safetensors"))
    x = torch.rand(3, 1, 8, 8)
    reloaded = read.network("resnet9:width=2", channels=1)
    assert not reloaded.training
    with torch.no_grad():
        assert torch.equal(reloaded(x), model(x))
    assert read.parameters == [name for name, _ in model.named_parameters()]


def test_a_checkpoint_of_a_network_is_a_copy():
    model = nn.Linear(3, 2)
    checkpoint = Checkpoint.of(model, {"seed": 5})
    before = checkpoint.tensors["weight"].clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(checkpoint.tensors["weight"], before)
    assert checkpoint.provenance["seed"] == 5
    assert not any(tensor.requires_grad for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("take", [Checkpoint.of, Checkpoint.load, Checkpoint.open])
def test_a_checkpoint_of_a_state_dict_is_a_copy(take):
    model = Tied()
    checkpoint = take(model.state_dict())
    before = checkpoint.tensors["out.weight"].clone()
    with torch.no_grad():
        model.out.weight.add_(1)
    assert torch.equal(checkpoint.tensors["out.weight"], before)
    pointers = {checkpoint.tensors[name].data_ptr() for name in ("embed.weight", "out.weight")}
    assert len(pointers) == 1, "tied weights share memory"


# the digest


def test_the_digest_depends_on_the_tensors_alone(tmp_path):
    checkpoint = Checkpoint(tensors(), {"seed": 0})
    equal_checkpoints = [
        Checkpoint(tensors(), {"seed": 1, "note": "x"}),
        Checkpoint(dict(reversed(tensors().items()))),
        Checkpoint.load(checkpoint.save(tmp_path / "a.safetensors")),
        Checkpoint.load(checkpoint.save(tmp_path / "b.pth")),
        Checkpoint(
            {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors().items()
            }
        ),
        Checkpoint({name: channels_last(tensor) for name, tensor in tensors().items()}),
    ]
    assert {equal_checkpoint.digest for equal_checkpoint in equal_checkpoints} == {
        checkpoint.digest
    }
    assert len(checkpoint.digest) == 64


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"bn.bias": state["bn.bias"] + 1e-6},
        lambda state: state | {"bn.bias": state["bn.bias"].double()},
        lambda state: state | {"bn.bias": state["bn.bias"].view(2, 2)},
        lambda state: state | {"bn.num_batches_tracked": torch.tensor(8)},
        lambda state: state | {"bn.bias": state["bn.weight"], "bn.weight": state["bn.bias"]},
        lambda state: {f"net.{name}": tensor for name, tensor in state.items()},
        lambda state: {name: tensor for name, tensor in state.items() if name != "bn.bias"},
    ],
)
def test_the_digest_depends_on_values_types_shapes_and_names(change):
    assert Checkpoint(change(tensors())).digest != Checkpoint(tensors()).digest


# foreign files


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "module.0."])
@pytest.mark.parametrize(
    "key", [None, "state_dict", "model_state_dict", "model", "net", "ema_state_dict"]
)
@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin"])
def test_wrappers_are_removed_and_restored(tmp_path, prefix, key, ending):
    state = {prefix + name: tensor for name, tensor in tensors().items()}
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]}
    content = state if key is None else {"epoch": 12, key: state, "optimizer": optimizer}
    torch.save(content, tmp_path / f"foreign{ending}")
    read = Checkpoint.load(tmp_path / f"foreign{ending}")
    assert same(read.tensors, tensors())
    reloaded = torch.load(read.save(tmp_path / f"saved{ending}"), weights_only=True)
    if key is None:
        assert same(reloaded, state)
    else:
        assert same(reloaded.pop(key), state)
        assert reloaded == {"epoch": 12, "optimizer": optimizer}


def test_a_soup_loads_into_the_script_that_saved_the_checkpoint(tmp_path):
    """Save as a typical script does: a DataParallel state dict beside an epoch."""
    original = nn.DataParallel(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    torch.save({"state_dict": original.state_dict(), "epoch": 9}, tmp_path / "a.pth")
    read = Checkpoint.load(tmp_path / "a.pth")
    assert next(iter(read.tensors)) == "0.weight"
    read.save(tmp_path / "b.pth")
    fresh = nn.DataParallel(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    loaded = torch.load(tmp_path / "b.pth")
    assert loaded["epoch"] == 9
    fresh.load_state_dict(loaded["state_dict"], strict=True)
    assert same(fresh.state_dict(), original.state_dict())


def test_a_prefix_of_only_some_names_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "a.pth")
    assert list(Checkpoint.load(tmp_path / "a.pth").tensors) == ["module.a", "b"]


def test_a_network_whose_names_share_a_prefix_loads_again(tmp_path):
    """All names of Sequential(Linear) begin with "0.", which belongs to the network."""
    torch.save(nn.Sequential(nn.Linear(3, 2)).state_dict(), tmp_path / "a.pth")
    read = Checkpoint.load(tmp_path / "a.pth")
    read.load_into(nn.Sequential(nn.Linear(3, 2)))


def test_a_file_from_before_torch_1_6_is_read(tmp_path):
    torch.save(tensors(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(Checkpoint.load(tmp_path / "old.pt").tensors, tensors())


def test_saved_parameters_require_no_gradients(tmp_path):
    torch.save(dict(nn.Linear(3, 2).named_parameters()), tmp_path / "a.pth")
    read = Checkpoint.load(tmp_path / "a.pth")
    assert sorted(read.parameters) == ["bias", "weight"]
    assert not any(tensor.requires_grad for tensor in read.tensors.values())


def test_without_a_record_parameters_are_the_floats_that_are_not_statistics(tmp_path):
    torch.save(tensors(), tmp_path / "a.pth")
    assert Checkpoint.load(tmp_path / "a.pth").parameters == ["conv.weight", "bn.weight", "bn.bias"]


# tied parameters


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_tied_parameters_are_one_parameter_under_two_names(tmp_path, ending):
    model = Tied()
    if ending == ".pth":
        torch.save(model.state_dict(), tmp_path / "a.pth")
    else:
        Checkpoint.of(model).save(tmp_path / "a.safetensors")
    read = Checkpoint.load(tmp_path / f"a{ending}")
    assert read.tied == {"out.weight": "embed.weight"}
    assert sorted(read.parameters) == ["embed.weight", "out.bias"]
    reloaded = Checkpoint.load(read.save(tmp_path / f"b{ending}"))
    assert reloaded.digest == read.digest
    fresh = Tied()
    reloaded.load_into(fresh)
    assert fresh.out.weight is fresh.embed.weight
    assert torch.equal(fresh.out.weight, model.out.weight)


# broken files


def corrupt(folder):
    """Write files that are not checkpoints, and return their names."""
    good = Checkpoint(tensors()).save(folder / "good.safetensors").read_bytes()
    torch.save(tensors(), folder / "good.pth")
    zipped = (folder / "good.pth").read_bytes()
    torch.save(tensors(), folder / "old.pth", _use_new_zipfile_serialization=False)
    old = (folder / "old.pth").read_bytes()
    (folder / "folder.pth").mkdir()
    (folder / "folder.safetensors").mkdir()
    contents = {
        "half.safetensors": good[: len(good) // 2],
        "header.safetensors": good[:20],
        "no bytes.safetensors": b"",
        "text.safetensors": b"it is not a checkpoint\n",
        "zip.safetensors": zipped,
        "half.pth": zipped[: len(zipped) // 2],
        "most.pth": zipped[:-30],
        "half old.pth": old[: len(old) // 2],
        "no bytes.pth": b"",
        "text.pth": b"it is not a checkpoint\n",
        "error.pth": b"error 404: not found\n",
        "page.pt": b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
        "pointer.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n",
        "tensors.pt": good,
        "object.pth": pickle.dumps(Path("somewhere")),
        "code.pth": b"cos\nsystem\n(S'touch " + str(folder / "ran").encode() + b"'\ntR.",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save(nn.Linear(2, 2), folder / "module.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save(torch.ones(2), folder / "tensor.pth")
    torch.save({}, folder / "empty.pth")
    torch.save({"state_dict": {}}, folder / "empty wrapped.pth")
    torch.save({"epoch": 3, "weights": "text"}, folder / "no tensors.pth")
    torch.save({1: torch.ones(1)}, folder / "numbered.pth")
    torch.save({"module.": torch.ones(1), "module.a": torch.ones(1)}, folder / "only prefix.pth")
    save_file({}, folder / "empty.safetensors")
    for broken in (torch.nan, torch.inf):
        spoilt = tensors() | {"bn.bias": torch.tensor([1.0, broken, 0.0, 0.0])}
        torch.save(spoilt, folder / f"{broken}.pth")
        save_file(spoilt, folder / f"{broken}.safetensors")
    half = tensors(dtype=torch.bfloat16) | {
        "bn.bias": torch.full((4,), torch.nan, dtype=torch.bfloat16)
    }
    save_file(half, folder / "bfloat16 nan.safetensors")
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in ("good.pth", "good.safetensors", "old.pth")
    )


@pytest.fixture(scope="module")
def broken_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    return folder, corrupt(folder)


BROKEN = [
    "absent.pth",
    "absent.safetensors",
    "absent/a.pth",
    "good.pth/a.pth",
    "folder.pth",
    "folder.safetensors",
    "half.safetensors",
    "header.safetensors",
    "no bytes.safetensors",
    "text.safetensors",
    "zip.safetensors",
    "half.pth",
    "most.pth",
    "half old.pth",
    "no bytes.pth",
    "text.pth",
    "error.pth",
    "page.pt",
    "pointer.bin",
    "tensors.pt",
    "object.pth",
    "code.pth",
    "module.pth",
    "list.pth",
    "tensor.pth",
    "empty.pth",
    "empty wrapped.pth",
    "no tensors.pth",
    "numbered.pth",
    "only prefix.pth",
    "empty.safetensors",
    "nan.pth",
    "inf.pth",
    "nan.safetensors",
    "inf.safetensors",
    "bfloat16 nan.safetensors",
]


def test_the_list_names_every_broken_file(broken_files):
    assert set(broken_files[1]) == {
        name for name in BROKEN if not name.startswith(("absent", "good"))
    }


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(broken_files, name):
    folder, _ = broken_files
    before = files(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.load(folder / name)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ")
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 400
    assert files(folder) == before
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("absent.pth", "no such file"),
        ("folder.pth", "got a folder that holds no checkpoint"),
        ("half.safetensors", "cut short"),
        ("nan.pth", "bn.bias holds NaN"),
        ("nan.safetensors", "bn.bias holds NaN"),
        ("bfloat16 nan.safetensors", "bn.bias holds NaN"),
        ("no tensors.pth", r"no state dict; got keys \['epoch', 'weights'\]"),
        ("list.pth", "a list"),
        ("empty.pth", "no state dict|expected a state dict"),
        ("empty.safetensors", "no tensors"),
    ],
)
def test_the_error_says_what_is_wrong(broken_files, name, text):
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.load(broken_files[0] / name)


@settings(max_examples=30, deadline=None)
@given(
    cut=st.floats(0, 1, exclude_max=True),
    ending=st.sampled_from([".pth", ".safetensors"]),
    old=st.booleans(),
)
def test_no_truncated_file_is_a_checkpoint(tmp_path_factory, cut, ending, old):
    path = tmp_path_factory.mktemp("cut") / f"a{ending}"
    if ending == ".pth":
        torch.save(tensors(), path, _use_new_zipfile_serialization=not old)
    else:
        Checkpoint(tensors()).save(path)
    complete_bytes = path.read_bytes()
    path.write_bytes(complete_bytes[: int(cut * len(complete_bytes))])
    with pytest.raises(CheckpointError, match=r"a\."):
        Checkpoint.load(path)


@settings(max_examples=30, deadline=None)
@given(content=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_random_bytes_raise_a_checkpoint_error(tmp_path_factory, content):
    for ending in (".pth", ".safetensors"):
        path = tmp_path_factory.mktemp("random") / f"a{ending}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", ["[1]", '"text"', "5", "{"])
def test_a_record_that_is_not_a_json_object_is_refused(tmp_path, record):
    save_file(tensors(), tmp_path / "a.safetensors", metadata={"robustsoup": record})
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        Checkpoint.load(tmp_path / "a.safetensors")


# networks


def test_the_network_is_built_from_the_record(tmp_path):
    model = load_model("resnet9:width=2", channels=1, classes=4)
    settings_ = {"spec": "resnet9:width=2", "channels": 1, "classes": 4}
    path = Checkpoint.of(model, {"network": settings_}).save(tmp_path / "a.safetensors")
    for checkpoint in (
        Checkpoint.load(path).network(),
        as_network(path),
        as_network(str(path)),
        as_network(Checkpoint.load(path)),
    ):
        assert same(checkpoint.state_dict(), model.state_dict())
    assert as_network(model) is model
    with pytest.raises(
        RequestError, match=r"got int, expected an nn\.Module, a Checkpoint or a path"
    ):
        as_network(5)


def test_a_checkpoint_of_a_built_network_records_it():
    model = load_model(
        "resnet9:width=2", channels=1, classes=4, seed=9, normalize=([0.5], [0.2])
    ).eval()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(Checkpoint.of(model).network()(x), model(x))


def test_without_a_record_a_network_must_be_named():
    with pytest.raises(
        ModelError,
        match=r"^checkpoint \w+: does not record its network; set --model .*with_network",
    ):
        Checkpoint(tensors()).network()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"width": 3},
            r"prep\.0\.weight: got shape \(2, 1, 3, 3\), the network expects \(3, 1, 3, 3\)",
        ),
        ({"channels": 3}, r"normalize\.mean: got shape"),
        ({"classes": 5}, r"linear\.weight: got shape \(10, 16\), the network expects \(5, 16\)"),
    ],
)
def test_the_error_for_a_wrong_network_names_the_first_differing_tensor(change, text):
    checkpoint = Checkpoint.of(load_model("resnet9:width=2", channels=1))
    spec = f"resnet9:width={change.pop('width', 2)}"
    with pytest.raises(ModelError, match=text) as caught:
        checkpoint.network(spec, **{"channels": 1, **change})
    assert "\n" not in str(caught.value)


def test_missing_and_surplus_tensors_are_distinguished():
    model = load_model("resnet9:width=2", channels=1)
    state = dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in state.items()}
    lacking = {name: tensor + 1 for name, tensor in state.items() if name != "linear.weight"}
    with pytest.raises(
        ModelError, match=r"linear\.weight: the network has this tensor, the file does not"
    ):
        Checkpoint(lacking).load_into(model)
    extra = "prep.0.extra"
    with pytest.raises(ModelError, match=f"{extra}: the file has this tensor, the network does no"):
        Checkpoint(
            {name: tensor + 1 for name, tensor in state.items()} | {extra: torch.ones(1)}
        ).load_into(model)
    assert same(model.state_dict(), before)


# saving that fails


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_path_below_a_file_cannot_be_written_and_the_file_stays(tmp_path, ending):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"cannot be written.*nothing was changed") as caught:
        Checkpoint(tensors()).save(tmp_path / "file" / f"a{ending}")
    assert f"a{ending}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_path_that_is_a_folder_stays_a_folder(tmp_path, ending):
    (tmp_path / f"a{ending}").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        Checkpoint(tensors()).save(tmp_path / f"a{ending}")
    assert list(tmp_path.iterdir()) == [tmp_path / f"a{ending}"]


@pytest.mark.parametrize("name", ["a.txt", "a", "a.safetensors.gz", "a.onnx"])
def test_another_ending_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"expected \.safetensors or \.pt, \.pth"):
        Checkpoint(tensors()).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX")
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_on_a_full_disk_the_old_file_stays_and_nothing_is_left_behind(tmp_path, ending):
    """A limit on the size of files simulates a full disk."""
    target = tmp_path / f"a{ending}"
    Checkpoint(tensors()).save(target)
    before = files(tmp_path)
    script = f"""
import resource
import torch
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import StorageError

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    Checkpoint({{"w": torch.ones(100_000), "v": torch.ones(100_000)}}).save({str(target)!r})
except StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{target}: cannot be written")
    assert done.stdout.count("\n") == 1
    assert files(tmp_path) == before
    assert same(
        dict(sorted(Checkpoint.load(target).tensors.items())), dict(sorted(tensors().items()))
    )


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    """The record is not JSON-able, so that the save fails half-way."""
    target = tmp_path / "a.safetensors"
    Checkpoint(tensors()).save(target)
    before = files(tmp_path)
    with pytest.raises(TypeError):
        Checkpoint(tensors(1), {"made": object()}).save(target)
    assert files(tmp_path) == before


def test_the_record_is_json_under_one_key(tmp_path):
    path = Checkpoint(tensors(), {"b": 1, "a": [1.5]}).save(tmp_path / "a.safetensors")
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    record = json.loads(header["__metadata__"].pop("robustsoup"))
    assert record == stamp_record({"a": [1.5], "b": 1})
    assert header["__metadata__"].pop("format") == "pt"  # Hugging Face's libraries require it
    assert list(header["__metadata__"]) == ["robustsoup.digests"]
    assert (
        Checkpoint(tensors(), {"a": [1.5], "b": 1}).save(tmp_path / "b.safetensors").read_bytes()
        == content
    )
