"""The figure of each paper's nets, and the table that keeps what was measured at one scale apart from what was published."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from paper_figures import reproduction, sources
from paper_figures.sources import HERE, Shelf
from paper_figures.style import to_bytes
from src import rows as row_table
from src.verdict import Verdict
from tests.experiments.measured import PAPERS, config, small_rows, verdicts
from tests.experiments.test_reproduction import reported
from tests.paper_figures.drawn import REFERENCE, check_panels, cut_off, draw, finished_run, read

COMMITTED = sorted((HERE / "reference/reproduction").glob("*.parquet"))


@pytest.fixture(scope="module", autouse=True)
def _rows() -> None:
    # measured before the fixture that forbids it
    for paper in PAPERS:
        small_rows(paper)


def csv(shelf: Shelf, tmp_path: Path) -> pd.DataFrame:
    (tmp_path / "table.csv").write_text(reproduction.product(shelf, mixed=False).contents["csv"])
    return pd.read_csv(tmp_path / "table.csv")


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_is_drawn(paper: str, tmp_path: Path) -> None:
    rows = read(paper, tmp_path)
    figure = draw(paper, rows)
    check_panels(figure)
    assert not reproduction.table(rows).select_dtypes("number").empty
    assert rows.equals(read(paper, tmp_path))


def test_drawing_twice_gives_the_same_bytes_and_a_fallback_is_called_out(tmp_path: Path) -> None:
    rows = read(PAPERS[0], tmp_path, fallback=True)
    first, second = (draw(PAPERS[0], rows) for _ in range(2))
    assert to_bytes(first, "svg") == to_bytes(second, "svg")
    assert first._supxlabel.get_text().startswith("FALLBACK")


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_nothing_of_the_committed_rows_is_cut_off(file: Path) -> None:
    figure = draw("reproduction", row_table.read(file))
    figure.draw_without_rendering()
    assert cut_off(figure) == []


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_the_committed_verdicts_are_those_of_the_committed_rows_and_of_todays_config(file: Path) -> None:
    (source,) = (source for source in REFERENCE.papers("reproduction") if source.rows == file)
    rows = source.read()
    assert not rows["dirty"].any()
    assert not rows["fallback"].any()
    assert f"{rows['paper'].iloc[0]}-{rows['data'].iloc[0]}" == file.stem
    assert source.settings() is not None
    told = json.loads(source.provenance.read_text())
    assert (told["commit"], told["data"], told["seed"]) == tuple(rows[["commit", "data", "root_seed"]].iloc[0])
    assert "/tmp" not in source.provenance.read_text()
    committed = [Verdict.of(entry) for entry in json.loads(source.verdicts.read_bytes())]
    found = verdicts(f"reproduction/{rows['paper'].iloc[0]}", rows).values()
    assert [(entry.claim, entry.verdict, entry.n) for entry in found] == [(entry.claim, entry.verdict, entry.n) for entry in committed]


def test_what_was_measured_at_another_scale_is_compared_with_nothing(tmp_path: Path) -> None:
    finished_run(tmp_path / "results", "reproduction/nokland2019")
    lines = csv(Shelf(tmp_path / "results", tmp_path / "nowhere"), tmp_path).set_index(["paper", "data", "what"]).sort_index()
    measured = lines.loc[("nokland2019", "digits", "predsim, test error, %")]
    assert measured["published"] == "0.62"
    assert measured["verdict"] == "not compared: digits, 640 images, scale=smoke"
    assert measured["reduced"].startswith("measured on digits; 32 of 1,024 units or channels; 3 of 46,800 steps; 640 of 60,000 images; ")
    assert "no dropout" in measured["reduced"]
    assert measured["lo"] <= measured["measured"] <= measured["hi"]
    for paper, data, published in (("nokland2019", "cifar10", "30.93"), ("he2016", "cifar10", "8.75"), ("lee2015", "mnist", "0.39")):
        line = lines.loc[(paper, data)]
        assert (line["verdict"] == reproduction.NOT_RUN).all()
        assert line["measured"].isna().all()
        assert published in set(line["published"])
    assert (lines.xs("he2016")["published"] == "> 60").sum() == 1


def test_nets_that_the_scale_leaves_out_are_told_not_to_be_run(tmp_path: Path) -> None:
    finished_run(tmp_path / "results", "reproduction/he2016", data="cifar10")
    lines = csv(Shelf(tmp_path / "results", tmp_path / "nowhere"), tmp_path).query("paper == 'he2016'")
    told = lines.set_index("what")["verdict"]
    assert len(told) == len(lines) == 13  # ten nets and three orders
    assert told["ResNet-110, test error, %"] == told["plain-110, test error, %"] == reproduction.NOT_RUN
    assert told["ResNet-56, test error, %"].startswith("not compared: cifar10")


def test_an_error_measured_as_published_has_the_verdict_of_its_form() -> None:
    paper = "reproduction/nokland2019"
    stamp = {"data": "mnist", "data_requested": "mnist", "scale": "paper", "train_images": 60_000}
    rows = reported(1.0)(small_rows(paper)).assign(experiment="reproduction", root_seed=0, **stamp)
    (line, *_) = reproduction._nets(rows, list(verdicts(paper, rows).values()))
    assert (line["measured"], line["verdict"], line["scale"]) == (8.0, "holds", "paper")


def test_orders_and_limits_have_their_lines(tmp_path: Path) -> None:
    for paper in ("reproduction/yang2019", "reproduction/ioffe2015"):
        finished_run(tmp_path / "results", paper, run=paper[-4:] + paper[13:17])
    lines = csv(Shelf(tmp_path / "results", tmp_path / "nowhere"), tmp_path)
    told = lines[(lines["data"] == "digits")].set_index(["paper", "what"])
    assert "16 of 100 weight layers" in told.loc["yang2019"].iloc[0]["reduced"]
    limit = told.loc[("yang2019", config("reproduction/yang2019").criteria["depth_limit"].criterion + " [published = 50]")]
    assert (limit["verdict"], limit["n"]) == ("not measured at scale=smoke", 0)
    assert np.isnan(limit["measured"])
    order = told.loc[("ioffe2015", config("reproduction/ioffe2015").criteria["normalised_is_better"].criterion)]
    assert order["n"] == 2 or order["verdict"] == "not measured at scale=smoke"
    assert "with BatchNorm, test error, %" in set(lines["what"])


def test_the_newest_run_of_a_paper_stands_for_its_committed_rows(tmp_path: Path) -> None:
    rows = finished_run(tmp_path / "results", PAPERS[0])
    reference = tmp_path / "reference/reproduction"
    reference.mkdir(parents=True)
    for paper in PAPERS[:2]:
        name = paper.partition("/")[2]
        (reference / f"{name}-digits.parquet").write_bytes(finished_run(tmp_path / "other", paper, run=name).read_bytes())
    (reference / "damaged-digits.parquet").write_bytes(b"no table")
    shelf = Shelf(tmp_path / "results", tmp_path / "reference")
    found = {source.rows for source in shelf.papers("reproduction")}
    assert found == {rows, reference / f"{PAPERS[1].partition('/')[2]}-digits.parquet", reference / "damaged-digits.parquet"}
    on_digits = {source.rows for source in replace(shelf, data="digits").papers("reproduction")}
    assert on_digits == found - {reference / "damaged-digits.parquet"}
    assert replace(shelf, data="mnist").papers("reproduction") == []
    complaints = reproduction.product(shelf, mixed=False).complaints
    assert any("damaged-digits.parquet: damaged" in complaint for complaint in complaints)


def test_todays_config_of_a_papers_rows_is_its_own() -> None:
    stamp = {"experiment": "reproduction", "data_requested": "digits", "scale": "smoke", "root_seed": 0}
    rows = small_rows("reproduction/yang2019").assign(**stamp)
    assert sources.todays_config(sources.stamps_of(rows)[0]).grid.paper == "yang2019"
