"""Odd but plausible models: answered as they compute, or refused with the reason."""

import copy
import math
import re
import types

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

from src import cost
from src.certificate import certify
from src.errors import UserError
from tests.jacobian.networks import as_double, dense, normal, seeded

LABELS = torch.tensor([0, 1, 2])


def refusal(message):
    return pytest.raises(UserError, match=f"^{re.escape(message)}")


def naive_norms(model, x):
    """‖∏J‖ of every sample by autograd in float64, of the model as it is."""
    twin = copy.deepcopy(model).double().eval()
    return [
        float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(lambda z: twin(z[None])[0], sample).reshape(3, -1), 2))
        for sample in x.double()
    ]


def end_to_end(model, x, **options):
    return np.exp(certify(model, x, LABELS, **options).end_to_end()["log_norm"])


@pytest.mark.parametrize("method", ["exact", "matrix_free", "auto"])
def test_a_layer_with_a_forward_of_its_own_is_taken_as_it_computes(method, monkeypatch):
    monkeypatch.setattr(cost, "FACTORISED", 0)
    model, A = dense(8, 8, 3), normal(8, 8, seed=4)
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.register_buffer("A", A)
    layer.forward = types.MethodType(lambda self, z: functional.linear(z, self.weight, self.bias) + z @ self.A, layer)
    x = normal(3, 8, seed=1)
    found = certify(model, x, LABELS, method=method)
    np.testing.assert_allclose(np.exp(found.end_to_end()["log_norm"]), naive_norms(model, x), rtol=1e-9)
    J = torch.stack([torch.autograd.functional.jacobian(lambda z: as_double(model[0])(z[None])[0], s) for s in x.double()])
    truth = torch.linalg.svdvals(J)[:, 0].numpy()
    first = found.layers.query("index == 1")
    assert ((first["norm_lo"] <= truth) & (truth <= first["norm_hi"])).all()


class Spectral(nn.Module):
    """A convolution by complex weights."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.gains = nn.Parameter(torch.complex(normal(5, seed=5), normal(5, seed=6)))

    def forward(self, x):
        return self.last(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.gains, n=8))


def test_complex_weights_keep_both_parts():
    model, x = seeded(Spectral()), normal(3, 8)
    twin = copy.deepcopy(model)
    twin.gains = nn.Parameter(model.gains.detach().to(torch.complex128))
    twin.first.double(), twin.last.double()
    truth = [float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(twin, sample), 2)) for sample in x.double()]
    np.testing.assert_allclose(end_to_end(model, x), truth, rtol=1e-9)


class Straight(torch.autograd.Function):
    """The sign, backwards the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Binary(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(Straight.apply(self.first(x)))


def test_a_backward_pass_of_its_own_is_not_lost_unseen():
    with refusal("Binary: torch.fx cannot trace it"):
        certify(seeded(Binary()), normal(3, 8), LABELS)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.last = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers(kind):
    model, x = seeded(Recurrent(kind)), normal(3, 6, 4)
    np.testing.assert_allclose(end_to_end(model, x), naive_norms(model, x), rtol=1e-9)
    if kind is nn.LSTM:
        with refusal("certificate: stage 'recurrent' can't be measured (NotImplementedError: "):
            certify(model, x, LABELS, method="matrix_free")


class Dictionary(nn.Module):
    def forward(self, x):
        return {"scores": x}


class Picky(nn.Module):
    """Fails on double precision."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x.float())


def test_models_that_are_none_are_refused_in_a_line():
    x = normal(3, 8)
    with refusal("Dictionary: it gives a dict; certify a model that gives one tensor"):
        certify(Dictionary(), x, LABELS)
    with refusal("Picky: it fails on these inputs in torch.float64 ("):
        certify(Picky(), x, LABELS)
    with refusal("certify: inputs of torch.int64 have no derivative; certify the model behind its embedding"):
        certify(nn.Sequential(nn.Embedding(5, 3)), torch.tensor([0, 1, 2]), LABELS)


def test_under_inference_mode_it_is_the_same():
    model, x = dense(8, 8, 3), normal(3, 8)
    with torch.inference_mode():
        found = certify(model, x, LABELS)
    pd.testing.assert_frame_equal(found.layers, certify(model, x, LABELS).layers)


def test_the_batch_as_one_operator_without_writing_it_out():
    model = seeded(nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()), nn.Linear(6, 3)))
    x = normal(3, 8)
    free, exact = (certify(model, x, LABELS, batch_norm="train", method=method).layers for method in ("matrix_free", "exact"))
    np.testing.assert_allclose(free["norm"], exact["norm"], rtol=1e-6)
    assert (free["rank_hi"] >= exact["rank"]).all()


def test_of_deficient_stages_the_product_has_no_smallest_singular_value():
    model = seeded(nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(6)), nn.Linear(16, 10)))
    found = certify(model, normal(3, 16), LABELS)
    assert (found.rank < 10).all()
    assert (found.end_to_end()["log_smallest"] == -math.inf).all()
