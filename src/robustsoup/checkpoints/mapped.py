"""The file behind mapped tensors: was it changed, and was its content already verified?"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from robustsoup.errors import CheckpointError

RACY_SECONDS = 2.0
"""A file may be changed again within one tick of its clock, so a file younger than this is compared
with its digests each time that it is opened."""

_verified: set[tuple["MappedFile", str | None]] = set()


@dataclass(frozen=True)
class MappedFile:
    """The file behind mapped tensors, with its state when it was opened.

    Attributes:
        path: The file.
        size: bytes.
        modified_ns: Time of the last modification, in nanoseconds.
        place: Numbers of the device and of the inode, which differ if another file took the path.
    """

    path: Path
    size: int
    modified_ns: int
    place: tuple[int, int]

    @classmethod
    def of(cls, path: Path, descriptor: int | None = None) -> "MappedFile":
        """Read the present state of a file.

        Args:
            path: The file.
            descriptor: The descriptor of the file, if it is open.
        """
        state = path.stat() if descriptor is None else os.fstat(descriptor)
        return cls(path, state.st_size, state.st_mtime_ns, (state.st_dev, state.st_ino))

    def is_verified(self, key: str | None) -> bool:
        """Return whether this process has verified a set of weights of the file in this state."""
        return (self, key) in _verified

    def remember_verified(self, key: str | None) -> None:
        """Spare later calls of this process the verification while the file keeps its state.

        Args:
            key: The set of weights that was verified, if the file has several.
        """
        if time.time_ns() - self.modified_ns > RACY_SECONDS * 1e9:
            _verified.add((self, key))

    def check_unchanged(self) -> None:
        """Check that the tensors can be read; reading past the end of a file kills the process.

        Raises:
            CheckpointError: The file is gone, cut short or modified.
        """
        try:
            now = MappedFile.of(self.path)
        except OSError:
            raise CheckpointError(
                f"{self.path}: the file was removed after it was opened; "
                "restore it and run the same command again"
            ) from None
        if now.size < self.size:
            raise CheckpointError(
                f"{self.path}: the file was cut short after it was opened, "
                f"from {self.size:,} to {now.size:,} bytes; "
                "restore the whole file and run the same command again"
            )
        if now != self:
            raise CheckpointError(
                f"{self.path}: the file was changed after it was opened; run the command again"
            )
