"""The outcome of a run in a few sentences."""

from robustsoup.reports.file_names import hide_folders
from robustsoup.reports.measures import choose_split, count_samples
from robustsoup.runs.results import Results


def summarise_results(results: Results) -> list[str]:
    """Say what was chosen and why, what it costs, and how much was compared."""
    split = choose_split(results.rows, results.protocol)
    rows = [row for row in results.distinct_rows if row.scores(split)]
    compared = (
        f"{len(rows)} networks were compared on {count_samples(rows, split)} {split} samples."
    )
    if results.selection is None:
        return ["No soup was selected.", compared]
    lines = [hide_folders(line) for line in results.selection.lines()]
    return [*map(_as_sentence, lines), compared]


def _as_sentence(line: str) -> str:
    """Return a line of the answer as a sentence; one that starts with a requirement stays as is."""
    starts_with_word = line[:1].islower() and ">=" not in line.partition(" ")[0]
    sentence = f"{line[0].upper()}{line[1:]}" if starts_with_word else line
    return sentence if line.endswith(":") else f"{sentence}."
