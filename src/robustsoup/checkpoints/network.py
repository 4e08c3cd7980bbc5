"""Determine the network of checkpoints: named by the user, else recorded in a checkpoint."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from robustsoup.catalog import DATA_SOURCES
from robustsoup.checkpoints.checkpoint import NAME_THE_NETWORK, Checkpoint, CheckpointLike
from robustsoup.checkpoints.fitting import network_tensors
from robustsoup.checkpoints.opening import Opening
from robustsoup.data import Data
from robustsoup.errors import ModelError
from robustsoup.models import (
    NetworkSettings,
    build_known_skeleton,
    build_network,
    default_image_size,
    input_settings,
)
from robustsoup.models.network import channel_constants

_AS_THEY_ARE = Opening()


def resolve_network(
    spec: str | None,
    *,
    normalize: Sequence[Sequence[float]] | None,
    data: Data,
    checkpoints: Sequence[CheckpointLike] = (),
    opening: Opening = _AS_THEY_ARE,
) -> NetworkSettings:
    """Return the settings of the network.

    Args:
        spec: The network that the user names; it takes precedence over the files.
        normalize: (mean, std) that the user names; it overrides a recorded one.
        data: Supplies the number of classes and channels for `spec`; the first checkpoint may have
            more classes than the labels of the data tell.
        checkpoints: Opened in order until one records its network; only if `spec` is None.
        opening: How they are opened.

    Raises:
        ModelError: Neither the user nor a file names the network, or `normalize` is not
            (mean, std).
        CheckpointError: A file cannot be read.
    """
    constants = channel_constants(normalize)
    if spec:
        named = NetworkSettings(spec, data.test.classes, data.record["channels"], constants)
        if not data.test.inferred or not checkpoints:
            return named
        in_file = infer_sizes(named, opening.open(checkpoints[0])).classes
        return replace(named, classes=max(named.classes, in_file))
    for item in checkpoints:
        if recorded := opening.open(item).network_settings:
            return replace(recorded, normalize=constants) if constants else recorded
    if not checkpoints:
        raise ModelError(f"no network is named; {NAME_THE_NETWORK}")
    first = checkpoints[0]
    where = first.name if isinstance(first, Checkpoint) else os.fspath(first)
    raise ModelError(f"{where}: does not record its network; {NAME_THE_NETWORK}")


def choose_image_size(
    data: str,
    model: str | None,
    checkpoints: Sequence[CheckpointLike] = (),
    opening: Opening = _AS_THEY_ARE,
) -> int | None:
    """Return the side in pixels to which image files are resized if the user names none.

    The size that the configuration of the named network names comes first; then the size that the
    first checkpoint with a record was trained at. Images that have a size of their own (hf: and
    wds:) keep it, unless the configuration of the recorded network names one.

    Args:
        data: The data, as `load_data` takes it.
        model: The network that the user names, or None.
        checkpoints: Opened in order until one records a size or such a network.
        opening: How they are opened.

    Returns:
        The side; None for the default of the source.

    Raises:
        CheckpointError: A file cannot be read.
        ModelError: A file names a network that is not built in, or whose library is missing.
    """
    source = data.partition(":")[0]
    entry = DATA_SOURCES.get(source)
    if entry is None or not entry.facts.get("decodes"):
        return None
    if (side := default_image_size(data, model)) is not None:
        return side
    for item in checkpoints:
        checkpoint = opening.open(item)
        settings = None if model else checkpoint.network_settings
        side = default_image_size(data, settings.spec if settings else None)
        recorded = _recorded_size(checkpoint)
        decides = side is not None or source == "folder"
        if decides and recorded and recorded[0] == recorded[1]:
            return recorded[0]
        if side is not None:
            return side
    return None


def describe_other_sizes(checkpoints: Iterable[Checkpoint], data: Data) -> Iterator[str]:
    """Yield a warning for each checkpoint that was trained on images of another size."""
    height, width = data.record["size"]
    for checkpoint in checkpoints:
        size = _recorded_size(checkpoint)
        if size is None or size == (height, width):
            continue
        name = checkpoint.path.name if checkpoint.path else checkpoint.name
        yield (
            f"{name}: was trained on images of {size[0]} x {size[1]} pixels, the data has "
            f"{height} x {width}; for image files, --image-size (image_size in a recipe) sets it"
        )


def describe_configuration(
    network: NetworkSettings, data: Data, checkpoints: Iterable[Checkpoint]
) -> Iterator[str]:
    """Yield warnings on what the configuration of the network says, or does not say.

    Args:
        network: The network that the user names, with the constants that the user names.
        data: The data.
        checkpoints: Checkpoints as they were read, which may record constants.
    """
    yield from _describe_class_order(network, data)
    yield from describe_missing_constants(network, checkpoints)


def _describe_class_order(network: NetworkSettings, data: Data) -> Iterator[str]:
    """Yield a warning if the network's configuration has the data's classes in another order."""
    names, in_data = input_settings(network).class_names, data.record["classes"]
    if list(names) != list(in_data) and sorted(names) == sorted(in_data):
        first = next(i for i in range(len(names)) if names[i] != in_data[i])
        yield (
            f"classes: the configuration of {network.spec} has the classes of the data in another "
            f'order (class {first} is "{names[first]}" there, "{in_data[first]}" in the data); '
            "accuracies are wrong unless your checkpoints were trained on the data's order"
        )


def describe_missing_constants(
    network: NetworkSettings, checkpoints: Iterable[Checkpoint]
) -> Iterator[str]:
    """Yield a warning if nothing says whether the inputs of a checkpoint's network are normalised.

    Args:
        network: The network that the user names, with the constants that the user names.
        checkpoints: Checkpoints as they were read, which may record constants.
    """
    doubt = "" if network.normalize else input_settings(network).doubt
    records = (item.provenance.get("network") or {} for item in checkpoints if doubt)
    if not all(record.get("normalize") for record in records):
        yield doubt


def _recorded_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return (height, width) of the images that a checkpoint was fitted on last, if recorded."""
    size = (checkpoint.provenance.get("data") or {}).get("size")
    if not isinstance(size, list) or len(size) != 2:
        return None
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
        return None
    return size[0], size[1]


def record_network(
    checkpoint: Checkpoint,
    settings: NetworkSettings,
    *,
    named: bool = False,
    constants_named: bool = False,
) -> Checkpoint:
    """Return the checkpoint with a record of its network and its parameters.

    Args:
        checkpoint: A checkpoint with or without a recorded network.
        settings: The settings of the network.
        named: Whether the user named the network: `settings` then replace what the file records,
            except that constants of the record stay if `settings` have none. Otherwise they are
            used only if the checkpoint records no network.
        constants_named: Whether the user named `settings.normalize`, which then replaces the
            constants that the file records.

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
    elif constants_named:
        checkpoint = checkpoint.with_network(normalize=settings.normalize)
    if is_fitted([checkpoint]):
        return checkpoint
    return checkpoint.with_parameters_of(checkpoint.network())


def is_fitted(checkpoints: Sequence[Checkpoint]) -> bool:
    """Return whether checkpoints record their parameters, under the names of the first's network.

    A record may speak of other names: a soup is written under those of its ingredients' files.

    Raises:
        ModelError: They record their parameters, but the first names no network, or one that
            cannot be built.
    """
    if not all("parameters" in item.provenance for item in checkpoints):
        return False
    model = checkpoints[0].network_for_names()
    return all(item.has_names_of(model) for item in checkpoints)


def infer_sizes(settings: NetworkSettings, checkpoint: Checkpoint) -> NetworkSettings:
    """Return settings with the numbers of classes and channels that a checkpoint has.

    A network whose tensors do not depend on a number in the settings has its own: the rows of its
    last parameter are its classes, and its first convolution takes its channels.

    Args:
        settings: The network, with any numbers.
        checkpoint: Weights of the network. Tensors that differ from it in the first dimension
            tell the number of classes, those that differ in the second the number of channels.

    Raises:
        ModelError: The network cannot be built.
    """
    model = build_network(settings)
    expected = network_tensors(model)
    tensors = checkpoint.with_names_of(model).tensors
    more = replace(settings, classes=settings.classes + 1, channels=settings.channels + 1)
    try:
        dependent = _find_sizes(expected, _shape_tensors(replace(more, normalize=None)), settings)
    except ModelError:  # the network takes no other numbers
        dependent = more
    sizes = _find_sizes(expected, tensors, settings)
    parameters = list(model.parameters())
    if dependent.classes == settings.classes:
        rows = [len(parameter) for parameter in parameters if parameter.dim()]
        sizes = replace(sizes, classes=rows[-1] if rows else sizes.classes)
    if dependent.channels == settings.channels:
        inputs = [parameter.shape[1] for parameter in parameters if parameter.dim() == 4]
        sizes = replace(sizes, channels=inputs[0] if inputs else sizes.channels)
    return sizes


def _shape_tensors(settings: NetworkSettings) -> dict[str, Tensor]:
    """Return the tensors of a network, without values if possible."""
    skeleton = build_known_skeleton(settings)
    return network_tensors(build_network(settings) if skeleton is None else skeleton)


def _find_sizes(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], settings: NetworkSettings
) -> NetworkSettings:
    """Return settings with the sizes by which tensors differ from those of `settings`."""
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
