"""Is a run folder half done? A run writes its log as it goes, and results.json at the end."""

from collections.abc import Sequence
from pathlib import Path

from robustsoup.files import read_regular
from robustsoup.runs.results import Results
from robustsoup.runs.staging import LOG

MAX_LOG_BYTES = 64 * 2**20
_TIME = len("2026-11-22T19:00:00Z")


def describe_unfinished(results: Results, folder: Path) -> str:
    """Say in one line what is missing from a run; "" for a complete one."""
    unmeasured = [row.name for row in results.rows if not (row.val or row.test)]
    if unmeasured:
        count = f"{len(unmeasured)} of {len(results.rows)} networks"
        return f"This run is not complete: {count} were not evaluated. Run the same command again."
    last = read_log(folder)[-1:]
    if results.created and last and results.created < last[0][:_TIME]:
        return (
            "A later run in this folder has not finished: this page shows the results of "
            f"{results.created}. Run the same command again."
        )
    return ""


def describe_progress(folder: Path) -> str:
    """Say in one line how far a run without results.json came; "" without a log."""
    lines = read_log(folder)
    if not lines:
        return ""
    return (
        f"{folder}: this run has not finished (its log ends with "
        f'"{lines[-1][_TIME:].strip()}"), so there is nothing to report; run the same command again'
    )


def read_log(folder: Path) -> Sequence[str]:
    """Return the lines of a folder's log; none if it cannot be read or is above MAX_LOG_BYTES."""
    try:
        content = read_regular(folder / LOG, MAX_LOG_BYTES)
        return content.decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ()
