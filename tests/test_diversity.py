import math

import numpy as np
import pytest
import torch

from src.diversity import dissimilarity, participation_ratio, rank


def states(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_participation_ratio(h):
    values = np.linalg.eigvalsh(h.numpy() @ h.numpy().T)
    return sum(values) ** 2 / sum(value**2 for value in values)


def naive_correlation(h):
    cosines = [float(a @ b / (a.norm() * b.norm())) for i, a in enumerate(h) for j, b in enumerate(h) if i != j]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 3), (6, 40)])
def test_all_three_against_naive_references(n, d):
    h = states(n, d) + 0.5
    assert rank(h) == np.linalg.matrix_rank(h.numpy()) == min(n, d)
    assert participation_ratio(h) == pytest.approx(naive_participation_ratio(h), rel=1e-12)
    assert dissimilarity(h) == pytest.approx(1 - naive_correlation(h), rel=1e-12)
    assert dissimilarity(h + 0.5) != pytest.approx(1 - naive_correlation(h), rel=1e-2)


def test_identical_and_proportional_states_are_one_direction():
    h = states(1, 7)
    for alike in (h.expand(5, -1), h * torch.tensor([[1.0], [2.0], [1e-9]])):
        assert (rank(alike), participation_ratio(alike)) == (1, pytest.approx(1, abs=1e-12))
        assert dissimilarity(alike) == pytest.approx(0, abs=1e-30)


def test_orthogonal_states_of_equal_length_are_as_many_directions():
    h = 3 * torch.linalg.qr(states(8, 8))[0][:5]
    assert (rank(h), participation_ratio(h), dissimilarity(h)) == (5, pytest.approx(5), pytest.approx(1))
    h[0] *= 2
    # eigenvalues 4, 1, 1, 1, 1
    assert participation_ratio(h) == pytest.approx(8**2 / 20)
    assert dissimilarity(h) == pytest.approx(1)


def test_opposite_states_are_one_direction_and_as_far_apart_as_can_be():
    h = states(1, 4)
    opposite = torch.cat([h, -h])
    assert (rank(opposite), participation_ratio(opposite), dissimilarity(opposite)) == (1, pytest.approx(1), pytest.approx(2))


@pytest.mark.parametrize("angle", [1e-3, 1e-9, 1e-14])
def test_states_that_differ_by_less_than_the_rounding_of_one(angle):
    h = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert dissimilarity(h) == pytest.approx(angle**2 / 2, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_a_common_factor_changes_nothing(factor):
    h = states(5, 4)
    assert rank(factor * h) == rank(h)
    assert participation_ratio(factor * h) == pytest.approx(participation_ratio(h), rel=1e-12)
    assert dissimilarity(factor * h) == pytest.approx(dissimilarity(h), rel=1e-12)


def test_a_state_of_zero():
    h = torch.zeros(3, 4)
    assert (rank(h), dissimilarity(h)) == (0, 0)
    assert math.isnan(participation_ratio(h))
    h[0, 0] = 1
    # of three pairs two are at ½·1²
    assert dissimilarity(h) == pytest.approx(1 / 3)


def test_pixels_are_entries_of_a_state():
    h = states(3, 24)
    image = h.reshape(3, 2, 3, 4)
    assert (rank(image), participation_ratio(image), dissimilarity(image)) == (rank(h), participation_ratio(h), dissimilarity(h))
