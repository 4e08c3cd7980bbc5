"""The settings of robustsoup's work, each declared once.

Python functions, recipe tables, command-line options, store keys and records all derive from the
frozen dataclasses below. A field states its default, its help text and its valid range; a value of
the wrong type or out of range raises RequestError when the object is created. Threat models may be
given as text. This module never imports PyTorch, so `robustsoup --help` can read it quickly.
"""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeVar, get_args

from robustsoup.catalog import ATTACKS, BUFFER_POLICIES, LOSSES, SOUP_METHODS, Registry
from robustsoup.errors import RequestError
from robustsoup.threats import ThreatModel

PRECISIONS = ("auto", "float32", "bfloat16")
SEED_LIMIT = 2**63
LINF_8 = ThreatModel("Linf", 8 / 255)
QUEUED_ATTACKS = ("apgd", "pgd", "pma", "malt")
"""Attacks whose steps all run in the queue of `robustsoup.attacks.engine`; screening can shorten
them."""
AUTOATTACK_TARGETS = 9
"""Most other classes that AutoAttack tries."""
OWN_LOSSES = {
    "pma": "probability margin",
    "malt": "targeted dlr",
    "strong": "several",
    "square": "margin",
}
"""Attacks with a loss of their own, as text; they refuse another `loss`. For fewer than 4 classes,
malt takes the targeted margin."""


@dataclass(frozen=True)
class Rule:
    """Help text and valid range of one setting, stored in its dataclass field.

    Attributes:
        help: One sentence for `--help` and the reference pages.
        ge, gt, le, lt: Bounds of a number (inclusive, exclusive, inclusive, exclusive).
        choices: The allowed values, such as a registry; None for no such limit.
    """

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: Collection[str] | None = None

    def describe_range(self) -> str:
        """Return the valid range in words, such as "at least 1" or "a number in [0, 1)"."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if low is not None and high is not None:
            left, right = "[("[self.ge is None], "])"[self.le is None]
            return f"a number in {left}{low:g}, {high:g}{right}"
        if high is not None:
            return f"at most {high:g}" if self.lt is None else f"below {high:g}"
        return f"at least {low:g}" if self.gt is None else f"a finite number above {low:g}"

    def allows(self, value: Any) -> bool:
        """Return whether `value` lies in the valid range; None is always allowed."""
        if value is None:
            return True
        if isinstance(self.choices, Registry):
            return self.choices.find(value) is not None
        if self.choices is not None:
            return value in self.choices
        bounds = (self.ge, self.gt, self.le, self.lt)
        if all(bound is None for bound in bounds):
            return True
        number = float(value) if isinstance(value, Real) else math.nan
        return (
            math.isfinite(number)
            and (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )


def setting(default: Any, help_text: str, *, recorded_if_set: bool = False, **limits: Any) -> Any:
    """Declare one setting: a dataclass field with a default, help text and a valid range.

    Args:
        default: The default.
        help_text: One sentence for `--help` and the reference pages.
        recorded_if_set: Leave the setting out of records and store keys while it has its default,
            so that steps that do not use a new setting keep their keys.
        **limits: The range, as in `Rule`.
    """
    metadata = {"rule": Rule(help_text, **limits), "recorded_if_set": recorded_if_set}
    return field(default=default, metadata=metadata)


def rules(settings_type: type) -> dict[str, Rule]:
    """Return the rule of each setting that a settings class declares, by name."""
    return {f.name: f.metadata["rule"] for f in dataclasses.fields(settings_type)}


def check_ranges(settings: Any) -> None:
    """Raise RequestError for the first setting of a wrong type or outside its valid range.

    Numbers of other types, such as NumPy's, become those of Python, which records can hold.
    """
    for field_of_settings in dataclasses.fields(settings):
        name, rule = field_of_settings.name, field_of_settings.metadata["rule"]
        value = plain_number(getattr(settings, name))
        object.__setattr__(settings, name, value)
        expected = _expected_type(field_of_settings.type, value)
        if expected is None and not rule.allows(value):
            expected = rule.describe_range()
        if value is None and expected is None and field_of_settings.default is not None:
            expected = "a value; leave it out for the default"
        if expected is not None:
            text = f'"{value}"' if isinstance(value, str) else value
            raise RequestError(f"{name}: got {text}, expected {expected}")


def plain_number(value: Any) -> Any:
    """Return a number or a truth value, such as NumPy's, as that of Python; others unchanged."""
    if type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _expected_type(annotation: Any, value: Any) -> str | None:
    """Return what a number, flag or text should have been, or None if its type is right."""
    members = get_args(annotation) or (annotation,)
    if value is None and (type(None) in members or Any in members):
        return None
    scalars = {member for member in members if member is not type(None)}
    if scalars == {bool}:
        return None if isinstance(value, bool) else "true or false"
    if scalars == {int}:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return None if whole else "a whole number"
    if scalars == {float}:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return None if number else "a number"
    if scalars == {str}:
        return None if isinstance(value, str) else "text"
    return None


S = TypeVar("S")


def make_settings(settings_type: type[S], base: S | None, changes: Mapping[str, Any]) -> S:
    """Return settings from keyword arguments.

    Args:
        settings_type: One of the settings classes.
        base: Settings to start from, or None for the defaults.
        changes: Values by name; they override those of `base`.

    Raises:
        RequestError: For an unknown name (the nearest known one is suggested), an invalid value, or
            a base of another class.
    """
    if not isinstance(base, settings_type | None):
        raise RequestError(
            f"settings: got {type(base).__name__}, expected {settings_type.__name__}, such as "
            f"rs.{settings_type.__name__}()"
        )
    names = [f.name for f in dataclasses.fields(settings_type)]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise RequestError(f'unknown setting "{name}"{suggest(name, names)}')
    if base is None:
        return settings_type(**changes)
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


F = TypeVar("F", bound=Callable[..., Any])


def accepts_settings(settings_type: type, omit: Sequence[str] = ()) -> Callable[[F], F]:
    """Show the fields of a settings class in the signature of a function that takes `**changes`.

    The function builds its settings with `make_settings(settings_type, settings, changes)`; this
    decorator makes `help()` and notebooks list the fields, except those in `omit`, as keyword
    arguments with their types and defaults.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = [
            p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters += [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type
            )
            for f in dataclasses.fields(settings_type)
            if f.name not in omit and f.name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def suggest(name: str, valid_names: Sequence[str]) -> str:
    """Return '; did you mean "..."?' with the nearest valid name, else the list of valid names."""
    nearest = difflib.get_close_matches(name, valid_names, 1, 0.5)
    if nearest:
        return f'; did you mean "{nearest[0]}"?'
    return f"; expected one of {', '.join(valid_names)}"


def to_record(settings: Any) -> dict[str, Any]:
    """Return settings as JSON-able values, for records and store keys.

    Threat models and objectives become text; nested settings become dictionaries.
    """
    values = {f: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return {
        f.name: _plain(value)
        for f, value in values.items()
        if not (f.metadata["recorded_if_set"] and value == f.default)
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, ThreatModel):
        return str(value)
    if is_settings(value):
        return to_record(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return str(value)


def is_settings(value: Any) -> bool:
    """Return whether a value is an instance of a class of settings: each field has its rule."""
    return dataclasses.is_dataclass(value) and all(
        "rule" in f.metadata for f in dataclasses.fields(value)
    )


def _parse_threat(settings: Any, name: str = "threat") -> None:
    object.__setattr__(settings, name, ThreatModel.parse(getattr(settings, name)))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Return the numbers of a text such as "0.4,0.6" or "1/3,1/3,1/3".

    Raises:
        ValueError: The text is something else.
    """
    try:
        return tuple(map(_parse_number, text.split(",")))
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _parse_number(text: str) -> float:
    """Return the finite number that "0.4" or "1/3" spells; Fraction would write out 1e999999999."""
    numerator, slash, denominator = text.partition("/")
    number = int(numerator) / int(denominator) if slash else float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text.strip()} is no finite number")
    return number


def _check_parts(settings: Any) -> None:
    """Check that each part of an accumulated batch has the two images that BatchNorm needs."""
    images, parts = settings.batch_size, settings.accumulate
    if parts > 1 and images < 2 * parts:
        raise RequestError(
            f"accumulate: got {parts} parts of a batch of {images} images, expected at most "
            f"{images // 2}"
        )


def _parse_union(settings: Any) -> None:
    """Parse `also`, and check that several threats come with a way to combine them."""
    also = settings.also
    if isinstance(also, str | ThreatModel):
        also = (also,)
    also = tuple(ThreatModel.parse(threat) for threat in also)
    object.__setattr__(settings, "also", also)
    threats = (settings.threat, *also)
    names = [str(threat) for threat in threats]
    if also and any(threat.is_clean for threat in threats):
        raise RequestError(
            f"threat: got {', '.join(names)}; clean is no attack to combine with others: for clean "
            'images too, take the objective "mixed A"'
        )
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"threat: got {duplicate} twice, expected different threats")
    if also and settings.combine is None:
        raise RequestError(
            f"combine: got {len(names)} threats ({', '.join(names)}), expected max, mean or random"
        )
    if settings.combine is not None and not also:
        raise RequestError(
            f"combine: got {settings.combine} with one threat ({names[0]}), expected several"
        )


def _parse_early_stop(settings: Any) -> None:
    value = settings.early_stop
    if isinstance(value, bool):
        value = EarlyStop() if value else None
    elif isinstance(value, Mapping):
        value = make_settings(EarlyStop, None, value)
    object.__setattr__(settings, "early_stop", value)


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Early stopping: return the epoch with the lowest loss on `val`, not the last one.

    The loss is the cross-entropy under attack in training, and the objective in learning.
    """

    steps: int = setting(10, "APGD steps of the measurement.", ge=1)
    samples: int | None = setting(
        None, "Samples of val to measure on; by default all but those that confirm finalists.", ge=1
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self)


COMBINATIONS = ("max", "mean", "random")
"""Ways to combine several threats."""
COMBINE_HELP = (
    "How several threats are combined: max (each image under its worst threat), mean (the mean of "
    "the losses) or random (one threat in each step)."
)
SCHEDULE_HELP = (
    'Learning-rate schedule: cosine, constant, one-cycle, "one-cycle P", cyclic, or '
    "{milestones = [75, 113], gamma = 0.1} in a recipe."
)
BATCHNORM_HELP = (
    "BatchNorm where several processes share a batch: per-rank (each normalises its own "
    "images, and running statistics are averaged) or sync (statistics of the whole batch)."
)
ACCUMULATE_HELP = (
    "Gradient accumulation: number of parts in which a batch is passed, one after another, to save "
    "memory; BatchNorm normalises, and updates its running statistics, by part."
)
RECOMPUTE_HELP = (
    "Activation checkpointing: keep only the inputs of the network's blocks and recompute the rest "
    "in the backward pass; less memory, more time, the same bits."
)
TRANSFORM_HELP = (
    "Augmentation of training images in place of the data's own: package.module:name of a function "
    "of one image, or of a transform of torchvision.transforms.v2."
)
OBJECTIVE_HELP = (
    'Objective: ce, "mixed A" (A is the weight of the clean loss), trades, "trades B" (B is the '
    "weight of the KL term) or package.module:function."
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Adversarial training by SGD. The defaults are those of the paper's fine-tuning.

    Source: Huang, Adversarial Learned Soups, sections 2 and 4.
    """

    threat: ThreatModel = setting(
        LINF_8, 'Threat model to train against, such as "Linf 8/255", "L2 0.5" or clean.'
    )
    also: tuple[ThreatModel, ...] = setting(
        (), "More threat models, trained against together with the first.", recorded_if_set=True
    )
    combine: str | None = setting(None, COMBINE_HELP, choices=COMBINATIONS, recorded_if_set=True)
    objective: Any = setting("ce", OBJECTIVE_HELP)
    attack_steps: int = setting(2, "APGD steps of each training attack.", ge=1)
    epochs: int = setting(10, "Passes over the training split.", ge=1)
    batch_size: int = setting(128, "Images in a batch.", ge=2)
    lr: float = setting(1e-3, "Learning rate.", gt=0)
    momentum: float = setting(0.9, "Momentum of SGD.", ge=0, lt=1)
    weight_decay: float = setting(0.0, "Weight decay.", ge=0)
    schedule: str | Mapping[str, Any] = setting("cosine", SCHEDULE_HELP)
    label_smoothing: float = setting(
        0.0, "Share of each label that is spread over all classes.", ge=0, lt=1
    )
    weight_decay_bn: bool = setting(True, "Apply weight decay to BatchNorm's weight and bias too.")
    nesterov: bool = setting(False, "Use Nesterov momentum.")
    clip_grad: float | None = setting(None, "Largest norm of the gradient.", gt=0)
    bn_momentum: float | None = setting(
        None,
        "Momentum of BatchNorm's running statistics; the network's own by default.",
        gt=0,
        le=1,
    )
    ema: float = setting(
        0.0,
        "Decay of an exponential moving average of the weights, such as 0.995, which is then "
        "measured, saved and returned; 0 for none.",
        ge=0,
        lt=1,
    )
    synthetic: Any = setting(
        None, "An .npz file of generated images (image, label) to mix into each batch."
    )
    synthetic_fraction: float = setting(
        0.7, "Share of each batch that is synthetic, if synthetic is set.", ge=0, lt=1
    )
    batchnorm: str = setting("per-rank", BATCHNORM_HELP, choices=("per-rank", "sync"))
    transform: Any = setting(None, TRANSFORM_HELP, recorded_if_set=True)
    accumulate: int = setting(1, ACCUMULATE_HELP, ge=1, recorded_if_set=True)
    recompute_activations: bool = setting(False, RECOMPUTE_HELP, recorded_if_set=True)
    early_stop: EarlyStop | None = setting(
        None, "Return the epoch with the lowest robust loss on val, not the last one."
    )
    seed: int = setting(0, "Seed of the sample order, augmentation and noise.", ge=0, lt=SEED_LIMIT)
    precision: str = setting("auto", "Arithmetic of training.", choices=PRECISIONS)

    def __post_init__(self) -> None:
        """Parse the threat models and check the ranges."""
        _parse_threat(self)
        _parse_early_stop(self)
        check_ranges(self)
        _check_parts(self)
        _parse_union(self)
        if self.nesterov and not self.momentum:
            raise RequestError("nesterov: requires momentum above 0; got momentum 0")

    @property
    def threats(self) -> tuple[ThreatModel, ...]:
        """All threat models: the first, and those that are combined with it."""
        return (self.threat, *self.also)


PRETRAIN_DEFAULTS: Mapping[str, Any] = {
    "epochs": 150,
    "lr": 0.1,
    "schedule": {"milestones": [75, 113], "gamma": 0.1},
}
"""Defaults of the recipe table [pretrain] that differ from those of TrainSettings, as in the paper.
`robustsoup train` takes only the lr, and only for fresh weights; `train` in Python takes none."""


@dataclass(frozen=True, kw_only=True)
class DialSettings:
    """Settings of a dial, which learns a line of soups from robust (t = 0) to clean (t = 1)."""

    by: str = setting(
        "objective",
        "What t controls: objective (the weight of the clean loss) or eps (the attack's radius).",
        choices=("objective", "eps"),
    )
    turn_every: int = setting(4, "Steps after which a new t is drawn.", ge=1)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """Learning the coefficients of a soup. The defaults are the paper's.

    Source: Huang, Adversarial Learned Soups, section 3.
    """

    threat: ThreatModel = setting(
        LINF_8, 'Threat model to learn against, such as "Linf 8/255", "L2 0.5" or clean.'
    )
    also: tuple[ThreatModel, ...] = setting(
        (), "More threat models, learned against together with the first.", recorded_if_set=True
    )
    combine: str | None = setting(None, COMBINE_HELP, choices=COMBINATIONS, recorded_if_set=True)
    objective: Any = setting("ce", OBJECTIVE_HELP)
    attack_steps: int = setting(2, "APGD steps of each training attack.", ge=1)
    epochs: int = setting(30, "Passes over the training split.", ge=1)
    batch_size: int = setting(128, "Images in a batch.", ge=2)
    lr: float = setting(10.0, "Learning rate of the logits, or of affine weights.", gt=0)
    momentum: float = setting(0.9, "Momentum of SGD.", ge=0, lt=1)
    schedule: str | Mapping[str, Any] = setting("cosine", SCHEDULE_HELP)
    detach: float = setting(
        0.8, "Detach dropout: probability that a layer gets no update in a step.", ge=0, le=1
    )
    init: str = setting(
        "xavier",
        "Where learning starts: xavier (random), zeros (the uniform soup), or weights of the "
        "ingredients in their order, such as 0.4,0.6.",
    )
    affine: bool = setting(
        False,
        "Learn weights that sum to 1 and may be negative, instead of a softmax.",
        recorded_if_set=True,
    )
    average_last: float = setting(
        0.0,
        "Return the mean of the coefficients over this last share of the steps.",
        ge=0,
        lt=1,
        recorded_if_set=True,
    )
    clean_limit: float | None = setting(
        None,
        "Minimise the robust loss among soups whose mean clean loss is at most this, in nats, "
        "instead of the objective.",
        gt=0,
        recorded_if_set=True,
    )
    granularity: str = setting(
        "parameter",
        "What shares one set of weights: parameter, module, block, model or re:PATTERN on names.",
    )
    buffers: str = setting(
        "tracked",
        "BatchNorm statistics of the network that is attacked while learning.",
        choices=BUFFER_POLICIES,
    )
    batchnorm: str = setting("per-rank", BATCHNORM_HELP, choices=("per-rank", "sync"))
    transform: Any = setting(None, TRANSFORM_HELP, recorded_if_set=True)
    accumulate: int = setting(1, ACCUMULATE_HELP, ge=1, recorded_if_set=True)
    recompute_activations: bool = setting(False, RECOMPUTE_HELP, recorded_if_set=True)
    early_stop: EarlyStop | None = setting(
        None, "Return the epoch with the lowest objective on val, not the last one."
    )
    dial: DialSettings | None = setting(
        None, "Learn a dial, the whole trade-off in one run, instead of one soup."
    )
    seed: int = setting(0, "Seed of the sample order, augmentation and noise.", ge=0, lt=SEED_LIMIT)
    precision: str = setting("auto", "Arithmetic of learning.", choices=PRECISIONS)

    def __post_init__(self) -> None:
        """Parse the threat model and check the ranges."""
        _parse_threat(self)
        _parse_early_stop(self)
        if isinstance(self.dial, Mapping):
            object.__setattr__(self, "dial", make_settings(DialSettings, None, self.dial))
        check_ranges(self)
        _check_parts(self)
        _parse_union(self)
        if self.dial is not None and self.also:
            raise RequestError("threat: a dial turns one threat from robust to clean; got several")
        for name in ("affine", "average_last"):
            if self.dial is not None and getattr(self, name):
                raise RequestError(f"{name}: does not apply to a dial, a line of softmaxes")
        if self.average_last and self.early_stop is not None:
            raise RequestError("average_last: early_stop returns one epoch; leave one of them out")
        self._check_clean_limit()
        self._check_start_weights()

    @property
    def threats(self) -> tuple[ThreatModel, ...]:
        """All threat models: the first, and those that are combined with it."""
        return (self.threat, *self.also)

    @property
    def start_weights(self) -> tuple[float, ...] | None:
        """The weights that `init` lists, or None for "xavier" and "zeros"."""
        if self.init in ("xavier", "zeros"):
            return None
        try:
            return parse_numbers(self.init)
        except ValueError:
            raise RequestError(
                f'init: got "{self.init}", expected xavier, zeros or weights such as 0.4,0.6'
            ) from None

    def check_start(self, n: int) -> None:
        """Raise RequestError if `init` lists the weights of another number of ingredients."""
        weights = self.start_weights
        if weights is not None and len(weights) != n:
            raise RequestError(f"init: got {len(weights)} weights, expected {n}, one an ingredient")

    def _check_clean_limit(self) -> None:
        if self.clean_limit is None:
            return
        if self.dial is not None:
            raise RequestError(
                "clean_limit: does not apply to a dial, which learns every trade-off"
            )
        if str(self.objective) != "ce":
            raise RequestError(
                f"clean_limit: got the objective {self.objective}, but the robust loss is what is "
                "minimised; leave objective out"
            )
        if self.early_stop is not None:
            raise RequestError(
                "clean_limit: no single figure tells the best epoch; leave early_stop out"
            )
        if self.threat.is_clean:
            raise RequestError("clean_limit: requires a threat; got clean")

    def _check_start_weights(self) -> None:
        weights = self.start_weights
        if weights is None:
            return
        if not abs(sum(weights) - 1) <= 1e-6 or (min(weights) < 0 and not self.affine):
            signs = "" if self.affine else " and are at least 0"
            raise RequestError(f"init: got {self.init}, expected weights that sum to 1{signs}")


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """The attack of an evaluation. The defaults are the paper's protocol.

    Source: Croce and Hein 2020, arXiv:2003.01690; L1: Croce and Hein 2021, arXiv:2103.01208.
    """

    attack: str | Callable[..., Any] = setting(
        "apgd",
        "Attack: apgd, pgd (a baseline), pma, malt, square (without gradients), strong (pma, malt "
        "and square), autoattack (the standard four; requires the extra robustsoup[autoattack]) "
        "or package.module:function.",
    )
    loss: str | Callable[..., Any] = setting(
        "ce",
        'Loss that apgd and pgd maximise: ce, dlr, "targeted dlr", margin (for 2 classes or more), '
        '"targeted margin" or "probability margin"; other attacks have their own.',
    )
    steps: int = setting(100, "Steps of APGD or PGD.", ge=1)
    n_queries: int = setting(
        5000,
        "Queries of each restart of square. In strong it leaves a sample early if it makes less "
        "progress than the gradient attacks did.",
        ge=1,
    )
    restarts: int = setting(1, "Random restarts.", ge=1)
    targets: int = setting(
        9, "Other classes that a targeted loss, malt and strong try; the most promising.", ge=1
    )
    eot: int = setting(1, "Passes to average each gradient over, for stochastic networks.", ge=1)
    seed: int = setting(0, "Seed of the attack's noise.", ge=0, lt=SEED_LIMIT)
    precision: str = setting(
        "float32",
        "Arithmetic of the search; every verdict is computed in float32.",
        choices=PRECISIONS,
    )
    batch_size: int | None = setting(
        None, "Most images in a pass: by default 500 on a GPU; on a CPU at most 32.", ge=1
    )
    masking_check: bool = setting(
        True,
        "Look for masked gradients on a part of the survivors, on a budget of 5 % of the attack's "
        "passes; this never changes a verdict.",
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_ranges(self)
        attack = self.attack
        if isinstance(attack, str) and ":" not in attack and ATTACKS.find(attack) is None:
            names = ", ".join(ATTACKS.all_entries())
            raise RequestError(f'attack: got "{attack}", expected one of {names}')
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise RequestError(f'loss: got "{self.loss}", expected one of {", ".join(LOSSES)}')
        if self.own_loss and self.loss != "ce":
            raise RequestError(
                f'loss: got "{self.loss_text}" with attack "{attack}", which has its own; '
                "leave loss out"
            )

    @property
    def is_queued(self) -> bool:
        """Whether the attack is one of QUEUED_ATTACKS."""
        return self.attack in QUEUED_ATTACKS

    @property
    def attacks_each_alone(self) -> bool:
        """Whether each sample is attacked by itself, whatever others the call holds."""
        return self.is_queued or self.attack in ("square", "strong")

    @property
    def steps_taken(self) -> int:
        """Steps of each search: `n_queries` for square, else `steps`."""
        return self.n_queries if self.attack == "square" else self.steps

    @property
    def trial_queries(self) -> int:
        """Queries after which strong may leave a sample: a twentieth of all, at least 250."""
        return min(max(self.n_queries // 20, 250), self.n_queries)

    def most_passes(self, classes: int) -> int:
        """Return the passes that a survivor takes; a step, with its gradient, counts as two.

        Attacks of users, whose passes are unknown here, count as APGD. The first Square of strong
        counts as its trial, with which it ends unless gradients are masked. AutoAttack takes 100
        steps of APGD on the cross-entropy and for each target, 100 steps of FAB for each target, at
        three passes a step, and 5000 queries of Square.

        Args:
            classes: Number of classes, all but one of which may be targets.
        """
        if self.attack == "autoattack":
            targets = min(AUTOATTACK_TARGETS, classes - 1)
            return 2 * 100 * (1 + targets) + 3 * 100 * targets + 5000
        searches = min(self.targets, classes - 1) if self.tries_targets else 1
        steps, queries = 2 * self.steps * self.eot * searches, 0
        if self.attack == "strong":  # pma comes before the targets, and square after them
            steps = steps + 2 * self.steps * self.eot
            return steps * self.restarts + self.trial_queries + self.n_queries * (self.restarts - 1)
        if self.attack == "square":
            steps, queries = 0, self.n_queries
        return (steps + queries) * self.restarts

    @property
    def ranks_by_logits(self) -> bool:
        """Whether the attack needs the logits of clean images, to choose target classes."""
        if self.own_loss or not isinstance(self.loss, str):
            return False
        return bool(LOSSES[self.loss].facts.get("targeted", False))

    @property
    def reads_clean_logits(self) -> bool:
        """Whether verdicts depend on the logits of clean images, beyond the predicted class."""
        return self.ranks_by_logits or self.attack == "strong"  # Square in it compares margins

    @property
    def tries_targets(self) -> bool:
        """Whether the attack moves each image towards `targets` classes in turn."""
        return self.ranks_by_logits or self.attack in ("malt", "strong")

    @property
    def own_loss(self) -> str | None:
        """The loss of an attack of OWN_LOSSES; None for any other attack."""
        return OWN_LOSSES.get(self.attack) if isinstance(self.attack, str) else None

    @property
    def loss_name(self) -> str:
        """The attack's own loss, else the setting `loss`, as text."""
        return self.own_loss or self.loss_text

    @property
    def loss_text(self) -> str:
        """The setting `loss` as text."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", "custom")


@dataclass(frozen=True, kw_only=True)
class BufferSettings:
    """The policy for BatchNorm's running statistics in a soup."""

    buffers: str | None = setting(
        None,
        "BatchNorm statistics: base, average, recalibrate, recalibrate-adversarial or tracked; "
        "by default tracked for a learned soup, recalibrate for ends of a subspace, else average.",
        choices=BUFFER_POLICIES,
    )
    calibrate_samples: int = setting(
        10_000, "Training samples that the recalibrating policies measure statistics on.", ge=2
    )
    calibrate_threat: ThreatModel = setting(LINF_8, "Threat model of recalibrate-adversarial.")
    attack_steps: int = setting(2, "APGD steps of recalibrate-adversarial.", ge=1)
    seed: int = setting(0, "Seed of the calibration samples and noise.", ge=0, lt=SEED_LIMIT)

    def __post_init__(self) -> None:
        """Parse the threat model and check the ranges."""
        _parse_threat(self, "calibrate_threat")
        check_ranges(self)


def parse_duration(text: str) -> float:
    """Return the seconds of a time such as "90s", "30m" or "1h30m".

    Raises:
        RequestError: For any other form, and for 0.
    """
    match = re.fullmatch(r"(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?", text.strip())
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise RequestError(f'time_limit: got "{text}", expected a time such as 90s, 30m or 1h30m')
    return float(total)


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """The settings of the merging methods, which do more than average weights."""

    scale: float = setting(
        1.0,
        "Factor of the mean task vector of task-arithmetic, ties and dare; with 1, task-arithmetic "
        "is the average.",
        gt=0,
    )
    density: float = setting(
        0.2, "Share of the entries of each task vector that ties and dare keep.", gt=0, le=1
    )
    blocks: tuple[str, ...] = setting(
        (),
        "Blocks that swap takes from the second checkpoint, by the beginning of their parameters' "
        "names, such as residual1; repeatable.",
    )
    measure_samples: int = setting(
        1000, "Training samples that fisher and regmean attack and measure on.", ge=1
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        blocks = self.blocks
        object.__setattr__(self, "blocks", (blocks,) if isinstance(blocks, str) else tuple(blocks))
        check_ranges(self)


SMALLEST_STEP = 1e-4
"""Smallest step of a grid of soups."""
ALL_METHODS = "all"
"""The method of a search that joins several; a recipe has a table for each of them instead."""
MOST_SOUPS = 5_000
"""Most soups of one search or recipe."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The soups that a search tries, and the rules by which it selects one."""

    method: str | Callable[..., Any] = setting(
        "grid",
        "Soups to try: grid, surrogate (attacks few soups of the grid and predicts the others), "
        "line, uniform, greedy, learned, dial, all (surrogate, learned, dial and greedy), a method "
        "that merges (slerp, swap, task-arithmetic, ties, dare, model-stock, fisher or regmean) or "
        "package.module:function.",
    )
    step: float = setting(
        0.2, "Step of the grid; 1 must be a multiple of it.", ge=SMALLEST_STEP, le=1
    )
    weights: str = setting(
        "grid",
        "Weights of the ingredients that a merging method tries: grid (multiples of step) or "
        "uniform.",
        choices=("grid", "uniform"),
    )
    max_soups: int = setting(2000, "Refuse grids with more soups than this.", ge=1, le=MOST_SOUPS)
    sweep: str = setting(
        "eps",
        "What method learned varies from soup to soup: eps (no attack, and a quarter, a half, once "
        "and twice the radius of the first threat) or alpha (the weight of the clean loss, 0 to 1 "
        "in steps of 0.2).",
        choices=("eps", "alpha"),
    )
    score: str | None = setting(
        None, 'Score that the greedy soup must not lower, such as "0.3 clean + 0.7 Linf 8/255".'
    )
    require: tuple[str, ...] = setting((), 'Requirement such as "clean>=0.85"; repeatable.')
    maximise: str | None = setting(
        None,
        "What to maximise: a threat, clean, union, shift, a weighted sum of these, or knee; by "
        "default the first threat.",
    )
    point: bool = setting(
        False,
        "Check requirements by the estimate, which guarantees nothing, not by its lower bound.",
    )
    tolerance: float = setting(
        0.005,
        "Accuracy that the surrogate's answer may lose to the best soup; 0.005 is half a point.",
        gt=0,
        lt=1,
    )
    time_limit: str | None = setting(
        None,
        "Time limit, such as 90s, 30m or 1h30m: one soup is always tried, no other is begun that "
        "is expected to end later, and the answer says how many were left out.",
    )
    screen: bool = setting(
        False, "Attack every soup briefly, and in full only those that can win or be on the front."
    )
    screen_steps: int = setting(10, "Steps of the short attack.", ge=1)

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("score", "maximise"):  # a threat model or a score becomes its text
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))
        object.__setattr__(self, "require", _list_requirements(self.require))
        check_ranges(self)
        if isinstance(self.method, str) and self.method != ALL_METHODS:
            SOUP_METHODS.get_entry(self.method)
        if self.time_limit is not None:
            parse_duration(self.time_limit)
        if self.sweep != "eps" and self.method not in ("learned", ALL_METHODS):
            raise RequestError(f'sweep: applies to method "learned", got "{self.method}"')
        if abs(round(1 / self.step) * self.step - 1) > 1e-9:
            raise RequestError(
                f"step: got {self.step}, expected a fraction of 1 such as 0.2 or 0.25"
            )


def _list_requirements(value: Any) -> tuple[str, ...]:
    """Return requirements as texts, from one text, a list, or {"clean": 0.85}."""
    if isinstance(value, Mapping):
        return tuple(f"{key}>={threshold}" for key, threshold in value.items())
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (str(value),)
    return tuple(map(str, value))


@dataclass(frozen=True, kw_only=True)
class LandscapeSettings:
    """The plane through three checkpoints and the loss on a grid of its points."""

    threat: ThreatModel = setting(LINF_8, "Threat model of the loss.")
    attack_steps: int = setting(10, "APGD steps; the highest loss of each sample counts.", ge=1)
    points: int = setting(21, "Points along each side.", ge=2)
    samples: int = setting(2000, "Most samples to measure on, drawn by the seed.", ge=1)
    buffers: str = setting(
        "recalibrate",
        "BatchNorm statistics at each point.",
        choices=("base", "recalibrate", "recalibrate-adversarial"),
    )
    calibrate_samples: int = setting(
        10_000, "Training samples that statistics are measured on.", ge=2
    )
    seed: int = setting(0, "Seed of the samples and noise.", ge=0, lt=SEED_LIMIT)
    precision: str = setting("auto", "Arithmetic of the attack.", choices=PRECISIONS)

    def __post_init__(self) -> None:
        """Parse the threat model and check the ranges."""
        _parse_threat(self)
        check_ranges(self)
