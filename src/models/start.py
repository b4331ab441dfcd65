"""Starts that the configuration does not have."""

import torch
from torch import nn


@torch.no_grad()
def standard_start(network: nn.Module, generator: torch.Generator) -> None:
    """Draw W ~ U[−1/√n, 1/√n], n the fan-in, and set b = 0 (Glorot & Bengio 2010, equation 1), in place.

    Args:
        network: dense layers.
        generator: on the CPU.
    """
    for linear in network.modules():
        if isinstance(linear, nn.Linear):
            bound = linear.in_features**-0.5
            linear.weight.copy_(torch.empty(linear.weight.shape).uniform_(-bound, bound, generator=generator))
            linear.bias.zero_()


@torch.no_grad()
def neutral_readout(network: nn.Module, weight_var: float) -> None:
    """Give the last dense layer of a network drawn with some σw² the weights of σw² = 1, and no bias, in place."""
    *_, readout = (module for module in network.modules() if isinstance(module, nn.Linear))
    readout.weight.div_(weight_var**0.5)
    readout.bias.zero_()


@torch.no_grad()
def latch(network: nn.Module, gain: float) -> None:
    """Make every hidden layer but the first h ↦ tanh(gain·h): each unit runs to an attractor and keeps its sign (Bengio et al. 1994).

    Args:
        network: dense layers of one width but for the first and the last, tanh between them, their biases 0; in place.
        gain: above 1.
    """
    _, *hidden, _ = (module for module in network.modules() if isinstance(module, nn.Linear))
    for linear in hidden:
        linear.weight.copy_(gain * torch.eye(len(linear.weight)))
