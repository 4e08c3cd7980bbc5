"""Notices and refuses every use of the network by this process, in Python code or below it."""

import contextlib
import sys
from collections.abc import Iterator

EVENTS = frozenset(
    f"socket.{name}"
    for name in (
        *("bind", "connect", "getaddrinfo", "gethostbyaddr", "gethostbyname", "getnameinfo"),
        *("sendmsg", "sendto"),
    )
)
_watches: list[list[str]] = []


class NetworkRefusedError(OSError):
    """Raised in place of a use of the network."""


def _refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    if _watches and event in EVENTS:
        attempt = f"{event}{arguments[-2:]}"
        _watches[-1].append(attempt)
        raise NetworkRefusedError(attempt)


sys.addaudithook(_refuse_network)


@contextlib.contextmanager
def refused_network() -> Iterator[list[str]]:
    """Refuse the network in a block; yields the list of attempts, including swallowed ones."""
    attempts: list[str] = []
    _watches.append(attempts)
    try:
        yield attempts
    finally:
        _watches.remove(attempts)
