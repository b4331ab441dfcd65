"""The product ∏J_l itself, end to end: its norm and its smallest singular value far below what the SVD of a product can tell.

Going back from the output, J_lᵀ Q_{l+1} = Q_l R_l keeps a basis of the row space, so that (∏J)ᵀ = Q_1 R_1 R_2 ⋯ R_L. The triangular
factors are multiplied for the norm, their inverses for σ_min, each scaled with the logarithm kept aside: σ_min is then the
reciprocal of a norm, and as accurate as one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """J_L ⋯ J_l of N samples on the way back, l = L + 1 … 1.

    Attributes:
        basis: Q_l, orthonormal columns.
        forward: R_l ⋯ R_L, scaled.
        inverse: (R_l ⋯ R_L)⁻¹, scaled.
        singular: whether a factor has not the rank of the output: σ_min is 0.
        doubtful: whether a factor is singular to rounding: σ_min is not known.
        log_scale: ln of what `forward` was divided by.
        log_inverse_scale: ln of what `inverse` was divided by.
    """

    basis: Float[Tensor, "n d k"]
    forward: Float[Tensor, "n k c"]
    inverse: Float[Tensor, "n c k"]
    singular: Bool[Tensor, " n"]
    doubtful: Bool[Tensor, " n"]
    log_scale: Float[Tensor, " n"]
    log_inverse_scale: Float[Tensor, " n"]

    @classmethod
    def behind(cls, outputs: Float[Tensor, "n ..."]) -> "Product":
        """The empty product behind the last stage.

        Args:
            outputs: H_L.
        """
        n, k = len(outputs), outputs[0].numel()
        identity = torch.eye(k, dtype=outputs.dtype, device=outputs.device).expand(n, k, k)
        nothing = outputs.new_zeros(n)
        return cls(identity, identity, identity, nothing.bool(), nothing.bool(), nothing, nothing)

    def before(self, pull: Callable[[Float[Tensor, "n m k"]], Float[Tensor, "n d k"]], rank: Int[Tensor, " n"]) -> "Product":
        """With one more factor.

        Args:
            pull: Q ↦ J_lᵀ Q.
            rank: J_l has no more.
        """
        Q, R = torch.linalg.qr(pull(self.basis))
        outputs = self.inverse.shape[1]
        singular = self.singular | (rank < outputs) | (R.shape[1] < outputs)
        pivots = R.diagonal(dim1=1, dim2=2).abs()
        rounding = 4 * max(Q.shape[1], outputs) * torch.finfo(R.dtype).eps * R.abs().amax((1, 2))
        doubtful = self.doubtful | (pivots.amin(1) <= rounding)
        lost = (singular | doubtful)[:, None, None]
        forward, grown = _scaled(R @ self.forward)
        inverse, shrunk = self.inverse[..., : R.shape[1]], torch.zeros_like(grown)
        if R.shape[1] == R.shape[2]:
            apart = torch.eye(R.shape[1], dtype=R.dtype, device=R.device)
            inverse, shrunk = _scaled(torch.linalg.solve_triangular(torch.where(lost, apart, R), inverse, upper=True, left=False))
        return Product(Q, forward, inverse, singular, doubtful, self.log_scale + grown, self.log_inverse_scale + shrunk)

    @property
    def log_norm(self) -> Float[Tensor, " n"]:
        """Ln ‖J_L ⋯ J_l‖, nats."""
        return torch.linalg.matrix_norm(self.forward, 2).log() + self.log_scale

    @property
    def log_smallest(self) -> Float[Tensor, " n"]:
        """Ln σ_min(J_L ⋯ J_l), of as many singular values as there are outputs; nats; −inf where a factor is singular or narrower.

        NaN where a factor is singular to rounding alone.
        """
        value = -(torch.linalg.matrix_norm(self.inverse, 2).log() + self.log_inverse_scale)
        return torch.where(self.singular, -torch.inf, torch.where(self.doubtful, torch.nan, value))


def _scaled(matrices: Float[Tensor, "n a b"]) -> tuple[Float[Tensor, "n a b"], Float[Tensor, " n"]]:
    """Matrices whose largest entry is 1, and ln of what they were divided by; zero ones as they are."""
    size = matrices.abs().amax((1, 2))
    return matrices / torch.where(size > 0, size, 1)[:, None, None], size.log()
