import copy

import pytest
import torch
from torch import nn

from src.models import calibrate
from tests.jacobian.networks import family, normal


def test_running_statistics_are_those_of_the_batch():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 5), nn.BatchNorm1d(5)).double()
    x = normal(20, 4).double()
    calibrate(model, x)
    z = model[0](x)
    torch.testing.assert_close(model[1].running_mean, z.mean(0))
    torch.testing.assert_close(model[1].running_var, z.var(0))
    batch_normalised = (z - z.mean(0)) / (z.var(0, correction=0) + model[1].eps).sqrt()
    z = model[3](batch_normalised.tanh())
    torch.testing.assert_close(model[4].running_mean, z.mean(0))
    torch.testing.assert_close(model[4].running_var, z.var(0))


def test_earlier_statistics_are_forgotten_and_momentum_comes_back():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.BatchNorm1d(3, momentum=None))
    model.train()(100 + normal(8, 3))
    fresh = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    for network in (model, fresh):
        calibrate(network, normal(8, 3, seed=1))
    torch.testing.assert_close(model[0].running_mean, fresh[0].running_mean)
    torch.testing.assert_close(model[0].running_var, fresh[0].running_var)
    assert [norm.momentum for norm in model] == [0.3, None]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["mlp", "residual_mlp", "cifar", "vgg"])
def test_a_calibrated_network_does_in_eval_mode_what_it_does_on_the_batch(name):
    """Up to Bessel's correction of the variance; a fresh network does not."""
    model = family(name, norm="batch").double()
    x = normal(64, 1, 8, 8, seed=2).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    weights = copy.deepcopy(dict(model.named_parameters()))
    on_batch, fresh = model.train()(x), copy.deepcopy(model)
    for module in fresh.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    calibrate(model, x)
    torch.testing.assert_close(model(x), on_batch, rtol=0.1, atol=0.1)
    assert not torch.allclose(fresh.eval()(x), on_batch, rtol=0.1, atol=0.1)
    assert all(torch.equal(weights[parameter], value) for parameter, value in model.named_parameters())


def test_nothing_to_calibrate():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    calibrate(model, normal(4, 2))
    assert not model.training
