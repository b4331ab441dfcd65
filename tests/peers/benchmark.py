"""Speed of the whole of `certify` at its defaults, as a ratio to what a user would otherwise write, both timed in one run.

    python -m tests.peers.benchmark [--csv FILE] [--only NAME]

Prints a table, with one thread and with all. Both sides answer in double precision; `error` is the largest relative difference of σ₁.
The convolution is a model in single precision, as models are: certify takes its first steps in that, and its answer from double precision.
The last case has no peer: it compares the time and memory of two depths, which are in the ratio of 4 where they grow linearly.
"""

import argparse
import copy
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from src.certificate import Certificate, certify
from src.config import ModelConfig
from src.models import build
from tests.peers.others import jacobians, norm_by_curvlinops

SAMPLES = 32
T = TypeVar("T")
RESNET_20 = {"family": "cifar", "depth": 20, "width": 16, "norm": "batch", "skip": "original", "activation": "relu"}


@dataclass(frozen=True)
class Timing:
    """One comparison; seconds."""

    case: str
    peer: str
    certify_s: float
    peer_s: float
    ratio: float
    error: float
    threads: int = field(default_factory=torch.get_num_threads)


def mlp(width: int, depth: int, activation: type[nn.Module]) -> nn.Sequential:
    """A random MLP on 28×28 images with 10 classes."""
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(width, width), activation()) for _ in range(depth - 2)]
    first = nn.Sequential(nn.Flatten(), nn.Linear(784, width), activation())
    return nn.Sequential(first, *hidden, nn.Linear(width, 10)).double().requires_grad_(False)


def batch(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Gaussian images and labels of ten classes."""
    draws = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=draws, dtype=torch.float64), torch.randint(10, (count,), generator=draws)


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """The seconds an action took, and its result."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def norms(certificate: Certificate) -> np.ndarray:
    """σ₁, samples × stages."""
    return certificate.layers.pivot(index="sample", columns="index", values="norm").to_numpy()


def compare(case: str, ours: Callable[[], Certificate], peer: str, theirs: Callable[[], np.ndarray], share: float = 1.0) -> Timing:
    """Time ours before and after theirs, whose σ₁ are samples × stages; theirs may be a share of the work."""
    first, certificate = timed(ours)
    peer_s, expected = timed(theirs)
    second, _ = timed(ours)
    ours_s, peer_s = (first + second) / 2, peer_s / share
    error = np.abs(norms(certificate)[: len(expected)] / expected - 1).max()
    return Timing(case, peer, ours_s, peer_s, peer_s / ours_s, float(error))


def dense(activation: type[nn.Module]) -> Iterator[Timing]:
    """σ₁, σ_min and rank of an MLP against `vmap(jacrev)` and svdvals; its full spectra against svdvals alone."""
    model, (inputs, labels) = mlp(256, 16, activation), batch(SAMPLES, 1, 28, 28)
    states = [inputs]
    with torch.no_grad():
        for stage in model:
            states.append(stage(states[-1]))
    written = [jacobians(stage, state) for stage, state in zip(model, states[:-1], strict=True)]

    def spectra() -> np.ndarray:
        return np.stack([torch.linalg.svdvals(J)[:, 0].numpy() for J in written], axis=1)

    def by_hand() -> np.ndarray:
        pairs = zip(model, states[:-1], strict=True)
        return np.stack([torch.linalg.svdvals(jacobians(stage, state))[:, 0].numpy() for stage, state in pairs], axis=1)

    name = f"{activation.__name__} MLP, 16 × 256"
    yield compare(name, lambda: certify(model, inputs, labels), "vmap(jacrev) + svdvals", by_hand)
    yield compare(f"{name}, full spectra", lambda: certify(model, inputs, labels, method="exact"), "svdvals alone", spectra)


def convolution() -> Iterator[Timing]:
    """A convolution of 64 channels with ReLU at 32×32 against curvlinops' operator with scipy's svds at tol 1e-3."""
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).double().requires_grad_(False)
    inputs, labels = batch(SAMPLES, 64, 32, 32)
    few = 4

    def theirs() -> np.ndarray:
        return np.array([[norm_by_curvlinops(stage, x, 1e-3)] for x in inputs[:few]])

    single = nn.Sequential(copy.deepcopy(stage)).float()

    def ours() -> Certificate:
        return certify(single, inputs.float(), labels, loss=lambda outputs, _: outputs.square().sum())

    yield compare("64-channel convolution + ReLU, 32×32", ours, "curvlinops + svds, tol 1e-3", theirs, few / SAMPLES)


def resnet() -> Iterator[Timing]:
    """A whole ResNet-20 at 16 images; the peer is the limit of 90 seconds."""
    config = ModelConfig(**RESNET_20, init="gaussian", weight_var=2.0, bias_var=0.0, branch_scale=1.0)
    model, (inputs, labels) = build(config, (3, 32, 32), 10, torch.Generator().manual_seed(0)), batch(16, 3, 32, 32)
    seconds, _ = timed(lambda: certify(model, inputs.float(), labels))
    yield Timing("ResNet-20, 16 images", "a limit of 90 s", seconds, 90.0, 90 / seconds, float("nan"))


def depth() -> Iterator[Timing]:
    """1,000 layers of width 128 against 250."""
    (inputs, labels) = batch(SAMPLES, 1, 28, 28)
    found = []
    for layers in (250, 1000):
        seconds, _ = timed(lambda layers=layers: certify(mlp(128, layers, nn.Tanh), inputs, labels))
        found.append((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))
    (short, before), (long, after) = found
    case, peer = f"1,000 layers of 128; peak {after:.2f} GiB", f"250 layers; peak {before:.2f} GiB"
    yield Timing(case, peer, long, short, short / long, float("nan"))


CASES: dict[str, Callable[[], Iterator[Timing]]] = {
    "tanh": lambda: dense(nn.Tanh),
    "relu": lambda: dense(nn.ReLU),
    "convolution": convolution,
    "resnet": resnet,
    "depth": depth,
}


def main() -> None:
    """Print the table; write it as CSV."""
    parser = argparse.ArgumentParser(description="The speed of certify.")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--only", choices=CASES, help="one case alone")
    options = parser.parse_args()
    certify(mlp(8, 3, nn.Tanh), *batch(2, 1, 28, 28))  # what is imported late
    timings = []
    for threads in dict.fromkeys([1, os.cpu_count() or 1]):
        torch.set_num_threads(threads)
        for name in [options.only] if options.only else CASES:
            timings += CASES[name]()
    table = Table(title="certify against its peers; ratio = peer's time / certify's")
    for column in ("case", "threads", "certify, s", "peer", "peer, s", "ratio", "error of σ₁"):
        table.add_column(column, justify="left" if column in ("case", "peer") else "right")
    for t in timings:
        numbers = f"{t.certify_s:.2f}", t.peer, f"{t.peer_s:.2f}", f"{t.ratio:.2f}", f"{t.error:.1e}"
        table.add_row(t.case, str(t.threads), *numbers)
    Console(width=150).print(table)
    if options.csv:
        pd.DataFrame([asdict(timing) for timing in timings]).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
