"""References written for reading: float64, one sample at a time, plain autograd and NumPy's SVD."""

import copy

import numpy as np
import pandas as pd
import torch
from torch import nn


def as_measured(model):
    """A copy of the model in float64 and eval mode."""
    return copy.deepcopy(model).double().eval()


def layer_jacobian(stage, x):
    """∂f(x)/∂x of one sample, m×d."""
    return torch.autograd.functional.jacobian(lambda x: stage(x.unsqueeze(0)).flatten(), x).flatten(1).numpy()


def parameter_jacobian(stage, x):
    """∂f(x; θ)/∂θ of one sample, m×|θ|: one backward pass a unit."""
    return torch.stack([_gradient(unit, stage) for unit in stage(x.unsqueeze(0)).flatten()]).numpy()


def singular_values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def rank(matrix):
    """How many singular values exceed max(m, d)·ε·σ₁."""
    s = singular_values(matrix)
    return int((s > max(matrix.shape) * np.finfo(matrix.dtype).eps * s[0]).sum())


def gradients(stages, x, y, loss):
    """g_0 … g_L and ∇θ_1 … ∇θ_L of one sample: autograd of its own loss through the whole network."""
    states = [x.unsqueeze(0).requires_grad_()]
    for stage in stages:
        states.append(stage(states[-1]))
    value = loss(states[-1], y.unsqueeze(0)).sum()
    signals = torch.autograd.grad(value, states, retain_graph=True)
    return [signal.flatten().numpy() for signal in signals], [_gradient(value, stage).numpy() for stage in stages]


def states(stages, inputs):
    """H_0 … H_L."""
    found = [inputs]
    for stage in stages:
        found.append(stage(found[-1]).detach())
    return found


def layers(model, inputs, targets, loss):
    """What the certificate's table says of every (sample, stage)."""
    stages = list(as_measured(model))
    rows = []
    for sample, (x, y) in enumerate(zip(inputs.double(), targets, strict=True)):
        signals, of_parameters = gradients(stages, x, y, loss)
        for index, (stage, state) in enumerate(zip(stages, states(stages, x.unsqueeze(0))[:-1], strict=True), start=1):
            J = layer_jacobian(stage, state.squeeze(0))
            s = singular_values(J)
            rows.append(
                {
                    "sample": sample,
                    "index": index,
                    "norm": s[0],
                    "sigma_min": s[-1],
                    "rank": rank(J),
                    "cond": s[0] / s[-1] if rank(J) == len(s) else np.inf,
                    "error_norm": np.linalg.norm(signals[index]),
                    "grad_norm": np.linalg.norm(of_parameters[index - 1]),
                    "mean_square": (J**2).sum() / len(s),
                }
            )
    return pd.DataFrame(rows)


def first_parameter_norms(model, inputs):
    """‖P_1‖ of every sample; 0 without parameters."""
    first = as_measured(model)[0]
    if not list(first.parameters()):
        return np.zeros(len(inputs))
    return np.array([singular_values(parameter_jacobian(first, x))[0] for x in inputs.double()])


def error_matrix(model, inputs, targets, loss, index):
    """The N×d matrix whose row n is g_{l−1} of sample n."""
    stages = list(as_measured(model))
    return np.stack([gradients(stages, x, y, loss)[0][index - 1] for x, y in zip(inputs.double(), targets, strict=True)])


def gradient_matrix(model, inputs, targets, loss, index):
    """The N×|θ_l| matrix whose row n is ∇θ_l of sample n's own loss."""
    stages = list(as_measured(model))
    return np.stack([gradients(stages, x, y, loss)[1][index - 1] for x, y in zip(inputs.double(), targets, strict=True)])


def free_matrix(model, inputs, index, seed=0):
    """The N×|θ_l| matrix whose row n is ξ_nᵀP_n with Gaussian ξ_n."""
    stages, draws = list(as_measured(model)), np.random.default_rng(seed)
    before = states(stages, inputs.double())[index - 1]
    jacobians = [parameter_jacobian(stages[index - 1], x) for x in before]
    return np.stack([draws.normal(size=len(P)) @ P for P in jacobians])


def _gradient(value, stage):
    parameters: list[nn.Parameter] = list(stage.parameters())
    if not parameters:
        return torch.zeros(0, dtype=value.dtype)
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, parameters, retain_graph=True)])
