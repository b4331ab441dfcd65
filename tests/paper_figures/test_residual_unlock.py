"""The figure and table of residual_unlock."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import residual_unlock as figure_module
from src.rows import pick
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "residual_unlock"


def test_the_table_has_the_accuracies_of_every_chain(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert len(table) == 3 * rows.loc[rows["part"] == "training", "depth"].nunique()
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    assert set(table["chain"]) == {"plain", "original", "pre-activation"}
    deepest = pick(rows, "test_accuracy", part="training", skip="none", depth=table["depth"].max())["value"]
    line = table.query("chain == 'plain'").iloc[-1]
    assert (line["test accuracy"], line["least"], line["greatest"]) == pytest.approx((deepest.mean(), deepest.min(), deepest.max()))


def test_a_training_that_diverged_has_no_gradient_after_it(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    lost = (rows["part"] == "training") & (rows["when"] == "trained") & (rows["skip"] == "none") & (rows["depth"] == 10)
    table = figure_module.table(rows[~lost]).set_index(["depth", "chain"])
    assert np.isnan(table.loc[(10, "plain"), "trained"])
    check_panels(draw(NAME, rows[~lost]))
