"""What every experiment owes: a plan that it keeps, rows that repeat, verdicts that follow the rows, a figure and tests of its own."""

import importlib.util
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from src import checkpoint
from src.checkpoint import Checkpoint
from src.experiment import Context
from src.plan import networks_and_steps
from src.tracking import Columns, Silent
from tests.experiments.measured import NAMES, after, config, experiment, own_tests, small_context, small_rows, verdict

CASES = [(name, criterion, changes, word) for name in NAMES for criterion, changes, word in own_tests(name).CASES]


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_module_a_figure_and_tests(name: str) -> None:
    modules = (f"experiments.{name}", f"paper_figures.{name}", f"tests.experiments.test_{name}", f"tests.paper_figures.test_{name}")
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize(("name", "criterion", "changes", "word"), CASES)
def test_the_verdict_follows_the_rows(name: str, criterion: str, changes: list, word: str) -> None:
    assert verdict(name, criterion, after(small_rows(name), changes)).verdict == word


@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_is_seen_on_both_sides(name: str) -> None:
    words = {criterion: {word for n, case, _, word in CASES if (n, case) == (name, criterion)} for criterion in config(name).criteria}
    assert [criterion for criterion, found in words.items() if "refuted" not in found or not found & {"holds", "holds_if"}] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(name: str) -> None:
    rows, again = small_rows(name), small_context(name)
    pd.testing.assert_frame_equal(experiment(name).measure(again), rows, check_exact=True)
    assert (again.tally["networks"], again.tally["steps"]) == networks_and_steps(experiment(name).plan(again))
    other = experiment(name).measure(small_context(name, "seed=1"))
    pd.testing.assert_frame_equal(other.drop(columns="value"), rows.drop(columns="value"))
    assert (other["value"] != rows["value"]).mean() > 0.5


class Killed(BaseException):
    """As a signal would end it."""


class Recorder(Silent):
    """A tracker that tells what it was shown."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []

    def curve(self, name: str, history: Columns) -> None:
        self.told.append((name, history))

    def certificate(self, name: str, certificate: Mapping[str, Any]) -> None:
        self.told.append((name, certificate))


# those that look at networks along the way, leave parts finished, and show certificates
@pytest.mark.parametrize("name", ["batchnorm_stabilization", "residual_unlock", "sigmoid_saturation", "reproduction/glorot2010"])
def test_a_killed_run_goes_on_and_gives_the_same_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, write = random.Random(0), Checkpoint.write
    left = 0

    def writing(self: Checkpoint) -> None:
        nonlocal left
        write(self)
        left -= 1
        if left == 0:
            raise Killed

    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(Checkpoint, "write", writing)
    rows = None
    tries: list[Context] = []
    while rows is None:
        left = chance.randint(1, 20)
        tries.append(replace(small_context(name), tracker=Recorder(), checkpoint=Checkpoint(tmp_path / "kept", {})))
        with suppress(Killed):
            rows = experiment(name).measure(tries[-1])
    assert len(tries) > 1
    pd.testing.assert_frame_equal(rows, small_rows(name), check_exact=True)
    undisturbed = replace(small_context(name), tracker=Recorder())
    experiment(name).measure(undisturbed)
    assert repr(tries[-1].tracker.told) == repr(undisturbed.tracker.told)  # nan and all
    assert tries[-1].tally == undisturbed.tally
