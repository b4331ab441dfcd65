"""The loop against NumPy written by hand, and its promises."""

import io
import math
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from src.config import TrainingConfig
from src.data.load import Data, Split
from src.errors import UserError
from src.training.loop import CHECK_EVERY, Outcome, batches, evaluate, lasting, planned_steps, train
from tests.training.sets import as_data, digits, small_set

COLUMNS = ["step", "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
DEFAULTS = {
    "optimizer": "sgd",
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.01,
    "batch_size": 16,
    "epochs": 3,
    "max_steps": None,
    "schedule": "cosine",
    "precision": "float32",
}


def config(**changes) -> TrainingConfig:
    return TrainingConfig(**{**DEFAULTS, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(*widths: int, norm: bool = False) -> nn.Sequential:
    """A ReLU network with Gaussian weights of variance 2/fan_in."""
    layers: list[nn.Module] = [nn.Flatten()]
    for k, (fan_in, fan_out) in enumerate(pairwise(widths)):
        affine = nn.Linear(fan_in, fan_out)
        nn.init.normal_(affine.weight, std=(2 / fan_in) ** 0.5, generator=generator(k))
        nn.init.zeros_(affine.bias)
        layers += [affine, nn.BatchNorm1d(fan_out), nn.ReLU()] if norm else [affine, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def by_hand(data: Data, W: np.ndarray, optimizer: str = "sgd", mu: float = 0.9, decay: float = 0.01, lr: float = 0.05, cosine: bool = True):
    """Softmax regression in NumPy, float64: three epochs of batches of 16."""
    x = data.standardise(data.train.images).flatten(1).double().numpy()
    y = np.eye(data.classes)[data.train.labels.numpy()]
    rng, size, v, s, t = generator(), 16, 0.0, 0.0, 0
    steps = 3 * (len(x) // size)
    for _ in range(3):
        order = torch.randperm(len(x), generator=rng).numpy()
        for k in range(len(x) // size):
            batch = order[k * size : (k + 1) * size]
            rate = lr * (1 + math.cos(math.pi * t / steps)) / 2 if cosine else lr
            t += 1
            g = (softmax(x[batch] @ W.T) - y[batch]).T @ x[batch] / size + decay * W
            if optimizer == "adam":
                v = mu * v + (1 - mu) * g
                s = 0.999 * s + 0.001 * g**2
                W = W - rate * (v / (1 - mu**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
            else:
                v = mu * v + g
                W = W - rate * v
    return W


def linear(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 3, bias=False, dtype=dtype))
    nn.init.normal_(model[1].weight, generator=generator(1))
    return model


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_training_is_the_hand_written_one(optimizer: str, schedule: str) -> None:
    data, model = small_set(), linear()
    start = model[1].weight.detach().numpy().copy()
    outcome = train(model, data, config(optimizer=optimizer, schedule=schedule), generator())
    end = model[1].weight.detach().numpy()
    truth = {"optimizer": optimizer, "cosine": schedule == "cosine"}
    assert outcome.steps == 9
    np.testing.assert_allclose(end, by_hand(data, start, **truth), rtol=0, atol=1e-12)
    for wrong in ({"mu": 0.0}, {"decay": 0.0}, {"lr": 0.051}, {"cosine": schedule != "cosine"}):
        assert np.abs(end - by_hand(data, start, **{**truth, **wrong})).max() > 1e-4


def test_float32_training_is_the_hand_written_one_to_its_rounding() -> None:
    data, model = small_set(), linear(torch.float32)
    start = model[1].weight.detach().double().numpy()
    train(model, data, config(), generator())
    np.testing.assert_allclose(model[1].weight.detach().numpy(), by_hand(data, start), rtol=0, atol=1e-6)


def test_the_same_seeds_give_the_same_weights_bit_for_bit() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = network(18, 16, 16, 3, norm=True)
        train(model, small_set(), config(), generator(seed))
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_order_does_not_depend_on_the_model() -> None:
    def order(*widths: int) -> torch.Tensor:
        rng = generator()
        train(network(*widths), small_set(), config(), rng)
        return rng.get_state()

    assert torch.equal(order(18, 3), order(18, 40, 40, 3))


def test_an_epoch_sees_every_image_once_but_the_last_partial_batch() -> None:
    split = Split(torch.zeros(50, 1, 1, 1, dtype=torch.uint8), torch.arange(50))
    stream = batches(split, 16, generator())
    first, second = (torch.cat([next(stream)[1] for _ in range(3)]) for _ in range(2))
    assert len(first.unique()) == len(second.unique()) == 48
    assert not torch.equal(first, second)


def test_images_keep_their_labels() -> None:
    split = Split(torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1), torch.arange(50))
    images, labels = next(batches(split, 16, generator()))
    assert torch.equal(images.flatten().long(), labels)


def test_global_random_state_is_untouched() -> None:
    model = network(18, 8, 3)
    before = torch.get_rng_state()
    train(model, small_set(), config(), generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_history_has_a_row_before_after_every_epoch_and_at_the_end() -> None:
    outcome = train(linear(), small_set(), config(max_steps=7), generator())
    history = outcome.history
    assert (outcome.status, outcome.steps) == ("finished", 7)
    assert list(history.columns) == COLUMNS
    assert history["step"].tolist() == [0, 3, 6, 7]
    assert history["epoch"].tolist() == pytest.approx([0, 1, 2, 7 / 3])
    assert history["lr"].tolist() == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 7)) / 2 for t in (0, 3, 6, 7)])


def test_max_steps_beyond_the_epochs_changes_nothing() -> None:
    assert train(linear(), small_set(), config(max_steps=100), generator()).steps == 9


def test_every_step_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    train(linear(), small_set(), config(epochs=1), generator(), lambda step, total: seen.append((step, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_hook_that_evaluates_does_not_move_the_training() -> None:
    data, quiet, watched = small_set(), network(18, 16, 3, norm=True), network(18, 16, 3, norm=True)
    train(quiet, data, config(), generator())
    train(watched, data, config(), generator(), lambda step, total: evaluate(watched, data, data.test))
    assert all(torch.equal(a, b) for a, b in zip(quiet.state_dict().values(), watched.state_dict().values(), strict=True))


def test_metrics_are_those_computed_by_hand() -> None:
    data, model = small_set(train=10, test=2300), linear()  # three chunks
    model.train()
    loss, accuracy = evaluate(model, data, data.test)
    assert not model.training
    p = softmax(data.standardise(data.test.images).flatten(1).double().numpy() @ model[1].weight.detach().numpy().T)
    labels = data.test.labels.numpy()
    assert loss == pytest.approx(-np.log(p[np.arange(2300), labels]).mean(), rel=1e-12)
    assert accuracy == pytest.approx((p.argmax(1) == labels).mean(), rel=1e-12)
    assert loss != pytest.approx(evaluate(model, data, data.train)[0], rel=1e-3)


def test_train_metrics_are_those_of_the_first_two_thousand() -> None:
    data, model = small_set(train=2100), linear()
    row = train(model, data, config(max_steps=1), generator()).history.iloc[-1]
    first = Split(data.train.images[:2000], data.train.labels[:2000])
    assert (row["train_loss"], row["train_accuracy"]) == evaluate(model, data, first)
    assert row["train_loss"] != evaluate(model, data, data.train)[0]
    assert (row["test_loss"], row["test_accuracy"]) == evaluate(model, data, data.test)


def test_the_model_is_left_in_eval_mode_and_batchnorm_has_learnt_its_statistics() -> None:
    model = network(18, 16, 3, norm=True)
    train(model, small_set(), config(), generator())
    assert not model.training
    assert model[2].num_batches_tracked == 9
    assert not torch.equal(model[2].running_mean, torch.zeros(16))


def test_divergence_is_an_outcome() -> None:
    outcome = train(network(18, 16, 16, 16, 3), small_set(320), config(lr=1e6, epochs=15), generator())
    assert outcome.status == "diverged"
    assert outcome.steps == CHECK_EVERY  # of 300
    assert outcome.history["step"].tolist() == [0, CHECK_EVERY]
    assert outcome.history["test_loss"].isna().tolist() == [False, True]


def test_divergence_in_the_last_step_is_seen_in_the_weights() -> None:
    model = linear(torch.float32)
    outcome = train(model, small_set(), config(lr=3e38, momentum=0.0, weight_decay=10.0, max_steps=1), generator())
    assert (outcome.status, outcome.steps) == ("diverged", 1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_is_divergence(wrong: float) -> None:
    model = linear()

    def spoil(step: int, total: int) -> None:
        with torch.no_grad():
            model[1].weight[1, 2] = wrong

    assert train(model, small_set(), config(max_steps=1), generator(), spoil).status == "diverged"


def test_a_network_that_overflows_in_eval_mode_at_the_start_may_still_learn() -> None:
    model = network(18, 16, 16, 16, 3, norm=True)
    with torch.no_grad():
        for layer in (model[1], model[4], model[7]):
            layer.weight.mul_(1e15)  # batch normalisation takes it out, its running variance of 1 does not yet
    outcome = train(model, small_set(), config(), generator())
    assert not np.isfinite(outcome.history["train_loss"].iloc[0])
    assert outcome.status == "finished"


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.batch_size: 51 exceeds the 50 training images of small"):
        train(linear(), small_set(), config(batch_size=51), generator())
    assert train(linear(), small_set(), config(batch_size=50), generator()).steps == 3


def test_bf16_rounds_and_still_learns() -> None:
    data, exact, rounded = digits(), network(64, 32, 10), network(64, 32, 10)
    train(exact, data, config(batch_size=32, epochs=2), generator())
    outcome = train(rounded, data, config(batch_size=32, epochs=2, precision="bf16"), generator())
    assert outcome.history["test_accuracy"].iloc[-1] > 0.85
    assert rounded[1].weight.dtype == torch.float32
    assert not torch.equal(rounded[1].weight, exact[1].weight)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adam", 0.005)])
def test_learns_digits_and_nothing_from_shuffled_labels(optimizer: str, lr: float) -> None:
    data, settings = digits(), config(optimizer=optimizer, lr=lr, weight_decay=0.0, batch_size=64, epochs=8)
    history = train(network(64, 64, 10), data, settings, generator()).history
    assert history["test_accuracy"].iloc[0] < 0.3
    assert history["test_accuracy"].iloc[-1] > 0.9
    images, labels = (torch.cat([getattr(data.train, part), getattr(data.test, part)]) for part in ("images", "labels"))
    shuffled = as_data(images, labels[torch.randperm(len(labels), generator=generator())], len(data.train))
    assert train(network(64, 64, 10), shuffled, settings, generator()).history["test_accuracy"].iloc[-1] < 0.3


@pytest.mark.parametrize("steps", [1, 4, 5, 13])
def test_a_training_lasts_as_many_steps_as_it_is_told(steps: int) -> None:
    """A hundred images are four batches of 24 an epoch."""
    longer = lasting(config(batch_size=24, max_steps=2), steps, 100)
    assert planned_steps(longer, 100) == steps
    assert longer.epochs == -(-steps // 4)


def test_a_part_that_a_look_puts_into_eval_mode_is_trained_on() -> None:
    """BatchNorm in eval mode would freeze its statistics; the whole is still in training mode when only a part was looked at."""
    statistics = []
    for look in (lambda model: None, lambda model: model[2].eval()):
        model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        nn.init.constant_(model[1].weight, 0.1)
        nn.init.constant_(model[3].weight, 0.1)
        for layer in (model[1], model[3]):
            nn.init.zeros_(layer.bias)

        def looking(step: int, steps: int, model: nn.Sequential = model, look=look) -> None:
            look(model)

        train(model, small_set(), config(), generator(), looking)
        statistics.append(model[2].running_mean.clone())
    assert torch.equal(*statistics)
    assert statistics[0].abs().max() > 0


class Killed(BaseException):
    """As a signal would end it."""


class Memory:
    """A keeper that is written at every step, and killed after some."""

    def __init__(self, kept: bytes | None, left: float) -> None:
        self.kept, self.left = kept, left

    @property
    def due(self) -> bool:
        return True

    def load(self) -> dict[str, Any] | None:
        return torch.load(io.BytesIO(self.kept), weights_only=True) if self.kept else None

    def keep(self, training: dict[str, Any]) -> None:
        torch.save(training, buffer := io.BytesIO())
        self.kept = buffer.getvalue()
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adam", "weight_decay": 0.0}, {"schedule": "constant", "max_steps": 8}, {"lr": 1e6}])
@pytest.mark.parametrize("after", [(1,), (5,), (3, 1, 2), (9,), (2,) * 10])
def test_a_killed_training_goes_on_bit_for_bit(changes: dict, after: tuple[int, ...]) -> None:
    data, settings = small_set(), config(**changes)

    def trained(model: nn.Sequential, keeper: Memory | None) -> Outcome:
        return train(model, data, settings, generator(), lambda step, total: float(model[1].weight.sum().detach()), keeper=keeper)

    undisturbed, kept = network(18, 16, 16, 3, norm=True), None
    truth = trained(undisturbed, None)
    for left in after:
        memory = Memory(kept, left)
        with suppress(Killed):
            trained(network(18, 16, 16, 3, norm=True), memory)
        kept = memory.kept
    again = network(18, 16, 16, 3, norm=True)
    outcome = trained(again, Memory(kept, math.inf))
    assert (outcome.status, outcome.steps, repr(outcome.seen)) == (truth.status, truth.steps, repr(truth.seen))
    assert len(outcome.seen) == outcome.steps
    pd.testing.assert_frame_equal(outcome.history, truth.history, check_exact=True)
    assert_close(again.state_dict(), undisturbed.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert not any(module.training for module in again.modules())


def test_a_finished_training_is_not_made_again() -> None:
    memory = Memory(None, math.inf)
    train(network(18, 3), small_set(), config(), generator(), keeper=memory)
    steps: list[int] = []
    train(network(18, 3), small_set(), config(), generator(), lambda step, total: steps.append(step), keeper=memory)
    assert steps == []


def test_batches_that_are_passed_over_are_the_first() -> None:
    split = Split(torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1), torch.arange(50))
    every, later = (batches(split, 16, generator(), passed) for passed in (0, 4))
    labels = [next(every)[1] for _ in range(8)]
    assert all(torch.equal(next(later)[1], expected) for expected in labels[4:])
