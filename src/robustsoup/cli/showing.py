"""The command that shows what a checkpoint is, what it was made of, and who judged it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustsoup.cli.options import ADDRESSES, AsJson, CheckpointPlace
from robustsoup.cli.terminal import make_console, print_json, print_line, print_table
from robustsoup.printable import make_printable

if TYPE_CHECKING:
    from rich.tree import Tree

    from robustsoup.runs.description import Ancestor, Description


def show_command(
    checkpoint: Annotated[
        Path,
        CheckpointPlace(),
        typer.Argument(help=f"Checkpoint; or its address: {ADDRESSES}.", show_default=False),
    ],
    key: Annotated[
        str | None, typer.Option(help="Which weights to read, if the file holds several sets.")
    ] = None,
    adapter_base: Annotated[
        Path | None,
        CheckpointPlace(),
        typer.Option(help="Base of a LoRA adapter; by default the one that its files name."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is, what it was made of, and who judged it.

    Prints its network, its tensors, its ancestors as a tree, and the evaluations in its folder
    (or in its run folder) that judge exactly these weights. The content is compared with its
    digests.

    Example: `robustsoup show eps16.safetensors`
    """
    from robustsoup.cli.progress import Bar
    from robustsoup.runs.description import describe_checkpoint

    with Bar(f"reading {checkpoint.name}") as bar:
        description = describe_checkpoint(checkpoint, key, adapter_base=adapter_base)
        bar(1, 1, "")
    if as_json:
        print_json(description.to_json())
    else:
        _print_description(description)


def _print_description(description: "Description") -> None:
    checkpoint = description.checkpoint
    print_line(f"{checkpoint.name}: sha256 of the weights {checkpoint.digest}")
    if description.source:
        print_line(f"copied from: {description.source}")
    print_line(f"network: {_describe_network(description)}")
    _print_tensors(description)
    make_console().print(_draw_tree(description.tree))
    _print_stored_evaluations(description)
    for warning in checkpoint.warnings:
        print_line(f"warning: {warning}")
    for note in description.notes:
        print_line(f"note: {note}")


def _describe_network(description: "Description") -> str:
    from robustsoup.models import NetworkSettings

    if description.network is None:
        return "not recorded; commands need --model"
    network = NetworkSettings.from_record(description.network)
    constants = "" if network.normalize is None else ", normalizes its inputs"
    return f"{network.spec}, classes {network.classes}, channels {network.channels}{constants}"


def _print_tensors(description: "Description") -> None:
    from robustsoup.cli.tables import format_bytes
    from robustsoup.runs.description import describe_tensors

    tensors = describe_tensors(description.checkpoint)
    print_table(
        ("tensor", "role", "type", "shape", "size"),
        [
            (
                tensor["name"],
                tensor["role"],
                tensor["dtype"],
                " x ".join(map(str, tensor["shape"])) or "scalar",
                format_bytes(tensor["bytes"]),
            )
            for tensor in tensors
        ],
    )
    count = sum(tensor.numel() for tensor in description.checkpoint.tensors.values())
    size = format_bytes(sum(tensor["bytes"] for tensor in tensors))
    print_line(f"{len(tensors)} tensors, {count:,} numbers, {size}")


def _draw_tree(tree: "Ancestor") -> "Tree":
    from rich.tree import Tree

    root = Tree(_describe_ancestor(tree))
    _add_branches(root, tree)
    return root


def _add_branches(branch: "Tree", tree: "Ancestor") -> None:
    for parent in tree.parents:
        _add_branches(branch.add(_describe_ancestor(parent)), parent)


def _describe_ancestor(tree: "Ancestor") -> str:
    share = "" if tree.coefficient is None else f"{tree.coefficient:.3g} x "
    made = tree.made or "its file is not beside this one"
    return make_printable(f"{share}{tree.name} ({tree.digest[:12]}): {made}")


def _print_stored_evaluations(description: "Description") -> None:
    if not description.evaluations:
        print_line("judged by: no evaluation of these weights is beside the file")
        return
    print_line("judged by:")
    for evaluation in description.evaluations:
        scores = ", ".join(f"{name} {accuracy}" for name, accuracy in evaluation.accuracy.items())
        samples = next((accuracy.n for accuracy in evaluation.accuracy.values()), 0)
        print_line(
            f"  {evaluation.path.name}: {scores}; {samples} samples of {evaluation.data} "
            f"{evaluation.split}, {evaluation.attack}"
        )
        for finding in evaluation.masking_check:
            print_line(f"    masking check, {finding}")
        for warning in evaluation.warnings:
            print_line(f"    warning: {warning}")
