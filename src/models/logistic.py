"""The logistic net that a tanh net is: tanh(z) = 2σ(2z) − 1, so that a change of weights turns one into the other."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call


def logistic_parameters(tanh: nn.Sequential) -> dict[str, Tensor]:
    """The weights and biases with which logistic units compute a tanh net, linear in its own.

    The hidden states are h = 2s − 1. With a = 1 at the input, else 2, and c = 1 at the readout, else 2,
    W' = acW and b' = cb, from which c W·1 is taken where the layer reads hidden states.

    Args:
        tanh: dense layers, one after the other, with tanh between them.

    Returns: the parameters by name; gradients flow back into those of the tanh net.
    """
    linears = [(name, module) for name, module in tanh.named_modules() if isinstance(module, nn.Linear)]
    mapped: dict[str, Tensor] = {}
    for place, (name, linear) in enumerate(linears):
        reads_hidden, is_hidden = place > 0, place < len(linears) - 1
        gain = 2 if is_hidden else 1
        mapped[f"{name}.weight"] = (2 if reads_hidden else 1) * gain * linear.weight
        mapped[f"{name}.bias"] = gain * (linear.bias - linear.weight.sum(1) if reads_hidden else linear.bias)
    return mapped


@torch.no_grad()
def logistic_twin(tanh: nn.Sequential) -> nn.Sequential:
    """Make the logistic net that computes the same logits as a tanh net, with parameters of its own."""
    twin = copy.deepcopy(tanh)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Tanh):
                setattr(module, name, nn.Sigmoid())
    twin.load_state_dict(logistic_parameters(tanh))
    return twin


class InTanhCoordinates(nn.Module):
    """A logistic net whose parameters are the image of a tanh net's: what is trained are the tanh net's.

    Args:
        tanh: dense layers with tanh between them.
    """

    def __init__(self, tanh: nn.Sequential) -> None:
        super().__init__()
        self.coordinates = tanh
        # in a tuple, so that its own parameters are none of this module's
        self._logistic = (logistic_twin(tanh),)

    def forward(self, images: Float[Tensor, "n ..."]) -> Float[Tensor, "n k"]:
        """The logits of the logistic net."""
        logits: Tensor = functional_call(self._logistic[0], logistic_parameters(self.coordinates), (images,))
        return logits
