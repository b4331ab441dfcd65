"""Plain backpropagation: one loop over tensors on the model's device."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LRScheduler

from src.config import TrainingConfig
from src.data.load import Data, Split
from src.errors import UserError
from src.training.optimizer import build_optimizer, build_schedule
from src.training.precision import tf32

EVALUATED = 2_000  # training images that the train metrics are taken on
CHUNK = 1_000  # images evaluated at once
CHECK_EVERY = 10  # steps between two looks for divergence: a look waits for the device

# what a training minimises: the loss of a model on standardised images and their labels
Objective = Callable[[Any, Tensor, Tensor], Tensor]


def end_to_end(model: nn.Module, images: Float[Tensor, "b c h w"], labels: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
    """The mean cross-entropy of the model's output, in nats."""
    return cross_entropy(model(images), labels)


@runtime_checkable
class Stateful(Protocol):
    """What remembers something from step to step: modules, optimisers, schedules, and objectives that do."""

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers: tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Go on from there."""


@runtime_checkable
class Keeper(Protocol):
    """Where a training is kept, so that one that was killed goes on."""

    @property
    def due(self) -> bool:
        """Whether the training should be kept now, though it isn't at its end."""

    def load(self) -> dict[str, Any] | None:
        """The training as it was last kept; None where it begins."""

    def keep(self, training: dict[str, Any]) -> None:
        """Keep the training as it is: states of its parts, and plain values."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    `history` has a row per evaluation: step, epoch (steps over steps an epoch), lr (of the next step), train_loss, train_accuracy,
    test_loss, test_accuracy. Losses are mean cross-entropies in nats, accuracies fractions. `seen` is what was seen along the way, by the
    steps done, and `seconds` the wall time without evaluations.
    """

    status: Literal["finished", "diverged"]
    steps: int
    history: pd.DataFrame
    seen: dict[int, Any]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """train_accuracy and test_accuracy of the last evaluation, and diverged: 1 or 0."""
        last = self.history.iloc[-1]
        accuracies = {name: float(last[name]) for name in ("train_accuracy", "test_accuracy")}
        return {**accuracies, "diverged": float(self.status == "diverged")}


def train(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    generator: torch.Generator,
    on_step: Callable[[int, int], object] | None = None,
    objective: Objective = end_to_end,
    keeper: Keeper | None = None,
) -> Outcome:
    """Minimise an objective, the cross-entropy unless another is given, over the parameters of `model`, in place; it is left in eval mode.

    It is evaluated before the first step, after every epoch and at the end, on the test images and the first 2,000 training images,
    always without bf16 or TF32. It has diverged when the loss of a batch or a parameter is not finite; that ends the training within
    10 steps, with a last row. On one CPU setting the same seeds give the same weights bit for bit, also when it was killed and goes on.

    Args:
        model: maps standardised images to logits, in the dtype of its parameters.
        data: the images, on the model's device; an epoch is one pass over the training images, the last partial batch dropped.
        config: optimiser, schedule, length and arithmetic.
        generator: on the CPU; draws one permutation of the training images an epoch. Its seed decides how they are augmented.
        on_step: called after every step with the steps done and the steps in all; it may change the model's mode, not its parameters.
            What it returns, unless None, is seen: tensors and plain values.
        objective: what is minimised. Parameters that it leaves without a gradient stay as they are. One that remembers anything
            is Stateful.
        keeper: where the training is kept; nowhere by default.

    Raises: UserError, if a batch is larger than the training set.
    """
    steps_an_epoch = len(data.train) // config.batch_size
    if not steps_an_epoch:
        raise UserError(f"training.batch_size: {config.batch_size} exceeds the {len(data.train)} training images of {data.name}; lower it")
    total = planned_steps(config, len(data.train))
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, total)
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if isinstance(objective, Stateful):
        parts["objective"] = objective
    course = _resumed(parts, keeper) or _Course([evaluation(model, data, schedule, 0, 0.0)])
    modules, started, kept = [*model.modules()], time.monotonic() - course.seconds, course.steps
    left = islice(batches(data.train, config.batch_size, generator, kept), total - kept if course.finite else 0)
    with tf32(config.precision == "tf32"):
        for step, (images, labels) in enumerate(left, start=kept + 1):
            # train() walks over all modules, which takes a fifth of a step of a deep narrow net
            if not all(module.training for module in modules):
                model.train()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = objective(model, _prepared(model, data, data.augmented(images, generator, step)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            course.steps = step
            if on_step and (seen := on_step(step, total)) is not None:
                course.seen[step] = seen
            due = step % steps_an_epoch == 0 or step == total
            if due or step % CHECK_EVERY == 0:
                course.finite = _is_finite(loss, model)
            if due or not course.finite:
                course.seconds = time.monotonic() - started
                course.history.append(evaluation(model, data, schedule, step, step / steps_an_epoch))
                started = time.monotonic() - course.seconds
            if not course.finite:
                break
            if keeper and keeper.due:
                course.seconds = time.monotonic() - started
                keeper.keep(_kept(parts, course))
    if keeper and course.steps > kept:
        keeper.keep(_kept(parts, course))
    model.eval()
    status: Literal["finished", "diverged"] = "finished" if course.finite else "diverged"
    return Outcome(status, course.steps, pd.DataFrame(course.history), course.seen, course.seconds)


@dataclass
class _Course:
    """How far a training has come: its evaluations, what was seen by steps done, its steps, whether all is finite, its wall time."""

    history: list[dict[str, int | float]]
    seen: dict[int, Any] = field(default_factory=dict)
    steps: int = 0
    finite: bool = True
    seconds: float = 0.0


def _kept(parts: dict[str, Stateful], course: _Course) -> dict[str, Any]:
    return {**vars(course), **{name: part.state_dict() for name, part in parts.items()}}


def _resumed(parts: dict[str, Stateful], keeper: Keeper | None) -> _Course | None:
    """Put the parts of a training into the state that it was kept in; None where it wasn't."""
    kept = keeper.load() if keeper else None
    if kept is None:
        return None
    for name, part in parts.items():
        part.load_state_dict(kept.pop(name))
    return _Course(**kept)


def planned_steps(config: TrainingConfig, images: int) -> int:
    """How many steps a training on so many images takes unless it diverges."""
    steps = config.epochs * (images // config.batch_size)
    return min(steps, config.max_steps or steps)


def lasting(config: TrainingConfig, steps: int, images: int) -> TrainingConfig:
    """The same training, so many steps long: over as many epochs as they take.

    Args:
        config: optimiser, schedule and batch size.
        steps: how many.
        images: in the training set, one batch at least.
    """
    return replace(config, epochs=math.ceil(steps / (images // config.batch_size)), max_steps=steps)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, split: Split) -> tuple[float, float]:
    """Mean cross-entropy in nats, and accuracy, of a split; without TF32. The model is left in eval mode."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    with tf32(False):
        for images, labels in zip(split.images.split(CHUNK), split.labels.split(CHUNK), strict=True):
            logits = model(_prepared(model, data, images)).double()
            totals += torch.stack([cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()])
    loss, accuracy = (totals / len(split)).tolist()
    return loss, accuracy


def batches(
    split: Split, size: int, generator: torch.Generator, passed: int = 0
) -> Iterator[tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]]:
    """Yield shuffled batches without end, one permutation an epoch, the last partial batch dropped; not those that are passed over.

    The permutation is drawn on the CPU, so that every device sees the same order.
    """
    for batch in islice(_orders(split, size, generator), passed, None):
        # on a CPU indexing takes several times as long
        yield split.images.index_select(0, batch), split.labels.index_select(0, batch)


def _orders(split: Split, size: int, generator: torch.Generator) -> Iterator[Int64[Tensor, " b"]]:
    n = len(split)
    while True:
        yield from torch.randperm(n, generator=generator).to(split.labels.device)[: n - n % size].split(size)


def _prepared(model: nn.Module, data: Data, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Raw images standardised, in the dtype of the model's parameters."""
    return data.standardise(images).to(next(model.parameters()))


def evaluation(model: nn.Module, data: Data, schedule: LRScheduler, step: int, epoch: float) -> dict[str, int | float]:
    """One evaluation: where the training stands, and the metrics on the first training images and on the test images."""
    probe = Split(data.train.images[:EVALUATED], data.train.labels[:EVALUATED])
    train_loss, train_accuracy = evaluate(model, data, probe)
    test_loss, test_accuracy = evaluate(model, data, data.test)
    return {
        "step": step,
        "epoch": epoch,
        "lr": float(schedule.get_last_lr()[0]),
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
    }


def _is_finite(loss: Float[Tensor, ""], model: nn.Module) -> bool:
    """Whether the loss and every parameter are finite; waits for the device once."""
    largest = get_total_norm([p.detach() for p in model.parameters()], norm_type=math.inf)
    return bool(loss.detach().isfinite() & largest.isfinite())
