"""`robustsoup push`: the real client of the hub against a hub on this machine."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import FEW, LINF, PAIR, run
from hub_server import serving_hub
from network_watch import refused_network

from robustsoup.checkpoints.checkpoint import Checkpoint

real = pytest.mark.extras
TARGET = "hf://someone/soup"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    with serving_hub() as server:
        yield server


def push(hub, *arguments, **environment):
    """Push in a new process, whose client of the hub reads HF_ENDPOINT when it is imported."""
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",  # the server speaks the older protocol of large files
        "HF_HOME": str(Path.cwd() / "hf"),
        "XDG_CACHE_HOME": str(Path.cwd() / "cache"),
    }
    return subprocess.run(
        [sys.executable, "-m", "robustsoup", "push", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | own | environment,
    )


@real
def test_a_checkpoint_and_its_card_arrive(here, hub):
    assert run("evaluate", "low.safetensors", *LINF, *FEW, "-o", ".") == 0
    done = push(hub, "low.safetensors", TARGET, "--private", "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(hub.url)
    sent = {name: content for (repo, name), content in hub.files.items() if repo == "someone/soup"}
    assert sent["low.safetensors"] == Path("low.safetensors").read_bytes()
    card = sent["README.md"].decode()
    evaluation = json.loads(Path("low.test.json").read_text(encoding="utf-8"))
    assert f"value: {evaluation['accuracy']['clean']['value']}" in card
    assert Checkpoint.load("low.safetensors").digest in card
    assert hub.private == {"someone/soup": True}
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert "secret" not in done.stdout + done.stderr


@real
def test_the_edited_card_of_a_run_is_sent(here, hub):
    assert run("search", *PAIR, *LINF, *FEW, "--step", 1, "-o", "r") == 0
    card = Path("r/README.md")
    text = card.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit\n", 1)
    card.write_text(text, encoding="utf-8")
    done = push(hub, "r/soup.safetensors", f"{TARGET}@main", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.files["someone/soup", "README.md"] == card.read_bytes()
    assert json.loads(done.stdout)["repository"] == "someone/soup"


@real
def test_what_the_hub_refuses_is_one_line(here, hub):
    done = push(hub, "low.safetensors", TARGET, "--yes", HF_TOKEN="")
    assert done.returncode == 1
    assert "hf://someone/soup: " in done.stderr.splitlines()[-1]
    assert "hf auth login" in done.stderr
    hub.private["someone/soup"] = False
    done = push(hub, "low.safetensors", TARGET, "--yes", "--private")
    assert done.returncode == 2
    assert "exists and is public" in done.stderr
    assert hub.files == {}


def test_the_question_is_not_mixed_with_json(here, capsys, monkeypatch):
    answer = io.StringIO("n\n")
    monkeypatch.setattr(answer, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", answer)
    with refused_network():
        assert run("push", "low.safetensors", TARGET, "--json") == 2
    printed = capsys.readouterr()
    assert "Send these files?" in printed.err
    assert printed.out.strip() == ""  # click prints a blank


def test_nothing_is_sent_without_a_yes(here, capsys):
    with refused_network() as attempts:
        assert run("push", "low.safetensors", TARGET, "--dry-run", "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["url"] is None
        assert set(shown["files"]) == {"low.safetensors", "README.md"}
        assert run("push", "low.safetensors", TARGET) == 2
        assert "requires --yes where nobody can answer" in capsys.readouterr().err
    assert attempts == []


def test_a_readme_of_other_things_is_not_sent(here, capsys):
    Path("README.md").write_text("# my project\n", encoding="utf-8")
    assert run("push", "low.safetensors", TARGET, "--dry-run", "--json") == 0
    size = json.loads(capsys.readouterr().out)["files"]["README.md"]
    assert size > 500


def test_an_adapter_is_not_sent_without_its_base(here, capsys):
    folder = Path("adapter")
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "adapter_model.safetensors").touch()
    assert run("push", str(folder / "adapter_model.safetensors"), TARGET, "--yes") == 2
    message = capsys.readouterr().err
    assert "mix it first: robustsoup mix adapter --coefficients 1 -o merged.safetensors" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("low.safetensors", "someone/soup"), "expected hf://ORG/NAME"),
        (("low.safetensors", "hf://someone/soup/file.pt"), "got a file, expected hf://ORG/NAME"),
        ((".", TARGET), "got a folder, expected the file"),
        (("absent.safetensors", TARGET), "no such file"),
    ],
)
def test_wrong_requests(here, capsys, arguments, message):
    assert run("push", *arguments, "--yes") == 2
    assert message in capsys.readouterr().err
