"""How long sweeps take beside their runs: `python -m tests.sweep.benchmark`.

Wanted: to plan 10,000 runs in 10 s, to find that 1,000 finished ones need no job in 5 s, to collect 10,000 run folders into one table in
20 s, and a run's overhead over its bare work in 5 s, half of them imports: a job imports once, before its first run.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from src.config import register_resolvers
from src.results import sha256
from src.sweep.folder import Sweep
from src.sweep.plan import plan

REAL = ("experiment=vanishing_products", "data=digits", "scale=smoke", "tracker=none")


def main() -> None:
    """Print a line a measurement."""
    register_resolvers()
    with TemporaryDirectory() as folder:
        place = Path(folder)
        into = ("data.mirrors=[]", "cluster=slurm", f"results_dir={place}/none")
        of_48 = ["experiment=glob(*)", "data=digits,mnist", "scale=smoke,quick", "seed=range(208)", *into]
        tell("plan 10,000 runs of 48 configs", 10, lambda: Sweep.create(plan(of_48)))
        rates = "training.lr=0.1,0.03,0.01,0.003,0.001"
        of_180 = ["experiment=glob(*)", "data=digits,mnist,cifar10", "scale=quick", rates, "seed=range(56)", *into]
        tell("plan 10,000 runs of 180 configs", 10, lambda: Sweep.create(plan(of_180)))

        few = ("-m", *REAL, "seed=range(4)", "cluster=local", f"results_dir={place}/few")
        python("src.run", *few, BACKLOCK_AT_ONCE="1")
        first, *others = overheads(*Path(place / "few/.sweep").iterdir())
        other = sum(others) / len(others)
        shared = plan([*REAL, "cluster=slurm"]).configs[0].cluster
        assert shared is not None
        means = ", ".join(f"{(first + (runs - 1) * other) / runs:.1f} s at {scale}" for scale, runs in shared.runs.items())
        print(f"overhead of a run over its bare work: of a job's first {first:.1f} s, of its others {other:.1f} s (wanted: under 5 s)")
        print(f"and in the mean over the runs of a SLURM job: {means}", flush=True)
        source = next((place / "few").glob("*/*/*/seed0-*"))

        many = [*REAL, "seed=range(10000)", "cluster=local", f"results_dir={place}/many"]
        sweep = Sweep.create(plan(many))
        for run in sweep.runs:
            copied(source, sweep.folder(run), root_seed=run.seed, run=run.id)
        command = ("src.sweep", "collect", str(sweep.path))
        tell("collect 10,000 folders, all told", 20, lambda: python(*command))
        thousand = ("src.run", "-m", *REAL, "seed=range(1000)", "cluster=local", f"results_dir={place}/many")
        tell("resubmit 1,000 finished runs, all told", 5, lambda: python(*thousand))


def tell(what: str, wanted: float, action: Callable[[], object]) -> None:
    """Print how long something takes."""
    started = time.perf_counter()
    action()
    print(f"{what}: {time.perf_counter() - started:.1f} s (wanted: under {wanted:.0f} s)", flush=True)


def overheads(folder: Path) -> list[float]:
    """The seconds that each run of a sweep of one job took, in order, beside those that it measured and judged."""
    sweep = Sweep(folder)
    attempts = sorted((attempt.told() for (attempt,) in sweep.attempts().values()), key=lambda told: told["started"])
    bare = [json.loads((sweep.folder(run) / "provenance.json").read_text())["wall_time_s"] for run in sweep.runs]
    return [told["ended"] - told["started"] - work for told, work in zip(attempts, bare, strict=True)]


def copied(source: Path, folder: Path, **stamp: object) -> None:
    """A copy of a run folder, its rows and what is said of them those of another run."""
    shutil.copytree(source, folder)
    rows, provenance = folder / "rows.parquet", folder / "provenance.json"
    table = pq.read_table(rows)
    for column, value in stamp.items():
        place = table.column_names.index(column)
        table = table.set_column(place, table.field(place), pa.array([value] * len(table), table.field(place).type))
    pq.write_table(table, rows, compression="zstd")
    told = json.loads(provenance.read_text())
    provenance.write_text(json.dumps({**told, "sha256": {**told["sha256"], rows.name: sha256(rows)}}))


def python(module: str, *arguments: str, **environment: str) -> None:
    """Run a module in a process of its own."""
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})


if __name__ == "__main__":
    main()
