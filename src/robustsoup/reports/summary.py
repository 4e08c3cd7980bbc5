"""The outcome of a run in a few sentences."""

from robustsoup.reports.measures import (
    CLEAN,
    choose_split,
    count_samples,
    find_two_best,
    list_robust_measures,
    rows_with_measures,
)
from robustsoup.reports.style import format_percent
from robustsoup.runs.results import ResultRow, Results
from robustsoup.soups.answer import Answer


def summarise_results(results: Results) -> str:
    """State the most robust and the cleanest network, and the selected soup."""
    protocol, rows = results.protocol, results.rows
    split = choose_split(rows, protocol)
    sentences = [
        f"{len(rows)} networks were compared on {count_samples(rows, split)} {split} samples."
    ]
    cleanest = ""
    for measure in list_robust_measures(results):
        best = find_two_best(rows_with_measures(rows, split, CLEAN, measure), measure, protocol)
        if best:
            clean, robust = best
            sentences.append(
                f"The most robust at {measure} is {robust.name}: "
                f"{_format_accuracies(robust, split, measure)}."
            )
            cleanest = cleanest or (
                f"The best on clean inputs is {clean.name}: "
                f"{_format_accuracies(clean, split, measure)}."
            )
    if cleanest:
        sentences.append(cleanest)
        if split != protocol.select_on and any(row.scores(protocol.select_on) for row in rows):
            sentences.append(
                f"Both were chosen on {protocol.select_on}; the accuracies are those on {split}."
            )
    if results.selection is None:
        sentences.append("No soup was selected.")
    else:
        sentences += _summarise_selection(results, results.selection, split)
    return " ".join(sentences)


def _format_accuracies(row: ResultRow, split: str, measure: str) -> str:
    texts = [
        f"{format_percent(accuracy.value)} {name}"
        for name in (measure, CLEAN)
        if (accuracy := row.accuracy(split, name))
    ]
    return ", ".join(texts) or "not measured"


def _summarise_selection(results: Results, selection: Answer, split: str) -> list[str]:
    protocol = results.protocol
    required = " and ".join(selection.require)
    goal = f"The goal was the best {selection.maximise}" + (f" with {required}" if required else "")
    chosen = next((row for row in results.rows if row.name == selection.chosen), None)
    if chosen is None:
        sentence = f"{goal}; no soup was chosen on {protocol.select_on}."
        return [sentence, selection.message] if selection.message else [sentence]
    split = protocol.report_on if chosen.scores(protocol.report_on) else split
    accuracies = _format_accuracies(chosen, split, selection.maximise)
    selected = f"{goal}; the soup selected on {protocol.select_on} is {chosen.name}"
    sentences = [f"{selected}: {accuracies} on {split}."]
    if required:
        sentences.append(f"The requirement was {_format_verdict(results, selection)}.")
    if selection.message and not selection.met:
        sentences.append(selection.message)
    return sentences


def _format_verdict(results: Results, selection: Answer) -> str:
    protocol = results.protocol
    how = "by its estimate" if selection.point else "by its 95 % lower bound"
    verdict = f"{'met' if selection.met else 'NOT met'} {how} on {protocol.select_on}"
    if selection.held_on_test is not None and protocol.report_on != protocol.select_on:
        held = "held" if selection.held_on_test else "did NOT hold"
        verdict += f"; on {protocol.report_on} it {held}"
    return verdict
