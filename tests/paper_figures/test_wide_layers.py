"""The figure and table of wide_layers."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import wide_layers as figure_module
from src.rows import pick
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "wide_layers"


def test_the_table_has_the_ranks_of_every_width(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert len(table) == 2 * 3 * 3
    line = table.query("when == 'initial' and activation == 'tanh' and width == 32").iloc[0]
    where = {"when": "initial", "activation": "tanh", "width": 32}
    assert line["rank J_l"] == pytest.approx(pick(rows, "jacobian_rank", **where)["value"].mean())
    gradients = pick(rows, "gradient_rank", **where, batch_size=24)
    assert line["rank ∇W_l"] == pytest.approx(gradients[gradients["layer"].isin([2, 3])]["value"].mean())
    assert np.isfinite(table.loc[table["when"] == "trained"].select_dtypes("number")).all(axis=None)


def test_an_activation_keeps_its_look_without_the_others(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    looks = []
    for shown in (rows, rows[rows["activation"] != "relu"]):
        drawn = {bars.get_label(): bars.lines[0] for bars in draw(NAME, shown).axes[5].containers}
        looks.append((drawn["tanh"].get_color(), drawn["tanh"].get_marker(), drawn["tanh"].get_linestyle()))
    assert looks[0] == looks[1]


def test_a_panel_without_rows_is_told(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    with pytest.raises(ValueError, match=r"no rows for panel e$"):
        draw(NAME, rows[rows["when"] != "trained"])


def test_a_training_that_diverged_leaves_a_gap(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    lost = (rows["when"] == "trained") & (rows["activation"] == "relu") & (rows["width"] == 32)
    assert len(figure_module.table(rows[~lost])) == 2 * 3 * 3 - 1
    check_panels(draw(NAME, rows[~lost]))
