"""The largest singular values of matrices that are known by their products alone, by Golub–Kahan–Lanczos bidiagonalisation.

Golub & Kahan 1965, "Calculating the singular values and pseudo-inverse of a matrix"; the probability that a random start is unlucky
after Kuczyński & Woźniakowski 1992, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start",
theorem 4.1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import pad

Product = Callable[[Tensor], Tensor]
FIRST_LOOK = 8  # steps; a look at the Ritz values costs more than a step
TOGETHER = 100  # rows of matrices whose LU several threads do: of a batch of 150 and more that of torch 2.14 with MKL fails or hangs
AGAIN = 3  # the same from a start that is nearly a singular vector, and steps of the power method before
TOLERANCE = 1e-7  # of σ₁, relative
REFINED = 1e-6  # the same, where single precision finds the vector
# of a random start that is so unlucky that σ₁ lies above the upper side of its estimate, and by how much that may exceed it
RISK, SLACK = 1e-6, 0.2


@dataclass(frozen=True)
class Largest:
    """σ₁ of N matrices from below, and what is known of it from above.

    Attributes:
        value: the largest Ritz value θ = ‖Jv‖ of a unit v: σ₁ ≥ θ.
        vector: that v; a start for a matrix that has changed a little.
        residual: ‖Jᵀu − θv‖ of the Ritz pair: some singular value lies within it of θ.
        gap: θ less the next Ritz value.
        smallest: the smallest Ritz value with its residual: σ_min, k = min(m, d), lies below; inf where the directions ran out.
        steps: products with J, and as many with Jᵀ, that each matrix took.
    """

    value: Float[Tensor, " n"]
    vector: Float[Tensor, "n d"]
    residual: Float[Tensor, " n"]
    gap: Float[Tensor, " n"]
    smallest: Float[Tensor, " n"]
    steps: Int[Tensor, " n"]

    @property
    def error(self) -> Float[Tensor, " n"]:
        """min(r, r²/gap): as far as that singular value is from θ (Parlett 1998, "The symmetric eigenvalue problem", theorem 11.7.1)."""
        return torch.where(self.residual < self.gap, self.residual.square() / torch.where(self.gap > 0, self.gap, 1), self.residual)

    def upper(self, risk: float) -> Float[Tensor, " n"]:
        """θ/√(1−ε): above σ₁ with probability 1 − risk over the random start, where 1.648·√d·exp(−√ε(2k−1)) = risk.

        Returns: inf where the steps are too few to tell.
        """
        root = math.log(1.648 * math.sqrt(self.vector.shape[1]) / risk) / (2 * self.steps.to(self.value) - 1)
        return torch.where(root < 1, self.value / (1 - root.square()).clamp(min=0).sqrt(), torch.inf)


def steps_for(slack: float, risk: float, columns: int) -> int:
    """The fewest steps after which `upper(risk)` is at most 1 + slack times θ."""
    root = math.sqrt(1 - 1 / (1 + slack) ** 2)
    return math.ceil((math.log(1.648 * math.sqrt(columns) / risk) / root + 1) / 2)


def largest(
    push: Product, pull: Product, start: Float[Tensor, "n d"], tolerance: float = TOLERANCE, least: int = FIRST_LOOK, most: int = 300
) -> Largest:
    """σ₁ of N matrices J of m×d at once.

    J V = U B and Jᵀ U = V Bᵀ + β v eᵀ with B upper bidiagonal; the residual is β·|eᵀp|, p the left singular vector of B. The
    bases are not reorthogonalised: copies of converged values come, σ₁ stays.

    Args:
        push: u = Jv, [n, d] to [n, m].
        pull: v = Jᵀu, [n, m] to [n, d].
        start: v₁, random; any length above 0.
        tolerance: the relative error at which a matrix has converged, if it has grown by no more since the last look either; it stops
            when all have.
        least: steps before which it does not stop.
        most: steps after which it stops all the same; and no more than there are directions, and one that the start may add.

    Returns: values, vectors and residuals; zeros for a zero matrix, NaN for one whose products are not finite.
    """
    v = _unit(start)[0]
    u, alpha = _unit(push(v))
    alphas, basis = [alpha], [v]
    betas: list[Tensor] = []
    waiting = torch.arange(len(v), device=v.device)
    found = Largest(alpha.clone(), v.clone(), alpha.clone(), alpha.clone(), alpha.clone(), torch.ones_like(waiting))
    look = least
    # what is left where the Krylov space is exhausted is rounding
    rounding, top = 100 * torch.finfo(alpha.dtype).eps, alpha
    most = min(most, v.shape[1] + 1, u.shape[1] + 1)
    while True:
        r, beta = _unit(torch.addcmul(pull(u), alpha[:, None], v, value=-1), rounding * top)
        betas.append(beta)
        steps = len(alphas)
        at_end = steps >= most or not beta.any()
        if at_end or steps == look:
            before = found.value[waiting]
            q, smallest = _look(found, waiting, torch.stack(alphas, 1)[waiting], torch.stack(betas, 1)[waiting])
            # a start with little of the first singular vector in it converges to the second for a while
            settled = (found.value[waiting] - before <= tolerance * before) & (found.error <= tolerance * found.value)[waiting]
            wait = ~settled & (not at_end)
            done = waiting[~wait]
            if len(done):
                found.steps[done] = steps
                found.smallest[done] = smallest(~wait)
                found.vector[done] = _unit(sum(part[:, None] * v[done] for part, v in zip(q[~wait].T, basis, strict=True)))[0]
            waiting = waiting[wait]
            if len(waiting) == 0:
                return found
            look += max(3, steps // 4)
        v = r
        basis.append(v)
        u, alpha = _unit(torch.addcmul(push(v), beta[:, None], u, value=-1), rounding * top)
        alphas.append(alpha)
        top = torch.maximum(top, alpha)


def refined(push: Product, pull: Product, rough: Largest, tolerance: float = REFINED) -> Largest:
    """σ₁ from a vector that was found in a lower precision: its error is squared, so that one product is enough for most.

    Args:
        push: u = Jv.
        pull: v = Jᵀu.
        rough: of nearly the same matrices.
        tolerance: the relative error that is wanted; where it is missed more steps follow.
    """
    v = _unit(rough.vector.to(torch.float64))[0]
    rounding = 1e3 * torch.finfo(rough.value.dtype).eps
    for _ in range(AGAIN):
        u, theta = _unit(push(v))
        back = pull(u)
        residual = torch.linalg.vector_norm(back - theta[:, None] * v, dim=1)
        found = Largest(theta, v, residual, rough.gap.to(v), rough.smallest + rounding * theta, rough.steps)
        if (found.error <= tolerance * theta).all():
            return found
        # where σ₁ ≫ σ₂ copies of it come early, and rounding stays where they cancel: a step of the power method leaves little of that
        v = _unit(back)[0]
    more = largest(push, pull, v, tolerance, AGAIN)
    return replace(more, steps=rough.steps)  # those from a random start, which alone the upper side may count


def joined(parts: Sequence[Largest]) -> Largest:
    """Several batches as one."""
    each = ((part.value, part.vector, part.residual, part.gap, part.smallest, part.steps) for part in parts)
    return Largest(*(torch.cat(values) for values in zip(*each, strict=True)))


def _unit(vectors: Float[Tensor, "n d"], nothing: Float[Tensor, " n"] | float = 0.0) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Vectors of length 1 and their lengths; zero for those no longer than `nothing`."""
    length = torch.linalg.vector_norm(vectors, dim=1)
    void = length <= nothing  # NaN is not
    return vectors * length.reciprocal().masked_fill_(void, 0).unsqueeze(1), length.masked_fill_(void, 0)


def _look(
    found: Largest, at: Int[Tensor, " w"], diagonal: Float[Tensor, "w k"], beside: Float[Tensor, "w k"]
) -> tuple[Float[Tensor, "w k"], Callable[[Tensor], Tensor]]:
    """Take down the largest Ritz values of what is still waited for, from the eigenvalues of BBᵀ: σ₁ loses nothing by the square.

    Args:
        found: where to take them down.
        at: the matrices that are waited for.
        diagonal: α of their B.
        beside: its β, the last of them outside of it.

    Returns: the last right singular vector of every B; what gives the smallest Ritz value with its residual of those that are asked for.
    """
    inner = beside[:, :-1]
    # LAPACK refuses NaN; squares in single precision may overflow
    α, β = diagonal.cpu().double(), inner.cpu().double()
    T = torch.diag_embed(α.square() + pad(β.square(), (0, 1)))
    T += torch.diag_embed(α[:, 1:] * β, 1) + torch.diag_embed(α[:, 1:] * β, -1)
    T = T.nan_to_num(0, 0, 0)
    squares = torch.linalg.eigvalsh(T).clamp(min=0)
    finite = (diagonal.isfinite().all(1) & inner.isfinite().all(1)).unsqueeze(1)
    values = torch.where(finite, squares.sqrt().to(diagonal), torch.nan)
    last = _outer_vector(T, squares, -1).to(diagonal)
    residual = beside[:, -1] * last[:, -1].abs()
    found.value[at], found.residual[at] = values[:, -1], residual
    # once θ has converged to √ε, a copy of it comes: the next value tells nothing any more
    rough = residual > torch.finfo(values.dtype).eps ** 0.5 * values[:, -1]
    gap = values[:, -1] - values[:, -2] if values.shape[1] > 1 else values[:, -1]
    found.gap[at] = torch.where(rough, gap, found.gap[at])

    def back(p: Tensor, of: slice | Tensor) -> Tensor:
        """Bᵀp."""
        return diagonal[of] * p + pad(inner[of] * p[:, :-1], (1, 0))

    def smallest(of: Bool[Tensor, " w"]) -> Float[Tensor, " _"]:
        least = _outer_vector(T[of], squares[of], 0).to(diagonal)
        θ = torch.linalg.vector_norm(back(least, of), dim=1)
        return torch.where(diagonal[of].amin(1) > 0, torch.hypot(θ, beside[of, -1] * least[:, -1]), torch.inf)

    return _unit(back(last, slice(None)))[0], smallest


def _outer_vector(T: Float64[Tensor, "w k k"], eigenvalues: Float64[Tensor, "w k"], which: Literal[0, -1]) -> Float64[Tensor, "w k"]:
    """The eigenvector of the least (0) or of the largest (−1) eigenvalue of tridiagonal T, by one step of inverse iteration.

    Off its diagonal T is not negative: its last eigenvector has no change of sign and its first the most (Perron and Frobenius), so that
    neither start is orthogonal to what it shall become.
    """
    top = eigenvalues[:, -1:]
    size = torch.where(top > 0, top, 1)
    ones = torch.ones(T.shape[-1], dtype=T.dtype)
    start = ones if which else ones * (-1.0) ** torch.arange(len(ones))
    outside = 8 * torch.finfo(T.dtype).eps * (1 if which else -1)
    shift = eigenvalues[:, which] / size[:, 0] + outside
    shifted = T / size.unsqueeze(2) - torch.diag_embed(shift.unsqueeze(1).expand(-1, len(ones)))
    with _one_thread() if len(ones) > TOGETHER else nullcontext():
        vectors, _ = torch.linalg.solve_ex(shifted, start.expand(len(T), -1))
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
