"""How wide ensembles are, and that their groups train as one by one."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from src.config import TrainingConfig
from src.errors import UserError
from src.training import together
from src.training.loop import Objective, end_to_end
from src.training.objectives import DeepSupervision
from src.training.together import ensemble_width, member_bytes, train_together
from tests.training.sets import small_set
from tests.training.test_ensemble import assert_alike, chains, exits, images, one_by_one, rng, with_gradient_hook
from tests.training.test_loop import config

SHORT = config(epochs=1, max_steps=6)


def width(models: Sequence[nn.Module], training: TrainingConfig = SHORT, objective: Objective = end_to_end) -> int:
    return ensemble_width(models, images(3), [training] * len(models), objective)


def asked(count: int) -> TrainingConfig:
    return replace(SHORT, ensemble=count)


def test_auto_takes_all_narrow_dense_networks() -> None:
    assert width(chains(images(3), 7, norm="batch")) == 7


def test_auto_takes_one_where_batching_does_not_pay_on_a_cpu() -> None:
    assert width(chains(images(3), 3)) == 1
    assert width(chains(images(3), 4)) == 4
    assert width(chains(images(3), 4, width=300), replace(SHORT, batch_size=16)) == 4
    assert width(chains(images(3), 4, width=300), replace(SHORT, batch_size=64)) == 1
    assert width(chains(images(8), 4, family="cifar", depth=8)) == 1


def test_auto_takes_one_of_networks_that_cannot_be_stacked() -> None:
    assert width([*chains(images(3), 4), *chains(images(3), 1, depth=6)]) == 1
    assert width([*with_gradient_hook(images(3)), *chains(images(3), 2)]) == 1


def branching(model: nn.Module, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss = end_to_end(model, batch, labels)
    return loss if loss > 0 else 2 * loss


def noisy(model: nn.Module, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return end_to_end(model, batch + torch.randn_like(batch), labels)


@pytest.mark.parametrize("objective", [branching, noisy])
def test_objectives_that_cannot_be_mapped_are_minimised_one_by_one(objective: Objective) -> None:
    models = chains(images(3), 5)
    assert width(models, SHORT, objective) == 1
    with pytest.raises(UserError, match=r"training\.ensemble: 5 of these networks can't train as one.* vmap"):
        width(models, asked(5), objective)


def test_auto_keeps_within_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    models = chains(images(3), 9)
    monkeypatch.setitem(together.MEMORY, "cpu", 4 * member_bytes(models[0], images(3), SHORT, end_to_end) + 1)
    assert width(models) == 4


def test_the_memory_of_a_member_is_that_of_what_it_keeps() -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(18, 30, bias=False), nn.Tanh(), nn.Linear(30, 3, bias=False)), small_set()
    parameters = 4 * (18 * 30 + 30 * 3)
    kept = member_bytes(model, data, SHORT, end_to_end) - 3 * parameters
    # images, hidden units, logits and labels, and the second weights
    activations = 16 * (4 * (18 + 30 + 3) + 8) + 4 * 30 * 3
    assert activations <= kept / 2 <= 1.01 * activations
    assert member_bytes(model, data, replace(SHORT, optimizer="adam"), end_to_end) - kept == 4 * parameters


def test_it_looks_at_copies_only() -> None:
    models, objective = chains(images(3), 4, norm="batch"), DeepSupervision({})
    before = copy.deepcopy([model.state_dict() for model in models])
    width(models)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.training
    width(exits(images(3)) + exits(images(3)), SHORT, objective)
    assert objective.evaluations == 0


def test_a_width_that_is_asked_for_is_taken() -> None:
    models = chains(images(3), 3)
    assert [width(models, asked(count)) for count in (1, 2, 3, 8)] == [1, 2, 3, 3]
    with pytest.raises(UserError, match=r"training\.ensemble: 2 of these networks can't train as one, for their architectures differ"):
        width([*models, *chains(images(3), 1, depth=6)], asked(2))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_train_as_one_by_one(count: int) -> None:
    data, seen = images(3), [[], [], []]
    models = exits(data)
    alone = copy.deepcopy(models)
    expected = one_by_one(alone, data, [SHORT] * 3, lambda: DeepSupervision({"layer1": 0.5}, fading=6))
    observers = [lambda step, total, own=own: own.append(step) for own in seen]
    objective = DeepSupervision({"layer1": 0.5}, fading=6)
    outcomes = train_together(models, data, [asked(count)] * 3, [rng(seed) for seed in range(3)], objective, observers)
    assert_alike(models, alone, outcomes, expected)
    assert seen == [[1, 2, 3, 4, 5, 6]] * 3
    if count == 1:
        assert all(
            torch.equal(a, b) for x, y in zip(models, alone, strict=True) for a, b in zip(x.parameters(), y.parameters(), strict=True)
        )
