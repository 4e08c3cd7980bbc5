"""A command that was killed with SIGKILL at random moments ends with the bytes of a whole one."""

import random
import time

import pytest
from commands import Command, find_differences, lasting_files, run
from small_work import COMMANDS, make_inputs

MOST_KILLS_OF_ONE_RUN = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of inputs; commands run in folders beside them."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_with_the_same_bytes(inputs, tally_of, tries, name):
    arguments, tally = COMMANDS[name], tally_of(f"SIGKILL at a random moment of `{name}`")
    whole = inputs / f"{name}-whole"
    whole.mkdir()
    began = time.monotonic()
    code, output = run(arguments, whole, inputs / f"{name}-store-whole")
    seconds, expected = time.monotonic() - began, lasting_files(whole)
    assert code == 0, output
    generator, number = random.Random(name), 0
    while tally.tried < tries(100):
        number += 1
        folder, store = inputs / f"{name}-{number}", inputs / f"{name}-store-{number}"
        folder.mkdir()
        for _ in range(generator.randint(1, MOST_KILLS_OF_ONE_RUN)):
            command = Command(arguments, folder, store)
            if command.wait(generator.uniform(0, seconds)) is not None:
                break
            command.kill()
            tally.count()
        code, output = run(arguments, folder, store)
        if code != 0:
            tally.lost.append(f"{name} {number}: exit code {code}: {output[-500:]}")
        elif differing := find_differences(lasting_files(folder), expected):
            tally.silent.append(f"{name} {number}: {differing} differ")
    tally.check()
