"""The figure and table of batchnorm_stabilization."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import batchnorm_stabilization as figure_module
from src.rows import pick
from tests.paper_figures.drawn import draw, read

NAME = "batchnorm_stabilization"


def test_the_table_has_the_measured_and_the_predicted_growth(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows).set_index(["normalisation", "batch N"])
    assert len(table) == len(pick(rows, "rate", part="rate").groupby(["norm", "batch"]))
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    line = table.loc[("BatchNorm", 256)]
    assert line["growth of ‖g‖² a layer"] == pytest.approx(np.exp(pick(rows, "rate", part="rate", norm="batch", batch=256)["value"]).mean())
    assert line["mean field"] == pytest.approx(1.467, rel=0.01)
    assert table.loc[("LayerNorm", 8), "mean field"] == 1
    assert (table["nets"] == 2).all()


def test_depth_fifty_and_every_kind_of_chain_are_marked(tmp_path: Path) -> None:
    axis = next(axis for axis in draw(NAME, read(NAME, tmp_path)).axes if axis.get_label() == "f")
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["BN", "LN", "BN + skips", "N = 32"]
    assert any(list(line.get_xdata()) == [50, 50] for line in axis.get_lines())
