"""LoRA adapters, as peft saves them, merged into their base: W + scale * B A.

The mean of products is not the product of means, so adapters are merged before anything is mixed.

Source: Hu et al. 2021, arXiv:2106.09685; scale of rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from robustsoup.checkpoints.transfers import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from robustsoup.documents import read_json
from robustsoup.errors import CheckpointError
from robustsoup.schema import describe_value

UNDERSTOOD = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "bias"),
        *("modules_to_save", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        *("base_model_name_or_path", "revision"),
        # What has no effect on the merged weights:
        *("auto_mapping", "ensure_weight_tying", "exclude_modules", "inference_mode"),
        *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core"),
        *("peft_version", "qalora_group_size", "runtime_config", "target_modules", "task_type"),
    }
)
"""Entries of a configuration that may have any value; every other one must be empty or false."""
PLAIN_STARTS = (True, False, "gaussian")
"""Values of init_lora_weights that leave the base as it is."""

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")
_PATTERN = re.compile(r"\^?[\w.]+")
_PREFIXES = ("base_model.model.", "base_model.")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on this machine.

    Attributes:
        folder: Its folder.
        weights: The file of its factors.
        config: Its configuration, which was checked.
    """

    folder: Path
    weights: Path
    config: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """What the configuration names as the base: a path, or a repository of the hub."""
        base = self.config.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of B A for one module."""
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            name = pattern.removeprefix("^")
            if module == name or (name == pattern and module.endswith(f".{name}")):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def find_adapter(path: Path) -> Adapter | None:
    """Return the adapter in a folder, or of a file of factors beside its configuration.

    Raises:
        CheckpointError: There is one, and its configuration is not understood; or the folder cannot
            be read.
    """
    try:
        folder = path if path.is_dir() else path.parent
        if not (path.is_dir() or path.name in ADAPTER_WEIGHTS):
            return None
        if not (folder / ADAPTER_CONFIG).is_file():
            return None
        files = [folder / name for name in ADAPTER_WEIGHTS] if path.is_dir() else [path]
        weights = next((file for file in files if file.is_file()), None)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if weights is None:
        raise CheckpointError(f"{folder}: has {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS[0]}")
    return Adapter(folder, weights, _read_config(folder / ADAPTER_CONFIG))


def _read_config(path: Path) -> dict[str, Any]:
    """Read a configuration, and refuse what would give other weights than those merged here.

    Raises:
        CheckpointError: Names the first such entry.
    """
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(
            f"{path}: peft_type: got {describe_value(kind)}, expected LORA; merge the adapter with "
            "its own library (merge_and_unload of peft)"
        )
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise _refuse(path, "init_lora_weights", config["init_lora_weights"])
    for key, value in config.items():
        if key not in UNDERSTOOD and value not in (None, False, [], {}, ""):
            raise _refuse(path, key, value)
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        plain = isinstance(table, dict) and all(_PATTERN.fullmatch(name) for name in table)
        if not plain or not all(_is_positive(value) for value in table.values()):
            raise _refuse(path, key, table)
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise CheckpointError(
                f"{path}: {key}: got {describe_value(config.get(key))}, expected a number above 0"
            )
    return config


def _refuse(path: Path, key: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key}: got {describe_value(value)}, which robustsoup does not merge; merge the "
        "adapter with peft (merge_and_unload) and use the merged network"
    )


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def merge_adapter(
    adapter: Adapter,
    factors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    tied: Mapping[str, str],
) -> dict[str, Tensor]:
    """Return the tensors of the base with the adapter merged in.

    Products are computed in float32 and added in it; the result has the type of the base.

    Args:
        adapter: The adapter.
        factors: The tensors of its file.
        base: The tensors of the base, under the names of its modules, perhaps below a prefix.
        tied: The other name of each tensor of the base that has two.

    Raises:
        CheckpointError: A tensor is not understood, does not fit the base, or has two names there.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for full_name, tensor in factors.items():
        name = _strip_prefix(full_name)
        found = _FACTOR.fullmatch(name)
        if found is not None:
            kind = "embedding" if found[2] else "linear"
            pairs.setdefault(found[1], {})[f"{kind} {found[3]}"] = tensor
        elif re.search(r"(^|\.)lora_", name):
            raise CheckpointError(f"{adapter.weights}: {full_name} is not understood")
        else:
            replaced[re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)] = tensor
    if not pairs:
        raise CheckpointError(f"{adapter.weights}: holds no factors lora_A and lora_B")
    prefix = _find_prefix([f"{module}.weight" for module in pairs], base, adapter)
    merged = dict(base)
    for module, pair in pairs.items():
        name = f"{prefix}{module}.weight"
        weight = merged[name]
        _refuse_tied(adapter, name, tied)
        _refuse_quantized(adapter, name, weight)
        delta = _multiply(adapter, module, pair, weight)
        merged[name] = (weight.float() + delta).to(weight.dtype)
    for name, tensor in replaced.items():
        _refuse_tied(adapter, prefix + name, tied)
        merged[prefix + name] = _check_replaced(adapter, prefix + name, tensor, base)
    return merged


def _refuse_tied(adapter: Adapter, name: str, tied: Mapping[str, str]) -> None:
    """Refuse to change a weight under one of its two names: the network would keep the other.

    Raises:
        CheckpointError: Names both.
    """
    names = next((names for names in tied.items() if name in names), None)
    if names is not None:
        raise CheckpointError(
            f"{adapter.folder}: changes {name}, but {names[0]} and {names[1]} are one weight in "
            "the base; merge the adapter with peft (merge_and_unload) and use the merged network"
        )


def _refuse_quantized(adapter: Adapter, name: str, weight: Tensor) -> None:
    """Refuse a weight of the base that is no float of 16 bits or more.

    Raises:
        CheckpointError: Names the weight.
    """
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise CheckpointError(
            f"{adapter.folder}: {name} is {str(weight.dtype).removeprefix('torch.')} in the base; "
            "if the base is quantized, give the weights from before quantization (--adapter-base)"
        )


def _strip_prefix(name: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _find_prefix(targets: list[str], base: Mapping[str, Tensor], adapter: Adapter) -> str:
    """Return what the names of the base have before those of the adapter.

    Raises:
        CheckpointError: Names the first target that the base lacks under every prefix.
    """
    ends = (name.removesuffix(targets[0]) for name in base if name.endswith(targets[0]))
    for prefix in sorted({end for end in ends if not end or end.endswith(".")}, key=len):
        if all(prefix + target in base for target in targets):
            return prefix
    missing = next((target for target in targets if target not in base), targets[0])
    raise CheckpointError(
        f"{adapter.folder}: adapts {missing}, which its base lacks; is the base right? Files of "
        "transformers 5 name some tensors otherwise than the network does; then merge the adapter "
        "with peft (merge_and_unload) and use the merged network"
    )


def _multiply(adapter: Adapter, module: str, pair: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Return scale * B A in the shape of a weight, in float32.

    Raises:
        CheckpointError: A factor is missing, or the shapes do not fit.
    """
    where = f"{adapter.weights}: {module}"
    embedding = "embedding A" in pair or "embedding B" in pair
    kind = "embedding" if embedding else "linear"
    if pair.keys() != {f"{kind} A", f"{kind} B"}:
        raise CheckpointError(f"{where}: expected one factor A and one factor B")
    if not all(factor.is_floating_point() for factor in pair.values()):
        raise CheckpointError(f"{where}: got integers, expected factors from before quantizing")
    a, b = pair[f"{kind} A"].float(), pair[f"{kind} B"].float()
    rank = a.shape[0] if a.dim() else 0
    ranks = {adapter.config["r"], *(adapter.config.get("rank_pattern") or {}).values()}
    shapes = f"factors of shapes {tuple(b.shape)} and {tuple(a.shape)}"
    if rank not in ranks or a.dim() < 2 or a.dim() != b.dim() or b.shape[1] != rank:
        raise CheckpointError(
            f"{where}: got {shapes}, expected rank {' or '.join(map(str, sorted(ranks)))}, and no "
            "convolution with groups"
        )
    product = (b.flatten(1) @ a.flatten(1)) * adapter.scale(module, rank)
    if embedding or (a.dim() == 2 and adapter.config.get("fan_in_fan_out")):
        product = product.T
    if product.numel() != weight.numel() or product.shape[0] != weight.shape[0]:
        raise CheckpointError(f"{where}: got {shapes} for a weight of shape {tuple(weight.shape)}")
    return product.reshape(weight.shape)


def _check_replaced(
    adapter: Adapter, name: str, tensor: Tensor, base: Mapping[str, Tensor]
) -> Tensor:
    """Return a tensor that the adapter holds in full, in the type of the base.

    A module of modules_to_save may have another shape than in the base, as a new head has.

    Raises:
        CheckpointError: The tensor belongs to no such module, and does not fit the base; or the
            base is quantized there.
    """
    if name in base and tensor.is_floating_point():
        _refuse_quantized(adapter, name, base[name])
    saved = adapter.config.get("modules_to_save") or []
    parts = name.split(".")
    if isinstance(saved, list) and any(_is_within(module, parts) for module in saved):
        return tensor.to(base[name].dtype) if name in base else tensor
    if name not in base or base[name].shape != tensor.shape:
        raise CheckpointError(
            f"{adapter.weights}: {name}: the base has no such tensor of shape "
            f"{tuple(tensor.shape)}, and modules_to_save does not name it"
        )
    return tensor.to(base[name].dtype)


def _is_within(module: object, parts: list[str]) -> bool:
    """Return whether the parts of a tensor's name hold those of a module."""
    wanted = str(module).split(".")
    starts = range(len(parts) - len(wanted))
    return any(parts[start : start + len(wanted)] == wanted for start in starts)


def find_base(adapter: Adapter) -> Path | None:
    """Return where on this machine the base is that a configuration names; None if it is not."""
    if adapter.base is None:
        return None
    places = (adapter.folder / adapter.base, Path(adapter.base))
    return next((path for path in places if path.exists()), None)
