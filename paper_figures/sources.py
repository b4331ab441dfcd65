"""Which rows are drawn: the newest finished run of an experiment, else the committed ones; and whether they may stand in one figure."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
from pydantic import TypeAdapter

from src import rows as row_table
from src.collect import code_of, distinct
from src.config import Config, register_resolvers
from src.errors import UserError
from src.results import AGAIN, decisive, hash_of, read_config, read_status, refuse_changed
from src.run import CONF, check
from src.verdict import Verdict

HERE = Path(__file__).parent
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
# of a run folder
FILES = ("rows.parquet", "verdicts.json", "provenance.json", "config.yaml")
# what every row says of its run
STAMP = {"data", "data_requested", "fallback", "train_images", "test_images", "scale", "root_seed", "run", "commit", "dirty"}
# what the rows of one figure must have in common
COMMON = {"commit": "commits", "data": "data sets", "scale": "scales"}
Stamp = dict[Any, Any]
Taken = TypeVar("Taken")
VERDICTS, PROVENANCE = TypeAdapter(list[Verdict]), TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Source:
    """The files of one run: of its folder, or committed.

    Attributes:
        experiment: its name.
        rows: and verdicts, provenance, config: its files; the config of committed rows is no file.
        folder: the run folder; None of committed rows, or of copies.
    """

    experiment: str
    rows: Path
    verdicts: Path
    provenance: Path
    config: Path | None = None
    folder: Path | None = None

    @cached_property
    def stamps(self) -> list[Stamp]:
        """What its rows say of their run: one stamp, but where the rows of several runs were put together.

        Raises: UserError when they are not those that the run left.
        """
        return self._own(distinct(self.rows, ("experiment", "paper", *sorted(STAMP))))

    def read(self) -> pd.DataFrame:
        """Its rows.

        Raises: UserError when they are not those that the run left.
        """
        rows = row_table.read(self.rows)
        self._own(stamps_of(rows))
        return rows

    def _own(self, stamps: list[Stamp]) -> list[Stamp]:
        """The stamps of its rows.

        Raises: UserError when the file is missing, damaged, not as the run left it, or holds none or those of another experiment or run.
        """
        if self.folder and read_status(self.folder) is None:
            raise UserError(f"{self.folder / 'status.json'}: damaged; {AGAIN}")
        if stamps and (missing := {"experiment", *STAMP} - set(stamps[0])):
            raise UserError(f"{self.rows}: partial, it lacks the columns {', '.join(sorted(missing))}; {AGAIN}")
        if any(pd.isna(stamp[column]) for stamp in stamps for column in STAMP):
            raise UserError(f"{self.rows}: partial, some rows don't say what they are of; {AGAIN}")
        if {stamp["experiment"] for stamp in stamps} != {self.experiment}:
            told = f"not the rows of {self.experiment}" if stamps else "it holds no rows"
            raise UserError(f"{self.rows}: {told}; run python -m src.run experiment={self.experiment} with force=true")
        if self.folder and (foreign := set(map(_place, stamps)) - {_place_of(self.folder)}):
            raise UserError(f"{self.rows}: rows of another run, {', '.join(sorted(foreign))}; {AGAIN}")
        refuse_changed(self.rows, FILES[0], self.provenance)
        return stamps

    def judged(self) -> list[Verdict]:
        """Its verdicts.

        Raises: UserError when the file is missing, damaged, not as the run left it, or of another experiment.
        """
        try:
            verdicts = VERDICTS.validate_json(self.verdicts.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.verdicts}: missing or damaged; {AGAIN}") from error
        if {verdict.claim.partition("/")[0] for verdict in verdicts} != {self.experiment}:
            raise UserError(f"{self.verdicts}: not the verdicts of {self.experiment}; {AGAIN}")
        refuse_changed(self.verdicts, FILES[1], self.provenance)
        return verdicts

    def told(self) -> dict[str, Any]:
        """Its provenance.

        Raises: UserError when the file is missing or damaged.
        """
        try:
            return PROVENANCE.validate_json(self.provenance.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.provenance}: missing or damaged; {AGAIN}") from error

    def settings(self) -> Any:
        """What decided its numbers; of committed rows today's config. None where there is none whose hash names their run.

        Raises: UserError when its own config is damaged or another experiment's.
        """
        try:
            config = todays_config(self.stamps[0]) if self.config is None else read_config(self.config)
        except (UserError, FileNotFoundError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config}: damaged; {AGAIN}") from error
        if config.claim.name != self.experiment:
            raise UserError(f"{self.config}: the config of {config.claim.name}, not of {self.experiment}; {AGAIN}")
        settings = decisive(config)
        return settings if self.stamps[0]["run"].startswith(hash_of(settings)) else None

    @property
    def files(self) -> list[Path]:
        """Those of its files that are there."""
        return [file for file in (self.rows, self.verdicts, self.provenance, self.config) if file and file.exists()]


@dataclass(frozen=True)
class Gathered(Generic[Taken]):
    """What was taken from many runs.

    Attributes:
        taken: of each run in turn.
        sources: the runs.
        complaints: a line for each that could not be read.
    """

    taken: list[Taken]
    sources: list[Source]
    complaints: list[str]


def gather(names: Iterable[str], find: Callable[[str], Iterable[Source]], take: Callable[[Source], Taken]) -> Gathered[Taken]:
    """Take something from the runs of many experiments; what is missing, damaged, partial or mixed is told, and left out.

    Args:
        names: of the experiments.
        find: the runs of one.
        take: what is taken from a run.
    """
    gathered: Gathered[Taken] = Gathered([], [], [])
    for name in names:
        with _complaining(gathered.complaints):
            for source in find(name):
                with _complaining(gathered.complaints):
                    require_one(source.stamps, str(source.rows))
                    with lacking(source.rows):
                        gathered.taken.append(take(source))
                    gathered.sources.append(source)
    return gathered


@contextmanager
def _complaining(complaints: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        complaints.append(str(error))


@contextmanager
def lacking(*files: Path) -> Iterator[None]:
    """Raise UserError naming the files, where what is made of them finds that they lack something."""
    try:
        yield
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        told = f"{files[0]} or one of {len(files) - 1} more" if files[1:] else str(files[0])
        raise UserError(f"{told}: partial, it lacks what is shown ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Shelf:
    """Where rows are looked for: a results folder, and the committed ones; given `data`, only those measured on that data set."""

    results: Path
    reference: Path
    data: str | None = None

    def newest(self, experiment: str) -> Source:
        """The newest finished run of an experiment, else the committed rows.

        Raises: UserError when there are neither, or a run can't be told to be finished.
        """
        found = self.every(experiment)
        if not found:
            on = f" data={self.data}" if self.data else ""
            raise UserError(
                f"no finished run under {self.results} and no reference rows; run python -m src.run experiment={experiment}{on}"
            )
        return found[-1]

    def each(self, experiment: str) -> list[Source]:
        """The newest finished run of an experiment on each data set at each scale, else the committed rows, else nothing.

        Raises: UserError when a run can't be told to be finished.
        """
        newest = {source.folder.parts[-3:-1]: source for source in self.every(experiment) if source.folder}
        return [source for _, source in sorted(newest.items())] or self.references(experiment)[::-1]

    def every(self, experiment: str) -> list[Source]:
        """All finished runs of an experiment, oldest first, else the committed rows, else nothing.

        Raises: UserError when a run can't be told to be finished.
        """
        runs = [of_folder(folder) for folder in row_table.finished_runs(self.results, experiment)]
        return [run for run in runs if self._wanted(run)] or self.references(experiment)

    def references(self, experiment: str) -> list[Source]:
        """The committed rows of an experiment: those on further data sets, a folder each, and last those that figures are drawn from."""
        further = sorted(f"{file.parent.name}/{experiment}" for file in self.reference.glob(f"*/{experiment}.parquet"))
        committed = [replace(self.committed(name), experiment=experiment) for name in (*further, experiment)]
        return [source for source in committed if source.files and self._wanted(source)]

    def papers(self, experiment: str) -> list[Source]:
        """Of an experiment that reproduces papers the newest finished run of each, on each data set at each scale, else the committed rows.

        Raises: UserError when a run can't be told to be finished.
        """
        names = sorted(file.stem for file in (self.reference / experiment).glob("*.parquet"))
        committed = [replace(self.committed(f"{experiment}/{name}"), experiment=experiment) for name in names]
        runs = [of_folder(folder) for folder in row_table.finished_runs(self.results, experiment)]
        newest = {_paper(source): source for source in (*committed, *runs)}
        return [source for at, source in sorted(newest.items()) if self.data is None or self.data in at]

    def _wanted(self, source: Source) -> bool:
        """Whether rows are of the data set that is asked for, if one is."""
        return self.data is None or self.data == (source.folder.parts[-3] if source.folder else source.stamps[0]["data_requested"])

    def committed(self, experiment: str) -> Source:
        """The committed rows of an experiment, be they there or not."""
        return Source(experiment, *(self.reference / f"{experiment}.{kind}" for kind in ("parquet", "json", "provenance.json")))


def _paper(source: Source) -> tuple[str, ...]:
    """What paper rows reproduce, on which data set and scale; of damaged ones which file they are."""
    try:
        return tuple(map(str, distinct(source.rows, ("paper", "data", "scale"))[0].values()))
    except (UserError, IndexError):
        return (str(source.rows),)


def of_folder(folder: Path) -> Source:
    """The files of a run folder."""
    rows, verdicts, provenance, config = (folder / name for name in FILES)
    return Source(folder.parts[-4], rows, verdicts, provenance, config, folder)


def stamps_of(rows: pd.DataFrame) -> list[Stamp]:
    """What rows say of their runs, and which paper they reproduce if they do, once for each."""
    return rows[[column for column in ("experiment", "paper", *sorted(STAMP)) if column in rows]].drop_duplicates().to_dict("records")


def mixture(stamps: Sequence[Stamp]) -> str:
    """What the rows of one figure differ in though they should not: "" where they have one commit, data set and scale."""
    values = {name: {_label(stamp, column) for stamp in stamps} for column, name in COMMON.items()}
    return " and ".join(f"{name} {', '.join(sorted(labels))}" for name, labels in values.items() if len(labels) > 1)


def require_one(stamps: Sequence[Stamp], where: str) -> None:
    """Raise UserError saying where, when rows mix commits, data sets or scales."""
    if told := mixture(stamps):
        raise UserError(f"{where}: its rows mix {told}; run them alike, or add --mixed to have a figure drawn and said so")


def _place(stamp: Stamp) -> str:
    """Where the folder of a run lies."""
    return f"{stamp['experiment']}/{stamp['data_requested']}/{stamp['scale']}/seed{stamp['root_seed']}-{stamp['run']}"


def _place_of(folder: Path) -> str:
    return "/".join(folder.parts[-4:])


def _label(stamp: Stamp, column: str) -> str:
    return code_of(stamp["commit"], stamp["dirty"]) if column == "commit" else str(stamp[column])


def todays_config(stamp: Stamp) -> Config:
    """The config that a run would have today.

    Raises: UserError when there is none.
    """
    name = f"{stamp['experiment']}/{stamp['paper']}" if "paper" in stamp else stamp["experiment"]
    return composed(name, stamp["data_requested"], stamp["scale"], stamp["root_seed"])


@cache
def composed(experiment: str, data: str, scale: str, seed: int) -> Config:
    """The config that an experiment has today."""
    # Hydra is loaded by what needs it alone
    from hydra import compose, initialize_config_dir

    register_resolvers()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return check(compose("config", overrides=[f"experiment={experiment}", f"data={data}", f"scale={scale}", f"seed={seed}"]))
