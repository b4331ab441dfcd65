"""The layers that every family is made of, and how they are initialised."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import skip_init

from src.config import ModelConfig

Weight = TypeVar("Weight", nn.Linear, nn.Conv2d)

ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU, "linear": nn.Identity}


def stage(**modules: nn.Module | None) -> nn.Module:
    """Compose modules in the order given, without those that are None; a single module stands for itself."""
    present = OrderedDict((name, module) for name, module in modules.items() if module is not None)
    return nn.Sequential(present) if len(present) > 1 else next(iter(present.values()))


@dataclass(frozen=True)
class Layers:
    """Fresh layers of one configuration: W = σw Z/√fan_in, or σw Q with Q (semi-)orthogonal, b = σb z; Z, z ~ N(0, 1).

    Args:
        config: σw², σb², the kind of initialisation, the activation and the normalisation.
        generator: draws each layer as it is made; PyTorch's own initialisation never runs.
    """

    config: ModelConfig
    generator: torch.Generator

    @property
    def branch_scale(self) -> float:
        """Factor on the last weights of every residual branch: 1 where nothing is skipped."""
        return 1.0 if self.config.skip == "none" else self.config.branch_scale

    def linear(self, inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
        """Draw a dense layer, its weights multiplied by `scale`."""
        return self._draw(skip_init(nn.Linear, inputs, outputs, dtype=torch.float32), scale)

    def conv(self, inputs: int, outputs: int, stride: int = 1, scale: float = 1.0) -> nn.Conv2d:
        """Draw a 3×3 convolution, its weights multiplied by `scale`; under normalisation it has no bias (He et al. 2016)."""
        bias = self.config.norm == "none"
        return self._draw(skip_init(nn.Conv2d, inputs, outputs, 3, stride=stride, padding=1, bias=bias, dtype=torch.float32), scale)

    def norm(self, width: int) -> nn.Module | None:
        """Make the normalisation of `width` units or channels, γ = 1 and β = 0; None where there is none."""
        if self.config.norm == "batch":
            return nn.BatchNorm2d(width) if self.config.family in ("cifar", "vgg") else nn.BatchNorm1d(width)
        return nn.LayerNorm(width) if self.config.norm == "layer" else None

    def activation(self) -> nn.Module:
        """Make φ, a module of its own at each place, so that each can be hooked."""
        return ACTIVATIONS[self.config.activation]()

    def _draw(self, layer: Weight, scale: float) -> Weight:
        sigma = scale * math.sqrt(self.config.weight_var)
        if self.config.init == "orthogonal":
            nn.init.orthogonal_(layer.weight, sigma, self.generator)
        else:
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, 0.0, sigma / math.sqrt(fan_in), self.generator)
        if layer.bias is not None:
            nn.init.normal_(layer.bias, 0.0, math.sqrt(self.config.bias_var), self.generator)
        return layer
