"""What an experiment is about to do: networks, training steps, and roughly how long they take here."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from src.certificate import certify
from src.config import Config, ModelConfig
from src.data.load import Data
from src.models import build
from src.seeds import generator
from src.training.loop import end_to_end


@dataclass(frozen=True)
class Work:
    """Networks of one architecture: how many are drawn, whether their Jacobians are written out, and the steps that each is trained."""

    model: ModelConfig
    networks: int
    steps: int = 0
    certified: bool = False


def networks_and_steps(plan: Sequence[Work]) -> tuple[int, int]:
    """How many random networks are drawn, and how many training steps are done over all of them."""
    return sum(work.networks for work in plan), sum(work.networks * work.steps for work in plan)


def describe(plan: Sequence[Work], config: Config, data: Data) -> str:
    """The plan in one line, with a rough estimate of its time on this machine."""
    networks, steps = networks_and_steps(plan)
    seconds = estimated_seconds(plan, config, data)
    duration = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
    return f"plan: {networks:,} networks, {steps:,} training steps, very roughly {duration}"


def estimated_seconds(plan: Sequence[Work], config: Config, data: Data) -> float:
    """Σ networks · depth · (t_network + steps · t_step), t a layer.

    Both are timed here, on the shallowest network of each kind: t_step on one batch, t_network on one image set of `grid.samples`, by a
    certificate where Jacobians are written out, else by a pass forwards and backwards.

    Args:
        plan: the networks.
        config: the run's.
        data: what the networks are built for.
    """
    kinds: dict[tuple[object, ...], list[Work]] = {}
    for work in plan:
        kinds.setdefault((work.model.family, work.model.width, work.model.norm, work.certified), []).append(work)
    seconds = 0.0
    for works in kinds.values():
        smallest = min((work.model for work in works), key=lambda model: model.depth)
        network = build(smallest, data.shape, data.classes, generator(config.seed, "plan")).to(data.mean.device)
        batch = data.train.images[: config.training.batch_size], data.train.labels[: config.training.batch_size]
        few = data.train.images[: config.grid.samples], data.train.labels[: config.grid.samples]
        step = _timed(partial(_pass, network, data, *batch)) / smallest.depth
        measured = _timed(partial(_certify, network, data, *few)) / smallest.depth if works[0].certified else step
        seconds += sum(work.networks * work.model.depth * (measured + work.steps * step) for work in works)
    return seconds


def _pass(network: nn.Module, data: Data, images: UInt8[Tensor, "n c h w"], labels: Int64[Tensor, " n"]) -> None:
    end_to_end(network, data.standardise(images), labels).backward()


def _certify(network: nn.Module, data: Data, images: UInt8[Tensor, "n c h w"], labels: Int64[Tensor, " n"]) -> None:
    certify(network, data.standardise(images), labels)


def _timed(action: Callable[[], None]) -> float:
    """The seconds of the second of two calls: the first warms up."""
    action()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
