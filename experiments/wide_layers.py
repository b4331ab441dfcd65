"""The solution "wide layers increase rank": which rank, of what, and how far.

On MLPs of growing width, at initialisation and after a short training: the rank of the layer Jacobians J_l, of the batch gradient ∇W_l, and
of the N×P_l matrix of per-sample parameter gradients (from its Gram matrix); the same as a share of the width, and the stable ranks. Two
caps stand against the width: the rows of the logits' gradient sum to zero over C classes, so that nothing that is linear behind them has
a gradient of rank above C−1; and N samples have a gradient of rank N at most.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from src.chain import cut
from src.config import Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.dense import dense_factors, parameter_gram
from src.jacobian.materialised import layer_jacobian
from src.locking import walk_back
from src.mean_field import CRITICAL_WEIGHT_VAR
from src.plan import Work
from src.rows import Row, measured, pick
from src.spectrum import Spectrum, gram_spectrum, spectrum
from src.statistics import greatest, paired_difference, t_interval
from src.trainings import Trainee, train_all
from src.verdict import Verdict, cell, cells_by, judge_forms

QUANTITIES = {
    "jacobian_rank": "rank J_l of a hidden layer between hidden layers, mean over samples",
    "jacobian_stable_rank": "Σσ²/σ₁² of the same J_l, mean over samples",
    "gradient_rank": "rank of the batch gradient ∇W_l",
    "gradient_stable_rank": "Σσ²/σ₁² of the batch gradient ∇W_l",
    "sample_gradients_rank": "rank of the N×P_l matrix of per-sample gradients of weights and biases, rows of unit length: σ above √(Nε)σ₁",
    "sample_gradients_stable_rank": "Σσ²/σ₁² of the N×P_l matrix of per-sample gradients of weights and biases",
    "train_accuracy": "share of training images told right",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(config.model.depth >= 4, "model.depth: at least 4 weight layers, two of them between hidden layers")
    ascending = all(narrow < wide for narrow, wide in pairwise(grid.widths))
    require(
        ascending and len(grid.widths) >= 2 and min(grid.widths) >= 4, "grid.widths: at least two widths of at least 4 units, ascending"
    )
    require(max(grid.batch_sizes) <= len(data.train), f"grid.batch_sizes: at most {len(data.train)}, the training images")
    require(grid.samples <= max(grid.batch_sizes), "grid.samples: at most the largest of grid.batch_sizes, whose first images they are")
    require("sigmoid" not in grid.activations, "grid.activations: linear, tanh or relu, those with a critical σw² at σb² = 0")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    grid, ranked = context.config.grid, partial(_ranked, context)
    each = [(grid.seeds, 0), (grid.train_seeds, context.steps())]
    return [Work(model, networks, steps, ranked) for networks, steps in each for model in _models(context.config)]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_initial, _trainings)


def _models(config: Config) -> list[ModelConfig]:
    grid = config.grid
    return [
        replace(config.model, activation=phi, weight_var=CRITICAL_WEIGHT_VAR[phi], width=width)
        for phi, width in product(grid.activations, grid.widths)
    ]


def _initial(context: Context) -> Iterator[Row]:
    """Random networks as drawn."""
    for model in context.progress(_models(context.config), "widths"):
        for seed in range(context.config.grid.seeds):
            yield from _ranks(context, context.network(model, seed), {"when": "initial", **network_columns(model, seed)})


def _trainings(context: Context) -> Iterator[Row]:
    """The same after a short training."""
    for model in context.progress(_models(context.config), "trainings"):
        seeds = range(context.config.grid.train_seeds)
        networks = [context.network(model, seed) for seed in seeds]
        names = [f"{model.activation}, width {model.width}, seed {seed}" for seed in seeds]
        outcomes = train_all(context, [*map(Trainee, networks, names, seeds)])
        for seed, network, outcome in zip(seeds, networks, outcomes, strict=True):
            where = network_columns(model, seed)
            yield from measured({"part": "training", **where}, **outcome.metrics())
            if outcome.status == "finished":
                yield from _ranks(context, network, {"when": "trained", **where})


def _ranks(context: Context, network: nn.Sequential, where: Row) -> Iterator[Row]:
    for at, ranks in _ranked(context, network):
        yield from measured({"part": "rank", "classes": context.data.classes, **where, **at}, **ranks)


def _ranked(context: Context, network: nn.Sequential) -> list[tuple[Row, dict[str, float]]]:
    """Every rank of every layer: the gradients' for every batch of N training images, the Jacobians' on the first few of them."""
    grid, found = context.config.grid, []
    inputs, targets = context.samples(context.data.train, max(grid.batch_sizes))
    for link in walk_back(cut(network, None, torch.float64, "eval"), inputs.double(), targets, cross_entropy):
        if 1 < link.index < len(network):
            jacobians = spectrum(layer_jacobian(link.stage, link.inputs[: grid.samples]))
            found.append(({"layer": link.index, "batch_size": grid.samples}, _both_ranks("jacobian", jacobians)))
        hidden, deltas = dense_factors(link.stage, link.inputs, link.signal.relative())
        for size in grid.batch_sizes:
            H, D = hidden[:size], deltas[:size]
            ranks = {**_both_ranks("gradient", spectrum(D.T @ H)), **_sample_gradient_ranks(H, D)}
            found.append(({"layer": link.index, "batch_size": size}, ranks))
    return found


def _both_ranks(matrix: str, s: Spectrum) -> dict[str, float]:
    """Rank and stable rank, means over samples where there are several; a zero matrix has stable rank 0."""
    return {f"{matrix}_rank": float(s.rank.double().mean()), f"{matrix}_stable_rank": float(s.stable_rank.nan_to_num().mean())}


def _sample_gradient_ranks(hidden: torch.Tensor, deltas: torch.Tensor) -> dict[str, float]:
    """Rank and stable rank of the N×P_l matrix; rows of unit length have the same rank, and small gradients count as large ones do."""
    gram = parameter_gram(hidden, deltas)
    lengths = gram.diagonal().sqrt()
    units = torch.where(lengths > 0, 1 / lengths, 0)
    ranks = _both_ranks("sample_gradients", gram_spectrum(gram))
    return {**ranks, "sample_gradients_rank": float(gram_spectrum(units[:, None] * gram * units).rank)}


def predicted_sample_rank(width: int, batch_size: int, classes: int) -> int:
    """The rank of the N×P_l matrix between hidden layers of a linear net: min(N, rank Δ · rank [H 1]), rank Δ = min(w, C−1)."""
    return min(batch_size, min(width, classes - 1) * (width + 1))


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    jacobian, gradient, sample_gradients = (_by_net(rows, f"{name}_rank") for name in ("jacobian", "gradient", "sample_gradients"))
    largest = rows["batch_size"].max()
    full = gradient[gradient["batch_size"] == largest]
    cells = {
        "jacobian_rank": _gains(jacobian),
        "gradient_rank": _gains(full),
        "sample_gradients_rank": _gains(sample_gradients[sample_gradients["batch_size"] == largest]),
        "share_of_the_width": _shares(pd.concat([jacobian.assign(matrix="J_l"), full.assign(matrix="∇W_l")])),
        "jacobian_stable_rank": _gains(_by_net(rows, "jacobian_stable_rank")),
        "gradient_stable_rank": _gains(_by_net(rows, "gradient_stable_rank").query("batch_size == @largest")),
        "softmax_cap": _softmax_cap(rows),
        "beyond_the_cap": _gains(gradient),
        "batch_cap": _batch_cap(rows),
        "beyond_the_batch": _gains(gradient),
        "linear_sample_gradients": _linear_sample_gradients(sample_gradients),
    }
    return judge_forms("wide_layers", criteria, cells)


def _by_net(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The mean of a rank over the hidden layers of each network; for N×P_l over those between hidden layers."""
    ranks = pick(rows, quantity)
    first = 2 if quantity.startswith("sample_gradients") else 1
    hidden = ranks[(ranks["layer"] >= first) & (ranks["layer"] < ranks["depth"])]
    keys = ["activation", "when", "batch_size", "width", "net_seed", "classes"]
    return hidden.groupby(keys, as_index=False)["value"].mean()


def _gains(nets: pd.DataFrame) -> pd.DataFrame:
    """The rank gained per unit of added width from each width to the next, paired by seed."""
    cells = []
    for at, narrow, wide, ranks in _steps(nets, ["activation", "when", "batch_size"]):
        gained = paired_difference(ranks[wide] / (wide - narrow), ranks[narrow] / (wide - narrow))
        cells.append(cell(gained, **at, width=narrow, wider=wide))
    return pd.DataFrame(cells)


def _shares(nets: pd.DataFrame) -> pd.DataFrame:
    """The rank's share of the width at each width minus that at the one before, paired by seed."""
    cells = []
    for at, narrow, wide, ranks in _steps(nets, ["matrix", "activation", "when"]):
        cells.append(cell(paired_difference(ranks[wide] / wide, ranks[narrow] / narrow), **at, width=narrow, wider=wide))
    return pd.DataFrame(cells)


def _steps(nets: pd.DataFrame, keys: list[str]) -> Iterator[tuple[Row, int, int, pd.DataFrame]]:
    """Each width and the next with the ranks of the seeds that have both."""
    for at, group in nets.groupby(keys):
        ranks = group.pivot(index="net_seed", columns="width", values="value")
        for narrow, wide in pairwise(ranks.columns):
            yield dict(zip(keys, at, strict=True)), int(narrow), int(wide), ranks[[narrow, wide]].dropna()


def _softmax_cap(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest rank of a batch gradient in units of C−1, over layers, batch sizes and seeds."""
    ranks = pick(rows, "gradient_rank")
    place = np.where(ranks["layer"] == ranks["depth"], "readout", "hidden")
    shares = ranks.assign(place=place, value=ranks["value"] / (ranks["classes"] - 1))
    return cells_by(shares, ["activation", "place", "when", "width"], greatest)


def _batch_cap(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest rank of a batch gradient in units of N, over layers, widths and seeds."""
    ranks = pick(rows, "gradient_rank")
    return cells_by(ranks.assign(value=ranks["value"] / ranks["batch_size"]), ["activation", "when", "batch_size"], greatest)


def _linear_sample_gradients(nets: pd.DataFrame) -> pd.DataFrame:
    """The rank of linear nets' N×P_l matrix in units of its prediction, over seeds."""
    linear = nets.query("activation == 'linear'")
    predicted = [predicted_sample_rank(net.width, net.batch_size, net.classes) for net in linear.itertuples()]
    return cells_by(linear.assign(value=linear["value"] / predicted), ["when", "width", "batch_size"], t_interval)
