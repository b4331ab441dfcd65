"""Models that are no nn.Sequential, cut at the tensors that every path passes."""

import re
from itertools import pairwise

import pandas as pd
import pytest
import torch
import torchvision
from torch import nn
from torch.fx import Tracer
from torch.nn.functional import relu

from src import paths
from src.certificate import certify
from src.errors import UserError
from src.models import Residual
from src.trace import separating, traced_stages
from tests.jacobian.networks import normal, seeded

LABELS = torch.tensor([0, 2, 1])


class Net(nn.Module):
    """Skips, a concatenation, a layer that is called twice, functions without modules, in-place sums, the batch's own size."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.shared = nn.Linear(8, 8)
        self.grown = nn.Linear(8, 4)
        self.readout = nn.Linear(12, 3)

    def forward(self, x):
        x = relu(self.first(x), inplace=True)
        x += torch.tanh(self.conv(x))
        x = x[:, :, ::2, ::2]
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = torch.sigmoid(self.shared(x))
        x = torch.cat([x, self.grown(x)], 1)
        return self.readout(x)


def by_hand(net):
    """The same as a chain."""

    class Shortcut(nn.Module):
        def forward(self, x):
            return torch.cat([x, self.grown(x)], 1)

    shortcut = Shortcut()
    shortcut.grown = net.grown
    residual = Residual(nn.Sequential(net.conv, nn.Tanh()), nn.Identity(), nn.Identity())
    flat = nn.Sequential(nn.AvgPool2d(1, 2), nn.Flatten())
    shared = nn.Sequential(net.shared, nn.Sigmoid())
    return nn.Sequential(nn.Sequential(net.first, nn.ReLU()), nn.Sequential(residual, flat), shared, shared, shortcut, net.readout)


@pytest.fixture
def net():
    return seeded(Net())


def test_the_stages_are_those_cut_by_hand(net):
    x = normal(3, 1, 4, 4)
    traced, cut = certify(net, x, LABELS), certify(by_hand(net), x, LABELS)
    assert list(traced.severity["stage"]) == ["first", "conv", "shared", "shared@2", "grown", "readout"]
    unnamed = ["stage", "saturation"]  # functions are no activation modules
    pd.testing.assert_frame_equal(traced.layers.drop(columns=unnamed), cut.layers.drop(columns=unnamed), rtol=1e-12)
    unnamed = ["stage", "dead", "kink"]
    pd.testing.assert_frame_equal(traced.severity.drop(columns=unnamed), cut.severity.drop(columns=unnamed), rtol=1e-9)
    assert (traced.skip_depth, traced.depth) == (cut.skip_depth, cut.depth) == (3, 5)


def test_stages_are_grouped_up_to_the_named_ones(net):
    certificate = certify(net, normal(3, 1, 4, 4), LABELS, stages=["conv", "shared@2"])
    assert list(certificate.severity["stage"]) == ["conv", "shared@2", "readout"]
    with pytest.raises(UserError, match=re.escape("no stage named 'fc'; there are first, conv, shared, shared@2, grown, readout")):
        certify(net, normal(3, 1, 4, 4), LABELS, stages=["fc"])


def test_the_model_stays_as_it_was(net):
    net.train().readout.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = normal(3, 1, 4, 4)
    kept = x.clone()
    rng = torch.get_rng_state()
    certify(net, x, LABELS)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert [parameter.requires_grad for parameter in net.parameters()] == [True] * 8 + [False] * 2
    assert all(parameter.grad is None for parameter in net.parameters())


class Branches(nn.Module):
    def forward(self, x):
        a = x + 1
        b = a * 2
        c = a * 3
        d = b + c
        return d.sin()


def test_separating_tensors_are_those_that_no_edge_jumps_over():
    graph = Tracer().trace(Branches())
    assert [node.name for node in separating(graph)] == ["x", "add", "add_1", "sin"]
    for node in separating(graph):  # without it the output can't be reached
        assert node.op == "placeholder" or not _reaches(graph, without=node)
    others = [node for node in graph.nodes if node.name in ("mul", "mul_1")]
    assert all(_reaches(graph, without=node) for node in others)


def _reaches(graph, without):
    reached = set()
    for node in graph.nodes:
        if node is not without and (node.op == "placeholder" or any(source in reached for source in node.all_input_nodes)):
            reached.add(node)
    return any(node.op == "output" for node in reached)


class Split(nn.Module):
    """A tuple of tensors is no state."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x):
        a, b = self.inner(x).chunk(2, dim=1)
        return self.outer(a * b)


def test_a_tuple_of_tensors_is_never_cut_at():
    model = seeded(Split())
    assert list(traced_stages(model)) == ["inner", "outer"]
    x = normal(3, 4)
    inner, outer = traced_stages(model).values()
    torch.testing.assert_close(outer(inner(x)), model(x), rtol=0, atol=0)
    assert inner(x).shape == (3, 3)


def test_what_cannot_be_traced_is_refused():
    class Choosing(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(UserError, match=r"Choosing: torch\.fx cannot trace it .*wrap its stages in an nn.Sequential, in order"):
        certify(Choosing(), normal(3, 3), LABELS)
    with pytest.raises(UserError, match="the model takes 2 inputs; certify a model of one"):
        certify(Two(), normal(3, 3), LABELS)


# model, image size, its first stages, how many, skip depth, depth
ZOO = [
    ("resnet18", 32, ["conv1", "layer1.0", "layer1.1"], 10, 4, 17),
    ("resnet50", 32, ["conv1", "layer1.0", "layer1.1"], 18, 5, 49),
    ("vgg11_bn", 32, ["features.0", "features.4", "features.8"], 11, 10, 10),
    ("mobilenet_v3_small", 32, ["features.0.0", "features.1.block.0.0"], 28, 17, 53),
    ("densenet121", 32, ["features.conv0", "features.denseblock1"], 9, 4, 120),
    ("vit_b_16", 224, ["conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_0@2"], 26, 1, 49),
    ("swin_t", 32, ["features.0.0", "features.1.0", "features.1.0@2"], 29, 4, 52),
    ("convnext_tiny", 32, ["features.0.0", "features.1.0.block"], 23, 4, 58),
]


@pytest.mark.parametrize(("name", "size", "first", "count", "skip_depth", "depth"), ZOO, ids=[entry[0] for entry in ZOO])
def test_torchvision_models_are_cut_into_stages_that_compose_to_them(name, size, first, count, skip_depth, depth):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    stages = traced_stages(model)
    assert list(stages)[: len(first)] == first
    assert len(stages) == count
    assert (paths.skip_depth(stages.values()), paths.depth(stages.values())) == (skip_depth, depth)
    state = torch.empty(2, 3, size, size, device="meta")
    states = [state]
    for stage in stages.values():
        states.append(stage(states[-1]))
    assert states[-1].shape == (2, 1000)
    assert all(len(a) == len(b) == 2 for a, b in pairwise(states))
