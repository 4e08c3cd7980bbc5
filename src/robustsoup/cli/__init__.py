"""The command line: one verb for each Python function."""

from robustsoup.cli import running, making, judging, fetching  # noqa: F401, I001  (commands, in the order of --help)
from robustsoup.cli.app import app, main, spread

__all__ = ["app", "main", "spread"]
