import pytest

from src import processes


@pytest.mark.parametrize(("threads", "runs"), [("", 8), ("1", 8), ("3", 2), ("4,2", 2), ("16", 1), ("0", 8), ("-1", 8), ("many", 8)])
def test_runs_of_several_threads_share_the_cpus(monkeypatch: pytest.MonkeyPatch, threads: str, runs: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(processes, "cpus", lambda: 8)
    assert processes.at_once() == runs
