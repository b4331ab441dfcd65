"""How the runs of a sweep stand: told from their folders, the attempts at them, and the jobs that are alive."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from src.sweep.folder import Attempt, Sweep
from src.sweep.plan import Run

State = Literal["done", "running", "waiting", "failed", "lost", "missing"]
STATES: tuple[State, ...] = get_args(State)
ENDED: dict[str, State] = {"done": "lost", "failed": "failed", "refused": "failed", "killed": "lost", "stopped": "lost", "open": "lost"}
SHOWN = 50  # mishaps told one by one
SPACE = 2**20  # bytes below which a disk is full


def look(sweep: Sweep, alive: Mapping[str, str], done: set[str]) -> dict[str, State]:
    """The state of every run: the folder's word first, then that of the living job that has it, then how the last attempt ended.

    Args:
        sweep: whose runs.
        alive: the living jobs and whether they wait or run.
        done: runs known to be finished: they are not looked at again, and those found so are added.
    """
    done.update(run.id for run in sweep.runs if run.id not in done and sweep.done(run))
    jobs: dict[str, str] = {}
    for submission in sweep.submissions():
        for job, runs in submission.jobs.items():
            if job in alive:
                jobs |= dict.fromkeys(runs, job)
    gone, attempts = _gone(sweep), sweep.attempts()

    def state(run: str) -> State:
        if run in done:
            return "done"
        tries = attempts.get(run, [])
        # a launcher that was killed may not have noted whose job it is
        if job := jobs.get(run, tries[-1].job if tries and tries[-1].job in alive else None):
            return _under_way(job, alive[job], tries)
        if run in gone:
            return "lost"
        return ENDED[tries[-1].outcome] if tries else "missing"

    return {run.id: state(run.id) for run in sweep.runs}


def _gone(sweep: Sweep) -> dict[str, str]:
    """The runs that the job that they were given to last has not tried, and that job; but for those tried by one that was not noted."""
    latest = {run: job for submission in sweep.submissions() for job, runs in submission.jobs.items() for run in runs}
    noted = {job for submission in sweep.submissions() for job in submission.jobs}
    tried = {run: {attempt.job for attempt in tries} for run, tries in sweep.attempts().items()}
    return {run: job for run, job in latest.items() if job not in (jobs := tried.get(run, set())) and jobs <= noted}


def _under_way(job: str, told: str, tries: Sequence[Attempt]) -> State:
    """The state of an unfinished run that a living job has."""
    last = [attempt for attempt in tries if attempt.job == job][-1:]
    if not last or told.startswith("PENDING") or last[0].outcome == "stopped":
        return "waiting"
    return "running" if last[0].outcome == "open" else ENDED[last[0].outcome]


def in_brief(states: Mapping[str, State]) -> str:
    """How many runs are in which state, in one line."""
    counts = Counter(states.values())
    return ", ".join([f"{counts['done']} of {len(states)} done", *(f"{counts[state]} {state}" for state in STATES[1:] if counts[state])])


def report(sweep: Sweep, states: Mapping[str, State], alive: Mapping[str, str], histories: Mapping[str, list[str]]) -> RenderableType:
    """A table of the states by experiment, data and scale, and below it what went wrong with which run.

    Args:
        sweep: whose runs.
        states: as they stand.
        alive: the living jobs.
        histories: how SLURM says that jobs ended.
    """
    kinds: dict[tuple[str, str, str], Counter[State]] = {}
    for run in sweep.runs:
        config = sweep.configs[run.config]
        kinds.setdefault((config.claim.name, config.data.name, config.scale.name), Counter())[states[run.id]] += 1
    shown = [state for state in STATES if state == "done" or any(counts[state] for counts in kinds.values())]
    table = Table("experiment", "data", "scale", "runs", *shown, title=f"sweep {sweep.name}")
    for kind, counts in kinds.items():
        table.add_row(*kind, str(counts.total()), *(str(counts[state]) for state in shown))
    told = mishaps(sweep, states, alive, histories)
    more = [f"… and {len(told) - SHOWN} more"] if len(told) > SHOWN else []
    return Group(table, *map(Text, (*told[:SHOWN], *more, *stuck(alive), *_full_disk(sweep.path))))


def stuck(alive: Mapping[str, str]) -> list[str]:
    """How many jobs SLURM lets wait for more than their turn, a line for each reason."""
    reasons = Counter(told for told in alive.values() if told.startswith("PENDING ("))
    return [f"{counted(count, 'job')} {told}, says SLURM" for told, count in sorted(reasons.items())]


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"{count} {what if count == 1 else f'{what}s'}"


def mishaps(sweep: Sweep, states: Mapping[str, State], alive: Mapping[str, str], histories: Mapping[str, list[str]]) -> list[str]:
    """A line for every run that something befell: its state, and what befell it at each try."""
    attempts, gone, job_logs, lines = sweep.attempts(), _gone(sweep), sweep.job_logs(), []
    for run in sweep.runs:
        tries = attempts.get(run.id, [])
        told = [_befell(attempt, alive, histories.get(attempt.job, [])) for attempt in tries if attempt.outcome != "done"]
        log: Path | None = sweep.log(run)
        if states[run.id] == "lost" and (job := gone.get(run.id)):
            told.append(f"its job {job} was gone before it began{_says(histories.get(job, [])[-1:])}")
            log = job_logs.get(job)
        elif states[run.id] == "lost" and tries and tries[-1].outcome == "done":
            told.append("it was finished, and its folder is gone")
        if told := [word for word in told if word]:
            lines.append(f"{describe(sweep, run)}: {states[run.id]}; {'; '.join(told)}" + (f"; see {log}" if log else ""))
    return lines


def describe(sweep: Sweep, run: Run) -> str:
    """A run in a few words."""
    config = sweep.configs[run.config]
    return f"{config.claim.name} {config.data.name} {config.scale.name} seed {run.seed} ({run.id})"


def _befell(attempt: Attempt, alive: Mapping[str, str], history: Sequence[str]) -> str:
    """What befell an attempt; "" where it is under way."""
    told = attempt.told()
    place = f"job {attempt.job} on {told.get('host', 'an unknown node')}"
    reason = told.get("reason", "no reason could be written")
    if attempt.outcome in ("failed", "refused"):
        return f"{attempt.outcome} in {place}: {reason}"
    says = _says(history[attempt.restart : attempt.restart + 1])
    if attempt.outcome != "open":
        return f"{attempt.outcome} in {place}: {reason}{says}"
    under_way = alive.get(attempt.job) == "RUNNING" and attempt.restart >= len(history) - 1
    return "" if under_way else f"gone with {place}{says}"


def _says(ended: Sequence[str]) -> str:
    """How SLURM says that a job ended, which tells why its run was killed; "" where it ended well or nothing is known."""
    return f" (SLURM: {ended[0]})" if ended and ended[0] not in ("COMPLETED", "RUNNING", "PENDING") else ""


def _full_disk(place: Path) -> list[str]:
    return [f"no space left on the disk of {place}"] if shutil.disk_usage(place).free < SPACE else []
