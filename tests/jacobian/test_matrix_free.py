"""Products with J and Jᵀ, and what is enclosed from them, against J written out."""

import pytest
import torch
from torch import nn

from src.jacobian import materialised
from src.jacobian.materialised import layer_jacobian, parameter_jacobian_norm
from src.jacobian.matrix_free import extremes, layer_products, stacked_products
from tests.jacobian.networks import SMALL, as_double, normal, seeded, small


@pytest.mark.parametrize("name", SMALL)
def test_the_products_are_those_with_the_matrix(name):
    state = normal(3, 1, 4, 4).double()
    for stage in as_double(small(name)):
        J, products = layer_jacobian(stage, state), layer_products(stage, state)
        n, m, d = J.shape
        assert (products.rows, products.columns) == (m, d)
        u, v = normal(n, m, seed=1).double(), normal(n, d, seed=2).double()
        torch.testing.assert_close(products.push(v), (J @ v[..., None])[..., 0])
        torch.testing.assert_close(products.pull(u), (u[:, None] @ J)[:, 0])
        # ⟨Ju, v⟩ = ⟨u, Jᵀv⟩
        torch.testing.assert_close((products.push(v) * u).sum(1), (v * products.pull(u)).sum(1))
        state = stage(state)


def test_the_products_of_several_stages_at_once():
    stages = [
        seeded(nn.Sequential(nn.Conv2d(1, 2, 3), act), seed).double() for seed, act in enumerate((nn.Tanh(), nn.ReLU(), nn.Identity()))
    ]
    inputs = [normal(3, 1, 4, 4, seed=seed).double().requires_grad_() for seed in range(3)]
    push, pull = stacked_products(inputs, [stage(x) for stage, x in zip(stages, inputs, strict=True)])
    J = torch.cat([layer_jacobian(stage, x.detach()) for stage, x in zip(stages, inputs, strict=True)])
    u, v = normal(9, 8, seed=1).double(), normal(9, 16, seed=2).double()
    torch.testing.assert_close(push(v), (J @ v[..., None])[..., 0])
    torch.testing.assert_close(pull(u), (u[:, None] @ J)[:, 0])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(push(v), (J.flip(0) @ v[..., None])[..., 0])


def test_an_operation_that_no_bound_knows_is_estimated():
    stage, x = seeded(nn.Sequential(nn.Linear(90, 90), nn.Softmax(1))).double().requires_grad_(False), normal(4, 90).double()
    found = extremes(stage, x, normal(4, 90, seed=1).double())
    truth = torch.linalg.svdvals(layer_jacobian(stage, x))[:, 0]
    assert found.norm.how == "estimated"
    torch.testing.assert_close(found.norm.value, truth, rtol=1e-9, atol=0)
    assert (found.norm.hi >= truth).all()
    assert found.norm.hi.isfinite().all()
    known = extremes(stage[:1], x, normal(4, 90, seed=1).double())
    assert known.norm.how == "enclosed"


@pytest.mark.parametrize("name", SMALL)
def test_the_norm_of_a_parameter_jacobian_needs_no_gram_matrix(name, monkeypatch):
    state = normal(3, 1, 4, 4).double()
    for stage in as_double(small(name)):
        written = parameter_jacobian_norm(stage, state)
        with monkeypatch.context() as patch:
            patch.setattr(materialised, "WRITTEN_OUT", 0)
            torch.testing.assert_close(parameter_jacobian_norm(stage, state), written, rtol=1e-7, atol=0)
        state = stage(state)
