"""A pool of Slurm jobs, or of processes of this machine, by submitit (extra `slurm`)."""

import contextlib
import io
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from robustsoup.device import count_usable_cores
from robustsoup.errors import RequestError, WorkError
from robustsoup.interruption import handled_signals
from robustsoup.printable import first_line
from robustsoup.runs.cluster import Lost
from robustsoup.runs.locks import POLL_SECONDS
from robustsoup.runs.remote import Meeting, StepEnd, run_assignment
from robustsoup.runs.tasks import Key

LOCAL = "local"
LOCAL_MINUTES = 100 * 24 * 60
"""Time limit of local processes, which submitit requires."""
MOST_JOBS = 100
CANCEL_SECONDS = 10.0


class SlurmPool:
    """Runs each step as one Slurm job with its threads as CPUs, and one GPU if it uses one.

    A job compares versions and looks for the store before its own work; none is checked before.
    Of the processes of this machine, each has a GPU of its own.

    Args:
        partition: The partition; "local" for processes of this machine without Slurm.
        threads: CPUs of a step.
        gpus: GPUs of a step.

    Raises:
        RequestError: submitit or Slurm is not installed.
    """

    def __init__(self, partition: str, *, threads: int, gpus: int) -> None:
        self.partition, self.threads, self.gpus = partition, threads, gpus
        self.submitit: ModuleType = import_submitit()
        self.most_at_once = MOST_JOBS
        self.free_gpus: list[str] = []
        self.gpus_by_key: dict[Key, str] = {}
        if partition == LOCAL:  # which starts every job at once
            self.most_at_once = max(1, count_usable_cores() // threads)
            if gpus:
                self.free_gpus = list_visible_gpus()
                self.most_at_once = min(self.most_at_once, len(self.free_gpus))
        elif shutil.which("sbatch") is None:
            raise RequestError(
                "--slurm: sbatch is not found; run the command on a machine that submits jobs, or "
                "use --slurm local"
            )
        self.jobs: dict[Key, Any] = {}
        self.executor: Any = None

    def open(self, meeting: Meeting) -> str:
        """Prepare the submission of jobs; their files go into the folder of the run."""
        jobs = Path(meeting["folder"]) / "jobs"
        if self.partition == LOCAL:
            self.executor = self.submitit.AutoExecutor(jobs, cluster=LOCAL)
            self.executor.update_parameters(
                timeout_min=LOCAL_MINUTES,
                tasks_per_node=1,
                cpus_per_task=self.threads,
                gpus_per_node=self.gpus,
            )
        else:
            # submitit asks for five minutes by default; without a limit, the partition's holds.
            # Its AutoExecutor does not pass None on.
            self.executor = self.submitit.SlurmExecutor(jobs)
            self.executor.update_parameters(
                time=None,
                partition=self.partition,
                ntasks_per_node=1,
                cpus_per_task=self.threads,
                gpus_per_node=self.gpus,
            )
        return f"slurm {self.partition}: at most {self.most_at_once} jobs at once"

    def submit(self, key: Key, name: str, meeting: Meeting, content: bytes) -> None:
        """Submit a step as a job."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        gpu = self.free_gpus.pop(0) if self.free_gpus else None
        if gpu is not None:
            self.gpus_by_key[key] = gpu
        parameter = "name" if self.partition == LOCAL else "job_name"
        self.executor.update_parameters(**{parameter: name.replace("/", "-")})
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says
                self.jobs[key] = self.executor.submit(run_job, meeting, content, gpu)
        except (FailedJobError, FailedSubmissionError) as error:
            raise WorkError(
                f"{name}: sbatch refused the job: {first_line(error)}; SBATCH_ACCOUNT, SBATCH_QOS, "
                "SBATCH_TIMELIMIT and other variables of sbatch set what your cluster requires"
            ) from error

    def poll(self, seconds: float) -> Mapping[Key, StepEnd | Lost]:
        """Return how jobs ended."""
        end = time.monotonic() + seconds
        while True:
            ended = [key for key, job in self.jobs.items() if job.done()]
            self.free_gpus += [self.gpus_by_key.pop(k) for k in ended if k in self.gpus_by_key]
            if ended or time.monotonic() >= end:
                return {key: _fetch(self.jobs.pop(key)) for key in ended}
            time.sleep(min(POLL_SECONDS, seconds))

    def close(self) -> None:
        """Cancel the jobs; each has saved the state of its step half a minute ago at most."""
        for job in self.jobs.values():
            job.cancel(check=False)
        end = time.monotonic() + CANCEL_SECONDS
        while time.monotonic() < end and not all(job.done() for job in self.jobs.values()):
            time.sleep(POLL_SECONDS)


def list_visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names else [str(number) for number in range(count)]


def run_job(meeting: Meeting, content: bytes, gpu: str | None = None) -> StepEnd | Lost:
    """Run a step in a job; SIGTERM and the signal before the time limit let it save its state.

    Args:
        meeting: What is compared first.
        content: A pickled Assignment.
        gpu: The GPU of the job, as CUDA_VISIBLE_DEVICES names it; submitit gives all local jobs
            the first one. None leaves the variable as it is.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with handled_signals(restore=True):
        earlier = signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            return run_assignment(meeting, content)
        except KeyboardInterrupt:
            return Lost("the job was told to end", saved=True)
        finally:
            signal.signal(signal.SIGUSR2, earlier)


def _fetch(job: Any) -> StepEnd | Lost:
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return job.result()
    except FailedJobError as error:
        raise WorkError(f"slurm: job {job.job_id} failed: {_last_line(str(error))}") from error
    except UncompletedJobError as error:
        return Lost(f"job {job.job_id}: {first_line(error)}")


def _last_line(text: str) -> str:
    """Return the last line of a text that is not empty or a rule, such as the end of a trace."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line.strip("-")), "no message")


def import_submitit() -> ModuleType:
    """Return the module submitit; RequestError where it is not installed."""
    try:
        import submitit
    except ImportError:
        raise RequestError("submitit is not installed; pip install 'robustsoup[slurm]'") from None
    return submitit
