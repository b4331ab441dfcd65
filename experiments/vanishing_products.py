"""Step 2, vanishing gradients: what the product of layer-Jacobian norms bounds, and what really decides that a gradient vanishes.

Measured on random MLPs and real images: the product bound as stated and with the parameter Jacobian it omits; chains with ‖J_l‖ < 1
whose product stays; the growth χ of ‖g_l‖² a layer and its depth scale ξ = −1/ln χ against mean-field theory (Poole et al. 2016;
Schoenholz et al. 2017); the depth to which short training reaches; ‖∇W_l‖ beside ‖g_l‖.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from src import mean_field
from src.chain import cut
from src.config import Activation, Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.dense import dense_factors
from src.jacobian.materialised import layer_jacobian
from src.locking import gradient_profile, growth
from src.models.bottleneck import dense_layer
from src.plan import Work
from src.rows import Row, measured, pick
from src.statistics import Estimate, exactly, greatest, least, slope, t_interval
from src.trainings import Trainee, train_all
from src.verdict import Verdict, cell, cells_by, judge_forms

QUANTITIES = {
    "gradient": "ln ‖∇θ_1‖ of one sample's loss, nats",
    "bound_as_stated": "ln of ∏_{l<L}‖J_l‖·‖g_L‖, nats",
    "bound": "ln of ‖P_1‖ ∏_{l≥2}‖J_l‖·‖g_L‖, nats",
    "input_norm": "√(‖x‖²+1), the norm of an input and its bias",
    "mean_norm": "mean of ‖J_l‖ over the hidden layers of a network behind the first, and the samples",
    "error_signal": "½ ln mean_n ‖g_l‖² at layer l, nats",
    "weight_gradient": "½ ln mean_n ‖∇W_l‖² at layer l, nats",
    "chi": "mean squared singular value of J_l over the second half of the hidden layers and the samples",
    "rate": "slope of ln mean_n ‖g_l‖² against the layers between a gradient and the loss, nats a layer",
    "attenuation": "Σ_l ln ‖J_l‖ of a chain of scaled orthogonal layers, nats",
    "train_accuracy": "share of training images told right after the short training",
    "test_accuracy": "share of test images told right after the short training",
    "diverged": "1 where the short training diverged, else 0",
    "lag": "ln ‖ΔW_2‖/‖W_2‖ − ln ‖ΔW_{L−1}‖/‖W_{L−1}‖ over the short training, nats; a float32 weight moves by ε of itself at least",
}

# the networks whose bound is certified: tanh below, at and above its critical σw², ReLU at its own, a sigmoid, an orthogonal linear net
BOUNDED: tuple[dict[str, Any], ...] = (
    {"activation": "tanh", "weight_var": 1.3},
    {"activation": "tanh", "weight_var": 1.761},
    {"activation": "tanh", "weight_var": 2.5},
    {"activation": "relu", "weight_var": 2.0, "bias_var": 0.0},
    {"activation": "sigmoid", "weight_var": 1.0, "bias_var": 0.0},
    {"activation": "linear", "weight_var": 1.0, "bias_var": 0.0, "init": "orthogonal"},
)
ACTIVATIONS: tuple[Activation, ...] = ("tanh", "relu", "sigmoid")
# σw² of the tanh nets whose depth scale is held against theory
KNOWN_SCALE = (1.3, 1.7)
# an unnormalised ReLU net far below its critical σw²: activations shrink forwards as the error signal does backwards
HIDING: dict[str, Any] = {"activation": "relu", "weight_var": 1.0, "bias_var": 0.0}
# a net with ‖J_l‖ > 1 below its critical σw²
LARGE: dict[str, Any] = {"activation": "tanh", "weight_var": 1.3}
# ‖J_l‖ of two chains of scaled orthogonal layers: both below 1 everywhere, one of them uniformly
SCALED: dict[str, Callable[[int], float]] = {"uniform": lambda layer: 0.9, "not uniform": lambda layer: 1 - 1 / (layer + 1) ** 2}
SUPREMUM = {"uniform": 0.9, "not uniform": 1.0}


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(len(grid.depths) >= 2 and min(grid.depths) >= 2, "grid.depths: at least two depths, each of at least 2 weight layers")
    require(min(grid.train_depths) >= 4, "grid.train_depths: each of at least 4 weight layers, two of them between hidden layers")
    require(grid.rate_depth >= 4, "grid.rate_depth: at least 4 weight layers, for a slope over the deeper half")
    require(min(grid.weight_vars + grid.train_weight_vars) > 0, "grid.weight_vars, grid.train_weight_vars: σw² above 0")
    require(config.model.width >= data.classes, f"model.width: at least {data.classes}, one a class, for an orthogonal readout")
    require(grid.samples <= len(data.test), f"grid.samples: at most {len(data.test)}, the test images")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    steps, settled, profiled = context.steps(), partial(_settled, context), partial(_profile, context)
    return [
        *(Work(model, grid.certified_seeds, measuring=context.certify) for model in _bounded(config)),
        *(Work(model, 1, measuring=context.certify) for _, model in _scaled(config)),
        *(Work(model, grid.seeds, measuring=settled) for model in _rated(config)),
        Work(_large_net(config), grid.seeds, measuring=partial(_norms_and_rate, context)),
        Work(_hidden_net(config), grid.seeds, measuring=profiled),
        *(Work(model, grid.train_seeds, steps) for models in _short(config).values() for model in models),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_bounds, _scaled_chains, _rates, _large, _hiding, _edge)


def _bounded(config: Config) -> list[ModelConfig]:
    return [replace(config.model, **net, depth=depth) for net in BOUNDED for depth in config.grid.depths]


def _bounds(context: Context) -> Iterator[Row]:
    """Both forms of the bound on every sample, and ‖J_l‖ beside them."""
    grid = context.config.grid
    inputs, _ = context.samples(context.data.test, grid.samples)
    input_norms = inputs.double().flatten(1).square().sum(1).add(1).sqrt().tolist()
    for model in context.progress(_bounded(context.config), "bounds"):
        for seed in range(grid.certified_seeds):
            certificate = context.certify(exact_network(context, model, seed))
            where = {"part": "bound", **network_columns(model, seed)}
            if seed == 0 and model.depth == max(grid.depths):
                context.show(f"{model.activation} {model.weight_var:g}", certificate)
            for bound, norm in zip(certificate.bound().itertuples(), input_norms, strict=True):
                sides = {"gradient": bound.lhs, "bound_as_stated": bound.rhs_as_stated, "bound": bound.rhs}
                yield from measured({**where, "sample": bound.sample}, **sides, input_norm=norm)


def exact_network(context: Context, model: ModelConfig, seed: int) -> nn.Sequential:
    """A random network; weights that are to be orthogonal are made so in float64: float32 leaves them so to seven digits."""
    network = context.network(model, seed).double()
    if model.init == "orthogonal":
        for linear in linears(network):
            U, _, Vh = torch.linalg.svd(linear.weight, full_matrices=False)
            linear.weight = nn.Parameter(np.sqrt(model.weight_var) * U @ Vh)
    return network


def linears(network: nn.Module) -> list[nn.Linear]:
    """The dense layers of a network, first to last."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def _scaled(config: Config) -> list[tuple[str, ModelConfig]]:
    orthogonal: dict[str, Any] = {"activation": "linear", "init": "orthogonal", "weight_var": 1.0, "bias_var": 0.0}
    return [(kind, replace(config.model, **orthogonal, depth=depth)) for kind in SCALED for depth in config.grid.depths]


def _scaled_chains(context: Context) -> Iterator[Row]:
    """Orthogonal linear chains whose layers are scaled to a given ‖J_l‖ < 1."""
    for kind, model in _scaled(context.config):
        network = exact_network(context, model, 0)
        scale_layers(network, SCALED[kind])
        where = {"part": "scaled", "chain": kind, **network_columns(model, 0)}
        yield from measured(where, attenuation=float(context.certify(network).log_attenuation.mean()))
        for layer, value in context.error_signals(network).items():
            yield from measured({**where, "layer": layer}, error_signal=value)


@torch.no_grad()
def scale_layers(network: nn.Sequential, norm: Callable[[int], float]) -> None:
    """Scale the weights of layer l by norm(l), l = 1…L."""
    for layer, linear in enumerate(linears(network), start=1):
        linear.weight.mul_(norm(layer))


def _rated(config: Config) -> list[ModelConfig]:
    grid = config.grid
    return [
        replace(config.model, activation=activation, weight_var=weight_var, depth=grid.rate_depth, width=grid.product_width)
        for activation in ACTIVATIONS
        for weight_var in grid.weight_vars
    ]


def _rates(context: Context) -> Iterator[Row]:
    """χ and the gradient's own rate for every activation, σw² and seed."""
    for model in context.progress(_rated(context.config), "rates"):
        for seed in range(context.config.grid.seeds):
            chi, signals = _settled(context, context.network(model, seed))
            where = {"part": "rate", **network_columns(model, seed)}
            yield from measured(where, chi=chi, rate=growth(signals))
            for layer, value in signals.items():
                yield from measured({**where, "layer": layer}, error_signal=value)


def _settled(context: Context, network: nn.Sequential) -> tuple[float, dict[int, float]]:
    """χ and the error signals of a network."""
    inputs, _ = context.samples(context.data.test, context.config.grid.samples)
    return mean_squared_singular_value(network, inputs.double()), context.error_signals(network)


def mean_squared_singular_value(network: nn.Sequential, inputs: torch.Tensor) -> float:
    """Σσ²/n = ‖J_l‖_F²/n = Σ_i φ'(z_i)²‖w_i‖²/n, mean over samples and the deeper half of the hidden layers, whose variance has settled.

    Args:
        network: an MLP, so that J_l = diag φ'(z) W, w_i the rows of W.
        inputs: H_0, in float64.
    """
    chain = cut(network, None, torch.float64, "eval")
    states, squares = chain.states(inputs), []
    for index in range(len(chain.stages) // 2, len(chain.stages) - 1):
        stage, outputs = chain.stages[index], states[index + 1]
        _, slopes = dense_factors(stage, states[index], torch.ones_like(outputs))
        squares.append(slopes.square() @ dense_layer(stage).weight.square().sum(1) / outputs.shape[1])
    return float(torch.stack(squares).mean())


def _large_net(config: Config) -> ModelConfig:
    return replace(config.model, **LARGE, depth=config.grid.rate_depth, width=config.grid.product_width)


def _large(context: Context) -> Iterator[Row]:
    """‖J_l‖ and the gradient's own rate of the same nets."""
    model = _large_net(context.config)
    for seed in range(context.config.grid.seeds):
        norm, rate = _norms_and_rate(context, context.network(model, seed))
        yield from measured({"part": "large", **network_columns(model, seed)}, mean_norm=norm, rate=rate)


def _norms_and_rate(context: Context, network: nn.Sequential) -> tuple[float, float]:
    inputs, _ = context.samples(context.data.test, context.config.grid.samples)
    chain = cut(network, None, torch.float64, "eval")
    hidden = list(zip(chain.stages, chain.states(inputs.double()), strict=False))[1:-1]
    grams = [J.mT @ J for J in (layer_jacobian(stage, state) for stage, state in hidden)]
    norms = [torch.linalg.eigvalsh(gram)[:, -1].sqrt() for gram in grams]
    return float(torch.stack(norms).mean()), growth(context.error_signals(network))


def _hidden_net(config: Config) -> ModelConfig:
    return replace(config.model, **HIDING, depth=config.grid.rate_depth)


def _hiding(context: Context) -> Iterator[Row]:
    """Profiles of a net in which ‖∇W_l‖ does not tell what becomes of ‖g_l‖."""
    model = _hidden_net(context.config)
    for seed in range(context.config.grid.seeds):
        for stage in _profile(context, context.network(model, seed)).itertuples():
            where = {"part": "hiding", "layer": stage.index, **network_columns(model, seed)}
            yield from measured(where, error_signal=stage.log_error_norm, weight_gradient=stage.log_weight_grad_norm)


def _profile(context: Context, network: nn.Sequential) -> pd.DataFrame:
    inputs, targets = context.samples(context.data.test, context.config.grid.samples)
    return gradient_profile(cut(network, None, torch.float64, "eval"), inputs.double(), targets, cross_entropy)


def _short(config: Config) -> dict[int, list[ModelConfig]]:
    """Tanh chains at every σw², by their depth."""
    grid, model = config.grid, replace(config.model, activation="tanh", width=config.grid.train_width)
    return {depth: [replace(model, weight_var=var, depth=depth) for var in grid.train_weight_vars] for depth in grid.train_depths}


def _edge(context: Context) -> Iterator[Row]:
    """Short trainings over (depth, σw²) for tanh."""
    for models in context.progress([*_short(context.config).values()], "short trainings"):
        nets = [*product(models, range(context.config.grid.train_seeds))]
        trainees = [
            Trainee(context.network(model, seed), f"depth {model.depth}, weight_var {model.weight_var:g}, seed {seed}", seed)
            for model, seed in nets
        ]
        starts = [second_and_last(trainee.network) for trainee in trainees]
        for (model, seed), trainee, start, outcome in zip(nets, trainees, starts, train_all(context, trainees), strict=True):
            where = {"part": "edge", **network_columns(model, seed)}
            yield from measured(where, **outcome.metrics())
            if outcome.status == "finished":
                yield from measured(where, lag=lag(start, second_and_last(trainee.network)))


def second_and_last(network: nn.Module) -> tuple[Tensor, Tensor]:
    """W_2 and W_{L−1}, the second hidden layer's weights and the last one's, as they are now."""
    _, second, *_ = layers = linears(network)
    return second.weight.detach().clone(), layers[-2].weight.detach().clone()


def lag(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> float:
    """By how much less W_2 has moved than W_{L−1}, each relative to its norm: the ln of the ratio, nats.

    A float32 weight moves by ε of itself or not at all: less than that counts as ε.
    """
    moved = [float((new - old).norm() / old.norm()) for old, new in zip(before, after, strict=True)]
    second, last = (max(share, torch.finfo(torch.float32).eps) for share in moved)
    return float(np.log(second / last))


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    bounds, nets, vanishing = _by_sample(rows), _beside_theory(rows), _vanishing(rows)
    linear, known = bounds.query("activation == 'linear'"), nets.query("activation == 'tanh' and weight_var in @KNOWN_SCALE")
    violation = (linear["gradient"] - linear["bound_as_stated"] - np.log(linear["input_norm"])).abs()
    cells = {
        "bound_as_stated": _slack(bounds, "bound_as_stated"),
        "bound": _slack(bounds, "bound"),
        "orthogonal_violation": cells_by(linear.assign(value=violation), ["depth"], greatest),
        "small_norms_vanish": vanishing,
        "uniform_norms_vanish": vanishing,
        "large_norms_vanish": _large_norms(rows),
        "chi": _by_setting(nets, nets["measured"] / nets["chi"] - 1),
        "rate": _by_setting(nets, np.exp(nets["rate"]) / nets["chi"] - 1),
        "chi_decides": _by_setting(nets, nets["rate"]),
        "depth_scale": _by_setting(known, known["rate"] / np.log(known["chi"])),
        "trainable_depth": trainable_depth_cells(rows, criteria["trainable_depth"]),
        "early_layers_locked": _lags(rows),
        "weight_gradient_hides": _hidden(rows),
    }
    return judge_forms("vanishing_products", criteria, cells)


def _by_sample(rows: pd.DataFrame) -> pd.DataFrame:
    """Both sides of the bound, a line a network and sample."""
    index = ["activation", "init", "weight_var", "depth", "net_seed", "sample"]
    of_samples = rows[(rows["part"] == "bound") & rows["sample"].notna()]
    return of_samples.pivot(index=index, columns="quantity", values="value").reset_index()


def _slack(bounds: pd.DataFrame, form: str) -> pd.DataFrame:
    """The least slack of each network family and depth; every draw counts."""
    slack = bounds.assign(value=bounds[form] - bounds["gradient"])
    return cells_by(slack, ["activation", "init", "weight_var", "depth"], least)


def _vanishing(rows: pd.DataFrame) -> pd.DataFrame:
    """By how much ln ‖g_1‖/‖g_L‖ falls per doubling of the depth, from the second deepest scaled chain to the deepest."""
    cells = []
    for kind, chains in pick(rows, "error_signal", part="scaled").groupby("chain"):
        signal = chains.pivot(index="layer", columns="depth", values="value")
        ratio = {depth: signal.loc[1, depth] - signal.loc[depth, depth] for depth in signal}
        shallower, deepest = sorted(ratio)[-2:]
        fall = (ratio[deepest] - ratio[shallower]) / np.log2(deepest / shallower)
        cells.append(cell(exactly(fall), chain=kind, supremum=SUPREMUM[str(kind)], depths=f"{shallower}→{deepest}"))
    return pd.DataFrame(cells)


def _large_norms(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope of ln ‖g_l‖² against the distance from the loss in tanh nets, over seeds, beside the mean ‖J_l‖ of the same nets."""
    nets = rows[rows["part"] == "large"].pivot(index="net_seed", columns="quantity", values="value")
    return pd.DataFrame([cell(t_interval(nets["rate"]), mean_norm=nets["mean_norm"].mean(), **LARGE)])


def _beside_theory(rows: pd.DataFrame) -> pd.DataFrame:
    """Each random net's rate and its `measured` mean squared singular value beside the mean-field χ of its activation, σw² and σb²."""
    keys = ["activation", "weight_var", "bias_var", "net_seed"]
    nets = (
        rows[(rows["part"] == "rate") & rows["quantity"].isin(["chi", "rate"])]
        .pivot(index=keys, columns="quantity", values="value")
        .reset_index()
    )
    chi = [mean_field.chi(net.activation, net.weight_var, net.bias_var) for net in nets.itertuples()]
    return nets.rename(columns={"chi": "measured"}).assign(chi=chi)


def _by_setting(nets: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """The t-interval of a statistic over the seeds of each setting."""
    return cells_by(nets.assign(value=values), ["activation", "weight_var", "chi"], t_interval)


def depth_scales(rows: pd.DataFrame) -> pd.DataFrame:
    """χ and the depth scale ξ in layers of the nets that are trained, by σw²."""
    trained = pick(rows, "train_accuracy", part="edge")
    bias_var = float(trained["bias_var"].iloc[0])
    chi = {weight_var: mean_field.chi("tanh", weight_var, bias_var) for weight_var in sorted(trained["weight_var"].unique().tolist())}
    return pd.DataFrame({"weight_var": list(chi), "chi": list(chi.values()), "scale": map(mean_field.depth_scale, chi.values())})


def trainable_depths(rows: pd.DataFrame, share_of_best: float) -> pd.DataFrame:
    """How deep short training reaches at each σw²: the deepest net before the first that fails, and that first one.

    A net trains when its mean train accuracy is at least that share of the best in the grid. A failure counts only at depths where the
    net nearest to χ = 1, the control, trains: elsewhere it is the length of the training that decides.

    Returns: weight_var, chi, scale (ξ in layers), reached, failed (inf where none is known to fail), n (seeds).
    """
    accuracy = pick(rows, "train_accuracy", part="edge")
    table = accuracy.pivot_table(index="weight_var", columns="depth", values="value", aggfunc="mean")
    trains = (table >= share_of_best * table.to_numpy().max()).cummin(axis=1)
    depths, scales = table.columns.to_numpy(), depth_scales(rows)
    control = trains.loc[scales["weight_var"][np.log(scales["chi"]).abs().idxmin()]]
    reached = [max(depths[trained], default=0) for _, trained in trains.iterrows()]
    failed = [min(depths[~trained & control], default=np.inf) for _, trained in trains.iterrows()]
    seeds = accuracy.groupby("weight_var")["net_seed"].nunique().to_numpy()
    return scales.assign(reached=reached, failed=failed, n=seeds)


def trainable_depth_cells(rows: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """The depth that training reaches, in units of ξ, where gradients vanish (χ < 1)."""
    cells = []
    for edge in trainable_depths(rows, **criterion.given).query("chi < 1").itertuples():
        lo, hi = edge.reached / edge.scale, edge.failed / edge.scale
        middle = np.sqrt(lo * hi) if np.isfinite(hi) else lo
        bracket = Estimate(middle, lo, hi, edge.n, "between the last depth that trains and the first that does not")
        cells.append(cell(bracket, weight_var=edge.weight_var))
    return pd.DataFrame(cells)


def _lags(rows: pd.DataFrame) -> pd.DataFrame:
    """By how much less the early layers have moved than the late ones, over seeds, beside ξ: infinite where gradients don't vanish."""
    edges, lags = depth_scales(rows).set_index("weight_var"), pick(rows, "lag")
    scales = edges["scale"].where(edges["chi"] < 1, np.inf)
    return cells_by(lags.assign(scale=lags["weight_var"].map(scales)), ["weight_var", "scale", "depth"], t_interval)


def _hidden(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope of ln ‖∇W_l‖ in units of the slope of ln ‖g_l‖, against l."""
    hiding = rows[(rows["part"] == "hiding") & rows["layer"].between(2, rows["depth"] - 1)]
    slopes = hiding.groupby(["quantity", "net_seed"])[["layer", "value"]].apply(lambda net: slope(net["layer"], net["value"]).value)
    return pd.DataFrame([cell(t_interval(slopes["weight_gradient"] / slopes["error_signal"]), **HIDING)])
