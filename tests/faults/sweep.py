"""A local sweep under random SIGKILLs: `python -m tests.faults.sweep [--kills N] [--runs N] [--seed N]`.

At random times a random process of the sweep dies: the launcher, the job's controller, the job, the server that its runs are copies of,
or a run. A launcher that died or that tells of missing runs is resumed from a new process. In the end every run's rows must be there once,
and equal those of a run that nothing befell. Two hundred kills take half an hour or less; exit code 1 tells that rows differ.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from src.sweep import cluster
from tests.tree import User, expected, measured, plant

TEXT: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
LONGEST = 6.0  # seconds between two kills, at most: less than it takes to submit a job, to import and to run


def main() -> int:
    """Kill, resume, compare; return 1 when rows are missing or differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.sweep", description=__doc__)
    for name, default in {"kills": 200, "runs": 100, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with TemporaryDirectory() as folder:
        user = User(plant(Path(folder) / "tree"), {**os.environ, "BACKLOCK_AT_ONCE": "2"})
        sweep = ("src.run", "-m", "experiment=tiny", f"seed=range({options.runs})", "cluster=local")
        user.order("linger", *range(options.runs))  # else few are caught at work
        killed = dict.fromkeys(("launcher", "controller", "job", "server", "run"), 0)
        try:
            launcher = user.start(*sweep)
            while launcher.poll() != 0:
                if launcher.poll() is not None:
                    launcher = user.start(*sweep)
                if sum(killed.values()) < options.kills:
                    time.sleep(chance.uniform(0, LONGEST))
                    kill(user, launcher, chance, killed)
                else:
                    launcher.communicate()
        except KeyboardInterrupt:
            user.leave()
            cluster.cancel(user.sweep())
            raise
        right = measured(user.tree / "results") == {seed: expected(seed) for seed in range(options.runs)}
        left = cluster.alive(user.sweep())
        begun = sum(user.began(seed) for seed in range(options.runs))
        print(f"{options.runs} runs begun {begun} times, killed {killed}: rows {'equal' if right else 'DIFFER'}, {len(left)} jobs left")
        return int(not right or bool(left))


def kill(user: User, launcher: subprocess.Popen[str], chance: random.Random, killed: dict[str, int]) -> None:
    """Kill a random process of a random kind; count it."""
    processes = {"launcher": [launcher.pid] if launcher.poll() is None else [], **children(user.tree)}
    kind, pids = chance.choice([entry for entry in processes.items() if entry[1]] or [("launcher", [])])
    if processes.get("run") and chance.random() < 0.5:  # they live shortly, and would be hit seldom
        kind, pids = "run", processes["run"]
    if pids:
        with suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
            killed[kind] += 1
            print(f"{sum(killed.values())}: {kind}", file=sys.stderr)


def children(tree: Path) -> dict[str, list[int]]:
    """The processes of the sweep but for its launcher, by their kind."""
    found: dict[str, list[int]] = {"controller": [], "job": [], "server": [], "run": []}
    modules = {f"-m submitit.local._local {tree}": "controller", f"-m submitit.core._submit {tree}": "job"}
    # a child is listed after its parent
    for line in subprocess.run(["ps", "-eo", "pid=,ppid=,args=", "--sort=start_time,pid"], **TEXT).stdout.splitlines():
        pid, parent, command = line.split(maxsplit=2)
        kind = next((kind for module, kind in modules.items() if module in command), None)
        if "multiprocessing.forkserver" in command:
            kind = "run" if int(parent) in found["server"] else "server" if int(parent) in found["job"] else None
        if kind:
            found[kind].append(int(pid))
    return found


if __name__ == "__main__":
    sys.exit(main())
