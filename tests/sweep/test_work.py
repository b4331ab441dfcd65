"""One run of a sweep, as its job starts it."""

import threading
from pathlib import Path

import filelock
import pytest

from src import code
from src.results import RunFolder
from src.sweep import work
from src.sweep.folder import Sweep
from tests.tiny import Tiny

FINGERPRINT = code.fingerprint(code.ROOT)


def test_it_is_the_run_that_was_planned(sweep: Sweep, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.main(str(sweep.path), sweep.runs[2].id, FINGERPRINT) == 0
    assert tiny.calls == [2]
    assert [sweep.done(run) for run in sweep.runs] == [False, False, True]
    assert work.main(str(sweep.path), sweep.runs[2].id, FINGERPRINT) == 0
    assert "already finished" in capsys.readouterr().out
    assert tiny.calls == [2]


def test_other_code_than_was_submitted_is_refused(sweep: Sweep, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.main(str(sweep.path), sweep.runs[0].id, "another") == 2
    assert capsys.readouterr().err == f"error: {code.ROOT}: the code was changed since its submission; resume the sweep, or undo that\n"
    assert tiny.calls == []


def test_data_that_are_gone_are_not_fetched(
    sweep: Sweep, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "present", lambda data: False)
    assert work.main(str(sweep.path), sweep.runs[0].id, FINGERPRINT) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: digits is not under ")
    assert "; run python -m src.data fetch digits --root " in told
    assert tiny.calls == []


def test_the_second_of_two_that_waited_waits_on(sweep: Sweep, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(sweep.config(sweep.runs[0]))
    folder.path.parent.mkdir(parents=True)
    owner = filelock.FileLock(Path(folder.path.parent) / f".{folder.path.name}.lock")
    waits: list[bool] = []

    def overtaken(folder: RunFolder) -> None:
        waits.append(folder.owned)
        owner.release() if waits[1:] else owner.acquire()

    monkeypatch.setattr(work, "wait", overtaken)
    assert work.main(str(sweep.path), sweep.runs[0].id, FINGERPRINT) == 0
    assert waits == [False, True]
    assert tiny.calls == [0]


def test_it_waits_for_the_owner_of_the_run(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of its job that SLURM lost sight of."""
    folder = RunFolder(sweep.config(sweep.runs[0]))
    folder.path.parent.mkdir(parents=True)
    owner = filelock.FileLock(Path(folder.path.parent) / f".{folder.path.name}.lock")
    looked = threading.Event()

    def pause(seconds: float) -> None:
        looked.set()
        owner.release()

    monkeypatch.setattr(work.time, "sleep", pause)
    owner.acquire()
    work.wait(folder)
    assert looked.is_set()
    assert not folder.owned
