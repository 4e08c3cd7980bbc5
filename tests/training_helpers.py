"""Small training runs on digits, for tests."""

from typing import Any

from trained_seed import trained_seed

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import Split, load_data
from robustsoup.models import load_model
from robustsoup.progress import Progress
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train

DIGITS = load_data("digits")
DATA, VAL = DIGITS.train.first(96), DIGITS.val.first(64)
LINF = ThreatModel("Linf", 32 / 255)
STEPS_PER_EPOCH = 3


def fresh_network(width: int = 2, **options: Any):
    """Return a small resnet9 for digits with fresh weights."""
    return load_model(f"resnet9:width={width}", channels=1, **({"seed": trained_seed()} | options))


def train_digits(network=None, data: Split = DATA, **changes: Any) -> Checkpoint:
    """Train a small network for two epochs of three steps; `changes` are arguments of `train`."""
    arguments = {
        "threat": LINF,
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.1,
        "device": "cpu",
        "precision": "float32",
        "seed": trained_seed(),
    }
    return train(fresh_network() if network is None else network, data, **(arguments | changes))


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""


def interrupt_at(step: int, error: type[BaseException] = KeyboardInterrupt) -> Progress:
    """Return an on_progress that interrupts the run after `step` steps."""

    def on_progress(done: int, total: int, figures: str) -> None:
        if done == step:
            raise error

    return on_progress


def kill_at(step: int) -> Progress:
    """Return an on_progress that kills the run after `step` steps."""
    return interrupt_at(step, Killed)
