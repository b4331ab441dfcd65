"""The parameter gradients of a dense layer as outer products, ∇W = δhᵀ and ∇b = δ: their Gram matrix without the gradients themselves."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from src.jacobian.materialised import dense_input, transpose


def dense_factors(
    stage: nn.Module, inputs: Float[Tensor, "n ..."], covectors: Float[Tensor, "n m"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n k"]]:
    """The factors h and δ of every sample's gradient gᵀP: ∇W = δhᵀ and ∇b = δ.

    Args:
        stage: f, acting on each sample alone; all its parameters are those of one dense layer Wh + b.
        inputs: N inputs of the stage.
        covectors: g, one for each output of the stage.

    Returns: the rows h_n and the rows δ_n = g_nᵀ ∂f/∂(Wh + b).
    Raises: ValueError, if the stage is anything else.
    """
    hidden = dense_input(stage, inputs)
    names = [name for name, _ in stage.named_parameters()]
    if hidden is None or len(names) != 2:
        raise ValueError(f"expected one dense layer with a bias, got a stage with the parameters {', '.join(names)}")
    bias = next(name for name in names if name.endswith("bias"))

    def delta(sample: Tensor, covector: Tensor) -> Tensor:
        _, pull_back = transpose(lambda b: functional_call(stage, {bias: b}, (sample.unsqueeze(0),)), stage.get_parameter(bias))
        pulled: Tensor = pull_back(covector.unsqueeze(0))
        return pulled

    deltas: Tensor = vmap(delta)(inputs, covectors)
    return hidden, deltas


def parameter_gram(hidden: Float[Tensor, "n d"], deltas: Float[Tensor, "n k"]) -> Float[Tensor, "n n"]:
    """The Gram matrix of per-sample parameter gradients of a dense layer with a bias, (ΔΔᵀ) ∘ (HHᵀ + 1).

    Args:
        hidden: H, the inputs of the layer.
        deltas: Δ, the gradients at its outputs.
    """
    return (deltas @ deltas.T) * torch.addmm(hidden.new_ones(1), hidden, hidden.T)
