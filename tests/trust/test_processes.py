"""Several processes at once, in one store and in one folder; and the same command twice."""

import pytest
from commands import Command, find_differences, lasting_files, run
from small_work import COMMANDS, make_inputs

PROCESSES = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of inputs; commands run in folders beside them."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def run_whole(inputs, name, suffix, arguments):
    """Run a command undisturbed and return its files."""
    folder = inputs / f"{name}-{suffix}"
    folder.mkdir()
    code, output = run(arguments, folder, inputs / f"{name}-store-{suffix}")
    assert code == 0, output
    return lasting_files(folder)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("shared", ["store", "store and folder"])
def test_processes_that_share(inputs, tally_of, tries, name, shared):
    tally = tally_of(f"{PROCESSES} processes on one {shared}: `{name}`")
    expected = run_whole(inputs, name, f"alone-{shared.count(' ')}", COMMANDS[name])
    for number in range(tries(5)):
        stem = f"{name}-{shared.count(' ')}-{number}"
        folders = [inputs / f"{stem}-{member}" for member in range(PROCESSES)]
        if shared == "store and folder":
            folders = folders[:1] * PROCESSES
        for folder in folders:
            folder.mkdir(exist_ok=True)
        commands = [Command(COMMANDS[name], folder, inputs / f"{stem}-store") for folder in folders]
        for command in commands:
            code = command.wait()
            tally.count()
            if code != 0:
                tally.lost.append(f"{stem}: exit code {code}: {command.output()[-500:]}")
        for folder in folders:
            if differing := find_differences(lasting_files(folder), expected):
                tally.silent.append(f"{stem}: {differing} differ")
    tally.check()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_gives_the_same_bytes(inputs, tally_of, name, threads):
    tally = tally_of(f"the same command twice, {threads} thread(s): `{name}`")
    arguments = list(COMMANDS[name])
    arguments[arguments.index("--threads") + 1] = threads
    first, second = (
        run_whole(inputs, name, f"{threads}-threads-{turn}", arguments) for turn in ("a", "b")
    )
    tally.count()
    tally.silent += find_differences(first, second)
    tally.check()
