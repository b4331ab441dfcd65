"""Activations whose derivative keeps its digits where they are saturated: autograd takes 1 − tanh², which rounds to 0 from |z| = 19 on.

Backpropagation in training uses autograd's formulas; the Jacobian that the mathematics speaks of is that of these.
"""

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule


def tanh(z: Any) -> Any:  # torch.fx traces the stages with proxies
    """Tanh z = 1 − 2σ(−2z) for z ≥ 0 and 2σ(2z) − 1 below: the derivative 4σ(−2|z|)(1 − σ(−2|z|)) has no cancellation."""
    return torch.where(z < 0, 2 * torch.sigmoid(2 * z) - 1, 1 - 2 * torch.sigmoid(-2 * z))


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
