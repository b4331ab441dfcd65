"""Trainings side by side do for an experiment what they do one by one."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from src import trainings
from src.checkpoint import Checkpoint
from src.experiment import Context
from src.tracking import Silent
from src.training.loop import Outcome, end_to_end
from src.training.objectives import ScaledSteps
from src.training.together import train_together
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
    expected = [
        train_all(one_by_one, [Trainee(network, name, seed)])[0] for seed, (network, name) in enumerate(zip(alone, names, strict=True))
    ]
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


def test_only_those_alike_train_together_and_each_outcome_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two architectures, two objectives and two rates, mixed: the rates alone may train as one."""
    together, alone, groups = lab(8), lab(1), []

    def counted(networks: list[nn.Module], *others: object) -> list[Outcome]:
        groups.append(len(networks))
        return train_together(networks, *others)

    monkeypatch.setattr(trainings, "train_together", counted)

    def trainees(context: Context) -> list[Trainee]:
        usual, wide = context.config.model, replace(context.config.model, width=12)
        slow = replace(context.config.training, lr=context.config.training.lr / 2)
        asked = [(usual, end_to_end, None), (wide, end_to_end, None), (usual, ScaledSteps(0.5), None), (usual, end_to_end, slow)]
        return [
            Trainee(context.network(model, seed), f"{number}, seed {seed}", seed, objective, config=config)
            for seed in range(2)
            for number, (model, objective, config) in enumerate(asked)
        ]

    batched, single = trainees(together), trainees(alone)
    outcomes = train_all(together, batched)
    assert groups == [4, 2, 2]
    expected = [train_all(alone, [each])[0] for each in single]
    for a, b in zip(batched, single, strict=True):
        torch.testing.assert_close(dict(a.network.state_dict()), dict(b.network.state_dict()), rtol=1e-5, atol=1e-5)
    told = [torch.tensor([list(each.metrics().values()) for each in found]) for found in (outcomes, expected)]
    torch.testing.assert_close(*told, rtol=0, atol=1e-3)
    assert len({tuple(each.history.iloc[-1]) for each in outcomes}) == 8


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
