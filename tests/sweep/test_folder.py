"""A sweep on disk."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

from src.code import Code
from src.errors import UserError
from src.sweep import folder as module
from src.sweep.folder import Submission, Sweep, find
from src.sweep.plan import plan
from tests.sweep.conftest import ARGUMENTS

CODE = Code("f", "{}", "/code")


def test_it_is_found_by_its_name_or_its_folder(sweep: Sweep) -> None:
    for name in (sweep.name, str(sweep.path)):
        assert find(name).runs == sweep.runs
    assert sweep.called == sweep.name
    elsewhere = Sweep.create(plan([*ARGUMENTS, "results_dir=elsewhere"]))
    assert elsewhere.called == str(elsewhere.path)


def test_where_none_is_the_user_is_told(sweep: Sweep) -> None:
    with pytest.raises(UserError, match="no sweep is there"):
        find("nosuch")
    told = json.loads((sweep.path / "plan.json").read_text())
    beyond = {**told, "runs": [["0", 1, 0]]}
    for damage in ("", "{}", "[1]", json.dumps({**told, "environment": None}), json.dumps(beyond)):
        (sweep.path / "plan.json").write_text(damage)
        with pytest.raises(UserError, match=r"plan\.json: damaged; submit the sweep's command line anew"):
            find(sweep.name)


def test_a_submission_that_is_damaged_is_named_and_the_next_takes_the_place_of_none(sweep: Sweep) -> None:
    files = [sweep.submitted(Submission("slurm", {str(job): []}, CODE)) for job in range(3)]
    files[1].write_text("")
    with pytest.raises(UserError, match=f"{files[1]}: damaged; end the jobs that it told of"):
        sweep.submissions()
    files[1].unlink()
    sweep.submitted(Submission("slurm", {"3": []}, CODE))
    assert [[*submission.jobs] for submission in sweep.submissions()] == [["0"], ["2"], ["3"]]


def test_a_place_that_cannot_be_written(planned: None) -> None:
    Path("file").touch()
    with pytest.raises(UserError, match=r"can't be written \(Not a directory\); choose another results_dir"):
        Sweep.create(plan([*ARGUMENTS, "results_dir=file/results"]))


def test_it_keeps_what_runs_take_from_the_shell(planned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is of a number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("BACKLOCK_GPUS", "2")
    kept = Sweep.create(plan(ARGUMENTS)).environment
    assert (kept["OMP_NUM_THREADS"], kept["BACKLOCK_GPUS"]) == ("3", "2")


def test_the_sweep_is_the_group_of_its_runs(sweep: Sweep) -> None:
    assert {config.tracker.group for config in map(sweep.config, sweep.runs)} == {sweep.name}
    named = Sweep.create(plan([*ARGUMENTS, "tracker.group=mine"]))
    assert named.config(named.runs[0]).tracker.group == "mine"


def test_an_attempt_is_open_until_it_ends_and_tells_how(sweep: Sweep) -> None:
    run = sweep.runs[0]
    attempt = sweep.begin(run, "7_1", 2)
    assert sweep.attempts() == {run.id: [attempt]}
    assert {"host", "started"} == attempt.told().keys()
    attempt.end("failed", "by design")
    (ended,) = sweep.attempts()[run.id]
    assert (ended.run, ended.job, ended.restart, ended.outcome) == (run.id, "7_1", 2, "failed")
    assert ended.told()["reason"] == "by design"
    assert {"host", "started", "ended"} <= ended.told().keys()


def test_on_a_full_disk_the_outcome_is_still_told(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = sweep.begin(sweep.runs[0], "7", 0)

    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    attempt.end("refused", "no space left on the disk")
    ((ended,),) = sweep.attempts().values()
    assert ended.outcome == "refused"
    assert "reason" not in ended.told()


def test_attempts_stand_in_the_order_of_their_jobs(sweep: Sweep) -> None:
    run = sweep.runs[0]
    for job in ("9", "10"):
        sweep.submitted(Submission("slurm", {job: [run.id]}, CODE))
    for job, restart in (("10", 0), ("9", 1), ("9", 0)):
        sweep.begin(run, job, restart)
    (sweep.path / "attempts" / ".half-written.tmp-1").touch()
    assert [(attempt.job, attempt.restart) for attempt in sweep.attempts()[run.id]] == [("9", 0), ("9", 1), ("10", 0)]


def test_an_attempt_whose_file_is_damaged_tells_nothing(sweep: Sweep) -> None:
    attempt = sweep.begin(sweep.runs[0], "7", 0)
    attempt.file.write_text("{")
    assert attempt.told() == {}
    assert replace(attempt, file=Path("nosuch")).told() == {}


def test_submissions_come_back(sweep: Sweep) -> None:
    given = [Submission("local", {"1": ["a", "b"]}, CODE), Submission("slurm", {"2_0": ["c"], "2_1": []}, CODE)]
    for submission in given:
        sweep.submitted(submission)
    assert sweep.submissions() == given


def test_only_a_finished_folder_is_done(sweep: Sweep) -> None:
    run = sweep.runs[0]
    assert not sweep.done(run)
    sweep.folder(run).mkdir(parents=True)
    for status in ("running", "failed", "done"):
        (sweep.folder(run) / "status.json").write_text(json.dumps({"status": status}))
        assert sweep.done(run) == (status == "done")
