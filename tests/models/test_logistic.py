import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from src.config import ModelConfig
from src.models import build
from src.models.logistic import InTanhCoordinates, logistic_parameters, logistic_twin

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(5, 1, 4, 4, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.arange(5) % 3


@pytest.fixture(params=[1, 2, 5])
def tanh(request) -> nn.Sequential:
    chosen = {"activation": "tanh", "init": "gaussian", "weight_var": 2.0, "bias_var": 0.3, "norm": "none", "skip": "none"}
    config = ModelConfig(family="mlp", depth=request.param, width=6, branch_scale=1.0, **chosen)
    return build(config, (1, 4, 4), 3, torch.Generator().manual_seed(request.param)).double()


def naive(parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Logistic units written out, image by image, unit by unit."""
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    rows = []
    for image in images:
        state = image.flatten().tolist()
        for name in names:
            weight, bias = parameters[f"{name}.weight"].tolist(), parameters[f"{name}.bias"].tolist()
            z = [sum(w * s for w, s in zip(row, state, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
            state = z if name == names[-1] else [1 / (1 + math.exp(-value)) for value in z]
        rows.append(state)
    return torch.tensor(rows, dtype=torch.float64)


def test_the_logistic_net_is_the_tanh_net(tanh: nn.Sequential) -> None:
    twin = logistic_twin(tanh)
    assert not any(isinstance(module, nn.Tanh) for module in twin.modules())
    assert any(isinstance(module, nn.Sigmoid) for module in twin.modules()) == (len(tanh) > 1)
    torch.testing.assert_close(twin(IMAGES), tanh(IMAGES), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(naive(logistic_parameters(tanh), IMAGES), tanh(IMAGES), rtol=1e-12, atol=1e-12)
    if len(tanh) > 1:
        twin.load_state_dict(tanh.state_dict())
        assert (twin(IMAGES) - tanh(IMAGES)).abs().max() > 0.01


def test_the_tanh_net_stays_as_it_is(tanh: nn.Sequential) -> None:
    before = {name: value.clone() for name, value in tanh.state_dict().items()}
    logistic_twin(tanh)
    InTanhCoordinates(tanh)
    assert all(torch.equal(value, before[name]) for name, value in tanh.state_dict().items())
    assert not any(isinstance(module, nn.Sigmoid) for module in tanh.modules())


def test_in_tanh_coordinates_the_gradients_are_those_of_the_tanh_net(tanh: nn.Sequential) -> None:
    logistic = InTanhCoordinates(tanh)
    assert {id(p) for p in logistic.parameters()} == {id(p) for p in tanh.parameters()}
    torch.testing.assert_close(logistic(IMAGES), tanh(IMAGES), rtol=1e-12, atol=1e-12)
    through, direct = (torch.autograd.grad(cross_entropy(net(IMAGES), LABELS), list(tanh.parameters())) for net in (logistic, tanh))
    torch.testing.assert_close(through, direct, rtol=1e-10, atol=1e-12)


def test_the_parameters_own_gradients_are_others(tanh: nn.Sequential) -> None:
    """∇W = ac ∇W' up to the biases' part: the two nets have one function and two gradient flows."""
    if len(tanh) == 1:
        return
    twin = logistic_twin(tanh)
    own, direct = (torch.autograd.grad(cross_entropy(net(IMAGES), LABELS), net[0].linear.weight)[0] for net in (twin, tanh))
    torch.testing.assert_close(2 * own, direct, rtol=1e-10, atol=1e-12)
    assert (own - direct).abs().max() > 1e-6
