"""A normalised net in train mode, on one batch: the norms of its Jacobians, and how the gradient goes back over its layers."""

import numpy as np
import torch
from torch import Tensor, nn

from src.chain import cut
from src.jacobian.materialised import layer_jacobian
from src.jacobian.normalised import normalisation_norms
from src.locking import error_signals, growth
from src.spectrum import spectrum


def look(network: nn.Sequential, examples: tuple[Tensor, Tensor]) -> dict[str, float]:
    """‖J‖ of a net's normalisations, and how the gradient goes back over its hidden layers, in train mode on one batch.

    The last hidden layer is left out of the rate: its gradient comes from the readout and has been through no normalisation.

    Args:
        network: stages, the readout last; left as it is.
        examples: the images and labels of the batch.

    Returns: mean_norm, over the normalisations; rate, the slope of ln ‖g_l‖² a layer; flow, ln ‖g_1‖ − ln ‖g_{L−1}‖; range, greatest minus
        least ln ‖g_l‖; in nats.
    """
    inputs, targets = examples
    signals = error_signals(network, inputs, targets, "train")
    *hidden, _ = (signals[layer] for layer in sorted(signals))
    return {
        "mean_norm": float(np.mean(normalisation_norms(cut(network, None, torch.float64, "train"), inputs.double()))),
        "rate": growth(signals, last=len(signals) - 2),
        "flow": hidden[0] - hidden[-1],
        "range": max(hidden) - min(hidden),
    }


def middle_norm(network: nn.Sequential, inputs: Tensor) -> float:
    """‖J_l‖ of the middle layer in train mode, one operator on the batch.

    Args:
        network: stages; left as it is.
        inputs: the batch.
    """
    chain = cut(network, None, torch.float64, "train")
    states = chain.states(inputs.double().unsqueeze(0))
    middle = len(chain.stages) // 2
    return float(spectrum(layer_jacobian(chain.stages[middle], states[middle])).norm)
