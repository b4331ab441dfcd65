"""The figure and table of greedy_layerwise."""

from pathlib import Path

import numpy as np
import pytest

from experiments.greedy_layerwise import THOUSANDTH
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
    at = {"chain": "vanishing", "depth": 4, "loss": "sim", "block": 2, "schedule": "sequential"}
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


def test_costs_are_in_units_of_backpropagation(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    panels = {axis.get_label(): axis for axis in draw(NAME, rows).axes}
    backprop = next(line for line in panels["i"].get_lines() if line.get_marker() == "X")
    assert backprop.get_xdata() == pytest.approx(1)
    at = {"depth": 4, "hidden": 0, "schedule": "simultaneous"}
    counts = {q: pick(rows, q, **at).set_index(["loss", "block"])["value"] for q in figure_module.COSTS}
    drawn = {letter: {line.get_label(): line.get_ydata() for line in panels[letter].get_lines()} for letter in "gh"}
    for loss in ("pred", "sim", "predsim"):
        adds, with_heads = counts["multiply_adds"], counts["parameters"] + counts["auxiliary_parameters"]
        assert drawn["g"][loss] == pytest.approx(adds[loss].to_numpy() / adds["backprop"].item())
        assert drawn["h"][loss] == pytest.approx(with_heads[loss].to_numpy() / with_heads["backprop"].item())


def test_the_lock_is_drawn_before_and_after_training(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    panel = next(axis for axis in draw(NAME, rows).axes if axis.get_label() == "f")
    drawn = {line.get_label(): np.mean(line.get_ydata()) for line in panel.get_lines()}
    flows = pick(rows, "flow", chain="vanishing", depth=4, loss="backprop").groupby("moment")["value"].mean()
    assert (drawn["before training"], drawn["backprop"]) == pytest.approx((flows["before"], flows["after"]))
    assert drawn["locked below"] == THOUSANDTH


def test_a_chain_that_passes_nothing_is_marked_at_the_edge(tmp_path: Path) -> None:
    """One of two seeds, so that there is no interval; then all of them."""
    rows = read(NAME, tmp_path)
    trained = rows[(rows["quantity"] == "flow") & (rows["chain"] == "vanishing") & (rows["moment"] == "after") & (rows["loss"] == "sim")]
    for lost in (trained[trained["net_seed"] == 0], trained):
        changed = rows.copy()
        changed.loc[lost.index, "value"] = -np.inf
        figure = draw(NAME, changed)
        (panel,) = [axis for axis in figure.axes if axis.get_label() == "f"]
        marks = [
            line for line in panel.get_lines() if line.get_marker() == "v" and line.get_linestyle() == "None" and not line.get_clip_on()
        ]
        deepest = lost[(lost["depth"] == rows["depth"].max()) & (lost["hidden"] == 0)]
        assert sum(len(line.get_xdata()) for line in marks) == len(deepest) > 0
        assert not any(np.isinf(np.asarray(line.get_ydata(), dtype=float)).any() for line in panel.get_lines())
