"""robustsoup learn: the files it writes, dials, and where the ingredients are kept."""

import re

import torch
from command_line import LEARN, LINF, PAIR, run

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.mixing import mix

FIGURES = {f"coefficients.{suffix}" for suffix in ("png", "svg", "pdf")}


def file_names(folder, pattern="*"):
    return {path.name for path in folder.glob(pattern)}


def test_a_policy_while_learning_may_be_a_function_in_this_folder(here, capsys):
    code = (
        "from robustsoup.soups.mixing import Buffers\n\n\ndef none(soup):\n    return Buffers({})\n"
    )
    (here / "own_policies.py").write_text(code)
    learn = (*LEARN, "--epochs", 1, "--attack-steps", 1, "--buffers", "average")
    assert run(*learn, "--learning-buffers", "own_policies:none", "-o", "out") == 0, (
        capsys.readouterr()
    )


def test_mix_makes_the_same_soup_from_learned_coefficients(here, capsys):
    assert run(*LEARN, "--epochs", 1, "--detach", 0.5, "-o", "learned") == 0
    assert re.search(r"mean coefficients low 0\.\d\d high 0\.\d\d", capsys.readouterr().out)
    written = {"coefficients.safetensors", "coefficients.csv", "soup.safetensors", "README.md"}
    written |= FIGURES
    assert file_names(here / "learned") == written
    table = (here / "learned" / "coefficients.csv").read_text().splitlines()
    assert table[0] == "layer,low,high,entropy,moved,slope"
    assert len(table) == 26
    alpha = Coefficients.load("learned/coefficients.safetensors")
    assert alpha.record["learning"]["detach"] == 0.5
    soup = Checkpoint.load("learned/soup.safetensors").digest
    for order, name in ((PAIR, "a.safetensors"), (PAIR[::-1], "b.safetensors")):
        coefficients = ("--coefficients", "learned/coefficients.safetensors")
        assert run("mix", *order, *coefficients, "-o", name) == 0
        assert Checkpoint.load(name).digest == soup


def test_mix_chooses_a_point_on_a_learned_dial(here, capsys):
    assert run(*LEARN, "--epochs", 1, "--dial", "--granularity", "block", "-o", "turned") == 0
    output = capsys.readouterr().out
    ends = r"robust and the clean end: t = 0: low 0\.\d\d high 0\.\d\d; t = 1: low"
    assert re.search(ends, output)
    assert "--coefficients turned/dial.safetensors --at 0.7" in output
    assert file_names(here / "turned") == {"dial.safetensors"} | FIGURES
    dial = Dial.load("turned/dial.safetensors")
    coefficients = ("--coefficients", "turned/dial.safetensors")
    for t in ("0", "0.7", "1"):
        assert run("mix", *PAIR, *coefficients, "--at", t, "-o", f"at{t}.safetensors") == 0
        expected = mix(PAIR, dial.at(float(t)), buffers="average")
        assert Checkpoint.load(f"at{t}.safetensors").digest == expected.digest
    assert Checkpoint.load("at0.safetensors").digest != Checkpoint.load("at1.safetensors").digest


def test_what_the_soup_cannot_take_is_refused_before_learning(here, capsys):
    start = (*LEARN, "--epochs", 1, "-o", "out")
    assert run(*start, "--affine", "--buffers", "average") == 2
    assert "averaged variances can turn negative" in capsys.readouterr().err
    other = ("train", *LINF, "--epochs", 1, "--model", "resnet9:width=3", "-o", "o.safetensors")
    assert run(*other) == 0
    assert run(*start, "--buffers", "base", "--base", "o.safetensors") == 2
    assert "in o.safetensors; ingredients must share" in capsys.readouterr().err
    assert not (here / "out" / ".state.pt").exists()


def test_a_base_is_read_as_the_ingredients_are(here):
    """Under other names, in other dtypes and with --key."""
    low, base = (Checkpoint.load(f"{name}.safetensors") for name in ("low", "base"))
    averaged = {
        f"module.{name}": tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in base.tensors.items()
    }
    torch.save({"state_dict": dict(low.tensors), "ema": averaged}, "base.pth")
    torch.save({"state_dict": dict(base.tensors), "ema": dict(low.tensors)}, "low.pth")
    options = ("--key", "ema", "--base", "base.pth", "--buffers", "base")
    pair = ("low.pth", "low.pth", "--model", "resnet9:width=2")
    assert run("learn", *pair, *LINF, *options, "--epochs", 1, "-o", "out") == 0
    assert run("mix", *pair, *options, "-o", "mixed.safetensors") == 0
    for soup in ("out/soup.safetensors", "mixed.safetensors"):
        tensors = Checkpoint.load(soup).tensors
        for name in ("prep.1.running_mean", "prep.1.running_var"):
            assert torch.equal(tensors[name], base.tensors[name])


def test_a_dial_can_change_the_radius(here):
    assert run(*LEARN, "--epochs", 1, "--dial", "--dial-by", "eps", "-o", "turned") == 0
    assert "eps" in str(Dial.load("turned/dial.safetensors").record["learning"]["dial"])


def test_ingredients_give_the_same_soup_from_files_and_from_memory(here, capsys):
    options = (*LEARN, "--epochs", 2, "--early-stop", "--precision", "float32")
    assert run(*options, "--budget", 0, "-o", "streamed") == 0
    assert "2 ingredients of 0.00 GiB are read from their files" in capsys.readouterr().err
    assert run(*options, "--place", "memory", "-o", "resident") == 0
    assert "read from their files" not in capsys.readouterr().err
    streamed = Coefficients.load("streamed/coefficients.safetensors")
    resident = Coefficients.load("resident/coefficients.safetensors")
    assert torch.equal(streamed.alpha, resident.alpha)
    assert streamed.record["early_stopped_at"] in (1, 2)


def test_a_folder_holds_only_what_was_learned_last(here):
    foreign = ("learn", "low.pth", "low.pth", "--model", "resnet9:width=2", *LINF)
    assert run(*foreign, "--epochs", 1, "-o", "out") == 0
    assert file_names(here / "out", "soup.*") == {"soup.pth", "soup.safetensors"}
    assert run(*LEARN, "--epochs", 1, "-o", "out") == 0
    assert file_names(here / "out", "soup.*") == {"soup.safetensors"}
    assert run(*LEARN, "--epochs", 1, "--dial", "-o", "out") == 0
    assert file_names(here / "out", "*.safetensors") == {"dial.safetensors"}
    assert not (here / "out" / "coefficients.csv").exists()


def test_a_single_ingredient_is_learned_with_a_warning(here, capsys):
    assert run("learn", "low.safetensors", *LINF, "--epochs", 1, "-o", "alone") == 0
    assert "warning: a single ingredient" in capsys.readouterr().err
    soup = Checkpoint.load("alone/soup.safetensors")
    low = Checkpoint.load("low.safetensors")
    assert all(torch.equal(soup.tensors[name], low.tensors[name]) for name in low.parameters)
