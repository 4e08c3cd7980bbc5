"""Checkpoints: weights and where they come from, in safetensors or in whatever a user's own script saved."""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustsoup.checkpoints.formats import (
    Wrapping,
    _copied,
    _mapped,
    _save_safetensors,
    _tensors_and_record,
)
from robustsoup.checkpoints.mapped import Source
from robustsoup.errors import CheckpointError, ModelError, RequestError
from robustsoup.files import atomic_path, write_torch
from robustsoup.models import NetworkSettings, build_network, network_settings_of
from robustsoup.models.network import channel_constants

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict")
_PREFIXES = ("module.", "model.", "0.")
NAME_THE_NETWORK = "set --model (model in a recipe), as in resnet9 or package.module:factory"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Checkpoint:
    """The state dict of one network under its own names, and a JSON-able record of its provenance.

    tensors: name -> tensor on the CPU. provenance: what made it; empty for a foreign file. Keys that the library reads:
    "network" {spec, classes, channels, normalize}, "parameters" [names], "tied" {alias: name}, "parents" [{digest,
    file}], "data" (the record of the data it was fitted on), "trained_on" [splits].
    path: where it was read; wrapping: how a foreign file held it; source: the file that the tensors still lie in (`open`).
    """

    tensors: Mapping[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    wrapping: "Wrapping | None" = None
    source: Source | None = None

    @classmethod
    def load(cls, path: "str | os.PathLike | Checkpoint") -> "Checkpoint":
        """Read .safetensors, or .pt/.pth/.bin with weights_only=True, taking off common wrappers and prefixes.

        Raises CheckpointError, naming the file, if it is missing, cut short, holds no tensors, or holds NaN or infinity.
        """
        return path if isinstance(path, Checkpoint) else _read(Path(path), mapped=False)

    @classmethod
    def open(cls, path: "str | os.PathLike | Checkpoint") -> "Checkpoint":
        """As `load`, but the tensors stay in the file: read-only views of it that cost no memory of the process.

        Call `check_source` before reading them later on; a file must not be overwritten in place while it is open.
        """
        return path if isinstance(path, Checkpoint) else _read(Path(path), mapped=True)

    def check_source(self) -> None:
        """Raise CheckpointError if the tensors lie in a file that is gone, cut short or changed since it was opened."""
        if self.source is not None:
            self.source.check()

    @classmethod
    def of(cls, model: "nn.Module", provenance: dict[str, Any] | None = None) -> "Checkpoint":
        """A copy of the weights of `model`; its parameters, tied parameters and, from load_model, network are recorded."""
        tensors = {
            name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()
        }
        record = {**(provenance or {}), **_parameters_of(model)}
        if (settings := network_settings_of(model)) is not None:
            record.setdefault("network", settings.as_record())
        return cls(tensors, record)

    @cached_property
    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of the tensors (hex); the file's own bytes play no part."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().contiguous().cpu()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    @property
    def parameters(self) -> list[str]:
        """Names of what is mixed: the recorded parameters, else every float tensor that is no running statistic."""
        if "parameters" in self.provenance:
            return list(self.provenance["parameters"])
        tied = self.tied
        return [
            name
            for name, tensor in self.tensors.items()
            if tensor.is_floating_point()
            and name.rpartition(".")[2] not in _STATISTICS
            and name not in tied
        ]

    @property
    def tied(self) -> dict[str, str]:
        """alias -> name for tensors that are one parameter under two names."""
        return dict(self.provenance.get("tied", {}))

    @property
    def network_settings(self) -> NetworkSettings | None:
        """How the network is built, if the record says so."""
        recorded = self.provenance.get("network") or {}
        if not recorded.get("spec"):
            return None
        return NetworkSettings.from_record(recorded, self.name)

    def network(
        self,
        spec: str | None = None,
        *,
        classes: int | None = None,
        channels: int | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> nn.Module:
        """Build the network with these weights, in eval mode, on the CPU.

        The arguments are those of `load_model`; each that is set overrides the record.

        Raises:
            ModelError: the record names no network and spec is None, or names or shapes of the
                tensors differ from those of the network (the first is named).
        """
        recorded = self.network_settings
        spec = spec or (recorded.spec if recorded else None)
        if spec is None:
            raise ModelError(
                f"{self.name}: the file does not record its network; {NAME_THE_NETWORK}"
            )
        settings = recorded or NetworkSettings(spec)
        settings = NetworkSettings(
            spec,
            settings.classes if classes is None else classes,
            settings.channels if channels is None else channels,
            channel_constants(normalize) or settings.normalize,
        )
        model = build_network(settings)
        self.load_into(model)
        return model.eval()

    def named_for(self, model: nn.Module) -> "Checkpoint":
        """The same weights with the part of a removed prefix put back that belongs to the names of `model`, if any does."""
        names = set(model.state_dict())
        if self.wrapping is None or _same_names(self.tensors, names):
            return self
        prefix = self.wrapping.prefix
        for start in [0, *(i + 1 for i, letter in enumerate(prefix[:-1]) if letter == ".")]:
            tail = prefix[start:]
            if tail and _same_names({tail + name for name in self.tensors}, names):
                tensors = {tail + name: tensor for name, tensor in self.tensors.items()}
                tied = {tail + alias: tail + name for alias, name in self.tied.items()}
                wrapping = replace(self.wrapping, prefix=prefix[:start])
                return replace(
                    self,
                    tensors=tensors,
                    provenance={**self.provenance, "tied": tied},
                    wrapping=wrapping,
                )
        return self

    def described_by(self, model: nn.Module) -> "Checkpoint":
        """`named_for`, with a record of which tensors are parameters and which of them are tied, if it has none."""
        item = self.named_for(model)
        if "parameters" in item.provenance or not _same_names(item.tensors, model.state_dict()):
            return item
        return item.with_provenance(**_parameters_of(model))

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into `model`, strictly; BatchNorm's counters, which old files lack, start at zero where they do.

        Raises ModelError naming the first name or shape that differs.
        """
        if (fitting := self.named_for(model)) is not self:
            return fitting.load_into(model)
        theirs = model.state_dict()
        if _same_names(self.tensors, theirs):
            theirs = {name: tensor for name, tensor in theirs.items() if name in self.tensors}
        for name in [*theirs, *self.tensors]:
            if name not in self.tensors or name not in theirs:
                where = (
                    "the network has it, the file does not"
                    if name in theirs
                    else "the file has it, the network does not"
                )
                raise ModelError(f"{self.name}: {name}: {where}; is --model right?")
            if theirs[name].shape != self.tensors[name].shape:
                got, expected = tuple(self.tensors[name].shape), tuple(theirs[name].shape)
                raise ModelError(
                    f"{self.name}: {name}: got shape {got}, the network expects {expected}"
                )
        counters = {
            name: torch.zeros_like(t)
            for name, t in model.state_dict().items()
            if name not in self.tensors
        }
        model.load_state_dict(counters | dict(self.tensors))

    @property
    def name(self) -> str:
        """What to call it in a message: its path, else the beginning of its digest."""
        return str(self.path) if self.path else f"checkpoint {self.digest[:12]}"

    def save(self, path: str | os.PathLike) -> Path:
        """Write to `path`, whole or not at all: .safetensors, or .pt/.pth/.bin in the wrapping it was read with.

        Raises StorageError where the file cannot be written, CheckpointError for another ending.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            with atomic_path(path) as temporary:
                tensors = {
                    name: tensor.detach().cpu().contiguous().clone()
                    for name, tensor in self.tensors.items()
                }
                _save_safetensors(tensors, temporary, self.provenance)
        elif path.suffix in (".pt", ".pth", ".bin"):
            content = (self.wrapping or Wrapping({}, None, "")).wrap(dict(self.tensors))
            write_torch(path, content)
        else:
            raise CheckpointError(
                f"{path}: got the ending {path.suffix!r}, expected .safetensors, .pt, .pth or .bin"
            )
        return path

    def with_provenance(self, **entries: Any) -> "Checkpoint":
        """The same weights with these entries added to the record."""
        return replace(self, provenance={**self.provenance, **entries})


def _read(path: Path, *, mapped: bool) -> Checkpoint:
    if not path.is_file():
        what = "is a folder, expected a file" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: {what}; give a .safetensors, .pt, .pth or .bin checkpoint")
    source = Source.of(path) if mapped else None
    if path.suffix == ".safetensors":
        tensors, record = _tensors_and_record(path, _mapped if mapped else _copied)
        if not tensors:
            raise CheckpointError(f"{path}: holds no tensors")
        if record.get("kind") in ("coefficients", "dial"):
            raise CheckpointError(
                f"{path}: holds coefficients, not a network; give it to mix as --coefficients"
            )
        checkpoint = Checkpoint(tensors, record, path, source=source)
    else:
        checkpoint = replace(_read_foreign(path, mapped=mapped), source=source)
    for name, tensor in checkpoint.tensors.items():
        wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 cannot be asked
        if tensor.is_floating_point() and not bool(wide.isfinite().all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity; this checkpoint is broken"
            )
    return checkpoint


def _read_foreign(path: Path, *, mapped: bool) -> Checkpoint:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapped = mapped and zipfile.is_zipfile(
                path
            )  # torch maps no file of its format before 1.6
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler also raises IndexError, TypeError and AssertionError on broken bytes
        reason = (
            str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        )
        raise CheckpointError(
            f"{path}: not a checkpoint that can be read with weights_only=True: {reason}"
        ) from None
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> Checkpoint:
    key, others, state = None, {}, content
    if isinstance(content, Mapping) and not _is_state(content):
        key = next(
            (k for k in _WRAPPERS if isinstance(content.get(k), Mapping) and _is_state(content[k])),
            None,
        )
        if key is None:
            raise CheckpointError(
                f"{path}: found no state dict; got keys {list(content)[:5]}, "
                f"expected tensors by name, or one of {', '.join(_WRAPPERS)}"
            )
        state, others = content[key], {k: v for k, v in content.items() if k != key}
    if not isinstance(state, Mapping) or not _is_state(state):
        raise CheckpointError(
            f"{path}: got a {type(content).__name__}, expected a state dict (tensors by name)"
        )
    prefix = ""
    while shared := next(
        (p for p in _PREFIXES if all(name.startswith(prefix + p) for name in state)), None
    ):
        prefix += shared
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is sparse or quantized; expected plain tensors")
    tensors = {name[len(prefix) :]: tensor.detach() for name, tensor in state.items()}
    if any(not name for name in tensors):
        raise CheckpointError(f"{path}: a name is nothing but the prefix {prefix!r}")
    return Checkpoint(tensors, {"tied": _tied(tensors)}, path, Wrapping(others, key, prefix))


def _parameters_of(model: nn.Module) -> dict[str, Any]:
    """What a record says of the parameters: their names, and the other names of tied ones."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    tied = {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}
    return {"parameters": list(first.values()), "tied": tied}


def _is_state(content: Mapping) -> bool:
    return bool(content) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    )


def _same_names(names: Iterable[str], network: Iterable[str]) -> bool:
    """Whether a file has the names of a network, but for counters of BatchNorm: files from before PyTorch 0.4.1 have none."""
    missing = set(network).symmetric_difference(names)
    return all(name.endswith(".num_batches_tracked") for name in missing) and missing.isdisjoint(
        names
    )


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[tuple, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if place in first:
            tied[name] = first[place]
        else:
            first[place] = name
    return tied


def as_network(network: "nn.Module | Checkpoint | str | os.PathLike") -> nn.Module:
    """A network from a network (as it is), a Checkpoint or a path. Raises RequestError for anything else."""
    if isinstance(network, nn.Module):
        return network
    if isinstance(network, (Checkpoint, str, os.PathLike)):
        return Checkpoint.load(network).network()
    raise RequestError(
        f"network: got {type(network).__name__}, expected an nn.Module, a Checkpoint or a path"
    )
