"""The time limit of a search that can answer at any time."""

import time

from robustsoup import distributed
from robustsoup.settings import parse_duration


class TimeLimit:
    """Decides whether the time left allows for one more soup.

    Args:
        text: The limit, such as "30m"; None for no limit.
        started: Start of the search on the clock of `time.monotonic`; now if None.
    """

    def __init__(self, text: str | None, started: float | None = None) -> None:
        self.seconds = None if text is None else parse_duration(text)
        self.started = time.monotonic() if started is None else started
        self.began = self.started
        self.longest = 0.0

    def begin_soup(self) -> bool:
        """Return whether another soup, if it takes as long as the longest, ends in time."""
        self.began = time.monotonic()
        if self.seconds is None:
            return True
        expected_end = self.began - self.started + self.longest
        return distributed.from_first(lambda: expected_end) <= self.seconds

    def end_soup(self) -> None:
        """Note how long the soup took since `begin_soup`."""
        self.longest = max(self.longest, time.monotonic() - self.began)
