"""What an experiment is about to do: networks, training steps, and roughly how long they take here."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from src.config import Config, ModelConfig
from src.data.load import Data
from src.models import build
from src.seeds import generator
from src.training.loop import EVALUATED, end_to_end


@dataclass(frozen=True)
class Work:
    """Networks of one architecture.

    Args:
        model: the architecture.
        networks: how many are drawn.
        steps: that each is trained.
        measuring: what else is done to each, to be timed on one; None: a pass forwards and backwards.
    """

    model: ModelConfig
    networks: int
    steps: int = 0
    measuring: Callable[[nn.Sequential], object] | None = None


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
    """Σ networks · t_step · (measuring + steps + evaluations, in units of a step), t_step linear in the depth.

    t_step is timed here, on one batch, for the shallowest and the deepest network of each kind, and what is measured for the shallowest. Of
    a training step, a third is the pass forwards that an evaluation takes.

    Args:
        plan: the networks.
        config: the run's.
        data: what the networks are built for.
    """
    size, images = config.training.batch_size, len(data.train)
    evaluation = (len(data.test) + min(EVALUATED, images)) / size / 3
    kinds: dict[tuple[object, ...], list[Work]] = {}
    for work in plan:
        kinds.setdefault((work.model.family, work.model.width, work.model.norm, work.measuring), []).append(work)
    seconds = 0.0
    for works in kinds.values():
        models = {work.model.depth: work.model for work in works}
        ends = sorted({min(models), max(models)})
        networks = [build(models[depth], data.shape, data.classes, generator(config.seed, "plan")).to(data.mean.device) for depth in ends]
        # the lesser of two: one may be disturbed
        steps = [min(_timed(partial(_pass, network, data, size)) for _ in range(2)) for network in networks]
        measuring = works[0].measuring
        measured = _timed(partial(measuring, networks[0])) / steps[0] if measuring else 1
        for work in works:
            step = float(np.interp(work.model.depth, ends, steps))
            evaluations = 2 + work.steps // (images // size) if work.steps else 0
            seconds += work.networks * step * (measured + work.steps + evaluations * evaluation)
    return seconds


def _pass(network: nn.Module, data: Data, size: int) -> None:
    end_to_end(network, data.standardise(data.train.images[:size]), data.train.labels[:size]).backward()


def _timed(action: Callable[[], object]) -> float:
    """The seconds of the second of two calls: the first warms up."""
    action()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
