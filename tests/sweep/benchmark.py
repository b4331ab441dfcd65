"""How long sweeps take beside their runs: `python -m tests.sweep.benchmark`.

Wanted: to plan 10,000 runs in 10 s, to find that 1,000 finished ones need no job in 5 s, to collect 10,000 run folders into one table in
20 s, and a run's overhead over its bare work in 5 s, half of them imports.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from src.config import register_resolvers
from src.sweep.folder import Sweep
from src.sweep.plan import plan

REAL = ("experiment=vanishing_products", "data=digits", "scale=smoke", "tracker=none")


def main() -> None:
    """Print a line a measurement."""
    register_resolvers()
    with TemporaryDirectory() as folder:
        place = Path(folder)
        eight = ("experiment=residual_unlock,vanishing_products", "data=digits,mnist", "scale=smoke,quick", "data.mirrors=[]")
        tell("plan 10,000 runs", 10, lambda: Sweep.create(plan([*eight, "seed=range(1250)", "cluster=slurm", f"results_dir={place}/none"])))

        one = python("src.run", *REAL, f"results_dir={place}/one")
        (source,) = (place / "one").glob("*/*/*/seed0-*")
        bare = float(json.loads((source / "provenance.json").read_text())["wall_time_s"])
        imports = python("-c", "import src.report, src.experiment, experiments.vanishing_products, paper_figures.vanishing_products")
        print(
            f"a run over its bare work of {bare:.1f} s: {one - bare:.1f} s, of which imports {imports:.1f} s (wanted: under 5 s)",
            flush=True,
        )

        many = [*REAL, "seed=range(10000)", "cluster=local", f"results_dir={place}/many"]
        sweep = Sweep.create(plan(many))
        for run in sweep.runs:
            shutil.copytree(source, sweep.folder(run))
        command = ("src.sweep", "collect", str(sweep.path))
        tell("collect 10,000 folders, all told", 20, lambda: python(*command))
        thousand = ("src.run", "-m", *REAL, "seed=range(1000)", "cluster=local", f"results_dir={place}/many")
        tell("resubmit 1,000 finished runs, all told", 5, lambda: python(*thousand))


def tell(what: str, wanted: float, action: Callable[[], object]) -> None:
    """Print how long something takes."""
    started = time.perf_counter()
    action()
    print(f"{what}: {time.perf_counter() - started:.1f} s (wanted: under {wanted:.0f} s)", flush=True)


def python(*arguments: str) -> float:
    """The seconds that a Python process takes, started with -m unless with -c."""
    started = time.perf_counter()
    module = () if arguments[0] == "-c" else ("-m",)
    subprocess.run([sys.executable, *module, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
