"""Plans: what they count, and the estimate that they print."""

from dataclasses import replace
from functools import partial

import pytest
from torch import nn

from src import plan
from src.config import Config, ModelConfig
from src.data.load import Data
from src.plan import Work, describe, estimated_seconds, networks_and_steps
from tests.experiments.measured import config as composed
from tests.experiments.measured import digits


@pytest.fixture
def config() -> Config:
    return composed("vanishing_products")


@pytest.fixture
def data() -> Data:
    return digits(256, 100)


@pytest.fixture
def model(config: Config) -> ModelConfig:
    return replace(config.model, width=8, depth=4)


def test_networks_and_steps_are_summed(model: ModelConfig) -> None:
    works = [Work(model, 3), Work(replace(model, depth=2), 2, steps=10), Work(model, 1, steps=5, measuring=len)]
    assert networks_and_steps(works) == (6, 25)
    assert networks_and_steps([]) == (0, 0)


def test_the_estimate_is_linear_in_depth_networks_and_steps(
    model: ModelConfig, config: Config, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a pass of 3 s and ¼ s a layer, and twice that for what is measured."""

    def timed(action: partial) -> float:
        layers = sum(isinstance(layer, nn.Linear) for layer in action.args[0].modules())
        return (3 + layers / 4) * {plan._pass: 1, len: 2}[action.func]

    monkeypatch.setattr(plan, "_timed", timed)
    deep, deepest = replace(model, depth=12), replace(model, depth=20)
    # 100 test and 256 training images, in batches of 64 a third of a step each; before, after and after each epoch of 4 steps
    evaluations = (2 + 10 // 4) * (100 + 256) / 64 / 3
    config = replace(config, training=replace(config.training, batch_size=64))
    assert estimated_seconds([Work(model, 1)], config, data) == 4
    assert estimated_seconds([Work(deep, 5), Work(deepest, 2), Work(model, 1)], config, data) == 5 * 6 + 2 * 8 + 4
    assert estimated_seconds([Work(model, 2, steps=10)], config, data) == pytest.approx(2 * 4 * (11 + evaluations))
    assert estimated_seconds([Work(model, 2, measuring=len)], config, data) == 2 * 8
    both = [Work(model, 2, steps=10, measuring=len), Work(model, 1)]
    assert estimated_seconds(both, config, data) == pytest.approx(2 * (8 + 4 * (10 + evaluations)) + 4)
    assert estimated_seconds([], config, data) == 0


@pytest.mark.parametrize(("seconds", "told"), [(12.3, "12 s"), (130.0, "2 min"), (7300.0, "2.0 h")])
def test_the_plan_is_one_line(
    seconds: float, told: str, model: ModelConfig, config: Config, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "estimated_seconds", lambda *_: seconds)
    assert describe([Work(model, 1_200, steps=5)], config, data) == f"plan: 1,200 networks, 6,000 training steps, very roughly {told}"


def test_it_is_timed_for_real(model: ModelConfig, config: Config, data: Data) -> None:
    assert 0 < estimated_seconds([Work(model, 1, steps=1, measuring=lambda network: list(network.parameters()))], config, data) < 60
