"""Determine the network of checkpoints: named by the user, else recorded in a checkpoint."""

import os
from collections.abc import Sequence
from dataclasses import replace

from robustsoup.checkpoints.checkpoint import NAME_THE_NETWORK, Checkpoint
from robustsoup.checkpoints.fitting import network_tensors
from robustsoup.checkpoints.opening import Opening
from robustsoup.data import Data
from robustsoup.errors import ModelError
from robustsoup.models import NetworkSettings, build_network
from robustsoup.models.network import channel_constants

_AS_THEY_ARE = Opening()


def resolve_network(
    spec: str | None,
    *,
    normalize: Sequence[Sequence[float]] | None,
    data: Data,
    checkpoints: Sequence[Checkpoint | str | os.PathLike[str]] = (),
    opening: Opening = _AS_THEY_ARE,
) -> NetworkSettings:
    """Return the settings of the network.

    Args:
        spec: The network that the user names; it takes precedence over the files.
        normalize: (mean, std) that the user names; it overrides a recorded one.
        data: Supplies the number of classes and channels for `spec`.
        checkpoints: Opened in order until one records its network; only if `spec` is None.
        opening: How they are opened.

    Raises:
        ModelError: Neither the user nor a file names the network, or `normalize` is not
            (mean, std).
        CheckpointError: A file cannot be read.
    """
    constants = channel_constants(normalize)
    if spec:
        return NetworkSettings(spec, data.test.classes, data.record["channels"], constants)
    for item in checkpoints:
        if recorded := opening.open(item).network_settings:
            return replace(recorded, normalize=constants) if constants else recorded
    if not checkpoints:
        raise ModelError(f"no network is named; {NAME_THE_NETWORK}")
    first = checkpoints[0]
    where = first.name if isinstance(first, Checkpoint) else os.fspath(first)
    raise ModelError(f"{where}: the file does not record its network; {NAME_THE_NETWORK}")


def record_network(
    checkpoint: Checkpoint, settings: NetworkSettings, *, named: bool = False
) -> Checkpoint:
    """Return the checkpoint with a record of its network and its parameters.

    Args:
        checkpoint: A checkpoint with or without a recorded network.
        settings: The settings of the network.
        named: Whether the user named the network: `settings` then replace what the file records,
            except that constants of the record stay if `settings` have none. Otherwise they are
            used if the checkpoint records no network; if it does, only `normalize` is recorded,
            if it is set.

    Raises:
        ModelError: The weights do not fit the network, or the user did not name it and the file
            names one that is not built in.
    """
    if named or checkpoint.network_settings is None:
        checkpoint = checkpoint.with_network(
            settings.spec,
            classes=settings.classes,
            channels=settings.channels,
            normalize=settings.normalize,
        )
    elif settings.normalize:
        checkpoint = checkpoint.with_network(normalize=settings.normalize)
    if "parameters" in checkpoint.provenance:
        return checkpoint
    return checkpoint.with_parameters_of(checkpoint.network())


def infer_sizes(settings: NetworkSettings, checkpoint: Checkpoint) -> NetworkSettings:
    """Return settings with the numbers of classes and channels that a checkpoint has.

    Args:
        settings: The network, with any numbers.
        checkpoint: Weights of the network. Tensors that differ from it in the first dimension
            tell the number of classes, those that differ in the second the number of channels.

    Raises:
        ModelError: The network cannot be built.
    """
    model = build_network(settings)
    tensors = checkpoint.with_names_of(model).tensors
    expected = network_tensors(model)
    classes, channels = settings.classes, settings.channels
    for name in expected.keys() & tensors.keys():
        want, got = expected[name].shape, tensors[name].shape
        if len(want) != len(got) or want == got:
            continue
        if want[0] == settings.classes and want[1:] == got[1:]:
            classes = got[0]
        elif want[1:2] == (settings.channels,) and want[2:] == got[2:]:
            channels = got[1]
    return replace(settings, classes=classes, channels=channels)
