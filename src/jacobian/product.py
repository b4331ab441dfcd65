"""The product ∏J_l itself, end to end: its norm and its smallest singular value far below what the SVD of a product can tell.

Going back from the output, J_lᵀ Q_{l+1} = Q_l R_l keeps a basis of the row space, so that (∏J)ᵀ = Q_1 R_1 R_2 ⋯ R_L. The triangular
factors are multiplied for the norm, their inverses for σ_min, each scaled with the logarithm kept aside: σ_min is then the
reciprocal of a norm, and as accurate as one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """J_L ⋯ J_l of N samples on the way back, l = L + 1 … 1.

    Attributes:
        basis: Q_l, orthonormal columns.
        forward: R_l ⋯ R_L, scaled.
        inverse: (R_l ⋯ R_L)⁻¹, scaled; NaN once a factor is not square: the product is then narrower than its output.
        log_scale: ln of what `forward` was divided by.
        log_inverse_scale: ln of what `inverse` was divided by.
    """

    basis: Float[Tensor, "n d k"]
    forward: Float[Tensor, "n k c"]
    inverse: Float[Tensor, "n c k"]
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
        return cls(identity, identity, identity, nothing, nothing)

    def before(self, pull: Callable[[Float[Tensor, "n m k"]], Float[Tensor, "n d k"]]) -> "Product":
        """With one more factor.

        Args:
            pull: Q ↦ J_lᵀ Q.
        """
        Q, R = torch.linalg.qr(pull(self.basis))
        forward, grown = _scaled(R @ self.forward)
        if R.shape[-2] == R.shape[-1]:
            inverse, shrunk = _scaled(torch.linalg.solve_triangular(R, self.inverse, upper=True, left=False))
        else:
            inverse, shrunk = self.inverse[..., : R.shape[-2]] * torch.nan, torch.zeros_like(grown)
        return Product(Q, forward, inverse, self.log_scale + grown, self.log_inverse_scale + shrunk)

    @property
    def log_norm(self) -> Float[Tensor, " n"]:
        """Ln ‖J_L ⋯ J_l‖, nats."""
        return torch.linalg.matrix_norm(self.forward, 2).log() + self.log_scale

    @property
    def log_smallest(self) -> Float[Tensor, " n"]:
        """Ln σ_min(J_L ⋯ J_l), of as many singular values as there are outputs; nats; −inf where a factor is singular or narrower."""
        finite = self.inverse.isfinite().flatten(1).all(1)
        norm = torch.linalg.matrix_norm(torch.where(finite[:, None, None], self.inverse, 0), 2)
        return torch.where(finite, -(norm.log() + self.log_inverse_scale), -torch.inf)


def _scaled(matrices: Float[Tensor, "n a b"]) -> tuple[Float[Tensor, "n a b"], Float[Tensor, " n"]]:
    """Matrices whose largest entry is 1, and ln of what they were divided by; zero ones as they are."""
    size = matrices.abs().amax((1, 2))
    return matrices / torch.where(size > 0, size, 1)[:, None, None], size.log()
