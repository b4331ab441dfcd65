"""A network as a chain of named stages, H_l = f_l(H_{l−1}), l = 1…L."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from src import trace
from src.by_hand import named_stages
from src.errors import UserError
from src.jacobian.steady import differentiable_twice, steady
from src.trace import UntraceableError, is_traceable, traceable, traced_stages
from src.twin import twin

BatchNormMode = Literal["eval", "train"]
Value = Tensor | Proxy  # torch.fx traces the stages with proxies


@dataclass(frozen=True)
class Chain:
    """Named stages f_1 … f_L; each maps a batch to a batch, sample by sample.

    With `on_batch` a sample is a whole batch, which the stages take as one operator.
    """

    names: tuple[str, ...]
    stages: tuple[nn.Module, ...]
    on_batch: bool = False

    def states(self, inputs: Float[Tensor, "n ..."]) -> list[Tensor]:
        """Run the chain and keep H_0 … H_L.

        Raises: UserError when a stage fails, or a state is not finite, naming the stage and the sample.
        """
        states = [inputs]
        require_finite(inputs, "the input")
        with torch.no_grad():
            for name, stage in zip(self.names, self.stages, strict=True):
                try:
                    states.append(stage(states[-1]))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # of the user's own code
                    told = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.150}"
                    raise UserError(f"certificate: stage '{name}' fails on its inputs in {inputs.dtype} ({told})") from error
                require_finite(states[-1], f"stage '{name}'")
        return states


def require_finite(values: Tensor, where: str) -> None:
    """Raise UserError naming the place and the first sample whose values are not finite."""
    bad = ~torch.isfinite(values.reshape(len(values), -1)).all(1)
    if bad.any():
        raise UserError(f"certificate: {where} is not finite at sample {int(bad.nonzero()[0])}; look at its weights and inputs there")


class OnBatch(nn.Module):
    """A stage as one operator on the whole batch: the batch is the one sample."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, batch: Value) -> Value:
        """Apply the stage to the batch."""
        return self.stage(batch.squeeze(0)).unsqueeze(0)


def branch(stage: nn.Module) -> nn.Module | None:
    """What a stage of a chain adds to its skip; None where it is no residual block."""
    if not isinstance(stage, OnBatch):
        return trace.branch(stage)
    block = trace.branch(stage.stage)
    return None if block is None else OnBatch(block)


def cut(
    model: nn.Module,
    stages: Sequence[str] | None,
    dtype: torch.dtype,
    batch_norm: BatchNormMode,
    backpropagated: bool = False,
    inputs: Tensor | None = None,
) -> Chain:
    """Cut a copy of a model into a chain; the model itself stays untouched.

    Args:
        model: an `nn.Sequential`, whose children are the stages, or any model that torch.fx can trace, cut where one tensor separates
            what is before from what is after; with inputs also one that torch.export can, or whose stages are named.
        stages: names of the stages to cut after, None cuts after every one; of a model that can't be traced, the submodules that are its
            stages.
        dtype: the arithmetic of the copy.
        batch_norm: "eval" with frozen statistics, per sample; "train" with the batch's own, one operator on the batch.
        backpropagated: differentiate as training does, not by formulas that keep the digits of saturated units.
        inputs: a batch to run where torch.fx is not enough.

    Returns: a chain in `dtype` with dropout off and nothing in place.
    Raises: UserError when the model can't be cut, a name is unknown, or BatchNorm has no statistics to freeze.
    """
    chain = split(twin(model), stages, dtype, batch_norm, inputs)
    for stage in () if backpropagated else chain.stages:
        steady(stage)
    return chain


def split(
    model: nn.Module, stages: Sequence[str] | None, dtype: torch.dtype, batch_norm: BatchNormMode, inputs: Tensor | None = None
) -> Chain:
    """Cut a model itself into a chain, as `cut` does a copy: the stages share its modules, and differentiate as training does."""
    model = _in(dtype, model).eval().requires_grad_(False)
    for name, module in model.named_modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        if isinstance(module, _BatchNorm):
            _prepare_batch_norm(name, module, batch_norm)
    batch = None if inputs is None else inputs.detach().to(dtype)
    try:
        chain = _group(_stages(model, batch), stages)
    except UntraceableError:
        if not stages or batch is None:
            raise
        chain = _group(named_stages(model, stages, batch), None)
    for stage in chain.stages:
        differentiable_twice(stage)
        stage.register_forward_pre_hook(_copy)
    if batch_norm == "train":
        chain = Chain(chain.names, tuple(OnBatch(stage) for stage in chain.stages), on_batch=True)
    return chain


def _in(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    """A model in a precision; what is complex stays so."""

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype.to_complex() if value.is_complex() else dtype if value.is_floating_point() else value.dtype)

    return model._apply(cast)


def _copy(_: nn.Module, arguments: tuple[Value, ...]) -> tuple[Value, ...]:
    """Give a stage a copy of its input: it may write over that, not over the state before it."""
    return tuple(argument.clone() for argument in arguments)


def _prepare_batch_norm(name: str, module: _BatchNorm, mode: BatchNormMode) -> None:
    """Frozen statistics, or none at all: torch.func refuses to track them."""
    if mode == "train":
        module.running_mean = module.running_var = module.num_batches_tracked = None
    elif module.running_mean is None:
        raise UserError(f"{name}: BatchNorm without running statistics couples the samples; certify with batch_norm='train'")


def _stages(model: nn.Module, inputs: Tensor | None) -> dict[str, nn.Module]:
    """The children of a sequential model, else what its graph is cut into."""
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        # not named_children(), which lists a module that stands twice only once
        children = {name: child for name, child in model._modules.items() if child is not None}
        if inputs is not None and not all(is_traceable(child) for child in children.values()):
            with torch.no_grad():
                for name, child in children.items():
                    children[name] = traceable(child, inputs)
                    inputs = child(inputs)
    else:
        children = traced_stages(model, inputs)
    if not children:
        raise UserError(f"{type(model).__name__}: nothing to certify, it has no stages")
    return children


def _group(children: dict[str, nn.Module], stages: Sequence[str] | None) -> Chain:
    """The chain that is cut after the named children and after the last."""
    ends = list(children) if stages is None else [*stages]
    unknown = [name for name in ends if name not in children]
    if unknown:
        raise UserError(f"no stage named {unknown[0]!r}; there are {', '.join(children)}")
    names: list[str] = []
    groups: list[nn.Module] = []
    open_group: list[nn.Module] = []
    for name, child in children.items():
        open_group.append(child)
        if name in ends or name == list(children)[-1]:
            names.append(name)
            groups.append(open_group[0] if len(open_group) == 1 else nn.Sequential(*open_group))
            open_group = []
    return Chain(tuple(names), tuple(groups))
