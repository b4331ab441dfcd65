"""`--check`: what counts as reproduced, form by form, and what can't be compared."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper_figures import check
from paper_figures.check import NOT, NOTHING, ORDER, WITHIN, agree, compare, show_check
from paper_figures.sources import Shelf
from src.errors import UserError
from src.verdict import Verdict
from tests.experiments.measured import NAMES
from tests.paper_figures.drawn import finished_run, parquet

NAME = NAMES[0]


def verdict(word: str = "holds", estimate: float | None = 1.0, half: float | None = 0.1, n: int = 10, cell: str = "depth=4") -> Verdict:
    ends = (None, None) if estimate is None or half is None else (estimate - half, estimate + half)
    evidence = f"1 of 1 cells inside; worst: {cell}: {estimate} [{ends[0]}, {ends[1]}], n={n}"
    return Verdict("claim/form", "precise", "it is so", "≥ 0", word, None, estimate, ends, n, evidence)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "run", "word"),
    [
        (verdict(), verdict(), WITHIN),
        (verdict(), verdict(estimate=1.14), WITHIN),  # √2 · 0.1 = 0.1414
        (verdict(), verdict(estimate=1.15), ORDER),
        (verdict("refuted"), verdict("refuted", 2.0), ORDER),
        (verdict(half=0.0), verdict(half=0.0, estimate=1 + 1e-7), WITHIN),
        (verdict(half=0.0), verdict(half=0.0, estimate=1.001), ORDER),
        (verdict(estimate=1e-15, half=0.0), verdict(estimate=3e-15, half=0.0), WITHIN),  # rounding
        (verdict(), verdict(half=None), WITHIN),  # equal numbers need no interval
        (verdict(), verdict(estimate=1.1, half=None), ORDER),  # what is not bounded agrees with nothing
        (verdict("holds"), verdict("holds_if"), ORDER),
        (verdict("holds"), verdict("inconclusive", 1.1), ORDER),
        (verdict("inconclusive"), verdict("refuted", 0.9), ORDER),
        (verdict("holds"), verdict("inconclusive", 5.0), NOT),
        (verdict("inconclusive"), verdict("refuted", -3.0), NOT),
        (verdict("holds"), verdict("inconclusive", 1.1, None), NOT),  # too few draws to say anything are no reproduction
        (verdict("holds"), verdict("refuted"), NOT),
        (verdict("refuted"), verdict("holds_if"), NOT),
        (replace(verdict("inconclusive", None), evidence="no cell: nothing was measured"), verdict(), NOTHING),
        (verdict("inconclusive", None), verdict("inconclusive", None), WITHIN),
        (verdict("inconclusive", None), verdict("inconclusive", None, cell="depth=8"), ORDER),
    ],
)
def test_the_three_words(reference: Verdict, run: Verdict, word: str) -> None:
    assert compare(reference, run, together=1)[0] == word


def test_another_deciding_cell_is_said() -> None:
    assert compare(verdict(), verdict(estimate=3.0, cell="depth=8"), 1)[1].endswith("decided by another cell")
    assert "another cell" not in compare(verdict(), verdict(estimate=3.0), 1)[1]


def test_chance_alone_breaks_few_of_many_forms() -> None:
    """A gap that one form's interval does not cover, but those of a hundred do: t₉ widens from 2.26 to 4.97."""
    run = verdict("inconclusive", 1.25)
    assert compare(verdict(), run, together=1)[0] == NOT
    assert compare(verdict(), run, together=100)[0] == ORDER


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0.01, 3), st.floats(0.01, 3), st.integers(2, 50))
def test_agreement_is_mutual_and_grows_with_the_forms(a: float, b: float, half: float, other: float, n: int) -> None:
    one, two = verdict(estimate=a, half=half, n=n), verdict(estimate=b, half=other, n=n)
    assert agree(one, two) == agree(two, one)
    assert agree(one, two) <= agree(one, two, together=20)
    assert agree(one, two) or abs(a - b) > max(half, other)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """A reference and a finished run with the same verdicts."""
    shelf = Shelf(tmp_path / "results", tmp_path / "reference")
    run = finished_run(shelf.results, NAME).parent
    shelf.reference.mkdir()
    shutil.copy(run / "rows.parquet", shelf.reference / f"{NAME}.parquet")
    shutil.copy(run / "verdicts.json", shelf.reference / f"{NAME}.json")
    shutil.copy(run / "provenance.json", shelf.reference / f"{NAME}.provenance.json")
    return shelf


def test_the_same_run_is_reproduced(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_check(shelf, [], tmp_path / "out") == 0
    lines = pd.read_csv(tmp_path / "out/check.csv")
    assert set(lines["told"]) <= {WITHIN, NOTHING}
    assert len(lines) == len(json.loads((shelf.reference / f"{NAME}.json").read_text()))
    out = capsys.readouterr().out
    assert "the same config and seed: 0 of" in out
    assert f"{NAMES[1]}: no reference rows" in out
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".tex", ".md", ".csv", ".json"}


def test_each_data_set_of_the_reference_is_compared(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(shelf.results, NAME, data="mnist").parent
    further = shelf.reference / "mnist"
    further.mkdir()
    for file, kind in ("rows.parquet", "parquet"), ("verdicts.json", "json"), ("provenance.json", "provenance.json"):
        shutil.copy(run / file, further / f"{NAME}.{kind}")
    assert show_check(shelf, [], tmp_path / "out") == 0
    lines = pd.read_csv(tmp_path / "out/check.csv")
    assert lines.groupby("data").size().to_dict() == dict.fromkeys(("digits", "mnist"), len(lines) / 2)
    shutil.rmtree(run)
    assert show_check(shelf, [], tmp_path / "out") == 0
    assert set(pd.read_csv(tmp_path / "out/check.csv")["data"]) == {"digits"}
    assert "1 of 12 experiments compared" in capsys.readouterr().out


def test_an_opposite_verdict_is_not(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "judged", lambda source, rows: [verdict("holds" if source.folder else "refuted")])
    assert show_check(shelf, [NAME], tmp_path) == 1
    out = capsys.readouterr().out
    assert "1 not reproduced" in out
    assert "1 of 1 experiments compared" in out


def test_verdicts_are_judged_anew_from_the_rows(shelf: Shelf, tmp_path: Path) -> None:
    (run,) = shelf.results.glob("*/*/*/seed*/rows.parquet")
    run.with_name("verdicts.json").write_text("[]")
    assert show_check(shelf, [NAME], tmp_path) == 0
    rows = pd.read_parquet(run)
    rows.assign(value=rows["value"].where(rows["quantity"] != "norm_error", 1.0)).to_parquet(run)
    assert show_check(shelf, [NAME], tmp_path) == 1


@pytest.mark.parametrize(("column", "value", "word"), [("scale", "quick", "other scale"), ("data", "mnist", "other data set")])
def test_other_scales_and_data_sets_are_not_compared(
    shelf: Shelf, tmp_path: Path, column: str, value: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shelf.reference / f"{NAME}.parquet"
    pd.read_parquet(file).assign(**{column: value}).to_parquet(file)
    with pytest.raises(UserError, match="nothing to check"):
        show_check(shelf, [], tmp_path)
    assert f"{NAME}: {word}: runs on digits at smoke, reference on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda rows: rows.assign(commit=["a"] + ["b"] * (len(rows) - 1)), "mix commits a, b"),
        (lambda rows: rows[rows["quantity"] != rows["quantity"].iloc[0]], "partial"),
        (lambda rows: rows.drop(columns="dirty"), "partial"),
    ],
)
def test_damage_is_a_line_and_an_exit_code(shelf: Shelf, tmp_path: Path, damage, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = shelf.results.glob("*/*/*/seed*/rows.parquet")
    damage(pd.read_parquet(run)).to_parquet(run)
    assert show_check(shelf, [], tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {NAME}: {run}: ")
    assert told in line


def test_an_unknown_experiment_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no experiment zzz"):
        show_check(shelf, ["zzz"], tmp_path)


def test_a_run_of_other_draws_is_said_to_be_one(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shelf.reference / f"{NAME}.parquet").write_bytes(parquet(NAME, run="another"))
    assert show_check(shelf, [NAME], tmp_path) == 0
    assert "another config: verdicts alone are compared" in capsys.readouterr().out
    (shelf.reference / f"{NAME}.parquet").write_bytes(parquet(NAME, run="another", root_seed=7))
    assert show_check(shelf, [NAME], tmp_path) == 0
    assert "seed 0 against 7: verdicts alone are compared" in capsys.readouterr().out
