"""robustsoup train: what it writes and records."""

import numpy
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
