"""Normalisations as one operator on the batch: their Jacobians, their norms inside a network, and the growth of gradients behind them.

N values of each of G groups are normalised together: a group is a channel for BatchNorm, a sample for LayerNorm.
"""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from src.chain import Chain, cut
from src.jacobian.materialised import layer_jacobian
from src.spectrum import spectrum


def normalisation_jacobian(norm: nn.BatchNorm1d | nn.LayerNorm, values: Float[Tensor, "g n"]) -> Float[Tensor, "g n g n"]:
    """The Jacobian of a train-mode normalisation as one operator on the batch, by a pass backwards.

    Args:
        norm: BatchNorm of G channels, or LayerNorm of N units.
        values: what is normalised, a row a group.
    """
    across = isinstance(norm, nn.BatchNorm1d)
    batch = values.T if across else values
    stage = cut(nn.Sequential(norm), None, values.dtype, "train").stages[0]
    J = layer_jacobian(stage, batch.unsqueeze(0)).reshape(*batch.shape, *batch.shape)
    return J.permute(1, 0, 3, 2) if across else J


def closed_form(values: Float[Tensor, "g n"], gains: Float[Tensor, " g"], eps: float) -> Float[Tensor, "g n n"]:
    """The Jacobian of each group, (γ/σ)(I − 11ᵀ/N − x̂x̂ᵀ/N) with σ² = var + ε (Ioffe & Szegedy 2015, section 3, as one matrix).

    Its norm is |γ|/σ for N ≥ 3. It annihilates 1, and x̂ but for the share ε/σ².
    """
    n = values.shape[1]
    sigma = deviation(values, eps)
    normalised = (values - values.mean(1, keepdim=True)) / sigma.unsqueeze(1)
    identity = torch.eye(n, dtype=values.dtype, device=values.device)
    return (gains / sigma).reshape(-1, 1, 1) * (identity - 1 / n - normalised.unsqueeze(2) * normalised.unsqueeze(1) / n)


def closed_form_errors(
    J: Float[Tensor, "g n g n"], values: Float[Tensor, "g n"], gains: Float[Tensor, " g"], eps: float
) -> dict[str, float]:
    """How far a normalisation's Jacobian is from its closed form, from its norm, and from what that form says of its singular values.

    Args:
        J: as written out by `normalisation_jacobian`.
        values: what is normalised.
        gains: γ of each group.
        eps: ε.

    Returns: operator_norm = ‖J‖; norm_error = |‖J‖ / max(|γ|/σ) − 1|; form_error, the largest entry of J minus the closed form over
        max(|γ|/σ); of the worst group, over |γ|/σ: spectrum_error, the largest error of a singular value against 1 (N−2 times), ε/σ² and 0,
        and direction_error, the greater of ‖J1‖/‖1‖ and ‖Jx̂ − (ε/σ²)(γ/σ)x̂‖/‖x̂‖.
    """
    groups, n = values.shape
    sigma, each = deviation(values, eps), torch.arange(groups)
    share, scales = eps / sigma.square(), gains / sigma
    form = torch.zeros_like(J)
    form[each, :, each] = closed_form(values, gains, eps)
    relative = J[each, :, each] / scales.reshape(-1, 1, 1)
    centred = values - values.mean(1, keepdim=True)
    directions = torch.stack([torch.ones_like(values), centred], 2)
    images = torch.stack([torch.zeros_like(values), share.unsqueeze(1) * centred], 2)
    predicted = torch.ones_like(values)
    predicted[:, -2], predicted[:, -1] = share, 0
    norm, greatest = spectrum(J.reshape(groups * n, -1)).norm, scales.abs().max()
    return {
        "operator_norm": float(norm),
        "norm_error": float((norm / greatest - 1).abs()),
        "form_error": float((J - form).abs().max() / greatest),
        "spectrum_error": float((spectrum(relative).values - predicted).abs().max()),
        "direction_error": float(((relative @ directions - images).norm(dim=1) / directions.norm(dim=1)).max()),
    }


def deviation(values: Float[Tensor, "g n"], eps: float) -> Float[Tensor, " g"]:
    """√(var + ε) of each group."""
    return (values.var(1, correction=0) + eps).sqrt()


def normalisation_norms(chain: Chain, inputs: Float[Tensor, "n ..."]) -> list[float]:
    """‖J‖ of every BatchNorm1d and LayerNorm in a chain on the batch, first to last.

    It is max_c |γ_c|/σ_c for BatchNorm, and max|γ|/min_n σ_n for LayerNorm: exact where all γ are equal, a bound elsewhere.

    Args:
        chain: as cut with batch_norm="train".
        inputs: the batch.
    """
    found: list[float] = []

    def record(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        across = isinstance(norm, nn.BatchNorm1d)
        sigma = deviation(arguments[0].T if across else arguments[0], cast(float, norm.eps))
        gains = cast(Tensor, norm.weight).abs()
        found.append(float((gains / sigma).max() if across else gains.max() / sigma.min()))

    norms = [module for stage in chain.stages for module in stage.modules() if isinstance(module, nn.BatchNorm1d | nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(record) for norm in norms]
    chain.states(inputs.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return found


def normalised_product(
    W: Float[Tensor, "m d"], inputs: Float[Tensor, "n d"], covectors: Float[Tensor, "n m"], eps: float
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """BN(Wx) in train mode, and what covectors at it become at the inputs and at W.

    Args:
        W: weights.
        inputs: x, a row a sample.
        covectors: at the outputs.
        eps: ε.
    """
    inputs, W = inputs.clone().requires_grad_(), W.clone().requires_grad_()
    outputs = batch_norm(inputs @ W.T, None, None, training=True, eps=eps)
    by_inputs, by_W = torch.autograd.grad(outputs, (inputs, W), covectors)
    return outputs.detach(), by_inputs, by_W


def batch_norm_growth(batch: float | int) -> float:
    """Growth of ‖g‖² a layer through W, BatchNorm over N images and ReLU in a wide deep net: ((N−1+J₀)/(1−J₁) − 1)/(N−3).

    In the mean field of Yang et al. 2019 the images of a deep batch are equally correlated: BatchNorm's outputs are √N u with u uniform
    on the unit sphere across 1, Nσ² = σw²(1−J₁)/2 · χ²_{N−1} is independent of u, and gradients are isotropic across 1. From there the
    growth is σw² E[1/σ²] E[tr CDC(C − uuᵀ)CD]/(N−1) with C = I − 11ᵀ/N and D = diag(u > 0), where

        E[1/σ²] = 2N/(σw²(1−J₁)(N−3)),  E tr CDCD = (N−1)(N−1+J₀)/2N  and  E‖CDu‖² = (N−1)(1−J₁)/2N.

    J₀(c) = (π − arccos c)/π and J₁(c) = (√(1−c²) + (π − arccos c)c)/π are the arc-cosine kernels (Cho & Saul 2009) at c = −1/(N−1), the
    correlation of two entries of u. The limit, π/(π−1), is the one that Yang et al. give.

    Args:
        batch: N > 3; π/(π−1) as N → ∞.
    """
    if batch == math.inf:
        return math.pi / (math.pi - 1)
    c = -1 / (batch - 1)
    J0 = (math.pi - math.acos(c)) / math.pi
    J1 = math.sqrt(1 - c**2) / math.pi + J0 * c
    return ((batch - 1 + J0) / (1 - J1) - 1) / (batch - 3)
