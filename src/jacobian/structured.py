"""Stages whose layer Jacobian is diag(s) W: one dense layer, and behind it only what acts on each unit alone.

A factorisation of W then serves every sample: σ₁ by Golub–Kahan–Lanczos on v ↦ s∘(Wv), σ_min the same way on the inverse, which is
accurate where the decomposition of J itself loses σ_min to the rounding of σ₁.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx import Node, Tracer
from torch.nn.utils.rnn import pad_sequence

from src.jacobian.bounds import ACTIVATIONS, POINTWISE
from src.jacobian.golub_kahan import Largest, Product, largest
from src.jacobian.materialised import transpose
from src.spectrum import Extremes

# relative residual at which σ₁ and σ_min have converged: the error of a value is of the order of its square
TOLERANCE = 1e-5
OF_SHAPES = {"getattr", "getitem", "size"}
FLATTENING = {"clone", "contiguous", "flatten", "reshape", "view"}


@dataclass(frozen=True)
class Dense:
    """J_n = diag(s_n) W of N samples, and what ∇θ is made of: h, the input of W, and whether W has a bias.

    Attributes:
        weight: W, m×d.
        slopes: s, the derivative behind W of every unit.
        hidden: h.
        has_bias: whether a bias is added to Wh.
    """

    weight: Float[Tensor, "m d"]
    slopes: Float[Tensor, "n m"]
    hidden: Float[Tensor, "n d"]
    has_bias: bool

    def jacobians(self) -> Float[Tensor, "n m d"]:
        """J written out."""
        return self.slopes.unsqueeze(2) * self.weight

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
    name = _only_linear(stage)
    if name is None:
        return None
    linear = stage.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    calls: list[Tensor] = []

    def shifted(shift: Tensor) -> Tensor:
        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            calls.append(arguments[0])
            return output + shift

        hook = linear.register_forward_hook(add)
        try:
            outputs: Tensor = stage(inputs)
        finally:
            hook.remove()
        return outputs

    outputs, pull_back = transpose(shifted, inputs.new_zeros(len(inputs), linear.out_features))
    if calls[0].shape != (len(inputs), inputs[0].numel()):
        return None
    return Dense(linear.weight.detach(), pull_back(torch.ones_like(outputs)), calls[0], linear.bias is not None)


def _only_linear(stage: nn.Module) -> str | None:
    """The dense layer of a stage that has one call, in front of it only what rearranges, behind it only what acts on each unit alone."""
    root = nn.Sequential(stage)  # so that a leaf stays one node
    try:
        nodes = [node for node in Tracer().trace(root).nodes if _called(node) not in OF_SHAPES]
    except Exception:  # tracing runs the model's own code: anything may be raised
        return None
    modules = dict(root.named_modules(remove_duplicate=False))
    found = None
    for before, node in pairwise(nodes):
        module = modules[str(node.target)] if node.op == "call_module" else None
        if [source for source in node.all_input_nodes if source in nodes] != [before]:
            return None
        if found is None and type(module) is nn.Linear and module._parameters.keys() == {"weight", "bias"}:
            found = str(node.target).removeprefix("0").removeprefix(".")
        elif node.op != "output" and not (_rearranges(node, module) if found is None else _is_pointwise(node, module)):
            return None
    own = sum(parameter.numel() for parameter in root.parameters())
    return found if found is not None and own == sum(p.numel() for p in stage.get_submodule(found).parameters()) else None


def _rearranges(node: Node, module: nn.Module | None) -> bool:
    return isinstance(module, nn.Identity | nn.Flatten | nn.Dropout) or (node.op != "call_module" and _called(node) in FLATTENING)


def _is_pointwise(node: Node, module: nn.Module | None) -> bool:
    return isinstance(module, (*ACTIVATIONS, nn.Identity, nn.Dropout)) or (node.op != "call_module" and _called(node) in POINTWISE)


def _called(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def extremes(J: Dense, start: Float[Tensor, "n m"]) -> Extremes | None:
    """σ₁, σ_min and the rank of every J = diag(s) W, m ≤ d, by one factorisation W = LQ: J has the singular values of diag(s) L.

    Where a slope is 0, σ_min is 0, and the rank is the number of others: by interlacing no row that is left out lowers σ_min of the rest,
    σ_min(J) ≥ min|s|·σ_min(W) over the rows with s ≠ 0.

    Args:
        J: with m ≤ d.
        start: random directions to start from.

    Returns: what is known; None where the rank can't be told from these numbers alone.
    """
    m = J.weight.shape[0]
    L = torch.linalg.qr(J.weight.T, mode="r").R.T.contiguous()
    s = J.slopes
    top = largest(lambda v: s * (v @ L.T), lambda u: (s * u) @ L, start, TOLERANCE, least=min(20, m))
    active = s != 0
    alive = active.all(1)
    rank = active.sum(1)
    tolerance = max(J.weight.shape) * torch.finfo(s.dtype).eps * top.value
    rounding = 4 * tolerance  # of the factorisation and of the products with L, in every singular value
    smallest = torch.zeros_like(top.value)
    if alive.any():
        smallest[alive] = 1 / inverse_norm(L, s[alive], start[alive]).value
    if not alive.all():
        least = torch.where(active, s.abs(), torch.inf).amin(1) / inverse_norm(L, torch.ones_like(s[:1]), start[:1]).value
        if (least[~alive] <= rounding[~alive]).any():
            return None
    if (smallest[alive] <= rounding[alive]).any():
        return None
    return Extremes(
        norm=top.value,
        norm_lo=top.value - rounding,
        norm_hi=torch.minimum(top.upper(1e-6), (s.square() @ L.square().sum(1)).sqrt() + rounding),
        smallest=smallest,
        rank=rank,
        rank_lo=rank,
        rank_hi=rank,
        condition=torch.where(alive, top.value / smallest, torch.inf),
        mean_square=(s.square() @ L.square().sum(1)) / m,
        values=torch.stack([top.value, smallest], 1),
        tolerance=tolerance,
        method="estimated",
    )


def inverse_norm(L: Float[Tensor, "m m"], slopes: Float[Tensor, "n m"], start: Float[Tensor, "n m"]) -> Largest:
    """‖(diag(s) L)⁻¹‖ = 1/σ_min of every sample, L lower triangular."""

    def push(v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(L, (v / slopes).T, upper=False).T

    def pull(u: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(L.T, u.T, upper=True).T / slopes

    return largest(push, pull, start, TOLERANCE)


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
