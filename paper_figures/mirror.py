"""`wandb`: the tables rebuilt from W&B's offline runs alone, and held against those of the run folders.

An offline run keeps the verdicts as a table, the run folder as an artifact (its manifest with the MD5 of every file, the files themselves
in W&B's staging folder, beside the offline runs, until they are synced), and the config. Of these the ledger's lines, the experiment's
table and the cost are made again, and all else that was logged is looked for. Where an interrupted run left several offline runs of one
id, the last counts, as it does after `wandb sync`.
"""

import ast
import base64
import hashlib
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from paper_figures import cost
from paper_figures.ledger import lines_of, measured
from paper_figures.sidecar import Product, tabular, write
from paper_figures.sources import FILES, Source, lacking, of_folder
from src import code
from src.errors import UserError
from src.results import read_status, sha256
from src.verdict import Verdict


@dataclass(frozen=True)
class Mirrored:
    """A finished run as W&B holds it.

    Attributes:
        place: the offline run.
        folder: the run folder that it mirrors, below the results folder.
        source: W&B's own copies of the files of that folder.
        verdicts: as logged in the table.
    """

    place: Path
    folder: Path
    source: Source
    verdicts: list[Verdict]


def show_mirror(results: Path, out: Path) -> int:
    """Compare every offline run with its run folder, a line each, and write the ledger that W&B holds; return the exit code.

    Raises: UserError when there are no offline runs.
    """
    places = sorted((results / "wandb").glob("offline-run-*-*"))
    if not places:
        raise UserError(f"no offline runs under {results / 'wandb'}; a run leaves one with tracker=offline")
    newest = {place.name.split("-", 3)[3]: place for place in places}  # the last of each id
    failed, lines, sources = False, [], []
    for run, place in newest.items():
        try:
            with lacking(place):
                mirrored = mirrored_run(place, results)
                lines += measured(mirrored.source.stamps[0], mirrored.verdicts)
                sources.append(mirrored.source)
                differing = differences(mirrored)
        except (UserError, OSError) as error:
            if not any(read_status(folder) == "done" for folder in results.glob(f"*/*/*/seed*-{run}*")):
                print(f"{place}: unfinished, left out")
                continue
            failed = True
            print(f"error: {error}", file=sys.stderr)
            continue
        failed |= bool(differing)
        told = f"differs in {', '.join(differing)}" if differing else "its tables are those of the run folder"
        print(f"{place}: {told} ({mirrored.folder})", file=sys.stderr if differing else sys.stdout)
    for folder in unmirrored(results, newest):
        failed = True
        print(f"error: {folder}: finished with tracker=offline, but W&B has no run of it", file=sys.stderr)
    if lines:
        for file in write("wandb", Product(tabular(pd.DataFrame(lines)), sources), out, "python -m paper_figures wandb", code.commit()):
            print(file)
    return 1 if failed else 0


def mirrored_run(place: Path, results: Path) -> Mirrored:
    """What W&B holds of one run.

    Raises: UserError naming what is missing or damaged.
    """
    records = list(_records(place))
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact" and record["artifact"]["type"] == "run-folder"]
    if not artifacts:
        raise UserError(f"{place}: holds no run folder; the run was killed before it could be logged")
    for record in records:
        _refuse_lost(place, record.get("history", {}).get("item", {}))
    run = next(record["run"] for record in records if record["type"] == "run")
    config = run["config"]["update"]
    held = {entry["path"]: entry for entry in artifacts[-1]["manifest"]["contents"]}
    experiment = config["claim"]["name"]
    folder = results / experiment / config["data"]["name"] / config["scale"]["name"] / f"seed{int(config['seed'])}-{run['run_id']}"
    if not folder.exists():  # the id of a fallback run tells its data set only in the folder's name
        folder = next(iter(folder.parent.glob(f"{folder.name}*")), folder)
    source = Source(experiment, *(_copy(place, held, name) for name in FILES))
    return Mirrored(place, folder, source, _verdicts(place))


def differences(mirrored: Mirrored) -> list[str]:
    """What of a run folder is not as W&B holds it: files, the ledger's lines, the experiment's table, the cost."""
    own = of_folder(mirrored.folder)
    if not own.rows.exists():
        return [f"a run folder that is not there: {mirrored.folder}"]
    table = importlib.import_module(f"paper_figures.{own.experiment}").table
    pairs = {
        "the ledger": (measured(mirrored.source.stamps[0], mirrored.verdicts), lines_of(own)),
        "its table": (tabular(table(mirrored.source.read())), tabular(table(own.read()))),
        "the cost": (cost.line(mirrored.source), cost.line(own)),
    }
    files = [name for name in FILES if _md5(_file(own, name)) != _md5(_file(mirrored.source, name))]
    return [*files, *(what for what, (one, other) in pairs.items() if one != other)]


def unmirrored(results: Path, ids: Mapping[str, Path]) -> Iterator[Path]:
    """Finished run folders that should have an offline run, by their config, and have none."""
    for status in sorted(results.glob("*/*/*/seed*/status.json")):
        folder = status.parent
        known = any(folder.name.partition("-")[2].startswith(run) for run in ids)
        if read_status(folder) == "done" and not known and "mode: offline" in _text(folder / "config.yaml"):
            yield folder


def _records(place: Path) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "corrupt" in done.stderr:
        raise UserError(f"{place}: W&B can't read it ({' '.join(done.stderr.split()[-12:])})")
    try:
        yield from map(json.loads, done.stdout.splitlines())
    except ValueError as error:
        raise UserError(f"{place}: damaged") from error


def _refuse_lost(place: Path, logged: Mapping[str, Any]) -> None:
    """Refuse tables and images, logged with their sha256 under NAME.sha256 and NAME.path, that are not there as they were."""
    for key in logged:
        if key.endswith(".sha256"):
            file = place / "files" / logged[f"{key.removesuffix('sha256')}path"]
            if not file.is_file() or sha256(file) != logged[key]:
                raise UserError(f"{file}: was logged, but is missing or damaged")


def _copy(place: Path, held: Mapping[str, Mapping[str, str]], name: str) -> Path:
    """W&B's own copy of a file of the run folder, checked against its digest."""
    if name not in held:
        raise UserError(f"{place}: its artifact lacks {name}")
    staged = Path(held[name].get("local_path", ""))
    # beside the offline runs, wherever these were moved to
    beside = place.parent / "artifacts/staging" / staged.name
    copy = beside if beside.is_file() else staged
    if not copy.is_file():
        raise UserError(f"{place}: {name} is no longer in W&B's staging folder (synced, or cleaned)")
    if _md5(copy) != held[name]["digest"]:
        raise UserError(f"{place}: {name}, W&B's copy in {copy} is damaged")
    return copy


def _verdicts(place: Path) -> list[Verdict]:
    """The verdicts as they were logged in a table."""
    files = sorted((place / "files/media/table").glob("verdicts_*.table.json"))
    if not files:
        raise UserError(f"{place}: has no table of verdicts")
    table = json.loads(files[-1].read_bytes())
    return [_verdict(dict(zip(table["columns"], values, strict=True))) for values in table["data"]]


def _verdict(entry: Mapping[str, Any]) -> Verdict:
    """A verdict from a line of the table, where NaN stands for what is not there."""
    there = {column: None if isinstance(value, float) and math.isnan(value) else value for column, value in entry.items()}
    return Verdict.of({**there, "interval": ast.literal_eval(str(there["interval"]))})


def _file(source: Source, name: str) -> Path:
    return dict(zip(FILES, (source.rows, source.verdicts, source.provenance, source.config), strict=True))[name] or Path()


def _md5(file: Path) -> str:
    return base64.b64encode(hashlib.md5(file.read_bytes(), usedforsecurity=False).digest()).decode()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
