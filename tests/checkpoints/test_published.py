"""Published checkpoints: the download from a server on this machine, its checks, the command."""

import dataclasses
import hashlib
import io
import json
import re
import shutil

import pytest
import torch
from markers import model_zoo, needs_robustbench
from web_server import files_below, serving

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.published import PUBLISHED_CHECKPOINTS, Published, fetch_published
from robustsoup.cli import main
from robustsoup.errors import CheckpointError, DataError, RequestError, StorageError
from robustsoup.models import load_model

NAME = "Gowal2021Improving_R18_ddpm_100m"
L2 = "L2/Wang2023Better_WRN-28-10"
SPEC = "preact_resnet18:width=2"
PLACE = f"robustbench/cifar10/Linf/{NAME}.pt"


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


STATE = load_model(SPEC).state_dict()
BODY = saved({"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}})
DIGEST = hashlib.sha256(BODY).hexdigest()


class Code:
    """An object whose pickle would run code."""

    def __reduce__(self):
        return print, ("unpickled",)


REAL = dict(PUBLISHED_CHECKPOINTS)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name in (NAME, L2):
        monkeypatch.setitem(
            PUBLISHED_CHECKPOINTS,
            name,
            dataclasses.replace(PUBLISHED_CHECKPOINTS[name], model=SPEC),
        )


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_a_checkpoint_is_downloaded_once_verified_and_recorded(tmp_path):
    progress = []
    with serving(BODY, kind="application/octet-stream") as (url, requests):
        first = fetch_published(
            NAME, tmp_path, url=url, on_progress=lambda done, total: progress.append((done, total))
        )
        fetched_again = fetch_published(NAME, tmp_path, url=url)
    assert len(requests) == 1
    assert progress[-1] == (len(BODY), len(BODY))
    assert files_below(tmp_path) == [PLACE, f"{PLACE}.json"]
    assert (first.path, first.sha256, first.first_seen) == (tmp_path / PLACE, DIGEST, True)
    assert fetched_again == dataclasses.replace(first, first_seen=False)
    record = json.loads((tmp_path / f"{PLACE}.json").read_text())
    assert record == {"name": NAME, "from": url, "sha256": DIGEST, "bytes": len(BODY)}
    loaded = Checkpoint.load(first.path).network(first.published.model)
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in loaded.state_dict().items())


def test_each_threat_model_has_a_folder(tmp_path):
    with serving(BODY) as (url, _):
        path = fetch_published(L2, tmp_path, url=url).path
    assert path == tmp_path / "robustbench/cifar10/L2/Wang2023Better_WRN-28-10.pt"


def test_a_pickle_from_before_torch_1_6_is_accepted(tmp_path):
    with serving(saved(STATE, _use_new_zipfile_serialization=False)) as (url, _):
        assert fetch_published(NAME, tmp_path, url=url).first_seen


PAGE = b"<!DOCTYPE html><title>Google Drive - Virus scan warning</title>"


@pytest.mark.parametrize(
    ("served", "text"),
    [
        (
            {"body": PAGE, "kind": "text/html"},
            "got text/html starting b'<!DOCTYPE html>', expected a file of torch.save",
        ),
        (
            {"body": b"<html>quota", "kind": "application/octet-stream"},
            "starting b'<html>quota', expected a file",
        ),
        ({"body": BODY[:900], "announced": len(BODY)}, "cut short"),
        ({"body": BODY[:900]}, "not a checkpoint that can be read with weights_only=True"),
        ({"body": b""}, "got 0 bytes"),
        ({"body": b"", "status": 404}, "the server answered 404 Not Found"),
        (
            {"body": saved({"state_dict": Code()})},
            "not a checkpoint that can be read with weights_only=True",
        ),
        ({"body": saved({"epoch": 3})}, "found no state dict"),
        (
            {"body": saved(load_model("preact_resnet18:width=4").state_dict())},
            (
                "not a checkpoint of preact_resnet18:width=2: conv_2d.weight: "
                "got shape (4, 3, 3, 3), the network expects (2, 3, 3, 3)"
            ),
        ),
        (
            {"body": saved(load_model("resnet9:width=2").state_dict())},
            "conv_2d.weight: the network has this tensor, the file does not",
        ),
        (
            {
                "body": saved(
                    {**STATE, "conv_2d.weight": torch.full_like(STATE["conv_2d.weight"], torch.nan)}
                )
            },
            "holds NaN",
        ),
    ],
)
def test_a_wrong_download_is_refused_and_leaves_no_file(tmp_path, capsys, served, text):
    with serving(**served) as (url, _), pytest.raises((DataError, CheckpointError)) as caught:
        fetch_published(NAME, tmp_path, url=url)
    message = str(caught.value)
    assert message.startswith(f"{url}: ")
    assert text in message
    assert "\n" not in message
    assert "tmp" not in message.replace(str(tmp_path), "")
    assert message.endswith(
        f"try again later, or save the file from {REAL[NAME].page} as {tmp_path / PLACE}"
    )
    assert files_below(tmp_path) == []
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["requested", "recorded"])
def test_a_wrong_digest_is_refused(tmp_path, source):
    expected, origin = "0" * 64, "as requested"
    options = {"sha256": expected}
    if source == "recorded":
        options, origin = {}, f"recorded in {tmp_path / PLACE}.json"
        (tmp_path / PLACE).parent.mkdir(parents=True)
        (tmp_path / f"{PLACE}.json").write_text(json.dumps({"sha256": expected}))
    before = files_below(tmp_path)
    with serving(BODY) as (url, _), pytest.raises(DataError) as caught:
        fetch_published(NAME, tmp_path, url=url, **options)
    text = f"{url}: wrong content: got sha256 {DIGEST}, expected {expected}, {origin}; try again"
    assert str(caught.value).startswith(text)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("spelling", [DIGEST, DIGEST.upper(), f"sha256:{DIGEST}"])
def test_every_spelling_of_the_right_digest_is_accepted(tmp_path, spelling):
    with serving(BODY) as (url, _):
        assert fetch_published(NAME, tmp_path, url=url, sha256=spelling).sha256 == DIGEST


@pytest.mark.parametrize("change", ["bits", "page"])
def test_a_file_that_changed_after_the_download_is_refused(tmp_path, change):
    with serving(BODY) as (url, _):
        path = fetch_published(NAME, tmp_path, url=url).path
    path.write_bytes(BODY[:-1] + b"x" if change == "bits" else PAGE)
    text = (
        "wrong content: got sha256"
        if change == "bits"
        else "starts with b'<!DOCTYPE html>', expected"
    )
    with pytest.raises(DataError, match=text) as caught:
        fetch_published(NAME, tmp_path, url="http://127.0.0.1:9/refused")
    assert str(caught.value).startswith(f"{path}: ")
    assert "delete it and fetch again" in str(caught.value)


def test_a_file_that_the_user_saved_is_verified(tmp_path):
    (tmp_path / PLACE).parent.mkdir(parents=True)
    (tmp_path / PLACE).write_bytes(BODY)
    fetched = fetch_published(NAME, tmp_path, url="http://127.0.0.1:9/refused")
    assert fetched.first_seen
    assert json.loads((tmp_path / f"{PLACE}.json").read_text())["sha256"] == DIGEST
    (tmp_path / PLACE).write_bytes(saved(load_model("resnet9:width=2").state_dict()))
    (tmp_path / f"{PLACE}.json").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint of preact_resnet18"):
        fetch_published(NAME, tmp_path)


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(
        RequestError,
        match=r'WRN-28", expected one of .*; did you mean "Wang2023Better_WRN-28-10"\?',
    ):
        fetch_published("Wang2023Better_WRN-28", tmp_path)
    with pytest.raises(RequestError, match=r'--sha256: got "abc", expected 64 hexadecimal digits'):
        fetch_published(NAME, tmp_path, sha256="abc")
    (tmp_path / PLACE).parent.mkdir(parents=True)
    (tmp_path / f"{PLACE}.json").write_text("[]")
    with pytest.raises(
        DataError, match=r"\.json: not a record of a digest; delete it and fetch again"
    ):
        fetch_published(NAME, tmp_path)
    assert files_below(tmp_path) == [f"{PLACE}.json"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "robustbench").write_text("a file")
    with serving(BODY) as (url, _), pytest.raises(StorageError, match="cannot be written"):
        fetch_published(NAME, tmp_path, url=url)


@needs_robustbench
def test_the_table_matches_robustbench():
    source = (model_zoo() / "cifar10.py").read_text(encoding="utf-8")
    for name, published in REAL.items():
        entries = re.findall(rf"\('{name.removeprefix('L2/')}', \{{(.*?)\}}\)", source, re.DOTALL)
        entry = entries[-1 if name.startswith("L2/") else 0]  # Linf stands first
        assert re.search(rf"'gdrive_id':\s*'{published.drive_id}'", entry)
        assert ("DMPreActResNet(" if published.model == "preact_resnet18" else "depth=28") in entry


# the command


def test_the_command_prints_path_digest_and_next_step(tmp_path, monkeypatch, capsys):
    with serving(BODY) as (url, _):
        monkeypatch.setattr(Published, "url", url)
        assert run("fetch", f"robustbench:{NAME}", "--data-root", tmp_path) == 0
        path, digest, after = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / PLACE)
    assert digest == f"sha256 {DIGEST} (seen for the first time)"
    evaluate = (
        f'evaluate "{path}" --model {SPEC} --data cifar10 --data-root {tmp_path} '
        '--threat "Linf 8/255" --attack autoattack'
    )
    assert after == f"next: robustsoup {evaluate}"
    assert (
        run("fetch", f"robustbench:{NAME}", "--data-root", tmp_path, "--sha256", DIGEST, "--json")
        == 0
    )
    assert json.loads(capsys.readouterr().out) == {
        "path": path,
        "model": SPEC,
        "threat": "Linf 8/255",
        "sha256": DIGEST,
        "first_seen": False,
        "next": f"robustsoup {evaluate}",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (
            (f"robustbench:{NAME}",),
            1,
            [
                "127.0.0.1:9/refused: cannot be downloaded",
                "save the file from https://drive.google.com/file/d/",
            ],
        ),
        (("robustbench:Nobody2021",), 2, ['got "Nobody2021"', NAME]),
        (("mnist",), 2, ['got "mnist", expected one of cifar10, cifar100, robustbench:']),
        (
            ("cifar10", "--sha256", DIGEST),
            2,
            ["--sha256: does not apply to cifar10, which is checked against published digests"],
        ),
    ],
)
def test_the_command_fails_in_one_line(tmp_path, monkeypatch, capsys, arguments, code, parts):
    monkeypatch.setattr(Published, "url", "http://127.0.0.1:9/refused")
    assert run("fetch", *arguments, "--data-root", tmp_path) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert all(part in captured.err for part in parts), captured.err
    shutil.rmtree(tmp_path / "robustbench", ignore_errors=True)
    assert files_below(tmp_path) == []


def test_a_recipe_names_a_published_checkpoint_as_fetch_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))
    recipe = tmp_path / "a.toml"
    recipe.write_text(
        f'name = "a"\ndata = "digits"\nmodel = "{SPEC}"\n'
        f'[ingredients]\none = "robustbench:{NAME}"\n'
        "[evaluate]\nthreats = []\n"
    )
    (tmp_path / PLACE).parent.mkdir(parents=True)
    (tmp_path / PLACE).write_bytes(BODY)
    assert (
        run("plan", recipe, "--data-root", tmp_path) == 2
    )  # the network has three channels, the data one
    assert f"{PLACE}: conv_2d.weight: got shape" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace(NAME, "Gowal"))
    assert run("plan", recipe, "--data-root", tmp_path) == 2
    assert 'robustbench: got "Gowal"' in capsys.readouterr().err
