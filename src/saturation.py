"""What saturated units do to the Jacobian J = diag(φ'(z))W of a dense layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from src.jacobian.materialised import layer_jacobian, transpose
from src.spectrum import spectrum
from src.units import SATURATED


def slopes(stage: nn.Module, inputs: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Every unit's z = Wh + b, and φ'(z).

    Args:
        stage: with the modules `linear` and `activation`.
        inputs: h.
    """
    z = stage.get_submodule("linear")(inputs)
    _, pull_back = transpose(stage.get_submodule("activation"), z)
    return z, pull_back(torch.ones_like(z))


def of_logistic_layer(stage: nn.Module, inputs: Float[Tensor, "n d"]) -> dict[str, float]:
    """Saturation and Jacobian of a logistic layer, over its samples; a unit is saturated where σ' is below a tenth of its maximum ¼.

    Args:
        stage: h ↦ σ(Wh + b), with the modules `linear` and `activation`.
        inputs: h.

    Returns: saturated, the share of such units; norm = mean ‖J‖, log_norm = mean ln ‖J‖ (nats), chi = mean squared singular value;
        contribution, the share of ‖J‖_F² in the rows of saturated units; of the worst sample: equation_error =
        ‖J − diag(σ')W‖_F/‖J‖_F, norm_bound = ‖J‖/(max σ'·‖W‖) and quarter_bound = ‖J‖/(¼‖W‖).
    """
    linear = stage.get_submodule("linear")
    weight, z = linear.get_parameter("weight"), linear(inputs)
    # in closed form: J is autograd's, and the two are compared
    slope = z.sigmoid() * (-z).sigmoid()
    flat = slope < SATURATED / 4
    jacobian = layer_jacobian(stage, inputs)
    singular, weight_norm = spectrum(jacobian), spectrum(weight).norm
    rows = jacobian.square().sum(2)
    error = (jacobian - slope.unsqueeze(2) * weight).square().sum((1, 2)) / rows.sum(1)
    return {
        "saturated": float(flat.to(slope.dtype).mean()),
        "norm": float(singular.norm.mean()),
        "log_norm": float(singular.norm.log().mean()),
        "chi": float(singular.mean_square.mean()),
        "contribution": float((rows * flat).sum() / rows.sum()),
        "equation_error": float(error.sqrt().max()),
        "norm_bound": float((singular.norm / (slope.amax(1) * weight_norm)).max()),
        "quarter_bound": float((4 * singular.norm / weight_norm).max()),
    }


@torch.no_grad()
def activity(hidden: nn.Sequential, images: Float[Tensor, "n ..."], percentiles: tuple[float, ...]) -> list[dict[str, float]]:
    """How the activations of every stage are distributed over units and images.

    Args:
        hidden: the stages.
        images: standardised.
        percentiles: which, in 0…100.

    Returns: for each stage its mean, std, and percentiles by "p{percentile:g}".
    """
    found = []
    state = images
    for stage in hidden:
        state = stage(state)
        values = state.double().flatten()
        ranks = values.new_tensor(percentiles) / 100
        quantiles = dict(zip((f"p{percentile:g}" for percentile in percentiles), torch.quantile(values, ranks).tolist(), strict=True))
        found.append({"mean": float(values.mean()), "std": float(values.std(correction=0)), **quantiles})
    return found
