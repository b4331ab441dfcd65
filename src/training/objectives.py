"""What a chain with exits minimises."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from src.models.exits import MultiExit


@dataclass(frozen=True)
class DeepSupervision:
    """ℒ = ℒ_L + Σ_l α_l ℒ_l, the cross-entropies of the chain and of its exits (Lee et al. 2015, Deeply-Supervised Nets, equation 3).

    Args:
        weights: α_l by the name of the stage that the exit reads.
    """

    weights: Mapping[str, float]

    def __call__(self, model: MultiExit, images: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
        """The weighted sum, in nats."""
        losses = {name: cross_entropy(logits, labels) for name, logits in model.logits(images).items()}
        _, final = losses.popitem()
        return final + sum(self.weights[name] * loss for name, loss in losses.items())
