"""Stages whose layer Jacobian is diag(s) W: one dense layer, and behind it only what acts on each unit alone.

A factorisation of W then serves every sample: σ₁ by Golub–Kahan–Lanczos on v ↦ s∘(Wv), σ_min the same way on the inverse, which is
accurate where the decomposition of J itself loses σ_min to the rounding of σ₁.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.fx import Node, Tracer
from torch.nn.utils.rnn import pad_sequence

from src.jacobian.bounds import ACTIVATIONS, POINTWISE
from src.jacobian.golub_kahan import REFINED, RISK, SLACK, Largest, Product, largest, refined, steps_for
from src.jacobian.materialised import transpose
from src.paths import in_line, keeps_its_forward
from src.spectrum import Extremes, Known

OF_SHAPES = {"getattr", "getitem", "size"}
FLATTENING = {"clone", "contiguous", "flatten", "reshape", "view"}
ROUGH = 1e-4  # of σ_min on the active subspace, relative
IN_SINGLE = 1e15  # numbers whose squares single precision holds


@dataclass(frozen=True)
class Dense:
    """J_n = diag(s_n) W of N samples, and what ∇θ is made of: h, the input of W, and whether W has a bias.

    Attributes:
        weight: W, m×d.
        slopes: s, the derivative behind W of every unit.
        hidden: h.
        has_bias: whether a bias is added to Wh.
        layer: the name of that layer in its stage.
    """

    weight: Float[Tensor, "m d"]
    slopes: Float[Tensor, "n m"]
    hidden: Float[Tensor, "n d"]
    has_bias: bool
    layer: str

    def jacobians(self) -> Float[Tensor, "n m d"]:
        """J written out."""
        return self.slopes.unsqueeze(2) * self.weight

    def lines(self) -> Int[Tensor, " n"]:
        """The rows of J that are not zero, or its columns: the fewer."""
        active, present = (self.slopes != 0).to(self.weight), (self.weight != 0).to(self.weight)
        rows = (self.slopes != 0) & (present.amax(1) > 0)
        return torch.minimum(rows.sum(1), ((active @ present) > 0).sum(1))

    def largest(self) -> Float[Tensor, " n"]:
        """No entry of J is larger."""
        return self.slopes.abs().amax(1) * self.weight.abs().max()

    def pull(self, covectors: Float[Tensor, "n m k"]) -> Float[Tensor, "n d k"]:
        """JᵀQ = Wᵀ(s∘Q)."""
        rows = (self.slopes.unsqueeze(2) * covectors).mT.flatten(0, 1)
        return (rows @ self.weight).unflatten(0, (len(covectors), -1)).mT

    def parameter_norm(self) -> Float[Tensor, " n"]:
        """‖P‖ = max|s| √(‖h‖² + 1), without the 1 where there is no bias."""
        return self.slopes.abs().amax(1) * (self.hidden.square().sum(1) + self.has_bias).sqrt()

    def gradient_norm(self, covectors: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
        """‖gᵀP‖ = ‖s∘g‖ √(‖h‖² + 1)."""
        return (self.slopes * covectors).norm(dim=1) * (self.hidden.square().sum(1) + self.has_bias).sqrt()

    def gradient_matrix(self, covectors: Float[Tensor, "n m"]) -> Float[Tensor, "n _"]:
        """A matrix with the singular values of the N×|θ| matrix of rows gᵀP, min(N, m)·min(N, d+1) columns wide.

        Its rows are δ ⊗ (h, 1) with δ = s∘g. Either factor is turned into the basis of its own row space, which changes no product.
        """
        ones = self.hidden.new_ones(len(self.hidden), int(self.has_bias))
        δ, h = (_coordinates(rows) for rows in (self.slopes * covectors, torch.cat([self.hidden, ones], 1)))
        return (δ.unsqueeze(2) * h.unsqueeze(1)).flatten(1)


def _coordinates(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
    """The rows in an orthonormal basis of min(N, d) vectors that they lie in."""
    return torch.linalg.qr(rows.T, mode="r").R.T if len(rows) < rows.shape[1] else rows


def dense(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> Dense | None:
    """The structure of a stage at every input; None unless it is one dense layer with only pointwise operations behind it.

    Args:
        stage: f, in eval mode, acting on each sample alone.
        inputs: N inputs.
    """
    layer = only_linear(stage)
    return at_layer(stage, layer, inputs) if layer is not None else None


def at_layer(stage: nn.Module, layer: str, inputs: Float[Tensor, "n ..."]) -> Dense | None:
    """The structure of a stage whose one dense layer is known by name; None unless that is called on a vector a sample."""
    linear = stage.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    calls: list[Tensor] = []

    def shifted(shift: Tensor) -> Tensor:
        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls.append(arguments[0])
            return output + shift if output.shape == shift.shape else output

        hook = linear.register_forward_hook(add)
        try:
            outputs: Tensor = stage(inputs)
        finally:
            hook.remove()
        return outputs

    outputs, pull_back = transpose(shifted, inputs.new_zeros(len(inputs), linear.out_features))
    if calls[0].shape != (len(inputs), inputs[0].numel()):
        return None
    return Dense(linear.weight.detach(), pull_back(torch.ones_like(outputs)), calls[0], linear.bias is not None, layer)


def only_linear(stage: nn.Module) -> str | None:
    """The dense layer of a stage that has one call, in front of it only what rearranges, behind it only what acts on each unit alone."""
    found = None
    for name, step in _steps(stage):
        if isinstance(step, nn.Module) and not keeps_its_forward(step):
            return None
        if found is None and type(step) is nn.Linear and step._parameters.keys() == {"weight", "bias"}:
            found = name
        elif not (_rearranges(step) if found is None else _is_pointwise(step)):
            return None
    own = sum(parameter.numel() for parameter in stage.parameters())
    return found if found is not None and own == sum(p.numel() for p in stage.get_submodule(found).parameters()) else None


def _steps(stage: nn.Module) -> list[tuple[str, nn.Module | str]]:
    """What a stage applies one after the other, modules by their names and other calls by the function's; nothing where it branches."""
    modules = in_line(stage)
    if modules is not None:
        return [*modules.items()]
    root = nn.Sequential(stage)  # so that a leaf stays one node
    try:
        nodes = [node for node in Tracer().trace(root).nodes if _called(node) not in OF_SHAPES]
    except Exception:  # tracing runs the model's own code: anything may be raised
        return []
    by_name = dict(root.named_modules(remove_duplicate=False))
    steps: list[tuple[str, nn.Module | str]] = []
    for before, node in pairwise(nodes):
        if [source for source in node.all_input_nodes if source in nodes] != [before]:
            return []
        if node.op != "output":
            name = str(node.target)
            steps.append((name.removeprefix("0").removeprefix("."), by_name[name]) if node.op == "call_module" else ("", _called(node)))
    return steps


def _rearranges(step: nn.Module | str) -> bool:
    return step in FLATTENING if isinstance(step, str) else isinstance(step, nn.Identity | nn.Flatten | nn.Dropout)


def _is_pointwise(step: nn.Module | str) -> bool:
    return step in POINTWISE if isinstance(step, str) else isinstance(step, (*ACTIVATIONS, nn.Identity, nn.Dropout))


def _called(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def extremes(stages: Sequence[Dense], start: Float[Tensor, "s n m"]) -> list[Extremes | None]:
    """σ₁, σ_min and the rank of every J = diag(s) W, m ≤ d, by one factorisation W = LQ: J has the singular values of diag(s) L.

    σ_min = 1/‖(diag(s) L)⁻¹‖, enclosed by a Ritz value and the Frobenius norm of the inverse, all from one L⁻¹. Where a slope is 0,
    σ_min is 0, and what remains is σ_r over the rows with s ≠ 0, from the inverse of the Cholesky factor of their Gram matrix.

    Args:
        stages: of as many rows m ≤ d and samples; they are measured at once.
        start: random directions to start from.

    Returns: what is known of each stage; None where the rank can't be told from these numbers alone.
    """
    s = torch.stack([J.slopes for J in stages])
    L = torch.stack([torch.linalg.qr(J.weight.T, mode="r").R.T for J in stages])
    top = _norm(L, s, start)
    frobenius = (s.square() @ L.square().sum(2, keepdim=True)).squeeze(2).sqrt()
    norm, above = top.value.reshape(frobenius.shape), torch.minimum(top.upper(RISK).reshape(frobenius.shape), frobenius)
    alive = (s != 0).all(2)
    least, beyond = torch.zeros_like(norm), torch.zeros_like(norm)
    if alive.any():
        M = torch.linalg.solve_triangular(L, torch.eye(L.shape[2], dtype=L.dtype, device=L.device).expand_as(L), upper=False)
        least, beyond = (torch.where(alive, side, 0) for side in _least(M, torch.where(alive.unsqueeze(2), s, 1), start))
    return [_extremes(J, *parts) for J, *parts in zip(stages, L, start, norm, above, least, beyond, strict=True)]


def _extremes(
    J: Dense,
    L: Float[Tensor, "m m"],
    start: Float[Tensor, "n m"],
    norm: Float[Tensor, " n"],
    above: Float[Tensor, " n"],
    least: Float[Tensor, " n"],
    beyond: Float[Tensor, " n"],
) -> Extremes | None:
    """What is known of one stage.

    Args:
        J: the stage.
        L: of W = LQ.
        start: random directions.
        norm: σ₁ from below.
        above: σ₁ from above.
        least: σ_min from above where no slope is 0, else 0.
        beyond: and from below.
    """
    s, d = J.slopes, J.weight.shape[1]
    eps = torch.finfo(s.dtype).eps
    tolerance = d * eps * norm
    rounding = 4 * tolerance  # of the factorisation and of the products with L, in every singular value
    active = s != 0
    alive, rank = active.all(1), active.sum(1)
    damped = ~alive & (rank > 0)
    if damped.any():
        found = _active(L, s[damped], start[damped])
        if found is None:
            return None
        least, beyond = (side.masked_scatter(damped, part) for side, part in zip((least, beyond), found, strict=True))
    if not (least > rounding)[rank > 0].all():
        return None
    lower, upper = (beyond - rounding).clamp(min=0), least + rounding
    mean_square = (s.square() @ L.square().sum(1)) / len(L)
    return Extremes(
        norm=Known(norm, (norm - rounding).clamp(min=0), above + rounding, "estimated"),
        smallest=Known(torch.where(alive, least, 0), torch.where(alive, lower, 0), torch.where(alive, upper, 0), "enclosed"),
        active=Known(least, lower, upper, "enclosed"),
        rank=Known(rank, rank, rank, "enclosed"),
        full=len(L),
        longest=d,
        structural=rank,
        mean_square=mean_square,
        values=torch.stack([norm, torch.where(alive, least, 0)], 1),
        tolerance=tolerance,
        method="factorised",
    )


def _norm(L: Float[Tensor, "s m m"], s: Float[Tensor, "s n m"], start: Float[Tensor, "s n m"]) -> Largest:
    """‖diag(s) L‖ of every sample, in single precision first."""

    def products(L: Tensor, s: Tensor) -> tuple[Product, Product]:
        transposed = L.mT.contiguous()  # which multiplies several times faster
        return _stacked(lambda v: s * (v @ transposed), s), _stacked(lambda u: (s * u) @ L, s)

    least, directions = steps_for(SLACK, RISK, s.shape[2]), start.flatten(0, 1)
    if s.dtype == torch.float32:
        return largest(*products(L, s), directions, least=least)
    return refined(*products(L, s), largest(*products(L.float(), s.float()), directions.float(), REFINED, least))


def _least(
    M: Float[Tensor, "s m m"], slopes: Float[Tensor, "s n m"], start: Float[Tensor, "s n m"]
) -> tuple[Float[Tensor, "s n"], Float[Tensor, "s n"]]:
    """σ_min of diag(s) M⁻¹: 1/θ above it, θ the largest Ritz value of the inverse M diag(1/s), and 1/‖M diag(1/s)‖_F below.

    Args:
        M: inverses; single precision comes first where they are in its range.
        slopes: s.
        start: random directions to start from.
    """
    frobenius, directions = _frobenius(M, slopes), start.flatten(0, 1)
    if M.dtype == torch.float32 or frobenius.max() > IN_SINGLE:
        found = largest(*_inverses(M, slopes), directions)
    else:
        rough = largest(*_inverses(M.float(), slopes.float()), directions.float(), REFINED)
        found = refined(*_inverses(M, slopes), rough)
    return 1 / found.value.reshape(frobenius.shape), 1 / frobenius


def _inverses(M: Float[Tensor, "s m m"], slopes: Float[Tensor, "s n m"]) -> tuple[Product, Product]:
    """Products with M diag(1/s) and its transpose."""
    transposed = M.mT if slopes.shape[1] == 1 else M.mT.contiguous()
    return _stacked(lambda v: (v / slopes) @ transposed, slopes), _stacked(lambda u: (u @ M) / slopes, slopes)


def _frobenius(M: Float[Tensor, "s m m"], slopes: Float[Tensor, "s n m"]) -> Float[Tensor, "s n"]:
    """‖M diag(1/s)‖_F."""
    return (slopes.square().reciprocal() @ M.square().sum(1).unsqueeze(2)).squeeze(2).sqrt()


def _stacked(product: Product, like: Float[Tensor, "s n m"]) -> Product:
    """A product with the samples of every stage apart, of one that has them in one batch."""
    return lambda rows: product(rows.reshape(like.shape)).flatten(0, 1)


def _active(
    L: Float[Tensor, "m m"], s: Float[Tensor, "n m"], start: Float[Tensor, "n m"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]] | None:
    """σ_r of diag(s) L over the r rows with s ≠ 0 of every sample, in single precision where that is enough.

    Args:
        L: of W = LQ.
        s: slopes, some of each sample not 0.
        start: random directions.

    Returns: σ_r from above, to 1e-4, and from below; None where the rows may depend on each other.
    """
    for dtype in dict.fromkeys([torch.float32, s.dtype]):
        least, beyond = _of_rows(L, s, start, dtype)
        if ((least > 0) & (beyond > 0)).all():
            return least, beyond
    return None


def _of_rows(
    L: Float[Tensor, "m m"], s: Float[Tensor, "n m"], start: Float[Tensor, "n m"], dtype: torch.dtype
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The same by the Cholesky factor C of the Gram matrix of those rows of L, in one precision.

    Above σ_r is ‖yᵀ diag(s) L‖, y the unit vector for which ‖C⁻¹ diag(1/s) y‖ is largest; below 1/‖C⁻¹ diag(1/s)‖_F, less the share that
    C is wrong by: k·ε‖H⁻¹‖ in every σ², H the Gram matrix of the rows scaled to length 1 (Demmel & Veselić 1992, "Jacobi's method is more
    accurate than QR", theorem 2.3).

    Returns: NaN above or 0 below where this precision can't tell.
    """
    active = s != 0
    rows = active.byte().argsort(dim=1, descending=True, stable=True)[:, : int(active.sum(1).max())]
    kept, k = active.gather(1, rows), rows.shape[1]
    gram, apart = L @ L.T, torch.eye(k, dtype=dtype, device=L.device)
    grams = gram.to(dtype)[rows.unsqueeze(2), rows.unsqueeze(1)]
    C, _ = torch.linalg.cholesky_ex(torch.where(kept.unsqueeze(2) & kept.unsqueeze(1), grams, apart))
    M = torch.linalg.solve_triangular(C, apart.expand_as(C), upper=False)
    lengths = torch.where(kept, gram.diagonal().sqrt()[rows], 0).to(dtype)
    slopes = torch.where(kept, s.gather(1, rows), torch.inf).to(dtype).unsqueeze(1)
    wrong = k * torch.finfo(dtype).eps * (M.square().sum(1) * lengths.square()).sum(1)
    push, pull = _inverses(M, slopes)
    found = largest(push, pull, (start.gather(1, rows) * kept).to(dtype), ROUGH)
    # its share of σ_i ≫ σ_r, which the inverse hardly sees and the product with L does, falls by (σ_r/σ_i)²
    vector = pull(push(found.vector)) / found.value.square().unsqueeze(1)
    y = torch.zeros_like(s).scatter(1, rows, vector.to(s) * kept)
    # what is wrong with y counts by its square
    beyond = torch.where(wrong <= ROUGH**0.5, (1 - wrong) / _frobenius(M, slopes).squeeze(1), 0)
    return ((s * y) @ L).norm(dim=1) / y.norm(dim=1), beyond.to(s)


def stacked_products(weights: Sequence[Float[Tensor, "_ d"]], slopes: Sequence[Float[Tensor, "n _"]]) -> tuple[Product, Product]:
    """U = Jv and v = Jᵀu of several stages J = diag(s) W of as many columns, at once.

    Args:
        weights: W of every stage.
        slopes: s of every stage, at N samples.

    Returns: the products, which take and give a row a sample, those of one stage below those of another; a stage of fewer rows than
        another has zeros in their place.
    """
    W = pad_sequence([*weights], batch_first=True)
    s = pad_sequence([of_stage.T for of_stage in slopes], batch_first=True).mT
    samples = s.shape[:2]
    return (
        lambda v: (s * (v.unflatten(0, samples) @ W.mT)).flatten(0, 1),
        lambda u: ((s * u.unflatten(0, samples)) @ W).flatten(0, 1),
    )
