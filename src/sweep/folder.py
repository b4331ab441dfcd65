"""A sweep on disk: `<results_dir>/.sweep/<sweep>/`, with its plan, submissions, attempts and logs.

An attempt is one try of a job at a run. How it ended is in its file's name, `<run>.<job>.<restart>.<outcome>`: to rename needs no space,
so that a full disk is told too, and one look into the folder tells of ten thousand runs.
"""

import json
import os
import shlex
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from src.code import Code
from src.config import Config
from src.errors import UserError
from src.results import folder_of, from_plain, read_status, to_plain, write_atomically
from src.sweep.plan import Plan, Run

SHELL = ("DATA_ROOT", "OMP_NUM_THREADS")
Outcome = Literal["open", "done", "failed", "refused", "killed", "stopped"]


@dataclass(frozen=True)
class Attempt:
    """One try of a job at a run; how it ended is its outcome, "open" until then."""

    run: str
    job: str
    restart: int
    outcome: Outcome
    file: Path

    def told(self) -> dict[str, Any]:
        """What is known of it: host, started, and once it ended also ended and reason. Empty where the disk was full."""
        with suppress(OSError, ValueError):
            return json.loads(self.file.read_bytes())
        return {}

    def end(self, outcome: Outcome, reason: str) -> None:
        """Say how it ended, and why as far as there is space on the disk for it."""
        file = self.file.with_name(".".join((*self.file.name.split(".")[:3], outcome)))
        self.file.rename(file)
        with suppress(OSError):
            write_atomically(file, json.dumps({**replace(self, file=file).told(), "ended": time.time(), "reason": reason}))


@dataclass(frozen=True)
class Submission:
    """Jobs that were submitted together: which runs each has, of what code, and from which host, where local ones run."""

    kind: Literal["local", "slurm"]
    jobs: dict[str, list[str]]
    code: Code
    host: str = field(default_factory=socket.gethostname)


class Sweep:
    """One sweep on disk."""

    def __init__(self, path: Path):
        """Open the folder of a sweep.

        Raises: UserError when there is none, or it is damaged.
        """
        self.path = path.absolute()
        file = self.path / "plan.json"
        try:
            told = json.loads(file.read_bytes())
            self.arguments: list[str] = list(told["arguments"])
            self.cwd = str(told["cwd"])
            self._configs: list[dict[str, Any]] = list(told["configs"])
            self.environment: dict[str, str] = dict(told["environment"])
            self.runs = [Run(*entry) for entry in told["runs"] if self._configs[entry[1]]]
        except OSError as error:
            raise UserError(f"{path}: no sweep is there; give its name, or with another results_dir its folder under .sweep") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{file}: damaged; submit the sweep's command line anew, which finds its jobs and runs") from error

    @classmethod
    def create(cls, plan: Plan) -> "Sweep":
        """Write the plan of a sweep.

        Raises: UserError when the place can't be written.
        """
        path = cls.place(plan)
        told = {
            "arguments": plan.arguments,
            "cwd": os.getcwd(),
            # what a site's file, the data's and the checkpoints take from the shell
            "environment": {name: value for name, value in os.environ.items() if name.startswith("BACKLOCK_") or name in SHELL},
            "configs": [to_plain(config) for config in plan.configs],
            "runs": [(run.id, run.config, run.seed) for run in plan.runs],
        }
        try:
            write_atomically(path / "plan.json", json.dumps(told))
        except OSError as error:
            raise UserError(f"{path}: can't be written ({error.strerror}); choose another results_dir") from error
        return cls(path)

    @staticmethod
    def path_of(plan: Plan) -> Path:
        """Where the folder of a sweep lies."""
        return Path(plan.configs[0].results_dir) / ".sweep" / plan.name

    @classmethod
    def place(cls, plan: Plan) -> Path:
        """The folder of a sweep, made where there is none.

        Raises: UserError when it can't be.
        """
        path = cls.path_of(plan)
        try:
            for part in ("attempts", "submissions", "logs", "code"):
                (path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: can't be written ({error.strerror}); choose another results_dir") from error
        return path

    @property
    def name(self) -> str:
        """Its id, the name of its folder."""
        return self.path.name

    @property
    def called(self) -> str:
        """What `python -m src.sweep` is given to find it from here."""
        return called(self.path)

    @cached_property
    def configs(self) -> list[Config]:
        """The configs of the sweep, W&B's group set to the sweep's id."""
        return [self._config(plain) for plain in self._configs]

    @cached_property
    def by_id(self) -> dict[str, Run]:
        """The runs by their ids."""
        return {run.id: run for run in self.runs}

    def config(self, run: Run) -> Config:
        """The config of a run."""
        return replace(self._config(self._configs[run.config]), seed=run.seed)

    def folder(self, run: Run) -> Path:
        """The run folder of a run."""
        return folder_of(self.configs[run.config], run.seed, run.id)

    def done(self, run: Run) -> bool:
        """Whether a run is finished: its folder alone decides."""
        return read_status(self.folder(run)) == "done"

    def log(self, run: Run) -> Path:
        """What a run printed."""
        return self.path / "logs" / f"{run.id}.txt"

    def job_logs(self) -> dict[str, Path]:
        """What jobs themselves printed, of those that printed anything: submitit's files, errors before all else."""
        files = [file for kind in ("out", "err") for file in sorted((self.path / "jobs").glob(f"*_log.{kind}")) if file.stat().st_size]
        return {file.name.rsplit("_", 2)[0]: file for file in files}

    def begin(self, run: Run, job: str, restart: int) -> Attempt:
        """Record that a job begins a run."""
        file = self.path / "attempts" / f"{run.id}.{job}.{restart}.open"
        write_atomically(file, json.dumps({"host": socket.gethostname(), "started": time.time()}))
        return Attempt(run.id, job, restart, "open", file)

    def attempts(self) -> dict[str, list[Attempt]]:
        """All attempts by the run's id, oldest job first."""
        found: dict[str, list[Attempt]] = {}
        for entry in os.scandir(self.path / "attempts"):
            # the name of a temporary file begins with a dot
            if len(parts := entry.name.split(".")) == 4 and parts[0] and parts[2].isdecimal():
                run, job, restart, outcome = parts
                found.setdefault(run, []).append(Attempt(run, job, int(restart), cast(Outcome, outcome), Path(entry.path)))
        order = {job: place for place, job in enumerate(job for submission in self.submissions() for job in submission.jobs)}
        for attempts in found.values():
            attempts.sort(key=lambda attempt: (order.get(attempt.job, len(order)), attempt.restart))
        return found

    def submitted(self, submission: Submission) -> Path:
        """Record a submission; return its file."""
        place = self.path / "submissions"
        last = max((int(file.stem) for file in place.glob("*.json")), default=-1)
        file = place / f"{last + 1:04}.json"
        write_atomically(file, json.dumps(asdict(submission)))
        return file

    def submissions(self) -> list[Submission]:
        """All submissions, oldest first.

        Raises: UserError when one is damaged.
        """
        found = []
        for file in sorted((self.path / "submissions").glob("*.json")):
            try:
                told = json.loads(file.read_bytes())
                found.append(Submission(told["kind"], told["jobs"], Code(**told["code"]), told["host"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}: damaged; end the jobs that it told of, if any go on, and remove it") from error
        return found

    def _config(self, plain: dict[str, Any]) -> Config:
        try:
            config = from_plain(plain)
        except ValueError as error:
            raise UserError(f"{self.path}: planned by other code, which had other keys; submit its command line anew") from error
        # the runs lie beside the sweep, wherever both were moved
        own = str(self.path.parent.parent)
        return replace(config, results_dir=own, tracker=replace(config.tracker, group=config.tracker.group or self.name))


def called(path: Path) -> str:
    """What `python -m src.sweep` is given to find the sweep of a folder from here: its name, or the folder."""
    here = Path("results/.sweep") / path.name
    return path.name if here.resolve() == path.resolve() else shlex.quote(str(path.absolute()))


def find(name: str) -> Sweep:
    """The sweep of a name, under results/, or of a folder.

    Raises: UserError when there is none.
    """
    here = Path("results/.sweep") / name
    return Sweep(here if here.is_dir() else Path(name))
