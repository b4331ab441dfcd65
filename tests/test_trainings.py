"""Trainings side by side do for an experiment what `context.train` does one by one."""

from dataclasses import dataclass, field

import pytest
import torch

from src.experiment import Context
from src.tracking import Silent
from src.trainings import train_all
from tests.experiments.measured import context as small


@dataclass
class Recording(Silent):
    curves: dict[str, dict[str, list]] = field(default_factory=dict)

    def curve(self, name: str, history: dict[str, list]) -> None:
        self.curves[name] = history


def lab(ensemble: int) -> Context:
    plain = small("wide_layers", f"training.ensemble={ensemble}", "training.max_steps=5")
    return Context(plain.config, plain.data, plain.device, Recording())


@pytest.mark.parametrize("ensemble", [1, 3])
def test_they_are_told_logged_and_counted_as_one_by_one(ensemble: int) -> None:
    one_by_one, together = lab(1), lab(ensemble)
    names = [f"seed {seed}" for seed in range(3)]
    alone, networks = ([each.network(each.config.model, seed) for seed in range(3)] for each in (one_by_one, together))
    expected = [one_by_one.train(network, name, seed) for seed, (network, name) in enumerate(zip(alone, names, strict=True))]
    outcomes = train_all(together, networks, names, range(3))
    assert [(outcome.status, outcome.steps) for outcome in outcomes] == [(outcome.status, outcome.steps) for outcome in expected]
    for a, b in zip(alone, networks, strict=True):
        torch.testing.assert_close(dict(b.state_dict()), dict(a.state_dict()), rtol=1e-5, atol=1e-5)
    assert together.tally == one_by_one.tally
    assert list(together.tracker.curves) == list(one_by_one.tracker.curves) == names
    assert all(curve["step"] == [0, 5] for curve in together.tracker.curves.values())
    assert set(together.seconds) == set(names)
    assert min(together.seconds.values()) > 0
