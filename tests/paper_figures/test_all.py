"""What every figure and table owes: the same bytes twice, rows left alone, labelled panels, a fallback called out, a table with numbers."""

import importlib
import json
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from paper_figures.overview import EXPERIMENTS
from paper_figures.products import FIGURES
from paper_figures.sources import HERE, lacking
from paper_figures.style import to_bytes
from src import rows as row_table
from src.errors import UserError
from src.verdict import Verdict
from tests.experiments.measured import NAMES, verdicts
from tests.paper_figures.drawn import REFERENCE, check_panels, cut_off, draw, read


@pytest.mark.parametrize("name", NAMES)
def test_drawing_twice_gives_the_same_bytes_and_leaves_the_rows_alone(name: str, tmp_path: Path) -> None:
    rows = read(name, tmp_path)
    first, second = draw(name, rows), draw(name, rows)
    check_panels(first)
    assert to_bytes(first, "svg") == to_bytes(second, "svg")
    assert "FALLBACK" not in first._supxlabel.get_text()
    assert rows.equals(read(name, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_fallback_run_is_called_out_in_red(name: str, tmp_path: Path) -> None:
    label = draw(name, read(name, tmp_path, fallback=True))._supxlabel
    assert label.get_text().startswith("FALLBACK: measured on digits in place of mnist")
    assert label.get_color() == "tab:red"


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_drawn_from_the_rows_alone(name: str, tmp_path: Path) -> None:
    rows = read(name, tmp_path)
    table = importlib.import_module(f"paper_figures.{name}").table(rows)
    assert not table.empty
    assert len(table.select_dtypes("number").columns) > 0
    assert rows.equals(read(name, tmp_path))


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_of_the_committed_figures_is_cut_off_or_runs_into_the_next(name: str) -> None:
    rows = [row_table.read(HERE / "reference" / f"{part}.parquet") for part in (EXPERIMENTS if name == "overview" else [name])]
    figure = draw(name, pd.concat(rows))
    figure.draw_without_rendering()
    assert cut_off(figure) == []
    words = [text for axis in figure.axes for text in (axis.xaxis.label, axis.yaxis.label, axis.get_legend(), *axis.texts) if text]
    boxes = [text.get_window_extent() for text in words]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    titles = [axis._left_title.get_window_extent() for axis in figure.axes]
    assert all(box.x1 <= figure.bbox.x1 for box in titles)
    assert not [(one, other) for one, other in combinations(titles, 2) if one.overlaps(other)]


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_rows_are_told_to_be_partial_or_fill_every_panel(name: str, tmp_path: Path) -> None:
    rows = read(name, tmp_path)
    told = []
    try:
        with lacking(Path("rows.parquet")):
            check_panels(draw(name, rows.iloc[: len(rows) // 2]))
    except UserError as error:
        told.append(str(error))
    assert all(line.startswith("rows.parquet: partial") for line in told)


@pytest.mark.parametrize(
    ("points", "limits", "scale", "cut"),
    [
        ([1, 5, 9], (0, 10), "linear", False),
        ([1, 5, 11], (0, 10), "linear", True),
        ([1, 5, 10], (0, 10), "linear", True),  # half of a marker
        ([1, 5, 9], (0.1, 100), "log", False),
        ([0, 5, 9], (0.1, 100), "log", True),
        ([0, 5, 9], (-1, 100), "symlog", False),
    ],
)
def test_what_is_cut_off_is_found(points: list[float], limits: tuple[float, float], scale: str, cut: bool) -> None:
    figure = Figure()
    axis = figure.add_subplot(label="a")
    axis.plot(range(3), points, "o")
    axis.set(xlim=(-1, 3), yscale=scale, ylim=limits)
    assert cut_off(figure) == (["a: _child0"] if cut else [])


@pytest.mark.parametrize(("name", "file"), [(source.experiment, source.rows) for name in NAMES for source in REFERENCE.references(name)])
def test_the_committed_verdicts_are_those_of_the_committed_rows(name: str, file: Path) -> None:
    rows = row_table.read(file)
    assert not rows["dirty"].any()
    assert not rows["fallback"].any()
    committed = [Verdict.of(entry) for entry in json.loads(file.with_suffix(".json").read_bytes())]
    found = verdicts(name, rows).values()
    assert [(entry.claim, entry.verdict, entry.n) for entry in found] == [(entry.claim, entry.verdict, entry.n) for entry in committed]
    estimates = [entry.estimate for entry in committed if entry.estimate is not None]
    # rounding differs from machine to machine
    assert [entry.estimate for entry in found if entry.estimate is not None] == pytest.approx(estimates, rel=1e-6, abs=1e-9)
