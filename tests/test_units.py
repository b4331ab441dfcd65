"""Saturated and dead units, against counts made by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from src.jacobian.steady import steady
from src.trace import exported
from src.units import Units
from tests.jacobian import naive
from tests.jacobian.networks import FAMILIES, family, matrix_stage, normal

SATURATION = {
    "tanh": (nn.Tanh(), lambda z: 1 / math.cosh(z) ** 2 < 0.1),
    "sigmoid": (nn.Sigmoid(), lambda z: 1 / (2 + math.exp(z) + math.exp(-z)) < 0.025),
    "relu": (nn.ReLU(), lambda z: z <= 0),
    "leaky": (nn.LeakyReLU(0.01), lambda z: z <= 0),
    "not so leaky": (nn.LeakyReLU(0.2), lambda z: False),
    "softplus": (nn.Softplus(), lambda z: 1 / (1 + math.exp(-z)) < 0.1 / (1 + math.exp(-8))),
    "hard tanh": (nn.Hardtanh(), lambda z: abs(z) >= 1),
}


@pytest.mark.parametrize("name", SATURATION)
def test_saturation_is_a_count(name):
    activation, is_saturated = SATURATION[name]
    z = 2.5 * normal(3, 40).double()
    counted = [sum(map(is_saturated, sample)) / 40 for sample in z.tolist()]
    assert Units.of(activation, z).saturation.tolist() == pytest.approx(counted)
    assert Units.of(nn.Sequential(nn.Identity(), activation), z).saturation.tolist() == pytest.approx(counted)
    if name != "not so leaky":
        assert Units.of(activation, -4 * z.abs() - 8).saturation.tolist() == [1] * 3
        assert not Units.of(activation, 0.01 + 0.0 * z).saturation.any()


def test_saturation_counts_every_activation_of_a_stage():
    stage = nn.Sequential(nn.ReLU(), matrix_stage(-torch.eye(4)), nn.ReLU()).double()
    assert Units.of(stage, torch.tensor([[1.0, 1, 1, -1]]).double()).saturation.tolist() == [5 / 8]  # −0 is inactive too
    assert Units.of(nn.Linear(4, 4).double(), torch.zeros(2, 4).double()).saturation.isnan().all()


def test_no_hook_is_left():
    relu = nn.ReLU()
    Units.of(relu, normal(2, 3).double())
    assert not relu._forward_hooks


class Functional(nn.Module):
    """ReLU in place, leaky ReLU with a slope of its own, tanh as a method, none of them a module."""

    def forward(self, x):
        return functional.leaky_relu(functional.relu_(x - 1) - 1, 0.3).tanh()


class ByHand(nn.Module):
    """The same, of modules."""

    def __init__(self):
        super().__init__()
        self.relu, self.leaky, self.tanh = nn.ReLU(), nn.LeakyReLU(0.3), nn.Tanh()

    def forward(self, x):
        return self.tanh(self.leaky(self.relu(x - 1) - 1))


def units(found):
    return found.saturation.tolist(), found.dead, found.kink


@pytest.mark.parametrize("export", [False, True])
def test_functions_count_as_modules_do(export):
    z = torch.cat([2 * normal(3, 40).double(), torch.ones(3, 1).double(), torch.full((3, 1), -2.0).double()], 1)
    stage = exported(Functional(), z) if export else Functional()
    assert units(Units.of(stage, z)) == units(Units.of(ByHand(), z))
    steady(stage)
    assert units(Units.of(stage, z)) == units(Units.of(ByHand(), z))
    assert Units.of(stage, z).kink > 0


class Untraceable(nn.Module):
    """A ReLU behind a decision."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x) if x.sum() != 0 else x


def test_of_a_stage_without_a_graph_the_modules_count():
    z = normal(3, 40).double()
    assert units(Units.of(Untraceable(), z)) == units(Units.of(nn.ReLU(), z))


def test_dead_is_what_no_sample_reaches_and_kink_what_stands_at_zero():
    z = torch.tensor([[-1.0, 0, 2, 3], [-2, 1, 0, 4]])
    found = Units.of(nn.ReLU(), z)
    assert (found.dead, found.kink) == (1 / 4, 2 / 8)
    assert (Units.of(nn.Tanh(), z).dead, Units.of(nn.Tanh(), z).kink) == (0, 0)
    nothing = Units.of(nn.Linear(4, 4), z)
    assert math.isnan(nothing.dead)
    assert math.isnan(nothing.kink)


@pytest.mark.parametrize(("name", "norm", "skip"), FAMILIES)
def test_relu_networks_saturate_by_their_inactive_units(name, norm, skip):
    model, x = naive.as_measured(family(name, norm=norm, skip=skip)), normal(2, 1, 8, 8).double()
    counts: dict[nn.Module, list[torch.Tensor]] = {stage: [] for stage in model}
    for stage in model:
        for module in stage.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda _, __, output, stage=stage: counts[stage].append((output == 0).flatten(1)))
    model(x)
    for stage, inputs in zip(model, naive.states(list(model), x), strict=False):
        inactive = counts[stage][: sum(isinstance(module, nn.ReLU) for module in stage.modules())]
        expected = torch.cat(inactive, 1).double().mean(1).tolist() if inactive else [math.nan] * 2
        assert Units.of(stage, inputs).saturation.tolist() == pytest.approx(expected, nan_ok=True)
