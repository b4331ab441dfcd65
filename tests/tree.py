"""A copy of the code with the tiny experiment among the others, for processes that are started from it: it does as it is ordered."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from src.seeds import generator
from src.sweep.folder import Attempt, Sweep
from tests.tiny import YAML

ROOT = Path(__file__).resolve().parent.parent
COUNT = 8  # numbers that a run measures
LONG = os.environ.get("BACKLOCK_SLURM_LONG") == "1"  # whether tests may take a quarter of an hour
PATIENCE = 1800.0 if LONG else 240.0  # seconds after which what a test waits for won't come

EXPERIMENT = '''\
"""The tiny experiment, which does what the file of its seed's name orders."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import torch

from src.statistics import exactly
from src.verdict import cell, judge_forms

QUANTITIES = {"number": "a random number, no unit"}


def check(config, data):
    pass


def plan(context):
    return []


def order(seed):
    with suppress(OSError):
        return Path(os.environ["ORDERS"], str(seed)).read_text()


def mark(what, context):
    """Leave a file that tells which GPUs are seen."""
    file = Path(os.environ["ORDERS"], f"{what}-{context.config.seed}-{os.getpid()}")
    file.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def measure(context):
    mark("began", context)
    return context.rows(first, second)


def numbers(context):
    found = torch.randn(context.config.grid.samples, generator=context.generator("numbers"), dtype=torch.float64)
    return [{"quantity": "number", "value": float(number), "sample": sample} for sample, number in enumerate(found)]


def first(context):
    mark("measured", context)
    return numbers(context)[:4]


def second(context):
    seed = context.config.seed
    mark("reached", context)
    if order(seed) == "raise":
        raise ZeroDivisionError("by order")
    if order(seed) == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if order(seed) == "linger":
        time.sleep(1)
    while order(seed) == "hold":
        time.sleep(0.05)
    return numbers(context)[4:]


def judge(rows, criteria):
    return judge_forms("tiny", criteria, {"positive": pd.DataFrame([cell(exactly(rows["value"].max()), kind="largest")])})
'''

FIGURE = '''\
"""The tiny experiment's figure."""

from matplotlib.figure import Figure


def draw(rows):
    return Figure(figsize=(1, 1), dpi=50)
'''


def plant(folder: Path) -> Path:
    """Copy the code into a folder, and add the tiny experiment; checkpoints are written at once."""
    for part in ("src", "conf", "experiments", "paper_figures"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("reference", "output"))
    (folder / "conf/experiment/tiny.yaml").write_text(YAML, encoding="utf-8")
    (folder / "experiments/tiny.py").write_text(EXPERIMENT, encoding="utf-8")
    (folder / "paper_figures/tiny.py").write_text(FIGURE, encoding="utf-8")
    checkpoint = folder / "src/checkpoint.py"
    checkpoint.write_text(checkpoint.read_text("utf-8").replace("EVERY = 30.0", "EVERY = 0.0"), encoding="utf-8")
    (folder / "orders").mkdir()
    return folder


def command(module: str, *arguments: str) -> list[str]:
    """A command of the copy, to be started in it."""
    return [sys.executable, "-m", module, *arguments]


def expected(seed: int) -> list[float]:
    """What an undisturbed run of a seed measures."""
    return torch.randn(COUNT, generator=generator(seed, "numbers"), dtype=torch.float64).tolist()


def measured(results: Path) -> dict[int, list[float]]:
    """What the finished runs under a results folder measured, by seed; each must be there once."""
    found = {}
    for file in results.glob("tiny/digits/smoke/seed*/rows.parquet"):
        rows = pd.read_parquet(file)
        (seed,) = rows["root_seed"].unique()
        assert seed not in found
        found[int(seed)] = rows["value"].tolist()
    return found


@dataclass
class User:
    """Somebody who works in the copy: starts commands, gives orders to the runs, and looks at what they left."""

    tree: Path
    environment: Mapping[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a command; what it prints is read at its end."""
        environment = {**self.environment, "ORDERS": str(self.tree / "orders")}
        # what the first run compiles serves all
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        process = subprocess.Popen(
            command(module, *arguments), cwd=self.tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.started.append(process)
        return process

    def call(self, module: str, *arguments: str) -> tuple[int, str]:
        """The exit code of a command and what it prints."""
        return self.ended(self.start(module, *arguments))

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """The exit code of a command that was started and what it printed."""
        out, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, out

    def order(self, what: str, *seeds: int) -> None:
        """What the runs of some seeds shall do: raise, kill, hold, linger; or go on."""
        for seed in seeds:
            file = self.tree / f"orders/{seed}"
            file.write_text(what) if what != "go on" else file.unlink(missing_ok=True)

    def began(self, seed: int, what: str = "began") -> int:
        """How often the run of a seed began to measure; or `measured` its first part, or `reached` its second, which obeys."""
        return len(list((self.tree / "orders").glob(f"{what}-{seed}-*")))

    def gpus(self, seed: int) -> str:
        """The GPUs that the one run of a seed sees, as CUDA is told of them."""
        (file,) = (self.tree / "orders").glob(f"reached-{seed}-*")
        return file.read_text()

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until something is so; what the commands printed is told when it isn't for too long."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"not in time: {what}"
            threading.Event().wait(0.1)

    def sweep(self) -> Sweep:
        """The only sweep."""
        (path,) = (self.tree / "results/.sweep").iterdir()
        return Sweep(path)

    def attempts(self, seed: int) -> list[Attempt]:
        """The attempts at the run of a seed."""
        sweep = self.sweep()
        (run,) = (run for run in sweep.runs if run.seed == seed)
        return sweep.attempts().get(run.id, [])

    def leave(self) -> None:
        """End what was started."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()  # a job that lives on may hold its other end
