"""Singular values, ranks and condition numbers of matrices, each with how it is known."""

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Extremes:
    """What a certificate says of the Jacobians of one stage, a number a sample, and how it is known.

    Attributes:
        norm: σ₁; of an enclosure its lower side.
        norm_lo: below σ₁.
        norm_hi: above σ₁; certain, or where nothing certain is known and `method` is "estimated", with probability 1 − 1e-6.
        smallest: σ_k; NaN where it is only known to lie between 0 and norm_hi.
        rank: the numerical rank; of an enclosure its upper side.
        rank_lo: at least so many.
        rank_hi: at most so many.
        condition: σ₁/σ_k; inf where the rank is deficient, NaN where it is not known.
        mean_square: Σσ²/k; NaN where it is not known.
        values: the singular values that are known, largest first.
        tolerance: τ of the rank; NaN where none was used.
        method: "exact" (within the backward error), "enclosed" or "estimated".
    """

    norm: Float[Tensor, " n"]
    norm_lo: Float[Tensor, " n"]
    norm_hi: Float[Tensor, " n"]
    smallest: Float[Tensor, " n"]
    rank: Int[Tensor, " n"]
    rank_lo: Int[Tensor, " n"]
    rank_hi: Int[Tensor, " n"]
    condition: Float[Tensor, " n"]
    mean_square: Float[Tensor, " n"]
    values: Float[Tensor, "n _"]
    tolerance: Float[Tensor, " n"]
    method: Literal["exact", "enclosed", "estimated"]

    @classmethod
    def of(cls, s: Spectrum) -> "Extremes":
        """From all singular values."""
        return cls(
            norm=s.norm,
            norm_lo=(s.norm - s.tolerance).clamp(min=0),
            norm_hi=s.norm + s.tolerance,
            smallest=s.smallest,
            rank=s.rank,
            rank_lo=s.rank_lo,
            rank_hi=s.rank_hi,
            condition=s.condition,
            mean_square=s.mean_square,
            values=s.values,
            tolerance=s.tolerance,
            method="exact",
        )


def spectrum(matrices: Float[Tensor, "*batch m d"]) -> Spectrum:
    """All singular values of a batch of matrices, by LAPACK's or cuSOLVER's SVD.

    Args:
        matrices: any floating dtype.

    Returns: their spectra, in the same dtype.
    """
    values = torch.linalg.svdvals(matrices)
    return Spectrum(values, max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps * values[..., 0])


def gram_spectrum(grams: Float[Tensor, "*batch n n"]) -> Spectrum:
    """The singular values of matrices A of n rows, from their Gram matrices AAᵀ.

    The eigenvalues of AAᵀ are σ², known to n·ε·σ₁², so that σ is known to no better than τ = √(nε)·σ₁: the rank counts the σ above that.

    Args:
        grams: AAᵀ.

    Returns: their spectra, n singular values each.
    """
    squares = torch.linalg.eigvalsh(grams).flip(-1).clamp(min=0)
    values = squares.sqrt()
    return Spectrum(values, (grams.shape[-1] * torch.finfo(grams.dtype).eps) ** 0.5 * values[..., 0])
