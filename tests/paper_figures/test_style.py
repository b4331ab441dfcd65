"""Bytes, letters and the line on where rows come from."""

from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest

from paper_figures.style import NARROW, PREDICTION, beyond, origin, over_seeds, panels, shows_rows, subscripts, title, to_bytes

STAMP = {"data": "digits", "train_images": 1437, "scale": "smoke", "root_seed": 3, "run": "abc", "commit": "0" * 40, "dirty": False}
REAL = pd.DataFrame([{**STAMP, "data_requested": "digits", "fallback": False}])
FALLBACK = pd.DataFrame([{**STAMP, "data_requested": "mnist", "fallback": True}])


def drawn(rows: pd.DataFrame, count: int = 3):
    with panels(rows, count, columns=2, height=1.5) as (figure, axes):
        for axis in axes:
            axis.plot([0, 1])
            title(axis, "what")
    return figure


def test_panels_are_lettered_and_empty_ones_go() -> None:
    assert [axis.get_title(loc="left") for axis in drawn(REAL).axes] == [rf"$\mathbf{{{letter}}}$  what" for letter in "abc"]


def test_where_rows_come_from_stands_below() -> None:
    line = drawn(REAL).get_supxlabel()
    assert line == origin(REAL) == "digits, 1,437 training images, scale=smoke, seed 3, run abc"


def test_rows_of_several_runs_are_told_in_spans_and_what_they_mix_in_red() -> None:
    seeds = pd.concat([REAL, REAL.assign(root_seed=5, run="def")])
    assert origin(seeds) == "digits, 1,437 training images, scale=smoke, seed 3–5, 2 runs"
    assert drawn(seeds)._supxlabel.get_color() != "tab:red"
    mixed = pd.concat([REAL, REAL.assign(scale="quick", dirty=True)])
    assert origin(mixed).startswith("MIXED commits 0000000, 0000000 with changes and scales quick, smoke — digits")
    assert drawn(mixed)._supxlabel.get_color() == "tab:red"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rank J_l", "rank J$_{l}$"),
        ("ln ‖g_1‖/‖g_{L−1}‖", "ln ‖g$_{1}$‖/‖g$_{L−1}$‖"),
        ("$W_3$ and K_back", "$W_3$ and K$_{back}$"),
        ("σ_min", "σ$_{min}$"),
        ("plain", "plain"),
    ],
)
def test_subscripts_are_set_below_the_line_unless_they_are_already(text: str, told: str) -> None:
    assert subscripts(text) == told


def test_a_wide_panel_takes_two_columns() -> None:
    with panels(REAL, count=3, columns=4, height=1, wide=(0,)) as (figure, axes):
        for axis in axes:
            axis.plot([0, 1])
    figure.draw_without_rendering()
    first, *others = (axis.get_position() for axis in axes)
    assert all(first.width > 1.5 * other.width and first.y0 == other.y0 for other in others)


def test_a_fallback_is_called_out_in_red() -> None:
    figure = drawn(FALLBACK)
    assert figure.get_supxlabel() == f"FALLBACK: measured on digits in place of mnist — {origin(REAL)}"
    assert figure._supxlabel.get_color() == "tab:red"
    assert drawn(REAL)._supxlabel.get_color() != "tab:red"


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_same_rows_give_the_same_bytes(kind: Literal["png", "pdf", "svg"], magic: bytes) -> None:
    first = to_bytes(drawn(REAL), kind)
    assert first.startswith(magic)
    assert to_bytes(drawn(REAL), kind) == first
    assert to_bytes(drawn(FALLBACK), kind) != first


def half_empty() -> None:
    with panels(REAL, 4, columns=2, height=1) as (_, axes):
        axes[0].plot([0, 1])
        axes[1].plot([0, 1], **PREDICTION)
        axes[2].axhline(1)
        axes[3].plot([0, 1], [np.nan, np.nan])
        axes[3].legend()


def test_a_panel_that_shows_no_row_is_told_and_what_was_warned_of_is_not() -> None:
    """A prediction, a mark across the panel, and values that are none, are no rows."""
    with pytest.raises(ValueError, match="no rows for panels b, c, d"):
        half_empty()


def without_labels() -> None:
    with panels(REAL, 1, columns=1, height=1) as (_, (axis,)):
        axis.plot([0, 1])
        axis.legend()


def test_what_is_warned_of_a_whole_figure_is_passed_on() -> None:
    with pytest.warns(UserWarning, match="No artists with labels"):
        without_labels()


def test_points_meshes_and_means_are_rows() -> None:
    with panels(REAL, 3, columns=3, height=1) as (_, axes):
        axes[0].scatter([0], [1])
        axes[1].pcolormesh([[0.0]])
        over_seeds(axes[2], pd.DataFrame({"x": [1], "value": [2.0]}), "x", 0)
    assert [shows_rows(axis) for axis in axes] == [True] * 3


def seeds(values: list[float], **how: Any) -> tuple[list[float], list[float]]:
    """The means and the ends of their bars that over_seeds draws, of seeds at one place."""
    with panels(REAL, 1, columns=1, height=1) as (_, (axis,)):
        over_seeds(axis, pd.DataFrame({"x": 1, "value": values}), "x", 0, **how)
    (bars,) = axis.containers
    return list(bars.lines[0].get_ydata()), [y for segment in bars.lines[2][0].get_segments() for _, y in segment]


def test_the_error_bar_is_the_t_interval() -> None:
    """Two draws: x̄ ± 12.706 · s/√2."""
    mean, ends = seeds([0.0, 2.0, np.nan])
    assert (mean, ends) == ([1.0], pytest.approx([1 - 12.706, 1 + 12.706], rel=1e-4))
    assert seeds([0.0, 2.0], bounds=(0, 3)) == ([1.0], [0.0, 3.0])
    assert seeds([1.0, np.e**2], geometric=True) == (pytest.approx([np.e]), pytest.approx(np.exp([1 - 12.706, 1 + 12.706]), rel=1e-3))


def test_a_single_seed_has_no_error_bar() -> None:
    mean, ends = seeds([2.0], bounds=(0, 3))
    assert mean == [2.0]
    assert not np.isfinite(ends).any()


def test_what_is_infinite_has_a_ticked_row_beyond_what_is_finite() -> None:
    with panels(REAL, 1, columns=1, height=1) as (_, (axis,)):
        axis.plot([1, 10, 1000])
        axis.set_yscale("log")
        low, high = beyond(axis, "y", -1), beyond(axis, "y", 1)
    assert low < 1 < 1000 < high
    assert (axis.get_ylim()[0], axis.get_ylim()[1]) == pytest.approx((low, high), rel=0.9)
    told = dict(zip(axis.get_yticks(), (label.get_text() for label in axis.get_yticklabels()), strict=True))
    assert (told[low], told[high]) == ("−∞", "∞")


def test_a_figure_of_one_column_is_half_as_wide() -> None:
    with panels(REAL, 1, columns=1, height=1, width=NARROW) as (figure, (axis,)):
        axis.plot([0, 1])
    assert figure.get_size_inches().tolist() == [3.5, 1]
