"""Progress on the terminal: bars with the time left, and a log in the run folder."""

import contextlib
import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from robustsoup import distributed
from robustsoup.cli.terminal import make_console
from robustsoup.files import append_text
from robustsoup.printable import make_printable
from robustsoup.runs.context import Context
from robustsoup.runs.cost import estimate_seconds
from robustsoup.runs.plan import Plan, Step
from robustsoup.runs.staging import LOG

MIN_ELAPSED = 2.0
"""Seconds after which the time left is estimated."""
MOST_SHOWN = 16
"""Most lines for steps that run on other machines."""


def format_duration(seconds: float) -> str:
    """Format a duration: "8 s", "4 min", "1 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


class Bar:
    """A progress bar for one piece of work; the object itself is the `on_progress` callback."""

    def __init__(self, title: str) -> None:
        self.display = _make_display()
        title = make_printable(title)
        self.task: TaskID = self.display.add_task(title, total=None, left="", figures="")
        self.started = time.monotonic()
        self.figures = ""

    def __enter__(self) -> Self:
        self.display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _stop_display(self.display)

    def __call__(self, done: int, total: int | None, figures: str = "") -> None:
        """Show that `done` of `total` parts are done; `figures` stay until new ones arrive."""
        left = _format_time_left(self.started, done, total)
        self.figures = make_printable(figures) or self.figures
        self.display.update(self.task, completed=done, total=total, left=left, figures=self.figures)


class RunReporter:
    """Receives the progress events of a run: one bar for all steps, and lines in the log.

    Attributes:
        context: The data, network and device to measure estimates on.
        log: The log file in the run folder.
        figures: The latest figures of a step, such as "loss 1.23".
        estimates: Estimated seconds of each missing step, by key.
        total: Estimated seconds of all missing steps.
        finished_share: Estimated seconds of the finished steps.
        step_count: Number of missing steps.
        finished_count: Number of finished steps.
        shares: Estimated seconds that are done of each running step, by key.
        places: Where steps run that other machines run, by key.
        rows: Lines of the display for these steps, by key.
    """

    def __init__(self, context: Context, folder: Path) -> None:
        self.context = context
        self.log = folder / LOG
        self.display = _make_display()
        self.task: TaskID = self.display.add_task("", total=None, left="", figures="")
        self.began = time.monotonic()
        self.figures = ""
        self.estimates: dict[str, float] = {}
        self.total = 0.0
        self.finished_share = 0.0
        self.step_count = 0
        self.finished_count = 0
        self.shares: dict[str, float] = {}
        self.places: dict[str, str] = {}
        self.rows: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _stop_display(self.display)
        if error is not None:
            self.write_log(f"stopped: {type(error).__name__}: {error}")

    def begin(self, plan: Plan, missing: Sequence[Step]) -> None:
        """Estimate the missing steps and start the bar again."""
        self.estimates = estimate_seconds(missing, self.context) if missing else {}
        self.total = sum(self.estimates.values())
        self.finished_share, self.finished_count = 0.0, 0
        self.step_count, self.began = len(missing), time.monotonic()
        if missing:
            keys = {step.key for step in missing}
            done = [step for step in plan.steps if step.key not in keys and step.kind != "part"]
            steps = f"{len(missing)} step{'s' if len(missing) > 1 else ''}"
            self.print_and_log(
                f"{plan.recipe.name}: {steps} to do, {len(done)} already in the store; "
                f"about {format_duration(self.total)}"
            )

    def started(self, step: Step, place: str) -> None:
        """Log where a step runs, and show a line for it below the bar of the run."""
        self._forget(step)  # what a lost worker had done
        self.places[step.key] = place
        self.write_log(f"{step.kind} {step.name}: runs on {place}")
        if len(self.rows) < MOST_SHOWN:
            name = make_printable(f"  {step.name} on {place}")
            self.rows[step.key] = self.display.add_task(name, total=1, left="", figures="")

    def progress(self, step: Step, done: int, total: int, figures: str) -> None:
        """Show that `done` of `total` parts of a step are done."""
        self.shares[step.key] = done / max(total, 1) * self.estimates[step.key]
        share = self.finished_share + sum(self.shares.values())
        elsewhere = len(self.places)
        title = f"{elsewhere} steps run" if elsewhere > 1 else step.name
        self.figures = make_printable(figures) or self.figures
        self.display.update(
            self.task,
            description=make_printable(f"{self.finished_count + 1}/{self.step_count} {title}"),
            completed=share,
            total=self.total,
            left=_format_time_left(self.began, share, self.total),
            figures="" if self.rows else self.figures,
        )
        if step.key in self.rows:
            self.display.update(
                self.rows[step.key], completed=done, total=total, figures=make_printable(figures)
            )

    def _forget(self, step: Step) -> str | None:
        """Forget the progress of a step; return where it ran."""
        self.shares.pop(step.key, None)
        row = self.rows.pop(step.key, None)
        if row is not None:
            self.display.remove_task(row)
        return self.places.pop(step.key, None)

    def finished(self, step: Step, figures: str, seconds: float) -> None:
        """Print and log one line for a finished step; quick mixes are only logged."""
        self.finished_share += self.estimates[step.key]
        self.finished_count += 1
        place = self._forget(step)
        where = "" if place is None else f" on {place}"
        line = (
            f"{self.finished_count}/{self.step_count} {step.kind} {step.name}: {figures} "
            f"({format_duration(seconds)}{where})"
        )
        if step.kind == "mix" and seconds < MIN_ELAPSED:
            self.write_log(line)
        else:
            self.print_and_log(line)

    def warn(self, text: str) -> None:
        """Print and log a warning about a doubtful result."""
        self.print_and_log(f"warning: {text}")

    def note(self, text: str) -> None:
        """Print and log a line about the run itself."""
        self.print_and_log(text)

    def print_and_log(self, line: str) -> None:
        """Print a line above the bar and write it to the log."""
        self.display.console.print(make_printable(line), soft_wrap=True)
        self.write_log(line)

    def write_log(self, line: str) -> None:
        """Append a line with the time to the log; errors of writing are ignored."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with contextlib.suppress(OSError):
            append_text(self.log, f"{now} {make_printable(line)}\n")


class SilentReporter:
    """Receives the progress events of a run in the processes that show none."""

    def begin(self, plan: Plan, missing: Sequence[Step]) -> None:
        """Ignore the plan."""

    def started(self, step: Step, place: str) -> None:
        """Ignore where a step runs."""

    def progress(self, step: Step, done: int, total: int, figures: str) -> None:
        """Ignore progress."""

    def warn(self, text: str) -> None:
        """Ignore a warning, which the first process shows."""

    def note(self, text: str) -> None:
        """Ignore a line about the run."""

    def finished(self, step: Step, figures: str, seconds: float) -> None:
        """Ignore that a step is finished."""


def _format_time_left(started: float, done: float, total: float | None) -> str:
    """Return the estimated time left, or "" as long as there is no estimate."""
    elapsed = time.monotonic() - started
    if not done or not total or elapsed <= MIN_ELAPSED:
        return ""
    return f"{format_duration(elapsed * (total - done) / done)} left"


def _stop_display(display: RichProgress) -> None:
    """Remove a bar from the terminal; rich before 14.3 prints a line for a disabled one."""
    if not display.disable:
        display.stop()


def _make_display() -> RichProgress:
    console = make_console(stderr=True)
    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        transient=True,
        refresh_per_second=4,
        disable=not (console.is_terminal and distributed.is_first()),
    )
