"""Real pools: Ray with two workers, one of which is killed, two runs at once, submitit."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import stored_content, without_times

from robustsoup.errors import WorkError
from robustsoup.runs.slurm_pool import SlurmPool
from robustsoup.runs.store import Store

pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="ends processes by /proc"),
]
SECONDS = 600
SMALL = """
name = "small"
data = "digits"
model = "resnet9:width=2"
precision = "float32"

[pretrain]
threat = "Linf 32/255"
epochs = 20
lr = 0.2

[finetune]
epochs = 1

[ingredients]
low = { threat = "Linf 16/255" }

[evaluate]
threats = ["Linf 32/255"]
steps = 3
report_samples = 64

[report]
examples = 0
"""
"""A recipe of few steps, the first of which is long enough to be killed in its middle."""


def start(folder, *words, store="store"):
    """Start the command line in a folder, with one thread for each step."""
    variables = {**os.environ, "ROBUSTSOUP_STORE": str(folder / store), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "robustsoup", *map(str, words)],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(folder, name, *words):
    return start(
        folder, "run", "small.toml", "--threads", "1", *words, "-o", name, store=f"{name}.store"
    )


def finish(process):
    """Return the exit code and the messages."""
    try:
        _, messages = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, messages


def wait_for(find, process=None):
    """Return what `find` returns once it is true."""
    end = time.monotonic() + SECONDS
    while not (found := find()):
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found


def find_status(store, parts):
    """Return the status of a running step of which some parts are done, if there is one."""
    for path in store.glob(".run.*/*.json"):
        try:
            status = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if status["done"] >= parts:
            return status
    return None


def find_process(status):
    return int(status["place"].rpartition("process ")[2])


def check_equal(folder, name, other="one"):
    """Check that two runs wrote the same bytes, except when and how long."""
    expected, found = (stored_content(folder / f"{item}.store") for item in (other, name))
    assert sorted(found) == sorted(expected)
    assert [file for file in found if found[file] != expected[file]] == []
    contents = [
        without_times(json.loads((folder / item / "results.json").read_text()))
        for item in (other, name)
    ]
    assert contents[0] == contents[1]
    store = folder / f"{name}.store"
    assert not list(store.glob(".run*"))
    assert not list(store.rglob("*.partial"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a recipe, and its run in one process."""
    folder = tmp_path_factory.mktemp("pools")
    (folder / "small.toml").write_text(SMALL)
    code, messages = finish(run(folder, "one"))
    assert code == 0, messages
    return folder


@contextmanager
def run_cluster(log, *, path=""):
    """Run a Ray cluster of one machine with two CPUs, and yield its address and its process.

    Args:
        log: File for the messages of Ray.
        path: Folder in which the workers look for modules first.
    """
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray demands a token; that of a test is new, and its commands get the same variables.
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    variables = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    if path:
        variables["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    # Ray makes Unix sockets in its folder, whose paths have at most 107 letters.
    short = Path("/tmp") / f"ray{port}"
    words = ("start", "--head", "--block", "--port", port, "--num-cpus", 2, "--temp-dir", short)
    words += ("--include-dashboard", "false", "--object-store-memory", 80 * 2**20)
    words += ("--disable-usage-stats",)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *map(str, words)],
            env=variables,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield wait_for(lambda: answers(port), process), process
    finally:
        patch.undo()
        process.terminate()
        try:
            process.wait(60)
        finally:
            shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a Ray cluster of one machine with two CPUs."""
    with run_cluster(tmp_path_factory.mktemp("ray") / "log") as (address, _):
        yield address


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return None
    return f"127.0.0.1:{port}"


def test_ray_repeats_the_step_of_a_killed_worker(folder, cluster):
    process = run(folder, "killed", "--ray", cluster)
    status = wait_for(lambda: find_status(folder / "killed.store", 1), process)
    os.kill(find_process(status), signal.SIGKILL)
    code, messages = finish(process)
    assert code == 0, messages
    assert messages.count("lost its worker") == 1
    assert "pretrained: lost its worker" in messages
    assert "the step runs again (1 of at most 3 times)" in messages
    check_equal(folder, "killed")


def test_ray_starts_on_this_machine(folder):
    code, messages = finish(run(folder, "local", "--ray", "local", "--part-samples", 20))
    assert code == 0, messages
    log = (folder / "local" / "log.txt").read_text()
    assert "ray local: 1 machine, at most" in log
    assert "low.test.3of3: runs on" in log
    store = Store(folder / "local.store")
    for key in store.keys():  # noqa: SIM118
        if store.record(key)["kind"] == "part":
            shutil.rmtree(store.path(key))
    check_equal(folder, "local")


def test_two_runs_at_once_do_each_step_once(folder, cluster):
    processes = [
        start(folder, "run", "small.toml", "--threads", "1", "--ray", cluster, "-o", name, store=s)
        for name, s in (("first", "two.store"), ("second", "two.store"))
    ]
    ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [0, 0], ended
    store = Store(folder / "two.store")
    names = [store.record(key)["name"] for key in store.keys()]  # noqa: SIM118
    logs = "".join((folder / name / "log.txt").read_text() for name in ("first", "second"))
    for name in names:
        ends = re.findall(rf"^\S+ \d+/\d+ \w+ {re.escape(name)}: .*", logs, re.MULTILINE)
        done = [line for line in ends if "runs on" not in line]  # not the notes of waiting
        assert len([line for line in done if "by another process" not in line]) == 1, done
    for name in ("first", "second"):
        (folder / f"{name}.store").symlink_to(store.root)
        check_equal(folder, name)


def test_an_interrupted_run_says_how_to_go_on(folder, cluster):
    process = run(folder, "stopped", "--ray", cluster)
    wait_for(lambda: find_status(folder / "stopped.store", 1), process)
    process.send_signal(signal.SIGINT)
    code, messages = finish(process)
    assert code == 130
    assert messages.splitlines()[-1] == (
        "robustsoup: interrupted; run the same command again to resume"
    )
    assert not list((folder / "stopped.store").glob(".run*"))
    assert "Traceback" not in messages
    code, messages = finish(run(folder, "stopped", "--ray", cluster))
    assert code == 0, messages
    check_equal(folder, "stopped")


def test_a_worker_of_another_version_is_refused(folder, tmp_path):
    installed = tmp_path / "robustsoup-0.0.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: robustsoup\nVersion: 0.0.9\n")
    with run_cluster(tmp_path / "log", path=tmp_path) as (address, _):
        code, messages = finish(run(folder, "refused", "--ray", address))
    assert code == 2
    assert "version of robustsoup: got 0.0.9, expected" in messages
    assert "install the same version on every machine" in messages


def test_a_head_that_dies_ends_the_run_in_one_line(folder, tmp_path):
    with run_cluster(tmp_path / "log") as (address, head):
        process = run(folder, "headless", "--ray", address)
        wait_for(lambda: find_status(folder / "headless.store", 1), process)
        os.killpg(head.pid, signal.SIGKILL)
        code, messages = finish(process)
        head.wait()
    assert code == 1
    last = messages.splitlines()[-1]
    assert last.startswith("robustsoup: ray: the head of the cluster is gone")
    assert "run the same command" in last
    code, messages = finish(run(folder, "headless"))
    assert code == 0, messages
    check_equal(folder, "headless")


def test_a_step_that_no_machine_can_run_is_refused(folder, cluster):
    process = start(folder, "run", "small.toml", "--threads", 3, "--ray", cluster, "-o", "large")
    code, messages = finish(process)
    assert code == 2
    assert messages.splitlines()[-1] == (
        f"robustsoup: ray: a step needs 3 CPUs, and no machine of {cluster} has them; "
        "set --threads or --device"
    )


@pytest.mark.parametrize(
    ("name", "reason"), [("SIGKILL", "job "), ("SIGUSR2", "the job was told to end")]
)
def test_submitit_repeats_the_step_of_a_job_that_ends_early(folder, name, reason):
    """Slurm sends SIGUSR2 before the time limit, as submitit asks for."""
    pytest.importorskip("submitit")
    process = run(folder, name, "--slurm", "local")
    status = wait_for(lambda: find_status(folder / f"{name}.store", 1), process)
    os.kill(find_process(status), getattr(signal, name))
    code, messages = finish(process)
    assert code == 0, messages
    assert re.search(rf"pretrained: .*{reason}", messages)
    check_equal(folder, name)


def test_a_partition_that_does_not_exist_is_one_line(tmp_path, monkeypatch, capfd):
    """A file takes the place of sbatch, with the words of Slurm."""
    pytest.importorskip("submitit")
    words = "invalid partition specified: nowhere"
    for name in ("sbatch", "srun", "squeue", "sacct", "scancel"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "sbatch: error: {words}" >&2\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pool = SlurmPool("nowhere", threads=1, gpus=0)
    pool.open({"folder": str(tmp_path)})
    with pytest.raises(WorkError) as caught:
        pool.submit("key", "low.test", {"folder": str(tmp_path)}, b"")
    assert str(caught.value).startswith(
        f"low.test: sbatch refused the job: sbatch: error: {words}; SBATCH_ACCOUNT, "
    )
    assert capfd.readouterr() == ("", "")


def test_a_slurm_job_has_the_time_limit_of_its_partition(tmp_path, monkeypatch):
    """Files take the place of Slurm's commands; `sbatch` keeps the job that it gets."""
    script = tmp_path / "script.sh"
    for name in ("sbatch", "srun", "squeue", "sacct", "scancel"):
        keep = f'cp "$1" {script}\n' if name == "sbatch" else ""
        (tmp_path / name).write_text(f'#!/bin/sh\n{keep}echo "Submitted batch job 12"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pool = SlurmPool("gpu", threads=3, gpus=1)
    pool.open({"folder": str(tmp_path)})
    pool.submit("key", "step", {"folder": str(tmp_path)}, b"")
    lines = script.read_text().splitlines()
    assert "#SBATCH --partition=gpu" in lines
    assert "#SBATCH --cpus-per-task=3" in lines
    assert "#SBATCH --gpus-per-node=1" in lines
    assert not [line for line in lines if line.startswith("#SBATCH --time")]
