"""The command line: its exit codes, the examples in its help, one line for whatever is wrong, and the public names."""

import contextlib
import inspect
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

import robustsoup
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.cli import app, main, spread
from robustsoup.data import load_data, to_float
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.models import load_model
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.mixing import mix
from robustsoup.training.train import train

DIGITS = load_data("digits")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """main puts the working folder on sys.path and --threads sets torch's threads; both are undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def command(*arguments, store, **more):
    env = {**os.environ, "ROBUSTSOUP_STORE": str(store), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "robustsoup", *map(str, arguments)]
    return subprocess.Popen(
        line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of one small digits network and others that do not fit: base, low, high, wide, coloured (.safetensors)."""
    folder = tmp_path_factory.mktemp("made")
    asked = {"batch_size": 32, "device": "cpu", "precision": "float32"}
    base = train(
        load_model("resnet9:width=2", channels=1),
        DIGITS.train.first(512),
        threat="clean",
        epochs=4,
        lr=0.2,
        **asked,
    )
    base.save(folder / "base.safetensors")
    for name, threat in (("low", "Linf 8/255"), ("high", "Linf 48/255")):
        train(
            folder / "base.safetensors",
            DIGITS.train.first(256),
            threat=threat,
            epochs=1,
            lr=0.05,
            **asked,
        ).save(folder / f"{name}.safetensors")
    fitted = {"data": DIGITS.record, "trained_on": ["train"]}
    Checkpoint.of(load_model("resnet9:width=4", channels=1), fitted).save(
        folder / "wide.safetensors"
    )
    Checkpoint.of(load_model("resnet9:width=2", channels=3)).save(folder / "coloured.safetensors")
    torch.save(dict(Checkpoint.load(folder / "low.safetensors").tensors), folder / "low.pth")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A working folder that holds copies of those files."""
    place = tmp_path / "here"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    return place


LINF = ("--data", "digits", "--threat", "Linf 32/255")
FEW = ("--steps", 2, "--samples", 64)


# the examples in the help


def examples():
    """command -> the robustsoup lines, as lists of words, that its docstring shows."""
    found = {}
    for registered in app.registered_commands:
        name = registered.name or registered.callback.__name__
        shown = re.findall(r"`(robustsoup [^`]+)`", inspect.getdoc(registered.callback))
        found[name] = [shlex.split(" ".join(line.split())) for line in shown]
    return found


def test_every_command_shows_an_example_of_itself():
    shown = examples()
    assert {
        "demo",
        "run",
        "plan",
        "train",
        "check",
        "mix",
        "search",
        "learn",
        "evaluate",
        "compare",
        "report",
    } <= set(shown)
    for name, lines in shown.items():
        assert any(line[1] == name for line in lines), name


def test_help_shows_the_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, lines in examples().items():
        assert run(name, "--help") == 0
        said = capsys.readouterr().out
        assert "Example" in said
        assert f"robustsoup {name}" in said, lines


def test_the_examples_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = examples()
    lines = list(shown["train"])
    missing = sorted(
        {
            word
            for line in itertools.chain(*shown.values())
            for word in line
            if re.fullmatch(r"eps\d+\.safetensors", word)
        }
    )
    model = next(line for line in lines if "--from" in line)
    for name in missing:  # the other ingredients, as the text of train says to make them
        if name not in {word for line in lines for word in line}:
            eps = re.search(r"\d+", name).group()
            lines.append(
                [
                    re.sub(
                        r"eps\d+\.safetensors",
                        name,
                        re.sub(r"Linf \d+/255", f"Linf {eps}/255", word),
                    )
                    for word in model
                ]
            )
    for group in (
        "check",
        "mix",
        "learn",
        "evaluate",
        "compare",
        "search",
        "demo",
        "run",
        "plan",
        "report",
    ):
        lines += [line for line in shown[group] if line not in lines]
    for line in lines:
        assert run(*line[1:]) == 0, (line, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "steps, " in said
    for written in (
        "base.safetensors",
        "soup.safetensors",
        "learned/soup.safetensors",
        "learned/coefficients.safetensors",
        "turned/dial.safetensors",
        "turned/coefficients.svg",
        "cleaner.safetensors",
        "best/soup.safetensors",
        "best/report.html",
        "runs/quickstart/report.html",
        "runs/quickstart/results.json",
        "runs/ten/results.json",
        "runs/ten/soup.safetensors",
    ):
        assert (tmp_path / written).exists(), written
    assert not [p for p in tmp_path.rglob(".*") if "store" not in p.parts]
    results = json.loads((tmp_path / "runs" / "quickstart" / "results.json").read_text())
    figures = {p.stem for p in (tmp_path / "runs" / "quickstart" / "figures").iterdir()}
    assert {"ternary", "tradeoff"} <= {figure.split("-")[0] for figure in figures}
    robust = {row["name"]: row["test"]["Linf 64/255"]["value"] for row in results["rows"]}
    assert robust["eps96"] - robust["eps16"] > 0.2  # the trade-off can be seen
    clean = {row["name"]: row["test"]["clean"]["value"] for row in results["rows"]}
    assert clean["eps16"] - clean["eps96"] > 0.02


# what the commands write


def test_train_writes_a_checkpoint_that_goes_on_from_another(here, capsys):
    code = run(
        "train",
        "--from",
        "base.safetensors",
        *LINF,
        "--epochs",
        1,
        "--lr",
        0.05,
        "-o",
        "new.safetensors",
        "--objective",
        "mixed 0.4",
        "--seed",
        0,
        "--early-stop",
        "--threads",
        1,
    )
    assert code == 0
    record = Checkpoint.load("new.safetensors").provenance
    assert record["parents"] == [
        {"digest": Checkpoint.load("base.safetensors").digest, "file": "base.safetensors"}
    ]
    assert record["training"]["objective"] == "mixed 0.4"
    assert record["early_stopped_at"] == 1
    assert "new.safetensors: loss" in capsys.readouterr().out
    assert not list(here.glob(".*"))


def test_train_takes_every_method_and_synthetic_images(here, capsys):
    val = load_data("digits").val
    numpy.savez(
        here / "made.npz", image=val.images.permute(0, 2, 3, 1).numpy(), label=val.labels.numpy()
    )
    code = run(
        "train",
        "--from",
        "base.safetensors",
        *LINF,
        "--epochs",
        1,
        "--lr",
        0.05,
        "-o",
        "new.safetensors",
        "--objective",
        "trades 5",
        "--schedule",
        "one-cycle",
        "--nesterov",
        "--weight-decay",
        5e-4,
        "--no-weight-decay-bn",
        "--label-smoothing",
        0.1,
        "--clip-grad",
        1,
        "--bn-momentum",
        0.05,
        "--ema",
        0.9,
        "--synthetic",
        "made.npz",
        "--synthetic-fraction",
        0.5,
    )
    assert code == 0, capsys.readouterr().err
    record = Checkpoint.load("new.safetensors").provenance
    asked = {
        "objective": "trades 5",
        "schedule": "one-cycle",
        "nesterov": True,
        "weight_decay_bn": False,
        "clip_grad": 1.0,
        "label_smoothing": 0.1,
        "bn_momentum": 0.05,
        "ema": 0.9,
        "synthetic_fraction": 0.5,
    }
    assert asked.items() <= record["training"].items()
    assert record["synthetic"][0]["file"] == "made.npz"


@pytest.mark.parametrize(
    ("spelled", "alpha"),
    [
        (["1/4", "3/4"], [0.25, 0.75]),
        (["0.25", "0.75"], [0.25, 0.75]),
        (["1", "0"], [1.0, 0.0]),
        (["25e-2", "7.5e-1"], [0.25, 0.75]),
    ],
)
def test_mix_takes_coefficients_as_people_write_them(here, spelled, alpha):
    assert (
        run(
            "mix",
            "low.safetensors",
            "high.safetensors",
            "--coefficients",
            *spelled,
            "-o",
            "soup.safetensors",
        )
        == 0
    )
    expected = mix(["low.safetensors", "high.safetensors"], alpha, buffers="average")
    assert Checkpoint.load("soup.safetensors").digest == expected.digest
    if alpha == [1.0, 0.0]:
        assert expected.digest == Checkpoint.load("low.safetensors").digest


def test_mix_without_coefficients_is_uniform_and_coefficients_may_come_first(here):
    assert run("mix", "low.safetensors", "high.safetensors", "-o", "a.safetensors") == 0
    assert (
        run(
            "mix",
            "--coefficients",
            "1/2",
            "1/2",
            "--buffers",
            "average",
            "low.safetensors",
            "high.safetensors",
            "-o",
            "b.safetensors",
        )
        == 0
    )
    assert (
        run(
            "mix",
            "low.safetensors",
            "high.safetensors",
            "--coefficients=0.5",
            "--coefficients=0.5",
            "-o",
            "c.safetensors",
        )
        == 0
    )
    assert len({Checkpoint.load(f"{name}.safetensors").digest for name in "abc"}) == 1


def test_spreading_leaves_other_words_alone():
    assert spread(["mix", "1.pth", "--coefficients", "1/3", "2/3", "-o", "2"]) == [
        "mix",
        "1.pth",
        "--coefficients",
        "1/3",
        "--coefficients",
        "2/3",
        "-o",
        "2",
    ]
    assert spread(["mix", "--coefficients", "a.safetensors", "-o", "x"]) == [
        "mix",
        "--coefficients",
        "a.safetensors",
        "-o",
        "x",
    ]


def test_mix_can_recalibrate(here):
    base = ["mix", "low.safetensors", "high.safetensors", "--data", "digits"]
    assert run(*base, "--buffers", "recalibrate", "-o", "clean.safetensors") == 0
    attacked = ["--buffers", "recalibrate-adversarial", "--threat", "Linf 48/255"]
    assert run(*base, *attacked, "-o", "attacked.safetensors") == 0
    one, two = Checkpoint.load("clean.safetensors"), Checkpoint.load("attacked.safetensors")
    assert torch.equal(one.tensors["linear.weight"], two.tensors["linear.weight"])
    assert not torch.equal(one.tensors["prep.1.running_mean"], two.tensors["prep.1.running_mean"])
    assert two.provenance["buffers"]["threat"] == "Linf 48/255"


def test_learn_writes_coefficients_that_mix_takes(here, capsys):
    files = ["low.safetensors", "high.safetensors"]
    assert run("learn", *files, *LINF, "--epochs", 1, "--detach", 0.5, "-o", "learned") == 0
    assert re.search(r"mean coefficients low 0\.\d\d high 0\.\d\d", capsys.readouterr().out)
    drawn = {f"coefficients.{ending}" for ending in ("png", "svg", "pdf")}
    written = {"coefficients.safetensors", "coefficients.csv", "soup.safetensors"} | drawn
    assert {p.name for p in (here / "learned").iterdir()} == written
    table = (here / "learned" / "coefficients.csv").read_text().splitlines()
    assert table[0] == "layer,low,high,entropy,moved,slope"
    assert len(table) == 26
    alpha = Coefficients.load("learned/coefficients.safetensors")
    assert alpha.record["learning"]["detach"] == 0.5
    for order, name in ((files, "a.safetensors"), (files[::-1], "b.safetensors")):
        assert (
            run("mix", *order, "--coefficients", "learned/coefficients.safetensors", "-o", name)
            == 0
        )
        assert Checkpoint.load(name).digest == Checkpoint.load("learned/soup.safetensors").digest


def test_a_dial_is_learned_once_and_turned_by_mix(here, capsys):
    files = ["low.safetensors", "high.safetensors"]
    assert (
        run(
            "learn",
            *files,
            *LINF,
            "--epochs",
            1,
            "--dial",
            "--granularity",
            "block",
            "-o",
            "turned",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert re.search(r"robust and the clean end: t = 0: low 0\.\d\d high 0\.\d\d; t = 1: low", said)
    assert "--coefficients turned/dial.safetensors --at 0.7" in said
    drawn = {f"coefficients.{ending}" for ending in ("png", "svg", "pdf")}
    assert {p.name for p in (here / "turned").iterdir()} == {"dial.safetensors"} | drawn
    dial = Dial.load("turned/dial.safetensors")
    for t in ("0", "0.7", "1"):
        assert (
            run(
                "mix",
                *files,
                "--coefficients",
                "turned/dial.safetensors",
                "--at",
                t,
                "-o",
                f"at{t}.safetensors",
            )
            == 0
        )
        wanted = mix(files, dial.at(float(t)), buffers="average")
        assert Checkpoint.load(f"at{t}.safetensors").digest == wanted.digest
    assert Checkpoint.load("at0.safetensors").digest != Checkpoint.load("at1.safetensors").digest


def test_learning_can_stop_early_and_read_its_ingredients_from_their_files(here, capsys):
    files = ["low.safetensors", "high.safetensors"]
    asked = (*LINF, "--epochs", 2, "--early-stop", "--precision", "float32")
    assert run("learn", *files, *asked, "--budget", 0, "-o", "streamed") == 0
    assert "2 ingredients, 0.00 GiB: read from their files" in capsys.readouterr().err
    assert run("learn", *files, *asked, "--place", "memory", "-o", "resident") == 0
    assert "read from their files" not in capsys.readouterr().err
    one, two = (
        Coefficients.load(f"{place}/coefficients.safetensors") for place in ("streamed", "resident")
    )
    assert torch.equal(one.alpha, two.alpha)
    assert one.record["early_stopped_at"] in (1, 2)


def test_a_folder_holds_what_was_learned_last(here):
    files = ["low.safetensors", "high.safetensors"]
    foreign = ["low.pth", "low.pth", "--model", "resnet9:width=2"]
    assert run("learn", *foreign, *LINF, "--epochs", 1, "-o", "out") == 0
    assert {p.suffix for p in (here / "out").glob("soup.*")} == {".pth", ".safetensors"}
    assert run("learn", *files, *LINF, "--epochs", 1, "-o", "out") == 0
    assert {p.name for p in (here / "out").glob("soup.*")} == {"soup.safetensors"}
    assert run("learn", *files, *LINF, "--epochs", 1, "--dial", "-o", "out") == 0
    assert {p.name for p in (here / "out").glob("*.safetensors")} == {"dial.safetensors"}
    assert not (here / "out" / "coefficients.csv").exists()


def test_the_base_gives_its_statistics(here):
    asked = ("--buffers", "base", "--base", "base.safetensors")
    files = ["low.safetensors", "high.safetensors"]
    assert (
        run(
            "learn", *files, *LINF, "--epochs", 1, "--learning-buffers", "base", *asked, "-o", "out"
        )
        == 0
    )
    assert run("mix", *files, *asked, "-o", "soup.safetensors") == 0
    base = Checkpoint.load("base.safetensors").tensors
    for soup in ("out/soup.safetensors", "soup.safetensors"):
        assert torch.equal(
            Checkpoint.load(soup).tensors["prep.1.running_mean"], base["prep.1.running_mean"]
        )


def test_a_single_ingredient_is_learned_with_a_warning(here, capsys):
    assert run("learn", "low.safetensors", *LINF, "--epochs", 1, "-o", "alone") == 0
    assert "warning: a single ingredient" in capsys.readouterr().err
    soup = Checkpoint.load("alone/soup.safetensors")
    low = Checkpoint.load("low.safetensors")
    assert all(torch.equal(soup.tensors[name], low.tensors[name]) for name in low.parameters)


def test_a_greedy_search_keeps_what_does_not_lose(here, capsys):
    asked = (*LINF, *FEW, "--method", "greedy", "--score", "0.5 clean + 0.5 Linf 32/255", "--json")
    assert run("search", "low.safetensors", "high.safetensors", *asked, "-o", "best") == 0
    said = json.loads(capsys.readouterr().out)
    row = next(row for row in said["rows"] if row["role"] == "greedy")
    assert sum(row["coefficients"]) == pytest.approx(1)
    assert said["selection"]["chosen"] == "greedy"
    assert (here / "best" / "soup.safetensors").exists()
    assert "greedy" in (here / "best" / "report.html").read_text()


def test_evaluate_prints_and_keeps_verdicts(here, capsys):
    assert (
        run(
            "evaluate",
            "low.safetensors",
            "high.safetensors",
            *LINF,
            *FEW,
            "--json",
            "-o",
            "verdicts",
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"low", "high"}
    for name, content in said.items():
        assert content["accuracy"]["clean"]["n"] == 64
        assert content["leakage"] == {"status": "known", "why": ""}
        kept = Evaluation.load(here / "verdicts" / f"{name}.test.json")
        assert kept.to_json() == content
        assert len(kept.ids) == 64
    assert run("evaluate", "low.safetensors", *LINF, *FEW, "--split", "train") == 0
    told = capsys.readouterr()
    assert "64 samples of train" in told.out
    assert "was trained on the train split itself" in told.err


def test_evaluate_tells_files_of_one_name_apart(here, capsys):
    for folder in ("a", "b"):
        (here / folder).mkdir()
        shutil.copy("low.safetensors", here / folder / "low.safetensors")
    files = ["a/low.safetensors", "b/low.safetensors", "low.safetensors"]
    assert run("evaluate", *files, "--data", "digits", "--samples", 64, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


@pytest.mark.parametrize(
    ("more", "record", "said"),
    [
        ((), {"attack": "apgd", "loss": "ce"}, "APGD-CE 2 steps, 1 restart, float32"),
        (
            ("--attack", "pgd"),
            {"attack": "pgd", "loss": "ce"},
            "PGD-CE 2 steps, 1 restart, float32",
        ),
        (
            ("--loss", "dlr", "--restarts", 2),
            {"loss": "dlr", "restarts": 2},
            "APGD-DLR 2 steps, 2 restarts, float32",
        ),
        (
            ("--precision", "bfloat16"),
            {"search_precision": "bfloat16", "precision": "float32"},
            "APGD-CE 2 steps, 1 restart, float32, searched in bfloat16",
        ),
        (("--eot", 3, "--batch-size", 16), {"eot": 3, "rows": 16}, "APGD-CE 2 steps"),
    ],
)
def test_evaluate_says_how_it_attacked(here, capsys, more, record, said):
    assert run("evaluate", "low.safetensors", *LINF, *FEW, *more, "-o", "verdicts") == 0
    told = capsys.readouterr()
    line = " ".join(told.out.split())
    assert f"64 samples of test, 95 % Wilson intervals, {said}" in line
    assert ("searched in" in line) == ("searched in" in said)
    kept = Evaluation.load("verdicts/low.test.json")
    assert {key: kept.record[key] for key in record} == record
    assert ("left after each" in told.out) == (len(kept.record["broken_by"]) > 2)
    assert not list(here.glob("verdicts/*.points.npz"))


def test_evaluate_tells_what_each_attempt_left(here, capsys):
    assert (
        run("evaluate", "low.safetensors", *LINF, *FEW, "--loss", "targeted dlr", "-o", "verdicts")
        == 0
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if "left after each" in line)
    left = Evaluation.load("verdicts/low.test.json").after_each("Linf 32/255")
    assert line.startswith("low, Linf 32/255, left after each: clean ")
    assert re.findall(r"([^,:]+) (\d+\.\d)%", line.partition("each:")[2]) == [
        (f" {name}", f"{accuracy.value:.1%}"[:-1]) for name, accuracy in left.items()
    ]
    assert [name for name in left if "target" in name] == [
        f"apgd-t target {rank}" for rank in range(1, 10)
    ]


def test_evaluate_keeps_points_where_it_is_told(here):
    assert run("evaluate", "low.safetensors", *LINF, *FEW, "--keep-points", "-o", "verdicts") == 0
    assert Evaluation.load("verdicts/low.test.json").threats["Linf 32/255"].x_adv.shape == (
        64,
        1,
        8,
        8,
    )
    assert {p.name for p in (here / "verdicts").iterdir()} == {
        "low.test.json",
        "low.test.npz",
        "low.test.points.npz",
    }


def test_evaluate_warns_and_the_record_remembers(here, capsys):
    low = Checkpoint.load("low.safetensors")
    tensors = {**low.tensors, "linear.weight": low.tensors["linear.weight"] * 10_000}
    Checkpoint(tensors, low.provenance).save(here / "masked.safetensors")
    assert run("evaluate", "masked.safetensors", *LINF, *FEW, "-o", "verdicts") == 0
    assert (
        "robustsoup: warning: masked: the gradient is exactly zero at the start for"
        in capsys.readouterr().err
    )
    assert len(Evaluation.load("verdicts/masked.test.json").warnings) == 1
    assert run("evaluate", "low.safetensors", *LINF, *FEW) == 0
    assert "warning" not in capsys.readouterr().err


SLOW = (
    "evaluate",
    "low.safetensors",
    "high.safetensors",
    *LINF,
    "--steps",
    60,
    "--restarts",
    3,
    "--threads",
    1,
)
AT_ONCE = """
import sys
from robustsoup.cli import main
from robustsoup.progress import SavedState

SavedState.__init__.__defaults__ = (0.0,)  # saved whenever there is news, not every 30 s
main(sys.argv[1:])
"""


def test_evaluate_goes_on_where_it_was_killed(here, tmp_path, capsys):
    """SIGKILL as soon as something is settled; what was settled is under $ROBUSTSOUP_STORE/unfinished until all is done."""
    assert run(*SLOW, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    store = tmp_path / "store"
    assert not list(store.rglob("*.pt"))
    env = {**os.environ, "ROBUSTSOUP_STORE": str(store), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", AT_ONCE, *map(str, SLOW)], env=env, stdout=subprocess.DEVNULL
    )

    def settled():
        for state in store.glob("unfinished/*.pt"):
            return int(
                torch.load(state, weights_only=True)["outcomes"]["Linf 32/255"]["settled"].sum()
            )
        return 0

    deadline = time.monotonic() + 120
    while not settled() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert 0 < settled() < 3 * len(DIGITS.test)
    assert run(*SLOW, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    for content in (*whole.values(), *again.values()):
        content.pop("seconds")
    assert again == whole
    assert [p for p in (store / "unfinished").iterdir() if not p.name.endswith(".tmp")] == []


def test_compare_tells_two_evaluations_apart(here, capsys):
    assert run("evaluate", "low.safetensors", "high.safetensors", *LINF, *FEW, "-o", "judged") == 0
    capsys.readouterr()
    records = ("judged/low.test.json", "judged/high.test.json")
    assert run("compare", *records, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    low, high = (Evaluation.load(path) for path in records)
    assert said == json.loads(json.dumps(robustsoup.compare(low, high).to_json()))
    assert said["n"] == 64
    assert set(said["rows"]) == {"clean", "Linf 32/255"}
    for key, row in said["rows"].items():
        assert (row["a"]["hits"], row["b"]["hits"]) == (
            low.accuracy[key].hits,
            high.accuracy[key].hits,
        )
        assert row["value"] == pytest.approx((row["b"]["hits"] - row["a"]["hits"]) / 64)
        assert row["low"] <= row["value"] <= row["high"]
    assert run("compare", *records) == 0
    text = capsys.readouterr().out
    assert "second less first" in text
    assert "64 samples, paired" in text
    assert f"{low.accuracy['clean'].value:.1%}" in text
    assert "note: 2 comparisons; the p-values are not adjusted" in text


def test_compare_notes_another_protocol(here, capsys):
    assert run("evaluate", "low.safetensors", *LINF, *FEW, "-o", "one") == 0
    assert (
        run("evaluate", "low.safetensors", *LINF, "--steps", 3, "--samples", 32, "-o", "two") == 0
    )
    capsys.readouterr()
    assert run("compare", "one/low.test.json", "two/low.test.json") == 0
    said = capsys.readouterr().out
    assert "note: on 32 common samples, of 64 in the first and 32 in the second" in said
    assert "note: different steps: 2 and 3; the robust accuracies are not comparable" in said


SEARCH = ("search", "low.safetensors", "high.safetensors", *LINF, *FEW, "--step", 0.5)


def test_search_picks_writes_and_tells(here, capsys):
    assert run(*SEARCH, "--require", "clean>=0.2", "--json", "-o", "best") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["selection"]["met"] is True
    assert said["selection"]["require"] == ["clean>=0.2"]
    chosen = next(row for row in said["rows"] if row["name"] == said["selection"]["chosen"])
    assert chosen["test"]["clean"]["n"] == 64
    soup = Checkpoint.load(here / "best" / said["soup"])
    assert (
        soup.digest
        == mix(
            ["low.safetensors", "high.safetensors"], chosen["coefficients"], buffers="average"
        ).digest
    )
    assert (here / "best" / "report.html").is_file()
    started = time.monotonic()
    assert run(*SEARCH, "--require", "clean>=0.2", "-o", "best") == 0
    assert "already in the store" not in capsys.readouterr().err
    assert time.monotonic() - started < 30


def test_search_may_screen(here, capsys):
    asked = (
        "search",
        "low.safetensors",
        "high.safetensors",
        *LINF,
        "--steps",
        12,
        "--samples",
        64,
        "--step",
        0.25,
    )
    assert run(*asked, "--screen", "--json", "-o", "best") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["protocol"]["screened"] is True
    rows = {row["name"]: row for row in said["rows"]}
    assert not rows[said["selection"]["chosen"]].get("screened")
    assert any(row.get("screened") for row in rows.values())
    soup = Checkpoint.load(here / "best" / said["soup"])
    alpha = rows[said["selection"]["chosen"]]["coefficients"]
    assert (
        soup.digest == mix(["low.safetensors", "high.safetensors"], alpha, buffers="average").digest
    )
    assert rows[said["selection"]["chosen"]]["test"]["clean"]["n"] == 64
    assert run(*asked, "--screen", "-o", "best") == 0
    assert "to do" not in capsys.readouterr().err


def test_a_requirement_that_nothing_meets_is_exit_code_3(here, capsys):
    assert run(*SEARCH, "--require", "clean>=0.999", "-o", "best") == 3
    said = capsys.readouterr().out
    assert re.search(r"no candidate meets clean>=0\.999 .*the closest is grid-", said)
    assert (here / "best" / "soup.safetensors").is_file()
    assert run(*SEARCH, "--require", "clean>=0.999", "--json", "-o", "best") == 3
    selection = json.loads(capsys.readouterr().out)["selection"]
    assert selection["met"] is False
    assert "no candidate meets" in selection["message"]


@pytest.mark.parametrize(("method", "count"), [("uniform", 1), ("line", 3), ("grid", 3)])
def test_search_methods(here, capsys, method, count):
    assert run(*SEARCH, "--method", method, "--json", "-o", method) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len([row for row in rows if row["role"] == method]) == count


def test_an_ingredient_may_be_called_as_a_soup_is(here, capsys):
    shutil.copy("low.safetensors", "uniform.safetensors")
    assert (
        run(
            "search",
            "uniform.safetensors",
            "high.safetensors",
            *LINF,
            *FEW,
            "--method",
            "uniform",
            "--json",
            "-o",
            "best",
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len({row["name"] for row in rows}) == len(rows) == 3
    low = Evaluation.load("best/evaluations/uniform.val.json").record["checkpoint"]
    assert low == Checkpoint.load("low.safetensors").digest


RECIPE = """
name = "two"
data = "digits"
[ingredients]
low = "low.safetensors"
high = "high.safetensors"
[soups.flat]
method = "uniform"
[evaluate]
threats = ["Linf 32/255"]
steps = 2
select_samples = 64
report_samples = 64
"""


def test_plan_and_run_answer_in_json(here, capsys):
    (here / "two.toml").write_text(RECIPE)
    assert run("plan", "two.toml", "--json") == 0
    before = json.loads(capsys.readouterr().out)
    assert [step["done"] for step in before["steps"]] == [False] * 7
    assert before["seconds"] > 0
    assert run("run", "two.toml", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in said["rows"]] == ["low", "high", "flat"]
    assert (here / "runs" / "two" / "report.html").is_file()
    assert run("plan", "two.toml", "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert [step["key"] for step in after["steps"]] == [step["key"] for step in before["steps"]]
    assert all(step["done"] for step in after["steps"])
    assert after["seconds"] == 0
    assert run("plan", "two.toml", "--set", "evaluate.steps=3") == 0
    assert "7 steps, 6 to do" in " ".join(capsys.readouterr().out.split())


def test_report_draws_anew_from_what_is_stored(here, capsys):
    (here / "two.toml").write_text(RECIPE)
    assert run("run", "two.toml", "-o", "two") == 0
    page = (here / "two" / "report.html").read_bytes()
    shutil.rmtree(here / "two" / "figures", ignore_errors=True)
    (here / "two" / "report.html").unlink()
    for name in ("low", "high"):
        (here / f"{name}.safetensors").unlink()
    capsys.readouterr()
    assert run("report", "two") == 0
    assert str(Path("two") / "report.html") in capsys.readouterr().out
    assert len((here / "two" / "report.html").read_bytes()) == pytest.approx(len(page), rel=0.2)


def test_a_normalisation_that_is_given_is_never_ignored(here, capsys):
    scores = []
    for more in ((), ("--normalize", 0.9, 0.1)):
        code = run(
            "evaluate", "low.safetensors", "--data", "digits", "--samples", 64, "--json", *more
        )
        said = capsys.readouterr()
        scores.append(
            (code, json.loads(said.out)["low"]["accuracy"]["clean"] if code == 0 else None)
        )
    assert scores[0] != scores[1]


# bad input: one line, exit code 2, nothing harmed


def truncated(here):
    content = (here / "low.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(content[: len(content) // 2])


def truncated_pth(here):
    torch.save(dict(Checkpoint.load(here / "low.safetensors").tensors), here / "whole.pth")
    (here / "cut.pth").write_bytes((here / "whole.pth").read_bytes()[:5000])


def foreign(here):
    (here / "notes.pth").write_text("dear diary\n" * 100)
    (here / "notes.safetensors").write_text("dear diary\n" * 100)
    (here / "empty.pth").write_bytes(b"")
    torch.save({"epoch": 3, "lr": 0.1}, here / "log.pth")
    torch.save(nn.Linear(2, 2), here / "module.pth")


def broken(here):
    low = Checkpoint.load(here / "low.safetensors")
    weights = low.tensors["layer1.0.weight"].clone()
    weights[0, 0, 0, 0] = float("nan")
    Checkpoint({**low.tensors, "layer1.0.weight": weights}, low.provenance).save(
        here / "nan.safetensors"
    )


def two_classes(here):
    for name, grey in (("cats", 60), ("dogs", 190)):
        (here / "images" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (12, 12), (grey, grey, i)).save(here / "images" / name / f"{i}.png")


def two_classes_network(here):
    two_classes(here)
    network = load_model("resnet9:width=2", channels=3, classes=2)
    Checkpoint.of(network).save(here / "two.safetensors")


def two_splits(here):
    for split in ("test", "val"):
        assert (
            run(
                "evaluate",
                "low.safetensors",
                "--data",
                "digits",
                "--samples",
                64,
                "--split",
                split,
                "-o",
                "judged",
            )
            == 0
        )


def coefficients(here):
    Coefficients.of([0.5, 0.5]).save(here / "alpha.safetensors")


def empty_folder(here):
    (here / "nothing").mkdir()


def recipe(change):
    return lambda here: (here / "bad.toml").write_text(RECIPE.replace(*change))


NOTHING = None
LEARN = ("learn", "low.safetensors", "high.safetensors", *LINF)
MIX = ("mix", "low.safetensors", "high.safetensors", "-o", "soup.safetensors")
BAD = {
    "wrong path": (
        NOTHING,
        ("evaluate", "nowhere.safetensors", *LINF),
        ["nowhere.safetensors", "no such file"],
    ),
    "wrong path among others": (
        NOTHING,
        ("mix", "low.safetensors", "nowhere.pth", "-o", "soup.safetensors"),
        ["nowhere.pth"],
    ),
    "a folder": (empty_folder, ("evaluate", "nothing", *LINF), ["nothing", "is a folder"]),
    "wrong path of a recipe": (NOTHING, ("run", "nowhere.toml"), ["nowhere.toml", "no such file"]),
    "wrong path of a run": (NOTHING, ("report", "nowhere"), ["nowhere"]),
    "wrong path of coefficients": (
        NOTHING,
        (*MIX, "--coefficients", "no.safetensors"),
        ["no.safetensors", "no such file"],
    ),
    "checkpoint as coefficients": (
        NOTHING,
        (*MIX, "--coefficients", "low.safetensors"),
        ["low.safetensors", "not a coefficients file"],
    ),
    "truncated": (
        truncated,
        ("evaluate", "cut.safetensors", *LINF),
        ["cut.safetensors", "cut short"],
    ),
    "truncated, searched": (
        truncated,
        ("search", "low.safetensors", "cut.safetensors", *LINF, "-o", "best"),
        ["cut.safetensors"],
    ),
    "truncated, learned": (
        truncated,
        ("learn", "low.safetensors", "cut.safetensors", *LINF, "-o", "soup"),
        ["cut.safetensors"],
    ),
    "truncated .pth": (
        truncated_pth,
        ("mix", "whole.pth", "cut.pth", "-o", "soup.safetensors"),
        ["cut.pth"],
    ),
    "text as .pth": (
        foreign,
        ("mix", "notes.pth", "-o", "soup.safetensors"),
        ["notes.pth", "not a checkpoint"],
    ),
    "text as .safetensors": (
        foreign,
        ("mix", "notes.safetensors", "-o", "soup.safetensors"),
        ["notes.safetensors"],
    ),
    "empty file": (foreign, ("mix", "empty.pth", "-o", "soup.safetensors"), ["empty.pth"]),
    "no weights in it": (
        foreign,
        ("mix", "log.pth", "-o", "soup.safetensors"),
        ["log.pth", "no state dict", "epoch"],
    ),
    "a pickled module": (foreign, ("mix", "module.pth", "-o", "soup.safetensors"), ["module.pth"]),
    "NaN": (
        broken,
        ("evaluate", "nan.safetensors", *LINF),
        ["nan.safetensors", "layer1.0.weight", "NaN"],
    ),
    "NaN, mixed": (
        broken,
        ("mix", "low.safetensors", "nan.safetensors", "-o", "soup.safetensors"),
        ["nan.safetensors", "layer1.0.weight"],
    ),
    "NaN, searched": (
        broken,
        ("search", "low.safetensors", "nan.safetensors", *LINF, "-o", "best"),
        ["nan.safetensors", "NaN"],
    ),
    "other shape": (
        NOTHING,
        ("mix", "low.safetensors", "wide.safetensors", "-o", "soup.safetensors"),
        ["layer1.0.weight", "low.safetensors", "wide.safetensors", "(4, 2, 3, 3)", "(8, 4, 3, 3)"],
    ),
    "other shape, searched": (
        NOTHING,
        ("search", "low.safetensors", "wide.safetensors", *LINF, "-o", "best"),
        ["layer1.0.weight"],
    ),
    "other shape, learned": (
        NOTHING,
        ("learn", "low.safetensors", "wide.safetensors", *LINF, "-o", "soup"),
        ["layer1.0.weight"],
    ),
    "10 classes on 2": (
        two_classes,
        ("evaluate", "coloured.safetensors", "--data", "folder:images"),
        ["10", "expected 2 classes"],
    ),
    "10 classes on 2, searched": (
        two_classes,
        (
            "search",
            "coloured.safetensors",
            "coloured.safetensors",
            "--data",
            "folder:images",
            "--threat",
            "Linf 8/255",
            "-o",
            "best",
        ),
        ["10", "expected 2 classes"],
    ),
    "10 classes on 2, trained": (
        two_classes,
        (
            "train",
            "--from",
            "coloured.safetensors",
            "--data",
            "folder:images",
            "--threat",
            "Linf 8/255",
            "-o",
            "soup.safetensors",
        ),
        ["10", "expected 2 classes"],
    ),
    "grey digits on coloured images": (
        two_classes,
        ("evaluate", "low.safetensors", "--data", "folder:images"),
        ["(3, 32, 32)"],
    ),
    "eps below 0": (
        NOTHING,
        ("evaluate", "low.safetensors", "--data", "digits", "--threat", "Linf -8/255"),
        ["Linf -8/255", "at least 0"],
    ),
    "eps below 0, trained": (
        NOTHING,
        (
            "train",
            "--model",
            "resnet9:width=2",
            "--data",
            "digits",
            "--threat",
            "L2 -1",
            "-o",
            "soup.safetensors",
        ),
        ["L2 -1", "at least 0"],
    ),
    "eps below 0, searched": (
        NOTHING,
        (
            "search",
            "low.safetensors",
            "high.safetensors",
            "--data",
            "digits",
            "--threat",
            "L1 -1",
            "-o",
            "best",
        ),
        ["L1 -1", "at least 0"],
    ),
    "unknown norm": (
        NOTHING,
        ("evaluate", "low.safetensors", "--data", "digits", "--threat", "L3 1"),
        ["L3", "Linf 8/255"],
    ),
    "sum is not 1": (
        NOTHING,
        (*MIX, "--coefficients", "0.5", "0.6"),
        ["0.5, 0.6", "1.1", "expected sum 1"],
    ),
    "negative coefficient": (NOTHING, (*MIX, "--coefficients", "-0.5", "1.5"), ["-0.5", "below 0"]),
    "too few coefficients": (NOTHING, (*MIX, "--coefficients", "1"), ["got 1", "expected 2"]),
    "too many coefficients": (
        NOTHING,
        (*MIX, "--coefficients", "0.2", "0.3", "0.5"),
        ["got 3", "expected 2"],
    ),
    "no number": (NOTHING, (*MIX, "--coefficients", "half"), ["half", "1/3"]),
    "division by zero": (NOTHING, (*MIX, "--coefficients", "1/0", "1"), ["1/0"]),
    "NaN coefficient": (NOTHING, (*MIX, "--coefficients", "nan", "--coefficients", "1"), ["nan"]),
    "unknown recipe key": (
        recipe(("steps = 2", "step = 2")),
        ("run", "bad.toml"),
        ["bad.toml", "evaluate.step: unknown key", "steps"],
    ),
    "unknown recipe key, planned": (
        recipe(("steps = 2", "step = 2")),
        ("plan", "bad.toml"),
        ["bad.toml", "evaluate.step"],
    ),
    "no TOML": (
        recipe(("[ingredients]", "[ingredients")),
        ("run", "bad.toml"),
        ["bad.toml", "not a TOML file"],
    ),
    "unknown key by --set": (
        recipe(("a", "a")),
        ("run", "bad.toml", "--set", "evaluate.stepz=2"),
        ["evaluate.stepz", "steps"],
    ),
    "empty folder": (
        empty_folder,
        ("evaluate", "coloured.safetensors", "--data", "folder:nothing"),
        ["nothing", "0 class folders"],
    ),
    "missing folder": (
        NOTHING,
        ("evaluate", "low.safetensors", "--data", "folder:nowhere"),
        ["nowhere", "one sub-folder for each class"],
    ),
    "unknown data": (
        NOTHING,
        ("evaluate", "low.safetensors", "--data", "digit"),
        ["digit", "digits"],
    ),
    "unknown network": (
        NOTHING,
        ("train", "--model", "resnet10", *LINF, "-o", "soup.safetensors"),
        ["resnet10", "resnet9"],
    ),
    "missing module": (
        NOTHING,
        ("train", "--model", "no_such:Net", *LINF, "-o", "soup.safetensors"),
        ["no_such", "Python path"],
    ),
    "no network known": (
        NOTHING,
        ("evaluate", "low.pth", *LINF),
        ["low.pth", "does not record its network", "--model"],
    ),
    "no network given": (
        NOTHING,
        ("train", *LINF, "-o", "soup.safetensors"),
        ["--model", "--from"],
    ),
    "wrong network": (
        NOTHING,
        ("evaluate", "low.pth", "--model", "resnet9:width=4", *LINF),
        ["low.pth: prep.0.weight", "(2, 1, 3, 3)", "(4, 1, 3, 3)"],
    ),
    "near chance": (
        lambda here: Checkpoint.of(load_model("resnet9:width=2", channels=1)).save(
            here / "fresh.safetensors"
        ),
        ("evaluate", "fresh.safetensors", *LINF, *FEW),
        ["fresh.safetensors", "near chance", "--normalize"],
    ),
    "wrong ending": (NOTHING, ("mix", "low.safetensors", "-o", "soup.zip"), ["soup.zip", ".pth"]),
    "wrong requirement": (
        NOTHING,
        (*SEARCH, "--require", "clean>0.5", "-o", "best"),
        ["clean>0.5", "clean>=0.85"],
    ),
    "requirement that is not measured": (
        NOTHING,
        (*SEARCH, "--require", "L2 0.5>=0.1", "-o", "best"),
        ["L2 0.5", "not evaluated"],
    ),
    "wrong method": (
        NOTHING,
        ("search", "low.safetensors", *LINF, "--method", "best", "-o", "best"),
        ["best", "grid"],
    ),
    "step that is no fraction of 1": (
        NOTHING,
        ("search", "low.safetensors", *LINF, "--step", 0.3, "-o", "best"),
        ["step", "0.3"],
    ),
    "line of one": (
        NOTHING,
        ("search", "low.safetensors", *LINF, "--method", "line", "-o", "best"),
        ["line", "got 1"],
    ),
    "too many samples": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--samples", 10000),
        ["10000", "500"],
    ),
    "no samples": (NOTHING, ("evaluate", "low.safetensors", *LINF, "--samples", 0), ["0"]),
    "steps below 1": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--steps", 0),
        ["steps", "0"],
    ),
    "unknown split": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--split", "dev"),
        ["dev", "train, val or test"],
    ),
    "unknown attack": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--attack", "fgsm"),
        ["fgsm", "apgd"],
    ),
    "unknown loss": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--loss", "hinge"),
        ["hinge", "ce, dlr, targeted dlr"],
    ),
    "no restarts": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--restarts", 0),
        ["restarts", "0"],
    ),
    "eot of 0": (NOTHING, ("evaluate", "low.safetensors", *LINF, "--eot", 0), ["eot", "0"]),
    "batch size of 0": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--batch-size", 0),
        ["--batch-size", "0"],
    ),
    "points without a place": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--keep-points"),
        ["--keep-points", "-o"],
    ),
    "unknown loss, searched": (
        NOTHING,
        (*SEARCH, "--loss", "hinge", "-o", "best"),
        ["evaluate.loss", "hinge", "targeted dlr"],
    ),
    "unknown attack, searched": (
        NOTHING,
        (*SEARCH, "--attack", "fgsm", "-o", "best"),
        ["evaluate.attack", "fgsm", "pgd"],
    ),
    "no restarts, searched": (
        NOTHING,
        (*SEARCH, "--restarts", 0, "-o", "best"),
        ["evaluate.restarts", "0"],
    ),
    "screening by AutoAttack": (
        NOTHING,
        (*SEARCH, "--screen", "--attack", "autoattack", "-o", "best"),
        ["screen", "autoattack"],
    ),
    "screening without an attack": (
        NOTHING,
        (
            "search",
            "low.safetensors",
            "--data",
            "digits",
            "--threat",
            "clean",
            "--screen",
            "-o",
            "best",
        ),
        ["screen", "threats"],
    ),
    "two classes are few for dlr": (
        two_classes_network,
        (
            "evaluate",
            "two.safetensors",
            "--data",
            "folder:images",
            "--threat",
            "Linf 8/255",
            "--loss",
            "dlr",
        ),
        ["dlr", "needs 3 classes", "got 2"],
    ),
    "comparing with nothing": (
        NOTHING,
        ("compare", "nowhere.json", "nowhere.json"),
        ["nowhere.json", "not an evaluation"],
    ),
    "comparing with a checkpoint": (
        NOTHING,
        ("compare", "low.safetensors", "low.safetensors"),
        ["low.safetensors"],
    ),
    "comparing two splits": (
        two_splits,
        ("compare", "judged/low.test.json", "judged/low.val.json"),
        ["val", "one split"],
    ),
    "comparing one": (NOTHING, ("compare", "judged/low.test.json"), ["B.json"]),
    "unknown device": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--device", "abacus"),
        ["abacus"],
    ),
    "unknown precision": (
        NOTHING,
        ("evaluate", "low.safetensors", *LINF, "--precision", "int8"),
        ["int8", "float32"],
    ),
    "unknown policy": (NOTHING, (*MIX, "--buffers", "mean"), ["mean", "average"]),
    "recalibrating on nothing": (
        NOTHING,
        (*MIX, "--buffers", "recalibrate"),
        ["recalibrate", "--data"],
    ),
    "tracked but not learned": (NOTHING, (*MIX, "--buffers", "tracked"), ["tracked"]),
    "wrong normalisation": (
        NOTHING,
        ("evaluate", "low.pth", "--model", "resnet9:width=2", *LINF, "--normalize", "half", "1"),
        ["half", "numbers"],
    ),
    "std of 0": (
        NOTHING,
        ("evaluate", "low.pth", "--model", "resnet9:width=2", *LINF, "--normalize", "0.5", "0"),
        ["std above 0"],
    ),
    "another split": (NOTHING, (*SEARCH, "--seed", 1, "-o", "best"), ["seed 0", "--allow-leakage"]),
    "lr of 0": (
        NOTHING,
        ("train", "--from", "base.safetensors", *LINF, "--lr", 0, "-o", "soup.safetensors"),
        ["lr", "0"],
    ),
    "momentum below 0": (
        NOTHING,
        ("train", "--from", "base.safetensors", *LINF, "--momentum", -1, "-o", "soup.safetensors"),
        ["momentum", "-1"],
    ),
    "momentum above 1, learned": (
        NOTHING,
        ("learn", "low.safetensors", "high.safetensors", *LINF, "--momentum", 2, "-o", "soup"),
        ["momentum", "2"],
    ),
    "a seed beyond 64 bits": (
        NOTHING,
        ("train", "--model", "resnet9:width=2", *LINF, "--seed", 10**20, "-o", "soup.safetensors"),
        ["seed", str(10**20)],
    ),
    "tracked statistics that no grid has": (
        NOTHING,
        (*SEARCH, "--buffers", "tracked", "-o", "best"),
        ["tracked", "learn"],
    ),
    "statistics of nobody, learned": (
        NOTHING,
        (*LEARN, "--buffers", "mean", "-o", "out"),
        ["buffers", "mean"],
    ),
    "attacked statistics without an attack": (
        NOTHING,
        (
            "learn",
            "low.safetensors",
            "--data",
            "digits",
            "--threat",
            "clean",
            "--buffers",
            "recalibrate-adversarial",
            "-o",
            "out",
        ),
        ["recalibrate-adversarial", "threat"],
    ),
    "a dial's turn without a dial": (
        NOTHING,
        (*LEARN, "--dial-by", "eps", "-o", "out"),
        ["--dial-by", "--dial"],
    ),
    "a base that nothing takes": (
        NOTHING,
        (*LEARN, "--base", "base.safetensors", "-o", "out"),
        ["--base", "--buffers base"],
    ),
    "a base that no mix takes": (
        NOTHING,
        (*MIX, "--base", "base.safetensors"),
        ["--base", "--buffers base"],
    ),
    "a greedy search that screens": (
        NOTHING,
        (*SEARCH, "--method", "greedy", "--screen", "-o", "best"),
        ["--screen", "greedy"],
    ),
    "infinite coefficients": (NOTHING, (*MIX, "--coefficients", "1e400", 0), ["1e400", "numbers"]),
    "a score of two lines": (
        NOTHING,
        (*SEARCH, "--method", "greedy", "--score", "clean\nx", "-o", "best"),
        ["score"],
    ),
    "coefficients as a checkpoint": (
        coefficients,
        ("mix", "low.safetensors", "alpha.safetensors", "-o", "soup.safetensors"),
        ["alpha.safetensors", "holds coefficients", "--coefficients"],
    ),
    "at without a dial": (NOTHING, (*MIX, "--at", 0.5), ["--at", "dial"]),
    "at of numbers": (NOTHING, (*MIX, "--coefficients", 0.5, 0.5, "--at", 0.5), ["--at", "dial"]),
    "a dial by nothing": (
        NOTHING,
        (*LEARN, "--dial", "--dial-by", "alpha", "-o", "out"),
        ["alpha", "objective", "eps"],
    ),
    "a dial with an objective": (
        NOTHING,
        (*LEARN, "--dial", "--objective", "mixed 0.5", "-o", "out"),
        ["--objective", "--dial"],
    ),
    "a dial that stops early": (
        NOTHING,
        (*LEARN, "--dial", "--early-stop", "-o", "out"),
        ["--early-stop", "--dial"],
    ),
    "an unknown granularity": (
        NOTHING,
        (*LEARN, "--granularity", "row", "-o", "out"),
        ["granularity", "row", "block"],
    ),
    "a broken pattern": (NOTHING, (*LEARN, "--granularity", "re:(", "-o", "out"), ["pattern"]),
    "an unknown place": (
        NOTHING,
        (*LEARN, "--place", "disk", "-o", "out"),
        ["place", "disk", "files"],
    ),
    "a budget below 0": (NOTHING, (*LEARN, "--budget", -1, "-o", "out"), ["budget", "-1"]),
    "statistics that nobody knows": (
        NOTHING,
        (*LEARN, "--learning-buffers", "mean", "-o", "out"),
        ["buffers", "mean"],
    ),
    "learning on another split": (
        NOTHING,
        (*LEARN, "--seed", 1, "-o", "out"),
        ["seed 0", "--allow-leakage"],
    ),
    "a score of nothing": (
        NOTHING,
        (*SEARCH, "--method", "greedy", "--score", "best", "-o", "best"),
        ["score", "best"],
    ),
    "a score for a grid": (NOTHING, (*SEARCH, "--score", "clean", "-o", "best"), ["score", "grid"]),
    "checking nothing": (
        NOTHING,
        ("check", "nowhere.safetensors"),
        ["nowhere.safetensors", "no such file"],
    ),
    "an average of everything": (
        NOTHING,
        ("train", "--from", "low.safetensors", *LINF, "--ema", 1, "-o", "soup.safetensors"),
        ["ema", "1.0", "[0, 1)"],
    ),
    "no synthetic images": (
        NOTHING,
        (
            "train",
            "--from",
            "low.safetensors",
            *LINF,
            "--synthetic",
            "nowhere.npz",
            "-o",
            "soup.safetensors",
        ),
        ["nowhere.npz", "no such file"],
    ),
    "a share of no synthetic images": (
        NOTHING,
        (
            "train",
            "--from",
            "low.safetensors",
            *LINF,
            "--synthetic-fraction",
            0.5,
            "-o",
            "soup.safetensors",
        ),
        ["--synthetic-fraction", "--synthetic FILE"],
    ),
    "an objective that is nowhere": (
        NOTHING,
        (
            "train",
            "--from",
            "low.safetensors",
            *LINF,
            "--objective",
            "nowhere:fn",
            "-o",
            "soup.safetensors",
        ),
        ["nowhere:fn", "Python path", "trades"],
    ),
    "unknown option": (NOTHING, ("evaluate", "low.safetensors", *LINF, "--stepz", 3), ["--stepz"]),
    "missing option": (NOTHING, ("evaluate", "low.safetensors"), ["--data"]),
    "missing argument": (NOTHING, ("mix", "-o", "soup.safetensors"), ["checkpoints"]),
    "unknown command": (NOTHING, ("bake",), ["bake"]),
    "text for a number": (
        NOTHING,
        ("train", *LINF, "--epochs", "many", "-o", "soup.safetensors"),
        ["many", "--epochs"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_harms_nothing(here, capsys, name):
    prepare, arguments, parts = BAD[name]
    for target in ("soup.safetensors", "soup/soup.safetensors", "best/soup.safetensors"):
        (here / target).parent.mkdir(exist_ok=True)
        (here / target).write_text("an earlier result")
    if prepare:
        prepare(here)
    capsys.readouterr()
    before = contents(here)
    code = run(*arguments)
    told = capsys.readouterr()
    assert code == 2, told.err
    lines = [line for line in told.err.splitlines() if not line.startswith("robustsoup: warning: ")]
    assert len(lines) == 1, told.err
    assert lines[0].startswith("robustsoup: ")
    assert told.out == ""
    for part in parts:
        assert part in lines[0]
    assert contents(here) == before


def test_debug_shows_where_it_happened(here):
    with pytest.raises(robustsoup.RobustsoupError, match=r"nowhere\.safetensors"):
        main(["evaluate", "nowhere.safetensors", *LINF, "--debug"])


def test_work_that_fails_is_exit_code_1(here, capsys):
    assert (
        run(
            "train",
            "--from",
            "base.safetensors",
            *LINF,
            "--lr",
            "1e30",
            "--epochs",
            1,
            "-o",
            "new.safetensors",
        )
        == 1
    )
    told = capsys.readouterr().err
    assert re.fullmatch(r"robustsoup: train: the loss became (nan|inf).*smaller lr\n", told)
    assert not (here / "new.safetensors").exists()


def test_no_arguments_show_the_commands(capsys):
    assert run() in (0, 2)
    assert "search" in capsys.readouterr().out


# as a process of its own


@contextlib.contextmanager
def full_disk():
    """No file may grow over 4 kB: what the system then answers is much like what it answers on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "arguments",
    [
        ("mix", "low.safetensors", "high.safetensors", "-o", "soup.safetensors"),
        ("mix", "low.pth", "high.pth", "-o", "soup.pth"),
        ("search", "low.safetensors", "high.safetensors", *LINF, *FEW, "--step", 0.5, "-o", "."),
    ],
)
def test_no_space_left_is_exit_code_1_and_the_old_file_stays(here, capsys, arguments):
    shutil.copy("low.pth", "high.pth")
    for name in ("soup.safetensors", "soup.pth"):
        (here / name).write_text("an earlier result")
    before = contents(here)
    capsys.readouterr()
    with full_disk():
        code = run(*arguments)
    said = capsys.readouterr().err
    assert code == 1, said
    assert re.fullmatch(
        r"robustsoup: .*(soup|store).* cannot be written: .+", said.splitlines()[-1]
    )
    after = contents(here)
    assert before.items() <= after.items()
    assert [name for name in after if name not in before and name != "log.txt"] == []


def test_interrupted_it_can_go_on(here, tmp_path):
    """SIGINT in the middle of training: exit code 130, what to do next, and the same command finishes the work."""
    epochs = 150  # long enough that the signal comes in the middle
    arguments = (
        "train",
        "--from",
        "base.safetensors",
        *LINF,
        "--epochs",
        epochs,
        "--lr",
        0.01,
        "--threads",
        1,
        "-o",
        "new.safetensors",
    )
    process = command(*arguments, store=tmp_path / "store")
    state, deadline = here / ".new.safetensors.state.pt", time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.splitlines() == ["robustsoup: interrupted; run the same command again to go on"]
    assert state.exists()
    assert not (here / "new.safetensors").exists()
    reached = torch.load(state, weights_only=True)["step"]
    assert 0 < reached < epochs * 7
    assert run(*arguments) == 0
    assert not state.exists()
    assert len(Checkpoint.load("new.safetensors").provenance["history"]) == epochs


# checkpoints from elsewhere


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))
"""
MEAN, STD = 0.3, 0.35


@pytest.fixture
def foreign_files(tmp_path, monkeypatch):
    """Three .pth files that plain PyTorch wrote: own class, normalisation outside, "module." in the names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    import mynet

    torch.manual_seed(0)
    net = mynet.Net()
    x, y = (to_float(DIGITS.train.images) - MEAN) / STD, DIGITS.train.labels
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(45):
        optimizer.zero_grad()
        rows = torch.randperm(1000)[:256]
        nn.functional.cross_entropy(
            net(x[rows] + 0.3 * torch.randn_like(x[rows])), y[rows]
        ).backward()
        optimizer.step()
        if step in (34, 39, 44):
            state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
            torch.save({"state_dict": state, "epoch": 3, "note": "mine"}, f"net{step}.pth")
    yield tmp_path, mynet.Net
    sys.modules.pop("mynet", None)


def test_foreign_checkpoints_are_searched_and_the_soup_goes_home(foreign_files, capsys):
    folder, network = foreign_files
    files = sorted(p.name for p in folder.glob("*.pth"))
    foreign = ("--model", "mynet:Net", "--data", "digits", "--normalize", MEAN, STD)
    before = contents(folder)
    assert (
        run(
            "search",
            *files,
            *foreign,
            "--threat",
            "Linf 16/255",
            "--steps",
            3,
            "--samples",
            100,
            "--step",
            0.5,
            "--require",
            "clean>=0.5",
            "--json",
            "-o",
            "best",
        )
        == 0
    )
    told = capsys.readouterr()
    said = json.loads(told.out)
    assert "split unknown" in told.err
    assert said["leakage"]["status"] == "unknown"
    assert said["soup"] == "soup.pth"
    assert before.items() <= contents(folder).items()

    content = torch.load(folder / "best" / "soup.pth", weights_only=True)
    assert (content["epoch"], content["note"]) == (3, "mine")
    net = nn.DataParallel(network())  # whose names begin with "module."
    assert net.load_state_dict(content["state_dict"]).missing_keys == []
    x, y = to_float(DIGITS.test.first(100).images), DIGITS.test.first(100).labels
    with torch.no_grad():
        right = int((net.module.eval()((x - MEAN) / STD).argmax(1) == y).sum())
    chosen = next(row for row in said["rows"] if row["name"] == said["selection"]["chosen"])
    assert abs(right - chosen["test"]["clean"]["hits"]) <= 1
    assert right >= 60

    assert run("evaluate", "best/soup.pth", *foreign, "--samples", 100, "--json") == 0
    assert (
        json.loads(capsys.readouterr().out)["soup"]["accuracy"]["clean"] == chosen["test"]["clean"]
    )


def test_foreign_checkpoints_are_mixed_and_learned(foreign_files, capsys):
    folder, network = foreign_files
    files = sorted(p.name for p in folder.glob("*.pth"))
    foreign = ("--model", "mynet:Net", "--data", "digits", "--normalize", MEAN, STD)
    assert run("mix", *files, "-o", "mean.pth") == 0
    assert (
        run("learn", *files, *foreign, "--threat", "Linf 16/255", "--epochs", 1, "-o", "learned")
        == 0
    )
    told = capsys.readouterr().err
    assert "split unknown" in told
    for path in ("mean.pth", "learned/soup.pth"):
        state = torch.load(folder / path, weights_only=True)["state_dict"]
        network().load_state_dict(
            {name.removeprefix("module."): tensor for name, tensor in state.items()}
        )
    mean = torch.stack(
        [torch.load(f, weights_only=True)["state_dict"]["module.head.weight"] for f in files]
    ).mean(0)
    assert torch.allclose(
        torch.load("mean.pth", weights_only=True)["state_dict"]["module.head.weight"],
        mean,
        atol=1e-6,
    )


def test_without_its_normalisation_a_foreign_network_is_told_what_to_do(foreign_files, capsys):
    code = run(
        "evaluate",
        "net44.pth",
        "--model",
        "mynet:Net",
        "--data",
        "digits",
        "--samples",
        100,
        "--normalize",
        40,
        0.01,
    )
    assert code == 2
    assert "--normalize" in capsys.readouterr().err


# Python


def test_the_public_names():
    assert sorted(robustsoup.__all__) == [
        "Accuracy",
        "Candidate",
        "Checkpoint",
        "Coefficients",
        "Comparison",
        "Data",
        "Dial",
        "Evaluation",
        "Landscape",
        "Objective",
        "RobustsoupError",
        "Selection",
        "Soupability",
        "Split",
        "Synthetic",
        "ThreatModel",
        "apgd",
        "apgd_train",
        "check",
        "compare",
        "evaluate",
        "landscape",
        "learn",
        "learn_dial",
        "load_data",
        "load_model",
        "mix",
        "pareto_front",
        "pgd",
        "search",
        "select",
        "train",
    ]
    assert list(robustsoup.__all__) == sorted(robustsoup.__all__)
    for name in robustsoup.__all__:
        assert getattr(robustsoup, name).__doc__, name
