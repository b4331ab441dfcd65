"""The figure and table of certificate."""

from pathlib import Path

import numpy as np
import pytest

from experiments.certificate import ENTRIES, K_BACK, READINGS, networks, told
from paper_figures import certificate as figure_module
from src.prediction import association, predict_left_out
from tests.experiments.measured import put
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "certificate"


def test_the_table_has_the_correlation_of_every_reading(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table, nets = figure_module.table(rows), networks(rows)
    assert len(table) - 2 == len(READINGS) + 1 == len(figure_module.NAMES)
    assert (table["in K_back"] == "yes").sum() == len(ENTRIES) + 1 == 5
    line = table[table["reading"] == "|ln ‖g_1‖/‖g_L‖|"].iloc[0]
    rho = association(nets["gradient_ratio"], nets["accuracy"])
    assert (line["ρ"], line["low"], line["high"], line["architectures"]) == (rho.value, rho.lo, rho.hi, len(nets))
    plain = nets[nets["kind"] == "plain"]
    assert line["says"] == told(rho, figure_module.LEVEL)
    given = association(nets["gradient_ratio"], nets["accuracy"], nets["width"])
    assert (line["ρ, given width"], line["given width, low"], line["given width, high"]) == (given.value, given.lo, given.hi)
    assert line["ρ, plain"] == association(plain["gradient_ratio"], plain["accuracy"]).value
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)


def test_the_best_combination_has_a_line_of_its_own(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    line = figure_module.table(rows).set_index("reading").loc["best of K_back, family left out"]
    foretold = predict_left_out(networks(rows), K_BACK, "accuracy", "kind")
    rho = association(foretold["predicted"], foretold["accuracy"])
    assert (line["ρ"], line["low"], line["high"]) == (rho.value, rho.lo, rho.hi)


def test_what_predicts_nothing_is_said_to(tmp_path: Path) -> None:
    rows = put("rank", 10.0)(read(NAME, tmp_path))
    assert figure_module.table(rows).set_index("reading").loc["min rank J_l", "says"] == "predicts nothing"
    drawn = {axis.get_label(): axis for axis in draw(NAME, rows).axes}
    assert drawn["b"].get_title(loc="left").endswith(": nothing")


def test_infinities_stand_apart_at_the_edge(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    assert np.isinf(networks(rows)["conditioning"]).any()
    drawn = {axis.get_label(): axis for axis in draw(NAME, rows).axes}
    assert [text.get_text() for text in drawn["c"].get_xticklabels()].count("∞") == 1
    assert drawn["c"].get_xticks()[-1] > np.max(networks(rows)["conditioning"].abs().replace(np.inf, 0))
    finite = draw(NAME, put("conditioning", 10.0)(rows))
    check_panels(finite)
    assert all(text.get_text() != "∞" for text in finite.axes[2].get_xticklabels())


def test_every_title_carries_the_correlation_of_its_panel(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    lines = figure_module.table(rows).set_index("reading")
    axes = draw(NAME, rows).axes
    for axis, reading in zip(axes, figure_module.SHOWN, strict=False):
        rho = lines.loc[figure_module.NAMES[reading], "ρ"]
        assert f"ρ = {rho:.2f}".replace("-", "−") in axis.get_title(loc="left")


@pytest.mark.parametrize("reading", figure_module.SHOWN)
def test_right_is_less_locked(reading: str, tmp_path: Path) -> None:
    axis = draw(NAME, read(NAME, tmp_path)).axes[list(figure_module.SHOWN).index(reading)]
    assert axis.xaxis_inverted() == (figure_module.SHOWN[reading][2] < 0)
