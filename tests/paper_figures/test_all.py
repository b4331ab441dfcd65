"""What every figure and table owes: the same bytes twice, rows left alone, labelled panels, a fallback called out, a table with numbers."""

import importlib
from pathlib import Path

import pytest

from paper_figures.style import to_bytes
from tests.experiments.measured import NAMES
from tests.paper_figures.drawn import check_panels, draw, read


@pytest.mark.parametrize("name", NAMES)
def test_drawing_twice_gives_the_same_bytes_and_leaves_the_rows_alone(name: str, tmp_path: Path) -> None:
    rows = read(name, tmp_path)
    first, second = draw(name, rows), draw(name, rows)
    check_panels(first)
    for kind in ("png", "pdf"):
        assert to_bytes(first, kind) == to_bytes(second, kind)
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
