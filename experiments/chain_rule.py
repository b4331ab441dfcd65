"""Step 1, the gradient chain rule: autograd against the explicit product of Jacobians, and when that product degenerates.

On random chains of every family ∇θ_l from plain autograd is held against P_lᵀ (J_{l+1}ᵀ ⋯ J_Lᵀ) g_L with every J_k written out: sample by
sample where the network maps sample by sample, and on the whole batch under train-mode batch normalisation, where the product of the
samples' own Jacobians ∂H_k[n]/∂H_{k−1}[n] misses what the samples do to one another. The shapes force that order of factors: J_kᵀ maps
H_k's gradient to H_{k−1}'s, so k increases from left to right, and P_l = ∂H_l/∂θ_l must be transposed and stand on the left (or the whole
be read as a row). The rank of the product of many layers is held against the Lyapunov exponents of random matrices (Newman 1986).
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, product
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.special import digamma
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from src.chain import Chain, cut
from src.config import Config, Criterion, ModelConfig, Norm, Skip, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.materialised import layer_jacobian, parameter_gradients
from src.locking import Link, walk_back
from src.mean_field import CRITICAL_WEIGHT_VAR
from src.plan import Work
from src.rows import Row, measured, pick
from src.spectrum import spectrum
from src.statistics import greatest, least, t_interval
from src.verdict import Verdict, cell, cells_by, judge_forms

Family = Literal["mlp", "residual_mlp", "cifar", "vgg"]
Kind = tuple[Family, Skip, Norm]

QUANTITIES = {
    "error": "‖∇θ_l by the product − ∇θ_l by autograd‖ / ‖∇θ_l by autograd‖, the worst sample and stage of a chain",
    "error_own": "the same with the samples' own Jacobians ∂H_k[n]/∂H_{k−1}[n] alone, under train-mode batch normalisation",
    "error_without_parameters": "|‖(∏ J_kᵀ) g_L‖ − ‖∇θ_l‖| / ‖∇θ_l‖, the worst sample and stage of a chain",
    "error_reversed": "relative error of ∇θ_1 with the hidden factors in decreasing order of k, the best sample that has a gradient",
    "kept_rank": "numerical rank (float64) of a product of layer Jacobians over the least rank of a factor, mean over samples",
}
FAMILIES: dict[Family, tuple[tuple[Skip, ...], tuple[Norm, ...]]] = {
    "mlp": (("none",), ("none", "batch", "layer")),
    "residual_mlp": (("original", "preactivation"), ("none", "batch", "layer")),
    "cifar": (("none", "original", "preactivation"), ("none", "batch")),
    "vgg": (("none",), ("none", "batch")),
}
KINDS: list[Kind] = [(family, skip, norm) for family, (skips, norms) in FAMILIES.items() for skip, norm in product(skips, norms)]
CONVOLUTIONAL = ("cifar", "vgg")
CONVOLUTIONAL_DEPTH = 8
PRODUCT = ["activation", "init", "factors"]


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(all(depth >= 4 and depth % 2 == 0 for depth in grid.depths), "grid.depths: even depths of at least 4 weight layers")
    require(grid.rate_depth >= 4, "grid.rate_depth: at least 4 weight layers, for a product of two hidden factors")
    require(min(grid.weight_vars) > 0, "grid.weight_vars: σw² above 0")
    require(grid.samples <= len(data.test), f"grid.samples: at most {len(data.test)}, the test images")
    require(
        min(grid.batch_sizes) >= 3 and max(grid.batch_sizes) <= len(data.test),
        f"grid.batch_sizes: 3 to {len(data.test)} test images: two under batch normalisation pass no gradient",
    )
    require(2 <= grid.calibration <= len(data.train), f"grid.calibration: 2 to {len(data.train)}, the training images")
    require(min(config.model.width, grid.product_width) >= 8, "model.width, grid.product_width: at least 8 units: narrower chains die")


def plan(context: Context) -> list[Work]:
    """What is measured; nothing is trained."""
    config, grid = context.config, context.config.grid
    compared, multiplied = partial(_compared, context), partial(_multiplied, context)
    on_batch = {size: partial(_compared_on_batch, context, size) for size in grid.batch_sizes}
    return [
        *(Work(model, 1, measuring=compared) for model, _ in _random(config)),
        *(Work(model, 1, measuring=on_batch[size]) for model, size, _ in _coupled(config)),
        *(Work(model, grid.seeds, measuring=multiplied) for model in _deep(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_per_sample, _on_batch, _degeneration)


def _net(config: Config, kind: Kind, depth: int, conv_width: int, **changes: Any) -> ModelConfig:
    """A chain of one kind; convolutional nets have a depth and a width of their own."""
    family, skip, norm = kind
    depth, width = (CONVOLUTIONAL_DEPTH, conv_width) if family in CONVOLUTIONAL else (depth, config.model.width)
    return replace(config.model, family=family, skip=skip, norm=norm, depth=depth, width=width, **changes)


def _random(config: Config) -> list[tuple[ModelConfig, int]]:
    """Chains of every kind and activation with their seeds, fewer of the convolutional ones; depth and σw² go round with the seed."""
    grid, chains = config.grid, []
    for kind, activation in product(KINDS, grid.activations):
        for seed in range(grid.certified_seeds if kind[0] in CONVOLUTIONAL else grid.seeds):
            depth, weight_var = grid.depths[seed % len(grid.depths)], grid.weight_vars[seed % len(grid.weight_vars)]
            chains.append((_net(config, kind, depth, grid.conv_width, activation=activation, weight_var=weight_var), seed))
    return chains


def _per_sample(context: Context) -> Iterator[Row]:
    """Sample by sample, normalisation frozen."""
    for model, seed in context.progress(_random(context.config), "chains"):
        where = {"part": "per sample", "batch_norm": "eval", **network_columns(model, seed)}
        yield from measured(where, **_compared(context, context.calibrated(model, seed), reversible=model.family == "mlp"))


def _compared(context: Context, network: nn.Sequential, reversible: bool = False) -> dict[str, float]:
    """Every form of the product against autograd, sample by sample."""
    inputs, targets = context.samples(context.data.test, context.config.grid.samples)
    truth = autograd_gradients(network, zip(inputs.split(1), targets.split(1), strict=True), training=False)
    links, jacobians = written_out(cut(network, None, torch.float64, "eval"), inputs, targets)
    signals = list(pulled_back(jacobians, links[0]))
    lengths = [relative(c.norm(dim=1) - g.norm(dim=1), g.norm(dim=1)) for c, g in zip(signals, truth, strict=True)]
    found = {"error": worst_error(links, signals, truth), "error_without_parameters": float(torch.stack(lengths).max())}
    if reversible:
        readout, *hidden = jacobians
        *_, turned = pulled_back([readout, *hidden[::-1]], links[0])
        # nothing in any order is nothing: a sample without a gradient tells nothing of it
        wrong = errors(links[-1], turned, truth[-1])[truth[-1].any(1)]
        if len(wrong):
            found["error_reversed"] = float(wrong.min())
    return found


def _coupled(config: Config) -> list[tuple[ModelConfig, int, int]]:
    """Chains of every kind with batch normalisation, the batch on which they are one operator, and their seeds.

    Convolutional ones, whose operators are the largest, have one channel and see the smallest batch.
    """
    grid, chains = config.grid, []
    for kind in KINDS:
        family, _, norm = kind
        sizes = [min(grid.batch_sizes)] if family in CONVOLUTIONAL else grid.batch_sizes
        if norm == "batch":
            net = _net(config, kind, min(grid.depths), 1, activation="tanh")
            chains += [(net, size, seed) for size, seed in product(sizes, range(grid.certified_seeds))]
    return chains


def _on_batch(context: Context) -> Iterator[Row]:
    """Train-mode batch normalisation: the chain as one operator on the batch, and the samples' own Jacobians alone."""
    for model, size, seed in context.progress(_coupled(context.config), "batches"):
        where = {"part": "batch", "batch_norm": "train", "batch_size": size, **network_columns(model, seed)}
        yield from measured(where, **_compared_on_batch(context, size, context.network(model, seed)))


def _compared_on_batch(context: Context, size: int, network: nn.Sequential) -> dict[str, float]:
    inputs, targets = context.samples(context.data.test, size)
    truth = autograd_gradients(network, [(inputs, targets)], training=True)
    links, jacobians = written_out(cut(network, None, torch.float64, "train"), inputs, targets)
    factors = {"error": jacobians, "error_own": [own_blocks(J, size) for J in jacobians]}
    return {quantity: worst_error(links, pulled_back(Js, links[0]), truth) for quantity, Js in factors.items()}


def autograd_gradients(network: nn.Sequential, batches: Iterable[tuple[Tensor, Tensor]], training: bool) -> list[Tensor]:
    """∇θ_l of every batch's mean cross-entropy by plain autograd on the whole network, in float64: a row a batch, for l = L … 1."""
    twin = copy.deepcopy(network).double().train(training)
    sizes = [sum(parameter.numel() for parameter in stage.parameters()) for stage in twin]
    rows = []
    for inputs, targets in batches:
        gradients = torch.autograd.grad(cross_entropy(twin(inputs.double()), targets), list(twin.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return list(torch.stack(rows).split(sizes, dim=1))[::-1]


def written_out(chain: Chain, inputs: Tensor, targets: Tensor) -> tuple[list[Link], list[Tensor]]:
    """The links of a chain, l = L … 1, and J_L … J_2."""
    links = list(walk_back(chain, inputs.double(), targets, cross_entropy))
    return links, [layer_jacobian(link.stage, link.inputs) for link in links[:-1]]


def pulled_back(jacobians: Sequence[Tensor], last: Link) -> Iterator[Tensor]:
    """(J_{l+1}ᵀ ⋯ J_Lᵀ) g_L for l = L … 1, the matrix product first.

    Args:
        jacobians: J_L … J_2, N matrices each.
        last: the link of the last stage, with g_L.
    """
    gradient = last.signal.direction.flatten(1) * last.signal.log_norm.exp().unsqueeze(1)
    identity = torch.eye(gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
    for matrices in accumulate(jacobians, lambda matrices, J: J.mT @ matrices, initial=identity.expand(len(gradient), -1, -1)):
        yield (matrices @ gradient.unsqueeze(2)).squeeze(2)


def own_blocks(J: Tensor, samples: int) -> Tensor:
    """The Jacobian of a batch with the blocks between different samples set to zero."""
    blocks = J.reshape(samples, J.shape[1] // samples, samples, J.shape[2] // samples)
    return (blocks * torch.eye(samples, dtype=J.dtype, device=J.device)[:, None, :, None]).reshape(J.shape)


def worst_error(links: Sequence[Link], signals: Iterable[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error of ∇θ_l over samples and stages."""
    return float(torch.stack([errors(*stage).max() for stage in zip(links, signals, truth, strict=True)]).max())


def errors(link: Link, signal: Tensor, truth: Tensor) -> Tensor:
    """‖signalᵀP_l − ∇θ_l‖/‖∇θ_l‖ of every sample."""
    gradients = parameter_gradients(link.stage, link.inputs, signal.reshape_as(link.signal.direction))
    return relative((gradients - truth).norm(dim=1), truth.norm(dim=1))


def relative(difference: Tensor, size: Tensor) -> Tensor:
    """|difference|/size; nothing is no error of nothing."""
    return torch.where(difference == 0, 0, difference.abs() / size)


def _deep(config: Config) -> list[ModelConfig]:
    kinds = product(CRITICAL_WEIGHT_VAR.items(), ("gaussian", "orthogonal"))
    changes: list[dict[str, Any]] = [{"activation": phi, "weight_var": var, "init": init} for (phi, var), init in kinds]
    grid = config.grid
    return [replace(config.model, **change, depth=grid.rate_depth, width=grid.product_width, bias_var=0.0) for change in changes]


def _degeneration(context: Context) -> Iterator[Row]:
    """The rank of the product of the last m hidden Jacobians of deep MLPs, m a power of two."""
    for model in context.progress(_deep(context.config), "products"):
        for seed in range(context.config.grid.seeds):
            for factors, kept in _multiplied(context, context.network(model, seed)).items():
                yield from measured({"part": "product", "factors": factors, **network_columns(model, seed)}, kept_rank=kept)


def _multiplied(context: Context, network: nn.Sequential) -> dict[int, float]:
    """The rank that a product of hidden Jacobians keeps, by its factors."""
    inputs, targets = context.samples(context.data.test, context.config.grid.samples)
    _, (_, *hidden) = written_out(cut(network, None, torch.float64, "eval"), inputs, targets)
    return dict(kept_ranks(hidden))


def kept_ranks(jacobians: Sequence[Tensor]) -> Iterator[tuple[int, float]]:
    """Rank of the product of the first m square Jacobians over the least rank among them, m a power of two; mean over samples.

    A sample that a dead layer leaves no rank has none to lose: it keeps all.
    """
    first = jacobians[0]
    least_rank, matrices = spectrum(first).rank, torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
    for factors, J in enumerate(jacobians, start=1):
        matrices = J.mT @ matrices
        # a scalar leaves the rank as it is; unscaled, long products leave the range of floats
        norm = torch.linalg.matrix_norm(matrices, keepdim=True)
        matrices = matrices / torch.where(norm > 0, norm, 1)
        least_rank = torch.minimum(spectrum(J).rank, least_rank)
        if factors.bit_count() == 1:
            yield factors, float(torch.where(least_rank > 0, spectrum(matrices).rank / least_rank, 1).mean())


def predicted_kept_rank(width: int, factors: float) -> float:
    """The share of directions that float64 tells from rounding in a product of Gaussian matrices.

    σ_i of a product of m matrices falls like e^{mλ_i}, λ_i = ½[ψ((n−i+1)/2) + ln(2/n)] (Newman 1986, Commun. Math. Phys. 103, 121);
    the rank counts σ_i > n ε σ_1.
    """
    exponents = digamma((width - np.arange(width)) / 2) / 2
    return float(np.mean(factors * (exponents - exponents[0]) > np.log(width * np.finfo(np.float64).eps)))


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    kind = ["family", "skip", "norm", "batch_norm"]
    own = pd.concat([pick(rows, "error", part="per sample"), pick(rows, "error_own")])
    kept = pick(rows, "kept_rank")
    longest = kept[kept["factors"] == kept["factors"].max()]
    cells = {
        "chain_rule": cells_by(own, ["batch_norm"], greatest),
        "operators": cells_by(pick(rows, "error"), kind, greatest),
        "gradient_chain": cells_by(pick(rows, "error_without_parameters"), kind, greatest),
        "order": cells_by(pick(rows, "error_reversed"), ["norm", "activation"], least),
        "degenerates": _least_kept(longest),
        "degenerate_where": cells_by(longest, PRODUCT, t_interval),
        "lyapunov": _against_lyapunov(kept),
    }
    return judge_forms("chain_rule", criteria, cells)


def _least_kept(longest: pd.DataFrame) -> pd.DataFrame:
    """The rank that the longest product keeps in the chain where it keeps least."""
    found = longest.loc[longest["value"].idxmin()]
    return pd.DataFrame([cell(least(longest["value"]), **found[PRODUCT])])


def _against_lyapunov(kept: pd.DataFrame) -> pd.DataFrame:
    """The rank kept by Gaussian linear chains minus the prediction, over seeds."""
    linear = kept.query("activation == 'linear' and init == 'gaussian'")
    predicted = [predicted_kept_rank(net.width, net.factors) for net in linear.itertuples()]
    return cells_by(linear.assign(value=linear["value"] - predicted), ["width", "factors"], t_interval)
