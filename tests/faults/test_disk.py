"""A full disk and a read-only one, each a small tmpfs. Without the right to mount, the tests are skipped and say so."""

import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.experiment import Context
from tests import tiny as module
from tests.conftest import CommandLine
from tests.tiny import Tiny

SIZE = 256 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: no tmpfs can be mounted here ({mounted.stderr.strip()}); run as root to test full and read-only disks")
    yield place
    subprocess.run(["umount", place], check=True)


def many_rows(context: Context) -> pd.DataFrame:
    return module.table(np.random.default_rng(0).random(SIZE // 4).tolist())


def fill(place: Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def words(context: Context) -> pd.DataFrame:
    """Fill the disk, then log until the line has to be written."""
    fill(Path(context.config.results_dir).parent)
    for _ in range(100):
        logging.getLogger("tiny").info("a line of the log" * 10)
    raise AssertionError("not reached")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("seed*/*")}


@pytest.mark.parametrize("measure", [many_rows, words])
def test_a_full_disk_is_one_line_and_leaves_no_run(
    start: CommandLine, tiny: Tiny, disk: Path, measure: Callable[[Context], pd.DataFrame]
) -> None:
    tiny.measures(measure)
    answer = start(f"results_dir={disk}/results")
    assert answer.code == 2
    assert "no space left on the disk; the run was removed, free some and run it again" in answer.error
    assert str(disk) in answer.error
    assert files(disk) == {}
    assert [path.name for path in disk.rglob(".seed*") if path.suffix != ".lock"] == []
    (disk / "filler").unlink(missing_ok=True)
    tiny.measures(module.measure)
    assert start(f"results_dir={disk}/results").code == 0


def test_a_full_disk_keeps_the_finished_run(start: CommandLine, tiny: Tiny, disk: Path) -> None:
    start(f"results_dir={disk}/results")
    before = files(disk)
    tiny.measures(many_rows)
    answer = start(f"results_dir={disk}/results", "force=true")
    assert answer.code == 2
    assert "no space left on the disk" in answer.error
    assert files(disk) == before
    assert "already finished" in start(f"results_dir={disk}/results").out


def test_a_disk_that_is_full_from_the_start(start: CommandLine, tiny: Tiny, disk: Path) -> None:
    fill(disk)
    answer = start(f"results_dir={disk}/results")
    assert answer.code == 2
    assert "No space left on device" in answer.error
    assert tiny.calls == []
    assert files(disk) == {}


def test_a_disk_that_is_read_only(start: CommandLine, tiny: Tiny, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    answer = start(f"results_dir={disk}/results")
    assert answer.code == 2
    assert "can't be written (Read-only file system); choose another results_dir" in answer.error
    answer = start("data.name=mnist", "data.mirrors=[]", "data.fallback=none", f"data.root={disk}/data")
    assert answer.code == 2
    assert f"{disk}/data: cannot be written" in answer.error
