"""Print the results of commands as text and tables."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robustsoup.cli.front import print_front
from robustsoup.cli.progress import format_duration
from robustsoup.cli.terminal import print_line, print_table
from robustsoup.diagnosis.barriers import Pair
from robustsoup.diagnosis.check import Soupability
from robustsoup.diagnosis.layers import LayerMap
from robustsoup.evaluation.attack_texts import describe_attack
from robustsoup.evaluation.comparison import Comparison
from robustsoup.evaluation.doubts import describe_masking
from robustsoup.evaluation.intervals import Accuracy
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.runs.results import Results

Scores = Mapping[str, Accuracy]


def print_results(results: Results, folder: Path) -> None:
    """Print the accuracies of a run, the front, the answer, and the path of the soup."""
    protocol = results.protocol
    reports_all = results.recipe["evaluate"]["report"] == "all"
    split = protocol.report_on if reports_all else protocol.select_on
    rows = {row.name: row.scores(split) for row in results.rows if row.role not in ("grid", "line")}
    measured = {name: scores for name, scores in rows.items() if scores is not None}
    if measured:
        selects_on_test = protocol.select_on == protocol.report_on
        note = " (the paper's protocol: selected on test)" if selects_on_test else ""
        print_accuracies(measured, f"on {split}{note}")
    for surrogate in results.surrogates:
        print_line(str(surrogate["message"]))
    if results.selection:
        print_front(results)
        for line in results.selection.lines():
            print_line(line)
        print_line(f"soup: {folder / str(results.soup)}")


def print_accuracies(rows: Mapping[str, Scores], title: str | None = None) -> None:
    """Print a table of accuracies: one row for each name, one column for each measure."""
    measures = list(next(iter(rows.values())))
    print_table(
        ("checkpoint", *measures),
        [(name, *(str(scores[measure]) for measure in measures)) for name, scores in rows.items()],
        title,
    )


def print_plan(price: Mapping[str, Any], device: str) -> None:
    """Print the steps of a plan and the cost of the missing ones.

    Args:
        price: What `price_plan` returned.
        device: Type of the device that the cost was measured on.
    """
    rows = [
        (step["kind"], step["name"], "done", "")
        if step["done"]
        else (step["kind"], step["name"], "-", format_duration(step["seconds"]))
        for step in price["steps"]
    ]
    print_table(("step", "name", "store", "about"), rows)
    missing = sum(not step["done"] for step in price["steps"])
    if "prediction" in price:
        _print_prediction(price["prediction"], price)
        return
    print_line(
        f"{len(price['steps'])} steps, {missing} to do: {price['epochs']} epochs, "
        f"{price['passes']:.1e} forward passes, about {format_duration(price['seconds'])} on this "
        f"{device} and {format_bytes(price['bytes'])} of disk"
    )


def _print_prediction(prediction: Mapping[str, Any], price: Mapping[str, Any]) -> None:
    count, pieces = prediction["devices"], prediction["pieces"]
    print_line(
        f"{count} device{'s' if count > 1 else ''}: about {format_duration(prediction['seconds'])} "
        f"for {format_duration(prediction['device_seconds'])} of work "
        f"(efficiency {prediction['efficiency']:.0%}), {pieces} piece{'' if pieces == 1 else 's'} "
        f"of ten minutes; {price['passes']:.1e} forward passes, {prediction['source']}"
    )
    print_line(
        f"memory of a device {format_bytes(prediction['memory_bytes'])}; store: "
        f"{format_bytes(prediction['read_bytes'])} read by workers, "
        f"{format_bytes(prediction['written_bytes'])} written; under torchrun each process would "
        f"exchange {format_bytes(prediction['exchanged_bytes'])}"
    )


def print_evaluations(evaluations: Mapping[str, Evaluation], split: str) -> None:
    """Print the accuracies of checkpoints and how they were attacked."""
    print_accuracies({name: e.accuracy for name, e in evaluations.items()})
    record = next(iter(evaluations.values())).record
    attack = f", {describe_attack(record)}" if record["threats"] else ""
    print_line(f"{record['samples']} samples of {split}, 95 % Wilson intervals{attack}")
    for name, evaluation in evaluations.items():
        for line in describe_shift(evaluation.record):
            print_line(f"{name}, natural shift, {line}")
        for findings in describe_masking(evaluation.record):
            print_line(f"{name}, masking check, {findings}")
        if len(evaluation.record["broken_by"]) <= 2:
            continue
        for threat in evaluation.threats:
            attempts = evaluation.after_each(threat).items()
            accuracies = ", ".join(
                f"{attempt} {accuracy.value:.1%}" for attempt, accuracy in attempts
            )
            print_line(f"{name}, {threat}, accuracy after each attack: {accuracies}")


def describe_shift(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the accuracy on all corruptions of an evaluation, and on each by severity."""
    if "shift" not in record:
        return
    shift = record["shift"]
    yield f"all corruptions {shift['accuracy']['value']:.1%}"
    for name, accuracies in shift["corruptions"].items():
        yield f"{name} at severity 1 to {len(accuracies)}: " + ", ".join(
            f"{value:.1%}" for value in accuracies
        )


def print_comparison(comparison: Comparison, names: Sequence[str]) -> None:
    """Print two evaluations side by side, and their paired differences."""
    rows = [
        (measure, f"{row.a.value:.1%}", f"{row.b.value:.1%}", str(row))
        for measure, row in comparison.rows.items()
    ]
    print_table(("", *names, "second - first"), rows)
    print_line(
        f"{comparison.n} paired samples; 95 % score intervals (Tango), exact p-values (McNemar)"
    )
    for note in comparison.notes:
        print_line(f"note: {note}")


def print_soupability(result: Soupability, names: Sequence[str], limit: int) -> None:
    """Print whether checkpoints can be mixed, and why not.

    Args:
        result: What `check` returned.
        names: One name for each checkpoint.
        limit: Print at most this many pairs, the most distant ones.
    """
    for number, problem in enumerate(result.problems):
        print_line(f"{'also' if number else 'cannot be mixed'}: {problem}")
    if result.soupable and len(names) > 1:
        weights_only = (
            ""
            if result.measured
            else (", judging by their weights; --data measures the loss between them")
        )
        print_line(f"these {len(names)} can be mixed{weights_only}")
    if result.pairs:
        pairs = sorted(result.pairs, key=lambda pair: -pair.distance)[:limit]
        _print_pairs(pairs, names)
        if len(pairs) < len(result.pairs):
            print_line(
                f"the {len(pairs)} most distant of {len(result.pairs)} pairs; --pairs shows more"
            )
    for line in _describe_measurements(result):
        print_line(line)
    for warning in result.warnings:
        print_line(f"warning: {warning}")


def print_layers(layers: LayerMap, names: Sequence[str]) -> None:
    """Print what swapping each block between two checkpoints changes."""
    first, second = names
    for name, accuracies in ((first, layers.first), (second, layers.second)):
        figures = ", ".join(f"{measure} {accuracy}" for measure, accuracy in accuracies.items())
        print_line(f"{name}: {figures} ({layers.samples} samples)")
    print_line(
        f"what a swapped block changes, in points (1st: {first} with the block of {second}; "
        "2nd: the reverse):"
    )
    print_table(layers.columns(), layers.rows())


def _print_pairs(pairs: Sequence[Pair], names: Sequence[str]) -> None:
    columns = [
        f"{what}, {threat}" for threat in pairs[0].curves for what in ("barrier", "accuracy drop")
    ]
    rows: list[tuple[str, ...]] = []
    for pair in pairs:
        cells = [
            text
            for curve in pair.curves.values()
            for text in (f"{curve.barrier:.3f}", f"{100 * curve.drop:.1f} points")
        ]
        distance = f"{pair.distance:.3g} ({pair.relative:.1%})"
        cosine = "-" if pair.cosine is None else f"{pair.cosine:.3f}"
        rows.append((names[pair.a], names[pair.b], distance, cosine, *cells))
    print_table(("first", "second", "distance", "cosine", *columns), rows)


def _describe_measurements(result: Soupability) -> list[str]:
    """Return one line each for what was measured, the running statistics, and the cost."""
    lines: list[str] = []
    cost, statistics = result.cost, result.statistics
    if result.geometry and result.pairs:
        base = result.geometry.base
        vectors = f"the changes from {base}" if base else "the weights"
        measured = (
            f"; barrier and drop on {result.samples} samples of val" if result.measured else ""
        )
        lines.append(f"distance and cosine of {vectors}{measured}")
    if statistics and statistics.layers:
        difference = (
            f"; statistics differ by up to {statistics.difference:.0%} ({statistics.tensor})"
            if statistics.difference
            else ""
        )
        lines.append(f"BatchNorm: {statistics.layers} layers{difference}")
    elif statistics:
        lines.append("BatchNorm: no layer with running statistics")
    step = (
        f"; one step of `learn` with batch size 128 takes about {cost.step_seconds:.2g} s here"
        if cost.step_seconds
        else ""
    )
    largest, size = cost.largest_layer
    lines.append(
        f"memory: {format_bytes(max(cost.bytes))} each, {format_bytes(sum(cost.bytes))} together; "
        f"{cost.layers} layers, the largest {largest} ({format_bytes(size)}){step}"
    )
    return lines


def format_bytes(count: int) -> str:
    """Return a size for people: "512 B", "3.1 MiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
