"""The time limit of a search that can answer at any time."""

import time
from dataclasses import dataclass

from robustsoup import distributed
from robustsoup.settings import parse_duration

clock = time.monotonic
"""The clock of all limits, in seconds."""


@dataclass(frozen=True)
class Late:
    """What a time limit kept a search from attacking.

    Attributes:
        left_out: Number of soups that were not attacked at all.
        unfinished: Number of soups that were attacked in part, could still win, and were not
            attacked in full.
    """

    left_out: int = 0
    unfinished: int = 0

    def __add__(self, other: "Late") -> "Late":
        """Return what two searches were kept from attacking."""
        return Late(self.left_out + other.left_out, self.unfinished + other.unfinished)


class TimeLimit:
    """Decides whether the time left allows for one more soup.

    Args:
        text: The limit, such as "30m"; None for no limit.
        started: Start of the search on `clock`; now if None.
    """

    def __init__(self, text: str | None, started: float | None = None) -> None:
        self.seconds = None if text is None else parse_duration(text)
        self.started = clock() if started is None else started
        self.began = self.started
        self.longest = 0.0

    def begin_soup(self, count: int = 1) -> bool:
        """Return whether other soups, if each takes as long as the longest, end in time.

        Args:
            count: Number of soups that shall end in time; one is begun.
        """
        self.began = clock()
        if self.seconds is None:
            return True
        expected_end = self.began - self.started + count * self.longest
        return distributed.from_first(lambda: expected_end) <= self.seconds

    def end_soup(self) -> None:
        """Note how long the soup took since `begin_soup`."""
        self.longest = max(self.longest, clock() - self.began)
