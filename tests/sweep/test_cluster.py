"""What SLURM is asked, and what is made of its answers; SLURM itself is tested in tests/cluster."""

from pathlib import Path

import pytest

from src.errors import UserError
from src.sweep import cluster
from src.sweep.folder import Submission, Sweep
from src.sweep.job import Job
from tests.sweep.test_folder import CODE


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands; each prints what stands in the file of its name, and notes how it was called."""
    place = tmp_path / "bin"
    place.mkdir()
    for name in ("squeue", "sacct", "scancel"):
        (place / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {place}/called\n/bin/cat {place}/{name}.txt\n')
        (place / name).chmod(0o755)
        (place / f"{name}.txt").touch()
    monkeypatch.setenv("PATH", str(place))
    return place


@pytest.fixture
def submitted(sweep: Sweep) -> Sweep:
    """A sweep in the hands of SLURM."""
    sweep.submitted(Submission("slurm", {f"7_{place}": [run.id] for place, run in enumerate(sweep.runs)}, CODE))
    return sweep


def test_jobs_alive_are_those_in_the_queue(submitted: Sweep, answers: Path) -> None:
    (answers / "squeue.txt").write_text("7_0|RUNNING\n7_2|PENDING\n")
    assert cluster.alive(submitted) == {"7_0": "RUNNING", "7_2": "PENDING"}
    assert f"--name=backlock-{submitted.name} " in (answers / "called").read_text()


def test_without_a_submission_nobody_is_asked(sweep: Sweep, answers: Path) -> None:
    assert cluster.alive(sweep) == {}
    assert cluster.histories(sweep) == {}
    assert not (answers / "called").exists()


def test_every_end_of_a_requeued_job_is_told(submitted: Sweep, answers: Path) -> None:
    (answers / "sacct.txt").write_text("7_0|NODE_FAIL\n7_0|COMPLETED\n7_1|CANCELLED by 0\n")
    assert cluster.histories(submitted) == {"7_0": ["NODE_FAIL", "COMPLETED"], "7_1": ["CANCELLED by 0"]}


def test_without_accounting_there_are_no_histories(submitted: Sweep, answers: Path) -> None:
    (answers / "sacct").write_text("#!/bin/sh\necho disabled >&2\nexit 1\n")
    assert cluster.histories(submitted) == {}


@pytest.mark.parametrize(("script", "told"), [("#!/bin/sh\necho down >&2\nexit 1\n", r"squeue fails \(down\)"), (None, "doesn't answer")])
def test_a_slurm_that_does_not_answer_is_told(submitted: Sweep, answers: Path, script: str | None, told: str) -> None:
    (answers / "squeue").unlink()
    if script:
        (answers / "squeue").write_text(script)
        (answers / "squeue").chmod(0o755)
    with pytest.raises(UserError, match=told):
        cluster.alive(submitted)


def test_jobs_are_cancelled_by_the_sweep_s_name_so_that_unrecorded_ones_are_too(sweep: Sweep, answers: Path) -> None:
    sweep.submitted(Submission("slurm", {}, CODE))
    cluster.cancel(sweep)
    assert f"scancel --user={cluster.getpass.getuser()} --name=backlock-{sweep.name}" in (answers / "called").read_text()


def test_a_process_that_is_no_controller_of_the_sweep_is_left_alone(sweep: Sweep) -> None:
    sweep.submitted(Submission("local", {"1": []}, CODE))
    assert cluster.alive(sweep) == {}
    cluster.cancel(sweep)


def test_only_submitit_s_launchers_make_jobs() -> None:
    assert cluster.kind_of({"_target_": "x.SlurmLauncher"}) == "slurm"
    with pytest.raises(UserError, match="BasicLauncher is not for sweeps"):
        cluster.kind_of({"_target_": "x.BasicLauncher"})


def test_options_that_a_cluster_does_not_know_are_told(sweep: Sweep) -> None:
    job = Job(sweep.path, [], 1, CODE)
    with pytest.raises(UserError, match="local refuses the jobs"):
        cluster.submit(sweep, [job], {"_target_": "x.LocalLauncher", "nodes": 2, "timeout_min": 1})
