"""One run of a sweep, in a process of its own that the sweep's job starts."""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from src.code import ROOT, fingerprint
from src.config import Config, require
from src.data.files import data_root, present
from src.errors import UserError
from src.results import RunFolder
from src.run import carry_out, complain
from src.sweep.folder import Sweep
from src.sweep.plan import Run, fetch_command

PAUSE = 1.0  # seconds between two looks at a run that another process is at


def begin(path: Path, run: str, submitted: str, environment: dict[str, str]) -> NoReturn:
    """Be the process of a run: write into its log, die with the job, and exit with the code of python -m src.run.

    Args:
        path: the sweep's folder.
        run: the run's id.
        submitted: the fingerprint of the submitted code.
        environment: what it finds in its environment beside what the job found.
    """
    os.environ |= environment
    sweep = Sweep(path)
    os.chdir(sweep.cwd)
    log = os.open(sweep.log(sweep.by_id[run]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    sys.argv[1:] = ["-m", *map(shlex.quote, sweep.arguments)]  # what the run's provenance calls its command
    threading.Thread(target=_die_with_the_job, daemon=True).start()
    sys.exit(main(sweep, run, submitted))


def main(sweep: Sweep, run: str, submitted: str) -> int:
    """Check what was submitted, and run it; return the exit code of python -m src.run."""
    try:
        config = checked(sweep, sweep.by_id[run])
        _import(config.claim.name)
        from src.sweep.imports import IMPORTED  # heavy, and there already where this process is a copy of the job's server

        require(fingerprint(ROOT) == submitted, f"{ROOT}: the code was changed since its submission; resume the sweep, or undo that")
        require(submitted == IMPORTED, f"{ROOT}: the code was another when its job imported it; resume the sweep")
    except UserError as error:
        return complain(str(error), 2)
    while True:
        wait(RunFolder(config))
        code = carry_out(config)
        # another one that waited may have been the first
        if code != 2 or not RunFolder(config).owned:
            return code


def _import(name: str) -> None:
    """Import what the run of an experiment imports, before the code is looked at: what is changed later is not run."""
    for module in (f"experiments.{name}", f"paper_figures.{name}"):
        with suppress(Exception):  # the run will tell
            import_module(module)


def checked(sweep: Sweep, run: Run) -> Config:
    """The config of a run, its data at hand.

    Raises: UserError when they are not: a job never fetches.
    """
    config = sweep.config(run)
    require(present(config.data), f"{config.data.name} is not under {data_root(config.data)}; run {fetch_command(config)}")
    return config


def wait(folder: RunFolder) -> None:
    """Wait while another process is at the run: a copy of this job on a node that SLURM has lost sight of may end it yet."""
    while folder.owned:
        time.sleep(PAUSE)


def _die_with_the_job() -> None:
    job = multiprocessing.parent_process()
    assert job is not None
    job.join()
    os.kill(os.getpid(), signal.SIGKILL)
