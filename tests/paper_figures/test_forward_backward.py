"""The figure and table of forward_backward."""

from pathlib import Path

import numpy as np
import pytest

from experiments.forward_backward import PATIENTS, REMEDIES
from paper_figures import forward_backward as figure_module
from src.rows import pick
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "forward_backward"


def test_the_table_has_both_locks_of_every_remedy(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows).set_index(["chain", "remedy", "when"])
    assert len(table) == 2 * len(PATIENTS) * len(REMEDIES)
    at = ("tanh, σw²=1", "skip", "initial")
    for way in ("forward", "backward"):
        locks = pick(rows, f"{way}_lock", part="remedy", patient=at[0], when="initial").pivot(
            index="net_seed", columns="remedy", values="value"
        )
        assert table.loc[at, f"{way} lock (decades)"] == pytest.approx(locks["skip"].mean())
        size = locks if way == "forward" else locks.abs()
        assert table.loc[at, f"{way} gain"] == pytest.approx((size["plain"] - size["skip"]).mean())
        assert table.loc[at, f"± {way} gain"] > 0
    assert table.query("remedy == 'plain'")["forward gain"].isna().all()


def test_trainings_that_diverged_leave_a_gap(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    for lost in ({"remedy": "skip"}, {"remedy": "plain"}):
        gone = (rows["when"] == "trained") & (rows[list(lost)] == lost).all(axis=1)
        table = figure_module.table(rows[~gone]).set_index(["remedy", "when"])
        assert np.isnan(table.loc[("skip", "trained"), "forward gain"]).all()
        check_panels(draw(NAME, rows[~gone]))
