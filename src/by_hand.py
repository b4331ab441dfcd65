"""A model that cannot be traced as stages named by hand: submodules that call each other's outputs, recorded in one run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from src.errors import UserError
from src.trace import composes, numbered, traceable


class Called(nn.Module):
    """A module at one of its call sites: a function of one of its arguments, the others as they were recorded.

    Args:
        module: what is called.
        args: of that call.
        kwargs: of that call.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.module = module
        leaves, self.structure = tree_flatten((args, kwargs))
        self.leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.inputs = len({id(leaves[place]) for place in self.places})

    @property
    def before(self) -> Tensor:
        """The input that was recorded."""
        return self.leaves[self.places[0]]

    def forward(self, x: Any) -> Any:
        """Call the module on x, in the shape that was recorded."""
        x = x.reshape(-1, *self.before.shape[1:])
        args, kwargs = tree_unflatten([x if place in self.places else leaf for place, leaf in enumerate(self.leaves)], self.structure)
        return self.module(*args, **kwargs)


@dataclass(frozen=True)
class _Call:
    """One call of a named module, and what it returned."""

    name: str
    stage: Called
    after: Tensor


def named_stages(model: nn.Module, names: Sequence[str], inputs: Tensor) -> dict[str, nn.Module]:
    """The calls of the named submodules, in order, as f_1 … f_L by name; a module called twice is two stages.

    Args:
        model: its parameters require no gradient; the stages share its modules.
        names: of submodules; each starts from what the one before returned, the first from the model's input, and the last returns the
            model's output.
        inputs: a batch to run.

    Raises: UserError where a name is unknown, or something else is computed between two stages.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules or not name:
            raise UserError(f"no submodule named {name!r}; there are {', '.join(filter(None, modules))}")
    calls: list[_Call] = []
    handles = [handle for name in names for handle in _record(name, modules[name], len(inputs), calls)]
    start = inputs.detach().clone().requires_grad_()  # so that what depends on it can be told
    try:
        with torch.enable_grad():
            output = model(start + 0)  # no leaf, which must not be written over
    finally:
        for handle in handles:
            handle.remove()
    uncalled = [name for name in names if name not in {call.name for call in calls}]
    if uncalled:
        raise UserError(f"stage '{uncalled[0]}' is never called; name submodules that the model's forward calls")
    _require_joined("the model's input", inputs, f"stage '{calls[0].name}'", calls[0].stage.before)
    for call, following in pairwise(calls):
        _require_joined(f"stage '{call.name}'", call.after, f"stage '{following.name}'", following.stage.before)
    _require_joined(f"stage '{calls[-1].name}'", calls[-1].after, "the model's output", output)
    stages = dict(numbered((call.name, traceable(call.stage, call.stage.before)) for call in calls))
    if not composes(stages.values(), model, inputs):
        raise UserError(f"{type(model).__name__}: the stages {', '.join(stages)} in a row do not compute what it does; name others")
    return stages


def _record(name: str, module: nn.Module, count: int, calls: list[_Call]) -> tuple[RemovableHandle, RemovableHandle]:
    """Keep every call of a module: its arguments before it runs, for it may write over them, and what it returns."""
    waiting: list[Called] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting.append(Called(module, args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stage = waiting.pop()
        if stage.inputs != 1 or not isinstance(output, Tensor):
            raise UserError(
                f"stage '{name}' takes {stage.inputs} tensors that depend on the model's input and returns a {type(output).__name__}; "
                "wrap it in a module that makes one tensor of one"
            )
        if len(output) != count:
            raise UserError(
                f"stage '{name}' returns {len(output)} rows for {count} inputs; wrap it in a module that keeps the samples first"
            )
        calls.append(_Call(name, stage, output.detach().clone()))

    return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)


def _require_joined(before: str, value: Tensor, after: str, following: Tensor) -> None:
    """Raise UserError unless one holds the other's values in the same order, in any shape."""
    if value.numel() != following.numel() or not torch.equal(value.flatten().nan_to_num(), following.flatten().nan_to_num()):
        raise UserError(
            f"something is computed between {before} and {after}; wrap it in a module, with the stage whose skip it adds if it does, "
            "and name that in stages"
        )
