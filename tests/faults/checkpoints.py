"""Real runs under SIGKILL: `python -m tests.faults.checkpoints [EXPERIMENT ...] [--kills N] [--seed N]`.

Each experiment is run on the bundled digits at `scale=smoke`, written ten times a second and killed at random times, by default five; it
goes on from its checkpoint each time. In the end its rows must be those of a run that nothing befell, byte for byte. Exit code 1 tells that
they aren't, or that too few kills hit.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from src.run import CONF

TRIES = 5  # for one kill
# a run as python -m src.run makes it, but for how often it is written
OFTEN = "import sys; from src import checkpoint, run; checkpoint.EVERY = 0.1; sys.exit(run.main())"


def main() -> int:
    """Kill, go on, compare; return 1 when rows differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.checkpoints", description=__doc__)
    parser.add_argument("experiments", nargs="*", default=sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    equal = [survives(name, options.kills, chance) for name in options.experiments]
    return int(not all(equal))


def survives(name: str, kills: int, chance: random.Random) -> bool:
    """Whether the rows of an experiment are the same after some kills; told in a line."""
    with TemporaryDirectory() as place:
        undisturbed, killed = Path(place) / "undisturbed", Path(place) / "killed"
        started = time.monotonic()
        run(name, undisturbed).wait()
        whole = time.monotonic() - started
        work = json.loads(only(undisturbed, "provenance.json").read_text())["wall_time_s"]
        done = 0
        for _ in range(TRIES * kills):
            process = run(name, killed)
            try:
                process.wait(chance.uniform(whole - work, whole))
                shutil.rmtree(killed)  # it was faster
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
            if done == kills:
                break
        run(name, killed).wait()
        equal = only(killed, "rows.parquet").read_bytes() == only(undisturbed, "rows.parquet").read_bytes()
    print(f"{name}: killed {done} times within {work:.1f} s of work, rows {'equal' if equal else 'DIFFER'}", flush=True)
    return equal and done == kills


def run(name: str, results: Path) -> subprocess.Popen[bytes]:
    """Start an experiment."""
    arguments = (f"experiment={name}", "data=digits", "scale=smoke", "tracker=none", f"results_dir={results}")
    return subprocess.Popen([sys.executable, "-c", OFTEN, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def only(results: Path, file: str) -> Path:
    """The file of the one run there."""
    (found,) = results.glob(f"*/*/*/seed*/{file}")
    return found


if __name__ == "__main__":
    sys.exit(main())
