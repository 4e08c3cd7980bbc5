"""Learn soups and dials adversarially: for each layer, the weights of the ingredients."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from robustsoup.catalog import BUFFER_POLICIES
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.checkpoints.provenance import check_same_split
from robustsoup.data import Split, SplitLike, as_optional_split, as_split
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import RequestError
from robustsoup.fingerprint import entry_fingerprint
from robustsoup.gradients import gradients_enabled
from robustsoup.models import network_fingerprint
from robustsoup.progress import Progress
from robustsoup.settings import DialSettings, LearnSettings, accepts_settings, make_settings
from robustsoup.soups.coefficients import Coefficients, Dial
from robustsoup.soups.granularity import layer_groups
from robustsoup.soups.ingredients import choose_place
from robustsoup.soups.learning_run import LearningInputs, LearningRun
from robustsoup.soups.mixing import check_buffer_policy, open_ingredients
from robustsoup.tracking import OnEpoch
from robustsoup.training.loop import resume, run_epochs
from robustsoup.training.objectives import Objective
from robustsoup.training.recomputation import check_recomputation
from robustsoup.training.schedules import check_schedule
from robustsoup.training.sharing import check_same_training
from robustsoup.training.train import check_early_stop
from robustsoup.training.transforms import (
    augmentation_fingerprint,
    take_transform,
    transform_fingerprint,
)


@accepts_settings(LearnSettings, omit=["dial"])
@gradients_enabled()
def learn(
    ingredients: Sequence[CheckpointLike],
    data: SplitLike,
    settings: LearnSettings | None = None,
    *,
    val: SplitLike | None = None,
    base: CheckpointLike | None = None,
    network: nn.Module | None = None,
    place: str = "auto",
    budget: float | None = None,
    allow_leakage: bool = False,
    device: str | torch.device = "auto",
    state_path: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
    **changes: Any,
) -> Coefficients:
    """Train coefficients for the ingredients adversarially, one row of weights for each layer.

    Each step mixes the layers that changed into one ordinary network, attacks it in eval mode, and
    takes one train-mode pass; dL/dalpha = <dL/dtheta_layer, theta_i,layer>, so no autograd graph
    ever holds n networks.

    Args:
        ingredients: n checkpoints or paths of one network; paths are opened, not loaded.
        data: The training split, augmented as its data set specifies.
        settings: Learning settings; LearnSettings() if None.
        val: Split to measure the objective on after every epoch; required by early_stop.
        base: Checkpoint for the buffer policy "base", as in `mix`.
        network: The network to run, if the ingredients do not record theirs; not changed.
        place: Where the ingredients are stored: "auto", "device", "memory" or "files".
        budget: GiB; with "auto", ingredients of at most this size are stored on the device.
        allow_leakage: Accept ingredients that were trained on another split of the data.
        device: "auto", "cpu", "cuda" or a device.
        state_path: File for the state of the run; an interrupted run resumes from it.
        on_progress: Called with (steps done, total steps, figures).
        on_epoch: Called with the figures of each epoch as a dictionary; see `track`.
        **changes: Fields of LearnSettings, which override those of `settings`.

    Returns:
        Coefficients with the BatchNorm statistics of the last epoch (or the best, with early_stop);
        `mix` takes them with buffers="tracked".

    Raises:
        IngredientMismatch: If the ingredients do not share names, shapes and dtypes.
        ModelError: If the network does not fit the data.
        RequestError: If a setting is unknown or out of range.
        LeakageError: If an ingredient was trained on another split, unless allow_leakage.
        CheckpointError: If a file disappears or changes during the run.
        Diverged: If a loss or a gradient is not finite.

    Source: Huang, Adversarial Learned Soups, section 3; the inner product: Li et al., MEHL-Soup,
        ECCV 2024.
    """
    settings = make_settings(LearnSettings, settings, changes)
    data, val = as_split(data, "learn"), as_optional_split(val, "learn: val")
    if settings.dial is not None:
        raise RequestError("dial: learn returns one soup; call learn_dial")
    check_early_stop(settings.early_stop, val)
    resolved = resolve_device(device)
    data, settings = take_transform(data, settings)
    settings = _complete_settings(settings, data, resolved)
    opened = _open_for_learning(ingredients, network, data, allow_leakage=allow_leakage)
    settings.check_start(len(opened))
    stored_in = choose_place(place, budget, opened, resolved)
    inputs = LearningInputs(opened, data, val, network, base, stored_in, resolved)
    run = LearningRun(inputs, settings)
    _finish_run(run, state_path, on_progress, on_epoch)
    return run.coefficients()


@accepts_settings(LearnSettings, omit=["objective", "early_stop", "dial"])
@gradients_enabled()
def learn_dial(
    ingredients: Sequence[CheckpointLike],
    data: SplitLike,
    settings: LearnSettings | None = None,
    *,
    by: str | None = None,
    turn_every: int | None = None,
    base: CheckpointLike | None = None,
    network: nn.Module | None = None,
    place: str = "auto",
    budget: float | None = None,
    allow_leakage: bool = False,
    device: str | torch.device = "auto",
    state_path: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
    **changes: Any,
) -> Dial:
    """Learn a line of soups in one run: logits(t) = a + b (2t - 1) for each layer.

    t runs from 0 (robust) to 1 (clean). Every `turn_every` steps, t is drawn uniformly and all
    layers are mixed again. At the start, `init` determines a, and b = 0.

    Args:
        ingredients: As in `learn`.
        data: The training split.
        settings: Learning settings, without an objective and early_stop.
        by: "objective": t is the weight of the clean loss, t L(clean) + (1 - t) L(attacked); "eps":
            the radius of the attack is (1 - t) eps. By default as in `settings`, else "objective".
        turn_every: Steps between two draws of t; by default as in `settings`, else 4.
        base: As in `learn`.
        network: As in `learn`.
        place: As in `learn`.
        budget: As in `learn`.
        allow_leakage: As in `learn`.
        device: As in `learn`.
        state_path: As in `learn`.
        on_progress: As in `learn`.
        on_epoch: As in `learn`.
        **changes: Fields of LearnSettings, which override those of `settings`.

    Returns:
        The dial; `Dial.at(t)` returns ordinary coefficients.

    Raises:
        RequestError: For a clean threat, an objective or early_stop; else as `learn`.
    """
    settings = make_settings(LearnSettings, settings, changes)
    data = as_split(data, "learn_dial")
    dial_changes = {"by": by, "turn_every": turn_every}
    dial = make_settings(
        DialSettings, settings.dial, {k: v for k, v in dial_changes.items() if v is not None}
    )
    settings = replace(settings, dial=dial)
    _check_dial(settings)
    resolved = resolve_device(device)
    data, settings = take_transform(data, settings)
    settings = _complete_settings(settings, data, resolved)
    opened = _open_for_learning(ingredients, network, data, allow_leakage=allow_leakage)
    settings.check_start(len(opened))
    stored_in = choose_place(place, budget, opened, resolved)
    inputs = LearningInputs(opened, data, None, network, base, stored_in, resolved)
    run = LearningRun(inputs, settings)
    _finish_run(run, state_path, on_progress, on_epoch)
    return run.dial()


def check_learning(
    settings: LearnSettings, n: int, data: Split, *, val: Split, network: nn.Module
) -> None:
    """Check settings against all that they depend on, without learning.

    Args:
        settings: The settings of one soup or dial.
        n: Number of ingredients.
        data: The training split.
        val: The split that early stopping measures on.
        network: The network of the ingredients.

    Raises:
        RequestError: If a setting does not go with the others, the ingredients or the network.
        DataError: If `val` has fewer samples than early stopping measures.
        ModelError: If the network has too few blocks for `recompute_activations`.
    """
    settings.check_start(n)
    _complete_settings(take_transform(data, settings)[1], data, resolve_device("cpu"))
    if settings.early_stop is not None:
        val.first(settings.early_stop.samples)
    check_network(settings, network)


def check_network(settings: LearnSettings, network: nn.Module) -> None:
    """Check the settings that depend on the network.

    Raises:
        RequestError: If `granularity` is unknown, or its pattern matches no parameter.
        ModelError: If the network has too few blocks for `recompute_activations`.
    """
    layer_groups(network, settings.granularity)
    if settings.recompute_activations:
        check_recomputation(network)


def _check_dial(settings: LearnSettings) -> None:
    if settings.threat.is_clean:
        raise RequestError("threat: a dial runs from robust to clean; got clean, expected a threat")
    if str(settings.objective) != "ce":
        raise RequestError(f"objective: got {settings.objective}, expected none for a dial")
    if settings.early_stop is not None:
        raise RequestError("early_stop: a dial has no single soup to measure; leave it out")


def _complete_settings(settings: LearnSettings, data: Split, device: torch.device) -> LearnSettings:
    """Check settings that depend on the data, parse the objective and resolve the precision."""
    check_schedule(settings.schedule)
    check_buffer_policy(settings.buffers, data, settings.threat, affine=settings.affine)
    return replace(
        settings,
        objective=Objective.parse(settings.objective),
        precision=resolve_precision(settings.precision, device),
    )


def _open_for_learning(
    ingredients: Sequence[CheckpointLike],
    network: nn.Module | None,
    data: Split,
    *,
    allow_leakage: bool,
) -> list[Checkpoint]:
    opened = open_ingredients(ingredients, network)
    check_same_split(opened, data, allow=allow_leakage)
    return opened


def _finish_run(
    run: LearningRun,
    state_path: str | os.PathLike[str] | None,
    on_progress: Progress | None,
    on_epoch: OnEpoch | None,
) -> None:
    """Resume the run from its saved state, if any, and take the remaining steps."""
    data, val = run.inputs.data, run.inputs.val
    fingerprint = [run.record, run.digests, data.fingerprint, val and val.fingerprint]
    fingerprint += [network_fingerprint(run.model), run.objective.fingerprint]
    fingerprint += [entry_fingerprint(BUFFER_POLICIES, run.settings.buffers)]
    fingerprint += [transform_fingerprint(run.settings), *augmentation_fingerprint(run.data)]
    check_same_training(run.data, fingerprint, run.settings, run.inputs.device)
    saved = resume(run, state_path, json.dumps(fingerprint, sort_keys=True))
    run_epochs(run, saved, on_progress, on_epoch)
