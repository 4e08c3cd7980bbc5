"""Image classifiers of transformers, as "hf:FOLDER" or "hf:ORG/NAME".

A folder, or a repository of the hub, is read for `config.json` and `preprocessor_config.json`
alone. Weights are never read from it, and code in it never runs. A configuration may describe a
network of a bounded size, and nothing that transformers would fetch or run for it.
"""

import contextlib
import hashlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from robustsoup.documents import read_json
from robustsoup.errors import ModelError
from robustsoup.models.libraries import (
    DEEPEST_OPTION,
    InputSettings,
    Library,
    LibrarySpec,
    call_library,
    fit_constants,
    import_library,
    library_version,
    return_logits,
)
from robustsoup.models.network import MOST_WEIGHTS, NetworkSettings, set_file_names
from robustsoup.paths import user_path

IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's methods, by the number that an image processor's configuration holds."""
MOST_MODULES = 3_000
"""Largest number of modules of a network that a configuration describes, some times what published
networks have; as many are built in less than a second."""
MOST_ENTRIES = 50_000
"""Largest number of entries of an object in a configuration, such as names of classes."""
LARGEST_NUMBER = 1_000_000
"""Largest integer in a configuration: a size, a token or a class."""
_DEPTHS = re.compile("layers|depth")
_ATTENTION = ("eager", "sdpa")
"""Implementations of attention that PyTorch contains; other names can be those of code on a hub."""
_FETCHING_KEYS = (
    "architecture",
    "backbone",
    "quantization_config",
    "use_kernels",
    "use_pretrained_backbone",
    "use_timm_backbone",
)
"""Keys that make transformers load other code, another configuration, or weights."""


def _import_transformers(network: LibrarySpec) -> ModuleType:
    return import_library("transformers", "hf", network)


def _find_file(network: LibrarySpec, name: str) -> Path | None:
    """Return a file of the folder, or of the hub's cache after a download; None if it has none.

    Raises:
        ModelError: There is neither such a folder nor such a repository, or no connection.
    """
    folder = user_path(network.name)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if network.name.count("/") != 1 or network.name.startswith((".", "/", "~")):
        raise network.refuse("there is no such folder, and a repository is named ORG/NAME")
    hub = import_library("huggingface_hub", "hf", network)
    try:
        return Path(hub.hf_hub_download(network.name, name))
    except hub.errors.EntryNotFoundError as error:
        if isinstance(error, hub.errors.LocalEntryNotFoundError):
            raise _refuse_hub(network, error) from None
        return None
    except Exception as error:  # what the hub's client raises depends on its HTTP library
        raise _refuse_hub(network, error) from None


def _refuse_hub(network: LibrarySpec, error: Exception) -> Exception:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return network.refuse(
        f"there is no such folder, and the hub does not give {network.name}: {line}"
    )


def _read_document(path: Path, network: LibrarySpec) -> dict[str, Any]:
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        raise network.refuse(f"{path.name}: {error}") from None
    if not isinstance(document, dict):
        raise network.refuse(f"{path.name}: got {type(document).__name__}, expected an object")
    return document


def _find_config(network: LibrarySpec) -> Path:
    path = _find_file(network, "config.json")
    if path is None:
        raise network.refuse("has no config.json, which describes a network of transformers")
    return path


def _check_description(document: object, network: LibrarySpec, key: str = "") -> None:
    """Check that a configuration holds no huge size, and asks for no code and no weights.

    Raises:
        ModelError: Names the first key that does.
    """
    if isinstance(document, dict):
        _check_names(document, network, key)
        for name, value in document.items():
            _check_description(value, network, key if "attn_implementation" in key else name)
    elif isinstance(document, list):
        for value in (*document, _count_layers(document, key)):
            _check_description(value, network, key)
    elif isinstance(document, str):
        if "attn_implementation" in key and document not in _ATTENTION:
            raise network.refuse(
                f'config.json: {key}: got "{document}", expected {" or ".join(_ATTENTION)}'
            )
    elif isinstance(document, (int, float)):
        most = DEEPEST_OPTION if _DEPTHS.search(key) else LARGEST_NUMBER
        if not abs(document) <= most:
            raise network.refuse(
                f"config.json: {key}: got {document:.9g}, expected at most {most:,}"
            )


def _check_names(entries: dict[str, object], network: LibrarySpec, key: str) -> None:
    """Check that an object holds not too many entries, and none that fetches something."""
    if len(entries) > MOST_ENTRIES:
        raise network.refuse(
            f"config.json: {f'{key}: ' if key else ''}got {len(entries):,} entries, "
            f"expected at most {MOST_ENTRIES:,}"
        )
    for name, value in entries.items():
        if name in _FETCHING_KEYS and value:
            raise network.refuse(
                f"config.json asks for {name}, which loads code or weights; "
                "a configuration may only describe a network"
            )


def _count_layers(stages: list[object], key: str) -> float:
    """Return the layers of all stages of a network; 0 if the key names something else."""
    is_depth = _DEPTHS.search(key) is not None
    return sum(size for size in stages if is_depth and isinstance(size, (int, float)))


@contextlib.contextmanager
def _limited_size(network: LibrarySpec) -> Iterator[None]:
    """Refuse a network with too many weights or modules while it is being built in the block.

    Raises:
        ModelError: There are too many.
    """
    weights = modules = 0

    def count_weights(_owner: nn.Module, _name: str, weight: nn.Parameter | None) -> None:
        nonlocal weights
        weights += 0 if weight is None else weight.numel()
        if weights > MOST_WEIGHTS:
            raise network.refuse(f"has more than {MOST_WEIGHTS:,} weights, the most that are built")

    def count_modules(_owner: nn.Module, _name: str, _module: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise network.refuse(f"has more than {MOST_MODULES:,} modules, the most that are built")

    with contextlib.ExitStack() as stack:
        for handle in (
            register_module_parameter_registration_hook(count_weights),
            register_module_module_registration_hook(count_modules),
        ):
            stack.callback(handle.remove)
        yield


def _read_config(network: LibrarySpec, settings: NetworkSettings) -> Any:
    """Return the network's configuration, with the classes and channels of the settings."""
    path = _find_config(network)
    document = _read_document(path, network)
    if "model_type" not in document:
        raise network.refuse(
            "config.json has no model_type, so it is not of transformers; "
            "name a network of timm as timm:NAME"
        )
    _check_description(document, network)
    transformers = _import_transformers(network)
    config = call_library(
        lambda: transformers.AutoConfig.from_pretrained(
            str(path.parent), trust_remote_code=False, local_files_only=True
        ),
        network,
    )
    changes: dict[str, object] = dict(network.options)
    if config.num_labels != settings.classes:
        changes = {"num_labels": settings.classes} | changes
    if getattr(config, "num_channels", settings.channels) != settings.channels:
        changes = {"num_channels": settings.channels} | changes
    for key, value in changes.items():
        if not hasattr(config, key):
            raise network.refuse(f"its configuration has no {key}")
        setattr(config, key, value)
    return config


def _build(network: LibrarySpec, settings: NetworkSettings) -> nn.Module:
    config = _read_config(network, settings)
    classifiers = _import_transformers(network).AutoModelForImageClassification

    def build() -> nn.Module:
        with _limited_size(network):
            model: nn.Module = classifiers.from_config(config, trust_remote_code=False)
            return model.float()  # whatever type the configuration names

    with torch.device("meta"):  # first without memory, where the network allows it
        try:
            build()
        except ModelError:
            raise
        except Exception:  # such as a network that reads the values of its tensors
            pass
    model = call_library(build, network)
    set_file_names(model, call_library(lambda: _find_file_names(model), network))
    return return_logits(model)


def _find_file_names(model: nn.Module) -> dict[str, str]:
    """Return the name in files for each name in the network; empty if they are the same.

    Since version 5, save_pretrained gives many tensors the names of earlier versions.
    """
    try:
        loading = importlib.import_module("transformers.core_model_loading")
    except ImportError:
        return {}
    tensors = model.state_dict()
    own_names = {id(tensor): name for name, tensor in tensors.items()}
    saved = loading.revert_weight_conversion(model, tensors)
    if {id(tensor) for tensor in saved.values()} != set(own_names):
        return {}  # a conversion that is more than a new name
    return {own_names[id(tensor)]: name for name, tensor in saved.items()}


def _read_inputs(network: LibrarySpec, settings: NetworkSettings) -> InputSettings:
    config = _read_config(network, settings)
    processor = _read_processor(network)
    _refuse_swapped_channels(processor, network)
    size = size_of_config = _read_size(getattr(config, "image_size", None))
    if "image_size" not in network.options:  # many networks do not read that of their class
        crops = processor.get("do_center_crop")
        size = _read_size(processor.get("crop_size" if crops else "size")) or size_of_config
    labels = [str(config.id2label[number]) for number in sorted(config.id2label)]
    automatic = labels == [f"LABEL_{number}" for number in range(len(labels))]
    resample = processor.get("resample")
    known = isinstance(resample, int) and 0 <= resample < len(INTERPOLATIONS)
    doubt = (
        f"{network.name} has no {IMAGE_PROCESSORS[0]}, so inputs are not normalised; if they were "
        "in training, give --normalize (normalize in a recipe)"
    )
    return InputSettings(
        size,
        call_library(lambda: _read_constants(processor, settings.channels), network),
        INTERPOLATIONS[resample] if known else None,
        () if automatic else tuple(labels),
        "" if processor else doubt,
    )


def _read_processor(network: LibrarySpec) -> dict[str, Any]:
    """Return the configuration of the image processor; empty if there is none."""
    for name in IMAGE_PROCESSORS:
        if (path := _find_file(network, name)) is not None:
            processor: dict[str, Any] = _read_document(path, network)
            return processor.get("image_processor", processor)
    return {}


def _kind_of(processor: dict[str, Any]) -> str:
    """Return the class of an image processor, under the key of this or of earlier versions."""
    return str(processor.get("image_processor_type") or processor.get("feature_extractor_type"))


def _refuse_swapped_channels(processor: dict[str, Any], network: LibrarySpec) -> None:
    """Refuse a network whose image processor turns RGB into BGR.

    Raises:
        ModelError: It does.
    """
    kind = _kind_of(processor)
    swaps = processor.get("do_flip_channel_order", kind.startswith("MobileViT"))
    if swaps or kind.startswith("PPLCNet"):
        raise network.refuse(
            "its image processor swaps red and blue; give a function of your own that does"
        )


def _read_size(value: object) -> tuple[int, int] | None:
    """Read 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(value, dict):
        side = value.get("shortest_edge")
        value = [value.get("height", side), value.get("width", side)]
    if isinstance(value, int):
        value = [value, value]
    if isinstance(value, (list, tuple)) and len(value) == 2:
        height, width = value
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return None


def _read_constants(processor: dict[str, Any], channels: int) -> Any:
    """Return the constants for images in [0, 1] that do what the image processor does.

    Of images x in [0, 1], the processor computes (255 x rescale_factor - offset - mean) / std. With
    include_top, as EfficientNet's has it, the result is divided by std once more.
    """
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    scale, offset = 255 * factor, float(bool(processor.get("rescale_offset")))
    normalizes = processor.get("do_normalize", "image_mean" in processor)
    if _kind_of(processor).startswith("MobileViT"):  # names constants, but does not use them
        normalizes = False
    divisions = bool(normalizes) + bool(processor.get("include_top"))
    stds = processor["image_std"] if divisions else [1.0] * channels
    std = [value**divisions for value in stds]
    mean = processor["image_mean"] if normalizes else [0.0] * len(std)
    return fit_constants(
        [round((value + offset) / scale, 12) for value in mean],
        [round(value / scale, 12) for value in std],
        channels,
    )


def _fingerprint(network: LibrarySpec) -> str:
    digest = hashlib.sha256(_find_config(network).read_bytes()).hexdigest()
    return f"{library_version('transformers', 'hf', network)} {digest}"


TRANSFORMERS = Library(_build, _read_inputs, _fingerprint)
