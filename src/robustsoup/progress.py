"""Progress callbacks, and loop state that survives a killed process."""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from robustsoup.errors import CheckpointError
from robustsoup.files import open_regular, remove_file, write_torch
from robustsoup.interruption import held_signals
from robustsoup.paths import user_path
from robustsoup.torch_files import read_torch

Progress = Callable[[int, int, str], None]
"""on_progress(done, total, figures), called often; `figures` is short, such as "loss 1.23"."""


class SavedState:
    """Saves the state of a loop to one file, at most once per interval.

    Args:
        path: File to save to; None disables saving.
        fingerprint: Identifies the work. A file saved by other work is refused, not resumed.
        interval: Minimum time between two saves, in seconds.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, fingerprint: str, interval: float = 30.0
    ) -> None:
        self.path = None if path is None else user_path(path)
        self.fingerprint = fingerprint
        self.interval = interval
        self.last_save = time.monotonic()
        self.whole = False

    def load(self) -> dict[str, Any] | None:
        """Return the saved state with its tensors on the CPU, or None if nothing was saved.

        Raises:
            CheckpointError: If the file cannot be read, is damaged or was saved by other work.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with open_regular(self.path) as file:
                state = read_torch(file)
            if not isinstance(state, dict):
                raise ValueError(f"got a {type(state).__name__}, expected a dict")
        except FileNotFoundError:  # another process has finished the same work meanwhile
            return None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{self.path}: the saved state cannot be read ({reason}); delete it to start again"
            ) from None
        if state.pop("fingerprint", None) != self.fingerprint:
            raise CheckpointError(
                f"{self.path}: saved by work with other settings; delete it or choose another path"
            )
        return state

    @contextlib.contextmanager
    def refuse_malformed(self) -> Generator[None, None, None]:
        """Turn the errors of restoring a state that does not fit the work into a CheckpointError.

        Raises:
            CheckpointError: A part of the state is missing or has another type or shape.
        """
        if self.path is None:
            yield
            return
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: the saved state does not fit this work "
                f"({type(error).__name__}); delete it to start again"
            ) from error

    def due(self) -> bool:
        """Return whether the interval since the last save has passed."""
        return self.path is not None and time.monotonic() - self.last_save >= self.interval

    def save(self, state: dict[str, Any]) -> None:
        """Write the state atomically.

        Raises:
            StorageError: If the file cannot be written.
        """
        if self.path is not None:
            write_torch(self.path, {**state, "fingerprint": self.fingerprint})
            self.last_save = time.monotonic()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Change the state as a whole: a signal that ends the work waits for the end of the block.

        Raises:
            KeyboardInterrupt: At the end of the block, if a signal was received in it.
        """
        self.whole = False
        with held_signals():
            yield
            self.whole = True

    def save_if_whole(self, make_state: Callable[[], dict[str, Any]]) -> None:
        """Save the state of interrupted work, unless it was interrupted amid a change."""
        if self.whole:
            self.save(make_state())

    def clear(self) -> None:
        """Remove the file, because the work is complete."""
        if self.path is not None:
            remove_file(self.path)
