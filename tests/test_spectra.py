"""Dense stages measured at once, against the same measured one by one and written out."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from src import cost, spectra
from src.certificate import certify
from tests.jacobian.networks import normal, seeded

LABELS = torch.tensor([0, 1, 2])


def chain(*widths):
    """A tanh chain and a linear head."""
    hidden = [nn.Sequential(nn.Linear(d, m), nn.Tanh()) for d, m in pairwise(widths)]
    return seeded(nn.Sequential(*hidden, nn.Linear(widths[-1], 3)))


@pytest.mark.parametrize("most", [0, 1, 2, 100])
def test_as_many_as_fit_are_measured_at_once_and_the_answer_is_the_same(most, monkeypatch):
    """Heights 8, 8, 8, 6, 6 and 3: runs of three, two and one."""
    model, x = chain(10, 8, 8, 8, 6, 6), normal(3, 10)
    exact = certify(model, x, LABELS, method="exact").layers
    calls = []
    measured = spectra.structured.extremes

    def counted(stages, start):
        calls.append(len(stages))
        return measured(stages, start)

    monkeypatch.setattr(spectra.structured, "extremes", counted)
    monkeypatch.setattr(cost, "FACTORISED", 0)
    # of the highest; of a lower height more fit
    monkeypatch.setattr(spectra, "STACK_BYTES", 8 * 8 * (3 * 8 + 50 * 3) * most)
    found = certify(model, x, LABELS).layers
    assert set(found["method"]) == {"factorised"}
    assert sum(calls) == 6
    if most == 100:
        assert calls == [1, 2, 3]
    if most == 0:
        assert calls == [1] * 6
    for quantity in ("norm", "sigma_min", "cond"):
        np.testing.assert_allclose(found[quantity], exact[quantity], rtol=1e-5)
        assert (found[f"{quantity}_lo"] <= exact[quantity] * (1 + 1e-9)).all()
        assert (exact[quantity] <= found[f"{quantity}_hi"] * (1 + 1e-9)).all()
    assert found["rank"].tolist() == exact["rank"].tolist()
