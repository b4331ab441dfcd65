import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.spectrum import Spectrum, gram_spectrum, spectrum
from tests.jacobian import naive

few = settings(max_examples=20, deadline=None)
EPS = torch.finfo(torch.float64).eps
seeds, sizes, ranks = st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(0, 5)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of_rank(rank, m, d, seed):
    return gaussian(m, rank, seed=seed) @ gaussian(rank, d, seed=seed + 1)


def diagonal(*entries, dtype=torch.float64):
    return spectrum(torch.diag(torch.tensor(entries, dtype=dtype)))


@few
@given(sizes, sizes, ranks, seeds)
def test_the_spectrum_is_numpys(m, d, r, seed):
    matrices = torch.stack([of_rank(r, m, d, seed), gaussian(m, d, seed=seed)])
    s = spectrum(matrices)
    for k, matrix in enumerate(matrices.numpy()):
        expected = naive.singular_values(matrix)
        np.testing.assert_allclose(s.values[k], expected, rtol=1e-12, atol=1e-14 * max(expected[0], 1))
        assert float(s.norm[k]) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-12)
        assert float(s.smallest[k]) == pytest.approx(expected[-1], abs=1e-13 * max(expected[0], 1))
        assert int(s.rank[k]) == np.linalg.matrix_rank(matrix)
        assert float(s.mean_square[k]) == pytest.approx((matrix**2).sum() / min(m, d))
        assert float(s.tolerance[k]) == pytest.approx(max(m, d) * EPS * expected[0])


@few
@given(sizes, sizes, ranks, seeds)
def test_rank_and_norm_lie_in_their_enclosures(m, d, r, seed):
    s = spectrum(of_rank(r, m, d, seed))
    assert s.rank_lo <= s.rank <= s.rank_hi
    assert s.rank_lo <= min(m, d, r) <= s.rank_hi  # as a matrix of rank r was meant
    assert s.norm - s.tolerance <= s.norm <= s.norm + s.tolerance


@few
@given(st.integers(1, 6), st.integers(1, 6))
def test_the_norm_of_a_matrix_of_ones_lies_within_the_tolerance(m, d):
    s = spectrum(torch.ones(m, d, dtype=torch.float64))
    assert abs(float(s.norm) - math.sqrt(m * d)) <= float(s.tolerance)
    single = spectrum(torch.full((m, d), 0.1, dtype=torch.float32))
    assert float(single.tolerance) == pytest.approx(max(m, d) * 2**-23 * float(single.norm))


@few
@given(st.integers(1, 6), seeds)
def test_singular_values_multiply_to_the_determinant(d, seed):
    J = gaussian(d, d, seed=seed)
    assert float(spectrum(J).values.log().sum()) == pytest.approx(float(torch.linalg.slogdet(J).logabsdet), abs=1e-9)


@few
@given(st.integers(1, 6), seeds)
def test_norms_and_ranks_of_a_product(d, seed):
    A, B = gaussian(d, d, seed=seed), of_rank(max(1, d // 2), d, d, seed + 7)
    product, a, b = spectrum(A @ B), spectrum(A), spectrum(B)
    assert product.norm <= a.norm * b.norm * (1 + 1e-12)
    rounding = d * torch.finfo(torch.float64).eps * a.norm * b.norm  # of the product, which may exceed its own τ
    assert (product.values > 2 * rounding).sum() <= min(a.rank, b.rank)
    assert product.norm >= a.smallest * b.norm * (1 - 1e-12)


@few
@given(st.integers(1, 6), st.floats(0.01, 3), seeds)
def test_a_skip_holds_the_least_singular_value_above_one_minus_the_norm(d, norm, seed):
    """Weyl: σ_min(I + J) ≥ 1 − ‖J‖, with equality at J = −‖J‖ I."""
    J = gaussian(d, d, seed=seed)
    J *= norm / spectrum(J).norm
    eye = torch.eye(d, dtype=torch.float64)
    assert spectrum(eye + J).smallest >= 1 - norm - 1e-12
    assert float(spectrum(eye - norm * eye).smallest) == pytest.approx(abs(1 - norm), abs=1e-12)
    assert spectrum(J).smallest < 1 + norm


def test_a_skip_over_minus_the_identity_has_rank_zero():
    s = spectrum(torch.zeros(3, 3, dtype=torch.float64))
    assert (int(s.rank_lo), int(s.rank), int(s.rank_hi), float(s.norm), float(s.condition)) == (0, 0, 0, 0, math.inf)
    assert math.isnan(s.stable_rank)


def test_an_orthogonal_matrix_is_perfectly_conditioned():
    Q = 1.7 * torch.linalg.qr(gaussian(6, 6)).Q
    np.testing.assert_allclose(spectrum(Q).values, np.full(6, 1.7), rtol=1e-12)
    assert float(spectrum(Q).condition) == pytest.approx(1, rel=1e-12)
    assert float(spectrum(Q).stable_rank) == pytest.approx(6)
    assert float(spectrum(Q + 0.1 * gaussian(6, 6, seed=1)).condition) > 1.1


def test_a_diagonal_matrix():
    s = diagonal(3.0, -4.0, 1.0)
    assert s.values.tolist() == [4.0, 3.0, 1.0]
    assert (float(s.norm), float(s.smallest), int(s.rank), float(s.condition)) == (4, 1, 3, 4)
    assert float(s.stable_rank) == pytest.approx(26 / 16)
    assert float(s.mean_square) == pytest.approx(26 / 3)


def test_a_wide_or_tall_matrix_of_full_rank_is_well_conditioned():
    J = torch.tensor([[3.0, 0, 0], [0, 4, 0]])
    for matrix in (J, J.T):
        assert (int(spectrum(matrix).rank), float(spectrum(matrix).condition)) == (2, pytest.approx(4 / 3))
        assert not spectrum(matrix).is_deficient


@pytest.mark.parametrize(
    ("multiple", "ranks"), [(0, (1, 1, 1)), (0.5, (1, 1, 2)), (1.5, (1, 2, 2)), (2.5, (2, 2, 2))], ids=["zero", "below", "open", "above"]
)
def test_ranks_near_the_tolerance_are_enclosed(multiple, ranks):
    s = diagonal(1.0, multiple * 2 * EPS)
    assert (int(s.rank_lo), int(s.rank), int(s.rank_hi)) == ranks
    assert math.isinf(s.condition) == (ranks[1] == 1)
    assert bool(s.is_deficient) == (ranks[1] == 1)


def test_the_rank_is_that_of_the_dtype():
    assert int(diagonal(1.0, 1e-8).rank) == 2
    assert int(diagonal(1.0, 1e-8, dtype=torch.float32).rank) == 1


def test_another_tolerance_gives_another_rank():
    s = diagonal(1.0, 1e-3)
    assert int(s.rank) == 2
    assert int(Spectrum(s.values, torch.tensor(1e-2, dtype=torch.float64)).rank) == 1


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [1.0, 1e-3, 1e-6], [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
def test_singular_values_from_a_gram_matrix(values):
    """Resolved down to √(nε) of the largest: 1e-6 is seen in float64, 1e-9 is not."""
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64))[0] for n in (3, 7))
    A = U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V[:3]
    found = gram_spectrum(A @ A.T)
    torch.testing.assert_close(found.values, spectrum(A).values, rtol=1e-3, atol=float(found.tolerance))
    assert int(found.rank) == int(spectrum(A).rank) == sum(value > 0 for value in values)
    assert float(found.tolerance) == pytest.approx(math.sqrt(3 * 2.0**-52) * max(values))


def test_a_gram_matrix_does_not_tell_small_singular_values_from_rounding():
    A = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    assert (int(gram_spectrum(A @ A.T).rank), int(spectrum(A).rank)) == (1, 2)
