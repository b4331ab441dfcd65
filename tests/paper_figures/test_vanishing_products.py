"""The figure and table of vanishing_products."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import vanishing_products as figure_module
from src.rows import pick
from tests.paper_figures.drawn import read

NAME = "vanishing_products"


def test_the_table_has_the_measured_and_the_predicted_growth(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert len(table) == len(pick(rows, "chi").groupby(["activation", "weight_var"]))
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    tanh = table.set_index(["activation", "σw²"]).loc[("tanh", 1.3)]
    assert tanh["χ predicted"] == pytest.approx(0.880, abs=5e-4)
    assert tanh["ξ predicted (layers)"] == pytest.approx(7.83, abs=0.01)
    assert tanh["χ measured"] == pytest.approx(pick(rows, "chi", activation="tanh", weight_var=1.3)["value"].mean())
    assert tanh["nets"] == 2
