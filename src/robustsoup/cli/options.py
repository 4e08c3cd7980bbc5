"""Command-line options: each derives from the field of a settings class.

A command is a function. Its parameters may be settings objects, such as `settings: TrainSettings`
or `run: RunOptions`; `expand` shows typer one option for each of their fields and builds the
objects from what the user types. `Annotated[TrainSettings, Fields(...)]` adapts the options of one
command. Fields with the same option name in several classes, such as `seed`, share one option.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from robustsoup.catalog import ATTACKS, DATA_SOURCES, MODELS
from robustsoup.errors import ModelError, RequestError
from robustsoup.paths import user_path
from robustsoup.settings import (
    SEED_LIMIT,
    LearnSettings,
    Rule,
    TrainSettings,
    check_ranges,
    rules,
    setting,
)
from robustsoup.threats import ThreatModel

if TYPE_CHECKING:
    from robustsoup.checkpoints.opening import Opening


class CheckpointPlace:
    """Marks an argument that names checkpoints: the command gets the path of a copy here."""


ADDRESSES = "hf://ORG/NAME, https://HOST/FILE or s3://BUCKET/FILE"
Files = Annotated[
    list[Path],
    CheckpointPlace(),
    typer.Argument(
        help="Checkpoints: .safetensors, .pt, .pth, .ckpt, .bin, or an .index.json of shards; or "
        f"addresses of such files: {ADDRESSES}.",
        show_default=False,
    ),
]
Threats = Annotated[
    list[str], typer.Option("--threat", help='Threat model, such as "Linf 8/255"; repeatable.')
]
TrainingThreats = Annotated[
    list[str],
    typer.Option(
        "--threat",
        help='Threat model, such as "Linf 8/255", "L2 0.5" or clean; several require --combine.',
    ),
]
Combine = Annotated[
    str | None,
    typer.Option(
        help="How several threats are combined: max (each image under its worst threat), mean (the "
        "mean of the losses) or random (one threat in each step).",
        show_default=False,
    ),
]
SampleLimit = Annotated[int | None, typer.Option(min=1, help="Evaluate only the first N samples.")]
ShiftFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of corrupted copies of the test set, in the format of CIFAR-10-C, to evaluate "
        'on too: the measure "shift".'
    ),
]
Base = Annotated[
    Path | None,
    CheckpointPlace(),
    typer.Option(
        help="Checkpoint that the others were fine-tuned from, for methods that require it and "
        "for --buffers base, which copies its statistics; the common ancestor by default."
    ),
]
Track = Annotated[
    str | None,
    typer.Option(help="Write the figures of each epoch to FILE.jsonl or tensorboard:FOLDER."),
]
AllowLeakage = Annotated[
    bool,
    typer.Option(
        "--allow-leakage", help="Allow selection on samples that an ingredient was trained on."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Given(frozenset[str]):
    """The options that the user typed, such as {"lr", "early_stop"}; a command may request them."""


@dataclass(frozen=True)
class Fields:
    """How a command shows the fields of one of its settings classes.

    Attributes:
        only: The fields to show, or None for all.
        omit: Fields to leave out.
        required: Fields that the user must set, regardless of their default.
        names: Option name of a field where it differs from the field's name.
        defaults: Defaults that differ from those of the class.
        helps: Help texts that differ from those of the class.
    """

    only: Sequence[str] | None = None
    omit: Sequence[str] = ()
    required: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)

    def shows(self, name: str) -> bool:
        """Return whether the field is an option of the command."""
        return name not in self.omit and (self.only is None or name in self.only)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data a command reads."""

    data: str = setting(
        dataclasses.MISSING, f"Data: {DATA_SOURCES.spellings()} or package.module:function."
    )
    seed: int = setting(
        0, "Seed of the data split, sample order and all noise.", ge=0, lt=SEED_LIMIT
    )
    data_root: str | None = setting(
        None, "Folder of the data; by default $ROBUSTSOUP_DATA, else the user's cache folder."
    )
    image_size: int | None = setting(
        None,
        "Width and height of images in pixels, for image files; by default those that the "
        "configuration of --model names, else those that the first checkpoint was trained at (if "
        "it records no network with a configuration, for folder: alone), else those of the "
        "recorded network's configuration, else 32 for folder:, and the images' own for hf: and "
        "wds:.",
    )
    channels: int | None = setting(
        None,
        "Channels of images, for image files: 1 (grey) or 3 (colour); by default 1 if every image "
        "is grey, else 3.",
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """How a command builds the network."""

    model: str | None = setting(
        None,
        "Network, such as resnet50, resnet9:width=16 or package.module:factory; required if the "
        "checkpoints do not record theirs.",
    )
    normalize: tuple[str, str] | None = setting(
        None,
        "MEAN STD by channel, for a network that expects normalized inputs, such as "
        '"0.49,0.48,0.45" "0.25,0.24,0.26".',
    )
    key: str | None = setting(
        None,
        "Which weights to read from files that hold several sets, such as state_dict_ema; the "
        "command says which it read by default.",
    )
    adapter_base: Annotated[Path | None, CheckpointPlace()] = setting(
        None,
        "Base of the LoRA adapters among the checkpoints: a file, a folder or an address; by "
        "default the one that adapter_config.json names.",
    )

    @property
    def opening(self) -> "Opening":
        """How the checkpoints of the command are opened."""
        from robustsoup.checkpoints.opening import Opening

        return Opening(self.key, self.adapter_base)

    @property
    def constants(self) -> tuple[list[float], list[float]] | None:
        """The mean and std as numbers; raises ModelError for other text."""
        if self.normalize is None:
            return None
        return _parse_channels(self.normalize[0]), _parse_channels(self.normalize[1])


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a command computes."""

    device: str = setting("auto", "Device: auto, cpu, cuda, or one GPU such as cuda:1.")
    threads: int | None = setting(
        None, "CPU threads; results are bit-equal for equal numbers of threads.", ge=1
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self)

    def use_threads(self) -> None:
        """Set PyTorch's number of threads, if one is requested."""
        if self.threads:
            import torch

            torch.set_num_threads(self.threads)


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Other machines that run the steps of a recipe."""

    ray: str | None = setting(
        None, "Run independent steps as tasks of Ray at HOST:PORT, auto or local (extra ray)."
    )
    slurm: str | None = setting(
        None, "Run independent steps as Slurm jobs in this partition, or local (extra slurm)."
    )
    part_samples: int = setting(
        2000,
        "With --ray or --slurm: fewest samples of the parts that each evaluation is divided into, "
        "at most 100, which run as steps of their own; results do not depend on it.",
        ge=1,
    )

    def __post_init__(self) -> None:
        """Check that one of them is named at most."""
        check_ranges(self)
        if self.ray is not None and self.slurm is not None:
            raise RequestError("--ray and --slurm exclude each other; give one of them")

    @property
    def named(self) -> bool:
        """Whether another machine runs steps."""
        return self.ray is not None or self.slurm is not None


def _parse_channels(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ModelError(
            f'--normalize: got "{text}", expected numbers by channel, such as "0.49,0.48,0.45"'
        ) from None


TrainOrLearn = TypeVar("TrainOrLearn", TrainSettings, LearnSettings)


def with_threats(
    settings: TrainOrLearn, threats: Sequence[str], combine: str | None
) -> TrainOrLearn:
    """Return settings of training or learning with the threats of the command.

    Raises:
        RequestError: The threats do not go together.
    """
    first, *also = threats
    changes: dict[str, Any] = {"threat": first, "also": tuple(also), "combine": combine}
    try:
        return dataclasses.replace(settings, **changes)
    except RequestError as error:
        text = str(error)
        shown = f"--{text}" if text.startswith(("threat: ", "combine: ")) else text
        raise type(error)(shown) from None


@dataclass(frozen=True)
class _Option:
    """One option of a command, made from a field of a settings class."""

    name: str
    field_name: str
    kind: Any
    default: Any
    rule: Rule
    help: str
    nested: type | None
    is_place: bool

    def is_unset(self, values: Mapping[str, Any]) -> bool:
        """Return whether the user set nothing, so that the field takes the default of its class."""
        return values[self.name] is None and self.nested is None

    def convert(self, value: Any) -> Any:
        """Convert the parsed option into the value of the field."""
        if self.nested is not None:
            return self.nested() if value else None
        return tuple(value) if isinstance(value, list) else value

    def parameter(self) -> inspect.Parameter:
        """Return the parameter that typer reads."""
        names = [flag(self.name)]
        if self.kind is bool and self.default is True:
            names = [f"{flag(self.name)}/--no-{flag(self.name)[2:]}"]
        option = typer.Option(
            *names, help=self.help, autocompletion=_make_completion(self.name, self.rule)
        )
        default = inspect.Parameter.empty if self.default is dataclasses.MISSING else self.default
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[self.kind, option],
        )


Command = Callable[..., int | None]
"""A command returns its exit code; None is 0."""


def expand(command: Command) -> Callable[..., int | None]:
    """Return the function that typer registers for a command: one parameter for each option.

    Args:
        command: A function whose parameters are options, arguments, settings classes or `Given`.

    Returns:
        A function with a flat signature that builds the settings objects and calls `command`.
    """
    flat: dict[str, inspect.Parameter] = {}
    groups: dict[str, tuple[type, list[_Option]]] = {}
    wants_given: str | None = None
    places: set[str] = set()
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        settings_type, fields = _split_annotation(parameter.annotation)
        if parameter.annotation is Given:
            wants_given = name
        elif dataclasses.is_dataclass(settings_type):
            options = _make_options(settings_type, fields)
            groups[name] = (settings_type, options)
            for option in options:
                flat.setdefault(option.name, option.parameter())
                if option.is_place:
                    places.add(option.name)
        else:
            flat[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            if _names_checkpoints(parameter.annotation):
                places.add(name)

    def run_command(context: typer.Context, **values: Any) -> int | None:
        del values["debug"]  # read by run_command_line, before the words are parsed
        values = {name: _expand_home(value) for name, value in values.items()}
        values |= {name: _copy_remote(values[name]) for name in places}
        arguments = {name: value for name, value in values.items() if name not in from_settings}
        for name, (settings_type, options) in groups.items():
            arguments[name] = _build_settings(settings_type, options, values)
        if wants_given is not None:
            arguments[wants_given] = _find_given(context, values)
        return command(**arguments)

    from_settings = {option.name for _, options in groups.values() for option in options}
    parameters = [*flat.values(), *_COMMON]
    functools.update_wrapper(run_command, command)
    del run_command.__wrapped__  # type: ignore[attr-defined]  # typer would read its signature
    run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {p.name: p.annotation for p in parameters}
    return run_command


def _expand_home(value: Any) -> Any:
    """Expand "~" in a path or a list of paths; other values stay."""
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return user_path(value) if isinstance(value, Path) else value


def _names_checkpoints(annotation: Any) -> bool:
    return any(isinstance(part, CheckpointPlace) for part in get_args(annotation))


def _copy_remote(value: Any) -> Any:
    """Replace the address of a checkpoint, or each of a list, by the path of its copy here."""
    if isinstance(value, list):
        return [_copy_remote(item) for item in value]
    if not isinstance(value, Path) or ":/" not in value.as_posix():
        return value
    from robustsoup.cli.copying import copy_checkpoint

    return copy_checkpoint(value)


_COMMON = (
    inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    inspect.Parameter(
        "debug",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--debug", hidden=True)],
    ),
)


def _split_annotation(annotation: Any) -> tuple[Any, Fields]:
    """Return the type of a parameter and its `Fields`."""
    if get_origin(annotation) is Annotated:
        kind, *extras = get_args(annotation)
        return kind, next((extra for extra in extras if isinstance(extra, Fields)), Fields())
    return annotation, Fields()


def _make_options(settings_type: type, shown: Fields) -> list[_Option]:
    hints = get_type_hints(settings_type)
    annotations = get_type_hints(settings_type, include_extras=True)
    options: list[_Option] = []
    for name, rule in rules(settings_type).items():
        if not shown.shows(name):
            continue
        default = settings_type.__dataclass_fields__[name].default  # type: ignore[attr-defined]
        default = shown.defaults.get(name, default)
        kind, nested = _option_kind(hints[name], default)
        if name in shown.required:
            default = dataclasses.MISSING
        if nested is not None:
            default = False
        help_text = shown.helps.get(name, rule.help)
        options.append(
            _Option(
                shown.names.get(name, name),
                name,
                kind,
                str(default) if isinstance(default, ThreatModel) else default,
                rule,
                help_text + _describe_limits(rule, help_text),
                nested,
                _names_checkpoints(annotations[name]),
            )
        )
    return options


def _option_kind(annotation: Any, default: Any) -> tuple[Any, type | None]:
    """Return the type that typer parses, and the class of nested settings, which become a flag."""
    union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if union else (annotation,)
    kind: Any = str
    for member in members:
        if dataclasses.is_dataclass(member) and member is not ThreatModel:
            return bool, member if isinstance(member, type) else None
        if member in (bool, int, float, Path):
            kind = member
        elif get_origin(member) is tuple:
            kind = list[str] if Ellipsis in get_args(member) else member
    return (kind | None if default is None else kind), None


def _describe_limits(rule: Rule, text: str) -> str:
    """Return the valid range as the end of a help text, unless the text lists the choices."""
    if rule.choices is not None:
        listed = all(choice in text for choice in rule.choices)
        return "" if listed else f" One of {', '.join(rule.choices)}."
    bounds = (rule.ge, rule.gt, rule.le, rule.lt)
    if all(bound is None for bound in bounds) or rule.lt == SEED_LIMIT:
        return ""
    limits = rule.describe_range().removeprefix("a finite number ").removeprefix("a number ")
    return f" {limits[0].upper()}{limits[1:]}."


def flag(name: str) -> str:
    """Return how an option is written: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def _make_completion(name: str, rule: Rule) -> Callable[[str], list[str]] | None:
    """Return the shell completion of an option's value; None for an option without choices."""
    registries = {"model": MODELS, "data": DATA_SOURCES, "attack": ATTACKS}
    choices = rule.choices or tuple(registries.get(name, ()))
    if not choices:
        return None

    def complete_choice(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete_choice


def _build_settings(
    settings_type: type, options: Sequence[_Option], values: Mapping[str, Any]
) -> Any:
    """Return the settings object; an error of a field names the option instead."""
    given = {o.field_name: o.convert(values[o.name]) for o in options if not o.is_unset(values)}
    try:
        return settings_type(**given)
    except RequestError as error:
        name, _, reason = str(error).partition(": ")
        for option in options:
            if option.field_name == name:
                raise type(error)(f"{flag(option.name)}: {reason}") from None
        raise


def _find_given(context: typer.Context, values: Mapping[str, Any]) -> Given:
    def is_typed(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    return Given(name for name in values if is_typed(name))
