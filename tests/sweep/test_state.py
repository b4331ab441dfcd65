"""How runs stand, and what is told of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from src.sweep import state
from src.sweep.folder import Outcome, Submission, Sweep
from src.sweep.state import in_brief, look, mishaps, report, stuck
from tests.sweep.test_folder import CODE

JOB = "7_0"


def submitted(sweep: Sweep, *attempts: tuple[int, Outcome]) -> None:
    """One run given to a job, which tried it so, by restart and outcome."""
    sweep.submitted(Submission("slurm", {JOB: [sweep.runs[0].id]}, CODE))
    for restart, outcome in attempts:
        attempt = sweep.begin(sweep.runs[0], JOB, restart)
        if outcome != "open":
            attempt.end(outcome, "its reason")


@pytest.mark.parametrize(
    ("attempts", "alive", "expected"),
    [
        ([], "PENDING", "waiting"),
        ([], "RUNNING", "waiting"),
        ([(0, "open")], "RUNNING", "running"),
        ([(0, "open")], "PENDING", "waiting"),  # requeued
        ([(0, "stopped")], "RUNNING", "waiting"),  # begun again in a moment
        ([(0, "stopped"), (1, "open")], "RUNNING", "running"),
        ([(0, "failed")], "RUNNING", "failed"),
        ([(0, "refused")], "RUNNING", "failed"),
        ([(0, "killed")], "RUNNING", "lost"),
        ([], None, "lost"),
        ([(0, "open")], None, "lost"),
        ([(0, "stopped")], None, "lost"),
        ([(0, "killed")], None, "lost"),
        ([(0, "failed")], None, "failed"),
        ([(0, "refused")], None, "failed"),
        ([(0, "killed"), (1, "failed")], None, "failed"),
        ([(0, "done")], None, "lost"),  # its folder is gone
    ],
)
def test_the_state_of_a_run(sweep: Sweep, attempts: Sequence[tuple[int, Outcome]], alive: str | None, expected: str) -> None:
    submitted(sweep, *attempts)
    states = look(sweep, {JOB: alive} if alive else {}, set())
    assert [states[run.id] for run in sweep.runs] == [expected, "missing", "missing"]


@pytest.mark.parametrize("alive", [{}, {JOB: "RUNNING"}])
def test_a_finished_folder_is_done_whatever_the_jobs_say(sweep: Sweep, finish: Callable[[int], None], alive: dict[str, str]) -> None:
    submitted(sweep, (0, "open"))
    finish(0)
    done: set[str] = set()
    assert look(sweep, alive, done)[sweep.runs[0].id] == "done"
    assert done == {sweep.runs[0].id}


def test_the_later_of_two_jobs_is_believed(sweep: Sweep) -> None:
    submitted(sweep, (0, "failed"))
    sweep.submitted(Submission("slurm", {"8": [sweep.runs[0].id]}, CODE))
    assert look(sweep, {JOB: "RUNNING", "8": "PENDING"}, set())[sweep.runs[0].id] == "waiting"


def test_a_job_that_is_gone_before_it_tries_is_told_beside_an_earlier_one(sweep: Sweep) -> None:
    submitted(sweep, (0, "failed"))
    sweep.submitted(Submission("slurm", {"8": [sweep.runs[0].id]}, CODE))
    states = look(sweep, {}, set())
    assert states[sweep.runs[0].id] == "lost"
    (line,) = mishaps(sweep, states, {}, {})
    assert "failed in job 7_0" in line
    assert "its job 8 was gone before it began" in line
    sweep.begin(sweep.runs[0], "9", 0).end("killed", "by design")  # by a job that was not noted
    assert "its job 8" not in mishaps(sweep, look(sweep, {}, set()), {}, {})[0]


def test_a_job_that_no_launcher_could_note_is_seen_by_its_attempt(sweep: Sweep) -> None:
    sweep.submitted(Submission("slurm", {}, CODE))
    sweep.begin(sweep.runs[0], JOB, 0)
    assert look(sweep, {JOB: "RUNNING"}, set())[sweep.runs[0].id] == "running"
    assert look(sweep, {}, set())[sweep.runs[0].id] == "lost"


def test_in_brief() -> None:
    assert in_brief({"a": "done", "b": "failed", "c": "lost", "d": "running", "e": "done"}) == "2 of 5 done, 1 running, 1 failed, 1 lost"


@pytest.mark.parametrize(
    ("attempts", "alive", "history", "told"),
    [
        ([(0, "open")], {JOB: "RUNNING"}, ["RUNNING"], []),
        ([(0, "done")], {}, ["COMPLETED"], ["it was finished, and its folder is gone"]),
        ([(0, "failed")], {}, ["COMPLETED"], ["failed in job 7_0 on HOST: its reason"]),
        ([(0, "killed")], {}, ["COMPLETED"], ["killed in job 7_0 on HOST: its reason"]),
        ([(0, "killed")], {}, ["CANCELLED by 0"], ["killed in job 7_0 on HOST: its reason (SLURM: CANCELLED by 0)"]),
        ([(0, "open")], {}, ["NODE_FAIL"], ["gone with job 7_0 on HOST (SLURM: NODE_FAIL)"]),
        ([(0, "open")], {}, [], ["gone with job 7_0 on HOST"]),
        ([(0, "open"), (1, "open")], {JOB: "RUNNING"}, ["NODE_FAIL", "RUNNING"], ["gone with job 7_0 on HOST (SLURM: NODE_FAIL)"]),
        ([], {}, [], ["its job 7_0 was gone before it began"]),
        ([], {}, ["CANCELLED by 0"], ["its job 7_0 was gone before it began (SLURM: CANCELLED by 0)"]),
    ],
)
def test_what_befell_a_run(
    sweep: Sweep, attempts: Sequence[tuple[int, Outcome]], alive: dict[str, str], history: list[str], told: list[str]
) -> None:
    submitted(sweep, *attempts)
    host = next((attempt.told()["host"] for tries in sweep.attempts().values() for attempt in tries), "")
    states = {run.id: "lost" if run is sweep.runs[0] else "missing" for run in sweep.runs}
    lines = mishaps(sweep, states, alive, {JOB: history})  # type: ignore[arg-type]
    assert len(lines) == len(told)
    for line, words in zip(lines, told, strict=True):
        assert line.startswith(f"tiny digits smoke seed 0 ({sweep.runs[0].id}): lost; {words.replace('HOST', host)}")


@pytest.mark.parametrize(
    ("files", "seen"), [({}, ""), ({"err": ""}, ""), ({"err": "", "out": "x"}, "out"), ({"err": "ModuleNotFoundError", "out": "x"}, "err")]
)
def test_a_job_that_died_before_its_runs_names_what_it_printed(sweep: Sweep, files: dict[str, str], seen: str) -> None:
    submitted(sweep)
    (sweep.path / "jobs").mkdir()
    for kind, printed in files.items():
        (sweep.path / f"jobs/{JOB}_0_log.{kind}").write_text(printed)
    (line,) = mishaps(sweep, look(sweep, {}, set()), {}, {})
    assert line.partition("; see ")[2] == (f"{sweep.path}/jobs/{JOB}_0_log.{seen}" if seen else "")


def text(sweep: Sweep) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report(sweep, look(sweep, {}, set()), {}, {}))
    return capture.get()


def test_the_report_counts_by_experiment_and_tells_a_full_disk(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(sweep, (0, "failed"))
    shown = text(sweep)
    assert [cell.strip() for cell in next(line for line in shown.splitlines() if line.startswith("│")).split("│")[1:-1]] == [
        *("tiny", "digits", "smoke", "3", "0", "1", "2")
    ]
    assert "its reason" in shown
    assert "no space left" not in shown
    monkeypatch.setattr(state, "SPACE", 2**80)
    assert f"no space left on the disk of {sweep.path}" in text(sweep)


def test_what_waits_for_a_reason_that_may_never_pass_is_told(sweep: Sweep) -> None:
    submitted(sweep)
    alive = {JOB: "PENDING (PartitionTimeLimit)", "7_1": "PENDING (PartitionTimeLimit)", "7_2": "PENDING", "7_3": "RUNNING"}
    assert look(sweep, alive, set())[sweep.runs[0].id] == "waiting"
    assert stuck(alive) == ["2 jobs PENDING (PartitionTimeLimit), says SLURM"]


def test_a_long_list_of_mishaps_is_cut(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SHOWN", 2)
    sweep.submitted(Submission("slurm", {JOB: [run.id for run in sweep.runs]}, CODE))
    assert "… and 1 more" in text(sweep)
    assert Path(sweep.path).is_dir()
