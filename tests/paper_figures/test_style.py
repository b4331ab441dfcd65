"""Bytes, letters and the line on where rows come from."""

from typing import Literal

import numpy as np
import pandas as pd
import pytest

from paper_figures.style import origin, panels, subscripts, t_error, title, to_bytes

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


def test_the_error_bar_is_the_t_interval() -> None:
    """Two draws: x̄ ± 12.706 · s/√2."""
    assert t_error(np.array([0.0, 2.0])) == pytest.approx((1 - 12.706, 1 + 12.706), rel=1e-4)
