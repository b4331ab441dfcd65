"""Which method a stage is given, and what it is said to cost."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from src import cost
from src.certificate import certify
from src.chain import cut
from src.cost import described, plan
from tests.jacobian.networks import normal, seeded

LABELS = torch.tensor([0, 1, 2])


def planned(model, x, method="auto"):
    chain = cut(model, None, torch.float64, "eval")
    return plan(chain, chain.states(x.double()), method)


def test_every_stage_gets_the_method_that_tells_most_within_bounds(monkeypatch):
    model, x = nn.Sequential(nn.Sequential(nn.Linear(9, 8), nn.Tanh()), nn.Softmax(1), nn.Linear(8, 3)), normal(3, 9)
    assert [entry.method for entry in planned(model, x)] == ["exact"] * 3
    assert [entry.layer for entry in planned(model, x)] == ["0", None, ""]
    monkeypatch.setattr(cost, "FACTORISED", 3 * 8 * 8 * 8)
    assert [entry.method for entry in planned(model, x)] == ["factorised", "exact", "exact"]
    monkeypatch.setattr(cost, "BUDGET", 2 * cost.SVD * 3 * 8 * 8 * 8 - 1)
    assert [entry.method for entry in planned(model, x)] == ["factorised", "matrix_free", "exact"]
    monkeypatch.setattr(cost, "BUDGET", 4 * 8 * 8 * 9 + 4 * cost.STEPS * 3 * 8 * 8 - 1)  # too much for one factorisation
    assert [entry.method for entry in planned(model, x)] == ["matrix_free", "matrix_free", "exact"]
    assert [entry.method for entry in planned(model, x, "exact")] == ["exact"] * 3
    assert [entry.method for entry in planned(model, x, "matrix_free")] == ["matrix_free"] * 3


def test_a_jacobian_costs_a_pass_backwards_for_every_row(monkeypatch):
    conv, x = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False)), normal(3, 2, 4, 4)
    forward, rows = 2 * 3 * 2 * 4 * 9 * 16, 4 * 16
    (written,) = planned(conv, x)
    assert written.method == "exact"
    assert written.gflop * 1e9 == pytest.approx(2 * cost.SVD * 3 * 64 * 32 * 32 + rows * forward)
    monkeypatch.setattr(cost, "BUDGET", written.gflop * 1e9 - 1)
    assert planned(conv, x)[0].method == "matrix_free"


def test_the_cost_grows_as_the_work_does():
    (small,), (wide,) = (planned(nn.Sequential(nn.Linear(width, width)), normal(3, width)) for width in (8, 16))
    assert wide.gflop == pytest.approx(8 * small.gflop)
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False))
    (free,) = planned(conv, normal(3, 2, 8, 8), "matrix_free")
    assert free.gflop * 1e9 == 2 * cost.STEPS * (2 * 3 * 2 * 4 * 9 * 64)


def test_the_time_of_products_is_that_of_passes_that_were_timed(monkeypatch):
    conv, x = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1)), normal(3, 2, 8, 8)
    (written,), (free,) = planned(conv, x, "exact"), planned(conv, x, "matrix_free")
    assert written.seconds == 0 < free.seconds
    monkeypatch.setattr(cost, "_rate", lambda *_: 1.0)
    line = described([replace(written, gflop=30.0), replace(free, seconds=12.0)], torch.device("cpu"), torch.float64)
    assert line.endswith("about 42 s")


def test_who_watches_is_told_the_plan_and_how_far_it_is():
    model, x = seeded(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))), normal(3, 6)
    calls = []
    certify(model, x, LABELS, watch=lambda planned, done: calls.append((planned, done)))
    assert [done for _, done in calls] == [0, 1, 2, 3]
    assert [entry.stage for entry in calls[0][0]] == ["0", "1", "2"]
    line = described(calls[0][0], torch.device("cpu"), torch.float64)
    assert re.fullmatch(r"plan: 3 stages \(3 exact\), \S+ GFLOP, about \d+ s", line)
