"""What long work tells its caller, and state that survives a kill."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robustsoup.errors import CheckpointError
from robustsoup.files import write_torch

Progress = Callable[[int, int, str], None]
"""on_progress(done, total, figures): called often; `figures` is a short text such as "loss 1.23"."""


class SavedState:
    """The state of a loop in one file, written at most every `every` seconds; with path None it does nothing.

    `fingerprint` says which work the state belongs to: a file left by other work is refused, not resumed.
    """

    def __init__(
        self, path: str | os.PathLike | None, fingerprint: str, every: float = 30.0
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.fingerprint, self.every, self.last = fingerprint, every, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state last saved, or None. Raises CheckpointError if it belongs to other work or cannot be read."""
        if self.path is None or not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: the saved state cannot be read ({error}); delete it to begin anew"
            ) from None
        if state.pop("fingerprint", None) != self.fingerprint:
            raise CheckpointError(
                f"{self.path}: saved by work with other settings; delete it or choose another place"
            )
        return state

    def due(self) -> bool:
        """Whether it is time to save."""
        return self.path is not None and time.monotonic() - self.last >= self.every

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""
        if self.path is not None:
            write_torch(self.path, {**state, "fingerprint": self.fingerprint})
            self.last = time.monotonic()

    def clear(self) -> None:
        """Remove the file: the work is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
