"""`python -m paper_figures`: which rows are drawn, what is written, what goes wrong."""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from paper_figures import __main__ as command
from paper_figures import drawing, products
from paper_figures.products import FIGURES
from paper_figures.sources import AGAIN, HERE, Shelf, mixture, stamps_of
from paper_figures.style import panels
from src import code
from src.results import hash_of, to_plain
from tests.experiments.measured import NAMES, config
from tests.paper_figures.drawn import PROVENANCE, finished_run, parquet

KINDS = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG", "tex": rb"\begin{tabular}", "md": b"|", "csv": b"", "json": b"{"}


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
        for place in (self.results, self.reference):
            place.mkdir()
        monkeypatch.setattr(command, "HERE", folder)
        monkeypatch.setattr(drawing, "cpus", lambda: 1)
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *names: str) -> Answer:
        places = ["--results", str(self.results), "--out", str(self.out)]
        self._monkeypatch.setattr(sys, "argv", ["paper_figures", *names, *places])
        code = command.main()
        captured = self._capsys.readouterr()
        return Answer(code, captured.out, captured.err.splitlines())


def small_figure(rows: pd.DataFrame) -> Figure:
    with panels(rows, count=1, columns=1, height=1) as (figure, (axis,)):
        axis.plot(rows["value"].head())
    return figure


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    """Figures are drawn in a moment, and the overview's table too, for a tiny run lacks what it shows."""
    for name in FIGURES:
        monkeypatch.setattr(f"paper_figures.{name}.draw", small_figure)
    monkeypatch.setattr("paper_figures.overview.table", lambda rows: rows[["quantity", "value"]].head())
    return Commands(tmp_path, monkeypatch, capsys)


def test_every_figure_has_a_module() -> None:
    assert sorted(FIGURES) == sorted(["overview", *NAMES])
    assert all((HERE / f"{name}.py").is_file() for name in products.NAMES)


def test_without_names_everything_is_written(run: Commands) -> None:
    sources = [finished_run(run.results, name) for name in NAMES]
    answer = run()
    assert (answer.code, answer.errors) == (0, [])
    tables = {f"{name}.{kind}" for name in products.TABLES for kind in ("tex", "md", "csv", "json")}
    figures = {f"{name}.{kind}" for name in FIGURES for kind in KINDS}
    assert {file.name for file in run.out.iterdir()} == {
        "index.json",
        *tables,
        *figures,
        "numbers.tex",
        "numbers.json",
        "summary.md",
        "summary.json",
        "index.html",
    }
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
    assert answer.errors == [f"error: no figure or table 'zzz'; there are {', '.join(products.NAMES)}, page, wandb"]


def test_without_any_rows_each_figure_is_told_in_a_line(run: Commands) -> None:
    answer = run(*NAMES)
    assert answer.code == 1
    assert len(answer.errors) == len(NAMES)
    for name, line in zip(NAMES, answer.errors, strict=True):
        assert line.startswith(f"error: {name}: no finished run under {run.results}")
        assert f"python -m src.run experiment={name}" in line


def test_figures_with_rows_are_drawn_though_others_have_none(run: Commands) -> None:
    finished_run(run.results, NAMES[1])
    answer = run(*NAMES, "ledger")
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
    reference.with_suffix(".provenance.json").write_text("{}")
    answer = run(NAMES[0])
    assert answer.code == 0
    assert str(reference) in answer.out
    own = finished_run(run.results, NAMES[0])
    assert str(own) in run(NAMES[0]).out


def with_commit(rows: bytes, commit: str) -> pd.DataFrame:
    return pd.read_parquet(BytesIO(rows)).assign(commit=commit)


def test_rows_of_two_commits_are_refused_in_a_line_or_called_out(run: Commands) -> None:
    source = finished_run(run.results, NAMES[0])
    pd.concat([with_commit(parquet(NAMES[0]), letter * 40) for letter in "ab"]).to_parquet(source)
    answer = run(NAMES[0])
    assert (answer.code, len(answer.errors)) == (1, 1)
    assert f"{source}: its rows mix commits aaaaaaa, bbbbbbb" in answer.errors[0]
    assert "--mixed" in answer.errors[0]
    assert not run.out.exists()
    assert run(NAMES[0], "--mixed").code == 0
    assert "MIXED commits aaaaaaa, bbbbbbb" in (run.out / f"{NAMES[0]}.svg").read_text()
    assert json.loads((run.out / f"{NAMES[0]}.json").read_text())["command"].endswith("--mixed")


@pytest.mark.parametrize("column", ["data", "scale", "commit"])
def test_what_rows_of_one_figure_may_not_differ_in(column: str) -> None:
    (stamp,) = stamps_of(pd.read_parquet(BytesIO(parquet(NAMES[0]))).head(2))

    def mixed(**other: object) -> str:
        return mixture([stamp, {**stamp, **other}])

    assert mixed(root_seed=5, run="another") == ""
    assert "another" in mixed(**{column: "another"})
    assert "with changes" in mixed(dirty=True)


def test_the_overview_and_the_numbers_refuse_runs_that_are_not_alike(run: Commands) -> None:
    for name in NAMES:
        finished_run(run.results, name)
    other = run.results / "certificate/digits/smoke/seed0-a-run/rows.parquet"
    pd.read_parquet(other).assign(commit="another").to_parquet(other)
    answer = run("overview", "numbers", "ledger")
    assert [line.split(":")[1].strip() for line in answer.errors] == ["overview", "numbers"]
    assert all("mix commits 0000000, another" in line for line in answer.errors)
    assert {file.stem for file in run.out.iterdir()} == {"ledger"}


def test_rows_without_what_is_shown_are_told_in_a_line(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    source = finished_run(run.results, NAMES[0])
    monkeypatch.setattr(f"paper_figures.{NAMES[0]}.draw", lambda rows: rows["a column that no rows have"])
    answer = run(NAMES[0])
    assert (answer.code, len(answer.errors)) == (1, 1)
    assert f"{source}: partial, it lacks what is shown (KeyError" in answer.errors[0]


def test_rows_without_their_stamp_are_told_in_a_line(run: Commands) -> None:
    source = finished_run(run.results, NAMES[0])
    pd.read_parquet(source).drop(columns=["commit", "root_seed"]).to_parquet(source)
    answer = run(NAMES[0])
    assert f"{source}: partial, it lacks the columns commit, root_seed" in answer.errors[0]


def test_rows_and_verdicts_that_are_not_as_the_run_left_them_are_told_once(run: Commands) -> None:
    source = finished_run(run.results, NAMES[0])
    verdicts, provenance = source.with_name("verdicts.json"), source.with_name("provenance.json")
    files = {file: file.read_bytes() for file in (source, verdicts)}
    left = {**PROVENANCE, "sha256": {file.name: hashlib.sha256(content).hexdigest() for file, content in files.items()}}
    provenance.write_text(json.dumps(left))
    assert run(NAMES[0], "ledger").code == 0
    pd.read_parquet(source).iloc[::2].to_parquet(source)
    answer = run(NAMES[0], "ledger", "seeds", "published")
    assert (answer.code, answer.errors) == (1, [f"error: {NAMES[0]}: {source}: not as the run left it, by {provenance}; {AGAIN}"])
    source.write_bytes(files[source])
    verdicts.write_bytes(files[verdicts].replace(b"inside", b"outside"))
    answer = run(NAMES[0], "ledger")
    assert (answer.code, answer.errors) == (1, [f"error: ledger: {verdicts}: not as the run left it, by {provenance}; {AGAIN}"])


@pytest.mark.parametrize("column", ["data_requested", "scale", "root_seed", "run"])
def test_rows_of_another_run_than_their_folder_s_are_refused(run: Commands, column: str) -> None:
    source = finished_run(run.results, NAMES[0])
    rows = pd.read_parquet(source)
    rows.assign(**{column: 7 if column == "root_seed" else "another"}).to_parquet(source)
    answer = run(NAMES[0])
    assert (answer.code, len(answer.errors)) == (1, 1)
    assert f"{source}: rows of another run, {NAMES[0]}/" in answer.errors[0]


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("verdicts.json", "[]", f"not the verdicts of {NAMES[0]}"),
        ("verdicts.json", "null", "damaged"),
        ("status.json", "{", "damaged"),
        ("status.json", "[]", "damaged"),
        ("config.yaml", "{", "damaged"),
        ("provenance.json", '{"wall_time_s": 1.0}', "partial, it lacks what is shown (KeyError: 'training_seconds')"),
        ("provenance.json", "[]", "damaged"),
        ("provenance.json", '{"sha256": null}', "damaged"),
    ],
)
def test_whatever_file_of_a_run_is_damaged_is_told(run: Commands, file: str, content: str, told: str) -> None:
    (folder,) = {finished_run(run.results, NAMES[0]).parent}
    (folder / file).write_text(content)
    finished_run(run.results, NAMES[1])
    answer = run(*NAMES[:2], "ledger", "cost")
    assert (answer.code, len(answer.errors)) == (1, 1)
    assert str(folder) in answer.errors[0]
    assert told in answer.errors[0]
    assert (run.out / f"{NAMES[1]}.svg").exists()


def test_a_run_without_its_provenance_or_with_another_s_config_is_told(run: Commands) -> None:
    folder = finished_run(run.results, NAMES[0]).parent
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(to_plain(config(NAMES[1]))))
    answer = run(NAMES[0])
    assert (answer.code, len(answer.errors)) == (1, 1)
    assert f"{folder / 'config.yaml'}: the config of {NAMES[1]}, not of {NAMES[0]}" in answer.errors[0]
    (folder / "provenance.json").unlink()
    answer = run(NAMES[0], "ledger")
    assert (answer.code, len(answer.errors)) == (1, 1)
    assert f"{folder / 'provenance.json'}: missing or damaged" in answer.errors[0]


def test_reference_rows_that_are_gone_though_their_verdicts_are_there_are_told(run: Commands) -> None:
    source = finished_run(run.results, NAMES[0])
    source.with_name("verdicts.json").rename(run.reference / f"{NAMES[0]}.json")
    (source.parent / "status.json").write_text('{"status": "running"}')
    answer = run("ledger")
    assert (answer.code, answer.errors) == (1, [f"error: ledger: {run.reference / NAMES[0]}.parquet: not there"])


def test_a_results_folder_that_is_not_there_is_refused(run: Commands) -> None:
    run.results.rmdir()
    answer = run(NAMES[0])
    assert (answer.code, answer.errors) == (2, [f"error: --results {run.results}: no such folder"])


def test_damaged_verdicts_spoil_their_own_lines_of_the_ledger_alone(run: Commands) -> None:
    damaged = finished_run(run.results, NAMES[0]).parent / "verdicts.json"
    damaged.write_text("[{")
    finished_run(run.results, NAMES[1])
    answer = run("ledger")
    assert (answer.code, len(answer.errors)) == (1, 1)
    assert str(damaged) in answer.errors[0]
    lines = pd.read_csv(run.out / "ledger.csv")
    assert set(lines.loc[lines["claim"].str.startswith(f"{NAMES[0]}/"), "verdict"]) == {"not measured"}
    assert "not measured" not in set(lines.loc[lines["claim"].str.startswith(f"{NAMES[1]}/"), "verdict"])


def test_the_sidecar_tells_rows_config_code_and_command(run: Commands) -> None:
    source = finished_run(run.results, NAMES[0])
    run(NAMES[0])
    told = json.loads((run.out / f"{NAMES[0]}.json").read_text())
    assert told["command"].startswith(f"python -m paper_figures {NAMES[0]} --results ")
    assert told["code"] == code.commit()
    (rows,) = told["rows"]
    files = (source, *map(source.with_name, ("verdicts.json", "provenance.json")))
    assert rows["files"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert (rows["runs"][0]["run"], rows["runs"][0]["commit"], rows["config"], told["configs"]) == ("a-run", "0" * 40, None, {})
    for name, digest in told["files"].items():
        assert hashlib.sha256((run.out / name).read_bytes()).hexdigest() == digest
    assert set(told["files"]) == {f"{NAMES[0]}.{kind}" for kind in KINDS if kind != "json"}


def test_the_config_of_committed_rows_is_todays_where_its_hash_names_their_run() -> None:
    source = Shelf(Path("nowhere"), HERE / "reference").newest("wide_layers")
    assert hash_of(source.settings()) == source.stamps[0]["run"]
    source.stamps[0]["run"] = "another"
    assert source.settings() is None


def test_what_several_processes_draw_is_what_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of their own against this one, byte for byte: PDF, SVG, PNG, TeX and the sidecar."""
    names = ["chain_rule", "numbers"]
    shelf = Shelf(tmp_path, HERE / "reference")
    monkeypatch.setattr(drawing, "cpus", lambda: 2)
    assert drawing.draw_all(names, shelf, tmp_path / "two", mixed=False, page=False) == 0
    monkeypatch.setattr(drawing, "cpus", lambda: 1)
    assert drawing.draw_all(names, shelf, tmp_path / "one", mixed=False, page=False) == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert {f"chain_rule.{kind}" for kind in KINDS} | {"numbers.tex", "numbers.json"} == set(files)
    assert {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()} == files
