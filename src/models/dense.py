"""Multilayer perceptrons, plain and residual."""

import math
from collections.abc import Iterator

from torch import nn

from src.models.layers import Layers, stage
from src.models.residual import block, ending, entry


def mlp(layers: Layers, shape: tuple[int, int, int], classes: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield layer1 … layer{L-1}, H_l = φ(norm(W_l H_{l-1} + b_l)), and the readout W_L H_{L-1} + b_L."""
    inputs, width = math.prod(shape), layers.config.width
    flatten: nn.Module | None = nn.Flatten()
    for index in range(1, layers.config.depth):
        linear = layers.linear(inputs, width)
        yield f"layer{index}", stage(flatten=flatten, linear=linear, norm=layers.norm(width), activation=layers.activation())
        inputs, flatten = width, None
    yield "readout", stage(flatten=flatten, linear=layers.linear(inputs, classes))


def residual_mlp(layers: Layers, shape: tuple[int, int, int], classes: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield embed, block1 … block{n} and the readout: 2n + 2 weight layers (blocks as in De & Smith 2020)."""
    width = layers.config.width
    yield "embed", entry(layers, width, flatten=nn.Flatten(), linear=layers.linear(math.prod(shape), width))
    for index in range(1, layers.config.depth // 2):
        first, second = layers.linear(width, width), layers.linear(width, width, layers.branch_scale)
        yield f"block{index}", block(layers, first, second, nn.Identity())
    yield "readout", ending(layers, width, linear=layers.linear(width, classes))
