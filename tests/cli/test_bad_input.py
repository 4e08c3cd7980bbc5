"""Bad input: one line on standard error, exit code 2, and no file changes."""

import json
import shlex

import pytest
import torch
from command_line import RECIPE, read_files, run
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.models import load_model
from robustsoup.soups.coefficients import Coefficients


def truncate_safetensors(here):
    content = (here / "low.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(content[: len(content) // 2])


def truncate_pth(here):
    torch.save(dict(Checkpoint.load(here / "low.safetensors").tensors), here / "whole.pth")
    (here / "cut.pth").write_bytes((here / "whole.pth").read_bytes()[:5000])


def write_other_files(here):
    (here / "notes.pth").write_text("dear diary\n" * 100)
    (here / "notes.safetensors").write_text("dear diary\n" * 100)
    (here / "empty.pth").write_bytes(b"")
    torch.save({"epoch": 3, "lr": 0.1}, here / "log.pth")
    torch.save(nn.Linear(2, 2), here / "module.pth")


def write_nan(here):
    low = Checkpoint.load(here / "low.safetensors")
    weights = low.tensors["layer1.0.weight"].clone()
    weights[0, 0, 0, 0] = float("nan")
    # robustsoup itself does not write NaN.
    metadata = {"robustsoup": json.dumps(low.provenance)}
    save_file({**low.tensors, "layer1.0.weight": weights}, here / "nan.safetensors", metadata)


def write_images(here):
    for name, grey in (("cats", 60), ("dogs", 190)):
        (here / "images" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (12, 12), (grey, grey, i)).save(here / "images" / name / f"{i}.png")


def write_two_class_network(here):
    write_images(here)
    network = load_model("resnet9:width=2", channels=3, classes=2)
    Checkpoint.of(network).save(here / "two.safetensors")


def evaluate_two_splits(here):
    evaluate = ("evaluate", "low.safetensors", "--data", "digits", "--samples", 64)
    for split in ("test", "val"):
        assert run(*evaluate, "--split", split, "-o", "judged") == 0


def write_coefficients(here):
    Coefficients.of([0.5, 0.5]).save(here / "alpha.safetensors")


def make_empty_folder(here):
    (here / "nothing").mkdir()


def write_recipe(old, new):
    return lambda here: (here / "bad.toml").write_text(RECIPE.replace(old, new))


def refuse(name, command, *parts, prepare=None):
    """Return a test case: a command that is refused in a line with these parts."""
    return pytest.param(command, parts, prepare, id=name)


IMAGES = "--data folder:images --threat 'Linf 8/255'"
LINF = "--data digits --threat 'Linf 32/255'"
FEW = "--steps 2 --samples 64"
PAIR = "low.safetensors high.safetensors"
MIX = f"mix {PAIR} -o soup.safetensors"
SEARCH = f"search {PAIR} {LINF} {FEW} --step 0.5"
LEARN = f"learn {PAIR} {LINF}"
LEARN_CLEAN = f"learn {PAIR} --data digits --threat clean"

REFUSED = [
    refuse(
        "wrong path", f"evaluate nowhere.safetensors {LINF}", "nowhere.safetensors", "no such file"
    ),
    refuse(
        "wrong path among others",
        "mix low.safetensors nowhere.pth -o soup.safetensors",
        "nowhere.pth",
    ),
    refuse(
        "a folder", f"evaluate nothing {LINF}", "nothing", "got a folder", prepare=make_empty_folder
    ),
    refuse("wrong path of a recipe", "run nowhere.toml", "nowhere.toml", "no such file"),
    refuse("wrong path of a run", "report nowhere", "nowhere"),
    refuse(
        "wrong path of coefficients",
        f"{MIX} --coefficients no.safetensors",
        "no.safetensors",
        "no such file",
    ),
    refuse(
        "checkpoint as coefficients",
        f"{MIX} --coefficients low.safetensors",
        "low.safetensors",
        "not a coefficients file",
    ),
    refuse(
        "truncated",
        f"evaluate cut.safetensors {LINF}",
        "cut.safetensors",
        "cut short",
        prepare=truncate_safetensors,
    ),
    refuse(
        "truncated, searched",
        f"search low.safetensors cut.safetensors {LINF} -o best",
        "cut.safetensors",
        prepare=truncate_safetensors,
    ),
    refuse(
        "truncated, learned",
        f"learn low.safetensors cut.safetensors {LINF} -o soup",
        "cut.safetensors",
        prepare=truncate_safetensors,
    ),
    refuse(
        "truncated .pth",
        "mix whole.pth cut.pth -o soup.safetensors",
        "cut.pth",
        prepare=truncate_pth,
    ),
    refuse(
        "text as .pth",
        "mix notes.pth -o soup.safetensors",
        "notes.pth",
        "is text",
        prepare=write_other_files,
    ),
    refuse(
        "text as .safetensors",
        "mix notes.safetensors -o soup.safetensors",
        "notes.safetensors",
        prepare=write_other_files,
    ),
    refuse(
        "empty file", "mix empty.pth -o soup.safetensors", "empty.pth", prepare=write_other_files
    ),
    refuse(
        "no weights in it",
        "mix log.pth -o soup.safetensors",
        "log.pth",
        "no state dict",
        "epoch",
        prepare=write_other_files,
    ),
    refuse(
        "a pickled module",
        "mix module.pth -o soup.safetensors",
        "module.pth",
        prepare=write_other_files,
    ),
    refuse(
        "NaN",
        f"evaluate nan.safetensors {LINF}",
        "nan.safetensors",
        "layer1.0.weight",
        "NaN",
        prepare=write_nan,
    ),
    refuse(
        "NaN, mixed",
        "mix low.safetensors nan.safetensors -o soup.safetensors",
        "nan.safetensors",
        "layer1.0.weight",
        prepare=write_nan,
    ),
    refuse(
        "NaN, searched",
        f"search low.safetensors nan.safetensors {LINF} -o best",
        "nan.safetensors",
        "NaN",
        prepare=write_nan,
    ),
    refuse(
        "other shape",
        "mix low.safetensors wide.safetensors -o soup.safetensors",
        "layer1.0.weight",
        "low.safetensors",
        "wide.safetensors",
        "(4, 2, 3, 3)",
        "(8, 4, 3, 3)",
    ),
    refuse(
        "other shape, searched",
        f"search low.safetensors wide.safetensors {LINF} -o best",
        "layer1.0.weight",
    ),
    refuse(
        "other shape, learned",
        f"learn low.safetensors wide.safetensors {LINF} -o soup",
        "layer1.0.weight",
    ),
    refuse(
        "10 classes on 2",
        f"evaluate coloured.safetensors {IMAGES}",
        "10",
        "expected 2 classes",
        prepare=write_images,
    ),
    refuse(
        "10 classes on 2, searched",
        f"search coloured.safetensors coloured.safetensors {IMAGES} -o best",
        "10",
        "expected 2 classes",
        prepare=write_images,
    ),
    refuse(
        "10 classes on 2, trained",
        f"train --from coloured.safetensors {IMAGES} -o soup.safetensors",
        "10",
        "expected 2 classes",
        prepare=write_images,
    ),
    refuse(
        "grey digits on coloured images",
        f"evaluate low.safetensors {IMAGES}",
        "(3, 8, 8)",
        prepare=write_images,
    ),
    refuse(
        "eps below 0",
        "evaluate low.safetensors --data digits --threat 'Linf -8/255'",
        "Linf -8/255",
        "at least 0",
    ),
    refuse(
        "eps below 0, trained",
        "train --model resnet9:width=2 --data digits --threat 'L2 -1' -o soup.safetensors",
        "L2 -1",
        "at least 0",
    ),
    refuse(
        "eps below 0, searched",
        "search low.safetensors high.safetensors --data digits --threat 'L1 -1' -o best",
        "L1 -1",
        "at least 0",
    ),
    refuse(
        "unknown norm", "evaluate low.safetensors --data digits --threat 'L3 1'", "L3", "Linf 8/255"
    ),
    refuse("sum is not 1", f"{MIX} --coefficients 0.5,0.6", "0.5, 0.6", "1.1", "expected sum 1"),
    refuse("negative coefficient", f"{MIX} --coefficients -0.5,1.5", "-0.5", "below 0"),
    refuse("too few coefficients", f"{MIX} --coefficients 1", "got 1", "expected 2"),
    refuse("too many coefficients", f"{MIX} --coefficients 0.2,0.3,0.5", "got 3", "expected 2"),
    refuse("text as coefficients", f"{MIX} --coefficients half", "half", "1/3"),
    refuse("division by zero", f"{MIX} --coefficients 1/0,1", "1/0"),
    refuse("NaN coefficient", f"{MIX} --coefficients nan,1", "nan"),
    refuse(
        "unknown recipe key",
        "run bad.toml",
        "bad.toml",
        "evaluate.step: unknown key",
        "steps",
        prepare=write_recipe("steps = 2", "step = 2"),
    ),
    refuse(
        "unknown recipe key, planned",
        "plan bad.toml",
        "bad.toml",
        "evaluate.step",
        prepare=write_recipe("steps = 2", "step = 2"),
    ),
    refuse(
        "not TOML",
        "run bad.toml",
        "bad.toml",
        "not a TOML file",
        prepare=write_recipe("[ingredients]", "[ingredients"),
    ),
    refuse(
        "unknown key by --set",
        "run bad.toml --set evaluate.stepz=2",
        "evaluate.stepz",
        "steps",
        prepare=write_recipe("a", "a"),
    ),
    refuse(
        "empty folder",
        "evaluate coloured.safetensors --data folder:nothing",
        "nothing",
        "0 class folders",
        prepare=make_empty_folder,
    ),
    refuse(
        "missing folder",
        "evaluate low.safetensors --data folder:nowhere",
        "nowhere",
        "one sub-folder for each class",
    ),
    refuse("unknown data", "evaluate low.safetensors --data digit", "digit", "digits"),
    refuse(
        "unknown network",
        f"train --model resnet10 {LINF} -o soup.safetensors",
        "resnet10",
        "resnet9",
    ),
    refuse(
        "missing module",
        f"train --model no_such:Net {LINF} -o soup.safetensors",
        "no_such",
        "Python path",
    ),
    refuse(
        "no recorded network",
        f"evaluate low.pth {LINF}",
        "low.pth",
        "does not record its network",
        "--model",
    ),
    refuse("no network given", f"train {LINF} -o soup.safetensors", "--model", "--from"),
    refuse(
        "wrong network",
        f"evaluate low.pth --model resnet9:width=4 {LINF}",
        "low.pth: prep.0.weight",
        "(2, 1, 3, 3)",
        "(4, 1, 3, 3)",
    ),
    refuse("wrong suffix", "mix low.safetensors -o soup.zip", "soup.zip", ".pth"),
    refuse(
        "wrong requirement", f"{SEARCH} --require 'clean>0.5' -o best", "clean>0.5", "clean>=0.85"
    ),
    refuse(
        "requirement that is not measured",
        f"{SEARCH} --require 'L2 0.5>=0.1' -o best",
        "L2 0.5",
        "not evaluated",
    ),
    refuse("wrong method", f"search low.safetensors {LINF} --method best -o best", "best", "grid"),
    refuse(
        "step that is no fraction of 1",
        f"search low.safetensors {LINF} --step 0.3 -o best",
        "step",
        "0.3",
    ),
    refuse("line of one", f"search low.safetensors {LINF} --method line -o best", "line", "got 1"),
    refuse("too many samples", f"evaluate low.safetensors {LINF} --samples 10000", "10000", "500"),
    refuse("no samples", f"evaluate low.safetensors {LINF} --samples 0", "0"),
    refuse("steps below 1", f"evaluate low.safetensors {LINF} --steps 0", "steps", "0"),
    refuse(
        "unknown split", f"evaluate low.safetensors {LINF} --split dev", "dev", "train, val or test"
    ),
    refuse("unknown attack", f"evaluate low.safetensors {LINF} --attack fgsm", "fgsm", "apgd"),
    refuse(
        "unknown loss",
        f"evaluate low.safetensors {LINF} --loss hinge",
        "hinge",
        "ce, dlr, targeted dlr",
    ),
    refuse("no restarts", f"evaluate low.safetensors {LINF} --restarts 0", "restarts", "0"),
    refuse("eot of 0", f"evaluate low.safetensors {LINF} --eot 0", "eot", "0"),
    refuse(
        "batch size of 0", f"evaluate low.safetensors {LINF} --batch-size 0", "--batch-size", "0"
    ),
    refuse(
        "points without a folder",
        f"evaluate low.safetensors {LINF} --keep-points",
        "--keep-points",
        "-o",
    ),
    refuse(
        "unknown loss, searched",
        f"{SEARCH} --loss hinge -o best",
        "--loss",
        "hinge",
        "targeted dlr",
    ),
    refuse(
        "unknown attack, searched", f"{SEARCH} --attack fgsm -o best", "--attack", "fgsm", "pgd"
    ),
    refuse("no restarts, searched", f"{SEARCH} --restarts 0 -o best", "--restarts", "0"),
    refuse(
        "screening by AutoAttack",
        f"{SEARCH} --screen --attack autoattack -o best",
        "screen",
        "autoattack",
    ),
    refuse(
        "screening without an attack",
        "search low.safetensors --data digits --threat clean --screen -o best",
        "screen",
        "threats",
    ),
    refuse(
        "two classes for dlr",
        f"evaluate two.safetensors {IMAGES} --loss dlr",
        "dlr",
        "needs 3 classes",
        "got 2",
        prepare=write_two_class_network,
    ),
    refuse(
        "comparing missing files",
        "compare nowhere.json nowhere.json",
        "nowhere.json",
        "not an evaluation",
    ),
    refuse(
        "comparing with a checkpoint", "compare low.safetensors low.safetensors", "low.safetensors"
    ),
    refuse(
        "comparing two splits",
        "compare judged/low.test.json judged/low.val.json",
        "val",
        "one split",
        prepare=evaluate_two_splits,
    ),
    refuse("comparing one record", "compare judged/low.test.json", "B.json"),
    refuse("unknown device", f"evaluate low.safetensors {LINF} --device abacus", "abacus"),
    refuse(
        "unknown precision", f"evaluate low.safetensors {LINF} --precision int8", "int8", "float32"
    ),
    refuse("unknown policy", f"{MIX} --buffers mean", "mean", "average"),
    refuse("recalibrating without data", f"{MIX} --buffers recalibrate", "recalibrate", "--data"),
    refuse("tracked but not learned", f"{MIX} --buffers tracked", "tracked"),
    refuse(
        "text as normalization",
        f"evaluate low.pth --model resnet9:width=2 {LINF} --normalize half 1",
        "half",
        "numbers",
    ),
    refuse(
        "std of 0",
        f"evaluate low.pth --model resnet9:width=2 {LINF} --normalize 0.5 0",
        "std above 0",
    ),
    refuse("another split", f"{SEARCH} --seed 1 -o best", "seed 0", "--allow-leakage"),
    refuse(
        "lr of 0", f"train --from base.safetensors {LINF} --lr 0 -o soup.safetensors", "lr", "0"
    ),
    refuse(
        "momentum below 0",
        f"train --from base.safetensors {LINF} --momentum -1 -o soup.safetensors",
        "momentum",
        "-1",
    ),
    refuse("momentum above 1, learned", f"{LEARN} --momentum 2 -o soup", "momentum", "2"),
    refuse(
        "a seed beyond 64 bits",
        f"train --model resnet9:width=2 {LINF} --seed 100000000000000000000 -o soup.safetensors",
        "seed",
        "100000000000000000000",
    ),
    refuse("tracked buffers, searched", f"{SEARCH} --buffers tracked -o best", "tracked", "learn"),
    refuse("unknown buffers, learned", f"{LEARN} --buffers mean -o out", "buffers", "mean"),
    refuse(
        "adversarial buffers without a threat",
        f"{LEARN_CLEAN} --buffers recalibrate-adversarial -o out",
        "recalibrate-adversarial",
        "threat",
    ),
    refuse("dial-by without a dial", f"{LEARN} --dial-by eps -o out", "--dial-by", "--dial"),
    refuse(
        "a base that learn does not use",
        f"{LEARN} --base base.safetensors -o out",
        "--base",
        "--buffers base",
    ),
    refuse(
        "a base that mix does not use", f"{MIX} --base base.safetensors", "--base", "--buffers base"
    ),
    refuse(
        "a greedy search that screens",
        f"search {PAIR} {LINF} {FEW} --method greedy --screen -o best",
        "--screen",
        "greedy",
    ),
    refuse("infinite coefficients", f"{MIX} --coefficients 1e400,0", "1e400", "numbers"),
    refuse(
        "a score of two lines",
        f"search {PAIR} {LINF} --method greedy --score 'clean\nx' -o best",
        "score",
    ),
    refuse(
        "coefficients as a checkpoint",
        "mix low.safetensors alpha.safetensors -o soup.safetensors",
        "alpha.safetensors",
        "holds coefficients",
        "--coefficients",
        prepare=write_coefficients,
    ),
    refuse("at without a dial", f"{MIX} --at 0.5", "--at", "dial"),
    refuse("at with numbers", f"{MIX} --coefficients 0.5,0.5 --at 0.5", "--at", "dial"),
    refuse(
        "an unknown dial-by", f"{LEARN} --dial --dial-by alpha -o out", "alpha", "objective", "eps"
    ),
    refuse(
        "a dial with an objective",
        f"{LEARN} --dial --objective 'mixed 0.5' -o out",
        "--objective",
        "--dial",
    ),
    refuse(
        "a dial that stops early", f"{LEARN} --dial --early-stop -o out", "--early-stop", "--dial"
    ),
    refuse(
        "an unknown granularity", f"{LEARN} --granularity row -o out", "granularity", "row", "block"
    ),
    refuse("a broken pattern", f"{LEARN} --granularity 're:(' -o out", "pattern"),
    refuse("an unknown place", f"{LEARN} --place disk -o out", "place", "disk", "files"),
    refuse("a budget below 0", f"{LEARN} --budget -1 -o out", "budget", "-1"),
    refuse(
        "unknown learning buffers", f"{LEARN} --learning-buffers mean -o out", "buffers", "mean"
    ),
    refuse("learning on another split", f"{LEARN} --seed 1 -o out", "seed 0", "--allow-leakage"),
    refuse(
        "an unknown score",
        f"search {PAIR} {LINF} --method greedy --score best -o best",
        "score",
        "best",
    ),
    refuse("a score for a grid", f"{SEARCH} --score clean -o best", "score", "grid"),
    refuse(
        "a missing file, checked",
        "check nowhere.safetensors",
        "nowhere.safetensors",
        "no such file",
    ),
    refuse(
        "an ema of 1",
        f"train --from low.safetensors {LINF} --ema 1 -o soup.safetensors",
        "ema",
        "1.0",
        "[0, 1)",
    ),
    refuse(
        "a missing file of synthetic images",
        f"train --from low.safetensors {LINF} --synthetic nowhere.npz -o soup.safetensors",
        "nowhere.npz",
        "no such file",
    ),
    refuse(
        "a fraction without synthetic images",
        f"train --from low.safetensors {LINF} --synthetic-fraction 0.5 -o soup.safetensors",
        "--synthetic-fraction",
        "--synthetic FILE",
    ),
    refuse(
        "a missing objective",
        f"train --from low.safetensors {LINF} --objective nowhere:fn -o soup.safetensors",
        "nowhere:fn",
        "Python path",
    ),
    refuse("unknown option", f"evaluate low.safetensors {LINF} --stepz 3", "--stepz"),
    refuse("missing option", "evaluate low.safetensors", "--data"),
    refuse(
        "a percentage without its sign",
        f"{SEARCH} --require 'clean>=85' -o best",
        'robustsoup: --require: got "clean>=85", expected a fraction',
        'did you mean "clean>=85%"?',
    ),
    refuse(
        "two requirements on one accuracy",
        f"{SEARCH} --require 'clean>=0.3' --require 'clean>=50%' -o best",
        'robustsoup: --require: got "clean>=0.3" and "clean>=0.5"',
        "keep the higher",
    ),
    refuse("nothing to maximise", f"{SEARCH} --maximise knees -o best", '--maximise: got "knees"'),
    refuse("no samples", f"search {PAIR} {LINF} --samples 0 -o best", "--samples", "0"),
    refuse("missing argument", "mix -o soup.safetensors", "checkpoints"),
    refuse("unknown command", "bake", "bake"),
    refuse(
        "text for a number", f"train {LINF} --epochs many -o soup.safetensors", "many", "--epochs"
    ),
]


@pytest.mark.parametrize(("command", "parts", "prepare"), REFUSED)
def test_bad_input_is_refused_in_one_line(here, capsys, command, parts, prepare):
    for target in ("soup.safetensors", "soup/soup.safetensors", "best/soup.safetensors"):
        (here / target).parent.mkdir(exist_ok=True)
        (here / target).write_text("an earlier result")
    if prepare:
        prepare(here)
    capsys.readouterr()
    before = read_files(here)
    code = run(*shlex.split(command))
    printed = capsys.readouterr()
    assert code == 2, printed.err
    lines = [line for line in printed.err.splitlines() if "robustsoup: warning: " not in line]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("robustsoup: ")
    assert printed.out == ""
    for part in parts:
        assert part.lower() in lines[0].lower()  # releases of typer spell arguments differently
    assert read_files(here) == before
