"""Signals that end a command: Ctrl-C, a scheduler's SIGTERM, and SIGHUP of a closed terminal.

The command line installs the handlers; as a library, robustsoup leaves signals alone. The standard
library alone is imported here, because the handlers are installed before everything else.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

TYPE_CHECKING = False  # as in robustsoup/__init__.py
if TYPE_CHECKING:
    Handler = Callable[[int, FrameType | None], object] | int | None
    Hook = Callable[[sys.UnraisableHookArgs], object]

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""

_VERBS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
_SECONDS_TO_RETRY = 0.1
_SECONDS_TO_REPEAT = 5.0


class _Received:
    """The signal that this process received.

    Attributes:
        number: The last signal; None before the first.
        time: When it was received, in seconds of the monotonic clock.
        held: Whether the next signal waits for the end of a block.
        waiting: Whether a signal waits for that.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.time = 0.0
        self.held = self.waiting = False


_received = _Received()


def exit_code() -> int:
    """Return the exit code of a process that a signal ended: 128 and its number."""
    return INTERRUPTED if _received.number is None else 128 + _received.number


def signal_received() -> bool:
    """Return whether a signal that ends the command was received."""
    return _received.number is not None


def describe_end() -> str:
    """Return what happened and how to go on, in one line."""
    name = signal.Signals(_received.number or signal.SIGINT).name
    return f"robustsoup: {_VERBS[name]}; run the same command again to resume"


@contextmanager
def handled_signals(*, restore: bool) -> Iterator[None]:
    """Let signals raise KeyboardInterrupt in the block, which then ends in good order.

    A signal that this process was started to ignore, as `nohup` does, stays ignored. While a module
    is being imported, the process exits at once, because extension modules turn an exception into
    other errors; no work has begun then, or its last saved state stays.

    Args:
        restore: Whether to restore the handlers afterwards; else a later signal ends the process
            without a word, as it shuts down, with the exit code of the first one.
    """
    hook = sys.unraisablehook
    _received.number, _received.held, _received.waiting = None, False, False
    earlier = _install_handlers()
    sys.unraisablehook = _send_again(hook)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler if restore else _end_without_a_word)
        sys.unraisablehook = hook
        _received.held = _received.waiting = False  # what a library call does next is not meant


def _install_handlers() -> "dict[int, Handler]":
    """Install the handlers; return the earlier ones, none in a thread, which receives no signal."""
    earlier: dict[int, Handler] = {}
    with suppress(ValueError):
        for name in _VERBS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                earlier[number] = signal.signal(number, _handle)
    return earlier


def end_at_next_signal() -> None:
    """Let a further signal end the process without a word, once the work has ended."""
    for name in _VERBS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is _handle:
            signal.signal(number, _end_without_a_word)


def _end_without_a_word(number: int, _frame: FrameType | None) -> None:
    if not _is_repeated(number):
        os._exit(128 + (_received.number or number))


def _is_repeated(number: int) -> bool:
    """Return whether torchrun passes on a signal that this process has received itself.

    A scheduler sends a signal to all processes of a job, torchrun and those that it started.
    """
    return (
        "TORCHELASTIC_RUN_ID" in os.environ
        and number == _received.number
        and time.monotonic() < _received.time + _SECONDS_TO_REPEAT
    )


def signal_waits() -> bool:
    """Return whether a signal waits for the end of a block of `held_signals`."""
    return _received.waiting


@contextmanager
def held_signals() -> Iterator[None]:
    """Finish the block before a signal ends the work; a second signal does not wait.

    Within another such block, the signal waits for the end of that one.

    Raises:
        KeyboardInterrupt: At the end of the block, if a signal was received in it.
    """
    outer, _received.held = _received.held, True
    try:
        yield
    finally:
        _received.held = outer
    if _received.waiting and not outer:
        _received.waiting = False
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    if _is_repeated(number):
        return
    _received.number, _received.time = number, time.monotonic()
    if _received.held and not _received.waiting:
        _received.waiting = True
        return
    if _is_importing(frame):
        _exit_at_once()
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _exit_at_once() -> None:
    try:
        # A progress bar hides the cursor, and the line may be half written.
        bar = b"\r\x1b[2K\x1b[?25h" if os.isatty(2) else b""
        os.write(2, bar + f"{describe_end()}\n".encode())
    finally:
        os._exit(exit_code())


def _send_again(hook: "Hook") -> "Hook":
    """Return a hook that sends the signal again where a destructor swallowed its exception."""

    def handle_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is KeyboardInterrupt and _received.number is not None:
            import threading

            _received.time -= _SECONDS_TO_REPEAT  # the next one is no repetition
            retry = threading.Timer(_SECONDS_TO_RETRY, _send_to_main, (_received.number,))
            retry.daemon = True
            retry.start()
        else:
            hook(unraisable)

    return handle_unraisable


def _send_to_main(number: int) -> None:
    """Send a signal to the main thread, whose waiting system calls it then ends."""
    import threading

    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:  # Windows
        signal.raise_signal(number)
