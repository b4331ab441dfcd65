"""The figure and table of greedy_layerwise."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from experiments.greedy_layerwise import THOUSANDTH
from experiments.greedy_rules import LOCAL
from paper_figures import greedy_layerwise as figure_module
from src.rows import pick
from tests.experiments.measured import after, put
from tests.paper_figures.drawn import draw, read

NAME = "greedy_layerwise"


def test_the_table_has_a_line_a_chain_depth_and_rule(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    assert not table.duplicated(["chain", "depth", *figure_module.RULE]).any()
    assert set(table["chain"]) == set(figure_module.CHAINS)
    at = {"chain": "critical", "depth": 4, "loss": "pred", "block": 2, "schedule": "sequential"}
    (_, line), *others = table[np.logical_and.reduce([table[key] == value for key, value in at.items()])].iterrows()
    test = pick(rows, "test_accuracy", part="training", **at)["value"]
    assert others == []
    assert (line["test accuracy"], line["least"], line["greatest"]) == pytest.approx((test.mean(), test.min(), test.max()))
    probes = pick(rows, "probe_accuracy", moment="after", layer=3, **at)["value"]
    assert line["last hidden layer, probed"] == pytest.approx(probes.mean())
    assert line["learning rate"] == pick(rows, "learning_rate", **at)["value"].item()


def test_accuracies_stand_beside_backpropagations(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    panels = {axis.get_label(): axis for axis in draw(NAME, rows).axes}
    for letter, chain in zip("abcd", figure_module.CHAINS, strict=True):
        line = next(line for line in panels[letter].get_lines() if line.get_label() == "backprop")
        expected = pick(rows, "test_accuracy", part="training", chain=chain, loss="backprop", depth=4)["value"].mean()
        assert line.get_ydata() == pytest.approx([expected, expected])


def test_costs_are_in_units_of_backpropagation(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    panels = {axis.get_label(): axis for axis in draw(NAME, rows).axes}
    at = {"depth": 4, "hidden": 0, "schedule": "simultaneous"}
    counts = {q: pick(rows, q, **at).set_index(["loss", "block"])["value"] for q in figure_module.COSTS}
    drawn = {letter: {line.get_label(): line.get_ydata() for line in panels[letter].get_lines()} for letter in "jk"}
    for loss in ("pred", "sim", "predsim"):
        adds, with_heads = counts["multiply_adds"], counts["parameters"] + counts["auxiliary_parameters"]
        assert drawn["j"][loss] == pytest.approx(adds[loss].to_numpy() / adds["backprop"].item())
        assert drawn["k"][loss] == pytest.approx(with_heads[loss].to_numpy() / with_heads["backprop"].item())


def test_the_lock_is_drawn_before_and_after_training(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    panel = next(axis for axis in draw(NAME, rows).axes if axis.get_label() == "g")
    drawn = {line.get_label(): np.mean(line.get_ydata()) for line in panel.get_lines()}
    flows = pick(rows, "flow", chain="vanishing", depth=4, loss="backprop").groupby("moment")["value"].mean()
    assert (drawn["before training"], drawn["backprop"]) == pytest.approx((flows["before"], flows["after"]))
    assert drawn["locked below"] == THOUSANDTH


def test_probes_are_drawn_layer_by_layer_and_beside_the_readout(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    panels = {axis.get_label(): axis for axis in draw(NAME, rows).axes}
    curves = {container.get_label(): container.lines[0].get_ydata() for container in panels["h"].containers}
    probes = pick(rows, "probe_accuracy", chain="vanishing")
    assert set(curves) == {*LOCAL, "backprop", "untrained"}
    for loss in LOCAL:
        single = pick(probes, "probe_accuracy", moment="after", loss=loss, block=1, schedule="simultaneous")
        assert curves[loss] == pytest.approx(single.groupby("layer")["value"].mean().to_numpy())
    assert curves["untrained"] == pytest.approx(pick(probes, "probe_accuracy", moment="before").groupby("layer")["value"].mean().to_numpy())
    points = np.concatenate([collection.get_offsets() for collection in panels["i"].collections])
    at = {"chain": "latched", "loss": "sim"}
    probe = pick(rows, "probe_accuracy", moment="after", layer=3, **at)["value"].mean()
    readout = pick(rows, "test_accuracy", part="training", **at)["value"].mean()
    assert np.isclose(points, (probe, readout)).all(axis=1).any()


def rings(axis: Axes) -> int:
    return sum(len(line.get_xdata()) for line in axis.get_lines() if line.get_fillstyle() == "none")


@pytest.mark.parametrize("doubt", ["at_edge", "at_chance"])
def test_a_rate_that_is_not_to_be_trusted_has_a_ring(doubt: str, tmp_path: Path) -> None:
    trusted = after(read(NAME, tmp_path), [put("at_edge", 0.0), put("at_chance", 0.0)])
    doubted = after(trusted, [put(doubt, 1.0, chain="latched", loss="backprop"), put(doubt, 1.0, chain="latched", loss="pred", block=2)])
    for rows, expected in ((trusted, 0), (doubted, 2)):
        panels = {axis.get_label(): axis for axis in draw(NAME, rows).axes}
        assert [rings(panels[letter]) for letter in "abcd"] == [0, expected, 0, 0]
