"""learn and learn_dial: adversarial learned soups, one softmax over the ingredients per layer."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.provenance import check_same_split
from robustsoup.data import Split
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import RequestError
from robustsoup.fingerprint import network_fingerprint
from robustsoup.progress import Progress, SavedState
from robustsoup.settings import DialSettings, LearnSettings, accepts_settings, make_settings
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.ingredients import choose_place
from robustsoup.soups.learning_run import LearningInputs, LearningRun
from robustsoup.soups.mixing import check_buffer_policy, open_ingredients
from robustsoup.training.loop import run_epochs
from robustsoup.training.objectives import Objective
from robustsoup.training.schedules import check_schedule
from robustsoup.training.train import check_early_stop


@accepts_settings(LearnSettings, omit=["dial"])
def learn(
    ingredients: Sequence[Checkpoint | str | os.PathLike[str]],
    data: Split,
    settings: LearnSettings | None = None,
    *,
    val: Split | None = None,
    base: Checkpoint | str | os.PathLike[str] | None = None,
    network: nn.Module | None = None,
    place: str = "auto",
    budget: float | None = None,
    allow_leakage: bool = False,
    device: str | torch.device = "auto",
    state_path: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    **changes: Any,
) -> Coefficients:
    """Train coefficients for the ingredients adversarially, one softmax for each layer.

    Each step mixes the layers that changed into one ordinary network, attacks it in eval mode, and
    takes one train-mode pass; dL/dalpha = <dL/dtheta_layer, theta_i,layer>, so no autograd graph
    ever holds n networks.

    Args:
        ingredients: n checkpoints or paths of one network; paths are opened, not loaded.
        data: The training split, augmented as its data set says.
        settings: How to learn; see LearnSettings.
        val: Split to measure the objective on after every epoch; required by early_stop.
        base: Checkpoint for the buffer policy "base", as in `mix`.
        network: The network to run, if the ingredients do not record theirs; not changed.
        place: Where the ingredients are kept: "auto", "device", "memory" or "files".
        budget: For "auto": keep them on the device if they take at most this many GiB.
        allow_leakage: Accept ingredients that were trained on another split of the data.
        device: "auto", "cpu", "cuda" or a device.
        state_path: File for the state of the run, from which a killed run resumes.
        on_progress: Receives (steps done, all steps, figures).
        **changes: Single settings by name, which override those of `settings`.

    Returns:
        Coefficients with the BatchNorm statistics of the last epoch (or the best, with early_stop);
        `mix` takes them with buffers="tracked".

    Raises:
        IngredientMismatch: If the ingredients do not share names, shapes and dtypes.
        ModelError: If the network does not fit the data.
        RequestError: If a setting is unknown or out of range.
        LeakageError: If an ingredient was trained on another split, unless allow_leakage.
        CheckpointError: If a file is lost during the run.
        Diverged: If a loss or a gradient is not finite.

    Source: Huang, Adversarial Learned Soups, section 3; the inner product: Li et al., MEHL-Soup,
        ECCV 2024.
    """
    settings = make_settings(LearnSettings, settings, changes)
    if settings.dial is not None:
        raise RequestError("dial: learn returns one soup; call learn_dial")
    check_early_stop(settings.early_stop, val)
    where = resolve_device(device)
    settings = _complete_settings(settings, data, where)
    opened = _open_for_learning(ingredients, network, data, allow_leakage=allow_leakage)
    kept = choose_place(place, budget, opened, where)
    inputs = LearningInputs(opened, data, val, network, base, kept, where)
    run = LearningRun(inputs, settings)
    _finish_run(run, state_path, on_progress)
    return run.coefficients()


@accepts_settings(LearnSettings, omit=["objective", "early_stop", "dial"])
def learn_dial(
    ingredients: Sequence[Checkpoint | str | os.PathLike[str]],
    data: Split,
    settings: LearnSettings | None = None,
    *,
    by: str | None = None,
    turn_every: int | None = None,
    base: Checkpoint | str | os.PathLike[str] | None = None,
    network: nn.Module | None = None,
    place: str = "auto",
    budget: float | None = None,
    allow_leakage: bool = False,
    device: str | torch.device = "auto",
    state_path: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    **changes: Any,
) -> Dial:
    """Learn a whole line of soups at once: logits(t) = a + b * (2t - 1) for each layer.

    t runs from 0 (robust) to 1 (clean). Every `turn_every` steps t is drawn uniformly and every
    layer is mixed again. The line starts with a as `init` says and b = 0.

    Args:
        ingredients: As in `learn`, and so are all arguments that are not listed here.
        data: The training split.
        settings: How to learn. Its objective and early_stop are not used by a dial.
        by: "objective": t is the weight of the clean loss, t L(clean) + (1 - t) L(attacked); "eps":
            the radius of the attack is (1 - t) eps. By default that of `settings`, else
            "objective".
        turn_every: Steps between two draws of t; by default that of `settings`, else 4.
        base: As in `learn`.
        network: As in `learn`.
        place: As in `learn`.
        budget: As in `learn`.
        allow_leakage: As in `learn`.
        device: As in `learn`.
        state_path: As in `learn`.
        on_progress: As in `learn`.
        **changes: Single settings by name, which override those of `settings`.

    Returns:
        The dial; `Dial.at(t)` returns ordinary coefficients.

    Raises:
        RequestError: For a clean threat, an objective or early_stop; else as `learn`.
    """
    settings = make_settings(LearnSettings, settings, changes)
    turning = {"by": by, "turn_every": turn_every}
    dial = make_settings(
        DialSettings, settings.dial, {k: v for k, v in turning.items() if v is not None}
    )
    settings = replace(settings, dial=dial)
    _check_dial(settings)
    where = resolve_device(device)
    settings = _complete_settings(settings, data, where)
    opened = _open_for_learning(ingredients, network, data, allow_leakage=allow_leakage)
    kept = choose_place(place, budget, opened, where)
    inputs = LearningInputs(opened, data, None, network, base, kept, where)
    run = LearningRun(inputs, settings)
    _finish_run(run, state_path, on_progress)
    return run.dial()


def _check_dial(settings: LearnSettings) -> None:
    if settings.threat.is_clean:
        raise RequestError("threat: a dial runs from robust to clean; got clean, expected a threat")
    if str(settings.objective) != "ce":
        raise RequestError(f"objective: got {settings.objective}, expected none for a dial")
    if settings.early_stop is not None:
        raise RequestError("early_stop: a dial has no single soup to measure; leave it out")


def _complete_settings(settings: LearnSettings, data: Split, device: torch.device) -> LearnSettings:
    """Check what the settings alone cannot, parse the objective and resolve the precision."""
    check_schedule(settings.schedule)
    check_buffer_policy(settings.buffers, data, settings.threat)
    return replace(
        settings,
        objective=Objective.parse(settings.objective),
        precision=resolve_precision(settings.precision, device),
    )


def _open_for_learning(
    ingredients: Sequence[Checkpoint | str | os.PathLike[str]],
    network: nn.Module | None,
    data: Split,
    *,
    allow_leakage: bool,
) -> list[Checkpoint]:
    opened = open_ingredients(ingredients, network)
    check_same_split(opened, data, allow=allow_leakage)
    return opened


def _finish_run(
    run: LearningRun, state_path: str | os.PathLike[str] | None, on_progress: Progress | None
) -> None:
    """Resume the run from its saved state, if there is one, and take the remaining steps."""
    val = run.inputs.val
    work = [run.record, run.digests, run.inputs.data.digest, val and val.digest]
    work += [network_fingerprint(run.model), run.objective.fingerprint]
    saved = SavedState(state_path, json.dumps(work, sort_keys=True))
    run.restore(saved.load())
    run_epochs(run, saved, on_progress)
