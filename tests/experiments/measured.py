"""Contexts and rows of the experiments on the bundled digits, and rows with some of their values replaced."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pandas as pd
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir

from src import run
from src.config import Config, Criterion, register_resolvers
from src.data.load import Data, load
from src.experiment import Context, Experiment
from src.rows import pick
from src.tracking import Silent
from src.verdict import Verdict, decide
from tests.conftest import SHARED

NAMES = sorted(file.stem for file in (run.CONF / "experiment").glob("*.yaml"))
PAPERS = sorted(f"reproduction/{file.stem}" for file in (run.CONF / "experiment/reproduction").glob("*.yaml"))


@cache
def config(name: str, *overrides: str) -> Config:
    """An experiment's configuration on the digits at `scale=smoke`."""
    register_resolvers()
    with initialize_config_dir(config_dir=str(run.CONF), version_base="1.3"):
        choices = [f"experiment={name}", "data=digits", "scale=smoke", "tracker=none"]
        return run.check(compose("config", overrides=[*choices, *overrides]))


@cache
def digits(train_size: int | None, test_size: int | None) -> Data:
    sized = config("residual_unlock", f"data.train_size={train_size or 'null'}", f"data.test_size={test_size or 'null'}")
    return load(sized.data, torch.device("cpu"))


def context(name: str, *overrides: str) -> Context:
    """What an experiment measures with."""
    asked = config(name, *overrides)
    return Context(asked, digits(asked.data.train_size, asked.data.test_size), torch.device("cpu"), Silent())


def experiment(name: str) -> Experiment:
    return import_module(f"experiments.{module(name)}")


def module(name: str) -> str:
    """The module of an experiment, or of the one that reproduces a paper."""
    return name.partition("/")[0]


def own_tests(name: str) -> ModuleType:
    """An experiment's own tests: SMALL, the overrides of a tiny run; CASES, rows made to obey or to break each criterion."""
    return import_module(f"tests.experiments.test_{module(name)}")


def small_context(name: str, *overrides: str) -> Context:
    return context(name, *own_tests(name).SMALL, *overrides)


@cache
def small_rows(name: str) -> pd.DataFrame:
    """Really measured rows on a tiny grid, measured once for all processes of the tests; not to be written to."""
    file = Path(os.environ[SHARED], f"{name.replace('/', '-')}.pickle")
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            experiment(name).measure(small_context(name)).to_pickle(file)
    return pd.read_pickle(file)


def verdicts(name: str, rows: pd.DataFrame) -> dict[str, Verdict]:
    """The verdicts on rows, by criterion."""
    found = experiment(name).judge(rows, config(name).criteria)
    return {verdict.claim.partition("/")[2]: verdict for verdict in found}


def verdict(name: str, criterion: str, rows: pd.DataFrame) -> Verdict:
    """The verdict on rows by one criterion; the others, of which there are dozens, are not decided."""

    def one(claim: str, criteria: Mapping[str, Criterion], cells: Mapping[str, pd.DataFrame]) -> list[Verdict]:
        return [decide(f"{claim}/{criterion}", criteria[criterion], cells[criterion])]

    with patch.object(experiment(name), "judge_forms", one):
        return experiment(name).judge(rows, config(name).criteria)[0]


Values = float | Callable[[pd.DataFrame], Sequence[float]]
Change = Callable[[pd.DataFrame], pd.DataFrame]


def put(quantity: str, values: Values, **coordinates: object) -> Change:
    """Replace the values of one quantity at the given coordinates."""

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        chosen = pick(rows, quantity, **coordinates)
        assert not chosen.empty, (quantity, coordinates)
        changed = rows.copy()
        changed.loc[chosen.index, "value"] = values(chosen) if callable(values) else values
        return changed

    return change


def swap(part: str, written: pd.DataFrame) -> Change:
    """Replace the rows of one part by rows written by hand."""
    return lambda rows: pd.concat([rows[rows["part"] != part], written.assign(part=part)], ignore_index=True)


def after(rows: pd.DataFrame, changes: Sequence[Change]) -> pd.DataFrame:
    """The rows after all changes, one by one."""
    for change in changes:
        rows = change(rows)
    return rows
