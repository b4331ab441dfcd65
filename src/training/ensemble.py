"""Many networks of one architecture trained as one batched network, each as `loop.train` would train it alone, up to rounding.

The parameters of all members are stacked along a leading axis and the objective is mapped over it (`torch.func.vmap`), so that every
product of a step is one batched product. A member keeps to itself its weights, statistics, order of images, rate and divergence.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.lr_scheduler import LRScheduler

from src.config import TrainingConfig
from src.data.load import Data
from src.errors import UserError
from src.training.loop import CHECK_EVERY, Keeper, Objective, Outcome, Stateful, batches, end_to_end, evaluation, planned_steps
from src.training.optimizer import build_optimizer, build_schedule
from src.training.precision import tf32

# is told the steps done and the steps in all
Observer = Callable[[int, int], object]


def train_ensemble(
    models: Sequence[nn.Module],
    data: Data,
    configs: Sequence[TrainingConfig],
    generators: Sequence[torch.Generator],
    objective: Objective = end_to_end,
    observers: Sequence[Observer | None] | None = None,
    keeper: Keeper | None = None,
) -> list[Outcome]:
    """Train all members at once and in place, each as `train` would up to rounding; they are left in eval mode.

    A member that diverges keeps the weights that it had when this was seen, and the others go on.

    Args:
        models: alike but for the values of parameters and buffers, no two sharing any.
        data: the images, on the models' device.
        configs: one a member; optimizer, lr, momentum, weight_decay and schedule may differ.
        generators: one a member, on the CPU; each draws the order of its member's images, its seed decides how they are augmented.
        objective: what each member minimises; called once a step for all of them, so that one that counts its calls counts steps. It may
            neither draw random numbers nor branch on what it computes.
        observers: one a member, called after every step of its member, whose weights are then up to date; what it returns, unless None,
            is seen.
        keeper: where the whole ensemble is kept; nowhere by default. It goes on bit for bit.

    Returns: how each training ended, in the order of the models; the wall time is shared equally.
    Raises: UserError, if a batch is larger than the training set; ValueError for networks that can't train together.
    """
    if reason := unlikeness(models, configs):
        raise ValueError(f"these networks can't train together: {reason}")
    config, size = configs[0], configs[0].batch_size
    steps_an_epoch = len(data.train) // size
    if not steps_an_epoch:
        raise UserError(f"training.batch_size: {size} exceeds the {len(data.train)} training images of {data.name}; lower it")
    total = planned_steps(config, len(data.train))
    # equal settings stand side by side in the stack: one optimiser serves them all
    order = sorted(range(len(models)), key=lambda index: configs.index(configs[index]))
    stack = Stack([models[index] for index in order], objective)
    slices = _slices(stack, [configs[index] for index in order], total)
    members = [
        _Member(models[index], data, schedule, generators[index], observers[index] if observers else None)
        for index, schedule in zip(order, (part.schedule for part in slices for _ in range(part.count)), strict=True)
    ]
    parts = _parts(members, slices, objective)
    kept, seconds = _resumed(parts, members, keeper)
    for member in members:
        member.begin(size, kept)
    started = time.monotonic() - seconds
    with tf32(config.precision == "tf32"):
        for step in range(kept + 1, total + 1):
            if not any(member.trains for member in members):
                break
            images, labels = _batch(members, step)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                losses = stack.losses(stack.prepared(data, images), labels)
            losses.sum().backward()
            for part in slices:
                part.step()
            stack.zero_grad()
            for member in members:
                member.observe(step, total)
            due = step % steps_an_epoch == 0 or step == total
            if due or step % CHECK_EVERY == 0:
                seconds = time.monotonic() - started
                for member, is_finite in zip(members, stack.are_finite(losses).tolist(), strict=True):
                    if member.trains and (due or not is_finite):
                        member.look(step, step / steps_an_epoch)
                    if member.trains and (step == total or not is_finite):
                        member.end("finished" if is_finite else "diverged", step, seconds / len(members))
                started = time.monotonic() - seconds
            if keeper and (keeper.due or not any(member.trains for member in members)):
                keeper.keep(_kept(parts, members, step, time.monotonic() - started))
    outcomes = {index: member.outcome() for index, member in zip(order, members, strict=True)}
    return [outcomes[index] for index in range(len(models))]


def unlikeness(models: Sequence[nn.Module], configs: Sequence[TrainingConfig]) -> str | None:
    """Why networks can't be stacked, or None: they or their trainings differ in more than values, or something hangs on them."""
    lengths, architectures = zip(*map(in_common, models, configs), strict=True)
    if any(length != lengths[0] for length in lengths):
        return "their batch sizes, lengths or precisions differ"
    if any(architecture != architectures[0] for architecture in architectures):
        return "their architectures differ"
    tensors = [tensor for model in models for tensor in _state(model).values()]
    if len(set(map(id, tensors))) < len(tensors):
        return "they share parameters"
    # a hook of one member would see all of them, or none
    if any(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None) for tensor in tensors):
        return "parameters have hooks"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for model in models for module in model.modules() for kind in hooks):
        return "modules have hooks"
    return None


def in_common(model: nn.Module, config: TrainingConfig) -> tuple[object, object]:
    """What all members must have in common: of the training its length; of the network all but the values of its tensors."""
    constants = [
        {name: value for name, value in vars(module).items() if name != "training" and isinstance(value, bool | int | float | str)}
        for module in model.modules()
    ]
    tensors = [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in _state(model).items()]
    return (config.batch_size, config.epochs, config.max_steps, config.precision), (str(model), constants, tensors)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class Stack:
    """The parameters and buffers of all members, one tensor each whose leading axis is the member; the members' own look into it.

    Args:
        models: alike; from now on their parameters and buffers are views.
        objective: the loss of one member.
    """

    def __init__(self, models: Sequence[nn.Module], objective: Objective) -> None:
        self.template = _Loss(copy.deepcopy(models[0]), objective)
        self.modules = list(self.template.modules())
        for module in self.modules:
            module.__class__ = FEATURES_FIRST.get(type(module), type(module))
        members = [_Loss(model.eval(), objective) for model in models]  # they must be in one mode
        self.parameters, self.buffers = stack_module_state(members)
        for index, member in enumerate(members):
            for name, tensor in _state(member).items():
                tensor.data = {**self.parameters, **self.buffers}[name].detach()[index]

    def losses(self, images: Float[Tensor, "m b c h w"], labels: Int64[Tensor, "m b"]) -> Float[Tensor, " m"]:
        """The objective of every member on its own batch; running statistics move."""
        # train() walks over all modules
        if not all(module.training for module in self.modules):
            self.template.train()
        losses: Tensor = vmap(self._loss, randomness="error")(self.parameters, self.buffers, images, labels)
        return losses

    def _loss(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = functional_call(self.template, (parameters, buffers), (images, labels))
        return loss

    def prepared(self, data: Data, images: UInt8[Tensor, "m b c h w"]) -> Float[Tensor, "m b c h w"]:
        """Raw images standardised, in the dtype of the parameters."""
        flat = data.standardise(images.flatten(0, 1)).to(next(iter(self.parameters.values())))
        return flat.unflatten(0, images.shape[:2])

    def are_finite(self, losses: Float[Tensor, " m"]) -> Bool[Tensor, " m"]:
        """Whether the loss and every parameter of each member are finite."""
        rows = [parameter.detach().reshape(len(parameter), -1) for parameter in self.parameters.values()]
        # norms over one axis take ten times as long
        extremes = [extreme for row in rows for extreme in (row.amax(1), row.amin(1))]
        return torch.stack([losses.detach(), *extremes]).isfinite().all(0)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None


class _Loss(nn.Module):
    """An objective and its model as one module, for `functional_call` knows only `forward`."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.objective(self.model, images, labels)


class _Linear(nn.Linear):
    """(W Xᵀ + b)ᵀ: the gradient of W comes out in the layout of W, where that of X Wᵀ + b has to be copied."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim != 2:
            return super().forward(input)
        product = self.weight @ input.mT
        return (product if self.bias is None else product.add_(self.bias.unsqueeze(1))).mT


class _BatchNorm(nn.BatchNorm1d):
    """The same on Xᵀ, as one image of many channels: in the layout that `_Linear` leaves, nothing is copied."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mT.unsqueeze(0)).squeeze(0).mT if input.ndim == 2 else super().forward(input)


FEATURES_FIRST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, nn.BatchNorm1d: _BatchNorm}


class _Slice:
    """Members of equal settings, side by side in the stack: one optimiser and one schedule over their part of every parameter."""

    def __init__(self, stack: Stack, first: int, count: int, config: TrainingConfig, steps: int) -> None:
        self.members, self.count = slice(first, first + count), count
        self.whole = list(stack.parameters.values())
        self.parts = [nn.Parameter(parameter.detach()[self.members]) for parameter in self.whole]
        self.optimizer = build_optimizer(nn.ParameterList(self.parts), config)
        self.schedule = build_schedule(self.optimizer, config, steps)

    def step(self) -> None:
        """Move the members along their gradients; a parameter without one stays as it is."""
        for part, parameter in zip(self.parts, self.whole, strict=True):
            part.grad = None if parameter.grad is None else parameter.grad[self.members]
        self.optimizer.step()
        self.schedule.step()


def _slices(stack: Stack, configs: Sequence[TrainingConfig], steps: int) -> list[_Slice]:
    """One slice for each of the settings, equal ones standing side by side."""
    return [_Slice(stack, configs.index(config), configs.count(config), config, steps) for config in dict.fromkeys(configs)]


@dataclass
class _Course:
    """How far a member has come: its evaluations, what was seen by steps done, and how, when and in which time it ended."""

    history: list[dict[str, int | float]] = field(default_factory=list)
    seen: dict[int, Any] = field(default_factory=dict)
    status: Literal["finished", "diverged"] | None = None
    steps: int = 0
    seconds: float = 0.0


@dataclass
class _Member:
    """One network and its own part of the training."""

    model: nn.Module
    data: Data
    schedule: LRScheduler
    order: torch.Generator
    observer: Observer | None
    course: _Course = field(default_factory=_Course)

    @property
    def trains(self) -> bool:
        """Whether it has not ended."""
        return self.course.status is None

    def begin(self, size: int, passed: int) -> None:
        """Make its batches ready, of which so many were passed."""
        self.batches = batches(self.data.train, size, self.order, passed)
        if not self.course.history:
            self.look(0, 0.0)
        if not self.trains:
            self.release()

    def batch(self, step: int) -> tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]:
        """The images and labels of a step."""
        images, labels = next(self.batches)
        return self.data.augmented(images, self.order, step), labels

    def look(self, step: int, epoch: float) -> None:
        """Evaluate it."""
        self.course.history.append(evaluation(self.model, self.data, self.schedule, step, epoch))

    def observe(self, step: int, total: int) -> None:
        """Let it be looked at, as long as it trains."""
        if self.observer and self.trains and (seen := self.observer(step, total)) is not None:
            self.course.seen[step] = seen

    def end(self, status: Literal["finished", "diverged"], step: int, seconds: float) -> None:
        """It has ended."""
        self.course = replace(self.course, status=status, steps=step, seconds=seconds)
        self.release()

    def release(self) -> None:
        """Take it out of the stack, as it is."""
        for tensor in _state(self.model).values():
            tensor.data = tensor.data.clone()
        self.model.eval()

    def outcome(self) -> Outcome:
        """How it ended."""
        course = self.course
        return Outcome(cast(Any, course.status), course.steps, pd.DataFrame(course.history), course.seen, course.seconds)


def _batch(members: Sequence[_Member], step: int) -> tuple[UInt8[Tensor, "m b c h w"], Int64[Tensor, "m b"]]:
    """The next batch of every member."""
    images, labels = zip(*(member.batch(step) for member in members), strict=True)
    return torch.stack(images), torch.stack(labels)


def _parts(members: Sequence[_Member], slices: Sequence[_Slice], objective: Objective) -> dict[str, Stateful]:
    """All that remembers something from step to step."""
    parts: dict[str, Stateful] = {f"model{index}": member.model for index, member in enumerate(members)}
    for index, part in enumerate(slices):
        parts |= {f"optimizer{index}": part.optimizer, f"schedule{index}": part.schedule}
    return {**parts, "objective": objective} if isinstance(objective, Stateful) else parts


def _kept(parts: dict[str, Stateful], members: Sequence[_Member], steps: int, seconds: float) -> dict[str, Any]:
    courses = [vars(member.course) for member in members]
    return {"steps": steps, "seconds": seconds, "courses": courses, **{name: part.state_dict() for name, part in parts.items()}}


def _resumed(parts: dict[str, Stateful], members: Sequence[_Member], keeper: Keeper | None) -> tuple[int, float]:
    """Put an ensemble into the state that it was kept in, if it was; the steps and the wall time that it had."""
    kept = keeper.load() if keeper else None
    if kept is None:
        return 0, 0.0
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    for member, course in zip(members, kept["courses"], strict=True):
        member.course = _Course(**course)
    return kept["steps"], kept["seconds"]
