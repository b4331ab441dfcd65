"""Ensembles against the same networks trained one by one."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from src.config import ModelConfig, TrainingConfig
from src.data.load import Data
from src.errors import UserError
from src.models import build
from src.models.exits import with_exits
from src.models.layers import Layers
from src.models.logistic import InTanhCoordinates
from src.training.ensemble import train_ensemble
from src.training.local import OneBlock, all_blocks, blockwise
from src.training.loop import CHECK_EVERY, Objective, Outcome, end_to_end, train
from src.training.objectives import DeepSupervision, ScaledSteps
from tests.training.sets import as_data, small_set
from tests.training.test_loop import Killed, Memory, config

CLASSES = 3
SGD = config(lr=0.05, momentum=0.9, weight_decay=0.01, epochs=4)
ADAM = replace(SGD, optimizer="adam", lr=0.003)
ALIKE = [SGD] * 3
UNLIKE = [SGD, replace(SGD, lr=0.02, schedule="constant"), replace(SGD, momentum=0.0, weight_decay=0.0)]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_config(**changes) -> ModelConfig:
    plain = {"init": "gaussian", "bias_var": 0.05, "norm": "none", "skip": "none", "branch_scale": 1.0}
    return ModelConfig(**{"family": "mlp", "depth": 5, "width": 8, "activation": "tanh", "weight_var": 1.5, **plain, **changes})


def images(side: int) -> Data:
    """400 training images, 25 batches an epoch."""
    if side == 3:
        return small_set(400)
    return as_data(torch.randint(256, (420, 2, side, side), generator=rng(0), dtype=torch.uint8), torch.arange(420) % CLASSES, 400)


def chains(data: Data, count: int = 3, **changes) -> list[nn.Module]:
    return [build(model_config(**changes), data.shape, CLASSES, rng(seed)) for seed in range(count)]


def blocks(data: Data, loss: str) -> list[nn.Module]:
    model = model_config(norm="batch")
    return [blockwise(chain, 2, loss, Layers(model, rng(seed + 50)), CLASSES) for seed, chain in enumerate(chains(data, norm="batch"))]


def exits(data: Data) -> list[nn.Module]:
    layers = [Layers(model_config(), rng(seed + 50)) for seed in range(3)]
    names = ["layer1", "layer2"]
    return [with_exits(chain, names, own, data.shape, CLASSES) for chain, own in zip(chains(data), layers, strict=True)]


def frozen(data: Data, *layers: int) -> list[nn.Module]:
    """The first two stages' biases, and those of further ones, aren't trained."""
    models = chains(data)
    for model in models:
        for layer in (0, 1, *layers):
            model[layer].linear.bias.requires_grad_(False)
    return models


def powers(exponent: float) -> nn.Module:
    chain = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    chain.exponent = exponent
    return chain


def one_by_one(
    models: Sequence[nn.Module], data: Data, configs: Sequence[TrainingConfig], objective: Callable[[], Objective], first: int = 0
):
    return [train(m, data, c, rng(first + seed), None, objective()) for seed, (m, c) in enumerate(zip(models, configs, strict=True))]


def together(
    models: Sequence[nn.Module], data: Data, configs: Sequence[TrainingConfig], objective: Objective = end_to_end
) -> list[Outcome]:
    return train_ensemble(models, data, configs, [rng(seed) for seed in range(len(models))], objective)


def assert_alike(
    models: Sequence[nn.Module],
    others: Sequence[nn.Module],
    outcomes: Sequence[Outcome],
    of_others: Sequence[Outcome],
    tolerance: float = 1e-5,
) -> None:
    for model, other, outcome, of_other in zip(models, others, outcomes, of_others, strict=True):
        assert (outcome.status, outcome.steps) == (of_other.status, of_other.steps)
        assert outcome.history.columns.equals(of_other.history.columns)
        torch.testing.assert_close(
            torch.tensor(outcome.history.values), torch.tensor(of_other.history.values), rtol=0, atol=tolerance, equal_nan=True
        )
        for name, value in other.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=tolerance, atol=tolerance, equal_nan=True)


# single precision's rounding grows beyond 1e-5 in 100 steps
AMPLIFIED = ["layer normalisation"]
CASES: dict[str, tuple[Callable[[Data], list[nn.Module]], int, list[TrainingConfig], Callable[[], Objective]]] = {
    "mlp, sgd": (chains, 3, ALIKE, lambda: end_to_end),
    "mlp, a rate each": (chains, 3, UNLIKE, lambda: end_to_end),
    "mlp, adam": (chains, 3, [ADAM] * 3, lambda: end_to_end),
    "mlp, an optimiser each": (chains, 3, [ADAM, SGD, ADAM], lambda: end_to_end),
    "batch normalisation": (lambda data: chains(data, norm="batch"), 3, UNLIKE, lambda: end_to_end),
    "layer normalisation": (lambda data: chains(data, norm="layer"), 3, ALIKE, lambda: end_to_end),
    "residual": (
        lambda data: chains(data, family="residual_mlp", depth=6, norm="batch", skip="preactivation"),
        3,
        ALIKE,
        lambda: end_to_end,
    ),
    "residual convolutions": (
        lambda data: chains(data, family="cifar", depth=8, width=4, norm="batch", skip="original", activation="relu"),
        4,
        ALIKE,
        lambda: end_to_end,
    ),
    "convolutions, adam": (lambda data: chains(data, family="vgg", depth=8, width=4), 8, [ADAM] * 3, lambda: end_to_end),
    "pred": (lambda data: blocks(data, "pred"), 3, UNLIKE, lambda: all_blocks),
    "predsim": (lambda data: blocks(data, "predsim"), 3, UNLIKE, lambda: all_blocks),
    "sim, one block": (lambda data: blocks(data, "sim"), 3, [ADAM] * 3, lambda: OneBlock(1)),
    "in another net's coordinates": (lambda data: [InTanhCoordinates(chain) for chain in chains(data)], 3, ALIKE, lambda: end_to_end),
    "scaled steps": (lambda data: chains(data, norm="batch"), 3, UNLIKE, lambda: ScaledSteps(0.1)),
    "some weights frozen": (frozen, 3, ALIKE, lambda: end_to_end),
    "deep supervision, fading": (exits, 3, UNLIKE, lambda: DeepSupervision({"layer1": 0.5}, fading=60)),
}


def compare(case: str, dtype: torch.dtype, tolerance: float) -> None:
    make, side, configs, objective = CASES[case]
    data = images(side)
    models = [model.to(dtype) for model in make(data)]
    start, alone = copy.deepcopy(models), copy.deepcopy(models)
    expected = one_by_one(alone, data, configs, objective)
    outcomes = together(models, data, configs, objective())
    assert {outcome.steps for outcome in outcomes} == {100}
    assert_alike(models, alone, outcomes, expected, tolerance)
    for model, before in zip(models, start, strict=True):
        assert (parameters_to_vector(model.parameters()) - parameters_to_vector(before.parameters())).abs().max() > 1e-2


@pytest.mark.parametrize("case", [case for case in CASES if case not in AMPLIFIED])
def test_an_ensemble_trains_as_its_members_would_alone(case: str) -> None:
    compare(case, torch.float32, 1e-5)


@pytest.mark.parametrize("case", [*AMPLIFIED, "batch normalisation"])
def test_in_double_precision_they_are_equal_to_its_rounding(case: str) -> None:
    compare(case, torch.float64, 1e-10)


def test_another_order_rate_or_start_would_be_seen() -> None:
    data = images(3)
    models = chains(data)
    outcomes = together(models, data, ALIKE)
    for first, configs, start in ((1, ALIKE, chains(data)), (0, UNLIKE, chains(data)), (0, ALIKE, chains(data)[::-1])):
        expected = one_by_one(start, data, configs, lambda: end_to_end, first)
        with pytest.raises(AssertionError):
            assert_alike(models, start, outcomes, expected)


def test_members_that_diverge_stop_and_the_others_go_on() -> None:
    data = images(3)
    # the weights of the third are tripled at every step
    configs = [replace(SGD, lr=1e38), SGD, replace(SGD, lr=40.0, weight_decay=0.1, momentum=0.0, schedule="constant"), SGD]
    models = chains(data, 4)
    alone, steps = copy.deepcopy(models), [[] for _ in models]
    expected = one_by_one(alone, data, configs, lambda: end_to_end)
    observers = [lambda step, total, own=own: own.append((step, total)) for own in steps]
    outcomes = train_ensemble(models, data, configs, [rng(seed) for seed in range(4)], end_to_end, observers)
    assert [outcome.status for outcome in outcomes] == ["diverged", "finished", "diverged", "finished"]
    assert outcomes[0].steps == CHECK_EVERY
    assert 50 < outcomes[2].steps < 100
    assert_alike([models[1], models[3]], [alone[1], alone[3]], [outcomes[1], outcomes[3]], [expected[1], expected[3]])
    for outcome, of_other, seen in zip(outcomes, expected, steps, strict=True):
        assert (outcome.status, outcome.steps, len(outcome.history)) == (of_other.status, of_other.steps, len(of_other.history))
        assert seen == [(step, 100) for step in range(1, outcome.steps + 1)]


def test_it_ends_when_all_have_diverged() -> None:
    data = images(3)
    calls = []

    def counted(model: nn.Module, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return end_to_end(model, batch, labels)

    outcomes = together(chains(data, activation="relu"), data, [replace(SGD, lr=1e6)] * 3, counted)
    assert {(outcome.status, outcome.steps) for outcome in outcomes} == {("diverged", CHECK_EVERY)}
    assert len(calls) == CHECK_EVERY


def test_an_observer_sees_its_member_as_it_is() -> None:
    data = images(3)
    models = chains(data, norm="batch")
    alone = copy.deepcopy(models[1])

    def look(model: nn.Module, step: int) -> torch.Tensor | None:
        model.eval()
        return parameters_to_vector(model.parameters()).detach().clone() if step % 2 else None

    expected = train(alone, data, SGD, rng(1), lambda step, total: look(alone, step)).seen
    orders = [rng(seed) for seed in range(3)]
    outcomes = train_ensemble(models, data, ALIKE, orders, end_to_end, [None, lambda step, total: look(models[1], step), None])
    assert [len(outcome.seen) for outcome in outcomes] == [0, 50, 0]
    torch.testing.assert_close(outcomes[1].seen, expected, rtol=1e-5, atol=1e-5)


def test_the_same_seeds_give_the_same_weights_bit_for_bit() -> None:
    data = images(3)
    first, second = chains(data, norm="batch"), chains(data, norm="batch")
    together(first, data, UNLIKE)
    together(second, data, UNLIKE)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_members_are_left_in_eval_mode_with_tensors_of_their_own() -> None:
    data = images(3)
    models = chains(data, norm="batch")
    held = [list(model.parameters()) for model in models]
    together(models, data, UNLIKE)
    assert not any(module.training for model in models for module in model.modules())
    tensors = [tensor for model in models for tensor in model.state_dict().values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert all(a is b for before, model in zip(held, models, strict=True) for a, b in zip(before, model.parameters(), strict=True))


def test_members_see_their_own_augmented_images() -> None:
    data = replace(images(8), augment=("crop", "flip", "cutout"))
    short = [replace(SGD, epochs=1)] * 3
    models = chains(data)
    alone, plain = copy.deepcopy(models), copy.deepcopy(models)
    expected = one_by_one(alone, data, short, lambda: end_to_end)
    outcomes = together(models, data, short)
    assert_alike(models, alone, outcomes, expected)
    with pytest.raises(AssertionError):
        assert_alike(models, plain, outcomes, one_by_one(plain, replace(data, augment=()), short, lambda: end_to_end))


@pytest.mark.parametrize("after", [(3,), (7, 12), (30, 9)])
def test_a_killed_ensemble_goes_on_bit_for_bit(after: tuple[int, ...]) -> None:
    """Of three members the second diverges, in its tenth step."""
    data, configs = replace(images(3), augment=("flip",)), [replace(each, epochs=2) for each in (ADAM, replace(SGD, lr=1e38), SGD)]

    steps: list[int] = []

    def look(model: nn.Module, step: int) -> float:
        steps.append(step)
        return float(parameters_to_vector(model.parameters()).sum().detach())

    def trained(keeper: Memory | None) -> tuple[list[nn.Module], list[Outcome]]:
        models, orders, objective = exits(data), [rng(seed) for seed in range(3)], DeepSupervision({"layer1": 0.5}, fading=30)
        observers = [lambda step, total, model=model: look(model, step) for model in models]
        return models, train_ensemble(models, data, configs, orders, objective, observers, keeper)

    (models, truth), kept = trained(None), None
    for left in after:
        memory = Memory(kept, left)
        with suppress(Killed):
            trained(memory)
        kept = memory.kept
    steps.clear()
    again, outcomes = trained(Memory(kept, math.inf))
    assert steps[0] == sum(after) + 1
    assert [outcome.status for outcome in outcomes] == ["finished", "diverged", "finished"]
    for outcome, of_other, model, other in zip(outcomes, truth, again, models, strict=True):
        assert (outcome.status, outcome.steps, repr(outcome.seen)) == (of_other.status, of_other.steps, repr(of_other.seen))
        pd.testing.assert_frame_equal(outcome.history, of_other.history, check_exact=True)
        torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_bf16_rounds_as_it_does_alone() -> None:
    data, models = images(3), chains(images(3))
    start, alone = copy.deepcopy(models), copy.deepcopy(models)
    configs = [replace(SGD, precision="bf16", max_steps=5)] * 3
    one_by_one(alone, data, configs, lambda: end_to_end)
    together(models, data, configs)
    for model, other, before in zip(models, alone, start, strict=True):
        moved, apart = (parameters_to_vector(x.parameters()) - parameters_to_vector(other.parameters()) for x in (before, model))
        assert apart.norm() < 0.1 * moved.norm()


def hooked(data: Data) -> list[nn.Module]:
    models = chains(data)
    models[1][2].register_forward_hook(lambda module, args, output: None)
    return models


def with_gradient_hook(data: Data) -> list[nn.Module]:
    models = chains(data)
    next(models[2].parameters()).register_hook(lambda gradient: 2 * gradient)
    return models


DIFFER = "their architectures differ"
REFUSED: dict[str, tuple[str, Callable[[Data], list[nn.Module]], list[TrainingConfig]]] = {
    "another width": (DIFFER, lambda data: [*chains(data, 2), *chains(data, 1, width=9)], ALIKE),
    "another constant": (DIFFER, lambda data: [powers(1.0), powers(1.0), powers(2.0)], ALIKE),
    "another frozen": (DIFFER, lambda data: [*frozen(data)[:2], frozen(data, 2)[2]], ALIKE),
    "another batch size": ("batch sizes, lengths or precisions differ", chains, [SGD, SGD, replace(SGD, batch_size=8)]),
    "shared": ("they share parameters", lambda data: [chains(data)[0]] * 3, ALIKE),
    "hooks": ("modules have hooks", hooked, ALIKE),
    "gradient hooks": ("parameters have hooks", with_gradient_hook, ALIKE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_networks_that_cannot_be_stacked_are_refused(case: str) -> None:
    reason, make, configs = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        together(make(images(3)), images(3), configs)


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.batch_size: 401 exceeds the 400 training images of small"):
        together(chains(images(3)), images(3), [replace(SGD, batch_size=401)] * 3)
