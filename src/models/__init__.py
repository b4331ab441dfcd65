"""Networks as chains of named stages, H_l = f_l(H_{l-1})."""

from collections import OrderedDict

import torch
from torch import nn

from src.config import ModelConfig
from src.models.convolutional import cifar, vgg
from src.models.dense import mlp, residual_mlp
from src.models.layers import Layers
from src.models.residual import Residual
from src.models.statistics import calibrate

__all__ = ["Residual", "build", "calibrate"]

FAMILIES = {"mlp": mlp, "residual_mlp": residual_mlp, "cifar": cifar, "vgg": vgg}


def build(config: ModelConfig, shape: tuple[int, int, int], classes: int, generator: torch.Generator) -> nn.Sequential:
    """Build a network whose children are the stages f_1 … f_L, by name.

    Args:
        config: family, depth in weight layers, width, activation, initialisation, normalisation and skips.
        shape: channels, height and width of one input image.
        classes: number of logits.
        generator: draws all weights and biases, on the CPU; the same state gives the same network bit for bit.

    Returns: an `nn.Sequential` in float32 on the CPU, from [n, channels, height, width] to [n, classes].

    Raises: UserError where the images are too small for the family.
    """
    return nn.Sequential(OrderedDict(FAMILIES[config.family](Layers(config, generator), shape, classes)))
