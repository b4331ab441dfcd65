"""A job of a sweep: its runs, each in a process of its own, several at once if wanted.

A run is a process of its own so that it may die in whatever way without taking the job along, and so that signals find the job awake:
submitit's handler requeues it, and the runs, killed, are begun again.
"""

import os
import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

from src.code import SUBMITTED, Code
from src.processes import PROCESSES, at_once
from src.sweep.folder import Attempt, Outcome, Sweep
from src.sweep.plan import Run
from src.sweep.work import begin

PAUSE = 0.1  # seconds between two looks at the runs
PROCESSES.set_forkserver_preload(["src.sweep.imports"])
ORPHANED = 255  # what multiprocessing says of a process whose server is gone, be it alive or not
# by the exit code of python -m src.run
ENDS: dict[int, Outcome] = {0: "done", 1: "failed", 2: "refused", 130: "stopped"}


@dataclass
class Job:
    """What submitit pickles and calls: some runs of a sweep.

    Attributes:
        sweep: the sweep's folder.
        runs: their ids.
        at_once: how many are worked on at the same time; None: as many as there are CPUs for their threads.
        code: what they are runs of.
    """

    sweep: Path
    runs: list[str]
    at_once: int | None
    code: Code
    stopped: str = field(default="its job was stopped", init=False)

    def __call__(self) -> None:
        """Work on all runs that are not finished; end all when this process is stopped or its parent has died."""
        sweep = Sweep(self.sweep)
        # the server that runs are copies of starts with it
        os.environ |= _environment(self.code)
        waiting = deque(run for run in map(sweep.by_id.__getitem__, self.runs) if not sweep.done(run))
        slots: list[Process | None] = [None] * (self.at_once or at_once())
        # whoever started this process may be gone before it gets here
        parent = int(os.environ.get("SUBMITIT_LOCAL_JOB_ID") or os.getppid())
        try:
            while waiting or any(slots):
                if os.getppid() != parent:
                    raise SystemExit("the process that started this job is gone")
                for slot, process in enumerate(slots):
                    if process and process.ended():
                        slots[slot] = None
                    if waiting and slots[slot] is None:
                        slots[slot] = Process(sweep, waiting.popleft(), self.code, _gpu(slot))
                time.sleep(PAUSE)
        finally:
            for process in slots:
                if process:
                    process.kill(self.stopped)

    def checkpoint(self, *_: object, **__: object) -> DelayedSubmission:
        """What the requeued job does: the same, but for the runs that will be finished by then."""
        self.stopped = "its job reached the time limit or was preempted"
        return DelayedSubmission(Job(self.sweep, self.runs, self.at_once, self.code))


class Process:
    """A run as a process that dies with this one."""

    def __init__(self, sweep: Sweep, run: Run, code: Code, gpu: dict[str, str]):
        self.log = sweep.log(run)
        self.attempt: Attempt = sweep.begin(run, JobEnvironment().job_id, int(os.environ.get("SLURM_RESTART_COUNT", 0)))
        self.process = PROCESSES.Process(target=begin, args=(sweep.path, run.id, code.fingerprint, gpu))
        try:
            self.process.start()
        except (EOFError, OSError):  # the server was killed; there is another then
            self.process.start()

    def ended(self) -> bool:
        """Whether it has ended; then how is recorded."""
        code = self.process.exitcode
        if code is None:
            return False
        if code == ORPHANED:
            assert self.process.pid
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
        self.attempt.end(ENDS.get(code, "killed"), self._reason(code))
        return True

    def kill(self, reason: str) -> None:
        """End it now."""
        self.process.kill()
        self.process.join()
        self.attempt.end("stopped", reason)

    def _reason(self, code: int) -> str:
        """Why it ended: the signal that killed it, or the error that it told last; "" when it ended well."""
        if code == 0:
            return ""
        if code == ORPHANED:
            return "the server that it was a copy of was killed"
        if code < 0:
            known = -code in set(signal.Signals)
            return f"killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
        told = self.log.read_text("utf-8", "replace") if self.log.exists() else ""
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        return errors[-1].removeprefix("error: ") if errors else f"exit code {code}"


def _environment(code: Code) -> dict[str, str]:
    """What runs find in their environment: the code's root is imported from, its commit, and one thread if nothing else is said."""
    path = os.pathsep.join(part for part in (code.root, os.environ.get("PYTHONPATH")) if part)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", SUBMITTED: code.commit, "OMP_NUM_THREADS": threads}


def _gpu(slot: int) -> dict[str, str]:
    """What a run in a slot sees of several GPUs: its own."""
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
