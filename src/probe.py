"""A linear probe: what a linear readout could tell from features as they are, fitted in closed form (Alain & Bengio 2016)."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn.functional import one_hot

RIDGE = 1e-6  # λ in units of the mean variance of a feature: the probe does not see by what all features are multiplied


def probe_accuracy(
    features: Float64[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    test_features: Float64[Tensor, "m d"],
    test_labels: Int64[Tensor, " m"],
    classes: int,
) -> float:
    """The share of test features told right by ridge regression of the one-hot labels, W = (XᵀX/n + λI)⁻¹XᵀY/n on centred features X.

    Args:
        features: that the probe is fitted to, frozen.
        labels: theirs.
        test_features: that it is tried on.
        test_labels: theirs.
        classes: number of labels; features that are all alike are told to be of the most frequent one.
    """
    centre, targets = features.mean(0), one_hot(labels, classes).to(features)
    X = features - centre
    covariance = X.T @ X / len(X)
    ridge = (RIDGE * covariance.diagonal().mean()).clamp(min=torch.finfo(X.dtype).tiny)
    W = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance)).to(X), X.T @ targets / len(X))
    scores = (test_features - centre) @ W + targets.mean(0)
    return float((scores.argmax(1) == test_labels).double().mean())
