"""What a certificate refuses to answer, and that it answers everything else."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from src.certificate import certify
from src.errors import UserError
from tests.jacobian.networks import FAMILIES, SMALL, Counting, dense, family, normal, seeded, small

LABELS = torch.tensor([0, 1, 2])


class Careless(nn.Module):
    """Dropout that is never switched off."""

    def forward(self, x):
        return functional.dropout(x, 0.5, training=True)


class Centred(nn.Module):
    """What its mean over the batch is taken from."""

    def forward(self, x):
        return x - x.mean(0)


class Summing(nn.Module):
    """A sum over the samples so far: the first knows of no other."""

    def forward(self, x):
        return x.cumsum(0)


class Drifting(Counting):
    """Answers by how often it was asked."""

    def forward(self, x):
        self.calls = self.calls + 1
        return x * self.calls


class Shaking(Drifting):
    """Answers by how often it was asked, as much as rounding does."""

    def forward(self, x):
        return x + 1e-15 * super().forward(x)


class Rounding(nn.Module):
    """Computed by another kernel where a derivative is taken."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x * (1 + self.by) if torch.is_grad_enabled() else x


class StraightThrough(torch.autograd.Function):
    """Round forwards, the identity backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, t):
        return 2 * t


class Pretending(nn.Module):
    def forward(self, x):
        return StraightThrough.apply(x)


class Cubed(torch.autograd.Function):
    """x³ without a forward derivative, its gradient right but for a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return ctx.factor * 3 * x**2 * g, None


class Cubing(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return Cubed.apply(x, self.factor)


def chain(part):
    return seeded(nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), part, nn.Linear(5, 3)))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Careless(), "stage '1' answers differently when it is asked twice"),
        (Drifting(), "stage '1' answers differently when it is asked twice"),
        (Shaking(), "stage '1' answers differently when it is asked twice"),
        (Rounding(1e-6), "stage '1' answers differently when it is asked twice"),
        (Centred(), "in stage '1' a sample's output depends on the other samples"),
        (Summing(), "in stage '1' a sample's output depends on the other samples"),
        (Counting(), "stage '1' writes into its buffers in eval mode"),
        (Pretending(), "the backward pass of stage '1' is not the transpose of its derivative"),
        (Cubing(1.01), "the backward pass of stage '1' is not the transpose of its derivative"),
    ],
)
def test_a_stage_that_cannot_be_answered_for_is_refused_with_the_reason(part, reason):
    with pytest.raises(UserError, match=reason):
        certify(chain(part), normal(3, 1, 4, 4), LABELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_forward_derivative_is_answered_where_its_backward_pass_is_right(dtype):
    assert len(certify(chain(Cubing(1.0)), normal(3, 1, 4, 4), LABELS, dtype=dtype).rank) == 3


def test_what_another_kernel_rounds_otherwise_is_answered():
    assert len(certify(chain(Rounding(1e-15)), normal(3, 1, 4, 4), LABELS).rank) == 3


def test_what_leaks_is_answered_for_the_batch_as_one():
    assert len(certify(chain(Centred()), normal(3, 1, 4, 4), LABELS, batch_norm="train").rank) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_no_sound_stage_is_refused(name, dtype):
    certify(small(name), normal(3, 1, 4, 4), LABELS, dtype=dtype)


@pytest.mark.parametrize(("name", "norm", "skip"), FAMILIES)
def test_no_family_is_refused_in_single_precision(name, norm, skip):
    certify(family(name, norm=norm, skip=skip), normal(3, 1, 8, 8), LABELS, dtype=torch.float32)


def test_a_wide_deep_chain_is_not_refused_for_its_rounding():
    certify(dense(200, *[300] * 20, 3), normal(3, 200), LABELS, dtype=torch.float32, method="matrix_free")
