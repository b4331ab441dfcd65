"""A copy of a model to measure on, which shares nothing with it."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.random import fork_rng

from src.errors import UserError

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and of data parallelism, which compute the same.

    Raises: UserError where it is scripted, or has weights without values.
    """
    inner = getattr(model, "_orig_mod", model.module if isinstance(model, nn.DataParallel | DistributedDataParallel) else None)
    if isinstance(inner, nn.Module):
        return bare(inner)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UserError(f"{type(model).__name__}: TorchScript can't be taken apart; certify the model that it was made from")
    if any(is_lazy(parameter) or parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{type(model).__name__}: its weights have no values yet; load them, or run a lazy model once")
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy without the hooks that watch the model, and with those that are part of it: torch's own (pruning, weight norm)."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            # a weight that such a hook computes, or a state that was kept, is no leaf of the graph, and torch copies leaves only
            if isinstance(value, Tensor) and value.grad_fn:
                memo[id(value)] = value.detach().clone()
        for hook in _watching(module):
            memo[id(hook)] = hook  # dropped below; it may hold what can't be copied
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for kind in HOOKS:
            hooks = getattr(module, kind)
            for key in [key for key, hook in hooks.items() if not _is_torchs(hook)]:
                del hooks[key]
    return copied


def require_only_watching(model: nn.Module, inputs: Tensor) -> None:
    """Refuse hooks that change what the model computes: its copy has none of them.

    Args:
        model: in any mode; it is run once in eval mode where it has hooks, which see that.
        inputs: a batch.

    Raises: UserError where the outputs differ.
    """
    if not any(_watching(module) for module in model.modules()):
        return
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        model.eval()
        with torch.no_grad(), fork_rng([inputs.device] if inputs.is_cuda else []):
            state = torch.get_rng_state()
            hooked = model(inputs.clone())
            torch.set_rng_state(state)
            plain = twin(model)(inputs.clone())
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
    if isinstance(hooked, Tensor) and not (hooked.shape == plain.shape and torch.equal(hooked.nan_to_num(), plain.nan_to_num())):
        raise UserError(
            f"{type(model).__name__}: a hook changes what it computes, which a certificate does not see; make it part of a forward"
        )


def _watching(module: nn.Module) -> list[Callable[..., object]]:
    """The hooks of a module that aren't torch's own."""
    return [hook for kind in HOOKS for hook in getattr(module, kind).values() if not _is_torchs(hook)]


def _is_torchs(hook: Callable[..., object]) -> bool:
    return str(getattr(hook, "__module__", type(hook).__module__)).startswith("torch.nn.utils")
