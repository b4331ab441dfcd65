"""Activations by other formulas than torch's own.

Tanh and sigmoid with a derivative that keeps its digits where they are saturated: autograd takes 1 − tanh², which rounds to 0 from
|z| = 19 on. Backpropagation in training uses autograd's formulas; the Jacobian that the mathematics speaks of is that of these.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Proxy
from torch.nn.functional import relu6

from src.paths import operation


def _one_node(phi: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that torch.fx takes down as one call."""

    @wraps(phi)
    def called(z: Any) -> Any:
        return z.tracer.create_proxy("call_function", called, (z,), {}) if isinstance(z, Proxy) else phi(z)

    called.formula = True  # type: ignore[attr-defined]
    return called


@_one_node
def tanh(z: Any) -> Any:
    """Tanh z = 1 − 2σ(−2z) for z ≥ 0 and 2σ(2z) − 1 below: the derivative 4σ(−2|z|)(1 − σ(−2|z|)) has no cancellation."""
    # sums, not products with a number, whose forward derivative takes ten times as long
    twice = z + z
    below, above = torch.sigmoid(twice), torch.sigmoid(-twice)
    return torch.where(z < 0, -(1 - (below + below)), 1 - (above + above))


@_one_node
def sigmoid(z: Any) -> Any:
    """σ(z), and 1 − σ(−z) for z ≥ 0: the derivative σ(−|z|)(1 − σ(−|z|)) has no cancellation."""
    return torch.where(z < 0, torch.sigmoid(z), 1 - torch.sigmoid(-z))


@_one_node
def hardsigmoid(z: Any) -> Any:
    """(max(0, z + 3) ∧ 6)/6: the backward pass of torch's own has no derivative."""
    return relu6(z + 3) / 6


def steady(model: nn.Module) -> None:
    """Give a model formulas that keep their digits, in place: its activation modules, and what its graph calls where it has one."""
    _replace(model, {"tanh": tanh, "sigmoid": sigmoid})


def differentiable_twice(model: nn.Module) -> None:
    """Replace, in place, what has no derivative of its backward pass: Jv is the transpose of u ↦ Jᵀu."""
    _replace(model, {"hardsigmoid": hardsigmoid})


def _replace(model: nn.Module, formulas: dict[str, Callable[[Any], Any]]) -> None:
    for module in model.modules():
        name = type(module).__name__.lower()
        if name in formulas and type(module).__module__.startswith("torch.nn.modules"):
            module.forward = formulas[name]
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                # an argument that is set writes in place
                if operation(node) in formulas and len(node.args) == 1 and not any(node.kwargs.values()):
                    node.op, node.target, node.kwargs = "call_function", formulas[operation(node)], {}
            module.recompile()
