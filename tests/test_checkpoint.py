"""What is kept is read back as it was, or made again; never another's, never half."""

import errno
import math
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from src import checkpoint as module
from src.checkpoint import Checkpoint, Training, plain

HERE = {"code": "a", "device": "CPU"}
CONTENT = {
    "tensor": torch.arange(3, dtype=torch.float64),
    "numbers": [1, math.inf, 0.1, None, True],
    "pair": ("a", {2: "b"}),
}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    monkeypatch.setattr(module, "PAUSE", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def test_what_is_kept_is_read_back_by_another_process(folder: Path) -> None:
    Checkpoint(folder, HERE).keep("entry", CONTENT)
    again = Checkpoint(folder, HERE)
    found = again.load("entry")
    assert torch.equal(found.pop("tensor"), CONTENT["tensor"])
    assert found == {key: CONTENT[key] for key in ("numbers", "pair")}
    assert again.load("another") is None
    assert again.resumed


def test_it_is_kept_as_it_is_now(folder: Path) -> None:
    tensor = torch.zeros(2)
    checkpoint = Checkpoint(folder, HERE)
    checkpoint.keep("entry", tensor)
    tensor.add_(1)
    assert checkpoint.load("entry").tolist() == [0, 0]


def test_nothing_is_written_before_it_is_due(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", math.inf)
    checkpoint = Checkpoint(folder, HERE)
    checkpoint.keep("first", 1)
    checkpoint.keep("second", 2)
    checkpoint.drop("first")
    assert (checkpoint.due, folder.exists()) == (False, False)
    monkeypatch.setattr(module, "EVERY", 0.0)
    checkpoint.keep("third", 3)
    assert [checkpoint.load(name) for name in ("first", "second", "third")] == [None, 2, 3]
    assert not Checkpoint(folder.with_name("none"), HERE).resumed


def test_an_entry_outlives_its_successor_s_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between both, the run has one of them."""
    checkpoint = Checkpoint(folder, HERE)
    checkpoint.keep("training", 1)
    monkeypatch.setattr(module, "EVERY", math.inf)
    checkpoint.drop("training")
    checkpoint.keep("rows", 2)
    assert checkpoint.load("training") == 1

    def killed(path: Path, content: object) -> None:
        if path.stem == "rows":
            raise InterruptedError

    monkeypatch.setattr(module, "write_atomically", killed)
    with pytest.raises(InterruptedError):
        checkpoint.write()
    assert checkpoint.load("training") == 1


@pytest.mark.parametrize("other", [{"code": "b", "device": "CPU"}, {"code": "a", "device": "GPU"}])
def test_what_other_code_has_made_is_removed(folder: Path, other: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    Checkpoint(folder, HERE).keep("entry", 1)
    another = Checkpoint(folder, other)
    assert (another.load("entry"), another.resumed, folder.exists()) == (None, False, False)
    assert caplog.messages == [f"{folder}: made by other code or on another kind of device; begun again"]


def test_a_damaged_entry_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint(folder, HERE)
    checkpoint.keep("entry", CONTENT)
    (file,) = folder.glob("*.pt")
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        file.write_bytes(damaged)
        assert checkpoint.load("entry") is None
    assert len(caplog.messages) == 3
    assert all(message.startswith(f"{file}: can't be read (") for message in caplog.messages)
    file.write_bytes(whole)
    assert checkpoint.load("entry") is not None


def test_what_reading_would_have_to_trust_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"Path can't be kept in a checkpoint|PosixPath can't be kept in a checkpoint"):
        Checkpoint(folder, HERE).keep("entry", {"nested": [folder]})


def test_numpy_s_numbers_become_python_s() -> None:
    found = plain({"a": (np.float64(0.1), np.int64(2)), "b": [np.bool_(True), np.str_("c")]})
    assert found == {"a": (0.1, 2), "b": [True, "c"]}
    assert [type(value) for value in (*found["a"], *found["b"])] == [float, int, bool, str]


def test_trainings_have_an_entry_each(folder: Path) -> None:
    checkpoint = Checkpoint(folder, HERE)
    first, second = Training(checkpoint, 1), Training(checkpoint, 2)
    first.keep({"steps": 3})
    assert first.due
    assert (first.load(), second.load()) == ({"steps": 3}, None)
    first.drop()
    second.keep({"steps": 4})
    assert (first.load(), second.load()) == (None, {"steps": 4})


def test_what_waits_is_written_while_nothing_new_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", math.inf)
    written, write = threading.Event(), Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda self: (write(self), written.set()))
    checkpoint = Checkpoint(folder, HERE)
    checkpoint.keep("entry", 1)
    assert not folder.exists()
    monkeypatch.setattr(module, "EVERY", 0.0)
    with checkpoint:
        assert written.wait(60)
    assert checkpoint.load("entry") == 1


def test_what_waits_is_written_when_the_run_is_interrupted_and_not_when_it_ends_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", math.inf)
    with Checkpoint(folder, HERE) as checkpoint:
        checkpoint.keep("entry", 1)
    assert not folder.exists()
    with suppress(KeyboardInterrupt), Checkpoint(folder, HERE) as checkpoint:
        checkpoint.keep("entry", 1)
        raise KeyboardInterrupt
    assert Checkpoint(folder, HERE).load("entry") == 1


def test_that_it_could_not_be_written_is_told_at_the_next_chance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", math.inf)
    failed = threading.Event()

    def full(self: Checkpoint) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoint, "write", full)
    checkpoint = Checkpoint(folder, HERE)
    checkpoint.keep("entry", 1)
    monkeypatch.setattr(module, "EVERY", 0.0)
    with checkpoint:
        assert failed.wait(60)
        with checkpoint._lock, pytest.raises(OSError, match="No space left"):  # the other thread has let go of it
            checkpoint.keep("entry", 2)


def test_a_damaged_maker_is_another(folder: Path) -> None:
    Checkpoint(folder, HERE).keep("entry", 1)
    (folder / "made_by.json").write_bytes(b"\xff\xfe")
    assert Checkpoint(folder, HERE).load("entry") is None
