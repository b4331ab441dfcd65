"""Mean-field theory of wide random networks: how variance goes forward and gradient backward.

Poole et al. 2016, "Exponential expressivity in deep neural networks through transient chaos";
Schoenholz et al. 2017, "Deep information propagation".
q is the variance of the pre-activations, z ~ N(0, 1); all numbers are float64.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64
from scipy.optimize import brentq
from scipy.special import expit, softmax

from src.config import Activation

Function = Callable[[np.ndarray], np.ndarray]

# Homogeneous activations have E[φ(√q z)²] = c q and E[φ'²] = c.
HOMOGENEOUS = {"relu": 0.5, "linear": 1.0}
BOUNDED: dict[str, tuple[Function, Function]] = {
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "sigmoid": (expit, lambda x: expit(x) * expit(-x)),
}
# The trapezoidal rule converges geometrically on analytic integrands (Trefethen & Weideman 2014), and unlike Gauss–Hermite with as many
# nodes it still resolves φ' where √q is large: relative error below 1e-8 up to q = 1e4.
NODES = np.linspace(-10.0, 10.0, 4001)
WEIGHTS = softmax(-(NODES**2) / 2)


def gaussian_mean(function: Function, q: float) -> float:
    """Integrate E[f(√q z)] over z ~ N(0, 1)."""
    return float(WEIGHTS @ function(math.sqrt(q) * NODES))


def variance_map(q: float, activation: Activation, weight_var: float, bias_var: float) -> float:
    """Map the variance of one layer to the next: V(q) = σw² E[φ(√q z)²] + σb² (Poole et al. 2016, the length map)."""
    if activation in HOMOGENEOUS:
        return weight_var * HOMOGENEOUS[activation] * q + bias_var
    phi, _ = BOUNDED[activation]
    return weight_var * gaussian_mean(lambda x: phi(x) ** 2, q) + bias_var


def fixed_point(activation: Activation, weight_var: float, bias_var: float) -> float:
    """Find the variance q* = V(q*) that deep layers settle at.

    Returns: q*; inf where the variance diverges, nan where every q stays as it is (ReLU at σw² = 2, linear at σw² = 1, σb² = 0).
    """
    if activation in HOMOGENEOUS:
        gain = weight_var * HOMOGENEOUS[activation]
        if gain < 1:
            return bias_var / (1 - gain)
        return math.nan if gain == 1 and bias_var == 0 else math.inf
    # V is increasing and concave with V(q) ≤ σw² + σb², so the positive root of V(q) - q is unique where there is one.
    low, high = 0.0, weight_var + bias_var
    if variance_map(0.0, activation, weight_var, bias_var) == 0:
        if weight_var * mean_square_derivative(activation, 0.0) <= 1:
            return 0.0
        low = (1 - 1 / weight_var) / 4  # tanh is left, and E[tanh²] ≥ q - 2q² puts the root above this
    return float(brentq(lambda q: variance_map(q, activation, weight_var, bias_var) - q, low, high, xtol=1e-15))


def mean_square_derivative(activation: Activation, q: float) -> float:
    """Integrate E[φ'(√q z)²]."""
    if activation in HOMOGENEOUS:
        return HOMOGENEOUS[activation]
    _, derivative = BOUNDED[activation]
    return gaussian_mean(lambda x: derivative(x) ** 2, q)


def chi(activation: Activation, weight_var: float, bias_var: float) -> float:
    """Compute χ = σw² E[φ'(√q* z)²], the mean squared singular value of J_l: the growth of ‖g‖² a layer."""
    return weight_var * mean_square_derivative(activation, fixed_point(activation, weight_var, bias_var))


def chi_profile(q: float, activation: Activation, weight_var: float, bias_var: float, depth: int) -> Float64[np.ndarray, " depth"]:
    """Compute χ_l = σw² E[φ'(√q_l z)²] at layers l = 1 … depth on the way to the fixed point, q_{l+1} = V(q_l) from q_1 = q."""
    profile = np.empty(depth)
    for layer in range(depth):
        profile[layer] = weight_var * mean_square_derivative(activation, q)
        q = variance_map(q, activation, weight_var, bias_var)
    return profile


def depth_scale(chi: float) -> float:
    """Compute ξ = -1/ln χ, the layers over which ‖g‖² falls by a factor e (Schoenholz et al. 2017, ξ_∇).

    Returns: ξ in layers; inf at χ = 1, and negative where gradients grow, -ξ then being the layers in which ‖g‖² gains a factor e.
    """
    if chi == 0:
        return 0.0
    return math.inf if chi == 1 else -1 / math.log(chi)


def critical_weight_var(activation: Activation, bias_var: float) -> float:
    """Find the σw² at which χ = 1, the edge between vanishing and exploding gradients at the given σb²."""
    low, high = 0.5, 2.0  # χ ≤ ½ at σw² = ½, for |φ'| ≤ 1
    while chi(activation, high, bias_var) < 1:
        high *= 2
    return float(brentq(lambda weight_var: chi(activation, weight_var, bias_var) - 1, low, high))


# σw² at which χ = 1 without biases: at q* = 0 for tanh (Poole et al. 2016), at every q for the homogeneous activations
CRITICAL_WEIGHT_VAR: dict[Activation, float] = {"linear": 1.0, "tanh": 1.0, "relu": 2.0}
