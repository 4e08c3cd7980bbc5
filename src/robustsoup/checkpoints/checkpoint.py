"""Checkpoints: the weights of one network and a record of where they come from."""

import copy
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import set_mode
from robustsoup.checkpoints.adapters import (
    Adapter,
    find_adapter,
    find_base,
    merge_adapter,
)
from robustsoup.checkpoints.fitting import (
    NamesFit,
    find_neutral_constants,
    find_normalisation,
    fit_names,
    has_no_values,
    has_other_shape,
    holds_other_numbers,
    load_tensors,
    network_tensors,
)
from robustsoup.checkpoints.formats import read_checkpoint, refuse_broken, write_checkpoint
from robustsoup.checkpoints.mapped import MappedFile
from robustsoup.checkpoints.parameters import (
    find_constants,
    find_unweighted_statistics,
    guess_parameters,
    inexact_parameters,
    is_inexact,
)
from robustsoup.checkpoints.remote import find_copy_of, local_path
from robustsoup.checkpoints.transfers import choose_file
from robustsoup.checkpoints.weight_sets import may_be_surplus, read_versions
from robustsoup.checkpoints.wrapping import Wrapping, join_names, unwrap_pickle
from robustsoup.display import html_table
from robustsoup.errors import CheckpointError, ModelError, RequestError
from robustsoup.file_bytes import digest_tensors
from robustsoup.models import (
    Factory,
    NetworkSettings,
    build_known_skeleton,
    build_network,
    complete_settings,
    is_built_in,
    network_settings_of,
    spec_text,
)
from robustsoup.models.network import channel_constants, file_names_of, known_constants_of
from robustsoup.models.normalize import list_identity_constants
from robustsoup.paths import user_path
from robustsoup.printable import make_printable
from robustsoup.schema import describe_value

NAME_THE_NETWORK = (
    "set --model (model in a recipe; in Python, with_network, or load_into your module), as in "
    "resnet9 or package.module:factory"
)


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """The state dict of one network under its own names, and a record of its provenance.

    Attributes:
        tensors: name -> tensor on the CPU.
        provenance: JSON-able record of how the weights were made; empty for a foreign file. Keys
            that the library reads: "network" {spec, classes, channels, normalize}, "parameters"
            [names], "tied" {alias: name}, "statistics" {running statistic: parameter whose output
            it describes, where the layer itself has none}, "parents" [{digest, file}], "data" (the
            record of the data that the weights were fitted on), "earlier_data" (those of its
            ancestors), "trained_on" [splits], "warnings" [texts].
        path: The file that was read.
        wrapping: What is around the tensors in their file.
        source: The file, if the tensors are still in it (see `open`).
        named_network: The network that this program named (see `with_network`). It comes before the
            record, which may name built-in networks only: data never names code that runs.
        notes: What was read, left aside or left out, each in a line.
        as_read: The checkpoint before names or dtypes were fitted to others; its digest counts.
    """

    tensors: Mapping[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    wrapping: Wrapping | None = None
    source: MappedFile | None = None
    named_network: NetworkSettings | None = None
    notes: tuple[str, ...] = ()
    as_read: "Checkpoint | None" = None

    @classmethod
    def load(
        cls,
        path: "CheckpointLike",
        *,
        key: str | None = None,
        adapter_base: "CheckpointLike | None" = None,
    ) -> "Checkpoint":
        """Read .safetensors, an index of shards, or .pt/.pth/... without running any of their code.

        The state dict is found under any keys, and prefixes of wrappers are removed from its names;
        `with_names_of` fits them to a network. The content is compared with the digests that
        robustsoup wrote.

        Args:
            path: The file, or a folder that holds one, such as those of `save_pretrained` of
                transformers or peft; its address elsewhere, such as hf://ORG/NAME or
                s3://BUCKET/FILE, which is copied into the cache once; or a Checkpoint, which is
                returned; or a network or a state dict, whose weights are copied.
            key: Which weights to read if the file or the state dict holds several sets: the keys
                that lead to them, joined by dots, or a prefix of their names, such as
                "state_dict_ema". `notes` says which were read by default.
            adapter_base: The base of a LoRA adapter (a folder that peft saved), into which it is
                merged; by default the one that its adapter_config.json names, if it is on this
                machine or the adapter itself came from the hub.

        Raises:
            CheckpointError: The file is missing, cut short, damaged, in a newer format, holds no
                tensors, NaN or infinity, or a record that is malformed; the error names the file.
            RequestError: `key` is given with a Checkpoint or a network, or `adapter_base` with
                weights that are in memory.
        """
        if isinstance(path, (str, os.PathLike)):
            return cls._read(local_path(path), mapped=False, key=key, adapter_base=adapter_base)
        return cls._take(path, key, adapter_base)

    @classmethod
    def open(
        cls,
        path: "CheckpointLike",
        *,
        key: str | None = None,
        adapter_base: "CheckpointLike | None" = None,
    ) -> "Checkpoint":
        """Read as `load` does, but leave the tensors in the file, as read-only views of it.

        An adapter is merged in memory. Digests are compared once while the file keeps its path,
        inode, size and time.
        Call `check_source` before reading them later, and do not overwrite the file in place
        meanwhile.
        """
        if isinstance(path, (str, os.PathLike)):
            return cls._read(local_path(path), mapped=True, key=key, adapter_base=adapter_base)
        return cls._take(path, key, adapter_base)

    @classmethod
    def _take(
        cls, source: object, key: str | None = None, adapter_base: object = None
    ) -> "Checkpoint":
        """Return a checkpoint of what is in memory already.

        Raises:
            RequestError: The source is neither a checkpoint, a network nor a state dict, or has no
                use for the key or the base.
            CheckpointError: A state dict holds no weights, or none of that key.
        """
        if adapter_base is not None:
            raise RequestError("adapter_base: requires the folder of an adapter, not weights")
        if key is not None and not isinstance(source, Mapping):
            raise RequestError(f"key: requires a file or a state dict, got {type(source).__name__}")
        if isinstance(source, Checkpoint):
            return source
        if isinstance(source, nn.Module):
            return cls.of(source)
        if isinstance(source, Mapping):
            tensors, wrapping, notes = unwrap_pickle(source, Path("state dict"), key)
            on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
            copies = copy.deepcopy(on_cpu)  # at once, so that tied tensors still share memory
            return cls(copies, wrapping=wrapping, notes=notes)
        raise RequestError(
            f"checkpoint: got {type(source).__name__}, expected a path, a Checkpoint, an nn.Module "
            "or a state dict"
        )

    @classmethod
    def _read(
        cls,
        path: Path,
        *,
        mapped: bool,
        key: str | None,
        adapter_base: "CheckpointLike | None" = None,
    ) -> "Checkpoint":
        if (adapter := find_adapter(path)) is not None:
            return cls._merge(adapter, adapter_base, key)
        if adapter_base is not None:
            raise CheckpointError(f"{path}: is no adapter with an adapter_config.json")
        path = _file_of(path)
        stored = read_checkpoint(path, mapped=mapped, key=key)
        return cls(
            stored.tensors,
            stored.record,
            path,
            stored.wrapping,
            stored.source,
            notes=stored.notes,
        )

    @classmethod
    def _merge(
        cls, adapter: Adapter, named: "CheckpointLike | None", key: str | None
    ) -> "Checkpoint":
        """Merge an adapter into its base.

        Raises:
            CheckpointError: The base is not found or does not fit, or the adapter is not
                understood.
        """
        place = _locate_base(adapter) if named is None else named
        try:
            base = cls.load(place, key=key)
        except RecursionError:
            raise CheckpointError(
                f"{adapter.folder}: the adapter is its own base; set --adapter-base"
            ) from None
        factors = read_checkpoint(adapter.weights, mapped=True).tensors
        tensors = merge_adapter(adapter, factors, base.tensors, base.tied)
        before = base.provenance
        kept = ["parameters", "tied", "statistics"]
        if all(tensor.shape == tensors[name].shape for name, tensor in base.tensors.items()):
            kept.append("network")
        record = {entry: before[entry] for entry in kept if entry in before}
        earlier = [before.get("data"), *before.get("earlier_data", [])]
        record |= {
            "parents": [{"digest": base.digest, "file": base.path.name if base.path else None}],
            "data": None,
            "earlier_data": [data for data in earlier if data],
            "trained_on": before.get("trained_on", []),
            "adapter": {"digest": digest_tensors(factors), "folder": adapter.folder.name},
        }
        if sketches := before.get("fitted_images"):
            record["fitted_images"] = sketches
        named_network = base.named_network if "network" in kept else None
        path = adapter.weights if find_copy_of(adapter.weights) else adapter.folder
        note = f"{path.name}: merged into its base, {base.path.name if base.path else base.name}"
        return cls(tensors, record, path, base.wrapping, None, named_network, (*base.notes, note))

    @classmethod
    def of(
        cls,
        model: nn.Module | Mapping[str, Tensor],
        provenance: dict[str, Any] | None = None,
    ) -> "Checkpoint":
        """Copy the weights of a network or of a state dict.

        The record gains the names of the parameters and tied parameters of a network, and, if
        `load_model` built it, the network.

        Raises:
            RequestError: The argument is neither.
            CheckpointError: The network holds no weights, or they have no values yet.
        """
        if not isinstance(model, nn.Module):
            return cls._take(model).with_provenance(**(provenance or {}))
        named = network_tensors(model)
        if not named:
            raise CheckpointError(f"network: {type(model).__name__} holds no weights")
        for name, tensor in named.items():
            if has_no_values(tensor):
                raise CheckpointError(
                    f"network: {name} has no values yet; call the network on images, or load its "
                    "weights, before it becomes a checkpoint"
                )
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in named.items()}
        record = {**(provenance or {}), **_parameter_record(model)}
        if (settings := network_settings_of(model)) is not None:
            record["network"] = settings.as_record()
        versions = read_versions(model.state_dict(keep_vars=True))
        wrapping = Wrapping({name: name for name in tensors}, versions=versions)
        return cls(tensors, record, wrapping=wrapping, named_network=settings)

    def check_source(self) -> None:
        """Check that mapped tensors can still be read.

        Raises:
            CheckpointError: Their file is gone, cut short or changed since it was opened.
        """
        if self.source is not None:
            self.source.check_unchanged()

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over names, dtypes, shapes and bytes of the tensors, for any file format.

        Fitting the names to a network, or the dtypes to a checkpoint, does not change it.
        """
        if self.as_read is not None:
            return self.as_read.digest
        self.check_source()
        return digest_tensors(self.tensors)

    @property
    def name(self) -> str:
        """The name in messages: the path, else the beginning of the digest."""
        return str(self.path) if self.path else f"checkpoint {self.digest[:12]}"

    @property
    def parameters(self) -> list[str]:
        """Names of the tensors that mixing averages.

        These are the recorded parameters. Without a record, they are guessed; see
        `guess_parameters`.
        """
        if "parameters" in self.provenance:
            return list(self.provenance["parameters"])
        return guess_parameters(self.tensors, self.tied)

    @property
    def constants(self) -> set[str]:
        """Names of the buffers that are not averaged; see `find_constants`."""
        return find_constants(self.tensors, self.parameters, self.tied)

    @property
    def warnings(self) -> list[str]:
        """What makes a soup doubtful, such as constants that differ between its ingredients."""
        return list(self.provenance.get("warnings", ()))

    @property
    def tied(self) -> dict[str, str]:
        """The canonical name of each alias: tensors that are one parameter under two names."""
        return dict(self.provenance.get("tied", {}))

    @property
    def network_settings(self) -> NetworkSettings | None:
        """The settings of the network: named by this program, else recorded, else None.

        Raises:
            ModelError: The record names a network that is not built in.
        """
        if self.named_network is not None:
            return self.named_network
        recorded = self._recorded_network
        if recorded is not None and not is_built_in(recorded.spec):
            raise ModelError(
                f"{self.name}: the file names {describe_value(recorded.spec)} as its network, "
                "which is not built in, and files never choose code that runs; if you trust this "
                'network, name it yourself: --model package.module:factory, model = "..." in a '
                'recipe, or with_network("...") in Python'
            )
        return recorded

    @property
    def _recorded_network(self) -> NetworkSettings | None:
        """What the record says about the network, whether or not it may be built."""
        recorded = self.provenance.get("network")
        return None if recorded is None else NetworkSettings.from_record(recorded)

    def with_network(
        self,
        spec: str | Factory | None = None,
        *,
        classes: int | None = None,
        channels: int | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> "Checkpoint":
        """Name the network of the checkpoint.

        The arguments are those of `load_model`; each that is set overrides the record. A network
        of your own is named here, or its module is passed: a file cannot do it.

        Raises:
            ModelError: spec is None, and the record names no network, or one that is not built in.
        """
        settings = self._override_network(spec, classes, channels, normalize)
        named = self.with_provenance(network=settings.as_record())
        return replace(named, named_network=settings)

    def _override_network(
        self,
        named: str | Factory | None,
        classes: int | None,
        channels: int | None,
        normalize: tuple[Sequence[float], Sequence[float]] | None,
    ) -> NetworkSettings:
        spec = None if named is None else spec_text(named)
        defaults = self.network_settings if spec is None else self._recorded_network
        if spec is None and defaults is None:
            raise ModelError(f"{self.name}: does not record its network; {NAME_THE_NETWORK}")
        defaults = defaults or NetworkSettings(spec or "")
        return complete_settings(
            NetworkSettings(
                spec or defaults.spec,
                defaults.classes if classes is None else classes,
                defaults.channels if channels is None else channels,
                channel_constants(normalize) or defaults.normalize,
            )
        )

    def network(
        self,
        spec: str | Factory | None = None,
        *,
        classes: int | None = None,
        channels: int | None = None,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> nn.Module:
        """Build the network with these weights, in eval mode, on the CPU.

        The arguments are those of `with_network`.

        Raises:
            ModelError: As `with_network`; or names or shapes of the tensors differ from those of
                the network (the first is named).
        """
        settings = self._override_network(spec, classes, channels, normalize)
        if (skeleton := build_known_skeleton(settings)) is not None:
            self._tensors_for(skeleton)  # before a network takes memory
        model = build_network(settings)
        self.load_into(model)
        set_mode(model, training=False)
        return model

    def network_for_names(self) -> nn.Module:
        """Build the network without these weights, and without memory where that is possible.

        Raises:
            ModelError: As `with_network`.
        """
        settings = self._override_network(None, None, None, None)
        return build_known_skeleton(settings) or build_network(settings)

    def has_names_of(self, model: nn.Module) -> bool:
        """Return whether all tensors of `model`, but for optional ones, are here by their names."""
        expected, constants = network_tensors(model), self._list_missing_constants(model)
        return _have_same_names(self.tensors.keys() & expected.keys(), expected, constants)

    def with_names_of(self, model: nn.Module) -> "Checkpoint":
        """Fit the names to those of `model`; see `fit_names`.

        Tensors that the network lacks are set aside, and `notes` names them. Aliases of tied
        tensors are filled in. The file may lack the constants by which a built-in network
        normalises its inputs, which a note says, or those of a network of RobustBench.

        Names that the network's library uses in files become the network's own. If constants are
        set aside that may normalise inputs, a note gives them.

        Returns:
            The renamed checkpoint; this checkpoint if its names fit already or cannot be made to.
        """
        renamed = self._with_own_names_of(model)
        return renamed if _normalises(model) else renamed._with_note_on_normalisation()

    def _with_own_names_of(self, model: nn.Module) -> "Checkpoint":
        expected, file_names = network_tensors(model), file_names_of(model)
        renamed = self._with_names_of(expected)
        if renamed is self and file_names and set(self.tensors) != set(expected):
            in_files = {file_names.get(name, name): tensor for name, tensor in expected.items()}
            return self._with_names_of(in_files, {new: name for name, new in file_names.items()})
        constants = self._list_missing_constants(model)
        if constants and renamed is self:
            plain = {name: expected[name] for name in expected if name not in constants}
            renamed = self._with_names_of(plain)
            if _have_same_names(renamed.tensors, plain):
                return renamed._with_note_on(constants, model)
        return renamed

    def _list_missing_constants(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the constants that a network has without the file, if it has none of them."""
        known = {name: model.get_buffer(name) for name in known_constants_of(model)}
        constants = list_identity_constants(model) | known
        ends = tuple(f".{name}" for name in constants)
        present = any(f".{name}".endswith(ends) for name in self.tensors)
        return {} if present else constants

    def _with_note_on(self, constants: Iterable[str], model: nn.Module) -> "Checkpoint":
        """Return the checkpoint with a note that it lacks constants, unless they are known."""
        name = self.path.name if self.path else "checkpoint"
        note = (
            f"{name}: has no {join_names(list(constants))}: the network's inputs are not "
            "normalised; if they were in training, give --normalize"
        )
        return self if _normalises(model) else self._with_note(note)

    def _with_note_on_normalisation(self) -> "Checkpoint":
        beside = {} if self.wrapping is None else self.wrapping.beside
        pair = find_normalisation(beside)
        if not pair:
            return self
        mean, std = (
            ",".join(f"{number:.6g}" for number in values.flatten().tolist())
            for values in pair.values()
        )
        return self._with_note(
            f"{self.path.name if self.path else 'checkpoint'}: if {join_names(list(pair))} "
            f"normalised the inputs in training, give --normalize {mean} {std}"
        )

    def _with_note(self, note: str) -> "Checkpoint":
        if note in self.notes:
            return self
        return replace(self, notes=(*self.notes, note), as_read=self.as_read or self)

    def with_names_like(self, other: "Checkpoint") -> "Checkpoint":
        """Fit the names to those of another checkpoint, if no weight is set aside for it.

        Names that do not fit are fitted to the network that the other names, whose library may use
        others in files. Constants of normalisation that change nothing, such as those of a network
        that was fine-tuned from a file without any, are set aside or added.
        """
        neutral = find_neutral_constants(other.tensors)
        if any(name.endswith(tuple(neutral)) for name in self.tensors):
            neutral.clear()  # it has constants itself
        expected = {name: t for name, t in other.tensors.items() if name not in neutral}
        renamed = self._with_names_of(expected)
        if renamed is self and expected.keys() - self.tensors.keys():
            renamed = self._with_names_of_network(other)
        left = () if renamed is self or renamed.wrapping is None else renamed.wrapping.beside
        if self._hold_weight(left):
            return self
        if not neutral or not _have_same_names(renamed.tensors, expected):
            return renamed
        tensors = {**renamed.tensors, **neutral}
        return replace(renamed, tensors=tensors, as_read=self.as_read or self)

    def _with_names_of_network(self, other: "Checkpoint") -> "Checkpoint":
        """Fit the names to the network of another checkpoint, if that can be built."""
        try:
            return self.with_names_of(other.network_for_names())
        except ModelError:
            return self

    def with_dtypes_like(self, other: "Checkpoint") -> "Checkpoint":
        """Convert floating-point tensors to the dtypes of those of the same names in another."""
        dtypes = {n: t.dtype for n, t in other.tensors.items() if t.is_floating_point()}
        tensors = {
            name: tensor.to(dtypes[name])
            for name, tensor in self.tensors.items()
            if tensor.is_floating_point() and name in dtypes
        }
        if all(tensor is self.tensors[name] for name, tensor in tensors.items()):
            return self
        converted = {**self.tensors, **tensors}
        return replace(self, tensors=converted, as_read=self.as_read or self)

    def _hold_weight(self, names_in_file: Collection[str]) -> bool:
        neutral = find_neutral_constants(self.tensors)
        return any(
            is_inexact(tensor) and name not in neutral
            for name, tensor in self.tensors.items()
            if self._name_in_file(name) in names_in_file
        )

    def _with_names_of(
        self, expected: Mapping[str, Tensor], own_names: Mapping[str, str] | None = None
    ) -> "Checkpoint":
        """Fit the names to `expected`, and then replace them by `own_names` where these differ."""
        if set(self.tensors) == set(expected) and not own_names:
            return self
        in_file = {self._name_in_file(name): tensor for name, tensor in self.tensors.items()}
        fit = fit_names(in_file, expected)
        if fit is None:
            return self
        own = {self._name_in_file(name): name for name in self.tensors}
        new = own_names or {}
        names = {new.get(name, name): own[source] for name, source in fit.names.items()}
        if all(name == old for name, old in names.items()) and not fit.surplus:
            return self
        surplus = {own[source]: self.tensors[own[source]] for source in fit.surplus}
        tensors = {name: self.tensors[old] for name, old in names.items()}
        wrapping = self.wrapping or Wrapping({name: name for name in self.tensors})
        return replace(
            self,
            tensors=tensors,
            provenance=_rename_record(self.provenance, names),
            wrapping=wrapping.rename(names, surplus, _find_copies(in_file, fit, new)),
            notes=(*self.notes, *self._describe_fit(fit)),
            as_read=self.as_read or self,
        )

    def _name_in_file(self, name: str) -> str:
        return name if self.wrapping is None else self.wrapping.names.get(name, name)

    def _describe_fit(self, fit: NamesFit) -> Iterator[str]:
        name = self.path.name if self.path else "checkpoint"
        if fit.other_prefixes:
            prefix = fit.other_prefixes[0].rstrip(".")
            yield (
                f"{name}: read the weights under {fit.prefix or 'no prefix'}; those under "
                f"{join_names(fit.other_prefixes)} are complete too (--key {prefix})"
            )
        starts = tuple(fit.other_prefixes)
        surplus = [item for item in fit.surplus if not (starts and item.startswith(starts))]
        if surplus:
            yield f"{name}: set aside {join_names(surplus)}: the network lacks them"

    def with_parameters_of(self, model: nn.Module) -> "Checkpoint":
        """Rename as `with_names_of` does, and record the parameters of `model` if it fits."""
        renamed = self.with_names_of(model)
        constants = self._list_missing_constants(model)
        if not _have_same_names(renamed.tensors, network_tensors(model), constants):
            return renamed
        return renamed.with_provenance(**_parameter_record(model))

    def with_network_of(self, model: nn.Module) -> "Checkpoint":
        """Record the parameters of `model`, and its network if `load_model` built it."""
        described = self.with_parameters_of(model)
        settings = network_settings_of(model)
        if settings is None:
            return described
        record = settings.as_record()
        return replace(described.with_provenance(network=record), named_network=settings)

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into `model`; every name and shape must match.

        BatchNorm's counters, which files from before PyTorch 0.4.1 lack, start at zero. Without
        constants of normalisation in the file, a built-in network does not normalise its inputs,
        and one of RobustBench does by its own.

        Raises:
            ModelError: Names the first name or shape that differs.
        """
        tensors, versions = self._tensors_for(model)
        try:
            load_tensors(model, tensors, versions)
        except Exception as error:  # modules may load in a way of their own
            raise ModelError(
                f"{self.name}: the network does not take these weights: "
                f"{' '.join(str(error).split()) or type(error).__name__}"
            ) from error

    def _tensors_for(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the tensors to load into `model`, and the versions of the modules they are of."""
        self.check_source()
        renamed = self.with_names_of(model)
        expected = network_tensors(model)
        constants = self._list_missing_constants(model)
        missing: dict[str, Tensor] = {}
        if _have_same_names(renamed.tensors, expected, constants):
            for name in [name for name in expected if name not in renamed.tensors]:
                wanted = expected.pop(name)
                missing[name] = constants.get(name, torch.zeros_like(wanted))
        renamed._check_fits(expected)
        versions = renamed.wrapping.own_versions() if renamed.wrapping else {}
        return missing | dict(renamed.tensors), versions

    def _check_fits(self, expected: dict[str, Tensor]) -> None:
        for name in [*expected, *self.tensors]:
            if name not in self.tensors:
                raise ModelError(
                    f"{self.name}: {name}: the network has this tensor, the file does not; "
                    "is --model right?"
                )
            if name not in expected:
                raise ModelError(
                    f"{self.name}: {name}: the file has this tensor, the network does not; "
                    "is --model right?"
                )
            if has_other_shape(self.tensors[name], expected[name]):
                raise ModelError(
                    f"{self.name}: {name}: got shape {tuple(self.tensors[name].shape)}, "
                    f"the network expects {tuple(expected[name].shape)}"
                )
            if holds_other_numbers(self.tensors[name], expected[name]):
                got, wanted = (
                    str(tensor.dtype).removeprefix("torch.")
                    for tensor in (self.tensors[name], expected[name])
                )
                raise ModelError(
                    f"{self.name}: {name}: got {got}, the network expects {wanted}; if the file "
                    "is quantized, give the weights from before"
                )
        # Reading left it to the network to tell whether these are its own.
        doubtful = {name: t for name, t in self.tensors.items() if may_be_surplus(name)}
        refuse_broken(doubtful, self.name, self.constants)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the checkpoint atomically and return its path.

        Args:
            path: .safetensors, or an ending of torch.save (.pt, .pth, .bin, .ckpt, .pth.tar, ...),
                which keep the wrapping that the checkpoint was read with, so that existing loading
                code works unchanged.

        Raises:
            StorageError: The file cannot be written.
            CheckpointError: The path has another ending, or a tensor holds NaN or infinity.
        """
        path = user_path(path)
        write_checkpoint(path, self.tensors, self.provenance, self.wrapping)
        return path

    def with_provenance(self, **entries: Any) -> "Checkpoint":
        """Return the same weights with these entries added to the record."""
        return replace(self, provenance={**self.provenance, **entries})

    def __repr__(self) -> str:
        """Return one line: the name, the number of tensors and weights, and the network."""
        count = sum(tensor.numel() for tensor in self.tensors.values())
        recorded = self._recorded_network
        network = "no recorded network" if recorded is None else recorded.spec
        name = self.path.name if self.path else "in memory"
        return make_printable(
            f"Checkpoint({name}: {len(self.tensors)} tensors, {count:,} numbers, {network})"
        )

    def _repr_html_(self) -> str:
        record = self.provenance
        recorded = self._recorded_network
        types = sorted(
            {str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}
        )
        training, data = record.get("training") or {}, record.get("data") or {}
        parents = [
            parent.get("file") or parent["digest"][:12] for parent in record.get("parents", ())
        ]
        rows = {
            "network": "not recorded" if recorded is None else recorded.spec,
            "tensors": f"{len(self.tensors):,} ({', '.join(types)})",
            "numbers": f"{sum(tensor.numel() for tensor in self.tensors.values()):,}",
            "made from": ", ".join(parents),
            "trained under": training.get("threat", ""),
            "objective": training.get("objective", ""),
            "data": data.get("name", ""),
            "fitted on": ", ".join(record.get("trained_on", ())),
        }
        title = self.path.name if self.path else "Checkpoint in memory"
        notes = (*self.notes, *(f"warning: {warning}" for warning in self.warnings))
        return html_table(title, (), (row for row in rows.items() if row[1]), notes)


def _normalises(model: nn.Module) -> bool:
    return hasattr(model, "input_mean") or bool(known_constants_of(model))


def _file_of(path: Path) -> Path:
    """Return the file of a checkpoint, which in a folder is chosen as in a repository.

    Raises:
        CheckpointError: The folder cannot be read, or holds no checkpoint or several.
    """
    if not path.is_dir():
        return path
    try:
        names = [item.name for item in path.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    return path / choose_file(names, str(path))


def _locate_base(adapter: Adapter) -> Path:
    """Return the base that the configuration of an adapter names.

    One of the hub is copied only for an adapter that was itself read from the hub.

    Raises:
        CheckpointError: It is not on this machine.
    """
    place = find_base(adapter)
    if place is not None:
        return place
    copy = find_copy_of(adapter.weights)
    if copy is not None and copy.address.startswith("hf://") and adapter.base:
        revision = adapter.config.get("revision")
        return local_path(f"hf://{adapter.base}" + (f"@{revision}" if revision else ""))
    named = "none is named" if adapter.base is None else f"{adapter.base} is not on this machine"
    raise CheckpointError(
        f"{adapter.folder}: the adapter needs its base, and {named}; set --adapter-base "
        "(adapter_base in a recipe and in Python) to the base: a file, a folder or hf://ORG/NAME"
    )


CheckpointLike: TypeAlias = Checkpoint | str | os.PathLike[str]


def _parameter_record(model: nn.Module) -> dict[str, Any]:
    """Return the names of the parameters, alias -> name for those with two names, and statistics.

    "statistics" maps those of normalisation layers without a weight to the last parameter before
    the layer, in the order of the network; files are in another order.

    Raises:
        ModelError: The state dict of the network has other names.
    """
    first_names = {id(parameter): name for name, parameter in inexact_parameters(model).items()}
    saved = model.state_dict(keep_vars=True)
    if missing := [name for name in first_names.values() if name not in saved]:
        raise ModelError(
            f"network: its state_dict() has no {missing[0]}, which named_parameters() has; remove "
            "what renames or drops its weights"
        )
    tied = {
        name: first_names[id(parameter)]
        for name, parameter in inexact_parameters(model, remove_duplicate=False).items()
        if first_names[id(parameter)] != name
    }
    parameters = list(first_names.values())
    statistics = find_unweighted_statistics(saved, parameters, tied)
    return {"parameters": parameters, "tied": tied, "statistics": statistics}


def _rename_record(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename the parameters in a record.

    Args:
        record: The record.
        names: New name -> old name; an old name may have several.
    """
    renamed = dict(record)
    new_names: dict[str, list[str]] = {}
    for new, old in names.items():
        new_names.setdefault(old, []).append(new)
    if "parameters" in record:
        parameters = [new_names[old][0] for old in record["parameters"] if old in new_names]
        renamed["parameters"] = parameters
    tied = {alias: group[0] for group in new_names.values() for alias in group[1:]}
    for alias, name in record.get("tied", {}).items():
        if alias in new_names and name in new_names:
            tied |= dict.fromkeys(new_names[alias], new_names[name][0])
    if tied or "tied" in record:
        renamed["tied"] = tied
    if "statistics" in record:
        renamed["statistics"] = {
            new: new_names[owner][0]
            for statistic, owner in record["statistics"].items()
            if owner in new_names
            for new in new_names.get(statistic, ())
        }
    return renamed


def _find_copies(
    in_file: Mapping[str, Tensor], fit: NamesFit, own_names: Mapping[str, str]
) -> dict[str, str]:
    """Return name in the file -> name in the network, of surplus tensors that repeat one."""
    copies: dict[str, str] = {}
    for prefix in fit.other_prefixes:
        for name, source in fit.names.items():
            other = prefix + source.removeprefix(fit.prefix)
            if other in in_file and torch.equal(in_file[other], in_file[source]):
                copies[other] = own_names.get(name, name)
    return copies


def _have_same_names(
    names: Iterable[str], expected: Iterable[str], optional: Collection[str] = ()
) -> bool:
    """Compare a file's names with a network's.

    BatchNorm's counters, and the names in `optional`, may be missing in the file.
    """
    names = set(names)
    differing = names.symmetric_difference(expected)
    return differing.isdisjoint(names) and all(
        name.endswith(".num_batches_tracked") or name in optional for name in differing
    )


def open_all(sources: object) -> list[Checkpoint]:
    """Open a list of checkpoints; see `Checkpoint.open`.

    Raises:
        RequestError: The argument is no list, or an item is no checkpoint.
    """
    if isinstance(sources, (str, os.PathLike, Checkpoint, nn.Module, Mapping)) or not isinstance(
        sources, Iterable
    ):
        raise RequestError(
            f"checkpoints: got {type(sources).__name__}, expected a list of checkpoints or paths"
        )
    return [Checkpoint.open(source) for source in sources]


def as_network(network: nn.Module | CheckpointLike) -> nn.Module:
    """Return a module as it is; build the network of a Checkpoint or a path.

    Raises:
        RequestError: The argument is none of these.
    """
    if isinstance(network, nn.Module):
        return network
    if isinstance(network, (Checkpoint, str, os.PathLike)):
        return Checkpoint.load(network).network()
    raise RequestError(
        f"network: got {type(network).__name__}, expected an nn.Module, a Checkpoint or a path"
    )
