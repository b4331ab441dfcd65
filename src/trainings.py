"""Trainings of one experiment that go on side by side."""

from collections.abc import Callable, Sequence

from torch import nn

from src.checkpoint import Training
from src.config import TrainingConfig
from src.experiment import Context
from src.training.ensemble import Observer
from src.training.loop import Objective, Outcome, end_to_end
from src.training.together import train_together


def train_all(
    context: Context,
    networks: Sequence[nn.Module],
    names: Sequence[str],
    seeds: Sequence[int],
    objective: Objective = end_to_end,
    config: TrainingConfig | None = None,
    on_step: Sequence[Callable[[int], object]] | None = None,
) -> list[Outcome]:
    """Train networks in place as `context.train` would one by one, as many at once as `training.ensemble` says; log their curves.

    Args:
        context: what the experiment measures with.
        networks: what is trained.
        names: of their curves.
        seeds: of the orders of the images.
        objective: what each minimises.
        config: the training, where it is not the configured one.
        on_step: one a network, as `context.train` takes it.
    """
    training = config or context.config.training
    bar = context.bars.add_task(names[0], total=len(networks) * context.steps(training))

    def observer(look: Callable[[int], object] | None) -> Observer:
        def stepped(step: int, total: int) -> object:
            context.bars.advance(bar)
            return look and look(step)

        return stepped

    checkpoint, done = context.checkpoint, context.tally["trainings"]
    keepers = (lambda index: Training(checkpoint, done + index)) if checkpoint else None
    orders = [context.generator("order", seed) for seed in seeds]
    observers = [observer(on_step[index] if on_step else None) for index in range(len(networks))]
    outcomes = train_together(networks, context.data, [training] * len(networks), orders, objective, observers, keepers)
    context.bars.remove_task(bar)
    for name, outcome in zip(names, outcomes, strict=True):
        context.record(name, outcome)
    return outcomes
