"""The README's commands, run as they stand but for the scale, the tracker and where they write."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paper_figures.products import FIGURES, TABLES
from paper_figures.summary import committed

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA_ROOT = os.environ.get("DATA_ROOT")
# ++, for several experiments may be swept, and none of them is chosen before
SMALL = ("scale=smoke", "++grid.seeds=2", "++grid.samples=2", "training.max_steps=2", "data.train_size=256", "data.test_size=100")
OFFLINE = ("tracker=none", "data.mirrors=[]", "data.fallback=digits")


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every `python -m src…` and `python -m paper_figures` of the README, without what follows a #."""
    parts = [part for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]
    lines = [shlex.split(part, comments=True) for part in parts]
    ours = [line for line in lines if line[:2] == ["python", "-m"] and line[2].split(".")[0] in ("src", "paper_figures")]
    return list({tuple(line): line for line in ours}.values())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One results folder for all commands: figures are drawn from what ran before them."""
    return tmp_path_factory.mktemp("results")


def within_the_test(command: list[str], results: Path, out: Path) -> list[str]:
    """The command with what keeps it small, off the network and out of the repository."""
    module = command[2]
    if module == "src.data":
        return [*command, "--root", str(DATA_ROOT)]
    if module == "src.sweep":
        (sweep, *_) = (results / ".sweep").iterdir()
        return [argument.replace("SWEEP", str(sweep)) for argument in command]
    if module == "src.certify":
        return [*command, "--data", "digits", "--samples", "1"]
    if module == "paper_figures":
        return [*command, "--results", str(results), "--out", str(out)]
    command = [argument for argument in command if not argument.startswith("scale=")]
    if not any(argument.startswith("experiment=") for argument in command):
        return command
    if any(argument.startswith("cluster=") for argument in command):
        command = ["cluster=local" if argument.startswith("cluster=") else re.sub(r"range\(\d+\)", "0", argument) for argument in command]
        return [*command, f"results_dir={results}", *SMALL, "data=digits", "tracker=none"]
    # no axis is every experiment's own
    small = ("scale=smoke", "data=digits") if "experiment=glob(*)" in command else SMALL
    return [*command, f"results_dir={results}", *small, *OFFLINE]


def answer(arguments: list[str], code: int = 0) -> str:
    """What a command prints; it must succeed, or exit with the code expected of it."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_are_found() -> None:
    modules = [command[2] for command in commands()]
    assert {"src.run", "src.data", "src.certify", "src.sweep", "paper_figures"} == set(modules)
    assert not any("#" in argument for command in commands() for argument in command)
    mentioned = [part for line in README.splitlines() if re.match(r"python -m (src|paper_figures)", line) for part in line.split("&&")]
    assert len({part.split("#")[0].strip() for part in mentioned}) == len(modules)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_runs(command: list[str], results: Path, tmp_path: Path) -> None:
    if command[2] == "src.data" and not DATA_ROOT:
        pytest.skip("DATA_ROOT is not set: fetching would download")
    if {"data=cifar10", "cifar10"} & set(command) and not (DATA_ROOT and (Path(DATA_ROOT) / "cifar-10-batches-py").is_dir()):
        pytest.skip("no CIFAR-10 under DATA_ROOT: fetching would download")
    if "--check" in command:  # after smoke runs on the digits there is nothing to compare the reference with
        told = answer(within_the_test(command, results, tmp_path)[1:], code=2)
        assert "other data set and scale: runs on digits at smoke, reference on cifar10 at quick, mnist at quick; not compared" in told
        return
    printed = answer(within_the_test(command, results, tmp_path)[1:])
    assert printed.strip()
    if command[2] == "paper_figures":
        names = command[3:]
        table = ("tex", "md", "csv", "json")
        kinds = {name: table if name in TABLES else ("pdf", "svg", "png", *table) for name in names}
        assert {file.name for file in tmp_path.iterdir()} == {f"{name}.{kind}" for name in names for kind in kinds[name]}
        assert all(str(file) in printed for file in tmp_path.iterdir())


def test_every_experiment_ends_in_verdicts(results: Path) -> None:
    """After the sweep over all of them."""
    done = {folder.parent.parent.parent.name for folder in results.glob("*/digits/smoke/*") if (folder / "verdicts.json").is_file()}
    assert done >= {file.stem for file in (ROOT / "conf/experiment").glob("*.yaml")}


@pytest.mark.parametrize(("place", "told"), [(0, "skip depth"), (1, "index")])
def test_the_python_blocks_run(place: int, told: str) -> None:
    assert len(blocks("python")) == 2
    assert told in answer(["-c", blocks("python")[place]])


def test_every_experiment_and_figure_stands_in_the_readme() -> None:
    for file in (ROOT / "conf/experiment").glob("*.yaml"):
        assert f"`experiment={file.stem}`" in README
    for name in (*FIGURES, *TABLES, "numbers"):
        assert f"| `python -m paper_figures {name}` | `paper_figures/{name}.py` |" in README


def test_the_ledger_of_the_readme_is_that_of_the_committed_rows() -> None:
    assert committed() in README, "write what `python -m paper_figures summary` makes between the marks"


def test_every_figure_is_in_the_gallery_and_linked_and_all_are_small() -> None:
    pictures = re.findall(r"\]\(([^)]+\.png)\)", README)
    gallery = [ROOT / f"paper_figures/gallery/{name}.png" for name in FIGURES]
    assert set(pictures) == {file.relative_to(ROOT).as_posix() for file in gallery}
    assert sum(file.stat().st_size for file in gallery) < 5e6


@pytest.mark.parametrize("name", FIGURES)
def test_the_gallery_shows_the_committed_rows(name: str) -> None:
    gallery = ROOT / "paper_figures/gallery"
    sidecar = json.loads((gallery / f"{name}.json").read_text())
    assert sidecar["files"][f"{name}.png"] == hashlib.sha256((gallery / f"{name}.png").read_bytes()).hexdigest()
    for run in sidecar["rows"]:
        for file, digest in run["files"].items():
            assert hashlib.sha256((ROOT / file).read_bytes()).hexdigest() == digest
