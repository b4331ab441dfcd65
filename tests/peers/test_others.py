"""The certificate against curvlinops with scipy's svds, and against `vmap(jacrev)`, on a convolution."""

import pytest
import torch
from torch import nn

from src.certificate import certify
from tests.jacobian.networks import normal, seeded
from tests.peers.others import jacobians, norm_by_curvlinops


@pytest.mark.parametrize("method", ["exact", "matrix_free"])
def test_the_norm_of_a_convolution_is_that_of_curvlinops_and_of_jacrev(method):
    stage = seeded(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())).double().requires_grad_(False)
    x = normal(3, 3, 6, 6).double()
    found = certify(nn.Sequential(stage), x, torch.zeros(3), loss=lambda outputs, _: outputs.square().sum(), method=method).layers
    by_svds = [norm_by_curvlinops(stage, sample, 0) for sample in x]
    assert found["norm"].tolist() == pytest.approx(by_svds, rel=1e-6)
    assert found["norm"].tolist() == pytest.approx(torch.linalg.svdvals(jacobians(stage, x))[:, 0].tolist(), rel=1e-6)
    assert (found["norm_lo"] <= [value * (1 + 1e-9) for value in by_svds]).all()
    assert (found["norm_hi"] >= [value * (1 - 1e-9) for value in by_svds]).all()
    assert norm_by_curvlinops(seeded(stage, seed=3).double(), x[0], 0) != pytest.approx(by_svds[0], rel=1e-3)
