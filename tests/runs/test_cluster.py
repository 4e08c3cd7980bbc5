"""Steps run on the workers of a pool: same bytes, lost workers, misfits, what is told."""

import builtins
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import (
    DATA,
    PLANE,
    RecordingReporter,
    forget_steps,
    recipe_of,
    recipe_of_files,
    run_recipe,
    stored_content,
    without_times,
)

from robustsoup.cli import recipe_runs
from robustsoup.cli.options import ClusterOptions, RunOptions
from robustsoup.cli.recipe_runs import open_executor
from robustsoup.distributed import describe_device, required_versions
from robustsoup.errors import RequestError, StorageError, WorkError
from robustsoup.interruption import held_signals
from robustsoup.runs import cluster, ray_pool, slurm_pool
from robustsoup.runs.cluster import Cluster, Lost
from robustsoup.runs.execute import MOST_LOSSES
from robustsoup.runs.locks import lock_folder
from robustsoup.runs.remote import PROBE, StatusFile, _load_context, find_misfit, run_assignment
from robustsoup.runs.run import prepare_run, run_prepared
from robustsoup.runs.store import Store
from robustsoup.runs.tasks import EvaluateNetwork, EvaluationSettings
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel


class FakePool:
    """Runs each step in this process when it is asked for ends.

    Args:
        losses: How many times each step of a name loses its worker.
        change: Changes an Assignment before it is run.
        most_at_once: Steps that may be submitted and not ended.
    """

    def __init__(self, losses=None, change=None, most_at_once=10):
        self.losses = dict(losses or {})
        self.change = change
        self.most_at_once = most_at_once
        self.submitted, self.waiting = [], []
        self.most_waiting = 0
        self.opened = self.closed = 0
        self.meeting = None

    def open(self, meeting):
        self.opened += 1
        self.meeting = meeting
        return "a pool of tests"

    def submit(self, key, name, meeting, content):
        inputs = [key for key in pickle.loads(content).step.inputs if not key.startswith("file:")]
        assert all(map(Store(meeting["store"]).has, inputs)), name
        self.submitted.append(name)
        self.waiting.append((key, name, meeting, content))
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def poll(self, seconds):
        key, name, meeting, content = self.waiting.pop()
        if self.losses.get(name, 0) > 0:
            self.losses[name] -= 1
            return {key: Lost("killed by a test")}
        if self.change is not None:
            content = pickle.dumps(self.change(pickle.loads(content)))
        return {key: run_assignment(meeting, content)}

    def close(self):
        self.closed += 1


def run_in(pool, recipe, folder, reporter=None, part_samples=None):
    """Run a recipe in a pool and return the reporter."""
    reporter = reporter or RecordingReporter()
    prepared = prepare_run(recipe, device="cpu", part_samples=part_samples)
    with lock_folder(folder, reporter.note), Cluster(prepared, pool) as executor:
        run_prepared(prepared, folder, reporter, executor)
    return reporter


def test_a_run_in_a_pool_writes_the_bytes_of_one_in_this_process(finished, tmp_path, on_one_thread):
    pool = FakePool()
    reporter = run_in(pool, recipe_of(), tmp_path / "run")
    stored, expected = stored_content(tmp_path / "store"), stored_content(finished.store)
    assert sorted(stored) == sorted(expected)
    assert [name for name in stored if stored[name] != expected[name]] == []
    results = (tmp_path / "run" / "results.json", finished.folder / "results.json")
    first, second = (without_times(json.loads(path.read_text())) for path in results)
    assert first == second
    assert sorted(reporter.finished_steps) == sorted(finished.reporter.finished_steps)
    assert set(reporter.places) == set(pool.submitted)
    assert (pool.opened, pool.closed) == (1, 1)
    assert pool.most_waiting > 1  # steps that do not need each other are submitted together
    assert "a pool of tests" in reporter.notes
    assert not list((tmp_path / "store").glob(".run*"))


def test_finished_steps_open_no_pool(copied):
    folder, _ = copied
    pool = FakePool()
    reporter = run_in(pool, recipe_of(), folder)
    assert reporter.finished_steps == []
    assert (pool.opened, pool.closed, pool.submitted) == (0, 0, [])


def test_a_step_that_loses_its_worker_runs_again(copied):
    folder, store = copied
    before = stored_content(store)
    forget_steps(store, "low.test")
    pool = FakePool({"low.test": MOST_LOSSES})
    reporter = run_in(pool, recipe_of(), folder)
    assert pool.submitted == ["low.test"] * (1 + MOST_LOSSES)
    assert reporter.notes[1:] == [
        f"low.test: lost its worker (killed by a test); the step runs again ({number} of at most "
        f"{MOST_LOSSES} times)"
        for number in range(1, 1 + MOST_LOSSES)
    ]
    assert stored_content(store).keys() == before.keys()


def test_parts_of_evaluations_and_planes_change_no_byte(copied):
    folder, store = copied
    with_plane = recipe_of([(("planes",), {"p": PLANE})])
    run_recipe(with_plane, folder)
    expected = stored_content(store)
    forget_steps(store, "low.test", "low.val", "p")
    pool = FakePool({"low.test.2of3": 1, "p.1of2": 1})
    run_in(pool, with_plane, folder, part_samples=20)
    found = stored_content(store)
    assert [name for name in expected if found[name] != expected[name]] == []
    added = {name.partition("/")[0] for name in found.keys() - expected.keys()}
    evaluations = {f"low.{split}.{number}of3" for split in ("val", "test") for number in (1, 2, 3)}
    assert added >= evaluations | {"p.1of2", "p.2of2"}  # more for what reads low.val
    # A lost part runs again, and no finished one.
    counts = Counter(pool.submitted)
    assert {name for name, count in counts.items() if count > 1} == {"low.test.2of3", "p.1of2"}
    assert counts.keys() >= added | {"low.test", "low.val", "p"}


def test_a_finished_step_needs_no_parts(copied):
    folder, _ = copied
    pool = FakePool()
    run_in(pool, recipe_of(), folder, part_samples=20)
    assert pool.submitted == []


def test_attacks_that_take_samples_together_are_not_divided():
    def parts(**attack):
        task = EvaluateNetwork(
            "network",
            EvaluationSettings("test", 64, (ThreatModel("Linf", 0.1),), AttackSettings(**attack)),
        )
        return task.count_parts(DATA, 20)

    assert parts() == parts(attack="square") == parts(attack="strong") == 3
    assert parts(attack="autoattack") == parts(attack="my_attack:attack") == 1


def test_a_step_that_loses_too_many_workers_ends_the_run(copied):
    folder, store = copied
    forget_steps(store, "low.test")
    pool = FakePool({"low.test": 1 + MOST_LOSSES})
    with pytest.raises(WorkError) as caught:
        run_in(pool, recipe_of(), folder)
    assert str(caught.value) == (
        "low.test: lost its worker 4 times, last: killed by a test; "
        "run the same command again to resume"
    )
    assert pool.closed == 1
    assert not list(store.glob(".run*"))


class TimeLimitedPool(FakePool):
    """A pool whose first jobs of a step reach their time limit with some parts done."""

    def __init__(self, *done):
        super().__init__()
        self.done = list(done)

    def poll(self, seconds):
        if not self.done:
            return super().poll(seconds)
        key, _, meeting, _ = self.waiting.pop()
        status = StatusFile(Path(meeting["folder"]) / f"{key}.json")
        status.status["done"] = self.done.pop(0)
        status.write()
        return {key: Lost("the job was told to end", saved=True)}


def test_a_step_takes_any_number_of_time_limits(copied):
    folder, store = copied
    forget_steps(store, "low.test")
    pool = TimeLimitedPool(*range(1, 10))
    reporter = run_in(pool, recipe_of(), folder)
    assert pool.submitted == ["low.test"] * 10
    assert (
        reporter.notes[1:]
        == ["low.test: the job was told to end; the step goes on in another worker"] * 9
    )


def test_a_step_that_gets_no_further_ends_the_run(copied):
    folder, store = copied
    forget_steps(store, "low.test")
    pool = TimeLimitedPool(5, *[5] * (1 + MOST_LOSSES))
    with pytest.raises(WorkError, match=r"^low\.test: lost its worker 4 times, last: the job was"):
        run_in(pool, recipe_of(), folder)


def test_no_more_steps_are_submitted_than_the_pool_takes(copied):
    folder, store = copied
    forget_steps(store, "low.test", "high.test", "pretrained.test")
    pool = FakePool(most_at_once=1)
    run_in(pool, recipe_of(), folder)
    assert len(pool.submitted) == 3
    assert pool.most_waiting == 1


def test_a_step_that_another_run_has_finished_is_not_done_again(copied):
    folder, store = copied
    forget_steps(store, "low.test")

    class SlowPool(FakePool):
        def poll(self, seconds):
            run_recipe(recipe_of(), folder.parent / "other")  # another driver is quicker
            self.stored = self.times()
            return super().poll(seconds)

        def times(self):
            return {path: path.stat().st_mtime_ns for path in store.rglob("evaluation.*")}

    pool = SlowPool()
    run_in(pool, recipe_of(), folder)
    assert pool.submitted == ["low.test"]
    assert pool.times() == pool.stored


def test_an_output_that_the_file_system_hides_for_a_while_is_awaited(copied, monkeypatch):
    folder, store = copied
    forget_steps(store, "low.test")
    hidden = folder.parent / "hidden"
    waited = []

    class HidingPool(FakePool):
        def poll(self, seconds):
            ends = super().poll(seconds)
            (key,) = ends
            self.output = Store(store).path(key)
            self.output.rename(hidden)
            return ends

    def show(seconds):
        waited.append(seconds)
        hidden.rename(pool.output)

    pool = HidingPool()
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=show)
    monkeypatch.setattr(cluster, "time", clock)
    run_in(pool, recipe_of(), folder)
    assert waited == [cluster.POLL_SECONDS]
    assert pool.submitted == ["low.test"]


def test_an_interruption_cancels_and_leaves_no_folder(copied):
    folder, store = copied
    forget_steps(store, "low.test")

    class InterruptedPool(FakePool):
        def poll(self, seconds):
            raise KeyboardInterrupt

    pool = InterruptedPool()
    with pytest.raises(KeyboardInterrupt):
        run_in(pool, recipe_of(), folder)
    assert pool.closed == 1
    assert not list(store.glob(".run*"))


def other_data(assignment):
    surroundings = assignment.surroundings
    recipe = surroundings.recipe.replace("seed = 0", "seed = 5")
    assert recipe != surroundings.recipe
    return replace(assignment, surroundings=replace(surroundings, recipe=recipe))


def other_task(assignment):
    return replace(assignment, step=replace(assignment.step, task=None))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (other_data, RequestError, "low.test: the data, the network or the user's code differs"),
        (other_task, WorkError, "low.test: unexpected "),
    ],
)
def test_an_error_on_a_worker_is_one_line_that_says_where(copied, change, error, words):
    folder, store = copied
    forget_steps(store, "low.test")
    with pytest.raises(error) as caught:
        run_in(FakePool(change=change), recipe_of(), folder)
    assert str(caught.value).startswith(words)
    assert ", process " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_differs_on_a_worker_is_refused(files, tmp_path):
    other = shutil.copy(files / "high.safetensors", tmp_path / "other.safetensors")

    def swap(assignment):
        return replace(assignment, files=dict.fromkeys(assignment.files, str(other)))

    with pytest.raises(RequestError, match=r"other\.safetensors: differs from the file"):
        run_in(FakePool(change=swap), recipe_of_files(files), tmp_path / "run")


def test_files_are_read_by_workers(files, tmp_path):
    pool = FakePool()
    run_in(pool, recipe_of_files(files), tmp_path / "pool")
    _, _, reporter = run_recipe(recipe_of_files(files), tmp_path / "here")
    assert reporter.finished_steps == []  # the same keys
    assert {"low.test", "grid-0.5-0.5"} <= set(pool.submitted)


def meeting_in(folder, **changes):
    (folder / PROBE).write_text("token")
    meeting = {"versions": required_versions(), "store": "/the/store", "folder": str(folder)}
    devices = {"cpu": describe_device(torch.device("cpu"))}
    return {**meeting, "devices": devices, "token": "token", **changes}


@pytest.mark.parametrize(
    ("option", "variable", "expected"),
    [("given", "other", "given"), (None, "other", "other"), (None, None, None)],
)
def test_workers_find_the_data_in_the_folder_of_the_command(
    monkeypatch, tmp_path, option, variable, expected
):
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("ROBUSTSOUP_DATA", variable or "")
    monkeypatch.chdir(tmp_path)
    prepared = prepare_run(recipe_of(), device="cpu")
    surroundings = Cluster(prepared, FakePool(), option).surroundings
    assert surroundings.data_root == (expected and str(Path.cwd() / expected))


def test_workers_find_the_network_in_the_folder_of_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    surroundings = Cluster(prepare_run(recipe_of(), device="cpu"), FakePool()).surroundings
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    _load_context(surroundings)
    assert Path.cwd() == tmp_path.resolve()


def test_a_worker_that_fits_is_not_refused(tmp_path):
    assert find_misfit(meeting_in(tmp_path)) is None


def test_a_worker_with_another_version_is_refused_by_name(tmp_path):
    meeting = meeting_in(tmp_path)
    meeting["versions"]["version of robustsoup"] = "9.9.9"
    misfit = find_misfit(meeting)
    assert misfit.startswith("worker ")
    assert "version of robustsoup: got 0" in misfit
    assert "expected 9.9.9; install the same version on every machine" in misfit
    answer = run_assignment(meeting, b"not read")
    assert answer["error"][0] == "RequestError"
    assert misfit in answer["error"][1]


def test_a_worker_with_another_kind_of_device_is_refused_by_name(tmp_path, monkeypatch):
    meeting = meeting_in(tmp_path, devices={"cpu": "cpu with other kernels"})
    misfit = find_misfit(meeting)
    assert "device: got cpu with " in misfit
    assert misfit.endswith(
        "expected cpu with other kernels as where the run started; run all steps on devices of one "
        "kind"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_misfit(meeting_in(tmp_path, devices={"cuda": "a GPU"})) is None  # none reserved
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another GPU")
    misfit = find_misfit(meeting_in(tmp_path, devices={"cuda": "a GPU"}))
    assert "device: got another GPU, expected a GPU as where the run started" in misfit


@pytest.mark.parametrize("folder", ["absent", "stale"])
def test_a_store_that_a_worker_does_not_see_is_refused(tmp_path, folder):
    meeting = meeting_in(tmp_path)
    if folder == "absent":
        meeting["folder"] = str(tmp_path / "absent")
    else:  # another folder of the same name
        meeting["token"] = "another"
    assert (
        "does not see the store /the/store; set ROBUSTSOUP_STORE to a folder that all machines "
        "share"
    ) in find_misfit(meeting)


def test_a_worker_that_does_not_fit_ends_the_run_before_its_step(copied):
    folder, store = copied
    forget_steps(store, "low.test")

    class HidingPool(FakePool):
        def poll(self, seconds):
            (Path(self.meeting["folder"]) / PROBE).unlink()
            return super().poll(seconds)

    with pytest.raises(RequestError, match="does not see the store"):
        run_in(HidingPool(), recipe_of(), folder)
    assert not list(store.rglob("*.partial"))


def test_a_store_that_cannot_be_written_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROBUSTSOUP_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(StorageError, match="the store cannot be written"):
        run_in(FakePool(), recipe_of(), tmp_path / "run")


def test_what_a_step_tells_is_told_once(copied):
    folder, store = copied
    forget_steps(store, "low.test")
    names = []

    class TellingPool(FakePool):
        polls = 0

        def poll(self, seconds):
            self.polls += 1
            if self.polls > 3:
                return super().poll(seconds)
            status = StatusFile(Path(self.meeting["folder"]) / f"{self.waiting[0][0]}.json")
            status.progress(None, self.polls, 4, "half done")
            for number in range(self.polls):
                status.note(f"note {number}")
            status.warn("doubtful")
            return {}

    class Reporter(RecordingReporter):
        def started(self, step, place):
            names.append((step.name, place))

    reporter = run_in(TellingPool(), recipe_of(), folder, Reporter())
    assert [name for name, _ in names] == ["low.test"]
    assert reporter.notes[1:] == [f"low.test: note {number}" for number in range(3)]
    assert reporter.warnings.count("doubtful") == 1
    assert reporter.shares[:3] == [0.25, 0.5, 0.75]


@pytest.fixture
def without_extras(monkeypatch):
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ray_pool.RayPool("local", threads=1, gpus=0),
            "ray is not installed; pip install 'robustsoup[ray]'",
        ),
        (
            lambda: slurm_pool.SlurmPool("local", threads=1, gpus=0),
            "submitit is not installed; pip install 'robustsoup[slurm]'",
        ),
    ],
)
def test_a_missing_extra_is_named(without_extras, make, words):
    with pytest.raises(RequestError) as caught:
        make()
    assert str(caught.value) == words


@pytest.mark.parametrize(("option", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_named_before_data_is_read(without_extras, tmp_path, option, package):
    recipe = recipe_of([(("data",), f"npz:{tmp_path / 'absent.npz'}")])
    pools = ClusterOptions(**{option: "local"})
    with pytest.raises(RequestError, match=f"^{package} is not installed"):
        recipe_runs.run_recipe(recipe, tmp_path / "run", RunOptions(), cluster=pools)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("somewhere", "got somewhere, expected local, auto or HOST:PORT"),
        ("ray://host:10001", "got ray://host:10001, expected local, auto or HOST:PORT"),
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1"),
        ("127.0.0.1:99999999", "nothing answers at"),
    ],
)
def test_an_address_where_nothing_answers_is_refused(monkeypatch, tmp_path, address, words):
    monkeypatch.setattr(ray_pool, "import_ray", lambda: builtins)
    with pytest.raises(RequestError, match="--ray: ") as caught:
        ray_pool.RayPool(address, threads=1, gpus=0).open(meeting_in(tmp_path))
    assert words in str(caught.value)


def test_an_ipv6_address_is_reached_without_its_brackets(monkeypatch, tmp_path):
    def refuse(address, timeout):
        raise OSError(f"{address} was called")

    monkeypatch.setattr(ray_pool, "import_ray", lambda: builtins)
    monkeypatch.setattr(ray_pool.socket, "create_connection", refuse)
    with pytest.raises(RequestError, match=r"\('::1', 6379\) was called"):
        ray_pool.RayPool("[::1]:6379", threads=1, gpus=0).open(meeting_in(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_job_that_must_end_is_lost_in_good_order(monkeypatch, name):
    earlier = signal.getsignal(signal.SIGUSR2)
    saved = []

    def work(_meeting, _content):
        with held_signals():  # a step of training
            signal.raise_signal(getattr(signal, name))
            saved.append("whole")

    monkeypatch.setattr(slurm_pool, "run_assignment", work)
    assert slurm_pool.run_job({}, b"") == Lost("the job was told to end", saved=True)
    assert saved == ["whole"]
    assert signal.getsignal(signal.SIGUSR2) is earlier


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_a_task_that_ray_cancels_is_lost_in_good_order(monkeypatch):
    saved = []

    def work(_meeting, _content):
        with held_signals():  # a step of training
            signal.raise_signal(signal.SIGINT)
            saved.append("whole")

    def make_task(function):
        return SimpleNamespace(options=lambda name: SimpleNamespace(remote=function))

    fake = SimpleNamespace(remote=lambda **_options: make_task)
    monkeypatch.setattr(ray_pool, "import_ray", lambda: fake)
    monkeypatch.setattr(ray_pool, "run_assignment", work)
    pool = ray_pool.RayPool("local", threads=1, gpus=0)
    pool.submit("key", "low", {}, b"")
    assert pool.tasks == {Lost("the task was told to end", saved=True): "key"}
    assert saved == ["whole"]


def test_the_folder_of_a_run_that_waits_for_days_is_touched(tmp_path):
    context = SimpleNamespace(network=None, device=torch.device("cpu"))
    plan = SimpleNamespace(recipe=SimpleNamespace(to_toml=str))
    pool = SimpleNamespace(most_at_once=1, poll=lambda _: {"key": Lost("killed by a test")})
    executor = Cluster(
        SimpleNamespace(context=context, plan=plan, store=Store(tmp_path), image_size=None), pool
    )
    executor.meeting = executor._make_meeting()
    probe = Path(executor.meeting["folder"]) / PROBE

    def is_touched():
        os.utime(probe, (0, 0))
        executor.running["key"] = None
        executor.wait()
        return probe.stat().st_mtime > 0

    assert not is_touched()
    executor.touched -= cluster.TOUCH_SECONDS
    assert is_touched()
    assert not is_touched()


class LocalExecutor:
    """Takes the place of submitit's executor: keeps what is submitted."""

    def __init__(self, *_, **__):
        self.jobs = []

    def update_parameters(self, **_):
        """Receive parameters that the test does not look at."""

    def submit(self, _function, _meeting, _content, gpu):
        job = SimpleNamespace(done=lambda: job.answer is not None, answer=None, gpu=gpu)
        job.result = lambda: job.answer
        self.jobs.append(job)
        return job


@pytest.mark.parametrize(
    ("visible", "gpus"), [(None, ["0", "1"]), ("3,GPU-8", ["3", "GPU-8"]), ("5,6,9", ["5", "6"])]
)
def test_each_local_job_has_a_gpu_of_its_own(monkeypatch, tmp_path, visible, gpus):
    errors = SimpleNamespace(
        FailedJobError=OSError, FailedSubmissionError=OSError, UncompletedJobError=OSError
    )
    submitit = SimpleNamespace(AutoExecutor=LocalExecutor)
    modules = {"submitit": submitit, "submitit.core": errors, "submitit.core.utils": errors}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(slurm_pool.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(slurm_pool, "count_usable_cores", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pool = slurm_pool.SlurmPool("local", threads=1, gpus=1)
    assert pool.most_at_once == 2
    pool.open(meeting_in(tmp_path))
    for key in ("first", "second"):
        pool.submit(key, key, {}, b"")
    jobs = pool.executor.jobs
    assert [job.gpu for job in jobs] == gpus
    jobs[1].answer = "done"
    assert pool.poll(0) == {"second": "done"}
    pool.submit("third", "third", {}, b"")
    assert jobs[2].gpu == gpus[1]
    monkeypatch.setattr(slurm_pool, "run_assignment", lambda *_: os.environ["CUDA_VISIBLE_DEVICES"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert slurm_pool.run_job({}, b"", gpus[1]) == gpus[1]


def test_the_parts_of_a_finished_step_are_not_planned_again(monkeypatch):
    prepared = prepare_run(recipe_of(), device="cpu", part_samples=32)
    monkeypatch.setattr(
        recipe_runs, "estimate_seconds", lambda steps, _: dict.fromkeys((s.key for s in steps), 1.0)
    )
    divided = next(step for step in prepared.plan.steps if step.parts)
    monkeypatch.setattr(Store, "has", lambda _, key: key == divided.key)
    priced = recipe_runs.price_plan(prepared)
    done = {row["key"] for row in priced["steps"] if row["done"]}
    assert done == {divided.key, *divided.parts}
    assert priced["seconds"] == len(prepared.plan.steps) - len(done)


def test_a_cluster_refuses_one_named_gpu():
    prepared = SimpleNamespace(context=SimpleNamespace(device=torch.device("cuda:1")))
    with pytest.raises(RequestError, match="--device: got cuda:1, expected cuda: the cluster"):
        open_executor(prepared, ClusterOptions(slurm="local"), None)


def test_slurm_without_sbatch_is_refused(monkeypatch):
    monkeypatch.setattr(slurm_pool, "import_submitit", lambda: builtins)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RequestError, match="sbatch is not found"):
        slurm_pool.SlurmPool("gpu", threads=1, gpus=0)


def test_ray_and_slurm_exclude_each_other():
    with pytest.raises(RequestError, match="--ray and --slurm exclude each other"):
        ClusterOptions(ray="local", slurm="local")
