"""The linear probe against ridge regression written with NumPy, and what it must not see."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from src.probe import RIDGE, probe_accuracy

CLASSES = 3


def features(count: int, seed: int, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes at three corners, well apart compared with the noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, width, dtype=torch.float64, generator=generator)
    return noise + 1.5 * torch.eye(CLASSES, width, dtype=torch.float64)[labels], labels


def test_it_is_ridge_regression_of_the_one_hot_labels() -> None:
    (X, y), (X_test, y_test) = features(60, 0), features(200, 1)
    variance = X.numpy().var(axis=0).mean()
    ridge = Ridge(alpha=RIDGE * variance * len(X)).fit(X.numpy(), np.eye(CLASSES)[y])
    expected = (ridge.predict(X_test.numpy()).argmax(1) == y_test.numpy()).mean()
    assert probe_accuracy(X, y, X_test, y_test, CLASSES) == expected
    assert 0.5 < expected < 1


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_it_sees_neither_scale_nor_offset(scale: float) -> None:
    (X, y), (X_test, y_test) = features(60, 0), features(200, 1)
    plain = probe_accuracy(X, y, X_test, y_test, CLASSES)
    assert probe_accuracy(scale * X, y, scale * X_test, y_test, CLASSES) == plain
    assert probe_accuracy(X + 7, y, X_test + 7, y_test, CLASSES) == plain


def test_features_that_are_all_alike_are_told_to_be_of_the_most_frequent_class() -> None:
    y, y_test = torch.tensor([0, 2, 2, 1]), torch.tensor([2, 0, 2, 1, 2])
    assert probe_accuracy(torch.ones(4, 3).double(), y, torch.ones(5, 3).double(), y_test, CLASSES) == pytest.approx(3 / 5)


def test_features_that_depend_on_each_other_have_a_probe() -> None:
    (X, y), (X_test, y_test) = features(60, 0), features(200, 1)
    twice, twice_test = torch.cat([X, X], dim=1), torch.cat([X_test, X_test], dim=1)
    assert probe_accuracy(twice, y, twice_test, y_test, CLASSES) == pytest.approx(probe_accuracy(X, y, X_test, y_test, CLASSES), abs=0.01)


def test_what_no_line_separates_it_does_not_tell() -> None:
    """The exclusive or: half of the images at best."""
    X = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0])
    assert probe_accuracy(X.repeat(5, 1), y.repeat(5), X, y, 2) <= 0.75
