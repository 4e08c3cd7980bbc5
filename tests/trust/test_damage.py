"""Flipped bits and cut ends in files of every format: noticed, or without effect."""

import random

import pytest
from all_formats import ALL_FORMATS
from mutations import cut_short, flip_bits

from robustsoup.errors import RobustsoupError

TEXTS_THAT_PEOPLE_EDIT = ("recipe",)
"""Files without a digest; another value in them is another request, not damage."""
FLIPS, CUTS = 7_000, 3_000


@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_damage_is_noticed_or_changes_nothing(tmp_path, tally_of, tries, kind):
    save, read = ALL_FORMATS[kind]
    path = save(tmp_path)
    whole, expected = path.read_bytes(), read(path)
    assert expected is not None
    flips = flip_bits(whole, tries(-(-FLIPS // len(ALL_FORMATS))), seed=7)
    cuts = cut_short(whole, tries(-(-CUTS // len(ALL_FORMATS))), seed=7)
    tally = tally_of(f"a flipped bit or a cut end: {kind}")
    for damaged in (*flips, *cuts):
        path.write_bytes(damaged)
        tally.count()
        try:
            found = read(path)
        except RobustsoupError as error:
            if not str(error).isprintable():
                tally.lost.append(f"more than one line: {str(error)!r}")
            continue
        except Exception as error:  # whatever else is a traceback for users
            tally.lost.append(f"{type(error).__name__}: {error}")
            continue
        if found not in (None, expected) and kind not in TEXTS_THAT_PEOPLE_EDIT:
            tally.silent.append(f"{len(damaged)} bytes, {find_place(damaged, whole)}")
    path.write_bytes(whole)
    tally.check()


def find_place(damaged, whole):
    """Return where a damaged content differs first."""
    pairs = enumerate(zip(damaged, whole, strict=False))
    return next((f"byte {n}: {a!r} for {b!r}" for n, (a, b) in pairs if a != b), "cut short")


def test_a_step_that_lost_a_file_runs_again(tmp_path, tally_of):
    """Whatever file of a finished step is missing, the store does not hand the step out."""
    tally = tally_of("a missing file of a stored step")
    save, read = ALL_FORMATS["file of a stored step"]
    path = save(tmp_path)
    names = [file.name for file in path.parent.iterdir()]
    random.Random(0).shuffle(names)
    for name in names:
        file = path.parent / name
        content = file.read_bytes()
        file.unlink()
        tally.count()
        if read(path) is not None:
            tally.silent.append(name)
        file.write_bytes(content)
    tally.check()
