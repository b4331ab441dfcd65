"""The trainings of one experiment: which go on side by side, their curves and checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from src.checkpoint import Training
from src.config import TrainingConfig
from src.experiment import Context
from src.training.ensemble import Observer, in_common
from src.training.loop import Objective, Outcome, end_to_end
from src.training.together import train_together

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Trainee(Generic[Network]):
    """A network and how it is to be trained.

    Attributes:
        network: what is trained, in place.
        name: of its curves.
        seed: of the order of the images, the same for every network.
        objective: what is minimised.
        on_step: called with the steps done after every step, to measure along the way; what it returns, unless None, the outcome has in
            `seen`. It must keep nothing itself: a training that goes on from a checkpoint calls it for the steps that are left.
        config: the training, where it is not the configured one.
    """

    network: Network
    name: str
    seed: int
    objective: Objective = end_to_end
    on_step: Callable[[int], object] | None = None
    config: TrainingConfig | None = None


def train_all(context: Context, trainees: Sequence[Trainee[Any]]) -> list[Outcome]:
    """Train networks in place and log their curves; of those alike, as many at once as `training.ensemble` says.

    Args:
        context: what the experiment measures with.
        trainees: alike are those that differ in values, names, seeds, learning rates and optimisers alone.

    Returns: how each training ended, in the order of the trainees.
    """
    kinds: list[object] = []
    groups: list[list[int]] = []
    for place, trainee in enumerate(trainees):
        kind = trainee.objective, in_common(trainee.network, trainee.config or context.config.training)
        if kind not in kinds:
            kinds.append(kind)
            groups.append([])
        groups[kinds.index(kind)].append(place)
    outcomes: dict[int, Outcome] = {}
    for group in groups:
        outcomes |= zip(group, _train_alike(context, [trainees[place] for place in group]), strict=True)
    return [outcomes[place] for place in range(len(trainees))]


def _train_alike(context: Context, trainees: Sequence[Trainee[Any]]) -> list[Outcome]:
    networks, configs = [each.network for each in trainees], [each.config or context.config.training for each in trainees]
    bar = context.bars.add_task(trainees[0].name, total=len(trainees) * context.steps(configs[0]))

    def observer(look: Callable[[int], object] | None) -> Observer:
        def stepped(step: int, total: int) -> object:
            context.bars.advance(bar)
            return look and look(step)

        return stepped

    checkpoint, done = context.checkpoint, context.tally["trainings"]
    keepers = (lambda index: Training(checkpoint, done + index)) if checkpoint else None
    orders = [context.generator("order", each.seed) for each in trainees]
    observers = [observer(each.on_step) for each in trainees]
    outcomes = train_together(networks, context.data, configs, orders, trainees[0].objective, observers, keepers)
    context.bars.remove_task(bar)
    for each, outcome in zip(trainees, outcomes, strict=True):
        context.record(each.name, outcome)
    return outcomes
