"""Derivatives of saturated units, against mpmath at 60 digits."""

import mpmath
import pytest
import torch
from torch import nn
from torch.func import jvp

from src import trace
from src.chain import cut
from src.jacobian import matrix_free
from src.jacobian.materialised import transpose
from src.jacobian.steady import differentiable_twice, sigmoid, steady, tanh

mpmath.mp.dps = 60
POINTS = [-60.0, -20.0, -3.0, -1e-9, 0.0, 1e-9, 0.5, 3.0, 20.0, 60.0]
EXACT = {
    "tanh": (tanh, torch.tanh, mpmath.tanh, lambda z: mpmath.sech(z) ** 2),
    "sigmoid": (sigmoid, torch.sigmoid, lambda z: 1 / (1 + mpmath.exp(-z)), lambda z: 1 / (2 + 2 * mpmath.cosh(z))),
}


def slopes(phi, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(phi(z).sum(), z)[0]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning"
)  # torch's own, the first time it differentiates forward
@pytest.mark.parametrize("name", EXACT)
def test_values_and_slopes_have_all_their_digits_where_autograd_s_own_vanish(name):
    phi, own, value, slope = EXACT[name]
    z = torch.tensor(POINTS, dtype=torch.float64)
    exact = torch.tensor([float(slope(point)) for point in POINTS], dtype=torch.float64)
    torch.testing.assert_close(slopes(phi, z), exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(jvp(phi, (z,), (torch.ones_like(z),))[1], exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(phi(z), torch.tensor([float(value(point)) for point in POINTS]).double(), rtol=1e-7, atol=2e-16)
    assert slopes(own, z)[-1] == 0


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(2, 2) for _ in range(3))

    def forward(self, x):
        return self.third(torch.sigmoid(self.second(self.first(x).tanh())))


def test_modules_and_traced_functions_are_given_these_formulas_in_the_chain_only():
    modules = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2))
    for model in (modules, Functional()):
        model.double().requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.eye(2) if "weight" in name else torch.full((2,), 30.0))
        x = torch.zeros(1, 2, dtype=torch.float64)
        assert slopes(model, x).abs().max() == 0
        assert slopes(lambda x, model=model: cut(model, None, torch.float64, "eval").states(x) and run(model, x), x).abs().min() > 0
        assert slopes(model, x).abs().max() == 0
    assert steady(nn.ReLU()) is None


def run(model, x):
    for stage in cut(model, None, torch.float64, "eval").stages:
        x = stage(x)
    return x


class Gated(nn.Module):
    def forward(self, x):
        return x * nn.functional.hardsigmoid(x)


@pytest.mark.parametrize("of", [nn.Hardsigmoid, lambda: trace.exported(Gated(), torch.ones(2, 1).double())])
def test_a_hard_sigmoid_is_differentiated_twice(of):
    """Torch's own is not; the new one has its values and slopes, at the kinks too."""
    z, ones = torch.tensor([-4.0, -3, -1, 0, 2, 3, 5]).double()[:, None], torch.ones(7, 1).double()
    stage, replaced = of(), of()
    differentiable_twice(replaced)
    torch.testing.assert_close(replaced(z), stage(z))
    torch.testing.assert_close(slopes(replaced, z), slopes(stage, z))

    def twice(stage):
        _, pull = transpose(stage, z)
        return transpose(pull, ones)[1](ones)

    torch.testing.assert_close(twice(replaced), slopes(stage, z))
    with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
        twice(stage)


def test_products_do_without_a_second_derivative_where_there_is_none():
    z, ones = torch.tensor([[-1.0], [2.0]]).double(), torch.ones(2, 1).double()
    torch.testing.assert_close(matrix_free.layer_products(Gated(), z, often=False).push(ones), slopes(Gated(), z))
