"""What a run tells on the terminal: a bar with the time left, one line for each finished step, a log in the run folder."""

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from robustsoup.runs.context import Context
from robustsoup.runs.cost import estimate_seconds
from robustsoup.runs.plan import Plan, Step

stderr = Console(stderr=True, highlight=False)


def duration(seconds: float) -> str:
    """Seconds as people say them: "8 s", "4 min", "1 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


class Bar:
    """A progress bar for one piece of work: an on_progress callback that shows the time left."""

    def __init__(self, title: str) -> None:
        self.progress = _progress()
        self.task: TaskID = self.progress.add_task(title, total=None, left="", figures="")
        self.started = time.monotonic()

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def __call__(self, done: int, total: int | None, figures: str = "") -> None:
        elapsed = time.monotonic() - self.started
        left = (
            f"{duration(elapsed * (total - done) / done)} left"
            if done and total and elapsed > 2
            else ""
        )
        fields = {"figures": figures} if figures else {}
        self.progress.update(self.task, completed=done, total=total, left=left, **fields)


class RunReporter:
    """Tells of a whole run. Estimates of each step weigh the bar; the time left follows from what was really needed."""

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.log = context, folder / "log.txt"
        self.bar = _progress()
        self.task: TaskID | None = None
        self.estimates: dict[str, float] = {}
        self.before, self.total, self.count, self.number = 0.0, 0.0, 0, 0

    def __enter__(self) -> "RunReporter":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        if error is not None:
            self.write(f"stopped: {type(error).__name__}: {error}")

    def begin(self, plan: Plan, missing: Sequence[Step]) -> None:
        """Price what is missing and start the bar."""
        kept = len(plan.steps) - len(missing)
        self.estimates = estimate_seconds(missing, self.context) if missing else {}
        self.total, self.before = sum(self.estimates.values()), 0.0
        self.count, self.number, self.started = len(missing), 0, time.monotonic()
        if missing:
            steps = f"{len(missing)} step{'s' * (len(missing) > 1)}"
            self.say(
                f"{plan.recipe.name}: {steps} to do, {kept} already in the store; about {duration(self.total)}"
            )
            if self.task is None:
                self.task = self.bar.add_task("", total=self.total, left="", figures="")

    def progress_of(self, step: Step, share: float, figures: str) -> None:
        """Show how far the run is when `share` of `step` is done."""
        done = self.before + share * self.estimates[step.key]
        elapsed = time.monotonic() - self.started
        left = (
            f"{duration(elapsed * (self.total - done) / done)} left" if done and elapsed > 2 else ""
        )
        title = f"{self.number + 1}/{self.count} {step.name}"
        fields = {"figures": figures} if figures else {}
        self.bar.update(
            self.task, description=title, completed=done, total=self.total, left=left, **fields
        )

    def progress(self, step: Step, done: int, total: int, figures: str) -> None:
        """As `progress_of`, from parts."""
        self.progress_of(step, done / max(total, 1), figures)

    def finished(self, step: Step, figures: str, seconds: float) -> None:
        """One line for a finished step."""
        self.before += self.estimates[step.key]
        self.number += 1
        line = (
            f"{self.number}/{self.count} {step.kind} {step.name}: {figures} ({duration(seconds)})"
        )
        (self.write if step.kind == "mix" and seconds < 2 else self.say)(line)

    def warn(self, text: str) -> None:
        """A line about what makes a result doubtful."""
        self.say(f"warning: {text}")

    def say(self, line: str) -> None:
        """Print a line above the bar and write it to the log."""
        self.bar.console.print(line, markup=False, soft_wrap=True)
        self.write(line)

    def write(self, line: str) -> None:
        """Append a line with the time to the run folder's log."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{now} {line}\n")
        except OSError:
            pass


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[figures]}", markup=False),
        console=stderr,
        transient=True,
        refresh_per_second=4,
        disable=not stderr.is_terminal,
    )
