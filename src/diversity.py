"""How much the states of a batch differ from one another: what a chain has kept apart on its way forwards.

All three measures are blind to a common factor on the states. H is N×d, a state a row, σ its singular values, ĥ_n = h_n/‖h_n‖.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, pdist

from src.spectrum import spectrum


def rank(states: Float[Tensor, "n ..."]) -> int:
    """Numerical rank of H.

    Args:
        states: h_n, one a sample.
    """
    return int(spectrum(states.flatten(1)).rank)


def participation_ratio(states: Float[Tensor, "n ..."]) -> float:
    """(Σλ)²/Σλ² over the eigenvalues λ = σ² of the Gram matrix HHᵀ: the number of directions that the states spread over evenly.

    1 for proportional states, N for orthogonal ones of equal length (Gao et al. 2017, bioRxiv 214262, there of the
    covariance); NaN for H = 0.

    Args:
        states: h_n, one a sample.
    """
    shares = spectrum(states.flatten(1)).values
    shares = (shares / shares[0]).square()
    return float(shares.sum().square() / shares.square().sum())


def dissimilarity(states: Float[Tensor, "n ..."]) -> float:
    """1 − c, c the mean cosine of two different samples' states: 0 where all states are proportional, 1 where they are orthogonal.

    It is the mean of ½‖ĥ_n − ĥ_m‖², and is taken as such: 1 − c itself ends at the rounding of 1. A state 0 stands for ĥ = 0.

    Args:
        states: h_n, one a sample, at least two.
    """
    directions = normalize(states.flatten(1).double(), eps=torch.finfo(torch.float64).tiny)
    return float(pdist(directions).square().mean() / 2)
