"""One run of a sweep, as its job starts it."""

import multiprocessing
import os
import select
import signal
import threading
from pathlib import Path

import filelock
import pytest

from src import code
from src.results import RunFolder
from src.sweep import imports, work
from src.sweep.folder import Sweep
from tests.tiny import Tiny

FINGERPRINT = code.fingerprint(code.ROOT)


def test_it_is_the_run_that_was_planned(sweep: Sweep, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.main(sweep, sweep.runs[2].id, FINGERPRINT) == 0
    assert tiny.calls == [2]
    assert [sweep.done(run) for run in sweep.runs] == [False, False, True]
    assert work.main(sweep, sweep.runs[2].id, FINGERPRINT) == 0
    assert "already finished" in capsys.readouterr().out
    assert tiny.calls == [2]


def test_other_code_than_was_submitted_is_refused(sweep: Sweep, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert work.main(sweep, sweep.runs[0].id, "another") == 2
    assert capsys.readouterr().err == f"error: {code.ROOT}: the code was changed since its submission; resume the sweep, or undo that\n"
    assert tiny.calls == []


def test_code_that_was_another_when_it_was_imported_is_refused_though_it_was_put_back(
    sweep: Sweep, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is a copy of the server that imported it."""
    assert imports.IMPORTED == FINGERPRINT
    monkeypatch.setattr(imports, "IMPORTED", "another")
    assert work.main(sweep, sweep.runs[0].id, FINGERPRINT) == 2
    assert capsys.readouterr().err == f"error: {code.ROOT}: the code was another when its job imported it; resume the sweep\n"
    assert tiny.calls == []


def test_what_it_imports_is_what_was_looked_at(sweep: Sweep, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(work, "import_module", done.append)
    monkeypatch.setattr(work, "fingerprint", lambda root: done.append("looked") or FINGERPRINT)
    assert work.main(sweep, sweep.runs[0].id, FINGERPRINT) == 0
    assert done == ["experiments.tiny", "paper_figures.tiny", "looked"]


def test_data_that_are_gone_are_not_fetched(
    sweep: Sweep, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "present", lambda data: False)
    assert work.main(sweep, sweep.runs[0].id, FINGERPRINT) == 2
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
    assert work.main(sweep, sweep.runs[0].id, FINGERPRINT) == 0
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


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_run_dies_with_its_job() -> None:
    context = multiprocessing.get_context("fork")
    told, tells = os.pipe()  # closed when nobody is left who could write

    def run() -> None:
        threading.Thread(target=work._die_with_the_job, daemon=True).start()
        signal.alarm(90)  # should it not
        os.write(tells, b"begun")
        signal.pause()

    def job() -> None:
        context.Process(target=run).start()
        signal.pause()

    process = context.Process(target=job)
    process.start()
    os.close(tells)
    assert os.read(told, 5) == b"begun"
    process.kill()
    process.join()
    assert select.select([told], [], [], 60)[0], "the run lives on"
    assert os.read(told, 1) == b""
    os.close(told)
