"""What a chain with exits minimises, and what its parts send to the first stage."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call
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

    @classmethod
    def alike(cls, network: MultiExit, alpha: float, fading: int | None = None) -> "DeepSupervision":
        """All exits of a network with one weight α."""
        return cls(dict.fromkeys(network.exits, alpha), fading)

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

    def state_dict(self) -> dict[str, int]:
        """What it remembers: the evaluations so far."""
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from there."""
        self.evaluations = state_dict["evaluations"]


@dataclass(frozen=True)
class ScaledSteps:
    """The mean cross-entropy in nats, by which SGD takes `factor` times its rate at the weights of all dense layers but the readout."""

    factor: float

    def __call__(self, model: nn.Module, images: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of a batch; behind it the gradients of hidden weights are `factor` times its own."""
        *hidden, _ = (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear))
        parameters = dict(model.named_parameters())
        fixed = {name: parameters[name].detach() for name in hidden}
        scaled = {name: value + self.factor * (parameters[name] - value) for name, value in fixed.items()}
        return cross_entropy(functional_call(model, scaled, (images,)), labels)


def split_gradients(
    network: MultiExit, images: Float[Tensor, "n ..."], labels: Int64[Tensor, " n"], weights: Sequence[float]
) -> Iterator[dict[str, Float64[Tensor, " p"]]]:
    """∇θ_1 of the first exit's loss and of all others, for every weight α that all exits have; in float64 and eval mode, on a copy.

    Args:
        network: its first stage has the p parameters θ_1.
        images: one batch.
        labels: likewise.
        weights: the α.

    Returns: for every α `direct`, α ∇θ_1 ℒ_l of the first exit l; `rest`, ∇θ_1(ℒ − α ℒ_l); `final`, ∇θ_1 ℒ_L of the chain; and `total`,
    ∇θ_1 ℒ of the objective as it is trained, not the sum of its parts.
    """
    twin, images = copy.deepcopy(network).double().eval(), images.double()
    first, *others, final = exit_losses(twin, images, labels).values()
    of_first, of_later, of_final = (_of_first_stage(twin, loss) for loss in (first, sum(others, final), final))
    for alpha in weights:
        total = DeepSupervision.alike(twin, alpha)(twin, images, labels)
        rest = alpha * of_later + (1 - alpha) * of_final
        yield {"direct": alpha * of_first, "rest": rest, "final": of_final, "total": _of_first_stage(twin, total)}


def _of_first_stage(network: MultiExit, loss: Float64[Tensor, ""]) -> Float64[Tensor, " p"]:
    """∇θ_1 of a loss, flattened."""
    gradients = torch.autograd.grad(loss, list(network.chain[0].parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
