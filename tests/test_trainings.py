"""Trainings side by side do for an experiment what `context.train` does one by one."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from src.checkpoint import Checkpoint
from src.experiment import Context
from src.tracking import Silent
from src.trainings import Trainee, train_all
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
    watched = [
        Trainee(network, name, seed, on_step=partial(divmod, 10 + seed))
        for seed, (network, name) in enumerate(zip(networks, names, strict=True))
    ]
    outcomes = train_all(together, watched)
    assert [(outcome.status, outcome.steps) for outcome in outcomes] == [(outcome.status, outcome.steps) for outcome in expected]
    for a, b in zip(alone, networks, strict=True):
        torch.testing.assert_close(dict(b.state_dict()), dict(a.state_dict()), rtol=1e-5, atol=1e-5)
    assert [outcome.seen for outcome in outcomes] == [{step: divmod(10 + seed, step) for step in range(1, 6)} for seed in range(3)]
    assert together.tally == one_by_one.tally
    assert list(together.tracker.curves) == list(one_by_one.tracker.curves) == names
    assert all(curve["step"] == [0, 5] for curve in together.tracker.curves.values())
    assert set(together.seconds) == set(names)
    assert min(together.seconds.values()) > 0


def test_they_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    def trained(folder: Path | None) -> tuple[list[dict[str, torch.Tensor]], Context]:
        context = replace(lab(2), checkpoint=Checkpoint(folder, {}) if folder else None)
        networks = [context.network(context.config.model, seed) for seed in range(3)]
        train_all(context, [Trainee(network, f"seed {seed}", seed) for seed, network in enumerate(networks)])
        return [dict(network.state_dict()) for network in networks], context

    truth, _ = trained(None)
    _, context = trained(tmp_path)
    context.checkpoint.write()
    assert len(list(tmp_path.glob("training-*"))) == 2  # of one network, and of an ensemble of two
    again, resumed = trained(tmp_path)
    assert resumed.seconds == context.seconds  # nothing was done again
    assert resumed.tally["steps"] == context.tally["steps"] == 15
    for network, other in zip(again, truth, strict=True):
        torch.testing.assert_close(network, other, rtol=0, atol=0)
