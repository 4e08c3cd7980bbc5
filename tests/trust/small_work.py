"""Small inputs and one small form of each command, which take about a second each."""

from commands import run

TINY_RECIPE = """
name = "tiny"
data = "digits"
model = "resnet9:width=2"
precision = "float32"

[pretrain]
threat = "Linf 32/255"
epochs = 2
lr = 0.2

[finetune]
epochs = 1
lr = 0.05

[ingredients]
low = { threat = "Linf 16/255" }
high = { threat = "Linf 64/255" }

[soups.grid]
method = "grid"
step = 0.5

[soups.learned]
method = "learned"
threats = ["Linf 32/255"]
epochs = 1

[evaluate]
threats = ["Linf 32/255"]
steps = 2
select_samples = 64
report_samples = 64

[select]
require = ["clean>=0"]

[report]
figures = []
"""
DIGITS = ("--data", "digits", "--threat", "Linf 32/255", "--threads", 1)
PAIR = ("../low.safetensors", "../high.safetensors")
COMMANDS = {
    "run": ("run", "../tiny.toml", "--threads", 1, "-o", "run"),
    "train": (
        "train", "--from", PAIR[0], *DIGITS, "--epochs", 3, "--lr", 0.05, "-o", "t.safetensors",
    ),
    "learn": ("learn", *PAIR, *DIGITS, "--epochs", 2, "-o", "learned"),
    "evaluate": (
        "evaluate", *PAIR, *DIGITS, "--threat", "L2 0.5", "--steps", 5, "--restarts", 2,
        "--samples", 128, "--keep-points", "-o", "evaluated",
    ),
    "search": (
        "search", *PAIR, *DIGITS, "--steps", 3, "--samples", 64, "--step", 0.25, "-o", "best",
    ),
    "landscape": (
        "landscape", "../base.safetensors", *PAIR, *DIGITS, "--points", 4, "--samples", 64,
        "--attack-steps", 2, "-o", "plane",
    ),
}  # fmt: skip
"""One form of each command that works for more than a moment; run in a folder beside the inputs."""


def make_inputs(folder):
    """Write a pre-trained network, two fine-tuned ones and a recipe into a folder."""
    (folder / "tiny.toml").write_text(TINY_RECIPE, encoding="utf-8")
    base = ("train", "--model", "resnet9:width=2", "--data", "digits", "--threads", 1)
    tuned = ("train", "--from", "base.safetensors", "--data", "digits", "--threads", 1)
    for words in (
        (*base, "--threat", "Linf 32/255", "--epochs", 2, "--lr", 0.2, "-o", "base.safetensors"),
        (*tuned, "--threat", "Linf 16/255", "--epochs", 1, "--lr", 0.05, "-o", "low.safetensors"),
        (*tuned, "--threat", "Linf 64/255", "--epochs", 1, "--lr", 0.05, "-o", "high.safetensors"),
    ):
        code, output = run(words, folder, folder / "store")
        assert code == 0, output
