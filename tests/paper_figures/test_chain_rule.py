"""The figure and table of chain_rule."""

from pathlib import Path

import numpy as np
import pytest

from experiments.chain_rule import KINDS
from paper_figures import chain_rule as figure_module
from src.rows import pick
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "chain_rule"


def test_the_table_has_a_line_a_kind_of_chain(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert len(table) == len(KINDS) + len({(family, skip) for family, skip, _ in KINDS})  # of the last, under train-mode normalisation
    line = table.query("chain == 'MLP' and norm == 'layer'").iloc[0]
    errors = pick(rows, "error", family="mlp", norm="layer")["value"]
    assert line["error of the product"] == pytest.approx(errors.max())
    assert line["random chains"] == len(errors)
    coupled = table[table["BatchNorm in"] == "train"]
    assert (coupled["of the samples' own Jacobians"] > 0.01).all()
    assert np.isnan(table.loc[table["BatchNorm in"] != "train", "of the samples' own Jacobians"]).all()


def test_an_error_of_exactly_nothing_is_drawn(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    rows.loc[rows["quantity"] == "error", "value"] = 0.0
    check_panels(draw(NAME, rows))
