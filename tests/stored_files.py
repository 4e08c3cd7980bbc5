"""One small file of each format of tensors, and a reader that returns all its values."""

import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.models import load_model
from robustsoup.progress import SavedState
from robustsoup.soups.coefficients import Coefficients, Dial


def describe(content):
    """Return all values of nested content, for comparison."""
    if isinstance(content, torch.Tensor):
        return (str(content.dtype), tuple(content.shape), content.numpy().tobytes())
    if isinstance(content, dict):
        return [(key, describe(value)) for key, value in content.items()]
    if isinstance(content, (list, tuple)):
        return [describe(value) for value in content]
    return repr(content)


def make_checkpoint():
    model = load_model("resnet9:width=2", channels=1, seed=1)
    return Checkpoint.of(model, {"note": "grüße", "data": None})


def save_checkpoint(folder):
    return make_checkpoint().save(folder / "a.safetensors")


def save_pickled(folder):
    return Checkpoint(make_checkpoint().tensors).save(folder / "a.pth")


def save_foreign(folder):
    torch.save({"state_dict": dict(make_checkpoint().tensors), "epoch": 3}, folder / "f.pth")
    return folder / "f.pth"


def save_coefficients(folder):
    alpha = torch.softmax(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), 1)
    layers = tuple(f"layer{number}.weight" for number in range(40))
    tracked = {"bn.running_mean": torch.ones(64)}
    item = Coefficients(alpha.double(), layers, ("a", "b", "c"), {"note": "x"}, tracked)
    return item.save(folder / "coefficients.safetensors")


def save_dial(folder):
    line = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(0)).double()
    layers = tuple(f"layer{number}.weight" for number in range(30))
    return Dial(line, layers, ("a", "b")).save(folder / "dial.safetensors")


def save_state(folder):
    optimizer = {"state": {0: {"momentum": torch.ones(50)}}, "param_groups": [{"lr": 0.1}]}
    state = {"model": dict(make_checkpoint().tensors), "optimizer": optimizer, "step": 7}
    SavedState(folder / "state.pt", "work").save(state)
    return folder / "state.pt"


def read_checkpoint(path):
    read = Checkpoint.load(path)
    return describe([dict(read.tensors), read.provenance, read.wrapping and vars(read.wrapping)])


def open_checkpoint(path):
    read = Checkpoint.open(path)
    return describe([dict(read.tensors), read.provenance, read.wrapping and vars(read.wrapping)])


def read_layered(path):
    return describe(vars((Dial if "dial" in path.name else Coefficients).load(path)))


def read_state(path):
    return describe(SavedState(path, "work").load())


FORMATS = {
    "checkpoint": (save_checkpoint, read_checkpoint),
    "checkpoint, mapped": (save_checkpoint, open_checkpoint),
    ".pth": (save_pickled, read_checkpoint),
    ".pth, mapped": (save_pickled, open_checkpoint),
    "foreign .pth": (save_foreign, read_checkpoint),
    "coefficients": (save_coefficients, read_layered),
    "dial": (save_dial, read_layered),
    "state": (save_state, read_state),
}
"""kind -> (function that writes a file into a folder and returns its path, reader)."""
