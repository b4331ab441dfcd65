"""What a chain with exits minimises."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from src.models.exits import MultiExit


def exit_losses(model: MultiExit, images: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
    """ℒ_l, the mean cross-entropy in nats of every exit, first to last, and of the chain itself, by the stages' names."""
    return {name: cross_entropy(logits, labels) for name, logits in model.logits(images).items()}


@dataclass
class DeepSupervision:
    """ℒ = ℒ_L + s Σ_l α_l ℒ_l, the cross-entropies of the chain and of its exits (Lee et al. 2015, Deeply-Supervised Nets, equation 3).

    The share s is 1 throughout, or falls linearly from 1 to 0 while the objective is evaluated (ibid., section 2.2: the auxiliary
    weights vanish as training goes on).

    Args:
        weights: α_l by the name of the stage that the exit reads; an exit without one is not trained.
        fading: evaluations over which s falls to 0; None: s = 1.
    """

    weights: Mapping[str, float]
    fading: int | None = None
    evaluations: int = 0

    @property
    def share(self) -> float:
        """The s of the next evaluation: max(0, 1 − t/T) at evaluation t = 0, 1, … of T."""
        return 1.0 if self.fading is None else max(0.0, 1 - self.evaluations / self.fading)

    def __call__(self, model: MultiExit, images: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
        """ℒ in nats."""
        losses = exit_losses(model, images, labels)
        _, total = losses.popitem()
        for name, weight in self.weights.items():
            total = total + self.share * weight * losses[name]
        self.evaluations += 1
        return total
