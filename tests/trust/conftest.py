"""The trust tests: one table row for each fault, printed at the end of the run.

The environment variable ROBUSTSOUP_TRUST_SHARE (default 1) scales all numbers of tries, so
ROBUSTSOUP_TRUST_SHARE=0.01 is a quick look.
"""

import os
import time
from pathlib import Path

import pytest

SHARE = float(os.environ.get("ROBUSTSOUP_TRUST_SHARE", "1"))
TALLIES = pytest.StashKey[list["Tally"]]()


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.trust)


class Tally:
    """Counts how often a fault was tried, and what it did.

    Attributes:
        fault: Name of the fault, the first column of the table.
        tried: Number of tries.
        lost: One line for each try that lost work, crashed or did not end as it should.
        silent: One line for each try that led to a wrong value without a word.
        seconds: Duration of all tries.
    """

    def __init__(self, fault):
        self.fault, self.tried, self.lost, self.silent = fault, 0, [], []
        self.began = time.monotonic()
        self.seconds = 0.0

    def count(self, tries=1):
        """Count tries."""
        self.tried += tries
        self.seconds = time.monotonic() - self.began

    def check(self):
        """Fail the test if anything was lost or silent, or if nothing was tried."""
        self.seconds = time.monotonic() - self.began
        assert self.tried
        assert not self.lost, self.lost[:10]
        assert not self.silent, self.silent[:10]

    def row(self):
        """Return the row of the table."""
        cells = (self.fault, f"{self.tried:,}", len(self.lost), len(self.silent))
        return "| " + " | ".join(map(str, (*cells, f"{self.seconds:.0f}"))) + " |"


@pytest.fixture
def tally_of(request):
    """A function that opens the tally of a fault, which the summary prints."""
    tallies = request.config.stash.setdefault(TALLIES, [])

    def open_tally(fault):
        tallies.append(Tally(fault))
        return tallies[-1]

    return open_tally


@pytest.fixture
def tries():
    """A function that scales a number of tries by ROBUSTSOUP_TRUST_SHARE."""
    return lambda full: max(1, round(full * SHARE))


def pytest_terminal_summary(terminalreporter, config):
    """Print one row for each fault, in the form of docs/reliability.md."""
    if tallies := config.stash.get(TALLIES, []):
        terminalreporter.section("trust")
        terminalreporter.write_line("| fault | times tried | lost | silent | seconds |")
        terminalreporter.write_line("|---|---|---|---|---|")
        for tally in tallies:
            terminalreporter.write_line(tally.row())
