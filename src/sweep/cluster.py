"""Where jobs go: SLURM, or this machine. Both are asked only whether a job may still do something; how it went the disk tells."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from src.errors import UserError
from src.sweep.folder import Sweep
from src.sweep.job import Job

PAUSE = 0.1  # seconds between two looks at a job that is being ended
ENDING = 30.0  # seconds that a job may take to end its runs; one that is still being imported has to learn of it first
PATIENCE = 60.0  # seconds that a command of SLURM may take
PASSING = {"None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime"}  # why jobs wait for their turn
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


def gpus(launcher: dict[str, Any]) -> int:
    """The GPUs of a job that hydra.launcher describes; of a local one all that this user has, if nothing else is said."""
    if (asked := launcher.get("gpus_per_node")) is not None or kind_of(launcher) == "slurm":
        return asked or 0
    return len(launcher.get("visible_gpus") or _visible()) or len(list(Path("/dev").glob("nvidia[0-9]*")))


def _visible() -> list[int]:
    """The numbers of the GPUs that CUDA_VISIBLE_DEVICES names."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [int(gpu) for gpu in named.split(",")] if re.fullmatch(r"\d+(,\d+)*", named) else []


def job_name(sweep: Sweep) -> str:
    """What SLURM's jobs are called: those whose launcher was killed before it could note their ids are found by it.

    The same runs in another folder are another sweep.
    """
    return f"backlock-{sweep.name}-{hashlib.sha256(str(sweep.path.resolve()).encode()).hexdigest()[:6]}"


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
        if visible := _visible():
            options.setdefault("visible_gpus", visible)
        options.setdefault("gpus_per_node", gpus(launcher))
    try:
        executor = submitit.AutoExecutor(sweep.path / "jobs", kind, **{f"{kind}_max_num_timeout": launcher.get("max_num_timeout", 0)})
        executor.update_parameters(name=job_name(sweep), **{key if key in BASE else f"{kind}_{key}": options[key] for key in options})
        with _left_alone() if kind == "local" else nullcontext(), executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (OSError, RuntimeError, TypeError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"{kind} refuses the jobs: {error}") from error
    return {entry.job_id: job.runs for entry, job in zip(submitted, jobs, strict=True)}


def alive(sweep: Sweep) -> dict[str, str]:
    """The sweep's jobs that wait or run, by id, which of both, and why they wait where SLURM has another reason than their turn.

    Raises: UserError when SLURM doesn't answer.
    """
    submissions = sweep.submissions()
    found: dict[str, str] = {}
    if any(submission.kind == "slurm" for submission in submissions):
        for line in _ask("squeue", _named(sweep), "--noheader", "--array", "--format=%i|%T|%r").splitlines():
            job, state, reason = line.split("|", 2)
            found[job] = state if reason in PASSING else f"{state} ({reason})"
    if any(submission.kind == "local" for submission in submissions):
        found |= dict.fromkeys(_processes("submitit.local._local", sweep), "RUNNING")
    return found


def histories(sweep: Sweep) -> dict[str, list[str]]:
    """How SLURM says that each of the sweep's jobs ended, every time that it ended; empty without accounting."""
    if not any(submission.kind == "slurm" for submission in sweep.submissions()):
        return {}
    found: dict[str, list[str]] = {}
    with suppress(UserError):
        since = ("--duplicates", "--allocations", "--starttime=now-30days")
        for line in _ask("sacct", "--allusers", _named(sweep), *since, "--noheader", "--parsable2", "--format=JobID,State").splitlines():
            jobs, _, state = line.partition("|")
            for job in _elements(jobs):
                found.setdefault(job, []).append(state)
    return found


def _elements(jobs: str) -> list[str]:
    """The ids of the elements of an array that SLURM tells in one: 7_[1-3,5%2] are 7_1, 7_2, 7_3 and 7_5."""
    told = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", jobs)
    if told is None:
        return [jobs]
    ranges = [part.partition("-") for part in told[2].split(",")]
    return [f"{told[1]}_{place}" for first, _, last in ranges for place in range(int(first), int(last or first) + 1)]


def elsewhere(sweep: Sweep) -> list[str]:
    """The other machines on which local jobs of a sweep may go on: from here they are neither seen nor ended."""
    local = (submission for submission in sweep.submissions() if submission.kind == "local")
    hosts = {submission.host for submission in local if not all(sweep.done(sweep.by_id[run]) for run in chain(*submission.jobs.values()))}
    return sorted(hosts - {socket.gethostname()})


def cancel(sweep: Sweep) -> None:
    """End all jobs of a sweep, and wait until this machine's are gone."""
    submissions = sweep.submissions()
    if any(submission.kind == "slurm" for submission in submissions):
        _ask("scancel", f"--user={os.getuid()}", _named(sweep))
    if any(submission.kind == "local" for submission in submissions):
        # a controller's own way, SIGINT, is not heard in the background of a shell; its job ends when it is gone
        _kill(_processes("submitit.local._local", sweep))
        deadline = time.monotonic() + ENDING
        while (left := _processes("submitit.core._submit", sweep)) and time.monotonic() < deadline:
            time.sleep(PAUSE)
        _kill(left)


def _named(sweep: Sweep) -> str:
    return f"--name={job_name(sweep)}"


@contextmanager
def _left_alone() -> Iterator[None]:
    """Start processes that a terminal's Ctrl-C does not reach, and that hold no pipe open which their starter writes into."""
    standing = {stream: os.dup(stream) for stream in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit; here it is heard afterwards
    try:
        for stream in standing:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, own in standing.items():
            os.dup2(own, stream)
            os.close(own)
        os.close(nowhere)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _processes(module: str, sweep: Sweep) -> list[str]:
    """The ids of this machine's processes that run a module for the jobs of a sweep, be they recorded or not, however its path is spelt."""
    spelt = {**os.environ, "LC_ALL": "C.UTF-8"}  # elsewhere ps has ? for what is not ASCII
    command = ["ps", "-ww", "-eo", "pid=,args="]
    told = subprocess.run(command, env=spelt, capture_output=True, encoding="utf-8", errors="replace", check=False).stdout
    asked = [line.strip().partition(f" -m {module} ") for line in told.splitlines()]
    jobs = (sweep.path / "jobs").resolve()
    return [command.split()[0] for command, found, folder in asked if found and Path(folder).resolve() == jobs]


def _kill(processes: Sequence[str]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


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
