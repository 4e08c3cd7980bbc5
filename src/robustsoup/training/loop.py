"""The loop over epochs and steps that training and learning share."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.device import autocast
from robustsoup.errors import Diverged
from robustsoup.progress import Progress, SavedState


def fit(
    run: Any,
    saved: SavedState,
    on_progress: Progress | None,
    after_epoch: Callable[[], None] | None = None,
) -> None:
    """Take a run's steps to the end, epoch by epoch, saving its state from time to time; training and learning alike.

    The run has `verb`, `model`, `settings`, `step`, `steps_per_epoch`, `loss_sum` and `history`, and batches(epoch, skip),
    take_step(x, y), end_epoch(entry), broken() (a layer that is not finite) and state(). after_epoch: called when the
    state at the end of an epoch is saved, and first of all, as a kill may have come in between.

    Raises Diverged, naming the layer, for a loss that is not finite; what was saved before it stays.
    """
    s, per_epoch = run.settings, run.steps_per_epoch
    total = s["epochs"] * per_epoch
    after_epoch = after_epoch or (lambda: None)
    after_epoch()
    while run.step < total:
        epoch, skip = divmod(run.step, per_epoch)
        for x, y, _ in run.batches(epoch, skip):
            x = x.contiguous(memory_format=torch.channels_last)
            run.loss_sum += run.take_step(x, y)
            run.step += 1
            save = saved.due() and run.step % per_epoch
            if save or run.step % per_epoch == 0:
                _check_finite(run, x)
            if on_progress:
                on_progress(run.step, total, _figures(run))
            if save:
                saved.save(run.state())
        entry = {"epoch": epoch + 1, "loss": float(run.loss_sum) / per_epoch}
        run.end_epoch(entry)
        run.history.append(entry)
        run.loss_sum = torch.zeros_like(run.loss_sum)
        saved.save(run.state())
        after_epoch()


def check_loss(run: Any, loss: Tensor, x: Tensor) -> None:
    """Raise Diverged, naming the first layer that is not finite, if the loss of a step is not; before anything is updated.

    Only on a CPU, as looking at every step makes a GPU wait: there `fit` looks now and then.
    """
    if loss.device.type == "cpu" and not math.isfinite(float(loss.detach())):
        raise _diverged(
            run, float(loss.detach()), _first_not_finite(run.model, x, run.settings["precision"])
        )


def _check_finite(run: Any, x: Tensor) -> None:
    loss, layer = float(run.loss_sum), run.broken()
    if not math.isfinite(loss) or layer is not None:
        raise _diverged(
            run, loss, layer or _first_not_finite(run.model, x, run.settings["precision"])
        )


def _diverged(run: Any, loss: float, layer: str) -> Diverged:
    return Diverged(
        f"{run.verb}: the loss became {loss} at step {run.step}, first in layer {layer}; "
        "what was saved before is kept; try a smaller lr"
    )


@torch.no_grad()
def _first_not_finite(model: nn.Module, x: Tensor, precision: str) -> str:
    """The first module of the forward pass that answers with NaN or infinity."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    probe = copy.deepcopy(model).train()
    for name, module in probe.named_modules():
        if not list(module.children()):
            module.register_forward_hook(watch(name))
    with autocast(x.device, precision):
        probe(x)
    return found[0] if found else "the loss itself"


def _figures(run: Any) -> str:
    """The loss so far and the last robust accuracy, now and then: reading them makes a GPU wait."""
    if run.step % 20 and run.step % run.steps_per_epoch:
        return ""
    done = run.step % run.steps_per_epoch or run.steps_per_epoch
    text = (
        f"epoch {(run.step - 1) // run.steps_per_epoch + 1} loss {float(run.loss_sum) / done:.3f}"
    )
    if run.history and "robust_accuracy" in run.history[-1]:
        text += f" val robust {run.history[-1]['robust_accuracy']:.1%}"
    if run.history and "val_loss" in run.history[-1]:
        text += f" val loss {run.history[-1]['val_loss']:.3f}"
    return text
