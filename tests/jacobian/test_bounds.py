"""Bounds on ‖J‖ and rank J from the graph: never below the truth, exact where closed forms say so."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from src.jacobian import bounds as module
from src.jacobian.bounds import bounds, circular_norm, matrix_norm, norm_by_grams
from src.jacobian.materialised import layer_jacobian
from src.models import Residual
from tests.jacobian.networks import normal, seeded


class Function(nn.Module):
    """A module of one function."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.parts)


CONV = nn.Conv2d(2, 3, 3, padding=1)
# stages from [n, 2, 6, 6]
STAGES = {
    "conv": CONV,
    "strided": nn.Conv2d(2, 4, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(2, 2, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(2, 4, (1, 3), groups=2),
    "relu": nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()),
    "norm": nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Sigmoid()),
    "plain norm": nn.BatchNorm2d(2, affine=False),
    "max pool": nn.MaxPool2d(3, stride=2, padding=1),
    "gapped max pool": nn.MaxPool2d(3, stride=2, padding=1, dilation=2),
    "slices": Function(lambda x, c: c(x)[:, 1:, ::2, None], CONV),
    "mean pool": nn.AvgPool2d(3, stride=1),
    "dense": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5), nn.GELU(), nn.Dropout()),
    "residual": Residual(nn.Sequential(nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1)), nn.Identity(), nn.ReLU()),
    "functions": Function(lambda x, c: functional.relu(c(x)).flatten(1).reshape(x.shape[0], 3, -1).mean((2,)), CONV),
    "difference": Function(lambda x, c: torch.cat([c(x) - 1, x.tanh()], 1).sin(), CONV),
    "twice": Function(lambda x, c: (lambda h: torch.cat([h + h, h, h], 1))(c(x).tanh()), CONV),
    "same": nn.Conv2d(2, 3, 3, padding="same", dilation=2),
    "valid": nn.Conv2d(2, 3, 3, padding="valid"),
    "in place": Function(lambda x, c: c(x).add_(1.0).relu_(), CONV),
}


@pytest.fixture(params=STAGES)
def stage(request):
    return seeded(STAGES[request.param]).double().eval().requires_grad_(False)


def test_no_bound_is_below_the_truth(stage):
    x = normal(4, 2, 6, 6, seed=3).double()
    found = bounds(stage, x)
    values = torch.linalg.svdvals(layer_jacobian(stage, x))
    assert found.norm.isfinite().all()
    assert (values[:, 0] <= found.norm * (1 + 1e-12)).all()
    assert (values[:, 0] >= found.norm / 8).all()  # and none is far off
    assert ((values > 1e-12).sum(1) <= found.rank).all()


@pytest.mark.parametrize(("stage", "norm", "rank"), [
    (nn.Linear(6, 4, bias=False), None, 4),
    (nn.Identity(), 1.0, 6),
    (nn.Sigmoid(), None, 6),
    (nn.BatchNorm1d(6), None, 6),
])  # fmt: skip
def test_a_single_layer_is_exact(stage, norm, rank):
    stage, x = seeded(stage).double().eval().requires_grad_(False), normal(3, 6).double()
    found, truth = bounds(stage, x), torch.linalg.svdvals(layer_jacobian(stage, x))[:, 0]
    torch.testing.assert_close(found.norm, truth if norm is None else torch.full_like(truth, norm), rtol=1e-12, atol=0)
    assert found.rank.tolist() == [rank] * 3


@pytest.mark.parametrize("W", [normal(6, 4), torch.ones(6, 4), torch.eye(5), torch.diag(torch.tensor([3.0, 1, 1])), torch.zeros(2, 3)])
def test_a_matrix_that_is_not_decomposed_is_bounded_all_the_same(W, monkeypatch):
    truth = float(torch.linalg.matrix_norm(W, 2))
    assert matrix_norm(W) == pytest.approx(truth, rel=1e-6)
    monkeypatch.setattr(module, "DECOMPOSED", 0)
    assert truth * (1 - 1e-6) <= matrix_norm(W) <= truth * 5**0.5  # Frobenius' norm is no more than √5 too large here


def test_units_without_slope_and_narrow_tensors_bound_the_rank():
    linear = seeded(nn.Linear(8, 8)).double().requires_grad_(False)
    x = normal(5, 8).double()
    active = (linear(x) > 0).sum(1)
    assert bounds(nn.Sequential(linear, nn.ReLU()), x).rank.tolist() == active.tolist()
    code = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8)).double().requires_grad_(False)
    assert bounds(code, x).rank.tolist() == [3] * 5
    assert bounds(Residual(code, nn.Identity(), nn.Identity()), x).rank.tolist() == [8] * 5


def test_an_unknown_operation_leaves_the_norm_unbounded():
    x = normal(3, 6).double()
    assert bounds(nn.Sequential(nn.Linear(6, 6), nn.Softmax(1)).double().requires_grad_(False), x).norm.isinf().all()
    assert bounds(Function(lambda x: x * x), x).norm.isinf().all()
    assert bounds(Function(lambda x: x * x.tanh()), x).norm.isinf().all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.add(x, x.sin(), alpha=-5),
        lambda x: x[:, [0, 0, 1]],
        lambda x: functional.dropout(x, 0.9),
        lambda x: functional.avg_pool2d(x, 2),
        nn.AvgPool2d(2, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=1),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
    ],
)
def test_what_may_scale_or_repeat_an_entry_is_not_bounded_as_if_it_did_not(function):
    stage = function if isinstance(function, nn.Module) else Function(function)
    assert bounds(stage, normal(2, 2, 6, 6).double()).norm.isinf().all()


@pytest.mark.parametrize("conv", [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 5, padding=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)])
def test_a_circular_convolution_is_the_limit_of_the_bound(conv):
    """Against the circulant matrix on a grid of the same size, written out."""
    conv = seeded(conv).double().requires_grad_(False)
    conv.bias.zero_()
    reach = conv.kernel_size[0] - 1
    size = 6 + 2 * conv.padding[0] + reach
    circular = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, groups=conv.groups, padding="same", padding_mode="circular")
    circular = circular.double().requires_grad_(False)
    circular.load_state_dict(conv.state_dict())
    truth = float(torch.linalg.svdvals(layer_jacobian(circular, torch.zeros(1, conv.in_channels, size, size).double()))[0, 0])
    assert truth <= circular_norm(conv, (6, 6)) * (1 + 1e-12) <= 1.1 * truth
    own = float(torch.linalg.svdvals(layer_jacobian(conv, torch.zeros(1, conv.in_channels, 6, 6).double()))[0, 0])
    assert own <= circular_norm(conv, (6, 6))


def test_gram_iteration_bounds_the_norm_from_above():
    for shape in ((4, 5, 3), (4, 3, 5), (2, 1, 1), (1, 20, 20)):
        W = normal(*shape).to(torch.complex128) + 1j * normal(*shape, seed=1)
        truth = torch.linalg.matrix_norm(W, 2)
        found = norm_by_grams(W)
        assert (truth <= found * (1 + 1e-12)).all()
        assert (found <= truth * min(shape[1:]) ** (1 / 128) * (1 + 1e-12)).all()
    worst = norm_by_grams(torch.eye(16).double())
    assert float(worst) == pytest.approx(16 ** (1 / 128))
    assert norm_by_grams(torch.zeros(2, 3, 3)).tolist() == [0, 0]
    assert math.isfinite(float(norm_by_grams(1e100 * torch.eye(3).double())))
