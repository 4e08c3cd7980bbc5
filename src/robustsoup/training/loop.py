"""The loop over epochs and steps that training and learning share."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustsoup import distributed
from robustsoup.attacks.adaptation import copy_network
from robustsoup.attacks.forward import set_mode
from robustsoup.data.batches import Batch
from robustsoup.device import autocast
from robustsoup.errors import Diverged
from robustsoup.interruption import held_signals
from robustsoup.progress import Progress, SavedState
from robustsoup.seeding import keyed_random_state
from robustsoup.tracking import OnEpoch
from robustsoup.training.sharing import end_together

History = list[dict[str, float]]
"""One entry for each finished epoch: "epoch" (from 1), "loss" and the figures measured on val."""

STEPS_BETWEEN_FIGURES = 20
"""Steps between two reports of the loss: reading it makes a GPU wait."""


class StepwiseRun(Protocol):
    """A run that `run_epochs` drives: its state, one step, and the end of an epoch.

    Attributes:
        verb: "train" or "learn", for error messages.
        model: The network that takes the steps.
        epochs: Epochs of the whole run.
        steps_per_epoch: Steps of each epoch.
        precision: "float32" or "bfloat16".
        seed: Seed of all random numbers, those of the network's layers included.
        step: Number of steps taken.
        loss_sum: Sum of the losses of the current epoch's steps, a scalar on the model's device.
        history: The finished epochs.
    """

    verb: str
    model: nn.Module
    epochs: int
    steps_per_epoch: int
    precision: str
    seed: int
    step: int
    loss_sum: Tensor
    history: History

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from number `skip` on."""
        ...

    def take_step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step on a global batch and return its loss, a detached scalar."""
        ...

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Measure the network after an epoch and add the figures to its history entry."""
        ...

    def find_non_finite_layer(self) -> str | None:
        """Return the first layer whose state is not finite, or None."""
        ...

    def restore(self, state: dict[str, Any] | None) -> None:
        """Resume from a saved state; None starts a new run."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` needs."""
        ...


def resume(
    run: StepwiseRun, state_path: str | os.PathLike[str] | None, fingerprint: str
) -> SavedState:
    """Restore the state that an earlier call saved, if it did the same work.

    Args:
        run: A new run.
        state_path: File of the state; None saves none. Only the first process uses it.
        fingerprint: What identifies the work.

    Returns:
        Where the state is saved from now on.
    """
    saved = SavedState(state_path if distributed.is_first() else None, fingerprint)
    with saved.refuse_malformed():
        run.restore(distributed.from_first(saved.load))
    return saved


def run_epochs(
    run: StepwiseRun,
    saved: SavedState,
    on_progress: Progress | None,
    on_epoch: OnEpoch | None,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Take the remaining steps of a run and save its state from time to time.

    Args:
        run: A new or resumed run.
        saved: Where the state is saved: when due, and after every epoch.
        on_progress: Receives (steps done, all steps, figures).
        on_epoch: Receives the figures of each epoch, after its state is saved.
        after_epoch: Called after the state of an epoch is saved, and once before the first step,
            since the run may have been killed between the two.

    Raises:
        Diverged: If a loss is not finite; names the layer. The last saved state is kept.
    """
    after_epoch()
    while len(run.history) < run.epochs:
        try:
            with held_signals() if distributed.world() > 1 else contextlib.nullcontext():
                _take_epoch_steps(run, saved, on_progress)
        except KeyboardInterrupt:
            saved.save_if_whole(run.state)
            raise
        entry = {
            "epoch": len(run.history) + 1,
            "loss": float(run.loss_sum) / run.steps_per_epoch,
        }
        run.end_epoch(entry)
        run.history.append(entry)
        run.loss_sum = torch.zeros_like(run.loss_sum)
        saved.save(run.state())
        if on_epoch:
            on_epoch(dict(entry))
        after_epoch()


def _take_epoch_steps(run: StepwiseRun, saved: SavedState, on_progress: Progress | None) -> None:
    """Take the remaining steps of an epoch; none if the run was stopped at its end."""
    total, epoch = run.epochs * run.steps_per_epoch, len(run.history)
    for x, y, _ in run.batches(epoch, run.step - epoch * run.steps_per_epoch):
        x = x.contiguous(memory_format=torch.channels_last)
        key = ("layers", run.seed, run.step, distributed.rank())
        with saved.changing(), keyed_random_state(x.device, *key):
            run.loss_sum += run.take_step(x, y)
            run.step += 1
        end_together()
        ends_epoch = run.step % run.steps_per_epoch == 0
        save = saved.due() and not ends_epoch
        if save or ends_epoch:
            _check_state(run, x)
        if on_progress:
            on_progress(run.step, total, _progress_figures(run))
        if save:
            saved.save(run.state())


def check_step_loss(run: StepwiseRun, loss: Tensor, x: Tensor) -> None:
    """Raise Diverged if the loss of a step is not finite, before the step updates anything.

    On a GPU, where reading every loss would stall the device, this does nothing; `run_epochs`
    checks the sum of the losses from time to time.
    """
    if loss.device.type == "cpu" and not math.isfinite(float(loss.detach())):
        raise _diverged(run, float(loss.detach()), _first_non_finite_module(run, x))


def _check_state(run: StepwiseRun, x: Tensor) -> None:
    loss, layer = float(run.loss_sum), run.find_non_finite_layer()
    if not math.isfinite(loss) or layer is not None:
        raise _diverged(run, loss, layer or _first_non_finite_module(run, x))


def _diverged(run: StepwiseRun, loss: float, layer: str | None) -> Diverged:
    where = f"first in layer {layer}" if layer else "though the output of every layer is finite"
    return Diverged(
        f"{run.verb}: the loss became {loss} at step {run.step}, {where}; "
        "the last saved state is kept; try a smaller lr"
    )


@torch.no_grad()
def _first_non_finite_module(run: StepwiseRun, x: Tensor) -> str | None:
    """Return the name of the first module whose output holds NaN or infinity, or None."""
    broken: list[str] = []

    def record_if_broken(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            broken.append(name)

    probe = copy_network(run.model)
    set_mode(probe, training=True)
    for name, module in probe.named_modules():
        if not list(module.children()):
            module.register_forward_hook(partial(record_if_broken, name))
    with autocast(x.device, run.precision):
        probe(x)
    return broken[0] if broken else None


def _progress_figures(run: StepwiseRun) -> str:
    """Return the loss of the epoch so far and the last figures on val, every few steps."""
    if run.step % STEPS_BETWEEN_FIGURES and run.step % run.steps_per_epoch:
        return ""
    epoch, done = divmod(run.step - 1, run.steps_per_epoch)
    text = f"epoch {epoch + 1} loss {float(run.loss_sum) / (done + 1):.3f}"
    latest = run.history[-1] if run.history else {}
    if "robust_accuracy" in latest:
        text += f" val robust {latest['robust_accuracy']:.1%}"
    if "val_loss" in latest:
        text += f" val loss {latest['val_loss']:.3f}"
    return text
