"""Sweeps on this machine, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from src.sweep import cluster
from tests.tree import User, expected, measured, plant

SWEEP = ("-m", "experiment=tiny", "cluster=local")


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    """Somebody with an own copy of the code, who lets two runs go at once."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    user = User(plant(tmp_path / "tree"), {**environment, "BACKLOCK_AT_ONCE": "2"})
    yield user
    user.leave()
    if (user.tree / "results/.sweep").is_dir():
        cluster.cancel(user.sweep())


def alive(user: User) -> dict[str, str]:
    return cluster.alive(user.sweep())


def told_to_wandb(folder: Path) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_failed_is_told_and_made_by_the_one_command_that_is_printed(user: User) -> None:
    user.order("raise", 1)
    user.order("kill", 2)
    code, out = user.call("src.run", *SWEEP, "seed=range(4)", "tracker=offline", "snapshot=true")
    assert code == 1, out
    assert "0 of 4 done, 4 missing" in out
    assert f"see {user.sweep().path}/logs/" in out
    for reason in ("failed in job", "ZeroDivisionError: by order", "killed by SIGKILL"):
        assert reason in out
    (again,) = (line.rpartition("python -m ")[2].split() for line in out.splitlines() if line.startswith("this finishes the rest"))
    assert again == ["src.sweep", "resume", user.sweep().name]
    code, out = user.call("src.sweep", "collect", user.sweep().name)
    assert (code, "2 of 4 runs" in out) == (1, True)

    user.order("go on", 1, 2)
    code, out = user.call(*again)
    assert code == 0, out
    assert "2 runs submitted in 1 job" in out
    assert measured(user.tree / "results") == {seed: expected(seed) for seed in range(4)}
    assert [user.began(seed) for seed in range(4)] == [1, 2, 2, 1]
    assert [user.began(seed, "measured") for seed in range(4)] == [1, 1, 1, 1]  # they went on from their checkpoints

    code, out = user.call("src.sweep", "collect", user.sweep().name)
    assert (code, "4 of 4 runs" in out) == (0, True)
    rows = pd.read_parquet(user.sweep().path / "rows.parquet")
    assert rows.groupby("root_seed")["value"].apply(list).to_dict() == {seed: expected(seed) for seed in range(4)}
    (submitted,) = {json.loads(file.read_text())["commit"] for file in user.sweep().path.glob("code/*/commit.json")}
    assert set(rows["commit"]) == {submitted}

    (user.sweep().folder(user.sweep().runs[3]) / "rows.parquet").unlink()
    code, out = user.call("src.sweep", "collect", user.sweep().name)
    assert (code, "3 of 4 runs" in out) == (1, True)
    assert "rows.parquet: not there" in out

    mirrored = {run.id: sorted((user.tree / "results/wandb").glob(f"offline-run-*-{run.id}")) for run in user.sweep().runs}
    assert [len(mirrored[run.id]) for run in user.sweep().runs] == [1, 2, 2, 1]
    assert f'"{user.sweep().name}"' in told_to_wandb(mirrored[user.sweep().runs[1].id][1])


def test_jobs_outlive_a_killed_launcher_and_no_interrupted_one(user: User) -> None:
    user.order("hold", 0, 1)
    launcher = user.start("src.run", *SWEEP, "seed=range(3)")
    user.until(lambda: user.began(0) and user.began(1), "two runs begin")
    launcher.kill()
    launcher.wait()
    code, out = user.call("src.sweep", "status", user.sweep().name)
    assert code == 0, out
    assert " ".join(out.splitlines()[3].split()) in ("┃ experiment ┃ data ┃ scale ┃ runs ┃ done ┃ running ┃ waiting ┃", out.splitlines()[3])

    watching = user.start("src.sweep", "resume", user.sweep().name)
    user.until(lambda: (user.sweep().path / ".lock").exists(), "it watches")
    assert watching.stdout is not None
    first = watching.stdout.readline()
    assert "0 of 3 done, 2 running, 1 waiting; 0 to do" in first
    code, out = user.call("src.sweep", "resume", user.sweep().name)
    assert (code, "another process is at it" in out) == (2, True)
    watching.send_signal(signal.SIGTERM)
    code, out = user.ended(watching)
    assert code == 130, out
    assert alive(user) == {}
    assert [user.attempts(seed)[0].outcome for seed in (0, 1)] == ["stopped", "stopped"]
    assert user.began(2) == 0

    user.order("go on", 0, 1)
    user.order("hold", 2)
    code, out = user.call("src.sweep", "resume", user.sweep().name, "detach=true")  # which holds no pipe open
    assert (code, "the jobs go on" in out, "Ctrl-C" in out) == (0, True, False)
    user.until(lambda: user.began(2), "the last run begins")
    for controller in alive(user):
        os.kill(int(controller), signal.SIGINT)  # as the next Ctrl-C in the terminal would
    user.order("go on", 2)
    user.until(lambda: not alive(user), "the jobs end")
    assert measured(user.tree / "results") == {seed: expected(seed) for seed in range(3)}
