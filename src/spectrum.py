"""Singular values, ranks and condition numbers of matrices, each with how it is known."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The singular values σ₁ ≥ … ≥ σ_k of a batch of m×d matrices, k = min(m, d), and what follows from them.

    τ = max(m, d)·ε·σ₁ with ε of the dtype they were computed in (LAPACK's and MATLAB's rank tolerance; Golub & Van Loan 2013,
    section 5.4.1). It stands for the backward error of the decomposition as well.
    """

    values: Float[Tensor, "*batch k"]
    tolerance: Float[Tensor, "*batch"]

    @property
    def norm(self) -> Float[Tensor, "*batch"]:
        """σ₁, the spectral norm."""
        return self.values[..., 0]

    @property
    def smallest(self) -> Float[Tensor, "*batch"]:
        """σ_k, k = min(m, d)."""
        return self.values[..., -1]

    @property
    def rank(self) -> Int[Tensor, "*batch"]:
        """Numerical rank: how many σ exceed τ."""
        return self._above(1.0)

    @property
    def rank_lo(self) -> Int[Tensor, "*batch"]:
        """How many σ exceed τ by more than the backward error."""
        return self._above(2.0)

    @property
    def rank_hi(self) -> Int[Tensor, "*batch"]:
        """How many σ may exceed τ within the backward error."""
        return (self.values > 0).sum(-1)

    @property
    def is_deficient(self) -> Bool[Tensor, "*batch"]:
        """Whether the numerical rank is below min(m, d)."""
        return self.rank < self.values.shape[-1]

    @property
    def condition(self) -> Float[Tensor, "*batch"]:
        """σ₁/σ_k; inf where the matrix is rank-deficient."""
        return torch.where(self.is_deficient, torch.inf, self.norm / self.smallest)

    @property
    def mean_square(self) -> Float[Tensor, "*batch"]:
        """Σσ²/k, the mean squared singular value."""
        return self.values.square().mean(-1)

    @property
    def stable_rank(self) -> Float[Tensor, "*batch"]:
        """Σσ²/σ₁² (Rudelson & Vershynin 2007); NaN for a zero matrix."""
        return (self.values / self.norm.unsqueeze(-1)).square().sum(-1)

    def _above(self, multiple: float) -> Int[Tensor, "*batch"]:
        return (self.values > multiple * self.tolerance.unsqueeze(-1)).sum(-1)


def spectrum(matrices: Float[Tensor, "*batch m d"]) -> Spectrum:
    """All singular values of a batch of matrices, by LAPACK's or cuSOLVER's SVD.

    Args:
        matrices: any floating dtype.

    Returns: their spectra, in the same dtype.
    """
    values = torch.linalg.svdvals(matrices)
    return Spectrum(values, max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps * values[..., 0])
