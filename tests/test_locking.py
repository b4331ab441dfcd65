import functools
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from src.chain import cut
from src.errors import UserError
from src.jacobian.materialised import parameter_gradients
from src.locking import (
    ErrorSignal,
    error_signals,
    gradient_profile,
    growth,
    lock_condition,
    log_rms,
    loss_signal,
    severities,
    severity,
    walk_back,
)
from tests.jacobian import naive
from tests.jacobian.networks import SMALL, dense, matrix_stage, normal, seeded, small

few = settings(max_examples=15, deadline=None)
LABELS = torch.tensor([0, 1, 2, 1])


def chain_of(model):
    return cut(model, None, torch.float64, "eval")


def walk(model, x, y, loss=functional.cross_entropy):
    """The links, first stage first."""
    return list(walk_back(chain_of(model), x.double(), y, loss))[::-1]


def vectors(signal):
    """g_n as rows."""
    return (signal.direction.flatten(1) * signal.log_norm.exp().unsqueeze(1)).numpy()


@pytest.mark.parametrize("name", SMALL)
def test_error_signals_are_autograd_of_each_samples_own_loss(name):
    model, x = small(name), normal(4, 1, 4, 4)
    for index, link in enumerate(walk(model, x, LABELS), start=1):
        assert (link.index, link.name) == (index, str(index - 1))
        before = naive.error_matrix(model, x, LABELS, functional.cross_entropy, index)
        np.testing.assert_allclose(vectors(link.signal_before), before, rtol=1e-10, atol=1e-14)
        assert not np.allclose(vectors(link.signal_before), 4 * before)
        np.testing.assert_allclose(link.signal.direction.flatten(1).norm(dim=1), 1)


LOSSES = {
    "cross entropy": (functional.cross_entropy, LABELS),
    "soft labels": (functional.cross_entropy, normal(4, 3, seed=5).softmax(1).double()),
    "squared error": (functional.mse_loss, normal(4, 3, seed=5).double()),
    "squared error, single precision": (functional.mse_loss, normal(4, 3, seed=5)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_sample_is_its_own(name):
    loss, targets = LOSSES[name]
    outputs = normal(4, 3).double()
    signal = loss_signal(loss, outputs, targets)
    for n in range(4):
        own = outputs[n : n + 1].clone().requires_grad_()
        loss(own, targets[n : n + 1].to(own.dtype) if targets.is_floating_point() else targets[n : n + 1]).backward()
        np.testing.assert_allclose(vectors(signal)[n], own.grad[0], rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reduction_of_the_loss_does_not_matter(reduction):
    reduced = loss_signal(functools.partial(functional.cross_entropy, reduction=reduction), normal(4, 3).double(), LABELS)
    plain = loss_signal(functional.cross_entropy, normal(4, 3).double(), LABELS)
    torch.testing.assert_close(reduced.log_norm, plain.log_norm)
    torch.testing.assert_close(reduced.direction, plain.direction)


@few
@given(st.integers(1, 4), st.integers(1, 5), st.integers(-400, 400), st.integers(0, 1000))
def test_a_signal_is_its_direction_and_its_length_in_logs(n, d, exponent, seed):
    g = normal(n, d, seed=seed).double()
    signal = ErrorSignal.of(g, torch.full((n,), float(exponent)).double())
    torch.testing.assert_close(signal.direction * (signal.log_norm - exponent).exp().unsqueeze(1), g)
    assert signal.log_rms() == pytest.approx(0.5 * math.log(float(g.square().sum(1).mean())) + exponent)
    torch.testing.assert_close(signal.relative(), g / g.norm(dim=1).max())


def test_signals_beyond_the_range_of_floats_keep_their_ratio():
    signal = ErrorSignal.of(torch.eye(2).double(), torch.tensor([-2000.0, -2001.0]).double())
    torch.testing.assert_close(signal.relative(), torch.tensor([[1.0, 0], [0, math.exp(-1)]]).double())
    assert signal.log_rms() == pytest.approx(-2000 + 0.5 * math.log((1 + math.exp(-2)) / 2))
    assert not math.exp(signal.log_rms())


def test_a_zero_signal_has_no_length_and_no_direction():
    signal = ErrorSignal.of(torch.zeros(2, 3).double(), torch.zeros(2).double())
    assert signal.log_norm.tolist() == [-math.inf] * 2
    assert not signal.direction.any()
    assert not signal.relative().any()
    assert signal.log_rms() == -math.inf
    after = ErrorSignal.of(torch.tensor([[0.0, 0], [3, 4]]).double(), torch.zeros(2).double())
    assert after.relative().tolist() == [[0, 0], [0.6, 0.8]]


def test_the_root_mean_square_in_logs():
    x = torch.tensor([-1.0, 2.0, 0.5]).double()
    assert log_rms(x) == pytest.approx(0.5 * math.log(np.mean(np.exp(2 * x.numpy()))))
    assert log_rms(x) != pytest.approx(float(x.mean()))


@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_profile(name):
    model, x = small(name), normal(4, 1, 4, 4)
    profile = gradient_profile(chain_of(model), x.double(), LABELS, functional.cross_entropy)
    assert list(profile.columns) == ["index", "stage", "log_error_norm", "log_weight_grad_norm"]
    stages = list(naive.as_measured(model))
    of_samples = [naive.gradients(stages, h.double(), y, functional.cross_entropy) for h, y in zip(x, LABELS, strict=True)]
    for row in profile.itertuples():
        error = np.mean([(signals[row.index] ** 2).sum() for signals, _ in of_samples])
        assert row.log_error_norm == pytest.approx(0.5 * math.log(error))
        sizes = [(parameter.numel(), parameter.ndim > 1) for parameter in stages[row.index - 1].parameters()]
        is_weight = np.concatenate([[], *(np.full(*size) for size in sizes)])
        weight = np.mean([(gradients[row.index - 1][is_weight == 1] ** 2).sum() for _, gradients in of_samples])
        assert row.log_weight_grad_norm == (pytest.approx(0.5 * math.log(weight)) if weight else -math.inf)


def test_inputs_and_targets_are_counted():
    message = "certificate: {} inputs and {} targets; give as many of each, at least one"
    for n, targets in ((0, 0), (4, 3), (3, 4)):
        with pytest.raises(UserError, match=f"^{re.escape(message.format(n, targets))}$"):
            walk(dense(3, 2), torch.zeros(n, 3), torch.zeros(targets, dtype=torch.long))


def test_a_signal_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(3, 3), Root(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[0].bias.zero_()
    x = torch.ones(4, 3)
    x[1, 2] = 0  # a square root's slope there is infinite
    message = "certificate: the error signal before stage '1' is not finite at sample 1; look at its weights and inputs there"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        walk(model, x, torch.tensor([0, 1, 0, 1]))
    walk(model, torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))


def _on_values(output, target):
    found = torch.nn.functional.cross_entropy(output, target)
    return found if found > 1 else 2 * found


@pytest.mark.parametrize(
    ("loss", "targets", "reason"),
    [
        (torch.nn.functional.cross_entropy, torch.tensor([0, 1, 7]), "targets 3 of torch.int64 .RuntimeError: index 7 is out of bounds"),
        (torch.nn.functional.cross_entropy, torch.rand(3), "the loss fails on outputs 3×3 and targets 3 of torch.float32"),
        (_on_values, torch.tensor([0, 1, 2]), "may not branch on values"),
    ],
)
def test_a_loss_that_fails_is_one_line(loss, targets, reason):
    with pytest.raises(UserError, match=reason) as caught:
        loss_signal(loss, normal(3, 3), targets)
    assert "\n" not in str(caught.value)


def test_a_loss_whose_gradient_is_not_finite_is_named():
    message = "certificate: the gradient of the loss is not finite at sample 2; look at its weights and inputs there"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        walk(nn.Sequential(nn.Identity()), torch.tensor([[1.0], [1.0], [0.0], [1.0]]), LABELS, lambda h, y: h.abs().sqrt().sum())


class Root(nn.Module):
    def forward(self, h):
        return h.sqrt()


def naive_severity(G):
    s = naive.singular_values(G)
    r = naive.rank(G)
    return {"lambda": 1 - s[-1] / s[0], "lambda_nonzero": 1 - s[r - 1] / s[0], "rank": r, "stable_rank": (s**2).sum() / s[0] ** 2}


@pytest.mark.parametrize("name", SMALL)
def test_the_severity_is_that_of_the_plain_matrix(name):
    model, x = small(name), normal(4, 1, 4, 4)
    found = []
    for link in walk(model, x, LABELS):
        expected = naive_severity(naive.error_matrix(model, x, LABELS, functional.cross_entropy, link.index))
        found.append(severity(link.signal_before))
        assert found[-1] == pytest.approx(expected, rel=1e-8, abs=1e-10)
    assert found[0] != pytest.approx(found[-1], rel=1e-3)


def test_cross_entropy_locks_the_logits_as_stated():
    """Each row of G sums to 0, so that λ = 1 for any net; over the nonzero singular values it is not, nor for another loss."""
    logits = nn.Sequential(nn.Identity())
    labels = torch.arange(8) % 3
    locked = severity(walk(logits, normal(8, 3), labels)[0].signal_before)
    assert locked["lambda"] == pytest.approx(1, abs=1e-12)
    assert locked["rank"] == 2
    assert locked["lambda_nonzero"] < 0.9
    free = severity(walk(logits, normal(8, 3), normal(8, 3, seed=1), functional.mse_loss)[0].signal_before)
    assert free["rank"] == 3
    assert free["lambda"] == free["lambda_nonzero"] < 0.9


@pytest.mark.parametrize(
    ("rows", "expected"), [(torch.eye(3), (0, 0, 3, 3)), (torch.ones(3, 3), (1, 0, 1, 1)), (torch.eye(3)[:1], (0, 0, 1, 1))]
)
def test_severity_in_closed_form(rows, expected):
    signal = ErrorSignal.of(rows.double(), torch.zeros(len(rows)).double())
    assert tuple(severity(signal).values()) == pytest.approx(expected, abs=1e-12)


def test_severities_of_several_stages_at_once():
    """Wide, narrow, of low rank, and none; in float32 too, where the rank is that of float32."""
    matrices = [normal(4, 7), normal(4, 2, seed=1), normal(4, 1, seed=2).double() @ normal(1, 5, seed=3).double(), torch.zeros(4, 3)]
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        signals = [ErrorSignal.of(G.to(dtype), torch.zeros(4, dtype=dtype)) for G in matrices]
        found = pd.DataFrame(severities(signals))
        np.testing.assert_allclose(found, pd.DataFrame([severity(signal) for signal in signals])[found.columns], atol=tolerance)
        assert found["rank"].tolist() == [4, 2, 1, 0]
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(found[::-1], pd.DataFrame([severity(signal) for signal in signals])[found.columns], atol=tolerance)


def test_severities_of_a_signal_that_is_not_finite_are_nan():
    bad = torch.eye(2)
    bad[1, 0] = torch.nan
    found = pd.DataFrame(severities([ErrorSignal.of(G, torch.zeros(2)) for G in (torch.eye(2), bad)]))
    assert found.notna().all(axis=1).tolist() == [True, False]
    assert found.iloc[1].isna().all()


def test_the_severity_of_no_signal_is_undefined():
    found = severity(ErrorSignal.of(torch.zeros(2, 3).double(), torch.zeros(2).double()))
    assert found["rank"] == 0
    assert all(math.isnan(found[name]) for name in ("lambda", "lambda_nonzero", "stable_rank"))


def condition_of(link, seed=100):
    probe = normal(*link.signal.direction.shape, seed=seed).double()
    return lock_condition(*(parameter_gradients(link.stage, link.inputs, covectors) for covectors in (link.signal.direction, probe)))


@pytest.mark.parametrize("name", SMALL)
def test_lock_ranks_are_those_of_the_plain_matrices(name):
    model, x, y = small(name), normal(12, 1, 4, 4), torch.arange(12) % 3
    for link in walk(model, x, y):
        gradient = naive.gradient_matrix(model, x, y, functional.cross_entropy, link.index)
        if not gradient.size:
            assert condition_of(link) == {"gradient_rank": 0, "free_rank": 0, "locked": False}
            continue
        free = naive.rank(naive.free_matrix(model, x, link.index))
        expected = {"gradient_rank": naive.rank(gradient), "free_rank": free, "locked": naive.rank(gradient) < free}
        assert condition_of(link) == expected == condition_of(link, seed=101)


def test_the_lock_condition_in_closed_form():
    """Softmax over C classes leaves (C−1)(d+1) of C(d+1) directions to a readout of d inputs; squared error leaves all."""
    model, x = seeded(nn.Sequential(nn.Linear(2, 2))), normal(10, 2)
    (link,) = walk(model, x, torch.arange(10) % 2)
    assert condition_of(link) == {"gradient_rank": 3, "free_rank": 6, "locked": True}
    (link,) = walk(model, x, normal(10, 2, seed=1), functional.mse_loss)
    assert condition_of(link) == {"gradient_rank": 6, "free_rank": 6, "locked": False}
    (link,) = walk(model, x[:3], torch.tensor([0, 1, 0]))
    assert condition_of(link) == {"gradient_rank": 3, "free_rank": 3, "locked": False}  # too few samples to tell


def test_a_bottleneck_above_locks_the_layer_below():
    """Behind W₂ of rank 1 the signals g_1 are collinear: a dense layer of d inputs keeps d+1 directions."""
    above = matrix_stage(torch.outer(normal(4).double(), normal(4, seed=1).double()))
    x, y = normal(30, 3), normal(30, 4, seed=2)
    locked = walk(nn.Sequential(seeded(nn.Linear(3, 4)), above), x, y, functional.mse_loss)
    assert condition_of(locked[0]) == {"gradient_rank": 4, "free_rank": 16, "locked": True}
    free = walk(nn.Sequential(seeded(nn.Linear(3, 4)), seeded(nn.Linear(4, 4))), x, y, functional.mse_loss)
    assert condition_of(free[0]) == {"gradient_rank": 16, "free_rank": 16, "locked": False}


def test_the_gradient_matrix_of_a_dense_layer_has_the_gram_matrix_of_its_factors():
    """(GGᵀ)∘(HHᵀ + 1), the bias's part being the 1."""
    model, x = dense(5, 4, 3), normal(4, 5)
    link = walk(model, x, LABELS)[1]
    G, H = vectors(link.signal), link.inputs.numpy()
    rows = naive.gradient_matrix(model, x, LABELS, functional.cross_entropy, 2)
    np.testing.assert_allclose(rows @ rows.T, (G @ G.T) * (H @ H.T + 1), rtol=1e-10)


def test_a_signal_that_is_zero_locks():
    model = nn.Sequential(seeded(nn.Linear(3, 2)), matrix_stage(torch.zeros(2, 2)))
    first, _ = walk(model, normal(4, 3), torch.tensor([0, 1, 0, 1]))
    assert condition_of(first) == {"gradient_rank": 0, "free_rank": 4, "locked": True}


@pytest.mark.parametrize("name", SMALL)
def test_error_signals_of_a_network_are_root_mean_squares_over_the_samples(name):
    model, x = small(name), normal(4, 1, 4, 4)
    for index, value in error_signals(model, x, LABELS).items():
        rows = naive.error_matrix(model, x, LABELS, functional.cross_entropy, index + 1) if index < len(model) else None
        if rows is not None:
            assert value == pytest.approx(math.log(np.square(rows).sum(1).mean()) / 2, rel=1e-10)


def test_error_signals_under_batch_statistics_are_those_of_the_mean_loss_of_the_batch():
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Tanh()), nn.Linear(5, 3))
    x = normal(4, 1, 4, 4)
    twin = naive.as_measured(model).train()
    hidden = twin[0](x.double()).detach().requires_grad_()
    functional.cross_entropy(twin[1](hidden), LABELS).backward()
    found = error_signals(model, x, LABELS, "train")
    assert found[1] == pytest.approx(math.log(hidden.grad.norm()), rel=1e-10)
    assert error_signals(model, x, LABELS)[1] != pytest.approx(found[1], rel=1e-3)


@given(st.floats(-2, 2), st.integers(4, 30))
def test_the_growth_of_a_geometric_gradient_is_its_rate(rate, depth):
    signals = {layer: rate * (depth - layer) / 2 for layer in range(1, depth + 1)}
    assert growth(signals) == pytest.approx(rate, abs=1e-9)
    # the early half and the readout do not count, and with `last` nothing behind that
    bent = {layer: value + 5 * (layer < depth // 2 or layer == depth) for layer, value in signals.items()}
    assert growth(bent) == pytest.approx(rate, abs=1e-9)
    if depth >= 6:
        bent[depth - 1] += 3
        assert growth(bent, last=depth - 2) == pytest.approx(rate, abs=1e-9)
        assert growth(bent) != pytest.approx(rate, abs=1e-3)
