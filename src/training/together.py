"""How many networks train as one, and their training in ensembles of that width."""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from src.config import TrainingConfig
from src.data.load import Data
from src.errors import UserError
from src.training.ensemble import Observer, Stack, train_ensemble, unlikeness
from src.training.loop import Keeper, Objective, Outcome, end_to_end, train

log = logging.getLogger(__name__)

# `auto` asks neither for free memory nor for times: one command has one width, whatever else the machine does
MEMORY = {"cpu": 2**30, "cuda": 8 * 2**30}  # bytes that an ensemble may take
# On a CPU, as `python -m tests.training.benchmark --only widths` measures it: fewer networks or longer products gain nothing by batching
FEWEST = 4
LONGEST = 2_000_000  # multiplications of a dense layer on a batch, mean over layers


def train_together(
    models: Sequence[nn.Module],
    data: Data,
    configs: Sequence[TrainingConfig],
    generators: Sequence[torch.Generator],
    objective: Objective = end_to_end,
    observers: Sequence[Observer | None] | None = None,
    keepers: Callable[[int], Keeper] | None = None,
) -> list[Outcome]:
    """Train networks in place, in ensembles as wide as `training.ensemble` says, or one by one.

    Args:
        models: the networks.
        data: the images, on their device.
        configs: one a network; `ensemble` of the first is read.
        generators: one a network, of the order of its images.
        objective: what each minimises; every ensemble starts with a copy of it as given.
        observers: one a network, called after every step of it.
        keepers: where the training that begins with the n-th network is kept, n = 0, 1, …; nowhere by default.

    Returns: how each training ended, in the order of the models.
    Raises: UserError, if networks that are asked to train together can't.
    """
    width = ensemble_width(models, data, configs, objective)
    looking = observers or [None] * len(models)
    groups = math.ceil(len(models) / width)
    borders = [len(models) * group // groups for group in range(groups + 1)]
    outcomes: list[Outcome] = []
    for first, last in pairwise(borders):
        minimised, keeper = copy.deepcopy(objective), keepers(first) if keepers else None
        if last - first == 1:
            outcomes.append(train(models[first], data, configs[first], generators[first], looking[first], minimised, keeper))
        else:
            group = slice(first, last)
            outcomes += train_ensemble(models[group], data, configs[group], generators[group], minimised, looking[group], keeper)
    return outcomes


def ensemble_width(models: Sequence[nn.Module], data: Data, configs: Sequence[TrainingConfig], objective: Objective) -> int:
    """How many of the networks train as one: `training.ensemble`, or what suits them where it is `auto`.

    What `auto` says depends on the networks, their trainings and the kind of device alone. It is 1 where they can't be batched and, on a
    CPU, where batching would be slower; else as many as an ensemble's memory has room for.

    Raises: UserError, if more than one is asked for and they can't train together.
    """
    asked = configs[0].ensemble
    if len(models) == 1 or asked == 1:
        return 1
    reason = unlikeness(models, configs) or unmappable(models, data, objective)
    if asked != "auto":
        if reason:
            raise UserError(f"training.ensemble: {asked} of these networks can't train as one, for {reason}; set it to 1 or auto")
        return min(asked, len(models))
    reason = reason or slower(models, data, configs[0])
    room = 1 if reason else MEMORY[data.mean.device.type] // member_bytes(models[0], data, configs[0], objective)
    width = max(1, min(room, len(models)))
    log.debug("%d networks train %s", len(models), f"{width} at once" if width > 1 else f"one by one: {reason or 'memory'}")
    return width


def unmappable(models: Sequence[nn.Module], data: Data, objective: Objective) -> str | None:
    """Why an objective can't be mapped over networks, or None: it is tried on copies of two of them, with two images each."""
    pair = [copy.deepcopy(model) for model in models[:2]]
    stack = Stack(pair, copy.deepcopy(objective))
    images, labels = (part[:4].unflatten(0, (2, 2)) for part in (data.train.images, data.train.labels))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "There is a performance drop")
            stack.losses(stack.prepared(data, images), labels).sum().backward()
    except (RuntimeError, UserWarning) as error:
        return f"torch.func.vmap says: {str(error).splitlines()[0]}"
    return None


def slower(models: Sequence[nn.Module], data: Data, config: TrainingConfig) -> str | None:
    """Why batching would not pay, or None."""
    if data.mean.device.type != "cpu":
        return None
    if len(models) < FEWEST:
        return f"fewer than {FEWEST} networks gain nothing on a CPU"
    modules = list(models[0].modules())
    if any(isinstance(module, nn.Conv2d) for module in modules):
        return "batched convolutions are slower on a CPU"
    products = [config.batch_size * module.weight.numel() for module in modules if isinstance(module, nn.Linear)]
    if products and sum(products) / len(products) > LONGEST:
        return f"their products, of over {LONGEST:,} multiplications a layer, fill a CPU one by one"
    return None


def member_bytes(model: nn.Module, data: Data, config: TrainingConfig, objective: Objective) -> int:
    """The memory that a member of an ensemble takes while it trains: parameters, gradients, moments, twice what a pass keeps."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    twin = copy.deepcopy(model).train()
    images, labels = data.train.images[: config.batch_size], data.train.labels[: config.batch_size].clone()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        copy.deepcopy(objective)(twin, data.standardise(images).to(next(twin.parameters())), labels)
    moments = 2 if config.optimizer == "adam" else 1
    return (2 + moments) * sum(p.numel() * p.element_size() for p in twin.parameters()) + 2 * sum(kept.values())
