import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from src.chain import OnBatch, cut
from src.jacobian import materialised
from src.jacobian.materialised import transpose
from src.models import Residual
from tests.jacobian import naive
from tests.jacobian.networks import FAMILIES, SMALL, dense, diagonal, family, matrix_stage, normal, seeded, small

few = settings(max_examples=10, deadline=None)
# the references differentiate by the parameters; what is measured stays out of their graph
layer_jacobian = torch.no_grad()(materialised.layer_jacobian)
parameter_jacobian_norm = torch.no_grad()(materialised.parameter_jacobian_norm)
parameter_gradients = torch.no_grad()(materialised.parameter_gradients)


def links(model, x):
    """Every stage of the float64 eval copy with its inputs."""
    stages = list(naive.as_measured(model))
    return list(zip(stages, naive.states(stages, x.double()), strict=False))


def assert_stages_agree_with_autograd(model, x):
    for stage, inputs in links(model, x):
        J = layer_jacobian(stage, inputs)
        np.testing.assert_allclose(J, [naive.layer_jacobian(stage, h) for h in inputs], rtol=1e-10, atol=1e-12)
        if not list(stage.parameters()):
            assert not parameter_jacobian_norm(stage, inputs).any()
            continue
        P = [naive.parameter_jacobian(stage, h) for h in inputs]
        np.testing.assert_allclose(parameter_jacobian_norm(stage, inputs), [naive.singular_values(one)[0] for one in P], rtol=1e-10)
        g = normal(*stage(inputs).shape, seed=3).double()
        expected = [covector.flatten().numpy() @ one for covector, one in zip(g, P, strict=True)]
        np.testing.assert_allclose(parameter_gradients(stage, inputs, g), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_jacobians_are_those_of_autograd_one_sample_at_a_time(name):
    assert_stages_agree_with_autograd(small(name), normal(3, 1, 4, 4))


@pytest.mark.parametrize(("name", "norm", "skip"), FAMILIES)
def test_jacobians_of_every_family(name, norm, skip):
    assert_stages_agree_with_autograd(family(name, norm=norm, skip=skip, activation="tanh"), normal(2, 1, 8, 8))


def test_another_network_another_sample_or_single_precision_fails_the_comparison():
    model, x = small("dense"), normal(3, 1, 4, 4)
    stage, inputs = links(model, x)[1]
    J, expected = layer_jacobian(stage, inputs), [naive.layer_jacobian(stage, h) for h in inputs]
    redrawn, single = (
        layer_jacobian(seeded(copy.deepcopy(stage), seed=1), inputs),
        layer_jacobian(copy.deepcopy(stage).float(), inputs.float()),
    )
    assert np.allclose(J, expected, rtol=1e-10, atol=1e-12)
    for other in (redrawn, single, J.roll(1, 0), J.transpose(1, 2).reshape(J.shape)):
        assert not np.allclose(other, expected, rtol=1e-10, atol=1e-12)


@few
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_the_jacobian_and_its_transpose_are_adjoint(d, m, seed):
    """⟨Ju, v⟩ = ⟨u, Jᵀv⟩."""
    stage = seeded(nn.Sequential(nn.Linear(d, m), nn.Tanh()), seed).double().requires_grad_(False)
    x, u, v = normal(2, d, seed=seed).double(), normal(2, d, seed=seed + 1).double(), normal(2, m, seed=seed + 2).double()
    outputs, pull_back = transpose(stage, x)
    torch.testing.assert_close(outputs, stage(x))
    Ju = torch.einsum("nmd,nd->nm", layer_jacobian(stage, x), u)
    torch.testing.assert_close((Ju * v).sum(1), (u * pull_back(v)).sum(1))


def test_the_chain_rule_is_the_explicit_product():
    """∇θ_l ℓ = P_lᵀ J_{l+1}ᵀ … J_Lᵀ g_L to 1e-10; without one of the factors it is not."""
    model, x, y = dense(5, 4, 4, 4, 3), normal(3, 5), torch.tensor([0, 1, 2])
    of_stages = links(model, x)
    for n in range(3):
        signals, gradients = naive.gradients(list(naive.as_measured(model)), x[n].double(), y[n], functional.cross_entropy)
        for index in range(len(of_stages)):
            jacobians = [layer_jacobian(stage, inputs)[n].numpy() for stage, inputs in of_stages[index + 1 :]]
            stage, inputs = of_stages[index]
            P = naive.parameter_jacobian(stage, inputs[n])
            np.testing.assert_allclose(product(signals[-1], jacobians) @ P, gradients[index], rtol=1e-10, atol=1e-14)
            if len(jacobians) > 1:  # without the first of them, which is square
                assert not np.allclose(product(signals[-1], jacobians[1:]) @ P, gradients[index], rtol=1e-2)


def product(g, jacobians):
    """g_LᵀJ_L … J_{l+1}."""
    for J in reversed(jacobians):
        g = g @ J
    return g


def test_orthogonal_layers_have_all_singular_values_at_the_gain():
    model = family("mlp", activation="linear", init="orthogonal", weight_var=2.25, bias_var=0.0)
    for stage, inputs in links(model, normal(2, 1, 8, 8)):
        for J in layer_jacobian(stage, inputs):
            np.testing.assert_allclose(naive.singular_values(J.numpy()), 1.5, rtol=1e-6)  # drawn in float32


def test_diagonal_and_identity_layers():
    x = normal(2, 3).double()
    J = torch.diag(torch.tensor([2.0, -1, 0])).double()
    torch.testing.assert_close(layer_jacobian(diagonal(2.0, -1.0, 0.0), x), J.repeat(2, 1, 1))
    torch.testing.assert_close(layer_jacobian(nn.Identity(), x), torch.eye(3).double().repeat(2, 1, 1))


def test_batch_norm_in_eval_mode_is_a_diagonal():
    """‖J‖ = max_c |γ_c|/√(σ_c² + ε)."""
    norm = seeded(nn.BatchNorm1d(5)).double().eval()
    J = layer_jacobian(norm, normal(2, 5).double())
    slopes = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    torch.testing.assert_close(J, torch.diag(slopes).repeat(2, 1, 1))
    assert float(torch.linalg.matrix_norm(J, 2)[0]) == pytest.approx(float(slopes.abs().max()))


def test_batch_norm_in_train_mode_annihilates_two_directions_a_channel():
    """‖J‖ = max_c |γ_c|/σ_c and rank (N − 2) C for N ≥ 3, where ε does not count; two samples leave nothing."""
    norm = seeded(nn.BatchNorm1d(3, eps=1e-30)).double()
    stage = cut(nn.Sequential(norm), None, torch.float64, "train").stages[0]
    for n in (2, 3, 6):
        x = normal(1, n, 3).double()
        (J,) = layer_jacobian(stage, x)
        s = naive.singular_values(J.numpy())
        slopes = (norm.weight / x[0].var(0, correction=0).sqrt()).abs()
        assert (s > 1e-8).sum() == 3 * (n - 2)
        if n > 2:
            assert s[0] == pytest.approx(float(slopes.max().detach()), rel=1e-8)


def test_the_batch_as_one_operator_is_autograd_of_the_whole_batch():
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh())).double()
    x = normal(5, 4).double()
    stage = cut(nn.Sequential(model), None, torch.float64, "train").stages[0]
    (J,) = layer_jacobian(stage, x.unsqueeze(0))
    expected = torch.autograd.functional.jacobian(model.train(), x)
    np.testing.assert_allclose(J, expected.reshape(15, 20), rtol=1e-10, atol=1e-14)
    blocks = torch.block_diag(*layer_jacobian(model.eval(), x))
    assert not torch.allclose(J, blocks, atol=0.1)  # frozen statistics couple no samples


def test_a_residual_of_minus_the_identity_passes_nothing():
    skip = Residual(matrix_stage(-torch.eye(4)), nn.Identity(), nn.Identity())
    assert not layer_jacobian(skip, normal(2, 4).double()).any()


class Scaled(nn.Module):
    def forward(self, W):
        return 3 * W


class Masked(nn.Linear):
    def forward(self, h):
        return functional.linear(h, self.weight.triu(1), self.bias)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h):
        return self.linear(self.linear(h).tanh())


def reparametrised():
    linear = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(linear, "weight", Scaled())
    return linear


@pytest.mark.parametrize(
    "stage",
    [
        nn.Linear(4, 5),
        nn.Linear(4, 5, bias=False),
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout()),
        reparametrised(),
        Masked(4, 4),
        Twice(),
    ],
    ids=["dense", "no bias", "dense and more", "reparametrised", "masked", "twice"],
)
def test_the_norm_of_the_parameter_jacobian(stage):
    stage, x = seeded(stage).double().eval(), normal(3, 4).double()
    expected = [naive.singular_values(naive.parameter_jacobian(stage, h))[0] for h in x]
    np.testing.assert_allclose(parameter_jacobian_norm(stage, x), expected, rtol=1e-10)


def test_the_norm_of_the_parameter_jacobian_of_a_dense_layer_on_every_pixel():
    stage, x = nn.Linear(3, 2).double(), normal(2, 4, 3).double()
    expected = [naive.singular_values(naive.parameter_jacobian(stage, h))[0] for h in x]
    np.testing.assert_allclose(parameter_jacobian_norm(stage, x), expected, rtol=1e-10)


def test_the_norm_of_the_parameter_jacobian_on_a_whole_batch():
    linear, x = nn.Linear(3, 2).double(), normal(1, 4, 3).double()
    stage = OnBatch(linear)
    expected = naive.singular_values(naive.parameter_jacobian(stage, x[0]))[0]
    np.testing.assert_allclose(parameter_jacobian_norm(stage, x), [expected], rtol=1e-10)


def test_the_norm_of_the_parameter_jacobian_of_an_orthogonal_layer():
    """√(‖h‖² + 1), and ‖h‖ without a bias."""
    Q, x = torch.linalg.qr(normal(4, 4).double()).Q, normal(3, 4).double()
    square = x.square().sum(1)
    torch.testing.assert_close(parameter_jacobian_norm(matrix_stage(Q, bias=True), x), (square + 1).sqrt())
    torch.testing.assert_close(parameter_jacobian_norm(matrix_stage(Q), x), square.sqrt())


def test_small_chunks_change_nothing(monkeypatch):
    stage, inputs = links(small("conv"), normal(3, 1, 4, 4))[0]
    J, P = layer_jacobian(stage, inputs), parameter_jacobian_norm(stage, inputs)
    monkeypatch.setattr(materialised, "CHUNK_BYTES", 1)
    torch.testing.assert_close(layer_jacobian(stage, inputs), J)
    torch.testing.assert_close(parameter_jacobian_norm(stage, inputs), P)


def test_relu_passes_its_active_units():
    x = normal(3, 8).double()
    for J, h in zip(layer_jacobian(nn.ReLU(), x), x, strict=True):
        assert naive.rank(J.numpy()) == int((h > 0).sum())


def test_tanh_has_the_slope_of_sech_squared():
    x = normal(2, 5).double()
    slopes = [[1 / math.cosh(z) ** 2 for z in h] for h in x.tolist()]
    np.testing.assert_allclose(layer_jacobian(nn.Tanh(), x).diagonal(dim1=1, dim2=2), slopes)
