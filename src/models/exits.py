"""A chain with exits: heads that read the logits off its stages."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from src.models.convolutional import GlobalMean
from src.models.layers import Layers, stage


class MultiExit(nn.Module):
    """A chain H_l = f_l(H_{l−1}) with an exit at some of its stages, z_l = W_l mean_pixels(H_l) + b_l; the chain itself ends in logits.

    Args:
        chain: f_1 … f_L, as built.
        exits: by the names of the stages that they read.
    """

    def __init__(self, chain: nn.Sequential, exits: OrderedDict[str, nn.Module]) -> None:
        super().__init__()
        self.chain = chain
        self.exits = nn.ModuleDict(exits)

    def forward(self, images: Float[Tensor, "n ..."]) -> Float[Tensor, "n k"]:
        """The chain's own logits."""
        logits: Tensor = self.chain(images)
        return logits

    def logits(self, images: Float[Tensor, "n ..."]) -> dict[str, Float[Tensor, "n k"]]:
        """The logits of every exit, first to last, and of the last stage."""
        found: dict[str, Tensor] = {}
        state = images
        for name, part in self.chain.named_children():
            state = part(state)
            if name in self.exits:
                found[name] = self.exits[name](state)
        return {**found, name: state}


def with_exits(chain: nn.Sequential, names: Sequence[str], layers: Layers, shape: tuple[int, int, int], classes: int) -> MultiExit:
    """Put a linear exit at the named stages, over all units of a dense stage and the pixel means of a convolutional one.

    Args:
        chain: f_1 … f_L, as built.
        names: of stages before the last.
        layers: draws the exits' weights, from a generator of their own.
        shape: channels, height and width of an image.
        classes: number of logits.
    """
    with torch.no_grad():
        states, state = {}, torch.zeros(2, *shape, device=next(chain.parameters()).device)
        was_training = chain.training
        chain.eval()
        for name, part in chain.named_children():
            state = states[name] = part(state)
        chain.train(was_training)
    exits = OrderedDict((name, _exit(layers, states[name], classes)) for name in names)
    return MultiExit(chain, exits).to(state.device)


def _exit(layers: Layers, state: Float[Tensor, "n d ..."], classes: int) -> nn.Module:
    linear = layers.linear(state.shape[1], classes)
    return stage(pool=GlobalMean() if state.ndim > 2 else None, linear=linear)
