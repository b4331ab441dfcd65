"""Jacobians that are too large to write out, by their products with vectors."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import linearize

from src.jacobian.bounds import bounds
from src.jacobian.golub_kahan import Largest, Product, largest, steps_for
from src.jacobian.materialised import transpose
from src.spectrum import Extremes

# of a random start that is so unlucky that σ₁ lies above its estimate
RISK = 1e-6
# by which such an estimate's upper side may exceed it
SLACK = 0.05


@dataclass(frozen=True)
class Products:
    """u = Jv and v = Jᵀu of N samples at once, each flattened; J of m×d."""

    push: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n m"]]
    pull: Callable[[Float[Tensor, "n m"]], Float[Tensor, "n d"]]
    rows: int
    columns: int

    def largest(self, start: Float[Tensor, "n d"], least: int = 1) -> Largest:
        """σ₁ of every sample, from a random start, in no fewer steps than given."""
        return largest(self.push, self.pull, start, least=least)


def layer_products(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> Products:
    """The products with the layer Jacobian J = ∂f(x)/∂x of every sample; f is linearised once.

    Args:
        stage: f, acting on each sample alone.
        inputs: N inputs.
    """
    n = len(inputs)
    outputs, pull = transpose(stage, inputs)
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


def extremes(stage: nn.Module, inputs: Float[Tensor, "n ..."], start: Float[Tensor, "n d"]) -> Extremes:
    """Enclose σ₁ and the rank of the layer Jacobian of every sample without writing it out.

    σ₁ from below by Golub–Kahan–Lanczos, from above by the stage's graph, where it knows every operation, else by the probability that
    the random start was unlucky; the rank from above by the support of φ' and the narrowest tensor.

    Args:
        stage: f, acting on each sample alone.
        inputs: N inputs.
        start: random directions to start from.
    """
    products = layer_products(stage, inputs)
    above = bounds(stage, inputs)
    certain = bool(above.norm.isfinite().all())
    found = products.largest(start, least=1 if certain else steps_for(SLACK, RISK, products.columns))
    unknown = torch.full_like(found.value, torch.nan)
    deficient = above.rank < min(products.rows, products.columns)
    return Extremes(
        norm=found.value,
        norm_lo=found.value,
        # of two rounding errors the bound may have the other sign
        norm_hi=torch.maximum(above.norm if certain else found.upper(RISK), found.value),
        smallest=torch.where(deficient, 0.0, unknown),
        rank=above.rank,
        rank_lo=(found.value > 0).long(),
        rank_hi=above.rank,
        condition=torch.where(deficient, torch.inf, unknown),
        mean_square=unknown,
        values=found.value.unsqueeze(1),
        tolerance=unknown,
        method="enclosed" if certain else "estimated",
    )
