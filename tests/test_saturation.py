import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from src.saturation import activity, of_logistic_layer, slopes
from src.units import Units

GENERATOR = torch.Generator().manual_seed(0)
STATES = torch.rand(4, 7, generator=GENERATOR, dtype=torch.float64)


def layer(gain: float, activation: nn.Module | None = None) -> nn.Module:
    linear = nn.Linear(7, 5).double().requires_grad_(False)
    linear.weight.copy_(gain * torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    linear.bias.copy_(gain * torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return nn.Sequential(OrderedDict(linear=linear, activation=activation or nn.Sigmoid()))


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def naive(stage: nn.Module) -> list[np.ndarray]:
    """J of every sample by central differences, entry by entry."""
    weight, bias = stage.linear.weight.numpy(), stage.linear.bias.numpy()
    found = []
    for state in STATES.numpy():
        jacobian = np.empty(weight.shape)
        for i, j in np.ndindex(*weight.shape):
            step = np.zeros(7)
            step[j] = 1e-6
            above, below = (sigma(float(weight[i] @ moved + bias[i])) for moved in (state + step, state - step))
            jacobian[i, j] = (above - below) / 2e-6
        found.append(jacobian)
    return found


@pytest.mark.parametrize("gain", [0.5, 3.0])
def test_a_logistic_layer_against_finite_differences(gain: float) -> None:
    stage = layer(gain)
    found, jacobians = of_logistic_layer(stage, STATES), naive(stage)
    weight, bias = stage.linear.weight.numpy(), stage.linear.bias.numpy()
    slope = np.array([[sigma(z) * sigma(-z) for z in weight @ state + bias] for state in STATES.numpy()])
    norms = np.array([np.sqrt(np.linalg.eigvalsh(J.T @ J)[-1]) for J in jacobians])
    energy = np.array([(J**2).sum(1) for J in jacobians])
    flat = slope < 0.025
    weight_norm = np.sqrt(np.linalg.eigvalsh(weight.T @ weight)[-1])
    expected = {
        "saturated": flat.mean(),
        "norm": norms.mean(),
        "log_norm": np.log(norms).mean(),
        "chi": energy.sum(1).mean() / 5,
        "contribution": (energy * flat).sum() / energy.sum(),
        "norm_bound": (norms / slope.max(1) / weight_norm).max(),
        "quarter_bound": (4 * norms / weight_norm).max(),
    }
    assert found.pop("equation_error") < 1e-14
    assert found == pytest.approx(expected, rel=1e-6)
    assert flat.any() == (gain == 3)
    assert found["saturated"] == pytest.approx(float(Units.of(stage, STATES).saturation.mean()))


def test_a_layer_that_is_not_logistic_breaks_the_bounds() -> None:
    """A stage whose activation is eight times as steep."""

    class Steep(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return 8 * torch.sigmoid(z)

    logistic, steep = of_logistic_layer(layer(0.1), STATES), of_logistic_layer(layer(0.1, Steep()), STATES)
    assert max(logistic["norm_bound"], logistic["quarter_bound"]) <= 1
    assert min(steep["norm_bound"], steep["quarter_bound"]) > 1
    assert (logistic["equation_error"] < 1e-14, steep["equation_error"]) == (True, pytest.approx(7 / 8))


def test_slopes_unit_by_unit() -> None:
    stage = layer(1.0, nn.Tanh())
    z, found = slopes(stage, STATES)
    torch.testing.assert_close(z, STATES @ stage.linear.weight.T + stage.linear.bias)
    torch.testing.assert_close(found, 1 - z.tanh() ** 2)


def test_activity_against_numpy() -> None:
    stages = nn.Sequential(layer(1.0), nn.Linear(5, 3).double()).requires_grad_(False)
    first, second = activity(stages, STATES, (2.0, 50.0, 98.0))
    values = stages[0](STATES).detach().numpy()
    expected = {"mean": values.mean(), "std": values.std()} | {f"p{p}": np.percentile(values, p) for p in (2, 50, 98)}
    assert first == pytest.approx(expected)
    assert first["p2"] < first["p50"] < first["p98"]
    assert second["mean"] == pytest.approx(float(stages(STATES).mean()))
