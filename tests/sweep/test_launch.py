"""A launcher's own part: signals to end, and jobs that are refused."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.config import ClusterConfig, ScaleName
from src.errors import UserError
from src.sweep import __main__ as sweeping
from src.sweep import launch
from src.sweep.folder import Submission, Sweep
from tests.sweep.conftest import ARGUMENTS
from tests.sweep.test_folder import CODE


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As in a terminal, whatever they were, and are again afterwards: a shell's background processes ignore some."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in launch.INTERRUPTING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def struck(first: signal.Signals, second: signal.Signals) -> None:
    """Interrupted by one signal, and by another while it cleans up."""
    with launch._interruptible():
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(second)
            with launch._deaf():
                signal.raise_signal(second)
            signal.raise_signal(second)


@pytest.mark.parametrize("first", launch.INTERRUPTING)
@pytest.mark.parametrize("second", launch.INTERRUPTING)
def test_only_the_first_signal_to_end_is_heard(first: signal.Signals, second: signal.Signals) -> None:
    before = signal.getsignal(second)
    with pytest.raises(KeyboardInterrupt):
        struck(first, second)
    assert signal.getsignal(second) == before


def test_what_was_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with launch._interruptible():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("most", "at_once", "scales", "jobs"),
    [
        (1000, 1, {"paper": 3}, ["p", "p", "p"]),
        (1000, 1, {"quick": 7}, ["qqq", "qq", "qq"]),
        (1000, 1, {"smoke": 10}, ["ssssssssss"]),
        (1000, 1, {"smoke": 2, "quick": 2, "paper": 2}, ["p", "p", "qqss"]),
        (1000, 1, {"quick": 3, "smoke": 10}, ["qqsss", "qsssssss"]),
        (1000, 4, {"paper": 7}, ["pppp", "ppp"]),
        (1000, 4, {"quick": 7}, ["qqqq", "qqq"]),
        (1000, None, {"paper": 2}, ["p", "p"]),
        (2, 1, {"quick": 2, "paper": 3}, ["pp", "pqq"]),
    ],
)
def test_short_runs_share_a_job_and_jobs_the_work(most: int, at_once: int | None, scales: dict[ScaleName, int], jobs: list[str]) -> None:
    runs = {f"{scale[0]}{run}": scale for scale, count in scales.items() for run in range(count)}
    shares = launch._shares(ClusterConfig(most, at_once, {"smoke": 10, "quick": 3}), runs)
    assert sorted(run for share in shares for run in share) == sorted(runs)
    assert ["".join(run[0] for run in share) for share in shares] == jobs


def test_runs_of_one_length_are_dealt_in_turn() -> None:
    """What stands beside each other on the command line is alike, and so is how long it takes."""
    shares = launch._shares(ClusterConfig(2, 1), dict.fromkeys(map(str, range(5)), "paper"))
    assert shares == [["0", "2", "4"], ["1", "3"]]


@pytest.mark.parametrize("number", launch.INTERRUPTING)
def test_a_signal_interrupts_planning_too(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "plan", lambda _: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        launch.launch([])


def test_jobs_that_slurm_refuses_are_told_and_leave_no_trace(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where no SLURM is
    for _ in range(2):
        with pytest.raises(UserError, match="slurm refuses the jobs"):
            launch.launch(ARGUMENTS)
    assert sweep.submissions() == []


def test_what_is_refused_does_not_take_the_place_of_what_can_be_resumed(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    before = (sweep.path / "plan.json").read_bytes()
    with pytest.raises(UserError, match="slurm refuses the jobs"):
        launch.launch([*ARGUMENTS, "hydra.launcher.partition=none"])
    assert (sweep.path / "plan.json").read_bytes() == before


def test_a_resubmission_says_each_thing_once(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(sweeping, "launch", lambda arguments, expected: told.append(arguments) or 0)
    added = "+hydra.launcher.additional_parameters.nodelist=node3"
    sweep.arguments += ["++detach=true", "hydra.launcher.mem_gb=1", added, "training.lr=1"]
    for overrides, kept in (
        (["hydra.launcher.mem_gb=2", "tracker=none"], [*ARGUMENTS, added, "training.lr=1"]),
        # the same key otherwise: what was added stays, for it is what is changed
        (["hydra.launcher.additional_parameters.nodelist=node2"], [*ARGUMENTS, "hydra.launcher.mem_gb=1", added, "training.lr=1"]),
        (["~hydra.launcher.mem_gb"], [*ARGUMENTS, "hydra.launcher.mem_gb=1", added, "training.lr=1"]),
        # what another cluster's jobs are given is of no use
        (["cluster=local"], [*ARGUMENTS[:2], "training.lr=1"]),
    ):
        assert sweeping.resume(sweep, overrides) == 0
        assert told.pop() == [*kept, *overrides]


@pytest.mark.parametrize("wrong", ["foo=1", "hydra.launcher.nope=1", "a b", "seed=range(", "training.lr=fast"])
def test_what_is_added_wrongly_is_told_in_a_line(sweep: Sweep, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweeping.main(["resume", sweep.name, wrong]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_a_place_that_is_gone_is_told_in_a_line(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep.path / "attempts").rmdir()
    assert sweeping.main(["status", sweep.name]) == 2
    assert capsys.readouterr().err == f"error: {sweep.path / 'attempts'}: No such file or directory\n"


def test_what_is_added_may_not_make_another_sweep(sweep: Sweep) -> None:
    with pytest.raises(UserError, match=rf"sweep {sweep.name}: its command line, with what was added .* other runs \(sweep \w+\)"):
        launch.launch([*ARGUMENTS[:1], "seed=7", ARGUMENTS[2]], expected=sweep)


def test_a_sweep_that_was_moved_is_not_made_anew_where_it_was(sweep: Sweep, tmp_path: Path) -> None:
    moved = Sweep(shutil.copytree(sweep.path.parent.parent, tmp_path / "moved") / ".sweep" / sweep.name)
    assert [moved.folder(run) for run in moved.runs] == [
        tmp_path / "moved" / sweep.folder(run).relative_to(tmp_path / "results") for run in sweep.runs
    ]
    with pytest.raises(UserError, match=rf"lies in {moved.path}, and its command line means .*; add 'results_dir=\"{tmp_path}/moved\"'"):
        launch.launch(ARGUMENTS, expected=moved)


def test_jobs_that_go_on_survive_a_resubmission_that_is_refused(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Sweep] = []
    monkeypatch.setattr(launch.cluster, "cancel", ended.append)
    monkeypatch.setattr(launch.cluster, "submit", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    for alive, cancelled in (({"7_0": "RUNNING"}, 0), ({}, 1)):
        monkeypatch.setattr(launch.cluster, "alive", lambda _, alive=alive: alive)
        before = (sweep.path / "plan.json").read_bytes()
        with pytest.raises(PermissionError):
            launch.launch([*ARGUMENTS, "tracker=none"])
        assert (sweep.path / "plan.json").read_bytes() == before
        assert len(ended) == cancelled


@pytest.mark.parametrize(("detach", "cancelled"), [("false", 1), ("true", 0)])
def test_an_interrupted_submission_ends_all_jobs_but_detached_ones(
    sweep: Sweep, detach: str, cancelled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Sweep] = []
    monkeypatch.setattr(launch.cluster, "cancel", ended.append)
    monkeypatch.setattr(launch.cluster, "alive", lambda _: {"7_0": "RUNNING"})
    monkeypatch.setattr(launch.cluster, "submit", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        launch.launch([*ARGUMENTS, f"detach={detach}"])
    assert len(ended) == cancelled


def test_jobs_that_could_not_be_cancelled_are_told(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.submitted(Submission("slurm", {}, CODE))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=rf"scancel doesn't answer .*; jobs may go on: python -m src.sweep cancel {sweep.called}"):
        launch._cancel(sweep)


def test_a_damaged_plan_is_written_anew(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (sweep.path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="slurm refuses the jobs"):
        launch.launch(ARGUMENTS)
    assert Sweep(sweep.path).runs == sweep.runs
