"""CIFAR-10: the download from a server on this machine, and the published files."""

import base64
import hashlib
import io
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from markers import needs_cifar10
from small_data import all_ids
from web_server import files_below, serving

from robustsoup.data import (
    fetch_cifar10,
    load_data,
)
from robustsoup.data.cifar import CIFAR10
from robustsoup.data.download import _make_request, data_root
from robustsoup.data.splits import channel_statistics
from robustsoup.errors import DataError, DownloadError
from robustsoup.files import cache_folder

FILES = {"data_batch_1": b"one" * 2000, "test_batch": bytes(range(256)) * 20}
FILE_MD5 = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}


def make_archive(files, extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in [
            *((f"cifar-10-batches-py/{name}", content) for name, content in files.items()),
            *extra,
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def fetch(root, url, body, **options):
    return fetch_cifar10(
        root, url=url, archive_md5=hashlib.md5(body).hexdigest(), file_md5=FILE_MD5, **options
    )


UNPACKED = ["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"]


def test_download_happens_once_and_unpacks_only_what_is_expected(tmp_path):
    body = make_archive(FILES, extra=[("../evil", b"x"), ("cifar-10-batches-py/other", b"y")])
    root, progress = tmp_path / "root", []
    with serving(body) as (url, requests):
        folder = fetch(
            root, url, body, on_progress=lambda done, total: progress.append((done, total))
        )
        assert fetch(root, url, body) == folder == root / "cifar-10-batches-py"
    assert len(requests) == 1
    assert progress[-1] == (len(body), len(body))
    assert files_below(tmp_path) == [f"root/{name}" for name in UNPACKED]
    assert all((folder / name).read_bytes() == content for name, content in FILES.items())


def test_simultaneous_first_downloads_fetch_once(tmp_path):
    body = make_archive(FILES)
    with serving(body) as (url, requests), ThreadPoolExecutor(6) as pool:
        folders = list(pool.map(lambda _: fetch(tmp_path / "root", url, body), range(6)))
    assert folders == [tmp_path / "root" / "cifar-10-batches-py"] * 6
    assert len(requests) == 1
    assert files_below(tmp_path) == [f"root/{name}" for name in UNPACKED]


def test_a_missing_file_is_fetched_again(tmp_path):
    body = make_archive(FILES)
    with serving(body) as (url, requests):
        folder = fetch(tmp_path, url, body)
        (folder / "test_batch").unlink()
        fetch(tmp_path, url, body)
    assert len(requests) == 2
    assert files_below(tmp_path) == UNPACKED


def test_an_archive_that_the_user_saved_is_used_and_stays(tmp_path):
    body = make_archive(FILES)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(body)
    fetch(tmp_path, "http://127.0.0.1:9/refused", body)
    assert files_below(tmp_path) == sorted([*UNPACKED, "cifar-10-python.tar.gz"])


def test_the_environment_names_the_root(tmp_path, monkeypatch):
    body = make_archive(FILES)
    monkeypatch.setenv("ROBUSTSOUP_DATA", str(tmp_path / "named"))
    with serving(body) as (url, _):
        assert fetch(None, url, body) == tmp_path / "named" / "cifar-10-batches-py"
    monkeypatch.setenv("ROBUSTSOUP_DATA", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root() == cache_folder() / "data"


@pytest.mark.parametrize(
    ("served", "text"),
    [
        ({"body": make_archive({**FILES, "more": b""})}, "wrong content: got md5 "),
        (
            {"body": b"<!DOCTYPE html><p>log in", "kind": "text/html"},
            "got text/html starting b'<!DOCTYPE html>', exp",
        ),
        ({"body": make_archive(FILES)[:100], "announced": 9000}, "cut short"),
        ({"body": b""}, "got 0 bytes, expected a gzip archive"),
        (
            {"body": b"busy", "status": 503},
            "the server answered 503 Service Unavailable, expected 200",
        ),
        ({"body": b"gone", "status": 404}, "the server answered 404 Not Found"),
    ],
)
def test_a_bad_download_is_refused_and_leaves_nothing(tmp_path, served, text):
    with serving(**served) as (url, _), pytest.raises(DownloadError) as caught:
        fetch(tmp_path, url, make_archive(FILES))
    message = str(caught.value)
    assert message.startswith(f"{url}: ")
    assert text in message
    assert "again" in message
    assert "\n" not in message
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/refused", "no url"])
def test_no_server(tmp_path, url):
    with pytest.raises(
        DataError,
        match=f"{url}: cannot be downloaded .*; try again, or download cifar-10-python.tar.gz",
    ):
        fetch(tmp_path, url, b"")
    assert files_below(tmp_path) == []


def test_an_archive_with_a_wrong_or_missing_file_is_refused(tmp_path):
    wrong, short = (
        make_archive({**FILES, "test_batch": b"other"}),
        make_archive({"data_batch_1": b"one" * 2000}),
    )
    with (
        serving(wrong) as (url, _),
        pytest.raises(DataError, match="test_batch: wrong content: got md5"),
    ):
        fetch(tmp_path / "wrong", url, wrong)
    with (
        serving(short) as (url, _),
        pytest.raises(DataError, match="no file cifar-10-batches-py/test_batch in it"),
    ):
        fetch(tmp_path / "short", url, short)
    assert not (tmp_path / "wrong" / "cifar-10-batches-py" / "test_batch").exists()


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match="file: got a file, expected a folder for data; set another root"
    ):
        load_data("cifar10", root=tmp_path / "file")


class Bomb:
    """Pickled, it creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_wrong_file_is_named_and_never_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in CIFAR10.file_md5:
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(DataError) as caught:
        load_data("cifar10", root=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'data_batch_1'}: wrong content: got md5 ")
    assert "expected c99cafc152244af753f735de768cd75f; delete it and load again" in message
    assert not (tmp_path / "exploded").exists()


@needs_cifar10
def test_a_truncated_file_is_named(tmp_path):
    real = data_root() / "cifar-10-batches-py"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in CIFAR10.file_md5:
        (folder / name).symlink_to(real / name)
    (folder / "data_batch_3").unlink()
    (folder / "data_batch_3").write_bytes((real / "data_batch_3").read_bytes()[:-1])
    with pytest.raises(
        DataError,
        match=r"data_batch_3: wrong content: got md5 .*expected 54ebc095f3ab1f0389bbae665268c",
    ):
        load_data("cifar10", root=tmp_path)


@needs_cifar10
def test_cifar10():
    data, other = load_data("cifar10"), load_data("cifar10", seed=1)
    assert [len(data.train), len(data.val), len(data.test)] == [45000, 5000, 10000]
    assert data.train.images.shape == (45000, 3, 32, 32)
    assert data.train.images.is_contiguous()
    assert torch.equal(all_ids(data.train, data.val), torch.arange(50000))
    assert torch.equal(data.test.ids, torch.arange(10000))
    assert torch.equal(other.test.images, data.test.images)
    assert data.record["split_digest"] != other.record["split_digest"]
    assert torch.cat([data.train.labels, data.val.labels]).bincount().tolist() == [5000] * 10
    assert data.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    mean, std = channel_statistics(torch.cat([data.train.images, data.val.images]))
    assert data.record["mean"] == pytest.approx(mean, abs=1e-3)
    assert data.record["std"] == pytest.approx(std, abs=1e-3)


def test_a_url_may_hold_a_password_and_any_letters():
    request = _make_request("http://me:p%40ss@host:81/run ü/a%20b.pth?key=ü&b=1#end")
    assert request.full_url == "http://host:81/run%20%C3%BC/a%20b.pth?key=%C3%BC&b=1"
    token = base64.b64encode(b"me:p@ss").decode()
    assert request.unredirected_hdrs == {"Authorization": f"Basic {token}"}
    assert _make_request("https://host/a.pth").unredirected_hdrs == {}
