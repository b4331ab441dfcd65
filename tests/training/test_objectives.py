"""Deep supervision against sums written by hand."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from src.config import ModelConfig, TrainingConfig
from src.models import build
from src.models.exits import MultiExit, with_exits
from src.models.layers import Layers
from src.training.loop import Stateful, end_to_end, train
from src.training.objectives import DeepSupervision, exit_losses
from tests.training.sets import small_set

MODEL = ModelConfig("mlp", 4, 6, "tanh", "gaussian", 1.5, 0.3, "none", "none", 1.0)
TRAINING = TrainingConfig("sgd", 0.05, 0.9, 0.01, 16, 3, None, "cosine", "float32")
SHAPE, CLASSES = (2, 3, 3), 3


def network(*names: str) -> MultiExit:
    chain = build(MODEL, SHAPE, CLASSES, torch.Generator().manual_seed(0))
    return with_exits(chain, names, Layers(MODEL, torch.Generator().manual_seed(1)), SHAPE, CLASSES)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2, 1, 0])


def by_hand(model: MultiExit, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """−mean ln p_y of the heads behind stages 1, 2, 3 and of the chain, one sample and one class at a time."""
    losses, state = [], images.flatten(1)
    for stage, head in zip(model.chain, [*model.exits.values(), None], strict=True):
        state = stage(state)
        logits = (state if head is None else head(state)).tolist()
        losses.append(-sum(z[y] - math.log(sum(map(math.exp, z))) for z, y in zip(logits, labels, strict=True)) / len(labels))
    return losses


def test_the_losses_are_those_of_every_head() -> None:
    model = network("layer1", "layer2", "layer3")
    losses = exit_losses(model, *batch())
    assert list(losses) == ["layer1", "layer2", "layer3", "readout"]
    assert [float(loss.detach()) for loss in losses.values()] == pytest.approx(by_hand(model, *batch()), rel=1e-5)


def test_the_objective_is_the_weighted_sum() -> None:
    model = network("layer1", "layer2", "layer3")
    first, second, third, last = by_hand(model, *batch())
    objective = DeepSupervision({"layer1": 0.25, "layer2": 0.0, "layer3": 2.0})
    for _ in range(3):
        assert float(objective(model, *batch()).detach()) == pytest.approx(last + 0.25 * first + 2 * third, rel=1e-5)
    assert float(DeepSupervision({"layer2": 1.0})(model, *batch()).detach()) == pytest.approx(last + second, rel=1e-5)


def test_its_gradient_is_the_weighted_sum_of_gradients() -> None:
    model = network("layer1", "layer3").double()
    images, labels = batch()
    parameters = list(model.chain[0].parameters())
    weights = {"layer1": 0.3, "layer3": 0.7, "readout": 1.0}
    parts = {name: torch.autograd.grad(cross_entropy(model.logits(images.double())[name], labels), parameters)[0] for name in weights}
    objective = DeepSupervision({"layer1": 0.3, "layer3": 0.7})
    (total, _) = torch.autograd.grad(objective(model, images.double(), labels), parameters)
    torch.testing.assert_close(total, sum(weights[name] * part for name, part in parts.items()), rtol=1e-12, atol=0)


def test_without_weight_the_chain_trains_as_without_exits_bit_for_bit() -> None:
    data = small_set()
    plain, supervised = build(MODEL, SHAPE, CLASSES, torch.Generator().manual_seed(0)), network("layer1", "layer3")
    weighted = copy.deepcopy(supervised)
    order = torch.Generator().manual_seed
    outcome = train(plain, data, TRAINING, order(3), None, end_to_end)
    silent = train(supervised, data, TRAINING, order(3), None, DeepSupervision({"layer1": 0.0, "layer3": 0.0}))
    assert outcome.history.equals(silent.history)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), supervised.chain.parameters(), strict=True))
    train(weighted, data, TRAINING, order(3), None, DeepSupervision({"layer1": 1e-3, "layer3": 0.0}))
    assert not any(torch.equal(a, b) for a, b in zip(plain[0].parameters(), weighted.chain[0].parameters(), strict=True))


def test_weights_fade_linearly_to_nothing() -> None:
    model = network("layer1", "layer2", "layer3")
    first, _, _, last = by_hand(model, *batch())
    objective = DeepSupervision({"layer1": 2.0}, fading=4)
    found = [float(objective(model, *batch()).detach()) for _ in range(6)]
    assert found == pytest.approx([last + 2 * share * first for share in (1, 0.75, 0.5, 0.25, 0, 0)], rel=1e-5)


def test_a_training_fades_over_its_own_steps() -> None:
    shares = []
    objective = DeepSupervision({"layer1": 1.0}, fading=9)

    def look(step: int, total: int) -> None:
        assert total == 9
        shares.append(objective.share)

    train(network("layer1"), small_set(), TRAINING, torch.Generator(), look, objective)
    assert shares == pytest.approx([1 - step / 9 for step in range(1, 10)])


def test_a_fading_share_goes_on_where_it_was() -> None:
    model = network("layer1")
    objective = DeepSupervision.alike(model, 1.0, fading=4)
    objective(model, *batch())
    again = DeepSupervision.alike(model, 1.0, fading=4)
    assert isinstance(again, Stateful)
    again.load_state_dict(objective.state_dict())
    assert again.share == objective.share == 0.75
