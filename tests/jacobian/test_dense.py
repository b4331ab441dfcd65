import numpy as np
import pytest
import torch
from torch import nn

from src.jacobian.dense import dense_factors, parameter_gram
from src.jacobian.materialised import parameter_gradients
from src.spectrum import gram_spectrum, spectrum
from tests.jacobian import naive
from tests.jacobian.networks import normal, seeded

STAGES = {
    "dense": nn.Linear(6, 4),
    "tanh": nn.Sequential(nn.Linear(6, 4), nn.Tanh()),
    "flattened": nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU()),
    "activation before": nn.Sequential(nn.Sigmoid(), nn.Linear(6, 4)),
}


def measured(name, n=9):
    stage = seeded(STAGES[name].double())
    shape = (n, 2, 3) if name == "flattened" else (n, 6)
    return stage, normal(*shape).double(), normal(n, 4, seed=1).double()


@pytest.mark.parametrize("name", STAGES)
def test_the_gram_matrix_is_that_of_the_gradients_bias_included(name):
    stage, x, g = measured(name)
    gradients = parameter_gradients(stage, x, g)
    gram = parameter_gram(*dense_factors(stage, x, g)).detach()
    torch.testing.assert_close(gram, gradients @ gradients.T, rtol=1e-12, atol=1e-14)
    rows = np.stack([covector.numpy() @ naive.parameter_jacobian(stage, sample) for sample, covector in zip(x, g, strict=True)])
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-10, atol=1e-13)
    without_bias = parameter_gradients(stage, x, g, weights_only=True)
    assert not torch.allclose(gram, without_bias @ without_bias.T)


@pytest.mark.parametrize("name", STAGES)
def test_the_outer_products_are_the_gradients(name):
    stage, x, g = measured(name)
    hidden, deltas = dense_factors(stage, x, g)
    gradients = parameter_gradients(stage, x, g)
    torch.testing.assert_close(torch.cat([torch.einsum("nk,nd->nkd", deltas, hidden).flatten(1), deltas], 1), gradients)


@pytest.mark.parametrize(("rank_h", "rank_delta", "n"), [(2, 1, 9), (2, 2, 9), (1, 3, 9), (6, 4, 9), (2, 2, 3)])
def test_ranks_and_stable_ranks_from_the_gram_matrix_are_those_of_the_gradients(rank_h, rank_delta, n):
    stage, x, g = measured("dense", n)
    x = x[:, :rank_h] @ normal(rank_h, 6, seed=2).double()
    g = g[:, :rank_delta] @ normal(rank_delta, 4, seed=3).double()
    expected = spectrum(parameter_gradients(stage, x, g))
    found = gram_spectrum(parameter_gram(*dense_factors(stage, x, g)).detach())
    assert int(found.rank) == int(expected.rank) == min(n, (rank_h + 1) * rank_delta)
    assert float(found.stable_rank) == pytest.approx(float(expected.stable_rank), rel=1e-10)


@pytest.mark.parametrize(
    "stage",
    [
        nn.Linear(6, 4, bias=False),
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4).eval()),
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)),
        nn.Tanh(),
    ],
)
def test_another_stage_is_refused(stage):
    with pytest.raises(ValueError, match="expected one dense layer with a bias"):
        dense_factors(stage.double(), normal(3, 6).double(), normal(3, 4).double())
