"""The ledger: the newest run on each data set, the committed verdicts where there is none, and what is not measured."""

import json
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from paper_figures.ledger import ledger as told_ledger
from paper_figures.ledger import to_table
from paper_figures.sources import Shelf
from src.errors import UserError
from tests.experiments.measured import NAMES, config, small_rows, verdicts
from tests.paper_figures.drawn import finished_run, parquet

NAME = NAMES[0]


def ledger(results: Path, reference: Path) -> pd.DataFrame:
    lines, _, complaints = told_ledger(Shelf(results, reference))
    assert not complaints
    return lines


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def test_every_form_of_every_claim_has_a_line_measured_or_not(results: Path, tmp_path: Path) -> None:
    finished_run(results, NAME)
    lines = ledger(results, tmp_path)
    assert lines["claim"].tolist() == [f"{name}/{form}" for name in NAMES for form in config(name).criteria]
    measured = lines[lines["claim"].str.startswith(f"{NAME}/")]
    expected = verdicts(NAME, small_rows(NAME)).values()
    assert measured["verdict"].tolist() == [verdict.verdict for verdict in expected]
    assert measured["evidence"].tolist() == [verdict.evidence for verdict in expected]
    assert set(measured["command"]) == {f"python -m src.run experiment={NAME} data=digits scale=smoke seed=0"}
    assert set(lines.drop(measured.index)["verdict"]) == {"not measured"}
    assert to_table(lines).row_count == len(lines)
    out = StringIO()
    Console(file=out, width=4000).print(to_table(lines))
    assert all(verdict.evidence in out.getvalue() for verdict in expected)
    assert out.getvalue().count(measured["command"].iloc[0]) == len(measured)


def test_a_run_on_another_data_set_has_lines_of_its_own_and_a_newer_one_replaces(results: Path, tmp_path: Path) -> None:
    finished_run(results, NAME, "older")
    newer = finished_run(results, NAME, "newer").parent / "verdicts.json"
    entries = json.loads(newer.read_text())
    newer.write_text(json.dumps([{**entry, "evidence": "newer"} for entry in entries]))
    once = ledger(results, tmp_path)
    assert set(once.query("data == 'digits'")["evidence"]) == {"newer"}
    finished_run(results, NAME, data="mnist")
    assert len(ledger(results, tmp_path)) == len(once) + len(entries)


def test_committed_verdicts_stand_in_those_on_further_data_sets_last(results: Path, tmp_path: Path) -> None:
    run = finished_run(results, NAME).parent
    for place, data in (tmp_path, "digits"), (tmp_path / "cifar10", "cifar10"):
        place.mkdir(exist_ok=True)
        (place / f"{NAME}.json").write_bytes((run / "verdicts.json").read_bytes())
        (place / f"{NAME}.provenance.json").write_text("{}")
        (place / f"{NAME}.parquet").write_bytes(parquet(NAME, data=data, data_requested=data))
    lines = ledger(tmp_path / "nothing", tmp_path)
    assert lines["data"].dropna().tolist() == [data for data in ("digits", "cifar10") for _ in config(NAME).criteria]
    assert Shelf(tmp_path / "nothing", tmp_path).newest(NAME).rows == tmp_path / f"{NAME}.parquet"
    assert Shelf(tmp_path / "nothing", tmp_path, "cifar10").newest(NAME).rows == tmp_path / f"cifar10/{NAME}.parquet"
    finished_run(results, NAME, data="mnist")
    assert [source.rows for source in Shelf(results, tmp_path, "digits").every(NAME)] == [run / "rows.parquet"]
    assert Shelf(results, tmp_path, "cifar10").newest(NAME).rows == tmp_path / f"cifar10/{NAME}.parquet"
    with pytest.raises(UserError, match=f"run python -m src.run experiment={NAME} data=fashion_mnist"):
        Shelf(results, tmp_path, "fashion_mnist").newest(NAME)


def test_a_fallback_is_said(results: Path, tmp_path: Path) -> None:
    finished_run(results, NAME, fallback=True)
    assert "digits in place of mnist" in set(ledger(results, tmp_path)["data"])


def test_damaged_verdicts_are_told_in_a_line(results: Path, tmp_path: Path) -> None:
    file = finished_run(results, NAME).parent / "verdicts.json"
    file.write_text("[{")
    _, _, (complaint,) = told_ledger(Shelf(results, tmp_path))
    assert complaint.startswith(f"{file}: missing or damaged")
