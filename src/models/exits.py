"""A chain with exits: heads that read the logits off its stages (multi-exit networks, Lee et al. 2015; Teerapittayanon et al. 2016)."""

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
        """The logits of every exit, first to last, and of the last stage, by the stages' names."""
        found: dict[str, Tensor] = {}
        state = images
        for name, part in self.chain.named_children():
            state = part(state)
            if name in self.exits:
                found[name] = self.exits[name](state)
        return {**found, name: state}

    def leaving_at(self, name: str) -> nn.Sequential:
        """The network that ends at an exit: the stages up to the one that it reads, and the exit. It shares their parameters."""
        names = [name for name, _ in self.chain.named_children()]
        return nn.Sequential(*self.chain[: names.index(name) + 1], self.exits[name])


def with_exits(chain: nn.Sequential, names: Sequence[str], layers: Layers, shape: tuple[int, int, int], classes: int) -> MultiExit:
    """Put a linear exit at the named stages, over all units of a dense stage and the pixel means of a convolutional one.

    Args:
        chain: f_1 … f_L, as built; it is left as it was.
        names: of stages before the last.
        layers: draws the exits' weights, in the order of the names, from a generator of their own.
        shape: channels, height and width of an image.
        classes: number of logits.

    Raises: ValueError for a name that is no stage before the last.
    """
    *before_the_last, _ = (name for name, _ in chain.named_children())
    if unknown := [name for name in names if name not in before_the_last]:
        raise ValueError(f"no stage {unknown[0]!r} before the last; there are {', '.join(before_the_last)}")
    states = _states(chain, shape)
    exits = OrderedDict((name, _exit(layers, states[name], classes)) for name in names)
    return MultiExit(chain, exits).to(next(chain.parameters()).device)


@torch.no_grad()
def _states(chain: nn.Sequential, shape: tuple[int, int, int]) -> dict[str, Float[Tensor, "n d ..."]]:
    """What every stage makes of a black image; in eval mode, which leaves running statistics alone."""
    states, state = {}, torch.zeros(1, *shape).to(next(chain.parameters()))
    was_training = chain.training
    chain.eval()
    for name, part in chain.named_children():
        state = states[name] = part(state)
    chain.train(was_training)
    return states


def _exit(layers: Layers, state: Float[Tensor, "n d ..."], classes: int) -> nn.Module:
    linear = layers.linear(state.shape[1], classes)
    return stage(pool=GlobalMean() if state.ndim > 2 else None, linear=linear)
