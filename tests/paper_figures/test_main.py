"""`python -m paper_figures`: which rows are drawn, what is written, what goes wrong."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from paper_figures import __main__ as command
from paper_figures.style import panels
from tests.experiments.measured import NAMES
from tests.paper_figures.drawn import finished_run, parquet

KINDS = {"pdf": b"%PDF", "png": b"\x89PNG", "tex": rb"\begin{tabular}", "md": b"|", "csv": b""}


@dataclass
class Answer:
    code: int
    out: str
    errors: list[str]


class Commands:
    """The command line in this process, over a results folder and an output folder of its own, without committed rows."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.results, self.out = folder / "results", folder / "out"
        self.reference = folder / "reference"
        self.reference.mkdir()
        monkeypatch.setattr(command, "HERE", folder)
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *names: str) -> Answer:
        places = ["--results", str(self.results), "--out", str(self.out)]
        self._monkeypatch.setattr(sys, "argv", ["paper_figures", *names, *places])
        code = command.main()
        captured = self._capsys.readouterr()
        return Answer(code, captured.out, captured.err.splitlines())


@pytest.fixture
def real_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def small_figure(rows: pd.DataFrame) -> Figure:
    with panels(rows, count=1, columns=1, height=1) as (figure, (axis,)):
        axis.plot(rows["value"].head())
    return figure


@pytest.fixture
def run(real_figures: Commands, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The same with figures that are drawn in a moment."""
    for name in NAMES:
        monkeypatch.setattr(f"paper_figures.{name}.draw", small_figure)
    return real_figures


def test_every_figure_has_a_module() -> None:
    assert sorted(command.FIGURES) == sorted(NAMES)


def test_without_names_every_figure_and_table_is_written(real_figures: Commands) -> None:
    run = real_figures
    sources = [finished_run(run.results, name) for name in NAMES]
    answer = run()
    assert (answer.code, answer.errors) == (0, [])
    tables = {f"ledger.{kind}" for kind in ("tex", "md", "csv")}
    assert {file.name for file in run.out.iterdir()} == tables | {f"{name}.{kind}" for name in NAMES for kind in KINDS}
    for name, source in zip(NAMES, sources, strict=True):
        for kind, start in KINDS.items():
            file = run.out / f"{name}.{kind}"
            assert file.read_bytes().startswith(start)
            assert f"{file}  ←  {source}" in answer.out
        assert len(pd.read_csv(run.out / f"{name}.csv")) >= 2


def test_drawing_again_writes_the_same_bytes(run: Commands) -> None:
    finished_run(run.results, NAMES[0])
    run(NAMES[0])
    before = {file.name: file.read_bytes() for file in run.out.iterdir()}
    run(NAMES[0])
    assert {file.name: file.read_bytes() for file in run.out.iterdir()} == before


def test_an_unknown_name_is_answered_with_the_nearest(run: Commands) -> None:
    answer = run("residual_unlok")
    assert answer.code == 2
    assert len(answer.errors) == 1
    assert "did you mean residual_unlock?" in answer.errors[0]
    assert not run.out.exists()


def test_a_name_like_no_other_is_answered_with_all(run: Commands) -> None:
    answer = run("zzz")
    assert answer.code == 2
    assert answer.errors == [f"error: no figure 'zzz'; there are {', '.join(NAMES)}, ledger"]


def test_without_any_rows_each_figure_is_told_in_a_line(run: Commands) -> None:
    answer = run()
    assert answer.code == 1
    assert len(answer.errors) == len(NAMES)
    for name, line in zip(NAMES, answer.errors, strict=True):
        assert line.startswith(f"error: {name}: no finished run under {run.results}")
        assert f"python -m src.run experiment={name}" in line


def test_figures_with_rows_are_drawn_though_others_have_none(run: Commands) -> None:
    finished_run(run.results, NAMES[1])
    answer = run()
    assert answer.code == 1
    assert [line.split(":")[1].strip() for line in answer.errors] == [name for name in NAMES if name != NAMES[1]]
    assert {file.stem for file in run.out.iterdir()} == {NAMES[1], "ledger"}


@pytest.mark.parametrize(
    "damage", [lambda rows: rows[: len(rows) // 2], lambda rows: b"", lambda rows: rows[:4] + b"\0" * 500 + rows[504:]]
)
def test_damaged_rows_are_told_in_a_line_that_names_the_file(run: Commands, damage) -> None:
    source = finished_run(run.results, NAMES[0])
    source.write_bytes(damage(source.read_bytes()))
    finished_run(run.results, NAMES[1])
    answer = run(*NAMES[:2])
    assert answer.code == 1
    assert len(answer.errors) == 1
    assert str(source) in answer.errors[0]
    assert {file.stem for file in run.out.iterdir()} == {NAMES[1]}


def test_rows_that_lack_what_the_figure_shows_are_told_in_a_line(run: Commands) -> None:
    """A table of rows, but of another experiment's."""
    source = finished_run(run.results, NAMES[0])
    source.write_bytes(parquet(NAMES[1]))
    answer = run(NAMES[0])
    assert answer.code == 1
    assert len(answer.errors) == 1
    assert str(source) in answer.errors[0]


def test_a_table_without_rows_is_told_in_a_line(run: Commands) -> None:
    source = finished_run(run.results, NAMES[0])
    pd.read_parquet(source).iloc[:0].to_parquet(source)
    answer = run(NAMES[0])
    assert answer.code == 1
    assert len(answer.errors) == 1
    assert str(source) in answer.errors[0]


def test_an_output_folder_that_is_a_file_is_told_in_a_line(run: Commands) -> None:
    finished_run(run.results, NAMES[0])
    run.out.write_text("in the way", encoding="utf-8")
    answer = run(NAMES[0])
    assert answer.code == 1
    assert len(answer.errors) == 1
    assert str(run.out) in answer.errors[0]


def test_the_newest_finished_run_is_drawn(run: Commands) -> None:
    older, newer, unfinished = (finished_run(run.results, NAMES[0], name) for name in ("older", "newer", "unfinished"))
    for age, rows in enumerate((unfinished, newer, older)):
        os.utime(rows.parent / "status.json", (1e9 - age, 1e9 - age))
    (unfinished.parent / "status.json").write_text('{"status": "running"}', encoding="utf-8")
    answer = run(NAMES[0])
    assert answer.code == 0
    assert str(newer) in answer.out
    assert str(older) not in answer.out
    assert str(unfinished) not in answer.out


def test_committed_rows_are_drawn_where_there_is_no_run(run: Commands) -> None:
    reference = run.reference / f"{NAMES[0]}.parquet"
    reference.write_bytes(parquet(NAMES[0]))
    answer = run(NAMES[0])
    assert answer.code == 0
    assert str(reference) in answer.out
    own = finished_run(run.results, NAMES[0])
    assert str(own) in run(NAMES[0]).out
