"""The figure and table of greedy_layerwise."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import greedy_layerwise as figure_module
from src.rows import pick
from tests.paper_figures.drawn import draw, read

NAME = "greedy_layerwise"


def test_the_table_has_a_line_a_chain_depth_and_rule(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    assert not table.duplicated(["chain", "depth", *figure_module.RULE]).any()
    assert set(table["chain"]) == set(figure_module.CHAINS)
    at = {"chain": "vanishing", "depth": 4, "loss": "sim", "block": 2}
    (_, line), *others = table[np.logical_and.reduce([table[key] == value for key, value in at.items()])].iterrows()
    test = pick(rows, "test_accuracy", part="training", **at)["value"]
    assert others == []
    assert (line["test accuracy"], line["least"], line["greatest"]) == pytest.approx((test.mean(), test.min(), test.max()))


def test_accuracies_stand_beside_backpropagations(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    panels = {axis.get_label(): axis for axis in draw(NAME, rows).axes}
    for letter, chain in zip("cde", figure_module.CHAINS, strict=True):
        line = next(line for line in panels[letter].get_lines() if line.get_label() == "backprop")
        expected = pick(rows, "test_accuracy", part="training", chain=chain, loss="backprop", depth=4)["value"].mean()
        assert line.get_ydata() == pytest.approx([expected, expected])


def test_backpropagation_costs_one(tmp_path: Path) -> None:
    panel = next(axis for axis in draw(NAME, read(NAME, tmp_path)).axes if axis.get_label() == "f")
    backprop = next(line for line in panel.get_lines() if line.get_marker() == "X")
    assert backprop.get_xdata() == pytest.approx(1)
