"""Which rows are drawn: the newest finished run of an experiment, else the committed ones; and whether they may stand in one figure."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from yaml import YAMLError

from src import rows as row_table
from src.config import Config, register_resolvers
from src.errors import UserError
from src.results import decisive, from_plain, run_hash
from src.run import CONF, check
from src.verdict import Verdict

HERE = Path(__file__).parent
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
# what every row says of its run
STAMP = {"data", "data_requested", "fallback", "train_images", "test_images", "scale", "root_seed", "run", "commit", "dirty"}
# what the rows of one figure must have in common
COMMON = {"commit": "commits", "data": "data sets", "scale": "scales"}


@dataclass(frozen=True)
class Source:
    """The files of one run: of its folder, or committed.

    Attributes:
        experiment: its name.
        rows: and verdicts, provenance, config: its files; the config of committed rows is no file.
    """

    experiment: str
    rows: Path
    verdicts: Path
    provenance: Path
    config: Path | None

    def read(self) -> pd.DataFrame:
        """Its rows.

        Raises: UserError when the file is missing, damaged, or holds none or another experiment's.
        """
        rows = row_table.read(self.rows)
        if missing := STAMP - set(rows.columns):
            raise UserError(
                f"{self.rows}: partial, it lacks the columns {', '.join(sorted(missing))}; run the experiment again with force=true"
            )
        if set(rows["experiment"]) != {self.experiment}:
            raise UserError(
                f"{self.rows}: not the rows of {self.experiment}; run python -m src.run experiment={self.experiment} with force=true"
            )
        return rows

    def judged(self) -> list[Verdict]:
        """Its verdicts.

        Raises: UserError when the file is missing or damaged.
        """
        try:
            return [Verdict.of(entry) for entry in json.loads(self.verdicts.read_bytes())]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.verdicts}: missing or damaged; run the experiment again with force=true") from error

    def told(self) -> dict[str, Any] | None:
        """Its provenance; None where there is none.

        Raises: UserError when the file is damaged.
        """
        try:
            return json.loads(self.provenance.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.provenance}: damaged; run the experiment again with force=true") from error

    def settings(self, rows: pd.DataFrame) -> Any:
        """What decided its numbers; of committed rows today's config, if its hash names their run. None where that isn't known."""
        try:
            config = (
                _composed(*rows[["experiment", "data_requested", "scale", "root_seed"]].iloc[0])
                if self.config is None
                else from_plain(OmegaConf.to_container(OmegaConf.load(self.config)))
            )
        except (OSError, ValueError, YAMLError, UserError):
            return None
        known = self.config is not None or run_hash(config) == rows["run"].iloc[0]
        return decisive(config) if known else None

    @property
    def sha256(self) -> str:
        """Of its rows."""
        return hashlib.sha256(self.rows.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Shelf:
    """Where rows are looked for: a results folder, and the committed ones."""

    results: Path
    reference: Path

    def newest(self, experiment: str) -> Source:
        """The newest finished run of an experiment, else the committed rows.

        Raises: UserError when there are neither.
        """
        runs = row_table.finished_runs(self.results, experiment)
        committed = self.committed(experiment)
        if not runs and not committed.rows.exists():
            raise UserError(f"no finished run under {self.results} and no reference rows; run python -m src.run experiment={experiment}")
        return of_folder(runs[-1]) if runs else committed

    def each(self, experiment: str) -> list[Source]:
        """The newest finished run of an experiment on each data set, else the committed rows, else nothing."""
        newest = {folder.parts[-3]: folder for folder in row_table.finished_runs(self.results, experiment)}
        committed = self.committed(experiment)
        return [of_folder(folder) for _, folder in sorted(newest.items())] or ([committed] if committed.rows.exists() else [])

    def every(self, experiment: str) -> list[Source]:
        """All finished runs of an experiment, oldest first, else the committed rows, else nothing."""
        committed = self.committed(experiment)
        runs = [of_folder(folder) for folder in row_table.finished_runs(self.results, experiment)]
        return runs or ([committed] if committed.rows.exists() else [])

    def committed(self, experiment: str) -> Source:
        """The committed rows of an experiment, be they there or not."""
        rows, verdicts, provenance = (self.reference / f"{experiment}.{kind}" for kind in ("parquet", "json", "provenance.json"))
        return Source(experiment, rows, verdicts, provenance, None)


def of_folder(folder: Path) -> Source:
    """The files of a run folder."""
    return Source(folder.parts[-4], *(folder / name for name in ("rows.parquet", "verdicts.json", "provenance.json", "config.yaml")))


def mixture(tables: Sequence[pd.DataFrame]) -> str:
    """What the rows of one figure differ in though they should not: "" where they have one commit, data set and scale."""
    told = []
    for column, name in COMMON.items():
        found = sorted({_label(at) for rows in tables for at in rows[[column, "dirty"]].drop_duplicates().to_dict("records")})
        if len(found) > 1:
            told.append(f"{name} {', '.join(found)}")
    return " and ".join(told)


def require_one(tables: Sequence[pd.DataFrame], mixed: bool) -> None:
    """Raise UserError when rows mix commits, data sets or scales, unless that is asked for."""
    if (told := mixture(tables)) and not mixed:
        raise UserError(f"its rows mix {told}; run them alike, or add --mixed to have it drawn and said so")


def _label(at: dict[Any, Any]) -> str:
    if "commit" not in at:
        return str(next(iter(at.values())))
    return f"{at['commit'][:7]}{' with changes' if at['dirty'] else ''}"


@cache
def _composed(experiment: str, data: str, scale: str, seed: int) -> Config:
    """The config that an experiment has today."""
    # Hydra is loaded by what needs it alone
    from hydra import compose, initialize_config_dir

    register_resolvers()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return check(compose("config", overrides=[f"experiment={experiment}", f"data={data}", f"scale={scale}", f"seed={seed}"]))
