"""How the checkpoints that a user lists are opened: the choices that hold for all of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from robustsoup.checkpoints.adapters import find_adapter
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike
from robustsoup.checkpoints.remote import local_path
from robustsoup.errors import RequestError


@dataclass(frozen=True)
class Opening:
    """What a user says once about several files.

    Attributes:
        key: Which of several sets of weights to read; see `Checkpoint.load`.
        adapter_base: The base of the LoRA adapters among the files; other files are read as they
            are.
    """

    key: str | None = None
    adapter_base: str | Path | None = None

    def open(self, item: CheckpointLike) -> Checkpoint:
        """Open a file, see `Checkpoint.open`; return a checkpoint as it is."""
        if isinstance(item, Checkpoint):
            return item
        return Checkpoint.open(item, key=self.key, adapter_base=self._base_of(item))

    def load(self, item: CheckpointLike) -> Checkpoint:
        """Load a file, see `Checkpoint.load`; return a checkpoint as it is."""
        if isinstance(item, Checkpoint):
            return item
        return Checkpoint.load(item, key=self.key, adapter_base=self._base_of(item))

    def check(self, items: Iterable[CheckpointLike]) -> None:
        """Check that a named base is the base of something.

        Raises:
            RequestError: None of the files is an adapter.
        """
        if self.adapter_base is not None and all(self._base_of(item) is None for item in items):
            raise RequestError(
                "adapter_base: none of the checkpoints is a LoRA adapter (a folder with "
                "adapter_config.json); leave it out"
            )

    def _base_of(self, item: CheckpointLike) -> str | Path | None:
        if self.adapter_base is None or isinstance(item, Checkpoint):
            return None
        return self.adapter_base if find_adapter(local_path(item)) is not None else None
