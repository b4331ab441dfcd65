"""The rules by which greedy_layerwise trains a chain: their turns, what a training takes, and the learning rate that suits each best."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Literal, get_args

import numpy as np
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from src.config import Config, ModelConfig, TrainingConfig
from src.experiment import Context
from src.models.layers import Layers
from src.training.local import Blockwise, LocalLoss, OneBlock, all_blocks, blockwise, end_to_end_block
from src.training.loop import Objective
from src.trainings import Trainee, train_all

Loss = LocalLoss | Literal["backprop"]
Schedule = Literal["simultaneous", "sequential"]
Optimizer = Literal["sgd", "adam"]
LOCAL: tuple[LocalLoss, ...] = get_args(LocalLoss)
RULE = ["loss", "block", "hidden", "schedule"]


@dataclass(frozen=True)
class Rule:
    """How a chain is trained: columns of every row.

    Args:
        loss: of each block; backprop: one block of all stages, and no other head.
        block: stages between two borders that no gradient crosses.
        hidden: layers of a head before its linear classifier; k = 1 + hidden is that of Belilovsky et al. (2019) at block 1.
        schedule: all blocks in every step, or one after the other, each for as many steps as all have together otherwise.
    """

    loss: Loss
    block: int
    hidden: int = 0
    schedule: Schedule = "simultaneous"

    def __str__(self) -> str:
        return " ".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Rate:
    """A learning rate; at_edge: the smallest or the largest that its optimiser is tried at."""

    optimizer: Optimizer
    lr: float
    at_edge: bool

    def of(self, training: TrainingConfig) -> TrainingConfig:
        """The training at this rate."""
        return replace(training, optimizer=self.optimizer, lr=self.lr)


@dataclass(frozen=True)
class Trained:
    """Metrics after a training, and the wall time of its steps without evaluations, in seconds."""

    metrics: dict[str, float]
    seconds: float


def all_at_once(config: Config, depth: int) -> list[Rule]:
    """Backpropagation; every local loss at each block size; pred on single layers with deeper heads."""
    return [
        Rule("backprop", depth),
        *(Rule(loss, size) for loss, size in product(LOCAL, config.grid.block_sizes)),
        *(Rule("pred", 1, hidden) for hidden in config.grid.auxiliary_layers),
    ]


def trained(config: Config, depth: int, locked: bool) -> list[Rule]:
    """Of these sim and predsim at the block sizes that they are trained at, and pred one block after the other.

    A locked chain is trained without deeper heads, by sim and predsim on single layers, and one after the other on single layers too.
    """
    grid = config.grid
    sizes = {"backprop": [depth], "pred": grid.block_sizes, "sim": grid.similarity_blocks, "predsim": grid.similarity_blocks}
    at_once = [rule for rule in all_at_once(config, depth) if rule.block in sizes[rule.loss]]
    in_turn = [Rule("pred", size, schedule="sequential") for size in grid.block_sizes]
    if not locked:
        return [*at_once, *in_turn]
    return [rule for rule in at_once if rule.hidden == 0 and (rule.block == 1 or rule.loss in ("backprop", "pred"))] + in_turn[:1]


def applied(context: Context, rule: Rule, network: nn.Sequential, model: ModelConfig, seed: int) -> Blockwise:
    """The network cut as a rule asks; the heads draw numbers of their own."""
    if rule.loss == "backprop":
        return end_to_end_block(network)
    layers = Layers(model, context.generator("heads", seed))
    return blockwise(network, rule.block, rule.loss, layers, context.data.classes, rule.hidden)


def turns(rule: Rule, blocks: int) -> list[Objective]:
    """What is minimised, one turn after the other, each for all steps of a training: every layer has as many updates by every rule."""
    return [all_blocks] if rule.schedule == "simultaneous" else [OneBlock(index) for index in range(blocks)]


def turn_count(rule: Rule, depth: int) -> int:
    """Turns of a training by a rule: a sequential one has the hidden layers' blocks, and the readout."""
    return 1 if rule.schedule == "simultaneous" else -(-(depth - 1) // rule.block) + 1


def train_by(context: Context, rule: Rule, trainees: Sequence[Trainee[Blockwise]]) -> list[Trained]:
    """Train by a rule, turn by turn, each with an optimiser of its own; how each came out after the last.

    Args:
        context: what the experiment measures with.
        rule: by which.
        trainees: networks as the rule cuts them; what they minimise is the rule's.
    """
    seconds = np.zeros(len(trainees))
    for turn, objective in enumerate(turns(rule, len(trainees[0].network.blocks)), start=1):
        named = ((each, f"{each.name}, {rule}, seed {each.seed}, turn {turn}") for each in trainees)
        outcomes = train_all(context, [replace(each, name=name, objective=objective) for each, name in named])
        seconds += [outcome.seconds for outcome in outcomes]
    return [Trained(outcome.metrics(), float(took)) for outcome, took in zip(outcomes, seconds, strict=True)]


def costs(context: Context, model: Blockwise, rule: Rule) -> dict[str, float]:
    """What a training by a rule takes: the same for every chain of that depth and every seed."""
    return {
        "multiply_adds": context.steps() * sum(multiply_adds(context, model, objective) for objective in turns(rule, len(model.blocks))),
        "parameters": _size(model.blocks),
        "auxiliary_parameters": _size(model.heads),
    }


def multiply_adds(context: Context, model: Blockwise, objective: Objective) -> float:
    """Of one step, forwards and backwards."""
    split, size = context.data.train, context.config.training.batch_size
    with FlopCounterMode(display=False) as counter:
        objective(model, context.data.standardise(split.images[:size]).double(), split.labels[:size]).backward()
    return counter.get_total_flops() / 2


def _size(modules: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in modules.parameters()))


def rates(config: Config) -> list[Rate]:
    """The learning rates that each rule is tried at: SGD's in units of `training.lr`, and Adam's."""
    tried: tuple[tuple[Optimizer, Sequence[float]], ...] = (
        ("sgd", [rate * config.training.lr for rate in config.grid.rates]),
        ("adam", config.grid.adam_rates),
    )
    return [Rate(optimizer, lr, lr in (min(lrs), max(lrs))) for optimizer, lrs in tried for lr in lrs]


def best(accuracies: Mapping[Rate, float]) -> Rate:
    """The rate of the highest accuracy, the first of those that tie."""
    return max(accuracies, key=lambda rate: accuracies[rate])


def told(accuracies: Mapping[Rate, float], classes: int) -> dict[str, float]:
    """The best rate, and whether it is to be trusted: not where even it tells less than twice as many right as guessing would."""
    rate = best(accuracies)
    return {
        "learning_rate": rate.lr,
        "adam": float(rate.optimizer == "adam"),
        "at_edge": float(rate.at_edge),
        "at_chance": float(accuracies[rate] < 2 / classes),
    }


def paces(seconds: Mapping[tuple[int, Rule], Sequence[float]]) -> Iterator[str]:
    """A line a depth: the mean time of a training by each rule in units of backpropagation's."""
    for depth in dict.fromkeys(depth for depth, _ in seconds):
        means = {rule: sum(times) / len(times) for (at, rule), times in seconds.items() if at == depth}
        (backprop,) = (mean for rule, mean in means.items() if rule.loss == "backprop")
        relative = ", ".join(f"{rule} {mean / backprop:.2f}" for rule, mean in means.items())
        yield f"seconds of all steps of a training at depth {depth}, backpropagation = 1: {relative}"
