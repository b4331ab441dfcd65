"""Where jobs go: SLURM, or this machine. Both are asked only whether a job may still do something; how it went the disk tells."""

import getpass
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from src.errors import UserError
from src.sweep.folder import Sweep
from src.sweep.job import Job

PAUSE = 0.1  # seconds between two looks at a job that is being ended
ENDING = 10.0  # seconds that a job may take to end its runs
PATIENCE = 60.0  # seconds that a command of SLURM may take
Kind = Literal["local", "slurm"]
KINDS: dict[str, Kind] = {"LocalLauncher": "local", "SlurmLauncher": "slurm"}
# of hydra.launcher, what submitit's executors take when they are made
AT_INIT = ("_target_", "max_num_timeout")
BASE = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "stderr_to_stdout")


def kind_of(launcher: dict[str, Any]) -> Kind:
    """The kind of cluster that hydra.launcher describes.

    Raises: UserError when it is another launcher's.
    """
    name = launcher["_target_"].rpartition(".")[2]
    if name not in KINDS:
        raise UserError(f"hydra/launcher: {name} is not for sweeps; the cluster's file must choose submitit_local or submitit_slurm")
    return KINDS[name]


def job_name(sweep: Sweep) -> str:
    """What SLURM's jobs are called: those whose launcher was killed before it could note their ids are found by it."""
    return f"backlock-{sweep.name}"


def submit(sweep: Sweep, jobs: Sequence[Job], launcher: dict[str, Any]) -> dict[str, list[str]]:
    """Submit jobs, at least one; return the runs of each by its id.

    Args:
        sweep: whose they are.
        jobs: what they do.
        launcher: hydra.launcher.

    Raises: UserError when they are refused.
    """
    import submitit  # half a second that a finished sweep can do without

    kind = kind_of(launcher)
    options = {key: value for key, value in launcher.items() if key not in AT_INIT and value is not None}
    if kind == "local":
        options.setdefault("gpus_per_node", len(list(Path("/dev").glob("nvidia[0-9]*"))))
    try:
        executor = submitit.AutoExecutor(sweep.path / "jobs", kind, **{f"{kind}_max_num_timeout": launcher.get("max_num_timeout", 0)})
        executor.update_parameters(name=job_name(sweep), **{key if key in BASE else f"{kind}_{key}": options[key] for key in options})
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (RuntimeError, TypeError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"{kind} refuses the jobs: {error}") from error
    return {entry.job_id: job.runs for entry, job in zip(submitted, jobs, strict=True)}


def alive(sweep: Sweep) -> dict[str, str]:
    """The sweep's jobs that wait or run, by id, and which of both.

    Raises: UserError when SLURM doesn't answer.
    """
    submissions = sweep.submissions()
    found: dict[str, str] = {}
    if any(submission.kind == "slurm" for submission in submissions):
        for line in _ask("squeue", *_ours(sweep), "--noheader", "--array", "--format=%i|%T").splitlines():
            job, _, state = line.partition("|")
            found[job] = state
    local = [job for submission in submissions if submission.kind == "local" for job in submission.jobs]
    return found | {job: "RUNNING" for job in local if _is_controller(sweep, job)}


def histories(sweep: Sweep) -> dict[str, list[str]]:
    """How SLURM says that each of the sweep's jobs ended, every time that it ended; empty without accounting."""
    if not any(submission.kind == "slurm" for submission in sweep.submissions()):
        return {}
    found: dict[str, list[str]] = {}
    with suppress(UserError):
        since = ("--duplicates", "--allocations", "--starttime=now-30days")
        for line in _ask("sacct", *_ours(sweep), *since, "--noheader", "--parsable2", "--format=JobID,State").splitlines():
            job, _, state = line.partition("|")
            found.setdefault(job, []).append(state)
    return found


def cancel(sweep: Sweep) -> None:
    """End all jobs of a sweep, and wait until this machine's are gone."""
    submissions = sweep.submissions()
    if any(submission.kind == "slurm" for submission in submissions):
        _ask("scancel", *_ours(sweep))
    for job in (job for submission in submissions if submission.kind == "local" for job in submission.jobs):
        if _is_controller(sweep, job):
            # a controller's own way, SIGINT, is not heard in the background of a shell; its job ends when it is gone
            os.kill(int(job), signal.SIGKILL)
            deadline = time.monotonic() + ENDING
            while time.monotonic() < deadline and _at_work(sweep, job):
                time.sleep(PAUSE)


def _ours(sweep: Sweep) -> tuple[str, str]:
    return f"--user={getpass.getuser()}", f"--name={job_name(sweep)}"


def _at_work(sweep: Sweep, job: str) -> bool:
    """Whether a job has runs that it hasn't told the end of; one that was killed never will."""
    return any(attempt.job == job and attempt.outcome == "open" for tries in sweep.attempts().values() for attempt in tries)


def _is_controller(sweep: Sweep, job: str) -> bool:
    """Whether a process of this machine is the controller of a local job."""
    told = subprocess.run(["ps", "-ww", "-o", "args=", "-p", job], capture_output=True, text=True, check=False).stdout
    return str(sweep.path / "jobs") in told


def _ask(*command: str) -> str:
    """What a command of SLURM prints.

    Raises: UserError when it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} doesn't answer ({error}); is SLURM there?") from error
    if done.returncode:
        raise UserError(f"{command[0]} fails ({done.stderr.strip()}); is SLURM there?")
    return done.stdout
