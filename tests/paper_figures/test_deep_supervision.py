"""The figure and table of deep_supervision."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import deep_supervision as figure_module
from src.rows import pick
from src.statistics import paired_difference
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "deep_supervision"


def test_the_table_has_every_setting_of_every_chain_and_its_gain(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    accuracies = pick(rows, "test_accuracy", part="training")
    settings = accuracies[["heads", "weight_var", "depth", "alpha", "every", "schedule", "boost", "adam"]].drop_duplicates()
    assert len(table) == len(settings)
    chosen = {"heads": "random", "weight_var": 0.5, "depth": 16, "boost": 1.0, "adam": 0.0}
    plain = pick(accuracies, "test_accuracy", **chosen, schedule="none")["value"]
    fading = pick(accuracies, "test_accuracy", **chosen, schedule="fading", every=1)["value"]
    deep = table.query("depth == 16 and heads == 'random'").set_index(["σw²", "auxiliary losses"])
    gain = paired_difference(fading, plain)
    line = deep.loc[(0.5, "α 1 fading, k 1"), ["test accuracy", "gain", "± gain"]]
    assert line.tolist() == pytest.approx([fading.mean(), gain.value, gain.hi - gain.value])
    first = pick(rows, "exit_accuracy", weight_var=0.5, depth=16, layer=1)["value"].mean()
    assert deep.loc[(0.5, "α 1 constant, k 1"), "first exit"] == pytest.approx(first)
    assert np.isnan(deep.loc[(0.5, "no exit"), "first exit"])


def test_a_training_that_diverged_is_drawn_without_its_gradients(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    lost = rows["when"].isin(["early", "trained"]) & (rows["heads"] == "random") & (rows["depth"] == 4)
    check_panels(draw(NAME, rows[~lost]))


def test_the_prediction_of_the_direct_part_starts_at_two_layers(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    black = [line for line in draw(NAME, rows).axes[0].get_lines() if line.get_color() == "k"]
    loss = figure_module.shares(rows).groupby("weight_var")["loss"].first()
    for line, (_, a_layer) in zip(black, loss.items(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), [0, (16 - 2) * a_layer / 2])
