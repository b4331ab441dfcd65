"""A sweep of the tiny experiment on disk, whose runs end as a test says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from src.config import register_resolvers
from src.sweep.folder import Sweep
from src.sweep.plan import plan
from tests.tiny import Tiny

ARGUMENTS = ["experiment=tiny", "seed=range(3)", "cluster=slurm"]


@pytest.fixture
def planned(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps are planned in an empty folder."""
    register_resolvers()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sweep(planned: None) -> Sweep:
    """A sweep of three runs, none begun."""
    return Sweep.create(plan(ARGUMENTS))


@pytest.fixture
def finish(sweep: Sweep) -> Callable[[int], None]:
    """Finish a run of the sweep."""

    def finish(seed: int) -> None:
        folder = sweep.folder(sweep.runs[seed])
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"status": "done"}))

    return finish
