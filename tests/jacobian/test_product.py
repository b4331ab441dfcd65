"""The product of Jacobians end to end, against mpmath at 60 digits and in closed form."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.jacobian.product import Product
from tests.jacobian.networks import normal


def of(jacobians):
    """The product of J_1 … J_L, given first to last."""
    product = Product.behind(jacobians[-1][..., 0])
    for J in jacobians[::-1]:
        product = product.before(lambda Q, J=J: J.mT @ Q, torch.linalg.matrix_rank(J))
    return product


def exact_logs(jacobians, digits=60):
    """Compute ln of the largest and of the smallest singular value in extended precision: √ of the eigenvalues of PPᵀ."""
    with mpmath.workdps(2 * digits + 40):
        P = mpmath.eye(jacobians[0].shape[1])
        for J in jacobians:
            P = mpmath.matrix(J.tolist()) * P
        squares = sorted(mpmath.eigsy(P * P.T, eigvals_only=True))
        return float(mpmath.log(squares[-1]) / 2), float(mpmath.log(squares[0]) / 2)


@pytest.mark.parametrize(("width", "depth"), [(8, 90), (16, 60)])
def test_norm_and_smallest_singular_value_of_long_products_are_those_at_sixty_digits(width, depth):
    """σ_min down to 1e-50 and below, where the SVD of the product stops at 1e-17 of its norm."""
    jacobians = [normal(1, width, width, seed=seed).double() / math.sqrt(width) for seed in range(depth)]
    product = of(jacobians)
    norm, smallest = exact_logs([J[0] for J in jacobians])
    assert float(product.log_norm) == pytest.approx(norm, abs=1e-11)
    assert float(product.log_smallest) == pytest.approx(smallest, abs=1e-10)
    assert smallest - norm < -50 * math.log(10)
    naive = torch.linalg.svdvals(torch.linalg.multi_dot([J[0] for J in jacobians[::-1]]))
    assert abs(float(naive[-1].log()) - smallest) > 1


@given(st.lists(st.integers(3, 7), min_size=2, max_size=6), st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_a_chain_of_any_widths_above_its_output(widths, seed):
    widths = [*widths, 3]
    jacobians = [normal(2, m, d, seed=seed + k).double() for k, (d, m) in enumerate(itertools.pairwise(widths))]
    product = of(jacobians)
    for n in range(2):
        s = torch.linalg.svdvals(torch.linalg.multi_dot([torch.eye(3).double(), *(J[n] for J in jacobians[::-1])]))
        np.testing.assert_allclose(product.log_norm[n], s[0].log(), atol=1e-10)
        np.testing.assert_allclose(product.log_smallest[n], s[-1].log(), atol=1e-6)


def test_a_singular_factor_and_a_narrow_one_leave_nothing():
    J = normal(2, 4, 4).double()
    singular = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])).double().expand(2, 4, 4)
    assert of([J, singular, J]).log_smallest.tolist() == [-math.inf] * 2
    narrow = of([normal(2, 2, 4).double(), normal(2, 4, 2).double()])
    assert narrow.log_smallest.tolist() == [-math.inf] * 2
    expected = torch.linalg.matrix_norm(normal(2, 4, 2).double() @ normal(2, 2, 4).double(), 2).log()
    torch.testing.assert_close(narrow.log_norm, expected)
    assert of([J, torch.zeros(2, 4, 4).double()]).log_norm.tolist() == [-math.inf] * 2


def test_a_product_that_is_singular_to_rounding_alone_is_not_known():
    """Two projections of rank 3 whose product has rank 2: each factor has the rank of the 3 outputs."""
    first, second = torch.diag(torch.tensor([1.0, 1, 1, 0])).double(), torch.diag(torch.tensor([0.0, 1, 1, 1])).double()
    turn = torch.linalg.qr(normal(4, 4).double()).Q
    out = normal(1, 3, 4, seed=2).double() @ turn.T
    J = [(turn @ first @ turn.T).unsqueeze(0), (turn @ second @ turn.T).unsqueeze(0), out]
    product = of(J)
    assert product.log_smallest.isnan().all()
    assert product.log_norm.isfinite().all()


def test_scaling_a_factor_moves_both_logarithms_by_its_logarithm():
    jacobians = [normal(1, 3, 3, seed=seed).double() for seed in range(4)]
    plain, scaled = of(jacobians), of([1e200 * jacobians[0], 1e200 * jacobians[1], *jacobians[2:]])
    for name in ("log_norm", "log_smallest"):
        torch.testing.assert_close(getattr(scaled, name) - getattr(plain, name), torch.tensor([400 * math.log(10)]).double())
