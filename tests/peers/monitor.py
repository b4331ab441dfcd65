"""Cost of `LockMonitor`: the share of the training's time that it takes, in one run.

    python -m tests.peers.monitor [--steps N]

Trains on MNIST and CIFAR-10 under DATA_ROOT (else data/), one thread. Steps and measurements of one run are timed apart, by the clock
and by the processor's time, which other work on the machine does not lengthen; the share is that of the measurements at k = 100.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from src.config import DataConfig, ModelConfig
from src.data.load import load
from src.models import build
from src.monitor import LockMonitor

EVERY = 100
BATCH = 128
PROBE = 16
SHARED = {"activation": "relu", "init": "gaussian", "weight_var": 2.0, "bias_var": 0.0, "branch_scale": 1.0}
CASES = {
    # as in conf/model/mlp.yaml
    "MLP, 16 layers of width 128": ("mnist", {"family": "mlp", "depth": 16, "width": 128, "norm": "none", "skip": "none"}),
    # small enough that a step is mostly calls, as a measurement is
    "MLP, 10 layers of width 64": ("mnist", {"family": "mlp", "depth": 10, "width": 64, "norm": "none", "skip": "none"}),
    "MLP, 16 layers of width 128, BatchNorm": ("mnist", {"family": "mlp", "depth": 16, "width": 128, "norm": "batch", "skip": "none"}),
    "ResNet-20": ("cifar10", {"family": "cifar", "depth": 20, "width": 16, "norm": "batch", "skip": "original"}),
}


class Watch:
    """Adds up the clock's and the processor's time of what it is given to run."""

    def __init__(self) -> None:
        self.runs, self.clock, self.processor = 0, 0.0, 0.0

    def __call__(self, action: Callable[[], object]) -> None:
        clock, processor = time.perf_counter(), time.process_time()
        action()
        self.clock += time.perf_counter() - clock
        self.processor += time.process_time() - processor
        self.runs += 1


def train(name: str, settings: dict[str, object], steps: int) -> tuple[Watch, Watch]:
    """The times of a step and of a measurement, of one training."""
    data = load(DataConfig(name, os.environ.get("DATA_ROOT", "data"), [], "none", BATCH * EVERY, PROBE), torch.device("cpu"))
    images, labels = data.standardise(data.train.images), data.train.labels
    model = build(ModelConfig(**SHARED | settings), data.shape, 10, torch.Generator().manual_seed(0)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    stepping, measuring = Watch(), Watch()
    with LockMonitor(model, data.standardise(data.test.images), data.test.labels, every=1) as monitor:
        for count in range(steps):
            batch = torch.arange(BATCH) + BATCH * (count % EVERY)
            stepping(lambda batch=batch: step(images[batch], labels[batch]))
            if (count + 1) % EVERY == 0:
                measuring(monitor.step)
    return stepping, measuring


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The cost of LockMonitor.")
    parser.add_argument("--steps", type=int, default=500, help=f"steps of each training, at least {EVERY}")
    steps = max(parser.parse_args().steps, EVERY)
    torch.set_num_threads(1)
    table = Table(title=f"LockMonitor at k = {EVERY}, batch {BATCH}, probe of {PROBE} images")
    for column in ("model", "step, ms", "measurement, ms", "in steps", "share of the step time", "share, processor"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for case, (data, settings) in CASES.items():
        stepping, measuring = train(data, settings, steps)
        step, measurement = stepping.processor / stepping.runs, measuring.processor / measuring.runs
        table.add_row(
            case,
            f"{1e3 * step:.2f}",
            f"{1e3 * measurement:.2f}",
            f"{measurement / step:.2f}",
            f"{measuring.clock / stepping.clock / (measuring.runs * EVERY / stepping.runs):.2%}",
            f"{measurement / step / EVERY:.2%}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
