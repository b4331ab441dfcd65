"""Many runs mirrored at once: `python -m tests.faults.mirrors [--runs N] [--at-once N]`.

A local sweep with `tracker=offline`, whose runs are held until as many as are worked on at once have begun, so that as many processes of
Weights & Biases stand beside each other. In the end every run must have one mirror, of its own id, in the sweep's group, that holds its
run folder whole; exit code 1 tells that one has not.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.tree import User, expected, measured, plant


def main() -> int:
    """Run the sweep, read what every mirror holds; return 1 when one is missing, doubled or not whole."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mirrors", description=__doc__)
    for name, default in {"runs": 200, "at-once": 60}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        user = User(plant(Path(folder) / "tree"), {**os.environ, "BACKLOCK_AT_ONCE": str(options.at_once)})
        user.order("hold", *range(options.runs))
        launcher = user.start("src.run", "-m", "experiment=tiny", f"seed=range({options.runs})", "cluster=local", "tracker=offline")
        user.until(lambda: sum(map(user.began, range(options.runs))) == options.at_once, f"{options.at_once} runs begin")
        user.order("go on", *range(options.runs))
        code, out = user.ended(launcher)
        right = code == 0 and measured(user.tree / "results") == {seed: expected(seed) for seed in range(options.runs)}
        mirrors = sorted((user.tree / "results/wandb").glob("offline-run-*"))
        whole = {run for mirror in mirrors if (run := held(mirror, user.sweep().name))}
        rows = "equal" if right else "DIFFER"
        print(f"{options.runs} runs, {options.at_once} at once: rows {rows}, {len(mirrors)} mirrors, {len(whole)} whole")
        if not right:
            print(out)
        return int(not right or len(mirrors) != options.runs or whole != {run.id for run in user.sweep().runs})


def held(mirror: Path, group: str) -> str | None:
    """The id of the run of a mirror, if it is the folder's, in the group, and the run folder was logged."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(mirror)]
    records = [json.loads(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()]
    run = next(record["run"] for record in records if record["type"] == "run")
    logged = any(record["type"] == "artifact" and record["artifact"]["type"] == "run-folder" for record in records)
    fits = mirror.name.endswith(f"-{run['run_id']}") and run["run_group"] == group
    return run["run_id"] if fits and logged else None


if __name__ == "__main__":
    sys.exit(main())
