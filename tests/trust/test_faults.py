"""Disks, rights and clocks that fail: one line, and the same command ends well afterwards.

The mounts need root on Linux; the tests are skipped elsewhere.
"""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from commands import Command, find_differences, is_one_line, lasting_files, run
from process_faults import become_nobody, jump_clock
from small_work import COMMANDS, make_inputs


def can_mount():
    """Return whether this process may mount file systems."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        mount = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        if mount.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return mount.returncode == 0


@pytest.fixture(scope="module")
def mounts():
    """Skip the tests that must mount file systems where this process may not."""
    if not can_mount():
        pytest.skip("requires the right to mount")


@contextlib.contextmanager
def mounted(folder, options):
    """Mount an empty file system in memory at a folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, options):
    """Change the options of a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.fixture(scope="module")
def inputs():
    """A folder of inputs that every user may enter; commands run in folders beside them."""
    with tempfile.TemporaryDirectory(prefix="trust-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        make_inputs(folder)
        yield folder


@pytest.fixture(scope="module")
def expected(inputs):
    """The files and the duration of each undisturbed command, by name."""
    found = {}
    for name, arguments in COMMANDS.items():
        (inputs / f"{name}-whole").mkdir()
        began = time.monotonic()
        code, output = run(arguments, inputs / f"{name}-whole", inputs / f"{name}-store-whole")
        assert code == 0, output
        found[name] = lasting_files(inputs / f"{name}-whole"), time.monotonic() - began
    return found


def check_refused(tally, what, code, output):
    """Count a run on a broken disk, which may succeed or fail in one line."""
    tally.count()
    if code not in (0, 1, 2) or (code != 0 and not is_one_line(output)):
        tally.lost.append(f"{what}: exit code {code}: {output[-800:]}")


def check_same(tally, what, result, folder, files):
    """Check that a command ended with the files of an undisturbed one."""
    code, output = result
    if code != 0:
        tally.lost.append(f"{what}: then exit code {code}: {output[-800:]}")
    elif differing := find_differences(lasting_files(folder), files):
        tally.silent.append(f"{what}: {differing} differ")


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(
    ("fault", "small", "large"),
    [
        ("full disk", "size={}k", lambda generator: generator.randint(4, 900)),
        ("no inode", "size=64m,nr_inodes={}", lambda generator: generator.randint(3, 120)),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(inputs, expected, tally_of, tries, fault, small, large, name):
    tally, generator = tally_of(f"{fault}: `{name}`"), random.Random(f"{fault} {name}")
    for number in range(tries(10)):
        disk = inputs / f"{name}-{fault.replace(' ', '-')}-{number}"
        what = small.format(large(generator))
        with mounted(disk, what):
            work, store = disk / "work", disk / "store"
            work.mkdir()
            for link in ("base", "low", "high"):
                with contextlib.suppress(OSError):
                    (disk / f"{link}.safetensors").symlink_to(inputs / f"{link}.safetensors")
            with contextlib.suppress(OSError):
                (disk / "tiny.toml").symlink_to(inputs / "tiny.toml")
            if not (disk / "tiny.toml").is_symlink():
                continue
            check_refused(tally, f"{name}, {what}", *run(COMMANDS[name], work, store))
            remount(disk, "size=64m,nr_inodes=100k")
            result = run(COMMANDS[name], work, store)
            check_same(tally, f"{name}, {what}", result, work, expected[name][0])
    tally.check()


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_file_system(inputs, expected, tally_of, name):
    tally = tally_of(f"read-only file system: `{name}`")
    for place in ("work", "store"):
        disk = inputs / f"{name}-read-only-{place}"
        other = inputs / f"{name}-writable-{place}"
        other.mkdir()
        with mounted(disk, "size=64m"):
            remount(disk, "ro")
            if place == "work":
                # Relative inputs lie beside the folder that the command runs in.
                words = [str(word).replace("../", f"{inputs}/") for word in COMMANDS[name]]
                code, output = run(words, disk, other / "store")
                if code == 0:
                    tally.silent.append(f"{name}: exit code 0 on a read-only folder")
                check_refused(tally, f"{name}, output", code, output)
                remount(disk, "rw")
                result = run(words, disk, other / "store")
                check_same(tally, f"{name}, output", result, disk, expected[name][0])
            else:
                check_refused(tally, f"{name}, store", *run(COMMANDS[name], other, disk))
    tally.check()


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("name", COMMANDS)
def test_no_permission(inputs, expected, tally_of, name):
    tally = tally_of(f"no permission: `{name}`")
    work, closed, store = (inputs / f"{name}-{word}" for word in ("denied", "closed", "open-store"))
    for folder in (work, closed, store):
        folder.mkdir()
    closed.chmod(0o700)
    for what, folder, place in (
        ("output", work, store),
        ("working folder", closed, store),
        ("store", work, closed / "store"),
    ):
        code, output = run(COMMANDS[name], folder, place, become_nobody)
        if code == 0 and what != "store":
            tally.silent.append(f"{name}, {what}: exit code 0")
        check_refused(tally, f"{name}, {what}", code, output)
    tally.check()


def shift_times(folder, generator):
    """Set the times of all files to the far past or future."""
    for path in folder.rglob("*"):
        moment = time.time() + generator.choice((-20, -1, 1, 20)) * 365 * 86_400
        os.utime(path, (moment, moment))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_clock_that_jumps(inputs, expected, tally_of, tries, name):
    tally, generator = tally_of(f"clock jumps: `{name}`"), random.Random(name)
    files, seconds = expected[name]
    for number in range(tries(10)):
        work, store = inputs / f"{name}-clock-{number}", inputs / f"{name}-clock-store-{number}"
        work.mkdir()
        command = Command(COMMANDS[name], work, store, jump_clock)
        if command.wait(generator.uniform(0, seconds)) is None:
            command.kill()
        for folder in (work, store):
            shift_times(folder, generator)
        tally.count()
        result = run(COMMANDS[name], work, store, jump_clock)
        check_same(tally, f"{name} {number}", result, work, files)
    tally.check()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_removed_in_the_middle(inputs, expected, tally_of, tries, name):
    tally, generator = tally_of(f"folder removed in the middle: `{name}`"), random.Random(name)
    files, seconds = expected[name]
    for number in range(tries(10)):
        work, store = inputs / f"{name}-gone-{number}", inputs / f"{name}-gone-store-{number}"
        work.mkdir()
        command = Command(COMMANDS[name], work, store)
        command.wait(generator.uniform(0, seconds))
        victims = [store, *work.iterdir()]
        for victim in generator.sample(victims, generator.randint(1, len(victims))):
            shutil.rmtree(victim, ignore_errors=True)
        code = command.wait()
        check_refused(tally, f"{name} {number}", code, command.output())
        check_same(tally, f"{name} {number}", run(COMMANDS[name], work, store), work, files)
    tally.check()
