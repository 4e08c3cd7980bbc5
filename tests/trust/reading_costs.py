"""What reading a file costs, measured in a process of its own."""

import tempfile
import time
from pathlib import Path

from all_formats import READ_FORMATS

from robustsoup.errors import RobustsoupError


def measure_peak(*, reset=False):
    """Return the most memory in bytes that this process held at once, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(
        1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")
    )


def read_measured(kind, path, results):
    """Read a file and put what happened, the seconds and the bytes of memory into a queue.

    A whole file of this kind is read first, which imports what its reader needs.
    """
    save, read = READ_FORMATS[kind]
    with tempfile.TemporaryDirectory() as folder:
        read(save(Path(folder)))
    before, began = measure_peak(reset=True), time.process_time()
    try:
        read(Path(path))
        outcome = ""
    except RobustsoupError as error:
        outcome = "" if str(error).isprintable() else f"not one line: {str(error)[:200]!r}"
    except BaseException as error:  # whatever else is a traceback for users
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    results.put((outcome, time.process_time() - began, measure_peak() - before))
