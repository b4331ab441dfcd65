"""Low-rank layers, codes and gradient filters against what they stand for."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from src.config import ModelConfig
from src.models import build
from src.models.bottleneck import GradientFilter, before, dense_layer, factorised, reduce_rank, replace_dense, with_code
from src.models.layers import Layers
from src.seeds import generator

MODEL = ModelConfig(
    family="mlp",
    depth=4,
    width=12,
    activation="tanh",
    init="gaussian",
    weight_var=1.0,
    bias_var=0.1,
    norm="none",
    skip="none",
    branch_scale=1.0,
)


@pytest.fixture
def chain() -> nn.Sequential:
    return build(MODEL, (1, 4, 4), 5, generator(0, "net")).double()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(20, 1, 4, 4, generator=generator(0, "images"), dtype=torch.float64)


def test_factors_are_the_best_approximation(chain: nn.Sequential) -> None:
    linear = dense_layer(chain.layer1)
    values = torch.linalg.svdvals(linear.weight)
    for rank in (1, 5, 12):
        factors = factorised(linear, rank)
        error = linear.weight - factors.decoder.weight @ factors.encoder.weight
        torch.testing.assert_close(error.norm() ** 2, (values[rank:] ** 2).sum(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(factors.decoder.bias, linear.bias)
        torch.testing.assert_close(factors.decoder.weight.T @ factors.decoder.weight, factors.encoder.weight @ factors.encoder.weight.T)


def test_a_layer_of_reduced_rank_is_the_product_of_its_factors(chain: nn.Sequential, images: torch.Tensor) -> None:
    factors = factorised(dense_layer(chain.layer2), 3)
    reduce_rank(dense_layer(chain.layer2), 3)
    assert torch.linalg.matrix_rank(chain.layer2.linear.weight) == 3
    expected = chain(images)
    replace_dense(chain, "layer2", factors)
    torch.testing.assert_close(chain(images), expected)


def test_in_float32_rounding_restores_the_rank(chain: nn.Sequential) -> None:
    linear = dense_layer(chain.layer2).float()
    reduce_rank(linear, 3)
    assert torch.linalg.matrix_rank(linear.weight.double()) == 12


def test_the_readout_itself_can_be_replaced(chain: nn.Sequential, images: torch.Tensor) -> None:
    expected = chain(images)
    replace_dense(chain, "readout", factorised(chain.readout, 5))
    assert isinstance(chain.readout, nn.Sequential)
    torch.testing.assert_close(chain(images), expected)


def test_a_stage_with_two_dense_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        dense_layer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["layer2", "layer3", "readout"])
def test_a_code_stands_before_its_stage(chain: nn.Sequential, images: torch.Tensor, name: str) -> None:
    below = next(iter(chain.named_children()))[1]
    coded = with_code(chain, name, 3, Layers(MODEL, generator(0, "code")))
    names = [child for child, _ in coded.named_children()]
    assert names.index("code") == names.index(name) - 1
    assert len(names) == MODEL.depth + 1
    assert coded.layer1 is below
    assert coded(images).shape == (20, 5)
    assert coded(images).dtype == torch.float64
    assert coded.code.linear.weight.shape == (3, 12)
    assert dense_layer(coded.get_submodule(name)).in_features == 3


def test_a_code_draws_numbers_of_its_own() -> None:
    def coded(purpose: str) -> torch.Tensor:
        network = build(MODEL, (1, 4, 4), 5, generator(0, "net"))
        return with_code(network, "layer3", 3, Layers(MODEL, generator(0, purpose))).code.linear.weight

    assert torch.equal(coded("code"), coded("code"))
    assert not torch.equal(coded("code"), coded("other"))


@pytest.mark.parametrize("rank", [0, 3, 12])
def test_a_filter_leaves_the_state_and_projects_the_gradient(chain: nn.Sequential, images: torch.Tensor, rank: int) -> None:
    gradient_filter = GradientFilter(12, rank, generator(0, "filter")).double()
    Q = gradient_filter.directions
    torch.testing.assert_close(Q.T @ Q, torch.eye(rank, dtype=torch.float64), atol=1e-6, rtol=0)
    targets = torch.arange(20) % 5
    state = chain.layer1(images).detach().requires_grad_()
    assert torch.equal(gradient_filter(state), state)

    def gradient(*parts: nn.Module) -> torch.Tensor:
        loss = cross_entropy(nn.Sequential(*parts, chain.layer2, chain.layer3, chain.readout)(state), targets)
        return torch.autograd.grad(loss, state)[0]

    filtered = gradient(gradient_filter)
    torch.testing.assert_close(filtered, (12 / max(rank, 1)) ** 0.5 * gradient() @ Q @ Q.T)
    # exactly of rank r, not only up to float32
    assert torch.linalg.matrix_rank(filtered) == min(rank, 4 if rank < 12 else 12)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_filter_keeps_the_energy_of_directions_drawn_at_random(rank: int) -> None:
    """Over all g of unit length the mean ‖√(d/r) QQᵀg‖² = (d/r) ‖QQᵀ‖²_F/d = 1."""
    state = torch.zeros(12, 12, requires_grad=True)
    (filtered,) = torch.autograd.grad(GradientFilter(12, rank, generator(0, "filter"))(state), state, torch.eye(12))
    assert float(filtered.square().sum()) / 12 == pytest.approx(1, rel=1e-6)


def test_a_stage_more_stands_before_the_named_one(chain: nn.Sequential, images: torch.Tensor) -> None:
    more = before(chain, "layer2", "filter", GradientFilter(12, 3, generator(0, "filter")).double())
    assert [name for name, _ in more.named_children()] == ["layer1", "filter", "layer2", "layer3", "readout"]
    torch.testing.assert_close(more(images), chain(images))
