"""A job: its runs as processes, stood in for by one that ends as it is told."""

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import pytest

from src.sweep import job as module
from src.sweep.folder import Sweep
from src.sweep.job import Job, Process
from tests.sweep.test_folder import CODE

# Python 3.12 says so; these copies only write a file and end
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def begin(path: Path, run: str, submitted: str, environment: dict[str, str]) -> NoReturn:
    """The process of a run: tell what is in its order, and end as it says; without one never."""
    assert submitted == CODE.fingerprint
    order = path / f"{run}.order"
    if not order.exists():
        signal.pause()
    how, told = order.read_text().split("\n", 1)
    (path / "logs" / f"{run}.txt").write_text(f"error: what was before\n{told}")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(how))


@dataclass
class Orphan:
    """A process that lives, as multiprocessing tells of it when its server was killed."""

    process: BaseProcess
    exitcode: int = module.ORPHANED

    @property
    def pid(self) -> int | None:
        return self.process.pid


@pytest.fixture
def job(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A local job with all runs of the sweep; each is held until it is told how to end."""
    monkeypatch.setattr(module, "begin", begin)
    # everything is imported here
    monkeypatch.setattr(module, "PROCESSES", multiprocessing.get_context("fork"))
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    monkeypatch.setattr(module.os, "getppid", lambda: 7)  # as the controller's own id is the job's
    for name in module._environment(CODE):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # as it was, once the test is over
    return Job(sweep.path, [run.id for run in sweep.runs], 2, CODE)


@pytest.mark.parametrize(
    ("how", "told", "outcome", "reason"),
    [
        ("0", "", "done", ""),
        ("1", "error: it crashed\n", "failed", "it crashed"),
        ("2", "error: no data\nmore\n", "refused", "no data"),
        ("130", "interrupted\n", "stopped", "what was before"),
        ("3", "", "killed", "what was before"),
        ("kill", "", "killed", "killed by SIGKILL"),
    ],
)
def test_how_a_run_ends_is_recorded(sweep: Sweep, job: Job, how: str, told: str, outcome: str, reason: str) -> None:
    for run in sweep.runs:
        (sweep.path / f"{run.id}.order").write_text(f"{how}\n{told}")
    job()
    attempts = sweep.attempts()
    assert attempts.keys() == {run.id for run in sweep.runs}
    for (attempt,) in attempts.values():
        assert (attempt.job, attempt.restart, attempt.outcome) == ("7", 0, outcome)
        assert attempt.told()["reason"] == reason


def test_a_run_whose_server_was_killed_is_ended_and_told(sweep: Sweep, job: Job) -> None:
    process = Process(sweep, sweep.runs[0], CODE, {})
    child = process.process
    process.process = Orphan(child)  # type: ignore[assignment]
    assert process.ended()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (attempt,) = sweep.attempts()[sweep.runs[0].id]
    assert (attempt.outcome, attempt.told()["reason"]) == ("killed", "the server that it was a copy of was killed")


def test_finished_runs_are_not_begun(sweep: Sweep, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sweep, "done", lambda self, run: True)
    job()
    assert sweep.attempts() == {}


def test_as_many_at_once_as_asked_for_and_all_end_with_the_job(sweep: Sweep, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Process] = []

    def interrupt(_: float) -> None:
        if len(sweep.attempts()) == 2:
            begun.extend(process for process in held if process)
            raise KeyboardInterrupt

    held: list[Process] = []
    original = Process.__init__

    def noted(self: Process, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        held.append(self)

    monkeypatch.setattr(Process, "__init__", noted)
    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        job()
    assert len(begun) == 2
    assert all(process.process.exitcode is not None for process in begun)
    assert [attempt.outcome for (attempt,) in sweep.attempts().values()] == ["stopped", "stopped"]


def test_a_job_whose_parent_is_gone_ends(sweep: Sweep, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([7, 2])
    monkeypatch.setattr(module.os, "getppid", lambda: next(parents))
    with pytest.raises(SystemExit, match="is gone"):
        job()
    assert {attempt.outcome for (attempt,) in sweep.attempts().values()} == {"stopped"}


def test_a_job_whose_controller_was_gone_before_it_began_ends(sweep: Sweep, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "1")
    with pytest.raises(SystemExit, match="is gone"):
        job()
    assert sweep.attempts() == {}


def test_a_requeued_job_does_the_same_and_its_runs_know_why_they_were_stopped(job: Job) -> None:
    again = job.checkpoint()
    assert again.function == replace(job)
    assert job.stopped == "its job reached the time limit or was preempted"
    assert again.function.stopped == "its job was stopped"


@pytest.mark.parametrize(("visible", "seen"), [("0,1", ["0", "1", "0"]), ("3", ["3", "3", "3"]), ("", ["", "", ""])])
def test_runs_share_the_gpus_of_their_job(visible: str, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [module._gpu(slot).get("CUDA_VISIBLE_DEVICES", "") for slot in range(3)] == seen


def test_a_run_imports_the_submitted_code_and_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = module._environment(CODE)
    assert environment["PYTHONPATH"] == f"/code{os.pathsep}/elsewhere"
    assert environment["OMP_NUM_THREADS"] == "1"
