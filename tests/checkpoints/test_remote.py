"""Checkpoints by address: web servers and what fsspec opens, copied into the cache."""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch
from command_line import run
from network_watch import refused_network
from web_server import serving

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.remote import (
    RECORD,
    copies_folder,
    copy_remote,
    find_copy_of,
    local_path,
    remote_address,
)
from robustsoup.checkpoints.transfers import show_address
from robustsoup.errors import CheckpointError, DownloadError
from robustsoup.models import load_model
from robustsoup.recipes import load_recipe
from robustsoup.runs.caches import list_caches


@pytest.fixture(autouse=True)
def _own_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def body(tmp_path):
    """The bytes of a checkpoint."""
    tensors = {"linear.weight": torch.randn(3, 4), "linear.bias": torch.randn(3)}
    return Checkpoint(tensors).save(tmp_path / "weights.safetensors").read_bytes()


@pytest.fixture
def memory():
    """The file system of memory://, empty again after the test."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def put(memory, path, content):
    memory.pipe(f"/{path}", content)
    return f"memory://{path}"


def test_which_paths_are_addresses(tmp_path, monkeypatch):
    assert remote_address("hf://org/name") == "hf://org/name"
    assert remote_address(Path("hf://org/name@v1/model.pt")) == "hf://org/name@v1/model.pt"
    assert remote_address(Path("file:///tmp/model.pt")) == "file:///tmp/model.pt"
    signed = f"https://host/model.pt?key={'0' * 5000}"  # too long for a path
    assert remote_address(signed) == signed
    for local in ("model.pt", "/tmp/model.pt", "C:/model.pt", "a:b/model.pt", "hf:org/name", ""):
        assert remote_address(local) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:" / "model.pt").touch()
    assert remote_address("s3:/model.pt") is None


def test_a_file_is_copied_once_and_kept(memory, body):
    address = put(memory, "bucket/eps4/model.safetensors", body)
    loaded = Checkpoint.load(address)
    assert (loaded.path.parent.name, loaded.path.name) == ("eps4", "model.safetensors")
    copy = find_copy_of(loaded.path)
    assert (copy.address, copy.sha256) == (address, hashlib.sha256(body).hexdigest())
    memory.rm("/bucket/eps4/model.safetensors")
    with refused_network() as attempts:
        assert Checkpoint.open(Path(address)).digest == loaded.digest
    assert attempts == []
    with pytest.raises(DownloadError, match="no such file"):
        copy_remote(address, again=True)
    assert Checkpoint.open(address).digest == loaded.digest  # the old copy stays


def test_a_copy_is_made_again_when_asked_or_damaged(memory, body, tmp_path):
    address = put(memory, "bucket/model.safetensors", body)
    path = local_path(address)
    other = Checkpoint({"w": torch.ones(2)}).save(tmp_path / "other.safetensors").read_bytes()
    put(memory, "bucket/model.safetensors", other)
    assert local_path(address).read_bytes() == body
    assert copy_remote(address, again=True).path.read_bytes() == other
    path.write_bytes(body[:-1])
    assert Checkpoint.load(address).tensors.keys() == {"w"}


def test_a_copy_whose_record_changed_is_made_again(memory, body):
    address = put(memory, "bucket/model.safetensors", body)
    record = local_path(address).parents[1] / RECORD
    whole = record.read_text()
    record.write_text(whole.replace('"revision": null', '"revision": "v2"'))
    assert copy_remote(address).revision is None
    assert "v2" not in record.read_text()


def test_a_demanded_digest(memory, body):
    address = put(memory, "bucket/model.safetensors", body)
    digest = hashlib.sha256(body).hexdigest()
    assert local_path(f"{address}#sha256={digest}").read_bytes() == body
    with pytest.raises(DownloadError, match=f"got sha256 {digest}, expected {'0' * 64}"):
        copy_remote(f"{address}#sha256={'0' * 64}")
    with pytest.raises(DownloadError, match=f"got sha256 {digest}, expected {'a' * 64}"):
        copy_remote(f"{address}#SHA256:{'A' * 64}")
    assert copy_remote(f"{address}#SHA256={digest.upper()}") == copy_remote(
        f"{address}#sha256={digest}"
    )


@pytest.mark.parametrize("end", ["sha256=0000", "sha256=", "md5=0", "sha-512=0", "0" * 40])
def test_a_demanded_digest_that_would_not_be_checked_is_refused(memory, body, end):
    address = put(memory, "bucket/model.safetensors", body)
    for place in (address, "https://localhost/model.pth", "hf://org/name"):
        with pytest.raises(CheckpointError, match=r"expected .#sha256=. and 64 hexadecimal"):
            copy_remote(f"{place}#{end}")


def test_a_sign_in_the_name_of_a_file_is_no_digest(memory, body):
    assert local_path(put(memory, "bucket/run#3/model.safetensors", body)).read_bytes() == body


def test_shards_come_with_their_index(memory, tmp_path):
    shard = Checkpoint({"w": torch.ones(2)}).save(tmp_path / "one.safetensors")
    put(memory, "bucket/big/one.safetensors", shard.read_bytes())
    index = b'{"weight_map": {"w": "one.safetensors"}}'
    address = put(memory, "bucket/big/model.safetensors.index.json", index)
    assert Checkpoint.load(address).tensors["w"].tolist() == [1, 1]


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_web_server(body, tmp_path, ending):
    if ending == ".pth":
        torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
        body = (tmp_path / "w.pth").read_bytes()
    with serving(body) as (url, requests):
        named = url.replace("cifar.tar.gz", f"runs/eps4/model{ending}")
        unnamed = url.replace("cifar.tar.gz", "download%2F..%2Fx?id=3&key=secret")
        for address in (named, unnamed, named):
            assert Checkpoint.load(address).path.read_bytes() == body
    assert len(requests) == 2
    assert local_path(named).name == f"model{ending}"
    assert local_path(unnamed).suffix == ending
    assert copies_folder() in local_path(unnamed).parents


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"status": 404}, "the server answered 404"),
        ({"announced": 10**6}, "cut short"),
    ],
)
def test_a_failed_download_leaves_no_copy_and_shows_no_key(body, options, message):
    with serving(body, **options) as (url, _):
        address = url.replace("cifar.tar.gz", "model.safetensors?key=secret")
        with pytest.raises(DownloadError, match=message) as raised:
            copy_remote(address)
    assert "secret" not in str(raised.value)
    with serving(body) as (url, _):
        good = url.replace("cifar.tar.gz", "model.safetensors?key=secret")
        assert copy_remote(good).path.read_bytes() == body


def test_no_more_is_copied_than_is_read(memory, body, monkeypatch):
    """A server or a device may send without end."""
    for module in ("data.download", "checkpoints.transfers"):
        monkeypatch.setattr(f"robustsoup.{module}.MAX_FILE_BYTES", len(body) - 1)
    with serving(body) as (url, _), pytest.raises(DownloadError, match="larger than"):
        copy_remote(url)
    with pytest.raises(DownloadError, match="are the most that are read"):
        copy_remote(put(memory, "a.safetensors", body))
    with pytest.raises(DownloadError, match="/dev/zero: is no regular file"):
        copy_remote("file:///dev/zero")
    assert {path.suffix for path in copies_folder().iterdir()} <= {".partial"}


def test_a_login_page_does_not_stay():
    with serving(b"<!doctype html><html>log in</html>", kind="text/html") as (url, _):
        address = url.replace("cifar.tar.gz", "model.pth")
        with pytest.raises(CheckpointError, match=r"model\.pth: is an HTML page"):
            copy_remote(address)
    assert list(copies_folder().iterdir()) == []


def test_addresses_in_messages_hide_what_may_be_secret():
    assert show_address("https://me:pass@host/a/b.pt?key=x#y") == "https://host/a/b.pt"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nothing://bucket/model.pt", "unknown scheme nothing://; expected hf, https"),
        ("s3://bucket/model.pt", "not installed; pip install s3fs"),
        ("gs://bucket/model.pt", "what reads gs:// is not installed; pip install gcsfs"),
        ("az://bucket/model.pt", "what reads az:// is not installed; pip install adlfs"),
        ("memory://bucket/absent.pt", "no such file"),
        ("memory://bucket", "is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_read_is_one_line(memory, monkeypatch, address, message):
    for library in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, library, None)
    put(memory, "bucket/model.pt", b"content")
    with pytest.raises((DownloadError, CheckpointError), match=message):
        copy_remote(address)
    assert list(copies_folder().iterdir()) == []


@pytest.mark.extras
def test_a_bucket_of_s3_is_read(tmp_path, body, monkeypatch):
    """The real s3fs, against a server on this machine that speaks the protocol of S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "local")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        system.pipe("bucket/runs/model.safetensors", body)
        address, sha256 = "s3://bucket/runs/model.safetensors", hashlib.sha256(body).hexdigest()
        assert copy_remote(f"{address}#sha256={sha256}").path.read_bytes() == body
        expected = Checkpoint.load(tmp_path / "weights.safetensors").digest
        assert Checkpoint.load(address).digest == expected
        assert run("show", address) == 0
        with pytest.raises(DownloadError, match=r"s3://bucket/absent\.pt: no such file"):
            copy_remote("s3://bucket/absent.pt")
        with pytest.raises(DownloadError, match="is a folder; name a file in it"):
            copy_remote("s3://bucket/runs")
    finally:
        server.stop()
    assert Checkpoint.load(address).digest == expected  # the copy needs no connection


def test_fetching_a_digest_refreshes_the_copy_of_the_plain_address(memory, body, tmp_path):
    other = Checkpoint({"linear.weight": torch.zeros(3)}).save(tmp_path / "other.safetensors")
    address = put(memory, "bucket/model.safetensors", other.read_bytes())
    old = copy_remote(address).sha256
    put(memory, "bucket/model.safetensors", body)
    new = hashlib.sha256(body).hexdigest()
    assert run("fetch", address, "--sha256", new) == 0
    assert (copy_remote(address).sha256, old != new) == (new, True)


def test_two_processes_copy_once(body):
    with serving(body) as (url, requests):
        address = url.replace("cifar.tar.gz", "model.safetensors")
        with ThreadPoolExecutor(4) as pool:
            paths = set(pool.map(local_path, [address] * 4))
    assert len(paths) == 1
    assert len(requests) == 1


def test_the_cache_is_listed_and_pruned(memory, body, capsys):
    copy_remote(put(memory, "bucket/model.safetensors", body))
    unfinished = copies_folder() / f"{'0' * 32}.partial"
    unfinished.mkdir()
    (copies_folder() / "mine.txt").touch()
    cache = next(item for item in list_caches() if item.name == "remote checkpoints")
    assert len(cache.entries()) == 2
    assert run("doctor") == 0
    assert "cached remote checkpoints: 2 entries" in capsys.readouterr().out
    cache.prune()
    assert cache.entries() == []
    assert (copies_folder() / "mine.txt").exists()


def test_commands_and_recipes_take_addresses(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        seed = ord(name)
        model = load_model("resnet9:width=1", channels=1, seed=seed)
        Checkpoint.of(model).save(tmp_path / f"{name}.safetensors")
        put(memory, f"bucket/{name}.safetensors", (tmp_path / f"{name}.safetensors").read_bytes())
    pair = ("memory://bucket/a.safetensors", "memory://bucket/b.safetensors")
    assert run("mix", *pair, "-o", "soup.safetensors") == 0
    assert run("mix", "a.safetensors", "b.safetensors", "-o", "same.safetensors") == 0
    assert Checkpoint.load("soup.safetensors").digest == Checkpoint.load("same.safetensors").digest
    assert run("fetch", pair[0]) == 0
    assert str(local_path(pair[0])) in capsys.readouterr().out
    assert run("show", pair[0]) == 0
    assert f"copied from: {pair[0]}" in capsys.readouterr().out
    assert run("verify", pair[1]) == 0
    assert "1 verified, 0 damaged" in capsys.readouterr().out
    recipe = f"""
name = "two"
data = "digits"
[ingredients]
a = "{pair[0]}"
b = "{pair[1]}"
[soups.flat]
method = "uniform"
[evaluate]
threats = []
report_samples = 16
select_samples = 16
"""
    Path("two.toml").write_text(recipe, encoding="utf-8")
    assert run("plan", "two.toml") == 0
    assert load_recipe("two.toml").ingredients["a"].checkpoint == pair[0]
