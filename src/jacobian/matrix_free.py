"""Jacobians that are too large to write out, by their products with vectors."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import linearize

from src.jacobian.bounds import bounds
from src.jacobian.golub_kahan import FIRST_LOOK, REFINED, RISK, SLACK, Largest, Product, joined, largest, refined, steps_for
from src.jacobian.materialised import transpose
from src.spectrum import Extremes, Known

ROUNDING = 32  # machine precisions
# of a direction of all samples; some hundred of them are kept
BASIS_BYTES = 2**21


@dataclass(frozen=True)
class Products:
    """u = Jv and v = Jᵀu of N samples at once, each flattened; J of m×d."""

    push: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n m"]]
    pull: Callable[[Float[Tensor, "n m"]], Float[Tensor, "n d"]]
    rows: int
    columns: int


def layer_products(stage: nn.Module, inputs: Float[Tensor, "n ..."], often: bool = True) -> Products:
    """The products with the layer Jacobian J = ∂f(x)/∂x of every sample; f is run once.

    Args:
        stage: f, acting on each sample alone.
        inputs: N inputs.
        often: trace Jv, which takes as long as some tens of products and makes each twice as fast.
    """
    n = len(inputs)
    outputs, pull = transpose(stage, inputs)
    if not often:  # the transpose of the linear map u ↦ Jᵀu
        _, push = transpose(pull, torch.zeros_like(outputs))
        try:
            push(torch.zeros_like(inputs))
        except RuntimeError:  # of an operation whose backward pass has no derivative
            often = True
    if often:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own tracing
            _, push = linearize(stage, inputs)
    return Products(
        push=lambda v: push(v.reshape(inputs.shape)).reshape(n, -1),
        pull=lambda u: pull(u.reshape(outputs.shape)).reshape(n, -1),
        rows=outputs[0].numel(),
        columns=inputs[0].numel(),
    )


def stacked_products(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Product, Product]:
    """U = Jv and v = Jᵀu of several stages of one size, at once, from the graphs of their outputs.

    Jᵀu is a pass backwards, Jv the transpose of the linear map u ↦ Jᵀu: nothing is traced, which takes longer than many products.

    Args:
        inputs: N inputs of every stage, with requires_grad.
        outputs: what the stages made of them, each sample of its own.

    Returns: the products, which take and give a row a sample, those of one stage below those of another.
    """
    covectors = [torch.zeros_like(y).requires_grad_() for y in outputs]
    pulled = grad([*outputs], [*inputs], covectors, create_graph=True)

    def transposed(values: Sequence[Tensor], points: Sequence[Tensor]) -> Product:
        def product(rows: Tensor) -> Tensor:
            parts = [part.reshape(value.shape) for part, value in zip(rows.split(len(values[0])), values, strict=True)]
            return torch.cat([x.flatten(1) for x in grad([*values], [*points], parts, retain_graph=True)])

        return product

    return transposed(pulled, covectors), transposed(outputs, inputs)


def extremes(
    stage: nn.Module, inputs: Float[Tensor, "n ..."], start: Float[Tensor, "n d"], rough: tuple[nn.Module, Tensor] | None = None
) -> Extremes:
    """Enclose σ₁, σ_min and the rank of the layer Jacobian of every sample without writing it out.

    σ₁ from below by Golub–Kahan–Lanczos, from above by the stage's graph, where it knows every operation, else by the probability that
    the random start was unlucky; σ_min from above by a Ritz value; the rank from above by the support of φ' and the narrowest tensor.

    Args:
        stage: f, acting on each sample alone.
        inputs: N inputs.
        start: random directions to start from.
        rough: the stage and its inputs in single precision, where the steps are cheaper; their vector needs one step more.
    """
    above = bounds(stage, inputs)
    certain = bool(above.norm.isfinite().all())
    found = _largest(stage, inputs, start, rough, FIRST_LOOK if certain else steps_for(SLACK, RISK, start.shape[1]))
    rows, columns = stage(inputs[:1]).numel(), start.shape[1]
    full = min(rows, columns)
    deficient = above.rank < full
    nothing, unknown = torch.zeros_like(found.value), torch.full_like(found.value, torch.nan)
    rounding = ROUNDING * torch.finfo(inputs.dtype).eps * found.value  # of the products
    return Extremes(
        norm=Known(
            found.value,
            found.value - rounding,
            torch.maximum(above.norm if certain else found.upper(RISK), found.value) + rounding,
            "enclosed" if certain else "estimated",
        ),
        smallest=Known(
            torch.where(deficient, 0, unknown),
            nothing,
            torch.where(deficient, 0, found.smallest + rounding),
            "enclosed" if deficient.all() else "estimated",
        ),
        active=Known(unknown, nothing, found.value + rounding, "enclosed"),
        rank=Known(above.rank, (found.value > 0).long(), above.rank, "enclosed"),
        full=full,
        longest=max(rows, columns),
        structural=above.rank,
        mean_square=unknown,
        values=found.value.unsqueeze(1),
        tolerance=unknown,
        method="matrix_free",
    )


def norm(stage: nn.Module, inputs: Float[Tensor, "n ..."], start: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """σ₁ of the layer Jacobian of every sample, from below.

    Args:
        stage: f, acting on each sample alone.
        inputs: N inputs.
        start: random directions to start from.
    """
    values = []
    for at in _chunks(start):
        products = layer_products(stage, inputs[at], often=False)
        values.append(largest(products.push, products.pull, start[at]).value)
    return torch.cat(values)


def _chunks(start: Float[Tensor, "n d"]) -> Sequence[Int[Tensor, " _"]]:
    """The samples, no more at once than their directions may take memory."""
    return torch.arange(len(start)).split(max(1, BASIS_BYTES // (start[0].numel() * start.dtype.itemsize)))


def _largest(
    stage: nn.Module, inputs: Float[Tensor, "n ..."], start: Float[Tensor, "n d"], rough: tuple[nn.Module, Tensor] | None, least: int
) -> Largest:
    """σ₁ of every sample, of no more samples at once than their directions may take memory."""
    parts = []
    for at in _chunks(start):
        products = layer_products(stage, inputs[at], often=rough is None)
        if rough is None:
            parts.append(largest(products.push, products.pull, start[at], least=least))
        else:
            single = layer_products(rough[0], rough[1][at])
            found = largest(single.push, single.pull, start[at].to(rough[1].dtype), REFINED, least)
            parts.append(refined(products.push, products.pull, found))
    return joined(parts)
