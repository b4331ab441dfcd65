"""Normalisations against autograd's own Jacobian, and their growth against simulated mean fields."""

import math

import pytest
import torch
from torch import nn

from src.chain import cut
from src.jacobian.normalised import (
    batch_norm_growth,
    closed_form,
    closed_form_errors,
    deviation,
    normalisation_jacobian,
    normalisation_norms,
    normalised_product,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_norm(gains: torch.Tensor, eps: float = 1e-5) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(len(gains), eps, dtype=torch.float64)
    norm.weight.data.copy_(gains)
    return norm


def in_blocks(values: torch.Tensor, gains: torch.Tensor, eps: float) -> torch.Tensor:
    """The closed form, with nothing between groups."""
    groups, n = values.shape
    J, at = torch.zeros(groups, n, groups, n, dtype=values.dtype), torch.arange(groups)
    J[at, :, at] = closed_form(values, gains, eps)
    return J


@pytest.mark.parametrize("together", [2, 3, 7])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_batch_norm_is_its_closed_form(together: int, eps: float) -> None:
    values, gains = normal(4, together), normal(4, seed=1)
    norm = batch_norm(gains, eps)
    naive = torch.autograd.functional.jacobian(norm.train(), values.T).permute(1, 0, 3, 2)
    torch.testing.assert_close(normalisation_jacobian(norm, values), naive, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(in_blocks(values, gains, eps), naive, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(in_blocks(values, gains, 2 * eps), naive, rtol=1e-7)


def test_layer_norm_is_the_same_form_a_sample() -> None:
    values = normal(3, 6)
    norm = nn.LayerNorm(6, dtype=torch.float64)
    norm.weight.data.fill_(-1.5)
    naive = torch.autograd.functional.jacobian(norm, values)
    torch.testing.assert_close(normalisation_jacobian(norm, values), naive, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(in_blocks(values, torch.full((3,), -1.5).double(), norm.eps), naive, rtol=1e-10, atol=1e-12)


def test_the_convolutional_form_normalises_images_and_pixels_together() -> None:
    images = normal(2, 3, 2, 2)
    norm = nn.BatchNorm2d(3, dtype=torch.float64).train()
    naive = torch.autograd.functional.jacobian(norm, images).permute(1, 0, 2, 3, 5, 4, 6, 7).reshape(3, 8, 3, 8)
    values = images.transpose(0, 1).reshape(3, 8)
    torch.testing.assert_close(in_blocks(values, torch.ones(3).double(), norm.eps), naive, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("together", [3, 8])
def test_norm_and_null_directions(together: int) -> None:
    values, gains, eps = normal(1, together), torch.tensor([-2.0]).double(), 1e-4
    (J,) = closed_form(values, gains, eps)
    scale = 2 / float(deviation(values, eps))
    singular = torch.linalg.svdvals(J)
    torch.testing.assert_close(singular[: together - 2], torch.full((together - 2,), scale, dtype=torch.float64), rtol=1e-12, atol=0)
    assert float((J @ torch.ones(together).double()).norm()) < 1e-13 * scale
    centred = values[0] - values.mean()
    share = eps / float(deviation(values, eps)) ** 2
    assert float((J @ centred).norm() / centred.norm()) == pytest.approx(scale * share, rel=1e-10)


def test_the_errors_of_an_operator_see_a_wrong_one() -> None:
    values, gains, eps = normal(3, 5), torch.tensor([1.0, -2.0, 0.5]).double(), 1e-5
    J = normalisation_jacobian(batch_norm(gains, eps), values)
    right = closed_form_errors(J, values, gains, eps)
    assert right.pop("operator_norm") == pytest.approx(float(torch.linalg.matrix_norm(J.reshape(15, 15), 2)))
    assert max(right.values()) < 1e-12
    scaled = closed_form_errors(J * (1 + 1e-8), values, gains, eps)
    assert min(scaled["norm_error"], scaled["form_error"], scaled["spectrum_error"]) > 1e-9
    coupled = J.clone()
    coupled[0, 0, 1, 0] += 1e-6
    assert closed_form_errors(coupled, values, gains, eps)["form_error"] > 1e-8
    # what should be annihilated passes: 1 itself, and x̂
    at = torch.arange(3)
    centred = values - values.mean(1, keepdim=True)
    for kept in (torch.ones_like(values), centred):
        passing = J.clone()
        passing[at, :, at] += 1e-6 * kept.unsqueeze(2) * kept.unsqueeze(1)
        errors = closed_form_errors(passing, values, gains, eps)
        assert min(errors["spectrum_error"], errors["direction_error"]) > 1e-8
    # other directions are annihilated: the spectrum is right, the directions are not
    Q, _ = torch.linalg.qr(normal(5, 5, seed=2))
    turned = closed_form_errors(torch.einsum("ij,gjhk,lk->gihl", Q, J, Q), values, gains, eps)
    assert turned["spectrum_error"] < 1e-12
    assert turned["direction_error"] > 0.1


def test_norms_inside_a_network_are_those_of_the_operators() -> None:
    generator = torch.Generator().manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 6), batch_norm(normal(6, seed=1)).float(), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5))
    for parameter in network[0].parameters():
        nn.init.normal_(parameter, generator=generator)
    inputs = normal(7, 4)
    chain = cut(network, None, torch.float64, "train")
    states = chain.states(inputs.unsqueeze(0))
    into = [states[1][0].T, states[4][0]]
    operators = [normalisation_jacobian(norm.double(), values) for norm, values in zip((network[1], network[4]), into, strict=True)]
    naive = [float(torch.linalg.matrix_norm(J.reshape(values.numel(), -1), 2)) for J, values in zip(operators, into, strict=True)]
    assert normalisation_norms(chain, inputs) == pytest.approx(naive, rel=1e-10)


@pytest.mark.parametrize("batch", [6, 8, 16])
def test_growth_against_a_simulated_mean_field(batch: int) -> None:
    """E‖Jᵀg‖²/E‖g‖² of W, BN and ReLU with centred g, every layer's pre-activations as the layer before makes them, in a wide net."""
    draws = 400_000 // batch
    h = normal(batch, draws)
    h = h - h.mean(0)
    active = h / h.norm(dim=0) * math.sqrt(batch)
    # what W makes of the activations: pre-activations of the variance across 1 that they have a unit
    variance = float((active.relu() - active.relu().mean(0)).square().sum() / draws / (batch - 1))
    g = normal(batch, draws, seed=1)
    g = (g - g.mean(0)) * (active > 0)
    unit = h / h.norm(dim=0)
    g = g - g.mean(0) - unit * (unit * g).sum(0)
    sigma = h.square().mean(0) * variance
    growth = float((g.square().sum(0) / sigma).mean()) / (batch - 1)
    assert growth == pytest.approx(batch_norm_growth(batch), rel=0.03)
    assert growth != pytest.approx(batch_norm_growth(2 * batch), rel=0.03)


def test_growth_at_large_batch_is_the_known_one() -> None:
    assert batch_norm_growth(math.inf) == pytest.approx(1.467, abs=5e-4)
    assert batch_norm_growth(1e6) == pytest.approx(batch_norm_growth(math.inf), rel=1e-5)
    assert batch_norm_growth(16) > 1.05 * batch_norm_growth(math.inf)


@pytest.mark.parametrize("eps", [1e-5, 1e-30])
@pytest.mark.parametrize("gain", [10**-4.5, 10**4.5])
def test_scaled_weights_behind_normalisation(gain: float, eps: float) -> None:
    """Without ε to speak of BN(sWx) is BN(Wx), and ∇W falls as 1/s; with PyTorch's ε a small s tells."""
    W, x, v = normal(5, 7), normal(9, 7, seed=1), normal(9, 5, seed=2)
    plain, scaled = (normalised_product(factor * W, x, v, eps) for factor in (1.0, gain))
    invariant = [torch.allclose(new, old, rtol=1e-3) for new, old in zip((*scaled[:2], scaled[2] * gain), plain, strict=True)]
    assert invariant == [eps < 1e-20 or gain > 1] * 3
