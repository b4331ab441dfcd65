"""Small networks with drawn parameters, none of them at the values that hide a mistake (zero bias, unit γ)."""

import itertools
import math
import os

import torch
from torch import nn

from src.config import DataConfig, ModelConfig
from src.data.load import load
from src.models import Residual, build, calibrate


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def seeded(module, seed=0):
    """Draw all parameters, N(0, 1/fan_in), and the running statistics."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return module


def dense(*widths, activation=nn.Tanh, bias=True, seed=0):
    """Stages φ(Wh + b), the last without φ."""
    *hidden, last = [nn.Linear(d, m, bias=bias) for d, m in itertools.pairwise(widths)]
    return seeded(nn.Sequential(*(nn.Sequential(linear, activation()) for linear in hidden), last), seed)


def matrix_stage(W, bias=False):
    """h ↦ Wh (+ 0), in float64: in float32 a product of two matrices has the rank of its rounding."""
    W = torch.as_tensor(W, dtype=torch.float64)
    linear = nn.Linear(W.shape[1], W.shape[0], bias=bias, dtype=W.dtype)
    with torch.no_grad():
        linear.weight.copy_(W)
        if bias:
            linear.bias.zero_()
    return linear


def diagonal(*entries):
    return matrix_stage(torch.diag(torch.tensor(entries)))


def small(name):
    """Networks of each kind of layer, from 1×4×4 images to 3 logits."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    stages = {
        "dense": [flat, nn.Sequential(nn.Linear(5, 6), nn.Sigmoid()), nn.Linear(6, 3)],
        "without bias": [nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False)), nn.Tanh(), nn.Linear(5, 3, bias=False)],
        "conv": [nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()), nn.MaxPool2d(2), nn.Sequential(nn.Flatten(), nn.Linear(8, 3))],
        "residual": [flat, Residual(nn.Sequential(nn.Tanh(), nn.Linear(5, 5)), nn.Identity(), nn.Tanh()), nn.Linear(5, 3)],
        "layer norm": [nn.Sequential(flat, nn.LayerNorm(5), nn.GELU()), nn.Linear(5, 3)],
        "batch norm": [nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh()), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3)],
    }
    return seeded(nn.Sequential(*stages[name]))


def as_double(network):
    """The network as it is measured."""
    return network.double().eval().requires_grad_(False)


SMALL = ["dense", "without bias", "conv", "residual", "layer norm", "batch norm"]


def family(name, shape=(1, 8, 8), **changes):
    """A network of src.models with calibrated statistics."""
    depth = {"mlp": 3, "residual_mlp": 6, "cifar": 8, "vgg": 8}[name]
    settings = {"family": name, "depth": depth, "width": 2 if name in ("cifar", "vgg") else 6, "activation": "relu", "init": "gaussian"}
    settings |= {"weight_var": 2.0, "bias_var": 0.05, "norm": "none", "skip": "none", "branch_scale": 1.0}
    network = build(ModelConfig(**settings | changes), shape, 4, torch.Generator().manual_seed(0))
    calibrate(network, normal(16, *shape, seed=1))
    return network


FAMILIES = [
    *(("mlp", norm, "none") for norm in ("none", "batch", "layer")),
    *(("residual_mlp", norm, skip) for norm in ("none", "batch", "layer") for skip in ("original", "preactivation")),
    *(("cifar", norm, skip) for norm, skip in (("none", "none"), ("batch", "original"), ("batch", "preactivation"))),
    ("vgg", "batch", "none"),
]


def images(count):
    """Real images and their labels: MNIST under DATA_ROOT, otherwise scikit-learn's digits."""
    root = os.environ.get("DATA_ROOT", "data")
    data = load(DataConfig("mnist", root, [], "digits", None, count), torch.device("cpu"))
    return data.standardise(data.test.images), data.test.labels, data.shape


class Counting(nn.Module):
    """Counts its calls in a buffer, to no effect."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return torch.tanh(x)
