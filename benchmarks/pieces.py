"""Run a recipe in pieces, on machines that are lent for minutes and keep nothing.

    python benchmarks/pieces.py RECIPE -o RUN --pack PARTS --minutes 10
    python benchmarks/pieces.py RECIPE -o RUN --unpack PARTS --pack MORE_PARTS --minutes 10
    python benchmarks/pieces.py --small

Each call fills the store from the parts that the last one packed, lets `robustsoup run` go on for
some minutes, ends it as Ctrl-C would, and packs what the next call needs: finished steps and the
state of the unfinished one, in files of at most 15 MiB. Networks that take seconds to make again
(plain mixes) are left out. Ctrl-C or SIGTERM ends a piece early, which packs all the same.
`robustsoup plan RECIPE --device h100` says how many pieces of ten minutes a recipe takes. Options
that it does not know are handed to `robustsoup run`. The exit code is that of the run, or 75 if it
is not finished. --small runs a recipe on digits in two pieces and at once, and compares the
verdicts.
"""

import argparse
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import write_small_recipe

from robustsoup.errors import StorageError
from robustsoup.runs.store import Store

PART_BYTES = 15 * 2**20
UNFINISHED = 75
"""The exit code of a piece that others must follow; EX_TEMPFAIL of sysexits.h."""
TERMINATED = 128 + signal.SIGTERM
"""The exit code of robustsoup after SIGTERM."""
QUICK_KIND = "mix"
"""The kind of step that takes seconds to repeat."""


def is_packed(path: Path, store: Store) -> bool:
    """Return whether the next piece needs a file of the store."""
    if path.suffix == ".lock":
        return False
    try:
        return store.record(path.parent.name)["kind"] != QUICK_KIND
    except StorageError:  # the state of an unfinished step
        return True


def pack(store: Store, folder: Path) -> list[Path]:
    """Write the files of the store that the next piece needs, as parts of one archive.

    Earlier parts stay until all new ones are written.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=1) as tar:
        for path in sorted(store.root.rglob("*")):
            if path.is_file() and is_packed(path, store):
                tar.add(path, path.relative_to(store.root))
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for begin in range(0, archive.tell(), PART_BYTES):
            written.append(Path(temporary) / f"part-{len(written):03}")
            written[-1].write_bytes(archive.getbuffer()[begin : begin + PART_BYTES])
        parts = [part.replace(folder / part.name) for part in written]
    for earlier in {*folder.glob("part-*")} - {*parts}:
        earlier.unlink()
    return parts


def unpack(folder: Path, store: Store) -> None:
    """Fill the store from the parts in a folder."""
    parts = sorted(folder.glob("part-*"))
    if not parts:
        sys.exit(f"{folder}: no parts of an earlier piece")
    archive = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(fileobj=archive, mode="r:gz") as tar:
        tar.extractall(store.root, filter="data")


def run_for(minutes: float | None, arguments: Sequence[str], store: Store) -> int:
    """Run `robustsoup run` for some minutes; return its exit code, or UNFINISHED.

    An interrupt ends the run in good order before it is raised again.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "robustsoup", "run", *arguments],
        env=os.environ | {"ROBUSTSOUP_STORE": str(store.root)},
        start_new_session=True,  # Ctrl-C must not be a second signal, which would not save
    )
    try:
        return process.wait(None if minutes is None else 60 * minutes)
    except subprocess.TimeoutExpired:
        process.terminate()
        code = process.wait()
        return UNFINISHED if code == TERMINATED else code
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def run_piece(
    arguments: Sequence[str],
    store: Store,
    minutes: float | None = None,
    *,
    unpack_from: Path | None = None,
    pack_to: Path | None = None,
) -> int:
    """Run one piece, and return its exit code; without `minutes`, run to the end.

    What is finished is packed even if the run is interrupted.
    """
    if unpack_from:
        unpack(unpack_from, store)
    try:
        code = run_for(minutes, arguments, store)
    finally:
        if pack_to:
            parts = pack(store, pack_to)
            print(f"{pack_to}: files of at most {PART_BYTES // 2**20} MiB: {len(parts)}")
    if code == UNFINISHED:
        print("not finished: run the next piece")
    return code


def run_small(folder: Path) -> int:
    """Run a recipe on digits in two pieces, each with an empty store, and once at once."""
    recipe, parts = str(write_small_recipe("subspaces", folder)), folder / "parts"
    first, second, whole = (
        ([recipe, "-o", str(folder / name)], Store(folder / f"store-{name}"))
        for name in ("first", "second", "whole")
    )
    run_piece(*first, 0.15, pack_to=parts)
    run_piece(*second, unpack_from=parts)
    code = run_piece(*whole)
    if code not in (0, 3):  # 3: no soup met the requirement
        return code
    paths = sorted((folder / "whole" / "evaluations").glob("*.npz"))
    for path in paths:
        with np.load(path) as whole, np.load(folder / "second/evaluations" / path.name) as piece:
            if any(not np.array_equal(whole[name], piece[name]) for name in whole.files):
                sys.exit(f"{path.name}: the pieces have other verdicts")
    print(f"in two pieces and at once: {len(paths)} evaluations with the same verdicts")
    return 0


def main() -> int:
    """Run one piece."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="recipe (TOML)")
    parser.add_argument("-o", "--output", type=Path, help="run folder")
    parser.add_argument("--unpack", type=Path, help="folder of the parts of the last piece")
    parser.add_argument("--pack", type=Path, help="folder for the parts that the next one needs")
    parser.add_argument("--minutes", type=float, default=10, help="default 10")
    parser.add_argument("--small", action="store_true", help="run in seconds on digits")
    options, arguments = parser.parse_known_args()
    if options.small:
        with tempfile.TemporaryDirectory() as temporary:
            return run_small(Path(temporary))
    if options.recipe is None or options.output is None:
        parser.error("a recipe and -o are required")
    arguments = [str(options.recipe), "-o", str(options.output), *arguments]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_piece(
            arguments, Store(), options.minutes, unpack_from=options.unpack, pack_to=options.pack
        )
    except KeyboardInterrupt:
        return UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
