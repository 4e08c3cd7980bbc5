"""Trackers: receive the figures of each finished epoch and keep them for plots and dashboards.

`on_epoch` of `train`, `learn` and `learn_dial` takes any function of one dictionary, such as
`wandb.log`; `track` returns such functions for files.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from robustsoup.errors import RequestError, StorageError
from robustsoup.paths import user_path

OnEpoch = Callable[[Mapping[str, float]], object]
"""on_epoch(figures): "epoch" (from 1), "loss", and the figures measured on val, if any."""

TENSORBOARD = "tensorboard:"


def track(place: str | os.PathLike[str]) -> OnEpoch:
    """Return a callback that writes the figures of each epoch.

    Args:
        place: "FILE.jsonl", to which one line of JSON is appended for each epoch, or
            "tensorboard:FOLDER" for TensorBoard's event files; requires robustsoup[tensorboard].

    Raises:
        RequestError: The place is neither, or TensorBoard is not installed.
        StorageError: The file cannot be written.

    Example: `rs.train(network, data.train, on_epoch=rs.track("train.jsonl"))`
    """
    text = os.fspath(place)
    if text.startswith(TENSORBOARD):
        return _track_in_tensorboard(user_path(text.removeprefix(TENSORBOARD)))
    path = user_path(text)
    if path.suffix != ".jsonl":
        raise RequestError(f"track: got {text}, expected FILE.jsonl or {TENSORBOARD}FOLDER")
    _append(path, "")
    return lambda figures: _append(path, json.dumps(dict(figures)) + "\n")


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None


def _track_in_tensorboard(folder: Path) -> OnEpoch:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RequestError(
            "track: tensorboard is not installed; pip install 'robustsoup[tensorboard]'"
        ) from None

    def write_figures(figures: Mapping[str, float]) -> None:
        with SummaryWriter(str(folder)) as writer:
            for name, value in figures.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(figures["epoch"]))

    return write_figures
