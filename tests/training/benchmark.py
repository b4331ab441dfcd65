"""The speed of training, as ratios within one run: the contenders take turns, and their medians are compared.

    python -m tests.training.benchmark [--csv FILE] [--only CASE] [--turns N] [--threads N]

Cases, MNIST and batches of 128 throughout:
    seeds   ten seeds of the 10-layer width-64 tanh MLP: the ensemble against our loop, the same written by hand over tensors in memory, and
            a plain torchvision DataLoader loop.
    widths  where ensembles pay here: dense and convolutional nets against our loop.

A rate is of networks × steps a second, evaluations left out; `of matmul` is the share of the rate of large matrix products, measured
between the turns, that a contender's own products reach.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from src.config import DataConfig, ModelConfig, TrainingConfig
from src.data.files import data_root
from src.data.load import Data, Split, load
from src.models import build
from src.training.ensemble import train_ensemble
from src.training.loop import Outcome, lasting, train

SEEDS = 10
BATCH = 128
STEPS = 50  # a turn
MLP = ModelConfig("mlp", 10, 64, "tanh", "gaussian", 1.5, 0.05, "none", "none", 1.0)
SGD = TrainingConfig("sgd", 0.01, 0.9, 0.0, BATCH, 1, None, "constant", "float32")
MNIST = DataConfig("mnist", os.environ.get("DATA_ROOT", "data"), [], "none", None, None)
Contender = Callable[[], float]  # a turn: its rate


@dataclass(frozen=True)
class Timing:
    """One contender: networks × steps a second; `ratio` is how many times as fast the ensemble is."""

    case: str
    contender: str
    threads: int
    rate: float
    ratio: float
    of_matmul: float


def networks(model: ModelConfig, data: Data, count: int) -> list[nn.Sequential]:
    """The first random networks of an architecture."""
    return [build(model, data.shape, data.classes, torch.Generator().manual_seed(seed)) for seed in range(count)]


def rate(outcomes: list[Outcome]) -> float:
    """Of trainings that went on side by side or one after the other."""
    return sum(outcome.steps for outcome in outcomes) / sum(outcome.seconds for outcome in outcomes)


def ensemble(model: ModelConfig, data: Data, count: int, steps: int) -> float:
    """All networks at once."""
    config, orders = lasting(SGD, steps, len(data.train)), [torch.Generator().manual_seed(seed) for seed in range(count)]
    return rate(train_ensemble(networks(model, data, count), data, [config] * count, orders))


def loop(model: ModelConfig, data: Data, count: int, steps: int) -> float:
    """One after the other by our loop."""
    config = lasting(SGD, steps, len(data.train))
    return rate([train(net, data, config, torch.Generator().manual_seed(seed)) for seed, net in enumerate(networks(model, data, count))])


def by_hand(batches: Callable[[], Iterator[tuple[Tensor, Tensor]]], model: ModelConfig, data: Data, count: int, steps: int) -> float:
    """One after the other by a loop as one writes it, from its first batch to its last."""
    seconds = 0.0
    for net in networks(model, data, count):
        optimizer = torch.optim.SGD(net.parameters(), SGD.lr, momentum=SGD.momentum, fused=True)
        left = islice(batches(), steps + 1)
        next(left)  # starts what loads
        started = time.perf_counter()
        for images, labels in left:
            loss = cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - started
    return count * steps / seconds


def in_memory(images: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of an epoch of tensors."""
    for batch in torch.randperm(len(labels)).split(BATCH):
        yield prepare(images[batch]), labels[batch]


def from_loader(workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of an epoch, as torchvision's examples load them."""
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    images = datasets.MNIST(data_root(MNIST), transform=transforms.Compose(steps))
    return iter(DataLoader(images, BATCH, shuffle=True, num_workers=workers))


def products(model: ModelConfig, data: Data) -> float:
    """Floating-point operations of a dense network's matrix products in one step: forwards, ∇W, and back to all inputs but the first."""
    sizes = [layer.weight.numel() for layer in networks(model, data, 1)[0].modules() if isinstance(layer, nn.Linear)]
    return 2.0 * BATCH * (3 * sum(sizes) - sizes[0])


def matmul() -> float:
    """Floating-point operations a second of products of 1024×1024 matrices."""
    a, started = torch.randn(1024, 1024), time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 1024.0**3 / (time.perf_counter() - started)


def batched_matmul(model: ModelConfig, data: Data) -> float:
    """Networks × steps a second of the matrix products of the ensemble's steps alone, as batched products."""
    weights = [
        layer.weight.expand(SEEDS, -1, -1).contiguous() for layer in networks(model, data, 1)[0].modules() if isinstance(layer, nn.Linear)
    ]
    pairs = [(torch.randn(SEEDS, BATCH, W.shape[2]), torch.randn(SEEDS, BATCH, W.shape[1])) for W in weights]
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(20):
            for layer, (W, (x, g)) in enumerate(zip(weights, pairs, strict=True)):
                W @ x.mT
                g.mT @ x
                if layer:
                    g @ W
    return 20 * SEEDS / (time.perf_counter() - started)


def take_turns(case: str, contenders: Mapping[str, Contender], turns: int, work: float) -> Iterator[Timing]:
    """The median rate of each, and those of the large products between them.

    Args:
        case: what is compared.
        contenders: by name, the ensemble first.
        turns: of each; one more warms up.
        work: floating-point operations of a network's step.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = []
    for _ in range(turns + 1):
        for name, contender in contenders.items():
            found[name].append(contender())
            peaks.append(matmul())
    medians = {name: statistics.median(rates[1:]) for name, rates in found.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        yield Timing(case, name, torch.get_num_threads(), median, first / median, work * median / statistics.median(peaks))


def seeds(data: Data, turns: int) -> Iterator[Timing]:
    """The ensemble against everything else."""
    floats, labels = data.standardise(data.train.images), data.train.labels
    hand = partial(by_hand, model=MLP, data=data, steps=STEPS)
    contenders: dict[str, Contender] = {
        "ensemble": partial(ensemble, MLP, data, SEEDS, STEPS),
        "its batched products alone": partial(batched_matmul, MLP, data),
        "our loop": partial(loop, MLP, data, 3, STEPS),
        "by hand, bytes in memory": partial(hand, lambda: in_memory(data.train.images, labels, data.standardise), count=3),
        "by hand, floats in memory": partial(hand, lambda: in_memory(floats, labels, lambda images: images), count=3),
        "DataLoader": partial(hand, lambda: from_loader(0), count=1),
        "DataLoader, 2 workers": partial(hand, lambda: from_loader(2), count=1),
    }
    yield from take_turns("10 seeds of MLP 10 × 64", contenders, turns, products(MLP, data))


def widths(data: Data, turns: int) -> Iterator[Timing]:
    """Ensembles of many kinds against our loop, over one short epoch."""
    steps, short = 10, replace(data, train=Split(data.train.images[: 10 * BATCH], data.train.labels[: 10 * BATCH]))
    shapes = [(10, 16), (10, 64), (50, 64), (10, 128), (10, 256), (10, 512)]
    dense = {f"MLP {depth} × {width}": replace(MLP, depth=depth, width=width) for depth, width in shapes}
    normalised = {f"MLP 10 × 64, {norm} norm": replace(MLP, norm=norm) for norm in ("batch", "layer")}
    settings = [(SEEDS, name, model) for name, model in {**dense, **normalised}.items()]
    settings += [(count, "MLP 10 × 64", MLP) for count in (2, 3, 4, 30)]
    for count, name, model in settings:
        contenders = {"ensemble": partial(ensemble, model, short, count, steps), "our loop": partial(loop, model, short, 3, steps)}
        yield from take_turns(f"{count} of {name}", contenders, turns, products(model, data))
    for family in ("vgg", "cifar"):
        model = replace(MLP, family=family, depth=8, width=8, norm="batch")
        contenders = {"ensemble": partial(ensemble, model, short, 4, 2), "our loop": partial(loop, model, short, 1, 2)}
        yield from take_turns(f"4 of {family}, 8 channels", contenders, turns, float("nan"))


CASES = {"seeds": seeds, "widths": widths}


def main() -> None:
    """Print the table; write it as CSV."""
    parser = argparse.ArgumentParser(description="The speed of training.")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--only", choices=CASES, help="one case alone")
    parser.add_argument("--turns", type=int, default=5, help="of each contender")
    parser.add_argument("--threads", type=int, nargs="+", default=list(dict.fromkeys([1, os.cpu_count() or 1])))
    options = parser.parse_args()
    data = load(MNIST, torch.device("cpu"))
    few = replace(data, test=Split(data.test.images[:100], data.test.labels[:100]))  # evaluations aren't timed
    timings = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in [options.only] if options.only else CASES:
            timings += CASES[name](few, options.turns)
    table = Table(title="networks × steps a second; ratio = the ensemble's rate over the contender's")
    for column in ("case", "threads", "contender", "rate", "ratio", "of matmul"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for t in timings:
        table.add_row(t.case, str(t.threads), t.contender, f"{t.rate:.0f}", f"{t.ratio:.2f}", f"{t.of_matmul:.2f}")
    Console(width=120).print(table)
    if options.csv:
        pd.DataFrame([asdict(timing) for timing in timings]).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
