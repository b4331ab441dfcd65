"""Launch a sweep: plan, submit what is missing, watch, tell."""

import heapq
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import FrameType

import filelock
from rich.console import Console
from rich.live import Live
from rich.text import Text

from src import code
from src.config import ClusterConfig, ScaleName
from src.errors import UserError
from src.processes import at_once
from src.results import write_atomically
from src.sweep import cluster
from src.sweep.estimate import estimate
from src.sweep.folder import Submission, Sweep, called
from src.sweep.plan import Plan, Run, plan
from src.sweep.state import State, counted, in_brief, look, report, stuck

FIRST_PAUSE, LAST_PAUSE = 1.0, 20.0  # seconds between two looks: a twentieth of the time since the start, within these
AGREED = 5.0  # seconds over which jobs must be gone: SLURM forgets one for a moment while it takes it from a dead node
INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let the first signal to end be heard as Ctrl-C, and no other after it: jobs are being cancelled."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for signal_ in INTERRUPTING:
            signal.signal(signal_, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handling(interrupt):
        yield


@contextmanager
def _deaf() -> Iterator[None]:
    """Hear no signal to end: jobs are being cancelled."""
    with _handling(signal.SIG_IGN):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    # what nohup or a script's background ignores stays so
    before = {number: signal.signal(number, handler) for number in INTERRUPTING if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@_interruptible()
def launch(arguments: Sequence[str], expected: Sweep | None = None) -> int:
    """Make the runs of a command line that are missing, as jobs; return 0 when all are finished, 1 when one is not.

    Args:
        arguments: the command line.
        expected: the sweep that it must be, where it is an old one.

    Raises: UserError when the command line is wrong or the jobs are refused; KeyboardInterrupt when interrupted.
    """
    planned = plan(arguments)
    if expected is not None:
        _require_same(planned, expected)
    kind = cluster.kind_of(planned.launcher)
    first = planned.configs[0]
    assert first.cluster is not None
    with _alone(Sweep.place(planned)) as path:
        earlier = (path / "plan.json").read_bytes() if (sweep := _opened(path)) else None
        sweep = sweep or Sweep.create(planned)
        done: set[str] = set()
        alive = cluster.alive(sweep)
        if not alive:  # the options of an earlier command line are those of its jobs
            sweep = Sweep.create(planned)
        states = look(sweep, alive, done)
        missing = [run for run in sweep.runs if states[run.id] in ("missing", "failed", "lost")]
        gpus = cluster.gpus(planned.launcher) / (first.cluster.at_once or at_once())
        print(f"sweep {sweep.name}: {in_brief(states)}; {estimate(sweep, missing, gpus)}", flush=True)
        try:
            if missing:
                _submit(sweep, planned, missing, kind)
            elif alive and not first.detach:
                print("nothing to submit; Ctrl-C cancels the jobs that go on", flush=True)
        except Exception:
            if earlier:  # by which it can be resumed: what is refused is not kept
                write_atomically(path / "plan.json", earlier)
            if not alive and not first.detach:  # of those that were there none is ended
                _cancel(sweep)
            raise
        except KeyboardInterrupt:
            if not first.detach:
                _cancel(sweep)
            raise
        if first.detach:
            if missing or alive:
                print(f"the jobs go on; python -m src.sweep status|resume|cancel {sweep.called}")
            return 0
        try:
            states = watch(sweep, done)
        except BaseException:
            _cancel(sweep)
            raise
    return tell(sweep, states)


def _require_same(planned: Plan, expected: Sweep) -> None:
    """Raise UserError where a plan is not that of a sweep that is there."""
    if planned.name != expected.name:
        told = "its command line, with what was added and conf/ as it is, stands for other runs"
        raise UserError(f"sweep {expected.name}: {told} (sweep {planned.name}); start them with python -m src.run -m")
    if (path := Sweep.path_of(planned)).resolve() != expected.path.resolve():
        own = expected.path.parent.parent
        raise UserError(f"sweep {expected.name}: lies in {expected.path}, and its command line means {path}; add 'results_dir=\"{own}\"'")


def _cancel(sweep: Sweep) -> None:
    """End all jobs of a sweep, whatever signals come meanwhile.

    Raises: UserError when SLURM doesn't answer.
    """
    try:
        with _deaf():
            cluster.cancel(sweep)
    except UserError as error:
        raise UserError(f"{error}; jobs may go on: python -m src.sweep cancel {sweep.called}") from error


def tell(sweep: Sweep, states: dict[str, State]) -> int:
    """Print the table of a sweep and what finishes it; return 1 if a run is failed or lost."""
    alive = _alive(sweep) or {}
    # a file or a pipe has no width of its own
    Console(width=None if sys.stdout.isatty() else 120).print(report(sweep, states, alive, cluster.histories(sweep)), soft_wrap=True)
    if all(state in ("done", "running", "waiting") for state in states.values()):
        return 0
    if hosts := cluster.elsewhere(sweep):
        print(f"it has had jobs on {', '.join(hosts)}, which are not seen from here: what is lost may go on there")
    print(f"this finishes the rest: python -m src.sweep resume {sweep.called}")
    return 1


def watch(sweep: Sweep, done: set[str]) -> dict[str, State]:
    """Show how a sweep goes until its last job has ended; return how its runs stand then."""
    started = idle = time.monotonic()
    shown = ""
    console = Console(stderr=True)
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            alive = _alive(sweep)
            states = look(sweep, alive or {}, done)
            line = "; ".join([in_brief(states), *stuck(alive)]) if alive is not None else "SLURM doesn't answer; trying again"
            if console.is_terminal:
                live.update(Text(line), refresh=True)
            elif line != shown:
                print(line, file=sys.stderr, flush=True)
            shown = line
            now = time.monotonic()
            if alive is None or alive:
                idle = now
            elif "lost" not in states.values() or now - idle >= AGREED:
                return states
            time.sleep(min(LAST_PAUSE, max(FIRST_PAUSE, (now - started) / 20)))


def _submit(sweep: Sweep, planned: Plan, missing: Sequence[Run], kind: cluster.Kind) -> None:
    """Share the missing runs out among jobs, and submit them."""
    from src.sweep.job import Job  # submitit comes with it

    first = planned.configs[0]
    assert first.cluster is not None
    shares = _shares(first.cluster, {run.id: planned.configs[run.config].scale.name for run in missing})
    recorded = code.submit(sweep.path / "code", first.snapshot)
    jobs = [Job(sweep.path, share, first.cluster.at_once, recorded) for share in shares]
    # a launcher that is killed before it can note the jobs has noted where to look for them
    noted = sweep.submitted(Submission(kind, {}, recorded))
    try:
        with _importing_from(recorded.root):
            submitted = cluster.submit(sweep, jobs, planned.launcher)
    except UserError:
        if kind == "slurm":  # which takes all jobs or none
            noted.unlink()
        raise
    sweep.submitted(Submission(kind, submitted, recorded))
    told = "" if first.detach else "; Ctrl-C cancels"
    print(f"{counted(len(missing), 'run')} submitted in {counted(len(jobs), 'job')}{told}", flush=True)


def _shares(shared: ClusterConfig, scales: Mapping[str, ScaleName]) -> list[list[str]]:
    """Share runs out among jobs: the longest first, each to the job that has the least to do.

    Args:
        shared: how runs share jobs.
        scales: of the runs, by their ids.

    Returns: the ids of the runs of each job.
    """
    share = {run: Fraction(1, max(shared.at_once or 1, shared.runs.get(scale, 1))) for run, scale in scales.items()}
    jobs: list[list[str]] = [[] for _ in range(min(shared.jobs, math.ceil(sum(share.values()))))]
    least = [(Fraction(), job) for job in range(len(jobs))]
    for run in sorted(share, key=share.__getitem__, reverse=True):
        work, job = heapq.heappop(least)
        jobs[job].append(run)
        heapq.heappush(least, (work + share[run], job))
    return jobs


def _opened(path: Path) -> Sweep | None:
    """The sweep of a folder; None where there is none, or its plan is damaged: it is written anew."""
    try:
        return Sweep(path)
    except UserError:
        return None


def _alive(sweep: Sweep) -> dict[str, str] | None:
    """The living jobs; None while SLURM doesn't answer."""
    try:
        return cluster.alive(sweep)
    except UserError:
        return None


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Be the only launcher of the sweep in a folder.

    Raises: UserError when another is at it.
    """
    try:
        with filelock.FileLock(path / ".lock", timeout=0, fallback_to_soft=False):
            yield path
    except filelock.Timeout as error:
        raise UserError(f"sweep {path.name}: another process is at it; see python -m src.sweep status {called(path)}") from error


@contextmanager
def _importing_from(root: str) -> Iterator[None]:
    """Give the processes that are started, and the jobs that are submitted, a folder to import from before their own."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (root, before["PYTHONPATH"]) if part)
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
