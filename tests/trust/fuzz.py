"""Fuzz one reader with atheris: `python fuzz.py READER SECONDS FOLDER`, seconds of the processor.

FOLDER receives `corpus`, and `findings` with each input that raised an unexpected error, took more
than MOST_SECONDS or killed the process. The last line of stdout is JSON: tries and findings.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["robustsoup"]):
    import readers

from robustsoup.errors import RobustsoupError

MOST_SECONDS = 1.0
"""Most seconds of the processor for one input."""
MOST_BYTES = 64 * 1024


class Fuzzing:
    """Calls a reader with one input after the other, and keeps those that it mishandles."""

    def __init__(self, reader, seconds, folder):
        self.reader, self.folder = reader, folder
        self.end = time.process_time() + seconds
        self.tried, self.found = 0, {}

    def try_input(self, content):
        """Read one input; end the process when the time is over."""
        if time.process_time() > self.end:
            self.report()
        self.tried += 1
        # The file survives a crash of the process.
        (self.folder / "current").write_bytes(content)
        began = time.process_time()  # a busy machine makes no reader slow
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.reader.read(content, self.folder)
        except (RobustsoupError, *self.reader.refusals) as error:
            if not str(error).isprintable() and not self.reader.refusals:
                self.keep(content, "a message of more than one line")
        except Exception as error:  # whatever else is a traceback for users
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.keep(
                content, f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            )
        if time.process_time() - began > MOST_SECONDS:
            self.keep(content, "slow")

    def keep(self, content, reason):
        """Keep the first input of each kind."""
        if reason not in self.found:
            name = hashlib.sha256(content).hexdigest()[:16]
            (self.folder / "findings").mkdir(exist_ok=True)
            (self.folder / "findings" / name).write_bytes(content)
            self.found[reason] = name

    def report(self):
        """Print the result and end the process."""
        print(json.dumps({"tried": self.tried, "found": self.found}), flush=True)
        os._exit(0)


def main():
    """Write the seeds into the corpus, and fuzz."""
    name, seconds, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    reader, corpus = readers.READERS[name], folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(reader.seeds(str(folder))):
        (corpus / f"seed-{number}").write_bytes(seed)
    fuzzing = Fuzzing(reader, seconds, folder)
    options = [f"-max_len={MOST_BYTES}", "-seed=1", "-timeout=300", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(corpus)], fuzzing.try_input)
    atheris.Fuzz()


main()
