"""robustsoup mix: coefficients and BatchNorm statistics."""

import pytest
import torch
from command_line import LINF, MIX, PAIR, run

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.soups.coefficients import Coefficients
from robustsoup.soups.merging import merge
from robustsoup.soups.mixing import mix


@pytest.mark.parametrize(
    ("spelled", "alpha"),
    [
        ("1/4,3/4", [0.25, 0.75]),
        ("0.25,0.75", [0.25, 0.75]),
        ("0.25, 0.75", [0.25, 0.75]),
        ("1,0", [1.0, 0.0]),
        ("25e-2,7.5e-1", [0.25, 0.75]),
    ],
)
def test_coefficients_are_one_word_with_commas(here, spelled, alpha):
    assert run(*MIX, "--coefficients", spelled) == 0
    expected = mix(PAIR, alpha, buffers="average")
    assert Checkpoint.load("soup.safetensors").digest == expected.digest
    if alpha == [1.0, 0.0]:
        assert expected.digest == Checkpoint.load("low.safetensors").digest


def test_coefficients_are_uniform_by_default_and_may_come_first(here):
    assert run("mix", *PAIR, "-o", "a.safetensors") == 0
    options = ("--coefficients", "1/2,1/2", "--buffers", "average")
    assert run("mix", *options, *PAIR, "-o", "b.safetensors") == 0
    assert run("mix", *PAIR, "--coefficients=0.5,0.5", "-o", "c.safetensors") == 0
    assert len({Checkpoint.load(f"{name}.safetensors").digest for name in "abc"}) == 1


def test_statistics_can_be_measured_again(here):
    base = ("mix", *PAIR, "--data", "digits")
    assert run(*base, "--buffers", "recalibrate", "-o", "clean.safetensors") == 0
    attacked = ("--buffers", "recalibrate-adversarial", "--threat", "Linf 48/255")
    assert run(*base, *attacked, "-o", "attacked.safetensors") == 0
    first, second = Checkpoint.load("clean.safetensors"), Checkpoint.load("attacked.safetensors")
    assert torch.equal(first.tensors["linear.weight"], second.tensors["linear.weight"])
    mean = "prep.1.running_mean"
    assert not torch.equal(first.tensors[mean], second.tensors[mean])
    assert second.provenance["buffers"]["threat"] == "Linf 48/255"


def test_affine_coefficients_without_statistics_take_those_of_the_base(here):
    """As for a network without BatchNorm, whose learning tracks none."""
    record = {"learning": {"affine": True}}
    alpha = Coefficients(torch.tensor([[1.5, -0.5]], dtype=torch.float64), record=record)
    alpha.save("affine.safetensors")
    assert run(*MIX, "--coefficients", "affine.safetensors") == 0
    expected = mix(PAIR, alpha)
    assert Checkpoint.load("soup.safetensors").digest == expected.digest
    assert expected.provenance["buffers"]["policy"] == "base"


def test_the_base_gives_its_statistics(here):
    options = ("--buffers", "base", "--base", "base.safetensors")
    learn = ("learn", *PAIR, *LINF, "--epochs", 1, "--learning-buffers", "base")
    assert run(*learn, *options, "-o", "out") == 0
    assert run(*MIX, *options) == 0
    base = Checkpoint.load("base.safetensors").tensors["prep.1.running_mean"]
    for soup in ("out/soup.safetensors", "soup.safetensors"):
        assert torch.equal(Checkpoint.load(soup).tensors["prep.1.running_mean"], base)


def test_a_method_merges(here, capsys):
    weights = ("--coefficients", "0.25,0.75")
    assert run(*MIX, "--method", "slerp", *weights) == 0
    assert "2 ingredients merged by slerp, BatchNorm statistics: average" in capsys.readouterr().out
    expected = merge(PAIR, "slerp", [0.25, 0.75])
    assert Checkpoint.load("soup.safetensors").digest == expected.digest
    ties = ("--method", "ties", "--base", "base.safetensors", "--density", 0.5)
    assert run(*MIX, *ties) == 0
    expected = merge(PAIR, "ties", base="base.safetensors", density=0.5)
    assert Checkpoint.load("soup.safetensors").digest == expected.digest
    regmean = ("--method", "regmean", "--data", "digits", "--threat", "Linf 32/255")
    assert run(*MIX, *regmean, "--measure-samples", 16) == 0
    assert Checkpoint.load("soup.safetensors").provenance["merge"]["threat"] == "Linf 32/255"


def test_a_method_takes_learned_weights_of_the_whole_network(here, capsys):
    learn = ("learn", *PAIR, *LINF, "--epochs", 1, "--granularity", "model", "--init", "0.9,0.1")
    assert run(*learn, "-o", "whole") == 0
    coefficients = ("--coefficients", "whole/coefficients.safetensors", "--method", "slerp")
    for order, name in ((PAIR, "a.safetensors"), (PAIR[::-1], "b.safetensors")):
        assert run("mix", *order, *coefficients, "-o", name) == 0
    assert Checkpoint.load("a.safetensors").digest == Checkpoint.load("b.safetensors").digest
    assert Checkpoint.load("a.safetensors").provenance["buffers"]["policy"] == "average"
    assert run("mix", PAIR[0], "base.safetensors", *coefficients, "-o", "c.safetensors") == 2
    assert "computed for other ingredients" in capsys.readouterr().err


def test_a_method_may_measure_on_another_split(here, capsys):
    fisher = ("--method", "fisher", "--data", "digits", "--seed", 1, "--measure-samples", 16)
    assert run(*MIX, *fisher, "--threat", "Linf 32/255") == 2
    assert "or --allow-leakage" in capsys.readouterr().err
    assert run(*MIX, *fisher, "--threat", "Linf 32/255", "--allow-leakage") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--density", 0.5), "--density: requires --method"),
        (("--allow-leakage",), "--allow-leakage: requires --method"),
        (("--method", "slerp", "--density", 0.5), "--density: has no meaning with --method slerp"),
        (("--method", "slerp", "--allow-leakage"), "--allow-leakage: has no meaning with"),
        (("--threat", "L2 1"), "--threat: requires --buffers recalibrate-adversarial, or a"),
        (("--method", "slerp", "--threat", "L2 1"), "--threat: requires --buffers"),
        (("--method", "fisher"), 'method "fisher": measures on training samples; give data'),
        (("--method", "swap"), 'method "swap": give the blocks'),
        (("--method", "slerp", "--base", "base.safetensors"), "--base: requires --buffers base"),
        (("--method", "tise", "--base", "base.safetensors"), 'did you mean "ties"?'),
        (("--method", "learned"), 'method: "learned" is made by mix, search or learn'),
    ],
)
def test_wrong_requests_of_methods_are_refused_in_one_line(here, capsys, options, message):
    assert run(*MIX, *options) == 2
    assert message in capsys.readouterr().err


def test_files_of_other_normalisations_are_mixed_with_a_warning(here, capsys):
    low = Checkpoint.load("low.safetensors")
    low.with_network(normalize=([0.1], [0.9])).save("low.safetensors")
    assert run(*MIX, "--data", "digits") == 0
    error = " ".join(capsys.readouterr().err.split())
    assert (
        "high.safetensors: normalises its input by None, low.safetensors by [[0.1], [0.9]]" in error
    )
    assert Checkpoint.load("soup.safetensors").network_settings.normalize == ((0.1,), (0.9,))
