"""The figure and table of residual_unlock."""

from pathlib import Path

import numpy as np
import pytest

from paper_figures import residual_unlock as figure_module
from paper_figures.style import to_bytes
from src.rows import pick
from tests.paper_figures.drawn import check_panels, draw, read

NAME = "residual_unlock"


def test_drawing_twice_gives_the_same_bytes_and_leaves_the_rows_alone(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    first, second = draw(NAME, rows), draw(NAME, rows)
    check_panels(first, 6)
    for kind in ("png", "pdf"):
        assert to_bytes(first, kind) == to_bytes(second, kind)
    assert "FALLBACK" not in first._supxlabel.get_text()
    assert rows.equals(read(NAME, tmp_path))


def test_a_fallback_run_is_called_out_in_red(tmp_path: Path) -> None:
    label = draw(NAME, read(NAME, tmp_path, fallback=True))._supxlabel
    assert label.get_text().startswith("FALLBACK: measured on digits in place of mnist")
    assert label.get_color() == "tab:red"


def test_the_table_has_the_accuracies_of_every_chain(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    table = figure_module.table(rows)
    assert len(table) == 3 * rows.loc[rows["part"] == "training", "depth"].nunique()
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    assert set(table["chain"]) == {"plain", "original", "pre-activation"}
    deepest = pick(rows, "test_accuracy", part="training", skip="none", depth=table["depth"].max())["value"]
    line = table.query("chain == 'plain'").iloc[-1]
    assert (line["test accuracy"], line["least"], line["greatest"]) == pytest.approx((deepest.mean(), deepest.min(), deepest.max()))


def test_a_training_that_diverged_has_no_gradient_after_it(tmp_path: Path) -> None:
    rows = read(NAME, tmp_path)
    lost = (rows["part"] == "training") & (rows["when"] == "trained") & (rows["skip"] == "none") & (rows["depth"] == 10)
    table = figure_module.table(rows[~lost]).set_index(["depth", "chain"])
    assert np.isnan(table.loc[(10, "plain"), "trained"])
    check_panels(draw(NAME, rows[~lost]), 6)
