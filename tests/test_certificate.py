"""The certificate against plain autograd and NumPy, in closed form, and what it refuses."""

import copy
import functools
import io
import math
import re
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from src import cost
from src.certificate import certify
from src.errors import UserError
from src.models import Residual, calibrate
from tests.jacobian import naive
from tests.jacobian.networks import FAMILIES, SMALL, dense, diagonal, family, images, matrix_stage, normal, seeded, small

few = settings(max_examples=10, deadline=None)
LAYERS = [
    *("sample", "stage", "index"),
    *(f"{quantity}{side}" for quantity in ("norm", "sigma_min", "rank", "cond") for side in ("", "_lo", "_hi", "_known")),
    *("cond_active", "tau", "stable_rank", "rank_structural", "rank_full", "rank_backprop", "backprop_error", "method"),
    *("error_norm", "grad_norm", "saturation"),
]
LABELS = torch.tensor([0, 1, 2])


def refusal(message):
    return pytest.raises(UserError, match=f"^{re.escape(message)}$")


def orthogonal(width, seed=0):
    return torch.linalg.qr(normal(width, width, seed=seed).double()).Q


def assert_agrees_with_naive(cert, model, x, y, loss=functional.cross_entropy):
    expected = naive.layers(model, x, y, loss)
    for column in expected:
        found, wanted = cert.layers[column].to_numpy(), expected[column].to_numpy()
        tolerance = {"rtol": 1e-5} if column == "cond" else {"rtol": 1e-9, "atol": 1e-13}
        np.testing.assert_allclose(found, wanted, err_msg=column, **tolerance)
    norms = expected.pivot(index="sample", columns="index", values="norm")
    by_sample = expected.groupby("sample")
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(cert.log_attenuation, np.log(norms.to_numpy()).sum(1), rtol=1e-9, atol=1e-12)
    assert cert.rank.tolist() == by_sample["rank"].min().tolist()
    np.testing.assert_allclose(cert.conditioning, by_sample["cond"].max(), rtol=1e-5)
    np.testing.assert_allclose(cert.first_parameter_norm, naive.first_parameter_norms(model, x), rtol=1e-9)
    assert len(cert.singular_values) == norms.shape[1]
    assert_bound_is_the_plain_one(cert, expected)


def assert_bound_is_the_plain_one(cert, expected):
    bound = cert.bound()
    for sample, rows in expected.groupby("sample"):
        norm, signal = rows["norm"].to_numpy(), rows["error_norm"].to_numpy()[-1]
        found = bound.loc[sample]
        assert found["sample"] == sample
        assert math.exp(found["lhs"]) == pytest.approx(rows["grad_norm"].to_numpy()[0])
        assert math.exp(found["rhs_as_stated"]) == pytest.approx(norm[:-1].prod() * signal)
        assert math.exp(found["rhs"]) == pytest.approx(float(cert.first_parameter_norm[sample]) * norm[1:].prod() * signal)
        assert found["holds"]


@pytest.mark.parametrize("name", SMALL)
def test_the_certificate_is_the_naive_one(name):
    model, x = small(name), normal(3, 1, 4, 4)
    assert_agrees_with_naive(certify(model, x, LABELS), model, x, LABELS)


@pytest.mark.parametrize(("name", "norm", "skip"), FAMILIES)
def test_the_certificate_of_every_family_is_the_naive_one(name, norm, skip):
    model, x, y = family(name, norm=norm, skip=skip), normal(2, 1, 8, 8), LABELS[:2]
    assert_agrees_with_naive(certify(model, x, y), model, x, y)


def test_another_network_other_inputs_or_single_precision_fail_the_comparison():
    model, x = small("dense"), normal(3, 1, 4, 4)
    single, double = torch.float32, torch.float64
    others = [(seeded(small("dense"), seed=1), x, double), (model, normal(3, 1, 4, 4, seed=1), double), (model, x, single)]
    for other, inputs, dtype in others:
        cert = certify(other, inputs, LABELS, dtype=dtype)
        with pytest.raises(AssertionError):
            assert_agrees_with_naive(cert, model, x, LABELS)


@pytest.mark.parametrize("name", SMALL)
def test_severity_is_that_of_the_plain_matrices(name):
    model, x, y = small(name), normal(12, 1, 4, 4), torch.arange(12) % 3
    cert = certify(model, x, y)
    assert cert.severity["stage"].tolist() == [name for name, _ in model.named_children()]
    for row in cert.severity.itertuples():
        G = naive.error_matrix(model, x, y, functional.cross_entropy, row.index)
        s, r = naive.singular_values(G), naive.rank(G)
        found = cert.severity.loc[row.Index, ["lambda", "lambda_nonzero", "rank", "stable_rank"]].tolist()
        assert found == pytest.approx([1 - s[-1] / s[0], 1 - s[r - 1] / s[0], r, (s**2).sum() / s[0] ** 2], rel=1e-7)
        gradients = naive.gradient_matrix(model, x, y, functional.cross_entropy, row.index)
        ranks = (naive.rank(gradients), naive.rank(naive.free_matrix(model, x, row.index))) if gradients.size else (0, 0)
        assert (row.gradient_rank, row.free_rank, row.locked) == (*ranks, ranks[0] < ranks[1])


def test_the_interface():
    cert = certify(small("dense"), normal(3, 1, 4, 4), LABELS)
    assert cert.layers.columns.tolist()[: len(LAYERS)] == LAYERS
    assert {"stage", "lambda", "lambda_nonzero", "rank", "stable_rank", "locked", "free_rank"} <= set(cert.severity)
    assert cert.layers["sample"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert cert.layers["index"].tolist() == [1, 2, 3] * 3
    assert cert.layers["stage"].tolist() == ["0", "1", "2"] * 3
    assert set(cert.layers["method"]) == {"exact"}
    assert [value.shape for value in (cert.log_attenuation, cert.rank, cert.conditioning)] == [(3,)] * 3
    assert cert.log_attenuation.dtype == torch.float64
    assert type(cert.skip_depth) is type(cert.depth) is int
    assert set(cert.bound()) == {"sample", "lhs", "rhs_as_stated", "rhs", "slack_as_stated", "slack", "holds_as_stated", "holds"}


def test_what_is_shown():
    cert = certify(small("conv"), normal(3, 1, 4, 4), LABELS)
    entries = cert.to_dict()
    assert list(entries) == ["log_attenuation", "rank", "conditioning", "skip_depth", "depth", "tolerance"]
    assert entries["rank"] == cert.rank.tolist()
    frame = cert.to_frame()
    assert list(frame) == ["sample", *entries]
    assert frame["log_attenuation"].tolist() == entries["log_attenuation"]
    assert frame["skip_depth"].tolist() == [1] * 3
    printed = str(cert)
    for expected in ("K_back on 3 samples", "skip depth 1 of 1", f"max cond {float(cert.conditioning.max()):.3g}", "λ≠0", "locked"):
        assert expected in printed
    assert len(re.findall(r"^│ [012] ", printed, flags=re.MULTILINE)) == 3


@pytest.mark.parametrize("singular", [False, True])
def test_the_plot_has_a_line_a_sample(singular):
    model = nn.Sequential(diagonal(1.0, 0.0), diagonal(0.0, 1.0)) if singular else dense(4, 3, 3)
    cert = certify(model, normal(3, 2 if singular else 4), LABELS % 2)
    figure = cert.plot()
    figure.savefig(io.BytesIO(), format="png")
    assert [len(axis.lines) for axis in figure.axes] == [3] * 4
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), cert.layers.query("sample == 1")["norm"])


def test_depth_and_skip_depth():
    plain, skip = (family("residual_mlp", skip=skip) for skip in ("none", "original"))
    x, y = normal(2, 1, 8, 8), LABELS[:2]
    assert [(cert.skip_depth, cert.depth) for cert in (certify(plain, x, y), certify(skip, x, y))] == [(5, 5), (1, 5)]


# --- closed forms


def test_an_orthogonal_chain_attenuates_by_its_gain():
    model = nn.Sequential(*(matrix_stage(1.5 * orthogonal(5, seed)) for seed in range(4)))
    cert = certify(model, normal(3, 5), LABELS)
    np.testing.assert_allclose(cert.log_attenuation, 4 * math.log(1.5))
    np.testing.assert_allclose(cert.layers[["norm", "sigma_min"]], 1.5)
    np.testing.assert_allclose(cert.conditioning, 1)
    assert cert.rank.tolist() == [5] * 3


def test_diagonal_layers():
    cert = certify(nn.Sequential(diagonal(2.0, -3.0), diagonal(4.0, 0.5), nn.Identity()), normal(3, 2), LABELS % 2)
    np.testing.assert_allclose(cert.log_attenuation, math.log(12))
    np.testing.assert_allclose(cert.conditioning, 8)
    assert cert.layers["cond"].tolist()[:3] == pytest.approx([1.5, 8, 1])


def test_the_norm_of_batch_norm_in_eval_mode():
    norm = seeded(nn.BatchNorm1d(5))
    cert = certify(nn.Sequential(norm), normal(2, 5), LABELS[:2])
    slopes = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).abs()
    np.testing.assert_allclose(cert.layers["norm"], float(slopes.detach().max()))
    np.testing.assert_allclose(cert.layers["cond"], float((slopes.max() / slopes.min()).detach()))


def test_a_residual_of_minus_the_identity_kills_the_signal():
    def with_branch(scale):
        block = Residual(matrix_stage(scale * torch.eye(4).double()), nn.Identity(), nn.Identity())
        return certify(nn.Sequential(matrix_stage(torch.eye(4), bias=True), block, nn.Identity()), normal(3, 4), LABELS)

    dead, alive = with_branch(-1.0), with_branch(-0.9)
    assert dead.rank.tolist() == [0] * 3
    assert dead.log_attenuation.tolist() == [-math.inf] * 3
    assert dead.conditioning.tolist() == [math.inf] * 3
    assert dead.skip_depth == 0  # a path is there all the same
    bound = dead.bound()
    assert bound["lhs"].tolist() == bound["rhs"].tolist() == [-math.inf] * 3
    assert bound["holds"].all()
    assert bound["slack"].tolist() == [0] * 3
    assert alive.rank.tolist() == [4] * 3
    np.testing.assert_allclose(alive.log_attenuation, math.log(0.1))


def test_the_stated_bound_omits_the_parameter_jacobian():
    """An orthogonal linear net breaks it by exactly √(‖x‖² + 1) on real images; the precise bound is tight."""
    x, y, shape = images(6)
    model = family("mlp", shape, depth=5, width=16, activation="linear", init="orthogonal", weight_var=1.0)
    with torch.no_grad():  # drawn in float32
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            U, _, V = torch.linalg.svd(linear.weight.double(), full_matrices=False)
            linear.weight = nn.Parameter(U @ V)
    bound = certify(model, x, y % 4).bound()
    assert not bound["holds_as_stated"].any()
    omitted = (x.flatten(1).double().square().sum(1) + 1).sqrt()
    np.testing.assert_allclose(-bound["slack_as_stated"], omitted.log(), rtol=1e-9)
    np.testing.assert_allclose(bound["slack"], 0, atol=1e-9)
    assert bound["holds"].all()


def test_the_precise_bound_fails_with_a_smaller_parameter_jacobian():
    model = nn.Sequential(matrix_stage(orthogonal(4), bias=True), matrix_stage(orthogonal(4, 1)))
    cert = certify(model, normal(3, 4), LABELS)
    assert cert.bound()["holds"].all()
    smaller = replace(cert)
    smaller.__dict__["first_parameter_norm"] = 0.99 * cert.first_parameter_norm
    assert not smaller.bound()["holds"].any()


def test_the_product_of_small_norms_may_stay_at_one_half():
    """∏_{l=1}^{L} (1 − 1/(l+1)²) = (L+2)/(2(L+1)) → ½."""
    attenuation = {}
    for depth in (5, 30):
        stages = [matrix_stage((1 - 1 / (index + 1) ** 2) * orthogonal(3, index)) for index in range(1, depth + 1)]
        cert = certify(nn.Sequential(*stages), normal(2, 3), LABELS[:2])
        assert (cert.layers["norm"] < 1).all()
        attenuation[depth] = cert.log_attenuation.exp()
        np.testing.assert_allclose(attenuation[depth], (depth + 2) / (2 * (depth + 1)))
    assert float(attenuation[30].min()) > 0.5


def test_a_thousand_layers_stay_finite_in_logs():
    """A rate of .05 a layer leaves the range of floats after 250."""
    depth, last_of_25 = 1000, [str(index) for index in range(24, 1000, 25)]
    model = nn.Sequential(*(matrix_stage(0.05 * orthogonal(2, index % 7)) for index in range(depth)))
    cert = certify(model, normal(1, 2), LABELS[:1], stages=last_of_25)
    assert float(cert.log_attenuation[0]) == pytest.approx(depth * math.log(0.05))
    first, last = cert.layers.iloc[0], cert.layers.iloc[-1]
    assert first["error_norm"] == 0  # underflows
    assert first["log_error_norm"] - last["log_error_norm"] == pytest.approx((depth - 25) * math.log(0.05))
    assert cert.depth == depth - 25
    bound = cert.bound().iloc[0]
    assert np.isfinite(bound[["lhs", "rhs", "rhs_as_stated"]].to_numpy(float)).all()
    assert bound["slack"] >= 0


def test_no_gradient_fulfils_the_bound():
    cert = certify(dense(4, 3, 3), normal(3, 4), torch.zeros(3), loss=lambda outputs, targets: 0 * outputs.sum())
    bound = cert.bound()
    assert (cert.layers[["error_norm", "grad_norm"]] == 0).all(axis=None)
    assert bound["lhs"].tolist() == bound["rhs"].tolist() == [-math.inf] * 3
    assert bound["holds"].all()
    assert bound["holds_as_stated"].all()
    assert cert.severity["lambda"].isna().all()
    assert cert.severity["locked"].all()


def test_a_bottleneck_of_rank_four():
    low_rank = matrix_stage(normal(16, 4).double() @ normal(4, 16, seed=1).double())
    stages = [seeded(nn.Linear(16, 16), seed) for seed in range(4)]
    x, y = normal(3, 16), LABELS
    bottleneck, free = certify(nn.Sequential(*stages[:2], low_rank, *stages[2:]), x, y), certify(nn.Sequential(*stages), x, y)
    assert bottleneck.rank.tolist() == [4] * 3
    assert bottleneck.conditioning.tolist() == [math.inf] * 3
    assert bottleneck.layers.query("index == 3")[["rank_lo", "rank"]].to_numpy().tolist() == [[4, 4]] * 3
    assert free.rank.tolist() == [16] * 3
    assert free.conditioning.isfinite().all()


def test_saturation_of_relu_is_the_share_of_inactive_units():
    model, x = family("mlp"), normal(5, 1, 8, 8)
    cert = certify(model, x, torch.arange(5) % 4)
    hidden = naive.states(list(naive.as_measured(model)), x.double())[1:]
    table = cert.layers.pivot(index="sample", columns="index", values="saturation")
    for index in (1, 2):
        np.testing.assert_allclose(table[index], (hidden[index - 1] == 0).double().mean(1))
    assert 0 < table[1].mean() < 1
    assert table[3].isna().all()


def tanh_chain(weight_var, seed):
    """Identity, then 20 layers tanh(Wh + b) of width 128 with σb² = .05; g_1 is the gradient before the first of them."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Identity(), *(nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(20)))
    with torch.no_grad():
        for stage in model[1:]:
            stage[0].weight.normal_(0, math.sqrt(weight_var / 128), generator=generator)
            stage[0].bias.normal_(0, math.sqrt(0.05), generator=generator)
    return model


def norms_and_gradients(weight_var):
    """Mean ‖J_l‖, and the geometric means of ∏‖J_l‖ and of ‖g_0‖/‖g_L‖, over 3 seeds and 2 samples."""
    certificates = [certify(tanh_chain(weight_var, seed), normal(2, 128, seed=100 + seed), LABELS[:2]) for seed in range(3)]
    layers = pd.concat(cert.layers for cert in certificates)
    of = layers.groupby("index")["log_error_norm"].mean()
    attenuation = torch.cat([cert.log_attenuation for cert in certificates]).mean()
    return layers.query("index > 1")["norm"].mean(), float(attenuation.exp()), math.exp(of[1] - of[21])


def test_norms_above_one_do_not_prevent_vanishing():
    """tanh, σw² = 1.3, L = 20: mean ‖J‖ ≈ 1.9, a bound of ≈ 5e5 ‖g_L‖, a true ratio ≈ .15; at σw² = 2.5 the gradient explodes."""
    norm, bound, ratio = norms_and_gradients(1.3)
    assert norm == pytest.approx(1.9, abs=0.1)
    assert math.log(bound) == pytest.approx(math.log(5e5), abs=math.log(2))
    assert math.log(ratio) == pytest.approx(math.log(0.15), abs=math.log(1.5))
    assert norms_and_gradients(2.5)[2] > 1


# --- properties


@st.composite
def chains(draw):
    depth, activation = draw(st.integers(1, 4)), draw(st.sampled_from([nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Identity, nn.GELU]))
    widths = draw(st.lists(st.integers(1, 6), min_size=depth + 1, max_size=depth + 1))
    return dense(*widths, activation=activation, bias=draw(st.booleans()), seed=draw(st.integers(0, 1000))), widths


@few
@given(chains(), st.integers(0, 1000))
def test_the_precise_bound_holds_in_every_chain(chain, seed):
    model, widths = chain
    x, y = 3 * normal(2, widths[0], seed=seed), normal(2, widths[-1], seed=seed + 1).double()
    cert = certify(model, x, y, loss=functional.mse_loss)
    assert cert.bound()["holds"].all()
    assert (cert.bound()["slack"] >= -1e-9).all()
    layers = cert.layers
    assert (layers["rank_lo"] <= layers["rank"]).all()
    assert (layers["rank"] <= layers["rank_hi"]).all()
    assert (layers["norm_lo"] <= layers["norm"]).all()
    assert (layers["norm"] <= layers["norm_hi"]).all()
    assert (layers["sigma_min"] <= layers["norm"]).all()
    assert (layers["norm_lo"] >= 0).all()


@few
@given(chains(), st.integers(0, 1000))
def test_the_product_of_the_layers_is_the_network(chain, seed):
    """rank ∂H_L/∂H_0 ≤ min rank J_l and ln ‖∂H_L/∂H_0‖ ≤ Σ ln ‖J_l‖, a sample."""
    model, widths = chain
    x = normal(2, widths[0], seed=seed)
    cert = certify(model, x, normal(2, widths[-1]).double(), loss=functional.mse_loss)
    whole = naive.as_measured(model)
    for n in range(2):
        J = naive.layer_jacobian(whole, x[n].double())
        assert naive.rank(J) <= int(cert.rank[n])
        norm = naive.singular_values(J)[0]
        assert norm == 0 or math.log(norm) <= float(cert.log_attenuation[n]) + 1e-9


# --- what may not matter


def test_stages_certify_the_merged_chain():
    layers = [seeded(layer) for layer in (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))]
    names = ["a", "b", "c", "d", "e"]
    model, x = nn.Sequential(OrderedDict(zip(names, layers, strict=True))), normal(3, 4)
    merged = nn.Sequential(OrderedDict(b=nn.Sequential(*layers[:2]), d=nn.Sequential(*layers[2:4]), e=layers[4]))
    grouped, expected = certify(model, x, LABELS, stages=["b", "d"]), certify(merged, x, LABELS)
    pd.testing.assert_frame_equal(grouped.layers, expected.layers)
    pd.testing.assert_frame_equal(grouped.severity, expected.severity)
    assert grouped.to_dict() == expected.to_dict()
    assert len(certify(model, x, LABELS).layers) > len(grouped.layers)


def test_a_module_that_stands_twice_counts_twice():
    twice, between = seeded(nn.Linear(3, 3)), nn.Tanh()
    shared, unshared = nn.Sequential(twice, between, twice), nn.Sequential(twice, between, copy.deepcopy(twice))
    found, expected = (certify(model, normal(3, 3), LABELS) for model in (shared, unshared))
    pd.testing.assert_frame_equal(found.layers, expected.layers)
    assert found.depth == expected.depth == 1
    assert len(found.layers) == 9


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_reduction_of_the_loss_does_not_matter(reduction):
    model, x = small("dense"), normal(3, 1, 4, 4)
    found = certify(model, x, LABELS, loss=functools.partial(functional.cross_entropy, reduction=reduction))
    pd.testing.assert_frame_equal(found.layers, certify(model, x, LABELS).layers)
    doubled = certify(model, x, LABELS, loss=lambda outputs, targets: 2 * functional.cross_entropy(outputs, targets))
    np.testing.assert_allclose(doubled.layers["error_norm"], 2 * found.layers["error_norm"])


class Overwriting(nn.Module):
    def forward(self, h):
        return functional.relu(h, inplace=True)


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), Overwriting()], ids=["module", "function"])
@pytest.mark.parametrize("position", [0, 1])
def test_in_place_stages_certify_as_their_plain_kind(relu, position):
    x = normal(3, 4).double()
    before = x.clone()

    def of(activation):
        stages = [seeded(nn.Linear(4, 4)), seeded(nn.Linear(4, 3), 1)]
        return certify(nn.Sequential(*stages[:position], activation, *stages[position:]), x, LABELS)

    found, expected = of(relu), of(nn.ReLU())
    assert torch.equal(x, before)
    columns = [column for column in LAYERS if column != "saturation"]
    pd.testing.assert_frame_equal(found.layers[columns], expected.layers[columns])


def test_the_method_and_the_mode_of_the_model_do_not_matter():
    model, x = nn.Sequential(small("batch norm"), nn.Dropout(0.5)), normal(3, 1, 4, 4)
    expected = certify(model.eval(), x, LABELS, method="exact")
    pd.testing.assert_frame_equal(certify(model.train(), x, LABELS).layers, expected.layers)


def test_inputs_may_carry_a_graph_and_outputs_may_be_numbers():
    model = nn.Sequential(seeded(nn.Linear(4, 1)), nn.Flatten(0))
    x, y = normal(3, 4), normal(3, seed=1)
    cert = certify(model, x.requires_grad_(), y, loss=functional.mse_loss)
    W, b = (parameter.detach().double() for parameter in model[0].parameters())
    residual = (x.detach().double() @ W.T + b).squeeze(1) - y.double()
    table = cert.layers.pivot(index="sample", columns="index")
    np.testing.assert_allclose(table["error_norm"][2], 2 * residual.abs())
    np.testing.assert_allclose(table["grad_norm"][1], 2 * residual.abs() * (x.detach().double().square().sum(1) + 1).sqrt())


def test_single_precision_is_measured_in_single_precision():
    cert = certify(small("dense"), normal(3, 1, 4, 4), LABELS, dtype=torch.float32)
    assert cert.layers["norm"].dtype == np.float32
    double = certify(small("dense"), normal(3, 1, 4, 4), LABELS)
    assert cert.tolerance / double.tolerance == pytest.approx(2**29, rel=1e-3)


# --- batch statistics


def test_batch_statistics_make_one_operator_of_the_batch():
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()), nn.Linear(3, 3)))
    x, y = normal(5, 4), torch.arange(5) % 3
    cert = certify(model, x, y, batch_norm="train")
    batch = copy.deepcopy(model).double().train()
    states = [x.double().requires_grad_()]
    for stage in batch:
        states.append(stage(states[-1]))
    loss = functional.cross_entropy(states[-1], y)
    signals = torch.autograd.grad(loss, states, retain_graph=True)
    assert len(cert.log_attenuation) == 1
    for row in cert.layers.itertuples():
        J = torch.autograd.functional.jacobian(batch[row.index - 1], states[row.index - 1].detach())
        s = naive.singular_values(J.reshape(J.shape[:2].numel(), -1).numpy())
        assert (row.norm, row.sigma_min) == (pytest.approx(s[0]), pytest.approx(s[-1], abs=1e-12))
        assert row.error_norm == pytest.approx(float(signals[row.index].norm()))
        gradients = torch.autograd.grad(loss, list(batch[row.index - 1].parameters()), retain_graph=True)
        assert row.grad_norm == pytest.approx(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
    assert cert.bound()["holds"].all()
    P = torch.autograd.functional.jacobian(lambda W, b: functional.linear(x.double(), W, b), tuple(batch[0].parameters()))
    norm = naive.singular_values(torch.cat([part.reshape(15, -1) for part in P], 1).numpy())[0]
    np.testing.assert_allclose(cert.first_parameter_norm, [norm])
    calibrate(model, x)
    frozen = certify(model, x, y).layers.query("index == 2")["norm"].max()
    assert frozen != pytest.approx(cert.layers["norm"][1], rel=1e-2)


# --- the model comes back untouched


def snapshot(model):
    modules = list(model.modules())
    return {
        "state": copy.deepcopy(model.state_dict()),
        "dtype": [value.dtype for value in model.state_dict().values()],
        "identity": [id(value) for value in [*model.parameters(), *model.buffers()]],
        "grad": [None if parameter.grad is None else (id(parameter.grad), parameter.grad.clone()) for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in modules],
        "hooks": [(dict(module._forward_hooks), dict(module._forward_pre_hooks), dict(module._backward_hooks)) for module in modules],
        "inplace": [getattr(module, "inplace", None) for module in modules],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def worked_on():
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 3)))
    functional.cross_entropy(model(normal(6, 4)), torch.arange(6) % 3).backward()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model[4].bias.grad = None
    model[0].register_forward_hook(lambda module, arguments, output: None)
    model[4].register_forward_pre_hook(lambda module, arguments: None)
    return model


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_the_model_the_inputs_and_the_random_state_come_back_untouched(batch_norm):
    model, x, y = worked_on(), normal(3, 4).double(), LABELS.clone()
    before, x_before = snapshot(model), x.clone()
    certify(model, x, y, batch_norm=batch_norm)
    assert_same(snapshot(model), before)
    assert torch.equal(x, x_before)
    assert torch.equal(y, LABELS)


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for part, its_like in zip(one, other, strict=True):
            assert_same(part, its_like)
    else:
        assert one == other


TOUCHES = {
    "a weight": lambda model: model[0].weight.data.add_(1e-6),
    "a statistic": lambda model: model[1].running_mean.add_(1e-6),
    "a mode": lambda model: model.eval(),
    "a dtype": lambda model: model.double(),
    "a gradient": lambda model: model.zero_grad(),
    "a hook": lambda model: model[2].register_forward_hook(print),
    "a frozen weight": lambda model: model.requires_grad_(True),
    "in place": lambda model: setattr(model[2], "inplace", False),
    "a random number": lambda model: torch.rand(1),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_touch_is_noticed(touch):
    model = worked_on()
    before = snapshot(model)
    TOUCHES[touch](model)
    with pytest.raises(AssertionError):
        assert_same(snapshot(model), before)


def test_measuring_twice_gives_the_same():
    model, x = worked_on(), normal(3, 4)
    first, second = certify(model, x, LABELS), certify(model, x, LABELS)
    pd.testing.assert_frame_equal(first.layers, second.layers)
    pd.testing.assert_frame_equal(first.severity, second.severity)


# --- refusals


def test_what_is_refused():
    x, y = normal(3, 4), LABELS
    model = dense(4, 3, 3)
    with refusal("Sequential: nothing to certify, it has no stages"):
        certify(nn.Sequential(), x, y)
    with refusal("no stage named 'fc'; there are 0, 1"):
        certify(model, x, y, stages=["fc"])
    with refusal("certificate: 0 inputs and 0 targets; give as many of each, at least one"):
        certify(model, x[:0], y[:0])
    with refusal("certificate: 3 inputs and 2 targets; give as many of each, at least one"):
        certify(model, x, y[:2])
    with refusal("1: BatchNorm without running statistics couples the samples; certify with batch_norm='train'"):
        certify(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), x, y)


def not_finite(where, sample):
    return refusal(f"certificate: {where} is not finite at sample {sample}; look at its weights and inputs there")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(value):
    x, y = normal(3, 4), LABELS
    x[1, 2] = value
    with not_finite("the input", 1):
        certify(dense(4, 3, 3), x, y)
    x[1, 2] = 0
    model = dense(4, 3, 3, 3)
    model[1][0].weight.data[0, 0] = value
    with not_finite("stage '1'", 0) if math.isnan(value) else refusal_at_stage("1"):
        certify(model, x, y)
    with torch.no_grad():
        model[1][0].weight.nan_to_num_(0, 0, 0)
    certify(model, x, y)


def refusal_at_stage(name):
    return pytest.raises(UserError, match=rf"^certificate: (stage|the error signal before stage) '{name}' is not finite at sample 0")


def test_a_jacobian_too_large_to_write_out_is_refused_where_it_is_asked_for(monkeypatch):
    model, x = dense(4, 3, 3), normal(3, 4)
    monkeypatch.setattr(cost, "MEMORY_BYTES", 3 * 3 * 4 * 8)
    certify(model, x, LABELS, method="exact")
    monkeypatch.setattr(cost, "MEMORY_BYTES", 3 * 3 * 4 * 8 - 1)
    with refusal("certificate: stage '0' has 3 Jacobians of 3×4, 0.0 GiB; give fewer samples or smaller inputs, or method='auto'"):
        certify(model, x, LABELS, method="exact")
    monkeypatch.setattr(cost, "WRITTEN_BYTES", 3 * 3 * 4 * 8 - 1)
    methods = certify(model, x, LABELS).layers.groupby("stage")["method"].unique()
    assert (methods["0"].tolist(), methods["1"].tolist()) == (["matrix_free"], ["exact"])


def test_a_decomposition_that_takes_long_is_left_to_products_with_vectors(monkeypatch):
    model, x = dense(4, 3, 3), normal(3, 4)
    monkeypatch.setattr(cost, "BUDGET", 2 * cost.SVD * 3 * 3 * 4 * 3)
    assert set(certify(model, x, LABELS).layers["method"]) == {"exact"}
    monkeypatch.setattr(cost, "BUDGET", 2 * cost.SVD * 3 * 3 * 4 * 3 - 1)
    assert set(certify(model, x, LABELS).layers.query("stage == '0'")["method"]) == {"matrix_free"}


@pytest.mark.parametrize("name", SMALL)
def test_without_writing_out_the_norms_are_the_same_and_the_rest_is_enclosed(name):
    model, x, y = small(name), normal(3, 1, 4, 4), LABELS
    exact, free = certify(model, x, y, method="exact"), certify(model, x, y, method="matrix_free")
    pd.testing.assert_series_equal(free.layers["norm"], exact.layers["norm"], rtol=1e-6)
    assert (free.layers["norm_hi"] >= exact.layers["norm"] * (1 - 1e-12)).all()
    assert (free.layers["rank_lo"] <= exact.layers["rank"]).all()
    assert (free.layers["rank_hi"] >= exact.layers["rank"]).all()
    known = free.layers["cond"].notna()
    assert (exact.layers["cond"][known] == math.inf).all()
    assert (exact.layers["sigma_min"][known] < 1e-12).all()
    for column in ("error_norm", "grad_norm", "saturation"):
        pd.testing.assert_series_equal(free.layers[column], exact.layers[column])
    torch.testing.assert_close(free.log_attenuation, exact.log_attenuation, rtol=0, atol=1e-6)
    assert (free.rank >= exact.rank).all()
    assert math.isnan(free.tolerance)
    assert "K_back on 3 samples" in str(free)


def test_a_condition_number_that_is_not_known_leaves_the_largest_unknown_unless_one_is_infinite():
    x, y = normal(3, 1, 4, 4), LABELS
    assert certify(small("dense"), x, y, method="matrix_free").conditioning.isnan().all()
    dead = seeded(nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), nn.Sequential(nn.Linear(5, 4), nn.ReLU()), nn.Linear(4, 3)))
    with torch.no_grad():
        dead[1][0].bias[0] = -100.0
    assert (certify(dead, x, y, method="matrix_free").conditioning == torch.inf).all()


@pytest.mark.parametrize("name", SMALL)
def test_the_product_end_to_end_is_that_of_the_whole_network(name):
    model, x = small(name), normal(3, 1, 4, 4)
    cert = certify(model, x, LABELS)
    found = cert.end_to_end()
    for n in range(3):
        s = naive.singular_values(naive.layer_jacobian(naive.as_measured(model), x[n].double()))
        assert found["log_norm"][n] == pytest.approx(math.log(s[0]), abs=1e-10)
        assert found["log_smallest"][n] == pytest.approx(math.log(s[-1]), abs=1e-6)
    np.testing.assert_allclose(found["log_bound"], cert.log_attenuation)
    assert (found["slack"] >= -1e-12).all()
    assert found["slack"].max() > 0.01


def test_the_product_of_a_dead_chain_is_nothing_and_that_of_many_outputs_is_not_followed():
    dead = nn.Sequential(seeded(nn.Linear(4, 4)), matrix_stage(torch.zeros(4, 4)), seeded(nn.Linear(4, 3)))
    found = certify(dead, normal(3, 4), LABELS).end_to_end()
    assert (found[["log_norm", "log_smallest", "log_bound"]] == -math.inf).all(axis=None)
    assert (found["slack"] == 0).all()
    wide = certify(seeded(nn.Sequential(nn.Linear(4, 129))), normal(3, 4), LABELS).end_to_end()
    assert wide[["log_norm", "log_smallest", "slack"]].isna().all(axis=None)


def test_a_large_dense_chain_is_certified_by_factorisation_as_by_decomposition(monkeypatch):
    """Same σ₁, σ_min, rank and condition; severity and lock condition do not depend on the method."""
    model, x = dense(20, 16, 16, 3, activation=nn.Sigmoid), normal(3, 20)
    exact = certify(model, x, LABELS, method="exact")
    monkeypatch.setattr(cost, "FACTORISED", 0)
    fast = certify(model, x, LABELS)
    assert set(fast.layers["method"]) == {"factorised"}
    for column in ("norm", "sigma_min", "cond", "mean_square", "grad_norm"):
        np.testing.assert_allclose(fast.layers[column], exact.layers[column], rtol=1e-7, err_msg=column)
    for column in ("rank", "rank_lo", "rank_hi"):
        assert fast.layers[column].tolist() == exact.layers[column].tolist()
    assert (fast.layers["norm_lo"] <= exact.layers["norm_hi"]).all()
    assert (exact.layers["norm_lo"] <= fast.layers["norm_hi"]).all()
    pd.testing.assert_frame_equal(fast.severity, exact.severity)


@pytest.mark.parametrize("method", ["exact", "auto", "matrix_free"])
def test_every_number_lies_in_its_interval_and_says_how_it_is_known(method, monkeypatch):
    monkeypatch.setattr(cost, "FACTORISED", 0)
    model, x = dense(20, 16, 16, 3, activation=nn.ReLU), normal(3, 20)
    truth = certify(model, x, LABELS, method="exact").layers
    cert = certify(model, x, LABELS, method=method)
    for column in ("norm", "sigma_min", "rank", "cond"):
        assert (cert.layers[f"{column}_lo"] <= truth[column] * (1 + 1e-12)).all()
        assert (cert.layers[f"{column}_hi"] >= truth[column] * (1 - 1e-12)).all()
    known = cert.known().set_index(["entry", "sample"])
    for entry in ("log_attenuation", "rank", "conditioning"):
        value = getattr(cert, entry).numpy()
        np.testing.assert_array_equal(known.loc[entry, "value"], value)
        assert ((known.loc[entry, "lo"] <= value) | np.isnan(value)).all()
        assert ((known.loc[entry, "hi"] >= value) | np.isnan(value)).all()
    expected = {"exact": {"exact"}, "auto": {"estimated", "enclosed"}, "matrix_free": {"enclosed", "estimated"}}
    assert set(known["known"]) == expected[method]


def test_the_condition_on_the_active_subspace_and_the_stable_rank(monkeypatch):
    """A ReLU layer is never of full rank: on the rows that are active it may be well conditioned all the same."""
    model, x = dense(30, 20, 3, activation=nn.ReLU), normal(3, 30)
    for factorised in (1e8, 0):
        monkeypatch.setattr(cost, "FACTORISED", factorised)
        first = certify(model, x, LABELS).layers.query("index == 1")
        for row, sample in zip(first.itertuples(), x, strict=True):
            W = model[0][0].weight.detach().double()
            z = model[0].double()(sample.double()[None])[0]
            model.float()
            s = np.linalg.svd(W[z > 0].numpy(), compute_uv=False)
            assert row.cond == math.inf
            assert row.cond_active == pytest.approx(s[0] / s[-1], rel=1e-4)
            assert row.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-6)
            assert row.rank == row.rank_structural == (z > 0).sum()
