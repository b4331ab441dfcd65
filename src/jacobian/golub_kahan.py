"""The largest singular values of matrices that are known by their products alone, by Golub–Kahan–Lanczos bidiagonalisation.

Golub & Kahan 1965, "Calculating the singular values and pseudo-inverse of a matrix"; the probability that a random start is unlucky
after Kuczyński & Woźniakowski 1992, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start",
theorem 4.1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Tensor], Tensor]
FIRST_LOOK = 4  # steps; a look at the Ritz values costs more than a step


@dataclass(frozen=True)
class Largest:
    """σ₁ of N matrices from below, and what is known of it from above.

    Attributes:
        value: the largest Ritz value θ = ‖Jv‖ of a unit v: σ₁ ≥ θ.
        vector: that v; a start for a matrix that has changed a little.
        residual: ‖Jᵀu − θv‖ of the Ritz pair: some singular value lies within it of θ.
        steps: products with J, and as many with Jᵀ.
    """

    value: Float[Tensor, " n"]
    vector: Float[Tensor, "n d"]
    residual: Float[Tensor, " n"]
    steps: int

    def upper(self, risk: float) -> Float[Tensor, " n"]:
        """θ/√(1−ε): above σ₁ with probability 1 − risk over the random start, where 1.648·√d·exp(−√ε(2k−1)) = risk.

        Returns: inf where the steps are too few to tell.
        """
        root = math.log(1.648 * math.sqrt(self.vector.shape[1]) / risk) / (2 * self.steps - 1)
        return self.value / math.sqrt(1 - root**2) if root < 1 else torch.full_like(self.value, torch.inf)


def steps_for(slack: float, risk: float, columns: int) -> int:
    """The fewest steps after which `upper(risk)` is at most 1 + slack times θ."""
    root = math.sqrt(1 - 1 / (1 + slack) ** 2)
    return math.ceil((math.log(1.648 * math.sqrt(columns) / risk) / root + 1) / 2)


def largest(push: Product, pull: Product, start: Float[Tensor, "n d"], tolerance: float = 1e-7, least: int = 1, most: int = 300) -> Largest:
    """σ₁ of N matrices J of m×d at once.

    J V = U B and Jᵀ U = V Bᵀ + β v eᵀ with B upper bidiagonal; stops when β·|eᵀp|, p the left singular vector of B, is below
    tolerance·θ for every matrix. The bases are not reorthogonalised: copies of converged values come, σ₁ stays.

    Args:
        push: u = Jv, [n, d] to [n, m].
        pull: v = Jᵀu, [n, m] to [n, d].
        start: v₁, random; any length above 0.
        tolerance: the relative residual at which a matrix has converged.
        least: steps before which it does not stop.
        most: steps after which it stops all the same.

    Returns: values, vectors and residuals; zeros for a zero matrix, NaN for one whose products are not finite.
    """
    v = _unit(start)[0]
    u, alpha = _unit(push(v))
    alphas, basis = [alpha], [v]
    betas: list[Tensor] = []
    look = max(FIRST_LOOK, least)
    # what is left where the Krylov space is exhausted is rounding
    nothing = 100 * torch.finfo(alpha.dtype).eps * alpha
    while True:
        r, beta = _unit(pull(u) - alpha[:, None] * v, nothing)
        steps = len(alphas)
        at_end = steps >= most or not beta.any()
        if at_end or steps == look:
            p, theta, q = _ritz(alphas, betas)
            residual = beta * p[:, -1].abs()
            if at_end or bool((residual <= tolerance * theta).all()):
                return Largest(theta, _unit((q.unsqueeze(1) @ torch.stack(basis, 1)).squeeze(1))[0], residual, steps)
            look += max(2, steps // 3)
        betas.append(beta)
        v = r
        basis.append(v)
        u, alpha = _unit(push(v) - beta[:, None] * u, nothing)
        alphas.append(alpha)


def _unit(vectors: Float[Tensor, "n d"], nothing: Float[Tensor, " n"] | float = 0.0) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Vectors of length 1 and their lengths; zero for those no longer than `nothing`."""
    length = torch.linalg.vector_norm(vectors, dim=1)
    kept = length > nothing
    return vectors * (kept / torch.where(kept, length, 1))[:, None], length * kept


def _ritz(alphas: list[Tensor], betas: list[Tensor]) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"], Float[Tensor, "n k"]]:
    """The largest singular triple of every bidiagonal B, from the eigenvectors of BBᵀ: σ₁ loses nothing by the square."""
    B = torch.diag_embed(torch.stack(alphas, 1))
    if betas:
        B = B + torch.diag_embed(torch.stack(betas, 1), 1)
    exact = B.cpu().double()
    # LAPACK refuses NaN, which comes back with B
    p = torch.linalg.eigh((exact @ exact.mT).nan_to_num(0, 0, 0)).eigenvectors[..., -1].to(B)
    q, value = _unit((p.unsqueeze(1) @ B).squeeze(1))
    return p, value, q
