"""σ₁ from products alone, against LAPACK."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.jacobian import golub_kahan as module
from src.jacobian.golub_kahan import largest, refined, steps_for
from tests.jacobian.networks import normal


def products(matrices):
    return (lambda v: (matrices @ v[..., None])[..., 0]), (lambda u: (u[:, None] @ matrices)[:, 0])


def of(matrices, start=None, **options):
    push, pull = products(matrices)
    start = normal(len(matrices), matrices.shape[2], seed=9).to(matrices.dtype) if start is None else start
    return largest(push, pull, start, **options)


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_the_largest_singular_value_of_every_matrix(n, m, d, seed):
    J = normal(n, m, d, seed=seed).double()
    found, s = of(J, tolerance=1e-14), torch.linalg.svdvals(J)
    torch.testing.assert_close(found.value, s[:, 0], rtol=1e-10, atol=0)
    assert (found.smallest >= s[:, -1] * (1 - 1e-9)).all()
    # the Ritz pair is what it says: a unit vector that J stretches by θ, at most σ₁
    torch.testing.assert_close((J @ found.vector[..., None]).norm(dim=(1, 2)), found.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.vector.norm(dim=1), torch.ones(n).double(), rtol=1e-9, atol=0)


def test_some_singular_value_lies_within_the_residual_of_a_value_that_has_not_converged():
    J = torch.diag_embed(torch.linspace(1, 2, 60).double().expand(2, 60))
    for most in (1, 2, 5, 10):
        found = of(J, most=most)
        assert (found.steps == most).all()
        distance = (torch.linalg.svdvals(J) - found.value[:, None]).abs().amin(1)
        assert (distance <= found.residual * (1 + 1e-9)).all()
        assert (found.value <= 2).all()
    assert (of(J, most=1).value < 1.9).all()


def test_a_zero_matrix_among_others_has_norm_zero():
    J = normal(3, 4, 5).double()
    J[1] = 0
    found = of(J)
    assert found.value[1] == 0
    torch.testing.assert_close(found.value, torch.linalg.svdvals(J)[:, 0])


def test_single_precision_stays_so():
    found = of(normal(2, 20, 30), tolerance=1e-4)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, torch.linalg.svdvals(normal(2, 20, 30))[:, 0], rtol=1e-5, atol=0)


def test_a_start_near_the_answer_takes_fewer_steps():
    J = normal(2, 80, 80).double()
    cold = of(J, tolerance=1e-4)
    warm = of(J * 1.01, start=cold.vector, tolerance=1e-4)
    assert warm.steps.max() < cold.steps.max() / 2


def test_the_upper_side_holds_for_all_but_unlucky_starts():
    J = normal(1, 50, 50).double().expand(200, 50, 50)
    sigma = float(torch.linalg.svdvals(J[0])[0])
    found = of(J, most=10)
    assert (found.value < sigma).all()
    assert (found.upper(0.05) >= sigma).double().mean() >= 0.95
    assert (found.upper(1e-6) > found.upper(0.05)).all()
    root = math.log(1.648 * math.sqrt(50) / 0.05) / 19
    assert found.upper(0.05)[0] == pytest.approx(float(found.value[0]) / math.sqrt(1 - root**2))
    least = steps_for(0.1, 0.05, 50)
    below, enough = (replace(found, steps=torch.full((200,), steps)).upper(0.05) / found.value for steps in (least - 1, least))
    assert (enough <= 1.1).all()
    assert (below > 1.1).all()
    assert (of(J, least=least).steps >= least).all()
    assert replace(found, steps=torch.ones(200, dtype=torch.int64)).upper(0.05).isinf().all()


def test_every_matrix_has_its_own_steps_and_the_error_is_told():
    """One with a gap of a half, which converges at once, one with a gap of a thousandth."""
    J = torch.diag_embed(torch.stack([torch.tensor([2.0, *[1.0] * 79]), torch.linspace(1.92, 2, 80)]).double())
    found = of(J, tolerance=1e-6)
    truth = torch.linalg.svdvals(J)[:, 0]
    assert ((truth - found.value) <= found.error + 1e-12).all()
    assert (found.error <= 1e-6 * truth).all()
    assert (of(J, most=3).error > 1e-6 * truth).tolist() == [False, True]
    alone = of(J[1:], start=normal(2, 80, seed=9).double()[1:], tolerance=1e-6)
    torch.testing.assert_close(found.value[1:], alone.value)
    torch.testing.assert_close(found.vector[1:], alone.vector)
    # one that stopped early is known from above by its own steps alone
    assert found.steps[0] < found.steps[1] == alone.steps
    assert (found.upper(0.05) / found.value).diff() < 0


def test_a_vector_of_single_precision_is_refined_by_one_product():
    J = normal(4, 60, 70).double()
    calls = []
    push, pull = products(J)

    def counted(v):
        calls.append(v)
        return push(v)

    rough = of(J.float())
    found = refined(counted, pull, rough)
    assert len(calls) == 1
    assert found.value.dtype == torch.float64
    torch.testing.assert_close(found.value, torch.linalg.svdvals(J)[:, 0], rtol=1e-8, atol=0)
    # of other matrices the vector is no answer, and that is seen
    other = normal(4, 60, 70, seed=1).double()
    again = refined(*products(other), rough)
    torch.testing.assert_close(again.value, torch.linalg.svdvals(other)[:, 0], rtol=1e-7, atol=0)
    assert torch.equal(again.steps, rough.steps)


def test_rounding_that_copies_of_a_far_larger_value_leave_is_taken_away_by_a_product_more():
    """σ₁ = 1, the others a thousandth and less: after eight steps in single precision its vector is wrong by more than 1e-4."""
    left, _, right = torch.linalg.svd(normal(40, 60, 60).double())
    J = left @ torch.diag_embed(torch.cat([torch.ones(1), torch.logspace(-3, -4, 59)]).double().expand(40, 60)) @ right
    rough = of(J.float(), tolerance=1e-6)
    wrong = 1 - (rough.vector.double() * right[:, 0]).sum(1).abs()
    assert wrong.max() > 1e-8
    calls = []
    push, pull = products(J)

    def counted(v):
        calls.append(v)
        return push(v)

    found = refined(counted, pull, rough, tolerance=1e-13)
    assert len(calls) == 2
    torch.testing.assert_close(found.value, torch.ones(40).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_spoils_no_other(bad):
    J = normal(3, 5, 4).double()
    expected = torch.linalg.svdvals(J)[:, 0]
    J[1, 2, 3] = bad
    found = of(J, most=30).value
    assert not found[1].isfinite()
    torch.testing.assert_close(found[::2], expected[::2], rtol=1e-10, atol=0)


def test_float32_does_not_overflow_where_its_squares_do():
    J = 1e15 * normal(3, 5, 4)
    torch.testing.assert_close(of(J, tolerance=1e-5).value, torch.linalg.svdvals(J)[:, 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [1, 2, 9, 30])
def test_the_outer_eigenvectors_are_those_of_the_whole_decomposition(k):
    """Of BBᵀ, B bidiagonal, over 200 decades of its size; a zero matrix has unit vectors too."""
    draws = torch.Generator().manual_seed(k)
    B = torch.diag_embed(0.5 + torch.rand(20, k, generator=draws, dtype=torch.float64))
    B += torch.diag_embed(torch.rand(20, k - 1, generator=draws, dtype=torch.float64), 1)
    B *= torch.logspace(-50, 50, 20, dtype=torch.float64)[:, None, None]
    T = B @ B.mT
    values, vectors = torch.linalg.eigh(T)
    for which in (0, -1):
        found = module._outer_vector(T, values, which)
        torch.testing.assert_close((found * vectors[..., which]).sum(1).abs(), torch.ones(20).double(), rtol=0, atol=1e-9)
        nothing = module._outer_vector(torch.zeros(1, k, k).double(), torch.zeros(1, k).double(), which)
        torch.testing.assert_close(nothing.norm(dim=1), torch.ones(1).double())


def test_many_steps_on_several_threads():
    """Where the LU of a batch fails or hangs if all threads do it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        T = torch.diag_embed(normal(2, 200).double().abs() + 2) + torch.diag_embed(torch.ones(2, 199).double(), 1)
        T = (T + T.mT) / 2
        values, vectors = torch.linalg.eigh(T)
        for which in (0, -1):
            found = module._outer_vector(T, values, which)
            torch.testing.assert_close((found * vectors[:, :, which]).sum(1).abs(), torch.ones(2).double(), rtol=1e-9, atol=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
