"""The command that mixes checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustsoup.catalog import BUFFER_POLICIES, SOUP_METHODS, Registry
from robustsoup.cli.options import (
    Base,
    DataOptions,
    Fields,
    Files,
    Given,
    NetworkOptions,
    RunOptions,
    flag,
)
from robustsoup.cli.terminal import print_line, print_warning
from robustsoup.errors import CoefficientError, RequestError
from robustsoup.settings import BufferSettings, MergeSettings, parse_numbers, rules
from robustsoup.soups.method_keys import find_unread
from robustsoup.threats import ThreatModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from robustsoup.checkpoints.checkpoint import Checkpoint
    from robustsoup.soups.coefficients import Coefficients


def mix_command(
    checkpoints: Files,
    output: Annotated[
        Path,
        typer.Option(
            "-o", help="Soup to write: .safetensors, or .pth in the format of the first checkpoint."
        ),
    ],
    data: Annotated[
        DataOptions,
        Fields(
            defaults={"data": ""},
            helps={
                "data": "Data for the recalibrating --buffers, and for --method fisher and "
                "regmean; uses its training split."
            },
        ),
    ],
    soup: Annotated[BufferSettings, Fields(only=("buffers",))],
    merging: Annotated[MergeSettings, Fields()],
    network: NetworkOptions,
    run: RunOptions,
    given: Given,
    method: Annotated[
        str | None,
        typer.Option(
            help="Merge by a method instead of the average: slerp, swap, task-arithmetic, ties, "
            "dare, model-stock, fisher, regmean or package.module:function; --coefficients are "
            "then its weights."
        ),
    ] = None,
    coefficients: Annotated[
        str | None,
        typer.Option(
            help="One number for each checkpoint, such as 1/3,1/3,1/3, or a coefficients file; "
            "uniform by default."
        ),
    ] = None,
    at: Annotated[
        float | None,
        typer.Option(
            help="Position on a dial, or between the two ends of a line of `train --subspace`, "
            "from 0 (robust) to 1 (clean).",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    threat: Annotated[
        str,
        typer.Option(
            help="Threat model of --buffers recalibrate-adversarial, and of --method fisher and "
            "regmean."
        ),
    ] = "clean",
    allow_leakage: Annotated[
        bool,
        typer.Option(
            "--allow-leakage",
            help="Let --method fisher and regmean measure although an ingredient was trained on "
            "another split of --data.",
        ),
    ] = False,
) -> None:
    """Average checkpoints with given coefficients, or merge them by a method.

    Writes one ordinary checkpoint of the same network.

    Example: `robustsoup mix eps16.safetensors eps96.safetensors --coefficients 0.5,0.5
    -o soup.safetensors`
    """
    from robustsoup.checkpoints.wrapping import PICKLE_ENDINGS
    from robustsoup.cli.inputs import (
        check_output_file,
        load_requested_data,
        make_context,
        open_checkpoints,
        print_notes,
    )
    from robustsoup.cli.progress import Bar
    from robustsoup.device import resolve_device
    from robustsoup.soups.batchnorm import running_statistics
    from robustsoup.soups.coefficients import Coefficients
    from robustsoup.soups.merging import merge
    from robustsoup.soups.mixing import default_buffer_policy, mix
    from robustsoup.soups.subspace import point_on_line, spans_subspace

    check_output_file(output, (".safetensors", *PICKLE_ENDINGS))
    _check_method(method, given, base, soup.buffers)
    if network.normalize and not (data.data or network.model):
        raise RequestError("mix: --normalize requires --model or --data")
    run.use_threads()
    ingredients = open_checkpoints(checkpoints, network.opening)
    opened_base = None if base is None else network.opening.open(base)
    alpha = (
        Coefficients.of(point_on_line(ingredients, at))
        if at is not None and coefficients is None
        else parse_coefficients(coefficients, len(checkpoints), at)
    )
    policy = soup.buffers or ("average" if method else default_buffer_policy(alpha))
    is_point = soup.buffers is None and policy == "average" and spans_subspace(ingredients)
    if is_point and running_statistics(ingredients[0]):
        policy = _recalibrate_point(data.data)
    split = None
    if data.data:
        source = load_requested_data(data, network, checkpoints)
        context = make_context(source, network, run, checkpoints)
        ingredients = [context.record_network(item) for item in ingredients]
        split = source.train
    elif network.model:
        ingredients = _name_network(network, ingredients)
    with Bar("mixing" if method is None else f"merging by {method}"):
        if method is None:
            mixed = mix(
                ingredients,
                alpha,
                buffers=policy,
                base=opened_base,
                calibrate_on=split,
                threat=ThreatModel.parse(threat),
                device=resolve_device(run.device),
                seed=data.seed,
            )
        else:
            mixed = merge(
                ingredients,
                method,
                alpha,
                merging,
                base=opened_base,
                data=split,
                threat=threat,
                buffers=policy,
                allow_leakage=allow_leakage,
                device=resolve_device(run.device),
                seed=data.seed,
            )
    mixed.save(output)
    print_notes(mixed)
    for warning in mixed.warnings:
        print_warning(warning)
    verb = "mixed" if method is None else f"merged by {method}"
    print_line(f"{output}: {len(ingredients)} ingredients {verb}, BatchNorm statistics: {policy}")


def _recalibrate_point(data: str) -> str:
    """Return the policy for ends of a subspace, whose statistics are measured at each point."""
    if not data:
        raise RequestError(
            "mix: BatchNorm statistics of a point between the ends of a subspace are measured on "
            "training data; give --data, or --buffers average"
        )
    return "recalibrate"


def _check_method(
    method: str | None, given: "Given", base: Path | None, buffers: str | None
) -> None:
    """Refuse options that nothing would read, and import the user's functions among them."""
    from robustsoup.user_code import import_named_module

    for name in (method, buffers):
        import_named_module(name)
    _check_meanings(method, given, buffers)
    entry = None if method is None else SOUP_METHODS.get_entry(method)
    takes_base = entry is not None and (
        ":" in entry.name or "base" in entry.facts.get("requires", ())
    )
    if base and buffers != "base" and not takes_base:
        raise RequestError("--base: requires --buffers base, or a --method that takes a base")


def _check_meanings(method: str | None, given: "Given", buffers: str | None) -> None:
    """Refuse options that neither the method nor the buffer policy reads."""
    names = [name for name in (*rules(MergeSettings), "allow_leakage") if name in given]
    if method is None and names:
        raise RequestError(f"{flag(names[0])}: requires --method")
    if method is not None and ":" not in method:
        measures = "data" in SOUP_METHODS.get_entry(method).facts.get("requires", ())
        checked = [name for name in names if not (measures and name == "allow_leakage")]
        if unread := find_unread(checked, [method]):
            raise RequestError(f"{flag(unread)}: has no meaning with --method {method}")
    if "threat" in given and not (
        _attacks(SOUP_METHODS, method) or _attacks(BUFFER_POLICIES, buffers)
    ):
        raise RequestError(
            "--threat: requires --buffers recalibrate-adversarial, or a --method that attacks "
            "training images, such as fisher"
        )


def _attacks(registry: Registry, name: str | None) -> bool:
    """Return whether a method or policy attacks training images; a function of the user's may."""
    if name is None:
        return False
    if ":" in name:
        return True
    facts = registry.get_entry(name).facts
    return "threat" in (*facts.get("requires", ()), *facts.get("needs", ()))


def _name_network(
    network: NetworkOptions, ingredients: "Sequence[Checkpoint]"
) -> "list[Checkpoint]":
    """Return the ingredients with the network that the user names, in the size of the first."""
    from robustsoup.checkpoints.network import infer_sizes, record_network
    from robustsoup.models import NetworkSettings
    from robustsoup.models.network import channel_constants
    from robustsoup.user_code import import_named_module

    import_named_module(network.model)
    named = NetworkSettings(network.model or "", normalize=channel_constants(network.constants))
    settings = infer_sizes(named, ingredients[0])
    return [record_network(item, settings, named=True) for item in ingredients]


def parse_coefficients(text: str | None, count: int, at: float | None) -> "Coefficients":
    """Parse --coefficients and --at.

    Args:
        text: comma-separated numbers, a coefficients file, or None for uniform coefficients.
        count: Number of ingredients, for uniform coefficients.
        at: Position on a dial; requires a dial file in `text`.

    Raises:
        CoefficientError: The text is no list of numbers, or `at` is given without a dial.
    """
    from robustsoup.soups.coefficients import Coefficients, load_coefficients, uniform_coefficients

    if text is not None and Path(text).suffix == ".safetensors":
        return load_coefficients(text, at)
    if at is not None:
        raise CoefficientError("--at: requires a dial, such as --coefficients DIR/dial.safetensors")
    if text is None:
        return uniform_coefficients(count)
    try:
        return Coefficients.of(parse_numbers(text))
    except ValueError:
        raise CoefficientError(
            f"--coefficients: got {text}, expected numbers such as 1/3,1/3,1/3 or a file"
        ) from None
