"""What SLURM is asked, and what is made of its answers; SLURM itself is tested in tests/cluster."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.errors import UserError
from src.sweep import __main__ as sweeping
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
    waiting = "".join(f"8_{place}|PENDING|{reason}\n" for place, reason in enumerate(sorted(cluster.PASSING)))
    turns = {f"8_{place}": "PENDING" for place in range(5)}
    (answers / "squeue.txt").write_text("7_0|RUNNING|None\n7_1|PENDING|Resources\n7_2|PENDING|PartitionTimeLimit\n" + waiting)
    assert cluster.alive(submitted) == {"7_0": "RUNNING", "7_1": "PENDING", "7_2": "PENDING (PartitionTimeLimit)"} | turns
    assert f"--name={cluster.job_name(submitted)} " in (answers / "called").read_text()


def test_without_a_submission_nobody_is_asked(sweep: Sweep, answers: Path) -> None:
    assert cluster.alive(sweep) == {}
    assert cluster.histories(sweep) == {}
    assert not (answers / "called").exists()


def test_every_end_of_a_requeued_job_is_told(submitted: Sweep, answers: Path) -> None:
    (answers / "sacct.txt").write_text("7_0|NODE_FAIL\n7_0|COMPLETED\n7_1|CANCELLED by 0\n")
    assert cluster.histories(submitted) == {"7_0": ["NODE_FAIL", "COMPLETED"], "7_1": ["CANCELLED by 0"]}


def test_the_elements_of_an_array_that_slurm_tells_in_one_are_told_apart(submitted: Sweep, answers: Path) -> None:
    (answers / "sacct.txt").write_text("7_0|COMPLETED\n7_[1-3,5%2]|CANCELLED by 0\n8_[4]|CANCELLED by 0\n")
    cancelled = {f"7_{place}": ["CANCELLED by 0"] for place in (1, 2, 3, 5)}
    assert cluster.histories(submitted) == {"7_0": ["COMPLETED"], **cancelled, "8_4": ["CANCELLED by 0"]}


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
    assert f"scancel --user={cluster.os.getuid()} --name=backlock-{sweep.name}" in (answers / "called").read_text()


def test_a_process_that_is_no_controller_of_the_sweep_is_left_alone(sweep: Sweep) -> None:
    sweep.submitted(Submission("local", {"1": []}, CODE))
    assert cluster.alive(sweep) == {}
    cluster.cancel(sweep)


def test_what_may_run_on_another_machine_is_told(
    sweep: Sweep, finish: Callable[[int], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.submitted(Submission("local", {"1": [sweep.runs[1].id]}, CODE))
    sweep.submitted(Submission("local", {"1": [sweep.runs[0].id]}, CODE, "another-node"))
    assert cluster.elsewhere(sweep) == ["another-node"]
    assert sweeping.cancel(sweep, []) == 1
    told = capsys.readouterr().out
    assert "0 jobs cancelled" in told
    assert f"jobs on another-node: if they go on, python -m src.sweep cancel {sweep.called} there" in told
    assert sweeping.status(sweep, []) == 1
    assert "it has had jobs on another-node, which are not seen from here" in capsys.readouterr().out
    for seed in range(3):
        finish(seed)
    assert cluster.elsewhere(sweep) == []
    assert sweeping.cancel(sweep, []) == 0
    sweep.submitted(Submission("slurm", {"2": [sweep.runs[0].id]}, CODE))
    monkeypatch.setenv("PATH", "")  # where no SLURM is, and none need be asked
    assert sweeping.status(sweep, []) == 0


def test_only_submitit_s_launchers_make_jobs() -> None:
    assert cluster.kind_of({"_target_": "x.SlurmLauncher"}) == "slurm"
    with pytest.raises(UserError, match="BasicLauncher is not for sweeps"):
        cluster.kind_of({"_target_": "x.BasicLauncher"})


def test_options_that_a_cluster_does_not_know_are_told(sweep: Sweep) -> None:
    job = Job(sweep.path, [], 1, CODE)
    with pytest.raises(UserError, match="local refuses the jobs"):
        cluster.submit(sweep, [job], {"_target_": "x.LocalLauncher", "nodes": 2, "timeout_min": 1})


def test_a_sweep_is_the_same_by_whatever_path(sweep: Sweep, tmp_path: Path, local: list[subprocess.Popen[bytes]]) -> None:
    (tmp_path / "link").symlink_to(sweep.path.parent)
    linked = Sweep(tmp_path / "link" / sweep.name)
    assert cluster.job_name(linked) == cluster.job_name(sweep)
    assert cluster.alive(linked) == cluster.alive(sweep) == {str(local[0].pid): "RUNNING"}


def test_a_path_that_is_not_ascii_is_told_in_any_locale(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wärts").symlink_to(sweep.path)
    monkeypatch.setenv("LC_ALL", "C")
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", "-m", "submitit.local._local", str(tmp_path / "wärts/jobs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert cluster._processes("submitit.local._local", sweep) == [str(process.pid)]


def test_the_same_runs_elsewhere_are_another_sweep_s_jobs(sweep: Sweep, tmp_path: Path) -> None:
    copied = Sweep(shutil.copytree(sweep.path, tmp_path / "elsewhere" / sweep.name))
    assert copied.name == sweep.name
    assert cluster.job_name(copied) != cluster.job_name(sweep)


@pytest.fixture
def local(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A sweep of which no local job was noted, and two processes that are called like a controller and its job."""
    sweep.submitted(Submission("local", {}, CODE))
    sleeping = [sys.executable, "-c", "import sys; sys.stdin.read()", "-m"]
    names = ("submitit.local._local", "submitit.core._submit")
    processes = [subprocess.Popen([*sleeping, name, str(sweep.path / "jobs")], stdin=subprocess.PIPE) for name in names]
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def test_local_jobs_that_were_not_noted_are_found_and_cancelled(
    sweep: Sweep, local: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, job = local
    assert cluster.alive(sweep) == {str(controller.pid): "RUNNING"}
    monkeypatch.setattr(cluster, "ENDING", 0.0)
    cluster.cancel(sweep)
    assert (controller.wait(), job.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
    assert cluster.alive(sweep) == {}


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({"_target_": "x.SlurmLauncher", "gpus_per_node": 4}, 4),
        ({"_target_": "x.SlurmLauncher"}, 0),
        ({"_target_": "x.LocalLauncher", "gpus_per_node": 1}, 1),
        ({"_target_": "x.LocalLauncher", "gpus_per_node": None}, 2),
        ({"_target_": "x.LocalLauncher", "visible_gpus": [0, 1, 2]}, 3),
    ],
)
def test_the_gpus_of_a_job(launcher: dict[str, object], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert cluster.gpus(launcher) == expected


@pytest.mark.parametrize(("visible", "wanted"), [("5,7", {"visible_gpus": [5, 7], "gpus_per_node": 2}), ("GPU-1a", {"gpus_per_node": 0})])
def test_a_local_job_has_the_gpus_that_its_user_has(sweep: Sweep, visible: str, wanted: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit

    told: dict[str, object] = {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(cluster.Path, "glob", lambda self, pattern: [])
    monkeypatch.setattr(submitit.AutoExecutor, "update_parameters", lambda self, **options: told.update(options))
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda self, job: SimpleNamespace(job_id="1"))
    monkeypatch.setattr(submitit.AutoExecutor, "batch", nullcontext)
    cluster.submit(sweep, [Job(sweep.path, [], 1, CODE)], {"_target_": "x.LocalLauncher"})
    assert {key.removeprefix("local_"): value for key, value in told.items() if "gpu" in key} == wanted
