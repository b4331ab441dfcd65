"""The figure and table of information_bottleneck."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import information_bottleneck as figure_module
from src.rows import pick
from tests.experiments.measured import after, put
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "information_bottleneck"


def test_the_table_has_every_code_and_every_filter(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows).set_index(["activation", "r"])
    assert sorted(table.index) == [(activation, r) for activation in ("linear", "relu", "tanh") for r in (0, 1, 4, 12, 16)]
    line = table.loc[("tanh", 4)]
    where = {"activation": "tanh", "code": 4}
    assert line["rank g_1, trained"] == pick(rows, "signal_rank", **where, when="trained", layer=1)["value"].mean()
    untrained = {"when": "untrained", "init": "gaussian"}
    assert line["rank g_2, untrained"] == pick(rows, "signal_rank", **where, **untrained, layer=2)["value"].mean() == 4
    assert line["outside, untrained"] == pytest.approx(pick(rows, "outside", **where, **untrained, layer=1)["value"].mean())
    narrow, wide = (pick(rows, "energy_kept", activation="tanh", code=code, **untrained)["value"].mean() for code in (4, 16))
    assert line["energy, untrained"] == pytest.approx(narrow / wide)
    assert line["test accuracy, filter"] == pick(rows, "test_accuracy", **where, part="filter")["value"].mean()
    assert np.isfinite(table.drop(index=[0, 16], level="r")).all(axis=None)
    assert table.xs(16, level="r")["energy, trained"].to_numpy() == pytest.approx(1)


def test_codes_that_died_and_trainings_that_diverged_leave_gaps(tmp_path: Path) -> None:
    rows = after(read(NAME, tmp_path), [put("energy_kept", 0.0, activation="relu", code=1)])
    lost = (rows["when"] == "trained") & (rows["activation"] == "tanh") & (rows["code"] == 4) & (rows["quantity"] == "signal_rank")
    table = figure_module.table(rows[~lost]).set_index(["activation", "r"])
    assert table.loc[("relu", 1), "energy, trained"] == 0
    assert np.isnan(table.loc[("tanh", 4), "rank g_2, trained"])
    check_panels(draw(NAME, rows[~lost]))


def test_the_figure_compares_code_and_filter_from_no_direction_on(tmp_path: Path) -> None:
    axis = draw(NAME, read(NAME, tmp_path)).axes[5]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["code", "filter"]
    starts = [np.min(line.get_xdata()) for line in axis.get_lines() if line.get_linestyle() in ("-", "--")]
    assert starts == pytest.approx([1, 1, 1, 0, 0, 0])
