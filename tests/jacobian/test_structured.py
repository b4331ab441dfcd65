"""Dense stages by their structure, against the Jacobians written out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from src.jacobian.materialised import layer_jacobian, parameter_gradients, parameter_jacobian_norm
from src.jacobian.structured import ROUGH, dense, extremes, stacked_products
from src.models import Residual
from tests.jacobian.networks import as_double, matrix_stage, normal, seeded

few = settings(max_examples=20, deadline=None)


class Functional(nn.Module):
    """A dense layer and its activation, flattened by methods."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return functional.relu(self.linear(x.reshape(x.shape[0], -1)))


DENSE = {
    "linear": (nn.Linear(6, 4), (6,)),
    "without a bias": (nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh()), (6,)),
    "flattened": (nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU()), (1, 2, 3)),
    "expanding": (nn.Sequential(nn.Linear(3, 5), nn.GELU()), (3,)),
    "twice bent": (nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Dropout(), nn.Sigmoid()), (6,)),
    "functional": (Functional(), (2, 3)),
}
OTHERS = {
    "bent first": (nn.Sequential(nn.Tanh(), nn.Linear(6, 4)), (6,)),
    "two layers": (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), (6,)),
    "normalised": (nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), (6,)),
    "residual": (Residual(nn.Linear(6, 6), nn.Identity(), nn.Identity()), (6,)),
    "softmax": (nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)), (6,)),
    "convolution": (nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU()), (1, 3, 3)),
    "over the last axis": (nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (2, 3)),
    "no weights": (nn.Tanh(), (6,)),
    "learnt slope": (nn.Sequential(nn.Linear(6, 4), nn.PReLU()), (6,)),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_stage_is_its_slopes_times_its_weight(name):
    stage, shape = DENSE[name]
    stage, x = as_double(seeded(stage)), normal(5, *shape).double()
    J = dense(stage, x)
    torch.testing.assert_close(J.jacobians(), layer_jacobian(stage, x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(J.parameter_norm(), parameter_jacobian_norm(stage, x), rtol=1e-10, atol=1e-12)
    assert (J.largest() >= J.jacobians().abs().amax((1, 2))).all()
    lines = [(J.jacobians() != 0).any(axis).sum(1) for axis in (1, 2)]
    assert J.lines().tolist() == torch.minimum(*lines).tolist()
    g = normal(5, J.weight.shape[0], seed=3).double()
    rows = parameter_gradients(stage, x, g)
    torch.testing.assert_close(J.gradient_norm(g), rows.norm(dim=1), rtol=1e-12, atol=1e-14)
    matrix = J.gradient_matrix(g)
    assert matrix.shape[1] == min(5, J.weight.shape[0]) * min(5, J.weight.shape[1] + J.has_bias)
    torch.testing.assert_close(matrix @ matrix.T, rows @ rows.T, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_stage_is_not_taken_for_one(name):
    stage, shape = OTHERS[name]
    assert dense(as_double(seeded(stage)), normal(2, *shape).double()) is None


@given(st.integers(1, 12), st.integers(0, 6), st.sampled_from(["tanh", "relu", "sigmoid", "leaky"]), st.integers(0, 10_000))
@few
def test_extremes_are_those_of_the_singular_values(m, more, activation, seed):
    phi = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "leaky": nn.LeakyReLU()}[activation]
    stage, x = as_double(seeded(nn.Sequential(nn.Linear(m + more, m), phi), seed)), normal(3, m + more, seed=seed).double()
    J, (other, y) = dense(stage, x), (as_double(seeded(nn.Linear(m, m))), normal(3, m, seed=seed + 2).double())
    beside = dense(nn.Sequential(other, nn.Tanh()), y)
    found, _ = extremes([J, beside], normal(2, 3, m, seed=seed + 1).double())
    s = torch.linalg.svdvals(J.jacobians())
    rank = (s > max(m, m + more) * torch.finfo(s.dtype).eps * s[:, :1]).sum(1)
    assert found.rank.value.tolist() == found.structural.tolist() == rank.tolist()
    last = torch.where(rank > 0, s.gather(1, (rank - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0)
    for known, truth in ((found.norm, s[:, 0]), (found.smallest, torch.where(rank == m, s[:, -1], 0)), (found.active, last)):
        torch.testing.assert_close(known.value, truth, rtol=ROUGH if known is found.active else 1e-6, atol=1e-14)
        assert ((known.lo <= truth * (1 + 1e-12)) & (truth <= known.hi * (1 + 1e-12))).all()
    torch.testing.assert_close(found.mean_square, s.square().mean(1), rtol=1e-12, atol=1e-14)
    # σ₁ is right to 1e-6, and its square to twice that
    torch.testing.assert_close(found.stable_rank, s.square().sum(1) / s[:, 0].square(), rtol=2e-6, atol=0, equal_nan=True)
    assert (found.condition.value.isinf() == (rank < m)).all()


def test_a_rank_that_the_factorisation_cannot_tell_is_left_open():
    """Two equal rows: σ_min(W) is rounding, and says nothing of the rows that are active."""
    W = normal(4, 5).double()
    W[3] = W[2]
    stage = nn.Sequential(matrix_stage(W), nn.ReLU())
    damped = dense(stage, normal(6, 5, seed=1).double())
    alive = dense(nn.Sequential(matrix_stage(W), nn.Tanh()), normal(6, 5, seed=1).double())
    clear = replace(alive, weight=normal(4, 5, seed=3).double())
    found = extremes([damped, clear, alive], normal(3, 6, 4, seed=2).double())
    assert [of is None for of in found] == [True, False, True]


def test_the_smallest_singular_value_is_right_where_the_decomposition_of_j_loses_it():
    """Slopes over twelve decades, small rows first: σ_min to ten digits, where that of J written out has lost half of them."""
    J = dense(matrix_stage(torch.eye(6).double() + 0.1 * normal(6, 6).double()), normal(1, 6).double())
    graded = replace(J, slopes=torch.logspace(-12, 0, 6).double().expand(1, 6))
    found = extremes([graded], normal(1, 1, 6, seed=1).double())[0].smallest.value
    true = 1 / torch.linalg.svdvals(torch.linalg.inv(J.weight) / graded.slopes)[0]
    torch.testing.assert_close(found[0], true, rtol=1e-10, atol=0)
    written_out = torch.linalg.svdvals(graded.jacobians())[0, -1]
    assert abs(written_out / true - 1) > 1e-6


def test_columns_that_are_zero_at_a_sample_bound_the_rank():
    W = torch.tensor([[1.0, 0, 0], [0, 2, 3]]).double()
    J = replace(dense(matrix_stage(W), normal(3, 3).double()), slopes=torch.tensor([[1.0, 0], [0, 1], [0, 0]]).double())
    assert J.lines().tolist() == [1, 1, 0]


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e10])
def test_the_active_subspace_of_weights_of_any_size(scale):
    """In single precision first, or not where it has no such numbers."""
    x = normal(5, 8, seed=1).double()
    stage = as_double(seeded(nn.Sequential(nn.Linear(8, 8), nn.ReLU())))
    stage[0].weight.data *= scale
    stage[0].bias.data *= scale
    J = dense(stage, x)
    [found] = extremes([J], normal(1, 5, 8, seed=2).double())
    rank = (J.slopes != 0).sum(1)
    truth = torch.linalg.svdvals(J.jacobians()).gather(1, rank.unsqueeze(1) - 1).squeeze(1)
    torch.testing.assert_close(found.active.value, truth, rtol=1e-5, atol=0)
    assert ((found.active.lo <= truth) & (truth <= found.active.hi)).all()


@pytest.mark.parametrize(("apart", "told"), [(1e-2, True), (1e-4, True), (1e-6, False)])
def test_the_active_subspace_of_rows_that_are_nearly_the_same(apart, told):
    """Single precision, which can't tell them apart, is not believed; nor is double, where their Gram matrix has lost it."""
    W = normal(8, 8).double()
    W[1] = W[0] + apart * normal(8, seed=1).double()
    J = replace(dense(matrix_stage(W), normal(3, 8).double()), slopes=torch.tensor([[1.0] * 7 + [0]]).double().expand(3, 8))
    [found] = extremes([J], normal(1, 3, 8, seed=2).double())
    assert (found is not None) == told
    if not told:
        return
    truth = torch.linalg.svdvals(J.jacobians())[:, 6]
    torch.testing.assert_close(found.active.value, truth, rtol=ROUGH, atol=0)
    assert ((found.active.lo <= truth) & (truth <= found.active.hi) & (found.active.lo > truth / 8)).all()


@pytest.mark.parametrize("least", [1e-1, 1e-2, 1e-4])
def test_the_active_subspace_where_half_of_the_singular_values_are_small(least):
    """Many large ones, of which the vector of σ_r holds a rest."""
    values = torch.cat([torch.ones(32), least * torch.linspace(2, 1, 32)]).double()
    W = torch.linalg.qr(normal(64, 64).double()).Q * values @ torch.linalg.qr(normal(64, 64, seed=1).double()).Q
    stage = dense(matrix_stage(W), normal(8, 64).double())
    J = replace(stage, slopes=(normal(8, 64, seed=2) < 1.3).double())
    [found] = extremes([J], normal(1, 8, 64, seed=3).double())
    rank = (J.slopes != 0).sum(1)
    truth = torch.linalg.svdvals(J.jacobians()).gather(1, rank.unsqueeze(1) - 1).squeeze(1)
    torch.testing.assert_close(found.active.value, truth, rtol=ROUGH, atol=0)
    assert ((found.active.lo <= truth) & (truth <= found.active.hi)).all()


def test_the_products_of_several_stages_at_once():
    weights = [normal(m, 6, seed=m) for m in (4, 6, 9)]
    slopes = [normal(5, m, seed=2 * m) for m in (4, 6, 9)]
    push, pull = stacked_products(weights, slopes)
    u, v = normal(15, 9, seed=1), normal(15, 6, seed=2)
    for at, (W, s) in enumerate(zip(weights, slopes, strict=True)):
        J, own = s[:, :, None] * W, slice(5 * at, 5 * at + 5)
        torch.testing.assert_close(push(v)[own, : len(W)], (J @ v[own, :, None])[..., 0])
        torch.testing.assert_close(pull(u)[own], (u[own, None, : len(W)] @ J)[:, 0])
        assert (push(v)[own, len(W) :] == 0).all()
