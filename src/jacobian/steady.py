"""Activations whose derivative keeps its digits where they are saturated: autograd takes 1 − tanh², which rounds to 0 from |z| = 19 on.

Backpropagation in training uses autograd's formulas; the Jacobian that the mathematics speaks of is that of these.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Proxy


def _one_node(phi: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that torch.fx takes down as one call."""

    @wraps(phi)
    def called(z: Any) -> Any:
        return z.tracer.create_proxy("call_function", called, (z,), {}) if isinstance(z, Proxy) else phi(z)

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


MODULES = {nn.Tanh: tanh, nn.Sigmoid: sigmoid}
FUNCTIONS: dict[Any, Any] = {torch.tanh: tanh, "tanh": tanh, torch.sigmoid: sigmoid, "sigmoid": sigmoid}
FUNCTIONS |= {torch.ops.aten.tanh.default: tanh, torch.ops.aten.sigmoid.default: sigmoid}


def steady(model: nn.Module) -> None:
    """Give a model these formulas, in place: its activation modules, and what its graph calls where it has one."""
    for module in model.modules():
        if type(module) in MODULES:
            module.forward = MODULES[type(module)]
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if node.target in FUNCTIONS and node.args:
                    node.op, node.target = "call_function", FUNCTIONS[node.target]
            module.recompile()
