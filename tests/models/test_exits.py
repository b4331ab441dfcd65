"""Exits against naive references; what they leave as it was."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from src.config import ModelConfig
from src.models import build
from src.models.exits import MultiExit, with_exits
from src.models.layers import Layers
from tests.experiments.measured import context

SHAPE, CLASSES = (2, 8, 8), 5
PLAIN = ModelConfig("mlp", 5, 6, "tanh", "gaussian", 1.5, 0.3, "none", "none", 1.0)
MODELS = {
    "dense": (PLAIN, ["layer1", "layer3"]),
    "residual": (replace(PLAIN, family="residual_mlp", depth=8, skip="preactivation", norm="layer"), ["embed", "block2"]),
    "convolutional": (replace(PLAIN, family="cifar", depth=8, norm="batch", skip="original"), ["stem", "block3"]),
    "pooled": (replace(PLAIN, family="vgg", depth=8, norm="batch"), ["conv2", "dense"]),
}


def chain(model: ModelConfig) -> nn.Sequential:
    return build(model, SHAPE, CLASSES, torch.Generator().manual_seed(0))


def supervised(model: ModelConfig, names: list[str], seed: int = 1) -> MultiExit:
    layers = Layers(model, torch.Generator().manual_seed(seed))
    return with_exits(chain(model), names, layers, SHAPE, CLASSES)


def images(count: int = 7) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("model", "names"), MODELS.values(), ids=MODELS)
def test_every_exit_is_linear_in_the_pixel_means_of_its_stage(model: ModelConfig, names: list[str]) -> None:
    network = supervised(model, names).eval().requires_grad_(False)
    found = network.logits(images())
    assert list(found) == [*names, "readout"]
    state = images()
    for name, part in network.chain.named_children():
        state = part(state)
        if name in names:
            (weight, bias) = network.exits[name].parameters()
            means = [[float(unit.mean()) for unit in sample] for sample in state]
            by_hand = [[sum(w * h for w, h in zip(row, mean, strict=True)) for row in weight.tolist()] for mean in means]
            torch.testing.assert_close(found[name], torch.tensor(by_hand) + bias)
    assert torch.equal(found["readout"], state)


@pytest.mark.parametrize(("model", "names"), MODELS.values(), ids=MODELS)
def test_the_chain_stays_as_it_was(model: ModelConfig, names: list[str]) -> None:
    bare = chain(model)
    network = supervised(model, names)
    assert all(part.training for part in network.chain.modules())
    before, after = bare.state_dict(), network.chain.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)  # running statistics among them
    assert torch.equal(bare(images()), network(images()))
    assert torch.equal(bare.eval()(images()), network.eval()(images()))


def test_a_chain_in_eval_mode_stays_in_it() -> None:
    model, names = MODELS["convolutional"]
    network = with_exits(chain(model).eval(), names, Layers(model, torch.Generator()), SHAPE, CLASSES)
    assert not any(part.training for part in network.chain.modules())


@pytest.mark.parametrize(("model", "names"), MODELS.values(), ids=MODELS)
def test_leaving_at_an_exit_gives_its_logits_with_the_same_parameters(model: ModelConfig, names: list[str]) -> None:
    network = supervised(model, names).eval()
    for name in names:
        short = network.leaving_at(name)
        assert torch.equal(short(images()), network.logits(images())[name])
        assert {id(parameter) for parameter in short.parameters()} < {id(parameter) for parameter in network.parameters()}


def test_an_exit_sends_its_gradient_to_its_stage_and_those_before_and_to_no_other() -> None:
    network = supervised(PLAIN, ["layer1", "layer3"])
    for name, reached in (("layer1", 1), ("layer3", 3), ("readout", 5)):
        network.zero_grad(set_to_none=True)
        cross_entropy(network.logits(images())[name], torch.arange(7) % CLASSES).backward()
        got = [all(p.grad is not None and bool(p.grad.any()) for p in part.parameters()) for part in network.chain]
        assert got == [layer < reached for layer in range(5)]


def test_exits_are_drawn_like_the_chain_each_from_the_next_numbers() -> None:
    network = supervised(replace(PLAIN, width=400), ["layer1", "layer2"])
    weights = [network.exits[name].weight for name in ("layer1", "layer2")]
    assert float(torch.cat(weights).detach().var()) == pytest.approx(1.5 / 400, rel=0.1)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("names", [["layer9"], ["readout"], ["layer1", "exit"]])
def test_exits_only_at_stages_before_the_last(names: list[str]) -> None:
    with pytest.raises(ValueError, match=f"no stage '{names[-1]}' before the last; there are layer1, layer2, layer3, layer4"):
        supervised(PLAIN, names)


def test_the_draws_of_exits_move_no_other_draw() -> None:
    """Networks with exits and without have the same chain, and are trained on the images in the same order."""
    lab = context("residual_unlock")
    with_them, without = lab.network(PLAIN, 3), lab.network(PLAIN, 3)
    network = lab.with_exits(with_them, PLAIN, ["layer2"], 3)
    again = lab.with_exits(copy.deepcopy(without), PLAIN, ["layer2"], 3)
    assert network.chain is with_them
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(with_them.parameters(), without.parameters(), strict=True))
    assert not torch.equal(network.exits["layer2"].weight, lab.with_exits(without, PLAIN, ["layer2"], 4).exits["layer2"].weight)
