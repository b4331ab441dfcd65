import math

import torch
from torch import nn

from src.config import ModelConfig
from src.models import build
from src.models.start import neutral_readout, standard_start


def network(weight_var: float = 4.0, bias_var: float = 2.0) -> nn.Sequential:
    chosen = {"activation": "sigmoid", "init": "gaussian", "weight_var": weight_var, "bias_var": bias_var, "norm": "none", "skip": "none"}
    config = ModelConfig(family="mlp", depth=3, width=400, branch_scale=1.0, **chosen)
    return build(config, (1, 10, 10), 10, torch.Generator().manual_seed(0))


def linears(net: nn.Sequential) -> list[nn.Linear]:
    return [module for module in net.modules() if isinstance(module, nn.Linear)]


def test_the_standard_start_is_uniform_with_a_third_over_the_fan_in() -> None:
    net = network()
    standard_start(net, torch.Generator().manual_seed(1))
    for linear in linears(net.requires_grad_(False)):
        n = linear.in_features
        assert float(linear.weight.abs().max()) <= 1 / math.sqrt(n)
        assert math.isclose(float(linear.weight.var()) * n, 1 / 3, rel_tol=0.05)
        # a Gaussian of that variance has a kurtosis of 3, the uniform one of 9/5
        assert math.isclose(float(linear.weight.pow(4).mean()) * n**2 * 9, 9 / 5, rel_tol=0.05)
        assert not linear.bias.any()
    assert float(network().requires_grad_(False).get_submodule("layer2.linear").weight.var()) * 400 > 3


def test_the_standard_start_is_the_generators() -> None:
    first, again, other = network(), network(weight_var=1.0), network()
    for net, seed in ((first, 1), (again, 1), (other, 2)):
        standard_start(net, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(linears(first), linears(again), strict=True))
    assert not torch.equal(first[-1].weight, other[-1].weight)


def test_a_neutral_readout_is_that_of_variance_one() -> None:
    net, plain = network(), network(weight_var=1.0, bias_var=0.0)
    neutral_readout(net, 4.0)
    torch.testing.assert_close(net[-1].weight, plain[-1].weight)
    assert torch.equal(net[-1].bias, plain[-1].bias)
    assert torch.equal(net[1].linear.weight, network()[1].linear.weight)
    neutral_readout(net, 4.0)
    assert not torch.allclose(net[-1].weight, plain[-1].weight)


def test_a_neutral_readout_may_follow_a_normalisation() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)))
    before = [linear.weight.clone() for linear in linears(net)]
    neutral_readout(net, 9.0)
    assert torch.equal(net[0].weight, before[0])
    torch.testing.assert_close(net[1][2].weight, before[1] / 3)
