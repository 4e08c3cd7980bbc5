"""What commands answer, as text and tables for people."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from robustsoup.diagnosis.barriers import Pair
from robustsoup.diagnosis.check import Soupability
from robustsoup.evaluation.intervals import Accuracy


def print_results(stdout: Console, results: dict[str, Any], page: Path) -> None:
    """The table of a run, what was chosen, and where to look."""
    protocol = results["protocol"]
    split = (
        protocol["report_on"]
        if results["recipe"]["evaluate"]["report"] == "all"
        else protocol["select_on"]
    )
    shown = {
        row["name"]: row[split] for row in results["rows"] if row["role"] not in ("grid", "line")
    }
    by_test = protocol["select_on"] == protocol["report_on"]
    if shown:
        stdout.print(
            accuracy_table(
                shown, f"on {split}" + " (the paper's protocol: selected on test)" * by_test
            )
        )
    chosen = results["selection"]
    if chosen:
        stdout.print(
            f"on {protocol['select_on']}: {chosen['message']}", markup=False, soft_wrap=True
        )
        row = next(row for row in results["rows"] if row["name"] == chosen["chosen"])
        if row["test"]:
            text = ", ".join(
                f"{key} {_interval(accuracy)}" for key, accuracy in row["test"].items()
            )
            held = {
                None: "",
                True: "; the requirement also holds there",
                False: "; the requirement does not hold there",
            }
            stdout.print(
                f"on test: {text}{held[chosen['held_on_test']]}", markup=False, soft_wrap=True
            )
        stdout.print(f"soup: {page.parent / results['soup']}", markup=False, soft_wrap=True)
    stdout.print(f"look at: {page}", markup=False, soft_wrap=True)


def accuracy_table(rows: dict[str, dict[str, Any]], title: str | None = None) -> Table:
    """{name: {measure: accuracy as JSON}} as a table."""
    keys = list(next(iter(rows.values())))
    table = Table(
        Column("checkpoint", overflow="fold"), *keys, box=None, title=title, title_justify="left"
    )
    for name, accuracy in rows.items():
        table.add_row(name, *(_interval(accuracy[key]) for key in keys))
    return table


def _interval(accuracy: dict[str, Any]) -> str:
    return str(Accuracy(accuracy["hits"], accuracy["n"]))


def protocol(record: dict[str, Any]) -> str:
    """How an evaluation attacked, for the end of a line; nothing if it did not."""
    if not record["threats"]:
        return ""
    if record["attack"] == "autoattack":
        return f", AutoAttack, {record['version']}"
    searched = (
        ""
        if record["search_precision"] == "float32"
        else f", searched in {record['search_precision']}"
    )
    starts = f"{record['restarts']} restart{'s' * (record['restarts'] > 1)}"
    return f", {record['attack'].upper()}-{record['loss'].upper()} {record['steps']} steps, {starts}, float32{searched}"


def print_soupability(stdout: Console, found: Soupability, names: list[str], most: int) -> None:
    """The verdict, the pairs that are farthest apart (at most `most`), what was measured, and the warnings."""
    n = len(names)
    for number, problem in enumerate(found.problems):
        stdout.print(
            f"{'also' if number else 'cannot be mixed'}: {problem}", markup=False, soft_wrap=True
        )
    if found.soupable and n > 1:
        seen = (
            ""
            if found.measured
            else ", as far as their weights tell; --data measures the loss between them"
        )
        stdout.print(f"these {n} can be mixed{seen}", soft_wrap=True)
    if found.pairs:
        shown = sorted(found.pairs, key=lambda pair: -pair.distance)[:most]
        stdout.print(_pair_table(shown, names))
        if len(shown) < len(found.pairs):
            stdout.print(
                f"the {len(shown)} of {len(found.pairs)} pairs that are farthest apart; --pairs asks for more"
            )
    for line in _soupability_lines(found):
        stdout.print(line, markup=False, soft_wrap=True)
    for warning in found.warnings:
        stdout.print(f"warning: {warning}", markup=False, soft_wrap=True)


def _pair_table(pairs: list[Pair], names: list[str]) -> Table:
    threats = list(pairs[0].curves)
    columns = [f"{what}, {threat}" for threat in threats for what in ("barrier", "accuracy drop")]
    table = Table("first", "second", "distance", "cosine", *columns, box=None)
    for pair in pairs:
        cosine = "-" if pair.cosine is None else f"{pair.cosine:.3f}"
        curves = [
            text
            for c in pair.curves.values()
            for text in (f"{c.barrier:.3f}", f"{100 * c.drop:.1f} points")
        ]
        table.add_row(
            names[pair.a],
            names[pair.b],
            f"{pair.distance:.3g} ({pair.relative:.1%})",
            cosine,
            *curves,
        )
    return table


def _soupability_lines(found: Soupability) -> list[str]:
    """What was measured where, the statistics, and what the ingredients take, a line each."""
    lines, cost, kept = [], found.cost, found.statistics
    if found.geometry and found.pairs:
        of = "what fine-tuning changed in" if found.geometry.base else "the weights of"
        on = f"; barrier and drop on {found.samples} samples of val" if found.measured else ""
        lines.append(f"distance and cosine of {of} {found.geometry.base or 'the networks'}{on}")
    if kept:
        apart = f", at most {kept.difference:.0%} apart ({kept.tensor})" if kept.difference else ""
        lines.append(
            f"BatchNorm: {kept.layers} layers{apart}"
            if kept.layers
            else "BatchNorm: none that keeps statistics"
        )
    step = (
        f"; a step of learn at batch 128 takes about {cost.step_seconds:.2g} s here"
        if cost.step_seconds
        else ""
    )
    lines.append(
        f"memory: {as_bytes(max(cost.bytes))} each, {as_bytes(sum(cost.bytes))} together; {cost.layers} layers, "
        f"the largest {cost.largest_layer[0]} ({as_bytes(cost.largest_layer[1])}){step}"
    )
    return lines


def as_bytes(count: int) -> str:
    """Bytes as people say them: "512 B", "3.1 MiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
