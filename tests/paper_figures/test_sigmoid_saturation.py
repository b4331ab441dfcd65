"""The figure and table of sigmoid_saturation."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import sigmoid_saturation as figure_module
from src import mean_field
from src.rows import pick
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "sigmoid_saturation"


def test_the_table_has_every_setting_with_its_theory(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert len(table) == 3 + 2
    assert list(table["saturated by"]) == ["σb²"] * 2 + ["σw²"] * 3
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    line = table.set_index("σw²").loc[64.0]
    assert line["χ predicted"] == pytest.approx(mean_field.chi("sigmoid", 64.0, 0.0))
    own = {"part": "jacobian", "varied": "weight_var", "weight_var": 64.0}
    assert line["mean ‖J‖"] == pytest.approx(pick(rows, "norm", **own)["value"].mean())
    assert line["growth of ‖g‖² a layer"] == pytest.approx(np.exp(pick(rows, "rate", **own)["value"]).mean())
    learning = {"part": "learning", "varied": "weight_var", "weight_var": 64.0}
    assert line["accuracy, L = 3"] == pytest.approx(pick(rows, "test_accuracy", **learning)["value"].mean())


def test_the_course_is_that_of_the_fewest_layers(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    figure = draw(NAME, rows)
    check_panels(figure)
    labels = [text.get_text() for text in figure.axes[5].get_legend().get_texts()]
    assert labels == [*(f"layer {k}" for k in (1, 2, 3, 4)), "its 2nd–98th pct.", "its median", "98th pct., top of 5"]
