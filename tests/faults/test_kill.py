"""Interrupts, kills, and two processes at one run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from src import checkpoint
from src import rows as row_table
from src.experiment import Context
from src.rows import Row
from tests import tiny as module
from tests.conftest import ROOT, CommandLine
from tests.tiny import Tiny


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """A shell starts its background jobs deaf to SIGINT, and tests may run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def folders() -> list[Path]:
    return sorted(Path("results/tiny/digits/smoke").glob("seed*"))


def status(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["status"]


def interrupted(context: Context) -> pd.DataFrame:
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("not reached")


def test_ctrl_c_leaves_interrupted(cli: CommandLine, tiny: Tiny) -> None:
    tiny.measures(interrupted)
    answer = cli("experiment=tiny")
    assert (answer.code, answer.out, answer.err) == (130, "", "interrupted\n")
    assert [status(folder) for folder in folders()] == ["interrupted"]
    tiny.measures(module.measure)
    assert cli("experiment=tiny").code == 0
    assert [status(folder) for folder in folders()] == ["done"]


def test_ctrl_c_stops_a_sweep(cli: CommandLine, tiny: Tiny) -> None:
    tiny.measures(interrupted)
    assert cli("-m", "experiment=tiny", "seed=range(3)").code == 130
    assert tiny.calls == [0]


def test_ctrl_c_during_a_redo_keeps_the_finished_run(cli: CommandLine, start: CommandLine, tiny: Tiny) -> None:
    start()
    tiny.measures(interrupted)
    assert cli("experiment=tiny", "force=true").code == 130
    assert [status(folder) for folder in folders()] == ["done"]
    assert "already finished" in start().out


def test_an_interrupted_run_goes_on_where_it_was(cli: CommandLine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []

    def first(context: Context) -> Iterator[Row]:
        parts.append("first")
        yield {"quantity": "number", "value": 0.1, "sample": 0}

    def second(context: Context) -> Iterator[Row]:
        parts.append("second")
        if parts.count("second") == 1:
            signal.raise_signal(signal.SIGINT)
        yield {"quantity": "number", "value": 0.2, "sample": 1}

    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    tiny.measures(lambda context: context.rows(first, second))
    assert cli("experiment=tiny").code == 130
    (folder,) = folders()
    kept = folder.with_name(f".{folder.name}.checkpoint")
    assert kept.is_dir()
    answer = cli("experiment=tiny")
    assert answer.code == 0
    assert "goes on from a checkpoint: 1 of 2 parts are finished" in (folder / "log.txt").read_text()
    assert parts == ["first", "second", "second"]
    assert row_table.read(folder / "rows.parquet")["value"].tolist() == [0.1, 0.2]
    assert json.loads((folder / "provenance.json").read_text())["resumed"]
    assert not kept.exists()


HOLD = """
import sys
from pathlib import Path
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from src.config import Config
from src.results import RunFolder

config = TypeAdapter(Config).validate_python(OmegaConf.to_container(OmegaConf.load(sys.argv[1])))
with RunFolder(config).running() as folder:
    folder.write("rows.parquet", "half of the run")
    print("running", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(config: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of the run of a config."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(config)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("arguments", [[], ["force=true"]])
def test_the_second_of_two_processes_is_refused_and_a_killed_one_is_taken_over(
    start: CommandLine, tiny: Tiny, tmp_path: Path, arguments: list[str]
) -> None:
    start("results_dir=elsewhere")
    (source,) = Path("elsewhere").rglob("config.yaml")
    config = tmp_path / "config.yaml"
    config.write_text(source.read_text().replace("results_dir: elsewhere", "results_dir: results"))
    with another_process(config) as process:
        (folder,) = folders()
        answer = start(*arguments)
        assert answer.code == 2
        assert answer.error == f"{folder}: another process is at this run; wait for it or choose another results_dir"
        assert status(folder) == "running"
        assert (folder / "rows.parquet").read_text() == "half of the run"
        process.kill()
        process.wait()
    assert status(folder) == "running"  # stale: nothing could be written any more
    assert tiny.calls == [0]
    assert start(*arguments).code == 0
    assert status(folder) == "done"
    assert tiny.calls == [0, 0]
    assert (folder / "rows.parquet").read_bytes().startswith(b"PAR1")
