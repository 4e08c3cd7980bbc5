"""Checkpoints of the Hugging Face Hub: its own client against a hub on this machine."""

import hashlib
import json

import pytest
import torch
from hub_server import COMMIT, serving_hub
from network_watch import refused_network

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.hub import HubAddress
from robustsoup.checkpoints.remote import copies_folder, copy_remote, find_copy_of
from robustsoup.checkpoints.transfers import choose_file
from robustsoup.errors import CheckpointError, DownloadError

pytestmark = pytest.mark.filterwarnings("ignore")
real = pytest.mark.extras


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def weights(tmp_path):
    """The bytes of a checkpoint, and its weights."""
    tensors = {"linear.weight": torch.randn(10, 64), "linear.bias": torch.randn(10)}
    file = Checkpoint(tensors).save(tmp_path / "weights.safetensors")
    return file.read_bytes(), tensors


def test_addresses():
    assert HubAddress.parse("hf://org/name") == HubAddress("org/name")
    parsed = HubAddress.parse("hf://org/name@v1.0/sub/model.pt")
    assert parsed == HubAddress("org/name", "v1.0", "sub/model.pt")
    parsed = HubAddress.parse("hf://org/name@refs/pr/7/sub/model.pt")
    assert parsed == HubAddress("org/name", "refs/pr/7", "sub/model.pt")
    parsed = HubAddress.parse("hf://org/name@exp%2Feps4/model.pt")
    assert parsed == HubAddress("org/name", "exp/eps4", "model.pt")
    for wrong in ("hf://org", "hf://org/name/../x", "hf://org/na me", "hf:///org/name"):
        with pytest.raises(CheckpointError, match="expected hf://ORG/NAME"):
            HubAddress.parse(wrong)


def test_which_file_of_a_repository_is_read():
    assert choose_file(["README.md", "pytorch_model.bin", "model.safetensors"], "hf://a/b") == (
        "model.safetensors"
    )
    assert choose_file(["README.md", "eps4.pth"], "hf://a/b") == "eps4.pth"
    with pytest.raises(
        CheckpointError, match=r"holds 2 checkpoints .*name one: hf://a/b/eps4\.pth"
    ):
        choose_file(["eps4.pth", "eps8.pth"], "hf://a/b")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        choose_file(["README.md"], "hf://a/b")


@real
def test_a_checkpoint_is_copied_once_and_used_without_a_connection(hub, weights):
    content, tensors = weights
    hub.files["org/name", "model.safetensors"] = content
    hub.files["org/name", "README.md"] = b"a card"
    loaded = Checkpoint.load("hf://org/name")
    assert loaded.tensors.keys() == tensors.keys()
    assert torch.equal(loaded.tensors["linear.weight"], tensors["linear.weight"])
    copy = find_copy_of(loaded.path)
    assert copy.revision == COMMIT
    assert copy.sha256 == hashlib.sha256(content).hexdigest()
    assert [path.name for path in loaded.path.parent.iterdir()] == ["model.safetensors"]
    with refused_network() as attempts:
        assert Checkpoint.open("hf://org/name").digest == loaded.digest
    assert attempts == []


@real
def test_a_file_and_a_revision_can_be_named(hub, weights):
    content, tensors = weights
    hub.files["org/name", "sub/eps4.safetensors"] = content
    loaded = Checkpoint.load("hf://org/name@v1/sub/eps4.safetensors")
    assert loaded.path.name == "eps4.safetensors"
    assert torch.equal(loaded.tensors["linear.bias"], tensors["linear.bias"])
    with pytest.raises(DownloadError, match="hf://org/name@v2: no such revision"):
        copy_remote("hf://org/name@v2")


@real
def test_shards_come_with_their_index(hub, tmp_path):
    names = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        Checkpoint({f"w{number}": torch.full((400,), float(number))}).save(tmp_path / file)
        hub.files["org/big", file] = (tmp_path / file).read_bytes()
        names[f"w{number}"] = file
    index = json.dumps({"metadata": {}, "weight_map": names}).encode()
    hub.files["org/big", "model.safetensors.index.json"] = index
    loaded = Checkpoint.load("hf://org/big")
    assert {name: tensor[0].item() for name, tensor in loaded.tensors.items()} == {"w1": 1, "w2": 2}


@real
def test_an_interrupted_copy_is_continued(hub, weights, monkeypatch):
    content, _ = weights
    hub.files["org/name", "model.safetensors"] = content
    hub.cut = 1500
    with pytest.MonkeyPatch.context() as patch:
        stop = type("StoppedError", (BaseException,), {})

        def sleep(seconds):
            raise stop

        patch.setattr("time.sleep", sleep)  # the client waits before it tries again
        with pytest.raises((stop, DownloadError)):
            copy_remote("hf://org/name")
    asked = len(hub.requests)
    assert copy_remote("hf://org/name").sha256 == hashlib.sha256(content).hexdigest()
    assert len(hub.requests) > asked
    assert [path.suffix for path in copies_folder().iterdir()] == [""]


@real
def test_another_content_than_the_hub_states_is_refused(hub, weights):
    content, _ = weights
    hub.files["org/name", "model.safetensors"] = content
    hub.states["model.safetensors"] = "0" * 64
    with pytest.raises(DownloadError, match=r"model.safetensors: got a content with digest"):
        Checkpoint.load("hf://org/name")
    small = b"version https://git-lfs.github.com/spec/v1\n"
    hub.files["org/small", "pytorch_model.bin"] = small
    hub.states["pytorch_model.bin"] = "0" * 40
    with pytest.raises(DownloadError, match="the hub states 0000"):
        Checkpoint.load("hf://org/small")


@real
def test_what_is_no_checkpoint_does_not_stay(hub):
    hub.files["org/name", "model.safetensors"] = b"version https://git-lfs.github.com/spec/v1\n"
    with pytest.raises(CheckpointError, match="hf://org/name: is a Git LFS pointer"):
        Checkpoint.load("hf://org/name")
    assert list(copies_folder().iterdir()) == []


@real
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://org/absent", "no such repository, or it is private"),
        ("hf://org/name/absent.pt", "no such file in the repository"),
        ("hf://org/name@absent/model.pt", "no such revision"),
    ],
)
def test_what_the_hub_lacks_is_one_line(hub, address, message):
    hub.files["org/name", "model.pt"] = b"content"
    with pytest.raises(DownloadError, match=f"{address}: {message}"):
        Checkpoint.load(address)


@real
def test_a_token_is_sent_and_never_shown(hub, weights, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.files["org/name", "model.safetensors"] = weights[0]
    Checkpoint.load("hf://org/name")
    assert "Bearer hf_secret" in hub.tokens
    with pytest.raises(DownloadError) as raised:
        Checkpoint.load("hf://org/other")
    shown = capsys.readouterr()
    assert "secret" not in f"{raised.value}{shown.out}{shown.err}"


def test_a_missing_library_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'robustsoup\[hub\]'"):
        Checkpoint.load("hf://org/name")
