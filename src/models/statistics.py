"""The running statistics of batch normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Float[Tensor, "n ..."]) -> None:
    """Set every BatchNorm's running statistics to those of one batch, in place; the model is left in eval mode.

    A fresh network's running statistics are those of no data: in eval mode it would not be normalised at all.

    Args:
        model: may have BatchNorm layers, each with running statistics.
        inputs: the batch, on the model's device.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(inputs)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
