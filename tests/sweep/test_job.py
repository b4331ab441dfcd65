"""A job: its runs as processes, stood in for by a script that ends as it is told."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from src.sweep import job as module
from src.sweep.folder import Sweep
from src.sweep.job import Job, Process
from tests.sweep.test_folder import CODE

SCRIPT = """#!/bin/sh
# called as python -P -m src.sweep.work SWEEP RUN FINGERPRINT
echo "error: what was before"
cat {place}/$5
. {place}/$5.sh
"""


@pytest.fixture
def job(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A local job with all runs of the sweep; each is held until it is told how to end."""
    python = tmp_path / "python"
    python.write_text(SCRIPT.format(place=tmp_path))
    python.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(python))
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    monkeypatch.setattr(module.os, "getppid", lambda: 7)  # as the controller's own id is the job's
    for run in sweep.runs:
        end(tmp_path, run.id, "read line")
    return Job(sweep.path, [run.id for run in sweep.runs], 2, CODE)


def end(place: Path, run: str, how: str, told: str = "") -> None:
    (place / run).write_text(told)
    (place / f"{run}.sh").write_text(how)


@pytest.mark.parametrize(
    ("how", "told", "outcome", "reason"),
    [
        ("exit 0", "", "done", ""),
        ("exit 1", "error: it crashed\n", "failed", "it crashed"),
        ("exit 2", "error: no data\nmore\n", "refused", "no data"),
        ("exit 130", "interrupted\n", "stopped", "what was before"),
        ("exit 3", "", "killed", "what was before"),
        ("kill -9 $$", "", "killed", "killed by SIGKILL"),
    ],
)
def test_how_a_run_ends_is_recorded(sweep: Sweep, job: Job, tmp_path: Path, how: str, told: str, outcome: str, reason: str) -> None:
    for run in sweep.runs:
        end(tmp_path, run.id, how, told)
    job()
    attempts = sweep.attempts()
    assert attempts.keys() == {run.id for run in sweep.runs}
    for (attempt,) in attempts.values():
        assert (attempt.job, attempt.restart, attempt.outcome) == ("7", 0, outcome)
        assert attempt.told()["reason"] == reason


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
    assert all(process.process.returncode is not None for process in begun)
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
    assert [module._environment(CODE, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == seen


def test_a_run_imports_the_submitted_code_and_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = module._environment(CODE, 0)
    assert environment["PYTHONPATH"] == f"/code{os.pathsep}/elsewhere"
    assert environment["OMP_NUM_THREADS"] == "1"
