"""A tiny experiment, put in place beside the real ones: it measures in a moment whatever a test wants measured."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from paper_figures.style import origin
from src import run
from src.config import Config, Criterion
from src.data.load import Data
from src.experiment import Context
from src.plan import Work
from src.statistics import exactly
from src.verdict import Verdict, cell, judge_forms

ROOT = Path(run.CONF).parent

YAML = """\
# @package _global_
defaults:
  - override /data: digits
  - override /scale: smoke
  - override /tracker: none
  - _self_

claim:
  name: tiny
  title: Is the largest number positive?
  heading: "Step 0: Tiny"
  statement: "max x > 0"

criteria:
  positive:
    form: as_stated
    statement: "max x > 0"
    criterion: "max x ≥ 0"
    at_least: 0.0

grid:
  samples: ${at_scale:{smoke:8, quick:16, paper:32}}

training:
  max_steps: ${at_scale:{smoke:1, quick:2, paper:null}}
"""


def check(config: Config, data: Data) -> None:
    """Anything goes."""


def plan(context: Context) -> list[Work]:
    """No networks."""
    return []


def measure(context: Context) -> pd.DataFrame:
    """As many random numbers as the grid has samples."""
    numbers = torch.randn(context.config.grid.samples, generator=context.generator("numbers"), dtype=torch.float64)
    return table(numbers.tolist())


def table(values: list[float]) -> pd.DataFrame:
    """Numbers as rows."""
    return pd.DataFrame({"quantity": "number", "value": values, "sample": range(len(values))})


def judge(rows: pd.DataFrame, criteria: dict[str, Criterion]) -> list[Verdict]:
    return judge_forms("tiny", criteria, {"positive": pd.DataFrame([cell(exactly(rows["value"].max()), kind="largest")])})


def draw(rows: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(1, 1), dpi=50)
    figure.suptitle(origin(rows))
    return figure


@dataclass
class Tiny:
    """The experiment as installed: its configuration, and the module that may be changed."""

    conf: Path
    module: ModuleType
    calls: list[int] = field(default_factory=list)

    @property
    def yaml(self) -> Path:
        return self.conf / "experiment/tiny.yaml"

    def measures(self, function: Callable[[Context], pd.DataFrame]) -> None:
        """Measure with another function."""

        def counted(context: Context) -> pd.DataFrame:
            self.calls.append(context.config.seed)
            return function(context)

        self.module.measure = counted  # type: ignore[attr-defined]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Put the experiment into a copy of conf/ and its modules where they are imported from."""
    conf = shutil.copytree(run.CONF, folder / "conf")
    (conf / "experiment/tiny.yaml").write_text(YAML, encoding="utf-8")
    monkeypatch.setattr(run, "CONF", conf)
    modules = {name: ModuleType(name) for name in ("experiments.tiny", "paper_figures.tiny")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    experiment = modules["experiments.tiny"]
    vars(experiment).update(QUANTITIES={"number": "a random number, no unit"}, check=check, plan=plan, judge=judge)
    vars(modules["paper_figures.tiny"]).update(draw=draw)
    tiny = Tiny(conf, experiment)
    tiny.measures(measure)
    return tiny
