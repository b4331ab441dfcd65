"""One real experiment, cut down, mirrored offline: what W&B is told, and what it must never be told."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from torch import nn

from paper_figures.mirror import show_mirror
from src import checkpoint
from src import rows as row_table
from src.errors import UserError
from src.experiment import Context
from src.rows import Row
from src.trainings import Trainee, train_all
from tests.conftest import ROOT, CommandLine
from tests.tiny import Tiny

CANARY = "0123456789abcdef" * 2 + "deadbeef"
SMALL = (
    *("experiment=vanishing_products", "scale=smoke", "data=mnist", "data.mirrors=[]", "tracker=offline", "seed=4"),
    *("model.width=16", "grid.seeds=2", "grid.samples=2", "grid.depths=[2,4]", "grid.rate_depth=6", "grid.weight_vars=[1.3,1.7]"),
    *("grid.train_depths=[4,8]", "grid.train_weight_vars=[1.3]", "training.max_steps=4"),
)


@dataclass(frozen=True)
class Mirrored:
    """A finished run and what W&B holds of it."""

    place: Path
    done: subprocess.CompletedProcess[str]
    connections: int
    mirror: Path | None = None

    @property
    def folder(self) -> Path:
        (folder,) = (self.place / "results/vanishing_products/mnist/smoke").glob("seed*")
        return folder

    @property
    def run(self) -> Path:
        if self.mirror:
            return self.mirror
        (run,) = (self.place / "results/wandb").glob("offline-run-*")
        return run

    def inspect(self, *options: str) -> str:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(self.run)]
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=True).stdout

    def environment(self) -> dict[str, str]:
        folders = {f"WANDB_{name}_DIR": str(self.place / "wandb" / name.lower()) for name in ("CACHE", "CONFIG")}
        return {**os.environ, **folders, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": CANARY}


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirrored]:
    """Run it in a process of its own, behind a proxy that only counts who calls."""
    place = tmp_path_factory.mktemp("mirrored")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = {name: url for variable in ("http_proxy", "https_proxy", "all_proxy") for name in (variable, variable.upper())}
        environment = {**Mirrored.environment(Mirrored(place, None, 0)), **proxies}  # type: ignore[arg-type]
        environment["WANDB_SERVICE"] = "3-1-unix-/gone"  # as a process that has a run of its own hands it down
        command = [sys.executable, "-m", "src.run", *SMALL, f"data.root={place}/none"]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        connections = 0
        proxy.setblocking(False)
        while True:
            try:
                proxy.accept()[0].close()
                connections += 1
            except BlockingIOError:
                break
        yield Mirrored(place, done, connections)


@pytest.fixture(scope="module")
def summary(mirrored: Mirrored) -> dict[str, Any]:
    return json.loads(mirrored.inspect("--summary"))


@pytest.fixture(scope="module")
def records(mirrored: Mirrored) -> list[dict[str, Any]]:
    return [json.loads(line) for line in mirrored.inspect().splitlines()]


def test_offline_means_offline(mirrored: Mirrored) -> None:
    assert mirrored.connections == 0


def test_the_terminal_shows_the_run_and_nothing_of_wandb(mirrored: Mirrored) -> None:
    assert "wandb" not in (mirrored.done.stdout + mirrored.done.stderr).replace(str(mirrored.place), "")
    assert "Warning:" not in mirrored.done.stderr
    assert "Traceback" not in mirrored.done.stderr
    assert "FALLBACK" in mirrored.done.stderr


def test_the_api_key_is_nowhere(mirrored: Mirrored) -> None:
    files = [path for path in mirrored.place.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in mirrored.done.stdout + mirrored.done.stderr


def test_name_id_group_and_job_type(mirrored: Mirrored, records: list[dict[str, Any]]) -> None:
    run = next(record["run"] for record in records if record["type"] == "run")
    identity = mirrored.folder.name.removeprefix("seed4-")
    assert run["run_id"] == run["display_name"] == identity
    assert run["run_group"] == "vanishing_products"
    assert run["job_type"] == "Step 2: Vanishing Gradients"
    assert run["project"] == "backlock"


def test_the_config(summary: dict[str, Any]) -> None:
    config = summary["config"]
    assert config["seed"] == 4
    assert config["model"]["width"] == 16
    assert config["claim"]["name"] == "vanishing_products"
    assert config["grid"]["depths"] == [2, 4]


def test_the_summary_of_certificates(summary: dict[str, Any]) -> None:
    names = ("log_attenuation", "rank", "conditioning", "skip_depth", "depth")
    K = {name: summary["summary"][f"certificate/tanh 1.3/{name}"] for name in names}
    assert K["skip_depth"] == K["depth"] == 3  # weight layers between the loss and H_1 in the deepest nets
    assert K["rank"] >= 1
    assert summary["state"] == "finished"


def tables(mirrored: Mirrored, name: str) -> list[pd.DataFrame]:
    files = sorted((mirrored.run / "files/media/table").rglob(f"{name}_*.table.json"))
    contents = [json.loads(file.read_text()) for file in files]
    return [pd.DataFrame(content["data"], columns=content["columns"]) for content in contents]


def test_tables_of_layers_and_of_verdicts(mirrored: Mirrored) -> None:
    (verdicts,) = tables(mirrored, "verdicts")
    told = json.loads((mirrored.folder / "verdicts.json").read_text())
    assert verdicts["claim"].tolist() == [verdict["claim"] for verdict in told]
    assert verdicts["verdict"].tolist() == [verdict["verdict"] for verdict in told]
    layers = tables(mirrored, "layers")
    assert layers
    for table in layers:
        assert {"sample", "stage", "norm", "rank", "cond", "error_norm", "grad_norm"} <= set(table)
        assert len(table) == 2 * 4  # samples × stages of the deepest nets


def compared(mirrored: Mirrored, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    for name, value in mirrored.environment().items():
        if name.startswith("WANDB_"):
            monkeypatch.setenv(name, value)
    return show_mirror(mirrored.place / "results", out)


def test_the_tables_made_from_the_mirror_alone_are_those_of_the_run_folder(
    mirrored: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(mirrored, tmp_path, monkeypatch) == 0
    assert "its tables are those of the run folder" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "wandb.csv")["claim"].str.startswith("vanishing_products/").all()


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("verdicts.json", lambda text: text.replace(b'"n": 2', b'"n": 3', 1), "verdicts.json: not as the run left it"),
        ("provenance.json", lambda text: text.replace(b'"wall_time_s": ', b'"wall_time_s": 9'), "differs in provenance.json, the cost"),
        ("rows.parquet", lambda content: content[:100], "damaged"),
    ],
)
def test_a_run_folder_that_differs_from_its_mirror_is_told(
    mirrored: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, change, told: str
) -> None:
    file = mirrored.folder / name
    before = file.read_bytes()
    file.write_bytes(change(before))
    try:
        assert file.read_bytes() != before
        assert compared(mirrored, tmp_path, monkeypatch) == 1
    finally:
        file.write_bytes(before)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "change", "told"),
    [
        ("*.wandb", lambda content: content[: len(content) // 2], "holds no run folder"),
        ("*.wandb", lambda content: content[:-3000] + bytes(200) + content[-2800:], "can't read it"),
        ("files/media/table/certificate/*/*.table.json", lambda content: b"", "was logged, but is missing or damaged"),
        ("files/media/images/figure_*.png", lambda content: content + b"0", "was logged, but is missing or damaged"),
        ("files/media/table/verdicts_*.table.json", lambda content: content[:40], "verdicts"),
    ],
)
def test_a_damaged_mirror_of_a_finished_run_is_told(
    mirrored: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pattern: str, change, told: str
) -> None:
    file = next(mirrored.run.glob(pattern))
    before = file.read_bytes()
    file.write_bytes(change(before))
    try:
        assert compared(mirrored, tmp_path, monkeypatch) == 1
    finally:
        file.write_bytes(before)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {mirrored.run}")
    assert told in line


def test_a_results_folder_may_be_moved(
    mirrored: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (mirrored.place / "results").rename(mirrored.place / "moved")
    try:
        assert show_mirror(mirrored.place / "moved", tmp_path) == 0
    finally:
        (mirrored.place / "moved").rename(mirrored.place / "results")
    assert "its tables are those of the run folder" in capsys.readouterr().out


def test_a_finished_run_without_its_mirror_is_told(
    mirrored: Mirrored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = mirrored.folder.with_name("seed5-lost")
    shutil.copytree(mirrored.folder, lost)
    try:
        assert compared(mirrored, tmp_path, monkeypatch) == 1
    finally:
        shutil.rmtree(lost)
    assert f"{lost}: finished with tracker=offline, but W&B has no run of it" in capsys.readouterr().err


def test_without_offline_runs_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no offline runs"):
        show_mirror(tmp_path, tmp_path)


def history(records: list[dict[str, Any]]) -> set[str]:
    """Every key that was logged while running."""
    return {key for record in records if record["type"] == "history" for key in record["history"]["item"]}


def test_histograms_curves_figure(records: list[dict[str, Any]], mirrored: Mirrored) -> None:
    keys = history(records)
    layers = {"layer1", "layer2", "layer3", "readout"}
    assert {f"certificate/tanh 1.3/singular_values/{layer}.bins" for layer in layers} <= keys
    assert {f"curves/depth 8, weight_var 1.3, seed 0/{curve}" for curve in ("step", "train_loss", "test_accuracy")} <= keys
    assert "figure.path" in keys
    (image,) = (mirrored.run / "files/media/images").glob("figure_*.png")
    assert image.read_bytes() == (mirrored.folder / "figure.png").read_bytes()


def test_the_run_folder_is_an_artifact_and_complete(records: list[dict[str, Any]], mirrored: Mirrored) -> None:
    (artifact,) = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "run-folder"]
    names = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert names == {file.name for file in mirrored.folder.iterdir()}
    sizes = {entry["path"]: int(entry["size"]) for entry in artifact["manifest"]["contents"]}
    assert sizes == {file.name: file.stat().st_size for file in mirrored.folder.iterdir()}


def test_wandb_that_cannot_be_had_is_one_line(start: CommandLine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def unreachable(**_: object) -> None:
        raise wandb.errors.CommError("no route to host,\nover two lines")

    monkeypatch.setattr(wandb, "init", unreachable)
    answer = start("tracker.mode=online")
    assert answer.code == 2
    assert answer.error.startswith("tracker=online: Weights & Biases can't be had (no route to host, over two lines); use tracker=offline")
    assert tiny.calls == []


def test_a_mirror_that_breaks_leaves_the_run_finished(start: CommandLine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    exits: list[int] = []
    run = SimpleNamespace(log=full, finish=lambda exit_code: exits.append(exit_code))
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    answer = start("tracker.mode=offline")
    assert answer.code == 2
    assert "finished, but Weights & Biases can't take it ([Errno 28] No space left on device)" in answer.error
    assert exits == [1]
    assert "already finished" in start().out


def test_a_fallback_is_called_out_in_the_figure(mirrored: Mirrored) -> None:
    rows = row_table.read(mirrored.folder / "rows.parquet")
    assert rows["fallback"].all()
    figure = import_module("paper_figures.vanishing_products").draw(rows)
    assert figure.get_supxlabel().startswith("FALLBACK: measured on digits in place of mnist")


def test_a_run_that_goes_on_has_a_second_mirror_complete_in_itself(cli: CommandLine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have the run's id; `wandb sync` in the order of their times leaves the complete one."""

    def part(name: str, interrupted: bool) -> Callable[[Context], Iterator[Row]]:
        def rows(context: Context) -> Iterator[Row]:
            train_all(context, [Trainee(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), name, 0)])
            if interrupted and len(tiny.calls) == 1:
                raise KeyboardInterrupt
            yield {"quantity": "number", "value": 0.1, "sample": name}

        return rows

    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    tiny.measures(lambda context: context.rows(part("first", False), part("second", True), part("third", False)))
    assert cli("experiment=tiny", "tracker=offline").code == 130
    assert cli("experiment=tiny", "tracker=offline").code == 0
    (folder,) = Path("results/tiny/digits/smoke").glob("seed*")
    both = [Mirrored(Path.cwd(), None, 0, run).inspect() for run in sorted(Path("results/wandb").glob("offline-run-*"))]  # type: ignore[arg-type]
    told = [[json.loads(line) for line in lines.splitlines()] for lines in both]
    assert [next(record["run"]["run_id"] for record in records if record["type"] == "run") for records in told] == [folder.name[6:]] * 2
    first, second = map(history, told)
    curves = {name: f"curves/{name}/test_accuracy" for name in ("first", "second", "third")}
    assert curves["third"] not in first
    assert set(curves.values()) | {"figure.path"} <= second
