"""robustsoup train: what it writes and records."""

import numpy
import pytest
from command_line import LINF, run

from robustsoup.checkpoints.checkpoint import Checkpoint

TUNE = ("train", "--from", "base.safetensors", *LINF, "--epochs", 1, "-o", "new.safetensors")


def test_a_fine_tuned_checkpoint_names_its_parent(here, capsys):
    more = ("--lr", 0.05, "--objective", "mixed 0.4", "--seed", 0, "--early-stop", "--threads", 1)
    assert run(*TUNE, *more) == 0
    record = Checkpoint.load("new.safetensors").provenance
    base = Checkpoint.load("base.safetensors").digest
    assert record["parents"] == [{"digest": base, "file": "base.safetensors"}]
    assert record["training"]["objective"] == "mixed 0.4"
    assert record["early_stopped_at"] == 1
    assert "new.safetensors: loss" in capsys.readouterr().out
    assert not list(here.glob(".*"))


def test_every_training_option_is_recorded(here, digits, capsys):
    val = digits.val
    images = val.images.permute(0, 2, 3, 1).numpy()
    numpy.savez(here / "generated.npz", image=images, label=val.labels.numpy())
    code = run(
        *(*TUNE, "--lr", 0.05, "--objective", "trades 5", "--schedule", "one-cycle"),
        *("--nesterov", "--weight-decay", 5e-4, "--no-weight-decay-bn", "--label-smoothing", 0.1),
        *("--clip-grad", 1, "--bn-momentum", 0.05, "--ema", 0.9),
        *("--synthetic", "generated.npz", "--synthetic-fraction", 0.5),
    )
    assert code == 0, capsys.readouterr().err
    record = Checkpoint.load("new.safetensors").provenance
    expected = {
        "objective": "trades 5",
        "schedule": "one-cycle",
        "nesterov": True,
        "weight_decay": 5e-4,
        "weight_decay_bn": False,
        "clip_grad": 1.0,
        "label_smoothing": 0.1,
        "bn_momentum": 0.05,
        "ema": 0.9,
        "synthetic_fraction": 0.5,
    }
    assert expected.items() <= record["training"].items()
    assert record["synthetic"][0]["file"] == "generated.npz"


def test_the_learning_rate_depends_on_the_start(here):
    assert run(*TUNE) == 0
    assert Checkpoint.load("new.safetensors").provenance["training"]["lr"] == 0.001
    fresh = ("--model", "resnet9:width=2", "-o", "fresh.safetensors")
    assert run("train", *LINF, "--epochs", 1, *fresh) == 0
    assert Checkpoint.load("fresh.safetensors").provenance["training"]["lr"] == 0.1


def test_a_line_is_trained_mixed_and_searched(here, capsys):
    train = ("train", "--from", "base.safetensors", "--data", "digits", "--epochs", 1)
    ends = ("ends/end1.safetensors", "ends/end2.safetensors")
    threats = ("--threat", "Linf 32/255", "--threat", "clean")
    assert run(*train, *threats, "--subspace", "line", "-o", "ends") == 0
    assert "ends/end2.safetensors: end 2, clean" in capsys.readouterr().out
    assert not list(here.glob("ends/.*.pt"))
    assert run("mix", *ends, "--at", 0.25, "-o", "soup.safetensors") == 2
    assert "give --data, or --buffers average" in capsys.readouterr().err
    assert run("mix", *ends[::-1], "--at", 0.25, "--data", "digits", "-o", "soup.safetensors") == 0
    record = Checkpoint.load("soup.safetensors").provenance
    assert record["coefficients"] == [0.25, 0.75]
    assert record["buffers"]["policy"] == "recalibrate"
    search = ("search", *ends, "--data", "digits", "--threat", "Linf 32/255", "--samples", 32)
    line = ("--method", "line", "--step", 0.5, "--steps", 1)
    assert run(*search, *line, "-o", "best") in (0, 4)
    soup = Checkpoint.load("best/soup.safetensors").provenance
    assert soup["buffers"]["policy"] == "recalibrate"
    assert run("show", ends[0]) == 0
    assert "end 1 of a line, trained against Linf 32/255" in capsys.readouterr().out
    assert run("learn", *ends, *LINF, "--epochs", 1, "-o", "learned") == 0
    coefficients = ("--coefficients", "learned/coefficients.safetensors")
    assert run("mix", *ends, *coefficients, "-o", "again.safetensors") == 0
    digests = {Checkpoint.load(f).digest for f in ("again.safetensors", "learned/soup.safetensors")}
    assert len(digests) == 1


def test_a_line_in_the_folder_of_a_triangle_leaves_two_ends(here):
    train = ("train", "--from", "base.safetensors", "--data", "digits", "--epochs", 1)
    threats = [word for eps in (32, 16, 8) for word in ("--threat", f"Linf {eps}/255")]
    assert run(*train, *threats, "--subspace", "triangle", "-o", "ends") == 0
    assert run(*train, *threats[:4], "--subspace", "line", "-o", "ends") == 0
    assert {path.name for path in here.glob("ends/*")} == {"end1.safetensors", "end2.safetensors"}


def test_a_union_is_trained(here):
    train = ("train", "--from", "base.safetensors", "--data", "digits", "--epochs", 1)
    union = ("--threat", "Linf 32/255", "--threat", "L2 1", "--combine", "random")
    assert run(*train, *union, "-o", "union.safetensors") == 0
    record = Checkpoint.load("union.safetensors").provenance["training"]
    assert (record["threat"], record["also"]) == ("Linf 32/255", ["L2 1.0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threat", "L2 1"), "--combine: got 2 threats (Linf 32/255, L2 1.0), expected max"),
        (("--combine", "max"), "--combine: got max with one threat"),
        (("--threat", "clean", "--combine", "max"), "--threat: got Linf 32/255, clean"),
        (("--subspace", "line"), "--subspace line: got 1 --threat, expected 2"),
        (("--subspace", "square"), '--subspace: got "square", expected line or triangle'),
        (("--subspace-by", "eps"), "--subspace-by: requires --subspace"),
        (("--subspace-at-ends", "0"), "--subspace-at-ends: requires --subspace"),
    ],
)
def test_threats_that_do_not_go_together_are_refused(here, capsys, options, message):
    train = ("train", "--from", "base.safetensors", "--data", "digits", "--threat", "Linf 32/255")
    assert run(*train, *options, "-o", "new") == 2
    assert message in capsys.readouterr().err
