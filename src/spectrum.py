"""Singular values, ranks and condition numbers of matrices, each with how it is known."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Real
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


Knowledge = Literal["exact", "enclosed", "estimated"]
STRENGTHS: tuple[Knowledge, ...] = ("estimated", "enclosed", "exact")


def weakest(of: Iterable[Knowledge]) -> Knowledge:
    """How something is known that follows from several others."""
    return min(of, key=STRENGTHS.index)


@dataclass(frozen=True)
class Known:
    """A quantity of every matrix, an interval around it, and how that is known.

    Attributes:
        value: NaN where only the interval is known.
        lo: at least so much.
        hi: at most so much.
        how: "exact": within the backward error, which the interval is; "enclosed": the interval is certain; "estimated": it holds with
            probability 1 − 1e-6 over the random start.
    """

    value: Real[Tensor, " n"]
    lo: Real[Tensor, " n"]
    hi: Real[Tensor, " n"]
    how: Knowledge

    def over(self, other: "Known") -> "Known":
        """The quotient of two quantities that are not negative; by zero it is inf."""
        lo, hi = (torch.where(below > 0, above / below, torch.inf) for above, below in ((self.lo, other.hi), (self.hi, other.lo)))
        value = torch.where(other.value.isnan() | (other.value > 0), self.value / other.value, torch.inf)
        return Known(value, lo, hi, weakest([self.how, other.how]))


@dataclass(frozen=True)
class Extremes:
    """What a certificate says of the Jacobians of one stage, a number a sample.

    Attributes:
        norm: σ₁.
        smallest: σ_k, k = min(m, d); 0 where the rank is deficient beyond doubt.
        active: σ_r, the smallest singular value above τ, r the rank: σ_min on the active subspace.
        rank: how many singular values exceed τ.
        full: min(m, d).
        longest: max(m, d).
        structural: no rank can exceed it: the rows and columns that are not zero, or the narrowest tensor on the way.
        mean_square: Σσ²/k; NaN where it is not known.
        values: the singular values that are known, largest first.
        tolerance: τ of the rank; NaN where none was used.
        method: how it was measured: "exact" from all singular values, "factorised" or "matrix_free".
    """

    norm: Known
    smallest: Known
    active: Known
    rank: Known
    full: int
    longest: int
    structural: Int[Tensor, " n"]
    mean_square: Float[Tensor, " n"]
    values: Float[Tensor, "n _"]
    tolerance: Float[Tensor, " n"]
    method: Literal["exact", "factorised", "matrix_free"]

    @classmethod
    def of(cls, s: Spectrum, longest: int, structural: Int[Tensor, " n"]) -> "Extremes":
        """From all singular values."""

        def within_backward_error(value: Tensor) -> Known:
            return Known(value, (value - s.tolerance).clamp(min=0), value + s.tolerance, "exact")

        last = (s.rank - 1).clamp(min=0).unsqueeze(-1)
        return cls(
            norm=within_backward_error(s.norm),
            smallest=within_backward_error(s.smallest),
            active=within_backward_error(s.values.gather(-1, last).squeeze(-1)),
            rank=Known(s.rank, s.rank_lo, s.rank_hi, "exact"),
            full=s.values.shape[-1],
            longest=longest,
            structural=structural,
            mean_square=s.mean_square,
            values=s.values,
            tolerance=s.tolerance,
            method="exact",
        )

    @property
    def condition(self) -> Known:
        """σ₁/σ_k; inf where the rank is deficient."""
        found = self.norm.over(self.smallest)
        deficient = self.rank.value < self.full
        return replace(found, value=torch.where(deficient, torch.inf, found.value), hi=torch.where(deficient, torch.inf, found.hi))

    @property
    def active_condition(self) -> Known:
        """σ₁/σ_r: on the subspace where J is not zero."""
        return self.norm.over(self.active)

    def above(self, level: Float[Tensor, " n"], moved: Float[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """At least and at most how many singular values exceed a level once each has moved by no more than `moved`."""
        if self.method == "exact":
            least, most = ((self.values > side.unsqueeze(1)).sum(1) for side in (level + moved, level - moved))
            return least, most
        certain = torch.where(self.active.value > level + moved, self.rank.value, 0)
        return certain, torch.where(moved < level, self.rank.value, self.full)

    @property
    def stable_rank(self) -> Float[Tensor, " n"]:
        """Σσ²/σ₁² (Rudelson & Vershynin 2007); NaN for a zero matrix, and where Σσ² is not known."""
        return self.full * self.mean_square / self.norm.value.square()


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
