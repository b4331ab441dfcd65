"""Step 3 and Step 10, rank deficiency: which gradients and which updates a Jacobian of low rank restricts, and which it does not.

Five dense layers without biases, one of them of rank r, under the mean softmax cross-entropy: on Gaussian inputs with 64 classes that take
turns, 64 wide throughout, and on images with their own classes. The rank of every batch gradient over bottleneck place, rank, activation
and batch size; per sample the rank of ∂H_L/∂H_k; both again along training, and with them where the weight updates go; what float32 makes
of such a rank. All in float64; every rank is numerical, at a tolerance max(m, d)·ε·σ₁ that has a row beside it; where ∂H_L/∂H_k is held
against its factors at max(m, d)·ε·∏‖J_l‖, to which it is known.

The computed rank of a product may lie below its exact rank: the inequality is then met trivially. For ReLU chains the exact rank is known:
conditional on the active sets the Gaussian weights are in general position, so it is the least number of active units.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init

from src.chain import cut
from src.config import Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.materialised import layer_jacobian
from src.models import build
from src.models.bottleneck import dense_layer, factorised, reduce_rank, replace_dense
from src.plan import Work
from src.rows import Row, measured, pick
from src.spectrum import Spectrum, spectrum
from src.statistics import Estimate, greatest, least, t_interval
from src.trainings import Trainee, train_all
from src.verdict import INTERVAL, Verdict, cell, cells_by, judge_forms

QUANTITIES = {
    "gradient_rank": "rank of the batch gradient ∇W_l",
    "gradient_tolerance": "singular value of ∇W_l above which it counts",
    "jacobian_rank": "rank J_l, the largest of the samples",
    "jacobian_tolerance": "singular value of J_l above which it counts, the largest of the samples",
    "product_excess": "rank ∂H_L/∂H_k − min_{l>k} rank J_l at layer k, the largest of the samples",
    "product_rank": "rank of ∂H_L/∂H_0 of one sample, computed at a precision",
    "product_tolerance": "singular value of ∂H_L/∂H_k above which it counts, the largest of the samples where there are several",
    "exact_rank": "the least number of active units of any hidden layer for one sample: the exact rank of ∂H_L/∂H_0 of a ReLU chain",
    "live_units": "units of H_l that are not 0 on every input of the batch",
    "outside": "share of ‖W_l(t) − W_l(0)‖² outside the r output directions through which the bottleneck is reached at initialisation",
    "outside_any": "the least share of ‖W_l(t) − W_l(0)‖² that any r output directions leave outside",
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
# the example of the claim: W_3 of rank 4, batch 512, and its ranks ∇W_1 … ∇W_5; in the ReLU net that it was drawn from two units are dead
EXAMPLE = {"place": 3, "rank": 4}
EXAMPLE_BATCH = 512
EXAMPLE_RANKS = {"linear": (4, 4, 63, 4, 4), "relu": (64, 64, 64, 62, 62)}
SOURCES = ("gaussian", "images")
# which layers are trained around a bottleneck W = UV
MODES: dict[str, Callable[[int, int], bool]] = {
    "only layer 1": lambda layer, place: layer == 1,
    "all but the bottleneck": lambda layer, place: layer != place,
    "all": lambda layer, place: True,
}
UNTRAINED: Row = {"trained": "nothing", "steps": 0}
SETTING = ["source", "activation", "place", "rank", *UNTRAINED]
PRECISION = ["precision", "depth"]


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid, width, training = config.grid, config.model.width, config.training
    require(EXAMPLE["rank"] <= width <= CLASSES, f"model.width: {EXAMPLE['rank']} (the rank that is trained) to {CLASSES} (the inputs)")
    require(all(2 <= place <= DEPTH for place in grid.places), f"grid.places: layers 2 to {DEPTH}: no layer is below the first")
    require(EXAMPLE["place"] in grid.places, f"grid.places: {EXAMPLE['place']} among them, the place that is trained")
    require(max(grid.bottleneck_ranks) <= width, f"grid.bottleneck_ranks: at most {width}, the width")
    require(EXAMPLE["rank"] in grid.bottleneck_ranks, f"grid.bottleneck_ranks: {EXAMPLE['rank']} among them, the rank that is trained")
    require(max(grid.batch_sizes) <= len(data.train), f"grid.batch_sizes: at most {len(data.train)}, the training images")
    require(grid.samples <= max(grid.batch_sizes), "grid.samples: at most the largest of grid.batch_sizes")
    require(training.optimizer == "sgd", "training.optimizer: sgd, whose updates are sums of gradients")
    require(training.weight_decay == 0, "training.weight_decay: 0, so that the updates are sums of gradients")
    require(training.precision == "float32", "training.precision: float32, which leaves the float64 of these nets as it is")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid

    def once(network: nn.Sequential) -> list[Row]:
        return [*_ranks(context, network.double(), "images", grid.batch_sizes, {})]

    def along(network: nn.Sequential) -> list[list[Row]]:
        largest = [max(grid.batch_sizes)]
        kept = sum(_is_kept(steps, context.steps()) for steps in range(1, context.steps() + 1))
        return [[*_ranks(context, network.double(), "images", largest, {})] for _ in range(kept)]

    settings = len(SOURCES) * len(grid.places) * len(grid.bottleneck_ranks)
    return [
        *(Work(_model(config, kind, width=CLASSES), grid.seeds) for kind in NETS),
        *(Work(_model(config, kind), grid.certified_seeds * settings, measuring=once) for kind in NETS),
        *(Work(_model(config, "relu", depth, CLASSES), grid.seeds) for depth in grid.depths),
        *(Work(_model(config, kind), grid.train_seeds * len(MODES), context.steps(), along) for kind in NETS),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement.

    Raises: UserError when every training diverged.
    """
    rows = context.rows(_example, _neighbours, _precision, _trainings)
    require("updates" in set(rows["part"]), f"training.lr: lower than {context.config.training.lr:g}, at which every training diverged")
    return rows


def _model(config: Config, kind: str, depth: int = DEPTH, width: int | None = None) -> ModelConfig:
    return replace(config.model, **NETS[kind], depth=depth, width=width or config.model.width)


def square_net(context: Context, model: ModelConfig, seed: int) -> nn.Sequential:
    """A random net on 8×8 Gaussian inputs with 64 classes, in float64."""
    context.tally["networks"] += 1
    return build(model, (1, 8, 8), CLASSES, context.generator("square", seed)).double().to(context.device)


def gaussian(context: Context, count: int) -> tuple[Float[Tensor, "n 1 8 8"], Tensor]:
    """Gaussian inputs, independent of their labels, which take turns: min(N, 64) of them in every batch."""
    inputs = torch.randn(count, 1, 8, 8, generator=context.generator("gaussian"), dtype=torch.float64)
    return inputs.to(context.device), torch.arange(count, device=context.device) % CLASSES


def narrowed(network: nn.Sequential, place: int, rank: int) -> nn.Sequential:
    """The network, in place, with the nearest matrix of the given rank for W_place."""
    linear = dense_layer(network[place - 1])
    reduce_rank(linear, min(rank, *linear.weight.shape))
    return network


def gradients(network: nn.Sequential, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """∇W_1 … ∇W_L of the mean cross-entropy of a batch."""
    return torch.autograd.grad(cross_entropy(network(inputs), targets), [dense_layer(stage).weight for stage in network])


def _example(context: Context) -> Iterator[Row]:
    """The example of the claim: rank ∇W_1 … ∇W_5, and the units that are alive."""
    inputs, targets = gaussian(context, EXAMPLE_BATCH)
    for kind, seed in product(NETS, range(context.config.grid.seeds)):
        model = _model(context.config, kind, width=CLASSES)
        network = narrowed(square_net(context, model, seed), **EXAMPLE)
        where = {"part": "example", "source": "gaussian", **EXAMPLE, **network_columns(model, seed)}
        yield from _gradient_ranks(network, inputs, targets, where)
        for layer, state in enumerate(cut(network, None, torch.float64, "eval").states(inputs)):
            yield from measured({"layer": layer, **where}, live_units=float((state.flatten(1) != 0).any(0).sum()))


def _neighbours(context: Context) -> Iterator[Row]:
    """The ranks of all gradients and Jacobians over source, activation, place, rank and batch size."""
    grid = context.config.grid
    settings = [*product(SOURCES, NETS, grid.places, grid.bottleneck_ranks, range(grid.certified_seeds))]
    for source, kind, place, rank, seed in context.progress(settings, "ranks"):
        model = _model(context.config, kind)
        network = square_net(context, model, seed) if source == "gaussian" else context.network(model, seed).double()
        where = {"part": "ranks", **UNTRAINED, "place": place, "rank": rank, **network_columns(model, seed)}
        yield from _ranks(context, narrowed(network, place, rank), source, grid.batch_sizes, where)


def _ranks(context: Context, network: nn.Sequential, source: str, batch_sizes: Sequence[int], where: Row) -> Iterator[Row]:
    """The ranks of the gradients over the first N inputs of a source, for every N; those of the Jacobians and products on the first few."""
    grid = context.config.grid
    if source == "gaussian":
        inputs, targets = gaussian(context, max(grid.batch_sizes))
    else:
        inputs, targets = context.samples(context.data.train, max(grid.batch_sizes))
    where, inputs = {"source": source, "classes": dense_layer(network[-1]).out_features, **where}, inputs.double()
    for batch in batch_sizes:
        yield from _gradient_ranks(network, inputs[:batch], targets[:batch], where)
    yield from _jacobian_ranks(network, inputs[: grid.samples], where)


def _gradient_ranks(network: nn.Sequential, inputs: Tensor, targets: Tensor, where: Row) -> Iterator[Row]:
    for layer, gradient in enumerate(gradients(network, inputs, targets), start=1):
        s = spectrum(gradient)
        at = {"layer": layer, "batch": len(inputs), **where}
        yield from measured(at, gradient_rank=float(s.rank), gradient_tolerance=float(s.tolerance))


def _jacobian_ranks(network: nn.Sequential, inputs: Tensor, where: Row) -> Iterator[Row]:
    """The rank of J_l, and of ∂H_L/∂H_{l−1} against the least rank of its factors, of every sample."""
    through: Tensor | None = None
    bound, norms = inputs.new_full((len(inputs),), torch.inf), inputs.new_ones(len(inputs))
    for layer, J in reversed([*enumerate(jacobians(network, inputs), start=1)]):
        through = J if through is None else through @ J
        factor = spectrum(J)
        bound, norms = torch.minimum(bound, factor.rank), norms * factor.norm
        # a product is rounded in units of its factors' norms, which its own may fall far short of
        whole = Spectrum(spectrum(through).values, max(through.shape[-2:]) * torch.finfo(norms.dtype).eps * norms)
        at, before = {"layer": layer, **where}, {"layer": layer - 1, **where}
        yield from measured(at, jacobian_rank=float(factor.rank.max()), jacobian_tolerance=float(factor.tolerance.max()))
        yield from measured(before, product_excess=float((whole.rank - bound).max()), product_tolerance=float(whole.tolerance.max()))


def jacobians(network: nn.Sequential, inputs: Tensor) -> list[Float[Tensor, "n m d"]]:
    """J_1 … J_L of every sample."""
    chain = cut(network, None, torch.float64, "eval")
    return [layer_jacobian(stage, state) for stage, state in zip(chain.stages, chain.states(inputs)[:-1], strict=True)]


def _precision(context: Context) -> Iterator[Row]:
    """The rank of ∂H_L/∂H_0 of ReLU chains without a bottleneck, in float64 and float32, beside the exact one."""
    grid = context.config.grid
    inputs, _ = gaussian(context, grid.samples)
    for depth, seed in context.progress([*product(grid.depths, range(grid.seeds))], "precision"):
        model = _model(context.config, "relu", depth, CLASSES)
        network = square_net(context, model, seed)
        where = {"part": "precision", **network_columns(model, seed)}
        for sample, units in enumerate(active_units(network, inputs).tolist()):
            yield from measured({"sample": sample, **where}, exact_rank=float(units))
        J = jacobians(network, inputs)
        for precision in ("float64", "float32"):
            s = spectrum(chained([factor.to(getattr(torch, precision)) for factor in J]))
            for sample, (rank, tolerance) in enumerate(zip(s.rank.tolist(), s.tolerance.tolist(), strict=True)):
                at = {"precision": precision, "sample": sample, **where}
                yield from measured(at, product_rank=float(rank), product_tolerance=tolerance)


def active_units(network: nn.Sequential, inputs: Tensor) -> Int64[Tensor, " n"]:
    """The least number of positive units of any hidden layer, of every sample."""
    states = cut(network, None, torch.float64, "eval").states(inputs)[1:-1]
    return torch.stack([(state > 0).sum(1) for state in states]).amin(0)


def chained(J: Sequence[Float[Tensor, "n m d"]]) -> Float[Tensor, "n m d"]:
    """∂H_L/∂H_0 = J_L … J_1 of every sample."""
    through = J[0]
    for factor in J[1:]:
        through = factor @ through
    return through


def _trainings(context: Context) -> Iterator[Row]:
    """The ranks, and where the updates below a bottleneck go, while it and the layers around it are trained or not."""
    place, rank = EXAMPLE["place"], EXAMPLE["rank"]
    for kind, mode in context.progress([*product(NETS, MODES)], "trainings"):
        model, trained = _model(context.config, kind), [layer for layer in range(1, DEPTH + 1) if MODES[mode](layer, place)]
        trainees = []
        for seed in range(context.config.grid.train_seeds):
            network = context.network(model, seed).double()
            replace_dense(network, f"layer{place}", factorised(dense_layer(network[place - 1]), rank))
            _train_weights_of(network, trained)
            watch = partial(_weights, network, context.steps())
            trainees.append(Trainee(network, f"{model.activation}, {mode} trained, seed {seed}", seed, on_step=watch))
        starts = [copy.deepcopy(trainee.network) for trainee in trainees]
        for seed, (start, outcome) in enumerate(zip(starts, train_all(context, trainees), strict=True)):
            where = {"trained": mode, **EXAMPLE, **network_columns(model, seed)}
            yield from measured({"part": "training", **where}, **outcome.metrics())
            if outcome.status == "finished":
                yield from _followed(context, start, outcome.seen, trained, where)


def _train_weights_of(network: nn.Sequential, layers: Sequence[int]) -> None:
    """Leave everything else as it is."""
    for layer, stage in enumerate(network, start=1):
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(layer in layers and name.endswith("weight"))


def _weights(network: nn.Sequential, planned: int, steps: int) -> dict[str, Tensor] | None:
    """The state of a network after 1, 2, 4, … steps and at the end."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()} if _is_kept(steps, planned) else None


def _is_kept(steps: int, planned: int) -> bool:
    return steps.bit_count() == 1 or steps == planned


def _followed(
    context: Context, start: nn.Sequential, seen: Mapping[int, dict[str, Tensor]], trained: Sequence[int], where: Row
) -> Iterator[Row]:
    """Where the updates below the bottleneck went, and the ranks, at every moment of a training of which the weights were kept."""
    place, rank = where["place"], where["rank"]
    below = [layer for layer in trained if layer < place]
    directions = {layer: accessible(context, start, layer, place, rank) for layer in below}
    now = copy.deepcopy(start)
    for steps, state in seen.items():
        now.load_state_dict(state)
        for layer in below:
            update = (dense_layer(now[layer - 1]).weight - dense_layer(start[layer - 1]).weight).detach()
            moving = sum(layer < other <= place for other in trained)
            at = {"part": "updates", "layer": layer, "moving": moving, "steps": steps, **where}
            yield from measured(at, outside=share_outside(update, directions[layer]), outside_any=least_share_outside(update, rank))
        at = {"part": "ranks", "steps": steps, **where}
        yield from _ranks(context, merged(now, place), "images", [max(context.config.grid.batch_sizes)], at)


@torch.no_grad()
def merged(network: nn.Sequential, place: int) -> nn.Sequential:
    """A copy with one dense layer W = UV in the place of two."""
    twin = copy.deepcopy(network).requires_grad_(True)
    V, U = (module for module in twin[place - 1].modules() if isinstance(module, nn.Linear))
    linear = skip_init(nn.Linear, V.in_features, U.out_features, dtype=U.weight.dtype, device=U.weight.device)
    linear.weight.copy_(U.weight @ V.weight)
    linear.bias.copy_(U.bias)
    twin.set_submodule(f"layer{place}.linear", linear)
    return twin


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


def least_share_outside(update: Float[Tensor, "m d"], rank: int) -> float:
    """The least over all U with r orthonormal columns of ‖(I − UUᵀ)Δ‖²/‖Δ‖² = Σ_{i>r} σᵢ²/Σ σᵢ² (Eckart & Young 1936)."""
    squares = torch.linalg.svdvals(update).square()
    return float(squares[rank:].sum() / squares.sum())


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    ranks = against_bounds(rows)
    lower = _over(ranks[ranks["above"] < ranks["width"]], "above", greatest)
    layer, place = ranks["layer"], ranks["place"]
    linear = ranks[ranks["activation"] == "linear"]
    excesses, tolerances, shortfalls = pick(rows, "product_excess"), pick(rows, "product_tolerance"), _shortfalls(rows)
    updates = ["trained", "activation", "layer", "moving", "steps"]
    cells = {
        "lower_layers": lower,
        "every_layer": _over(ranks, "everywhere", greatest),
        "product": _with_tolerance(cells_by(excesses, SETTING, greatest), tolerances),
        "batch_linear": lower,
        "layers_below": _over(ranks[layer < place], "rank", least, "room"),
        "itself": _over(ranks[layer == place], "rank", least, "room"),
        "layers_above": _over(ranks[layer > place], "rank", least, "room"),
        "linear_ranks": cells_by(linear.assign(value=(linear["value"] - linear["predicted"]).abs()), [*SETTING, "batch"], greatest),
        "example_linear": _example_cells(rows, "linear", dict(enumerate(EXAMPLE_RANKS["linear"], start=1))),
        "dead_units": _example_cells(rows, "relu", _live_on_either_side(rows)),
        "computed_rank": _with_tolerance(cells_by(shortfalls.assign(value=shortfalls["value"].abs()), PRECISION, greatest), tolerances),
        "float32": cells_by(shortfalls.groupby([*PRECISION, "net_seed"], as_index=False)["value"].mean(), PRECISION, t_interval),
        "remaining_frozen": cells_by(pick(rows, "outside_any"), updates, greatest),
        "frozen_linear": cells_by(pick(rows, "outside"), updates, greatest),
        "thawed": cells_by(pick(rows, "outside"), updates, least),
    }
    return judge_forms("rank_bottleneck", criteria, cells)


def against_bounds(rows: pd.DataFrame) -> pd.DataFrame:
    """The rank of every batch gradient beside what is said to bound it.

    Returns: the rows of `gradient_rank` with the columns `above`, the least rank J_k, k > l; `everywhere`, that of any layer; `room`, by
        how much the batch, the width and the softmax allow ∇W_l to exceed r; `predicted`, its rank in a linear chain.
    """
    keys = [*SETTING, "net_seed"]
    jacobian = pick(rows, "jacobian_rank").pivot(index=keys, columns="layer", values="value")
    above = jacobian.iloc[:, ::-1].cummin(axis=1).shift(axis=1).melt(ignore_index=False, value_name="above").reset_index()
    ranks = pick(rows, "gradient_rank", part="ranks").merge(above, on=[*keys, "layer"])
    ranks = ranks.merge(jacobian.min(axis=1).rename("everywhere").reset_index(), on=keys)
    # the softmax caps what only linear maps lie between
    capped = (ranks["activation"] == "linear") | (ranks["layer"] == ranks["depth"])
    largest = ranks[["batch", "width"]].min(axis=1)
    largest = largest.where(~capped, largest.clip(upper=ranks["classes"] - 1))
    # the bottleneck binds the error signals below it and the inputs above it, not its own
    predicted = largest.where(ranks["layer"] == ranks["place"], largest.clip(upper=ranks["rank"]))
    return ranks.assign(room=largest - ranks["rank"], predicted=predicted)


def _over(ranks: pd.DataFrame, bound: str, extreme: Callable[[pd.Series], Estimate], *conditions: str) -> pd.DataFrame:
    """By how much rank ∇W_l exceeds a bound, the extreme over seeds and layers at every setting and batch size."""
    return cells_by(ranks.assign(value=ranks["value"] - ranks[bound]), [*SETTING, "batch", *conditions], extreme)


def _with_tolerance(cells: pd.DataFrame, tolerances: pd.DataFrame) -> pd.DataFrame:
    """The cells, each with the largest tolerance of its ranks."""
    keys = list(cells.columns.drop(INTERVAL))
    return cells.join(tolerances.groupby(keys)["value"].max().rename("tolerance"), on=keys)


def _example_cells(rows: pd.DataFrame, activation: str, expected: Mapping[int, Any]) -> pd.DataFrame:
    """How far rank ∇W_l of the example is from what is expected, the worst draw; the ranks measured beside those published."""
    found = pick(rows, "gradient_rank", part="example", activation=activation).pivot(index="net_seed", columns="layer", values="value")
    return pd.DataFrame(
        [
            cell(greatest((found[layer] - expected[layer]).abs()), layer=layer, measured=span(found[layer]), published=published)
            for layer, published in enumerate(EXAMPLE_RANKS[activation], start=1)
        ]
    )


def span(values: pd.Series) -> str:
    """The least and the greatest of some values, or the one that all have."""
    lo, hi = values.min(), values.max()
    return f"{lo:g}" if lo == hi else f"{lo:g}–{hi:g}"


def _live_on_either_side(rows: pd.DataFrame) -> dict[int, pd.Series]:
    """The least number of units alive before and behind W_l in every ReLU net of the example, at most C − 1 at the softmax."""
    found = pick(rows, "live_units", part="example", activation="relu").pivot(index="net_seed", columns="layer", values="value")
    found[DEPTH] = found[DEPTH].clip(upper=CLASSES - 1)
    return {layer: found[[layer - 1, layer]].min(axis=1) for layer in range(1, DEPTH + 1)}


def _shortfalls(rows: pd.DataFrame) -> pd.DataFrame:
    """By how much the computed rank of ∂H_L/∂H_0 falls short of the exact one, a row a sample and precision."""
    keys = ["depth", "net_seed", "sample"]
    exact = pick(rows, "exact_rank").set_index(keys)["value"].rename("exact")
    found = pick(rows, "product_rank").join(exact, on=keys)
    return found.assign(value=found["exact"] - found["value"])
