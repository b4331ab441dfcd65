"""Step 3 and Step 10, rank deficiency: which gradients and which updates a Jacobian of low rank restricts, and which it does not.

Five dense layers, one of them of rank r: 64 wide throughout on Gaussian inputs with 64 random labels, and on images with their own classes;
without biases, the loss the mean softmax cross-entropy. The rank of every batch gradient over bottleneck place, rank, activation and batch
size; per sample the rank of ∂H_L/∂H_k; what float32 makes of such a rank; where the weight updates of training go.
All in float64; every rank is numerical at max(m, d)·ε·σ₁, which stands beside it in the column `tolerance`.

The computed rank of a product may lie below its exact rank: the inequality is then met trivially. For ReLU chains the exact rank is known:
conditional on the active sets the Gaussian weights are in general position, so it is the least number of active units.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from src.chain import cut
from src.config import Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.materialised import layer_jacobian
from src.models import build
from src.models.bottleneck import dense_layer, factorised, reduce_rank, replace_dense
from src.plan import Work
from src.rows import pick
from src.spectrum import spectrum
from src.statistics import Estimate, greatest, least
from src.training.loop import planned_steps
from src.verdict import Verdict, cell, judge_forms

Row = dict[str, Any]

QUANTITIES = {
    "gradient_rank": "rank of the batch gradient ∇W_l",
    "jacobian_rank": "rank J_l, the largest of the samples",
    "product_excess": "rank ∂H_L/∂H_k − min_{l>k} rank J_l at layer k, the largest of the samples",
    "live_units": "units of H_l that are not 0 on every input of the batch",
    "product_rank": "rank of ∂H_L/∂H_0 of one sample, computed at a precision",
    "exact_rank": "the least number of active units of any hidden layer for one sample: the exact rank of ∂H_L/∂H_0 of a ReLU chain",
    "outside": "share of ‖W_l(t) − W_l(0)‖² outside the r output directions through which the bottleneck is reached at initialisation",
    "train_accuracy": "share of training images told right",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
DEPTH = 5
CLASSES = 64  # of the Gaussian inputs, which are 8×8
NETS: dict[str, dict[str, Any]] = {
    "linear": {"activation": "linear", "weight_var": 1.0},
    "relu": {"activation": "relu", "weight_var": 2.0},
    "tanh": {"activation": "tanh", "weight_var": 1.0},
}
# the example of the claim: W₃ of rank 4, batch 512
EXAMPLE = {"place": 3, "rank": 4, "batch": 512}
SOURCES = ("gaussian", "images")
# which layers are trained around a bottleneck W = UV
MODES: dict[str, Callable[[int, int], bool]] = {
    "only layer 1": lambda layer, place: layer == 1,
    "all but the bottleneck": lambda layer, place: layer != place,
    "all": lambda layer, place: True,
}
SETTING = ["source", "activation", "place", "rank"]


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(all(2 <= place <= DEPTH for place in grid.places), f"grid.places: layers 2 to {DEPTH}: no layer is below the first")
    require(EXAMPLE["place"] in grid.places, f"grid.places: {EXAMPLE['place']} among them, the place that is trained")
    require(max(grid.bottleneck_ranks) <= config.model.width, f"grid.bottleneck_ranks: at most the width, {config.model.width}")
    require(max(grid.batch_sizes) <= len(data.train), f"grid.batch_sizes: at most {len(data.train)}, the training images")
    require(grid.samples <= min(grid.batch_sizes[-1], len(data.train)), "grid.samples: at most the last of grid.batch_sizes")
    require(EXAMPLE["rank"] <= config.model.width, f"model.width: at least {EXAMPLE['rank']}, the rank of the bottleneck that is trained")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    steps = planned_steps(config.training, len(context.data.train))
    return [
        *(Work(_model(config, kind), grid.certified_seeds) for kind in NETS),
        *(Work(_model(config, kind), grid.train_seeds, steps) for kind in NETS for _ in MODES),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    parts = (_example, _neighbours, _precision, _trainings)
    return pd.DataFrame([row for part in parts for row in part(context)])


def _model(config: Config, kind: str, depth: int = DEPTH) -> ModelConfig:
    return replace(config.model, **NETS[kind], depth=depth)


def square_net(context: Context, model: ModelConfig, seed: int) -> nn.Sequential:
    """A random net on 8×8 Gaussian inputs with 64 classes, in float64."""
    return build(model, (1, 8, 8), CLASSES, context.generator("square", seed)).double().to(context.device)


def gaussian(context: Context, count: int) -> tuple[Float[Tensor, "n 1 8 8"], Tensor]:
    """Gaussian inputs and random labels."""
    draws = context.generator("gaussian")
    inputs = torch.randn(count, 1, 8, 8, generator=draws, dtype=torch.float64)
    return inputs.to(context.device), torch.randint(0, CLASSES, (count,), generator=draws).to(context.device)


def narrowed(network: nn.Sequential, place: int, rank: int) -> nn.Sequential:
    """A copy whose W_place is the nearest matrix of the given rank, or W_place itself where its rank is no larger."""
    twin = copy.deepcopy(network)
    linear = dense_layer(twin[place - 1])
    reduce_rank(linear, min(rank, *linear.weight.shape))
    return twin


def gradients(network: nn.Sequential, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """∇W_1 … ∇W_L of the mean cross-entropy of a batch."""
    return torch.autograd.grad(cross_entropy(network(inputs), targets), [dense_layer(stage).weight for stage in network])


def _gradient_ranks(network: nn.Sequential, inputs: Tensor, targets: Tensor, where: Row) -> Iterator[Row]:
    for layer, gradient in enumerate(gradients(network, inputs, targets), start=1):
        s = spectrum(gradient)
        at = {"layer": layer, "tolerance": float(s.tolerance), "batch": len(inputs), "labels": len(targets.unique()), **where}
        yield {"quantity": "gradient_rank", "value": float(s.rank), **at}


def _example(context: Context) -> Iterator[Row]:
    """The example of the claim: rank ∇W_1 … ∇W_5, and the units that are alive."""
    inputs, targets = gaussian(context, EXAMPLE["batch"])
    for kind in NETS:
        model = replace(_model(context.config, kind), width=CLASSES)
        for seed in range(context.config.grid.seeds):
            network = narrowed(square_net(context, model, seed), EXAMPLE["place"], EXAMPLE["rank"])
            where = {"part": "example", "source": "gaussian", "classes": CLASSES, **EXAMPLE, **network_columns(model, seed)}
            yield from _gradient_ranks(network, inputs, targets, where)
            for layer, state in enumerate(cut(network, None, torch.float64, "eval").states(inputs)):
                live = (state.flatten(1) != 0).any(0).sum()
                yield {"quantity": "live_units", "value": float(live), "layer": layer, **where}


def _neighbours(context: Context) -> Iterator[Row]:
    """The ranks of all gradients and Jacobians over source, activation, place, rank and batch size."""
    grid = context.config.grid
    cases = [(source, kind, seed) for source in SOURCES for kind in NETS for seed in range(grid.certified_seeds)]
    for source, kind, seed in context.progress(cases, "ranks"):
        model = _model(context.config, kind)
        if source == "gaussian":
            network = square_net(context, model, seed)
            inputs, targets = gaussian(context, max(grid.batch_sizes))
        else:
            network = context.network(model, seed).double()
            inputs, targets = context.samples(context.data.train, max(grid.batch_sizes))
        for place in grid.places:
            for rank in grid.bottleneck_ranks:
                setting = {"source": source, "classes": network[-1].out_features, "place": place, "rank": rank}
                where = {"part": "neighbours", **setting, **network_columns(model, seed)}
                twin = narrowed(network, place, rank)
                for batch in grid.batch_sizes:
                    yield from _gradient_ranks(twin, inputs[:batch].double(), targets[:batch], where)
                yield from _jacobian_ranks(twin, inputs[: grid.samples].double(), where)


def _jacobian_ranks(network: nn.Sequential, inputs: Tensor, where: Row) -> Iterator[Row]:
    """The rank of J_l, and of ∂H_L/∂H_k against the least rank J_l above k, of every sample."""
    J = jacobians(network, inputs)
    product, bound = None, torch.full((len(inputs),), torch.inf, device=inputs.device)
    for layer in range(len(J), 0, -1):
        s = spectrum(J[layer - 1])
        at = {"layer": layer, "tolerance": float(s.tolerance.max()), **where}
        yield {"quantity": "jacobian_rank", "value": float(s.rank.max()), **at}
        bound = torch.minimum(bound, s.rank)
        product = J[layer - 1] if product is None else product @ J[layer - 1]
        s = spectrum(product)
        at = {"layer": layer - 1, "tolerance": float(s.tolerance.max()), **where}
        yield {"quantity": "product_excess", "value": float((s.rank - bound).max()), **at}


def jacobians(network: nn.Sequential, inputs: Tensor) -> list[Float[Tensor, "n m d"]]:
    """J_1 … J_L of every sample."""
    chain = cut(network, None, torch.float64, "eval")
    return [layer_jacobian(stage, state) for stage, state in zip(chain.stages, chain.states(inputs)[:-1], strict=True)]


def _precision(context: Context) -> Iterator[Row]:
    """The rank of ∂H_L/∂H_0 of ReLU chains without a bottleneck, in float64 and float32, beside the exact one."""
    grid = context.config.grid
    inputs, _ = gaussian(context, grid.samples)
    for depth in context.progress(grid.depths, "precision"):
        model = replace(_model(context.config, "relu", depth), width=CLASSES)
        for seed in range(grid.certified_seeds):
            network = square_net(context, model, seed)
            states = cut(network, None, torch.float64, "eval").states(inputs)[1:-1]
            active = torch.stack([(state > 0).sum(1) for state in states]).amin(0)
            J = jacobians(network, inputs)
            where = {"part": "precision", **network_columns(model, seed)}
            for sample, units in enumerate(active.tolist()):
                yield {"quantity": "exact_rank", "value": float(units), "sample": sample, **where}
            for precision in (torch.float64, torch.float32):
                product = J[0].to(precision)
                for jacobian in J[1:]:
                    product = jacobian.to(precision) @ product
                s = spectrum(product)
                for sample, (rank, tolerance) in enumerate(zip(s.rank.tolist(), s.tolerance.tolist(), strict=True)):
                    at = {"precision": str(precision).removeprefix("torch."), "sample": sample, "tolerance": tolerance, **where}
                    yield {"quantity": "product_rank", "value": float(rank), **at}


def _trainings(context: Context) -> Iterator[Row]:
    """Where the updates below a bottleneck go, when it and the layers around it are trained or not."""
    grid = context.config.grid
    place, rank = EXAMPLE["place"], EXAMPLE["rank"]
    for kind, mode in context.progress([(kind, mode) for kind in NETS for mode in MODES], "trainings"):
        model = _model(context.config, kind)
        for seed in range(grid.train_seeds):
            network = context.network(model, seed).double()
            replace_dense(network, f"layer{place}", factorised(dense_layer(network[place - 1]), rank))
            where = {"part": "training", "mode": mode, "place": place, "rank": rank, **network_columns(model, seed)}
            yield from _followed(context, network, where)


def _followed(context: Context, network: nn.Sequential, where: Row) -> Iterator[Row]:
    """Train a network, and measure at 1, 2, 4, … steps and at the end how much of each update lies outside the accessible directions."""
    place, rank, mode, seed = (where[key] for key in ("place", "rank", "mode", "net_seed"))
    below = [layer for layer in range(1, place) if MODES[mode](layer, place)]
    weights = {layer: dense_layer(network[layer - 1]).weight for layer in below}
    initial = {layer: weight.detach().clone() for layer, weight in weights.items()}
    directions = {layer: accessible(context, network, layer, place, rank) for layer in below}
    for layer, stage in enumerate(network, start=1):
        stage.requires_grad_(MODES[mode](layer, place))
    rows: list[Row] = []

    def record(steps: int) -> None:
        for layer in below:
            moving = sum(MODES[mode](other, place) for other in range(layer + 1, place + 1))
            share = share_outside(weights[layer].detach() - initial[layer], directions[layer])
            rows.append({"quantity": "outside", "value": share, "layer": layer, "moving": moving, "steps": steps, **where})

    outcome = context.train(
        network,
        f"{where['activation']}, {mode}, seed {seed}",
        seed,
        on_step=lambda steps: record(steps) if steps & (steps - 1) == 0 else None,
    )
    if outcome.steps & (outcome.steps - 1):
        record(outcome.steps)
    yield from rows
    for quantity, value in outcome.metrics().items():
        yield {"quantity": quantity, "value": value, **where}


def accessible(context: Context, network: nn.Sequential, layer: int, place: int, rank: int) -> Float[Tensor, "m r"]:
    """The r leading output directions of ∇W_layer under independent random signals behind the bottleneck.

    In a linear chain they span the range of W_{layer+1}ᵀ…W_placeᵀ, all that any signal can reach; elsewhere they are the r directions that
    such signals reach most.
    """
    inputs, _ = context.samples(context.data.train, context.config.training.batch_size)
    states = network[:place](inputs.double())
    signals = torch.randn(states.shape, generator=context.generator("signals"), dtype=torch.float64).to(states.device)
    (gradient,) = torch.autograd.grad((signals * states).sum(), dense_layer(network[layer - 1]).weight)
    U, _, _ = torch.linalg.svd(gradient, full_matrices=False)
    return U[:, :rank]


def share_outside(update: Float[Tensor, "m d"], directions: Float[Tensor, "m r"]) -> float:
    """‖(I − UUᵀ)Δ‖²/‖Δ‖²."""
    outside = update - directions @ (directions.T @ update)
    return float(outside.square().sum() / update.square().sum())


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    ranks = _against_bounds(rows)
    deficient = ranks[ranks["above"] < ranks["width"]]
    lower = _cells(deficient, deficient["value"] - deficient["above"], greatest)
    itself, above = ranks[ranks["layer"] == ranks["place"]], ranks[ranks["layer"] > ranks["place"]]
    linear = ranks[ranks["activation"] == "linear"]
    cells = {
        "lower_layers": lower,
        "every_layer": _cells(ranks, ranks["value"] - ranks["everywhere"], greatest),
        "product": _product(rows),
        "batch_linear": lower,
        "linear_ranks": _cells(linear, (linear["value"] - _linear_rank(linear)).abs(), greatest, "missing", linear["missing"]),
        "itself": _cells(itself, itself["value"] - itself["rank"], least, "room", _largest_rank(itself) - itself["rank"]),
        "layers_above": _cells(above, above["value"] - above["rank"], greatest, "room", _largest_rank(above) - above["rank"]),
        "example_linear": _example_ranks(rows),
        "dead_units": _dead_units(rows),
        "computed_rank": _computed_rank(rows),
        "remaining_frozen": _frozen(rows),
        "frozen_linear": _frozen(rows),
    }
    return judge_forms("rank_bottleneck", criteria, cells)


def _against_bounds(rows: pd.DataFrame) -> pd.DataFrame:
    """Every gradient's rank beside the least rank J_l above its layer (`above`), and of any layer (`everywhere`)."""
    keys = [*SETTING, "net_seed"]
    jacobian = pick(rows, "jacobian_rank", part="neighbours").pivot(index=keys, columns="layer", values="value")
    above = jacobian.iloc[:, ::-1].cummin(axis=1).shift(axis=1).melt(ignore_index=False, value_name="above")
    found = pick(rows, "gradient_rank", part="neighbours")
    found = found.merge(above.reset_index(), on=[*keys, "layer"], how="left")
    found = found.merge(jacobian.min(axis=1).rename("everywhere").reset_index(), on=keys)
    # labels that the batch lacks for its error signals to be in general position
    found["missing"] = (np.minimum(found["classes"] - 1, found["batch"]) - found["labels"]).clip(lower=0)
    return found


def _cells(
    ranks: pd.DataFrame, values: pd.Series, bound: Callable[[pd.Series], Estimate], name: str = "", condition: pd.Series | None = None
) -> pd.DataFrame:
    """The extreme over seeds and layers at every setting, beside the largest value there of what conditions it."""
    keys = [*SETTING, "batch"]
    cells = []
    for at, found in values.groupby([ranks[key] for key in keys]):
        met = {} if condition is None else {name: int(condition[found.index].max())}
        cells.append(cell(bound(found), **dict(zip(keys, at, strict=True)), **met))
    return pd.DataFrame(cells)


def _largest_rank(ranks: pd.DataFrame) -> pd.Series:
    """The largest rank that ∇W_l could have: the batch, the units, and C − 1 where only linear maps lie between it and the softmax."""
    capped = (ranks["activation"] == "linear") | (ranks["layer"] == ranks["depth"])
    logits = (ranks["classes"] - 1).where(capped, ranks["width"])
    return pd.concat([ranks["batch"], ranks["width"], logits], axis=1).min(axis=1)


def _linear_rank(ranks: pd.DataFrame) -> pd.Series:
    """The ranks in a linear chain: the bottleneck binds the error signals below it and the inputs above it, not itself."""
    largest = _largest_rank(ranks)
    return largest.where(ranks["layer"] == ranks["place"], largest.clip(upper=ranks["rank"]))


def _product(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest excess of a per-sample product rank over its bound, at every setting."""
    excess = pick(rows, "product_excess").groupby(SETTING)["value"]
    return pd.DataFrame([cell(greatest(values), **dict(zip(SETTING, at, strict=True))) for at, values in excess])


def _example_ranks(rows: pd.DataFrame) -> pd.DataFrame:
    """How far rank ∇W_l of the linear example is from 4/4/63/4/4, the worst draw."""
    found = pick(rows, "gradient_rank", part="example", activation="linear")
    errors = (found["value"] - _linear_rank(found)).abs().groupby(found["layer"])
    return pd.DataFrame([cell(greatest(values), layer=layer) for layer, values in errors])


def _dead_units(rows: pd.DataFrame) -> pd.DataFrame:
    """How far rank ∇W_l of the ReLU example is from the units that are alive on either side of W_l, at most C − 1 at the softmax."""
    example = rows[(rows["part"] == "example") & (rows["activation"] == "relu")]
    live = pick(example, "live_units").pivot(index="net_seed", columns="layer", values="value")
    live[DEPTH] = live[DEPTH].clip(upper=CLASSES - 1)
    found = pick(example, "gradient_rank").pivot(index="net_seed", columns="layer", values="value")
    layers = range(1, DEPTH + 1)
    return pd.DataFrame([cell(greatest((found[at] - live[[at - 1, at]].min(axis=1)).abs()), layer=at) for at in layers])


def _computed_rank(rows: pd.DataFrame) -> pd.DataFrame:
    """By how much the computed rank of a ReLU chain's product falls short of the exact one, the worst sample and seed."""
    keys = ["depth", "net_seed", "sample"]
    exact = pick(rows, "exact_rank").set_index(keys)["value"]
    found = pick(rows, "product_rank").groupby(["precision", "depth"])
    gaps = {at: (exact - ranks.set_index(keys)["value"]).dropna() for at, ranks in found}
    return pd.DataFrame([cell(greatest(gap), precision=precision, depth=depth) for (precision, depth), gap in gaps.items()])


def _frozen(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest share of an update outside; `moving`: how many layers are trained from above the updated one to the bottleneck."""
    keys = ["mode", "activation", "layer", "moving", "steps"]
    shares = pick(rows, "outside").groupby(keys)["value"]
    return pd.DataFrame([cell(greatest(values), **dict(zip(keys, at, strict=True))) for at, values in shares])
