"""What training's own backward pass sees of a Jacobian, against J' written out in its dtype."""

import numpy as np
import pytest
import torch
from torch import nn

from src import cost
from src.certificate import certify
from tests.jacobian.networks import normal, seeded

LABELS = torch.tensor([0, 1, 2])


def saturated(gain):
    """A square tanh layer that saturates with its gain, and a head."""
    model = seeded(nn.Sequential(nn.Sequential(nn.Linear(24, 24), nn.Tanh()), nn.Linear(24, 3)))
    with torch.no_grad():
        model[0][0].weight.mul_(gain)
    return model


def by_hand(model, x):
    """Rank of J' at single precision's limit and ‖J' − J‖_F/‖J‖_F, of the first stage: J from sech² in double precision."""
    stage, eps = model[0], torch.finfo(torch.float32).eps
    own = torch.stack([torch.autograd.functional.jacobian(lambda x: stage(x[None])[0], sample) for sample in x]).double()
    z = stage[0].double()(x.double())
    J = ((1 / torch.cosh(z) ** 2).unsqueeze(2) * stage[0].weight).detach()
    limit = 24 * eps * torch.linalg.matrix_norm(J, 2)
    stage.float()
    return (torch.linalg.svdvals(own) > limit[:, None]).sum(1), torch.linalg.matrix_norm(own - J) / torch.linalg.matrix_norm(J)


@pytest.mark.parametrize("factorised", [False, True])
@pytest.mark.parametrize("gain", [1.0, 12.0, 40.0])
def test_three_ranks_of_a_saturated_layer(gain, factorised, monkeypatch):
    if factorised:
        monkeypatch.setattr(cost, "FACTORISED", 0)
    model, x = saturated(gain), normal(3, 24)
    first = certify(model, x, LABELS).layers.query("index == 1")
    rank, error = by_hand(model, x)
    assert first["rank_backprop"].tolist() == rank.tolist()
    # rounding errors: of the same size, not the same
    assert (abs(np.log10(first["backprop_error"].to_numpy() / error.numpy())) < 1).all()
    assert (first["rank_backprop"] <= first["rank_structural"]).all()
    assert (first["rank"] <= first["rank_structural"]).all()
    assert (first["rank_structural"] == 24).all()  # sech² is never 0
    if gain == 40.0:
        assert (first["rank_backprop"] < 24).all()
    if gain == 1.0:
        assert (first["rank_backprop"] == 24).all()


def test_in_double_precision_training_sees_what_is_measured():
    layers = certify(saturated(1.0).double(), normal(3, 24).double(), LABELS).layers
    assert (layers["rank_backprop"] == layers["rank"]).all()
    assert (layers["backprop_error"] < 1e-12).all()


def test_it_is_not_known_where_the_jacobian_is_not():
    layers = certify(saturated(1.0), normal(3, 24), LABELS, method="matrix_free").layers
    assert layers[["rank_backprop", "backprop_error"]].isna().all(axis=None)
