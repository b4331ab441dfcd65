import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from src.mean_field import (
    CRITICAL_WEIGHT_VAR,
    chi,
    chi_profile,
    critical_weight_var,
    depth_scale,
    fixed_point,
    gaussian_mean,
    mean_square_derivative,
    variance_map,
)

NAIVE = {
    "tanh": (math.tanh, lambda x: 1 / math.cosh(x) ** 2),
    "sigmoid": (lambda x: 1 / (1 + math.exp(-x)), lambda x: math.exp(-x) / (1 + math.exp(-x)) ** 2),
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "linear": (lambda x: x, lambda x: 1.0),
}


def naive_mean_square(f, q):
    """E[f(√q z)²] by adaptive quadrature."""

    def integrand(z):
        return f(math.sqrt(q) * z) ** 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    return quad(integrand, -12, 0, epsabs=1e-13)[0] + quad(integrand, 0, 12, epsabs=1e-13)[0]


@settings(max_examples=10, deadline=None)
@given(st.floats(0.01, 30), st.floats(0, 4), st.floats(0, 1))
@pytest.mark.parametrize("activation", NAIVE)
def test_gaussian_integrals_agree_with_quadrature(activation, q, weight_var, bias_var):
    phi, derivative = NAIVE[activation]
    expected = weight_var * naive_mean_square(phi, q) + bias_var
    assert variance_map(q, activation, weight_var, bias_var) == pytest.approx(expected, rel=1e-9)
    assert mean_square_derivative(activation, q) == pytest.approx(naive_mean_square(derivative, q), rel=1e-9)


def test_integrals_hold_where_the_derivative_is_a_spike():
    """E[φ'(√q z)²] → ∫φ'² / √(2πq) for √q ≫ 1, with ∫(tanh')² = 4/3 and ∫(σ')² = 1/6; the next term is O(1/q)."""
    for activation, integral in (("tanh", 4 / 3), ("sigmoid", 1 / 6)):
        assert mean_square_derivative(activation, 1e4) == pytest.approx(integral / math.sqrt(2 * math.pi * 1e4), rel=2e-4)


@pytest.mark.parametrize(
    ("activation", "values"),
    [("sigmoid", [0.0625, 0.05136, 0.04484, 0.02903]), ("tanh", [1, 0.59243, 0.46440, 0.25595])],
)
def test_published_mean_square_derivatives(activation, values):
    assert [mean_square_derivative(activation, q) for q in (0.0, 0.5, 1.0, 4.0)] == pytest.approx(values, abs=6e-6)


@pytest.mark.parametrize(
    ("activation", "weight_var", "bias_var", "expected"),
    [
        ("tanh", 1.3, 0.05, 0.880),
        ("tanh", 1.761, 0.05, 1.000),
        ("tanh", 2.5, 0.05, 1.1335),
        ("relu", 2.0, 0.0, 1.0),
        ("sigmoid", 1 / 3, 0.0, 0.0200),
        ("sigmoid", 1.0, 0.0, 0.0557),
    ],
)
def test_published_chi(activation, weight_var, bias_var, expected):
    assert chi(activation, weight_var, bias_var) == pytest.approx(expected, abs=2e-4)


def test_a_wrong_formula_misses_the_published_chi():
    """Squaring the mean of φ' in place of the mean of φ'² is off by far more than the tolerance above."""
    q = fixed_point("tanh", 1.3, 0.05)
    assert abs(1.3 * gaussian_mean(lambda x: 1 - np.tanh(x) ** 2, q) ** 2 - 0.880) > 0.02


@pytest.mark.parametrize(("bias_var", "weight_var"), [(0.01, 1.4242), (0.05, 1.7610), (0.25, 2.4015)])
def test_published_critical_line(bias_var, weight_var):
    assert critical_weight_var("tanh", bias_var) == pytest.approx(weight_var, abs=6e-5)


def test_critical_points_in_closed_form():
    assert critical_weight_var("relu", 0.1) == pytest.approx(2)
    assert critical_weight_var("linear", 0.0) == pytest.approx(1)
    assert critical_weight_var("tanh", 0.0) == pytest.approx(1, abs=1e-6)  # χ - 1 = O((σw² - 1)²) above it
    assert chi("sigmoid", critical_weight_var("sigmoid", 0.0), 0.0) == pytest.approx(1)


def test_published_depth_scales():
    assert depth_scale(chi("tanh", 1.3, 0.05)) == pytest.approx(7.83, abs=0.01)
    assert depth_scale(chi("tanh", 1.7, 0.05)) == pytest.approx(74.9, abs=0.1)


def test_depth_scale_is_negative_where_gradients_grow():
    assert depth_scale(math.e) == pytest.approx(-1)
    assert depth_scale(1.0) == math.inf
    assert depth_scale(0.0) == 0


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["tanh", "sigmoid"]), st.floats(0, 8), st.floats(0, 1))
def test_fixed_point_is_fixed_and_attracts(activation, weight_var, bias_var):
    q = fixed_point(activation, weight_var, bias_var)
    assert variance_map(q, activation, weight_var, bias_var) == pytest.approx(q, abs=1e-12)
    if q > 1e-9:
        assert variance_map(q / 2, activation, weight_var, bias_var) > q / 2
        assert variance_map(2 * q, activation, weight_var, bias_var) < 2 * q


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 4))
def test_the_lower_bracket_of_the_tanh_fixed_point(q):
    """E[tanh²] ≥ q - 2q² puts the positive root above (1 - 1/σw²)/4."""
    assert variance_map(q, "tanh", 1.0, 0.0) >= q - 2 * q * q - 1e-15


@pytest.mark.parametrize(
    ("activation", "weight_var", "bias_var", "expected"),
    [
        ("tanh", 0.9, 0.0, 0.0),
        ("tanh", 1.0, 0.0, 0.0),
        ("tanh", 0.0, 0.3, 0.3),
        ("sigmoid", 0.0, 0.0, 0.0),
        ("relu", 1.0, 0.5, 1.0),
        ("linear", 0.5, 0.0, 0.0),
        ("relu", 2.0, 0.1, math.inf),
        ("linear", 1.5, 0.0, math.inf),
    ],
)
def test_fixed_points_in_closed_form(activation, weight_var, bias_var, expected):
    assert fixed_point(activation, weight_var, bias_var) == pytest.approx(expected)


def test_every_variance_stays_at_the_critical_point_of_homogeneous_activations():
    assert math.isnan(fixed_point("relu", 2.0, 0.0))
    assert math.isnan(fixed_point("linear", 1.0, 0.0))


def test_chi_profile_starts_at_the_given_variance_and_settles_at_chi():
    profile = chi_profile(4.0, "tanh", 2.5, 0.05, 60)
    assert profile[0] == pytest.approx(2.5 * 0.25595, abs=2e-5)
    assert profile[1] == pytest.approx(2.5 * mean_square_derivative("tanh", variance_map(4.0, "tanh", 2.5, 0.05)))
    assert profile[-1] == pytest.approx(chi("tanh", 2.5, 0.05))


@pytest.mark.parametrize("activation", CRITICAL_WEIGHT_VAR)
def test_the_critical_weight_variance_without_biases(activation):
    """σw² E[φ'(√q z)²] = 1 at q = 0."""
    assert CRITICAL_WEIGHT_VAR[activation] * mean_square_derivative(activation, 0.0) == pytest.approx(1, rel=1e-12)
