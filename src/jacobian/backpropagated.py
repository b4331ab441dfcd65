"""The Jacobian as training sees it: taken by autograd's own formulas, in the dtype that the model has."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from src.jacobian.materialised import layer_jacobian
from src.jacobian.structured import Dense, at_layer
from src.spectrum import Extremes, spectrum

Call = tuple[nn.Module, Tensor]  # a stage and its inputs


@dataclass(frozen=True)
class Backpropagated:
    """What J' = J + E, the backpropagated Jacobian, has left of J; a number a sample, NaN where J is not known.

    Attributes:
        rank: how many singular values of J' exceed max(m, d)·ε·σ₁(J), ε of the training's dtype.
        error: ‖E‖_F/‖J‖_F.
    """

    rank: Float[Tensor, " n"]
    error: Float[Tensor, " n"]

    @classmethod
    def of(cls, found: Extremes, jacobians: Float[Tensor, "n m d"] | None, trained: Call, structure: Dense | None) -> "Backpropagated":
        """Compare with what is known of J.

        By Weyl's inequality no singular value moves by more than ‖E‖: J' is decomposed only where one lies so near to the limit.

        Args:
            found: the singular values of J.
            jacobians: J, where it was written out.
            trained: the stage as training differentiates it, with its inputs.
            structure: J = diag(s) W, where it is.
        """
        own = None if structure is None else at_layer(trained[0], structure.layer, trained[1])
        if own is not None and structure is not None and found.method != "matrix_free":
            slopes, W = own.slopes.to(structure.slopes), structure.weight
            difference = ((slopes - structure.slopes).square() @ W.square().sum(1)).sqrt()
        elif jacobians is not None:
            J = layer_jacobian(*trained).to(jacobians)
            difference = torch.linalg.matrix_norm(J - jacobians)
        else:
            unknown = torch.full_like(found.norm.value, torch.nan)
            return cls(unknown, unknown)
        limit = found.longest * torch.finfo(trained[1].dtype).eps * found.norm.value
        rank, most = found.above(limit, difference)
        near = rank < most
        if near.any():
            s = spectrum(J[near] if own is None else slopes[near].unsqueeze(2) * W)
            rank[near] = (s.values > limit[near].unsqueeze(1)).sum(1)
        size = (found.full * found.mean_square).sqrt()
        return cls(rank.to(limit), torch.where(size > 0, difference / size, 0.0))
