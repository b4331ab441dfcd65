"""Step 2, vanishing gradients: what the product of layer-Jacobian norms bounds, and what really decides that a gradient vanishes.

Measured on random MLPs and real images: the product bound as stated and with the parameter Jacobian it omits; chains with ‖J_l‖ < 1
whose product stays; the growth χ of ‖g_l‖² a layer and its depth scale ξ = −1/ln χ against mean-field theory (Poole et al. 2016;
Schoenholz et al. 2017); the depth to which short training reaches; ‖∇W_l‖ beside ‖g_l‖.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from src import mean_field
from src.certificate import certify
from src.chain import cut
from src.config import Activation, Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.materialised import layer_jacobian
from src.locking import gradient_profile
from src.plan import Work
from src.rows import pick
from src.statistics import Estimate, exactly, greatest, least, slope, t_interval
from src.verdict import Verdict, cell, judge_forms

Row = dict[str, Any]

QUANTITIES = {
    "gradient": "ln ‖∇θ_1‖ of one sample's loss, nats",
    "bound_as_stated": "ln of ∏_{l<L}‖J_l‖·‖g_L‖, nats",
    "bound": "ln of ‖P_1‖ ∏_{l≥2}‖J_l‖·‖g_L‖, nats",
    "input_norm": "√(‖x‖²+1), the norm of an input and its bias",
    "mean_norm": "mean of ‖J_l‖ over the layers of a network and the samples",
    "error_signal": "½ ln mean_n ‖g_l‖² at layer l, nats",
    "weight_gradient": "½ ln mean_n ‖∇W_l‖² at layer l, nats",
    "chi": "mean squared singular value of J_l over the second half of the hidden layers and the samples",
    "rate": "slope of ln mean_n ‖g_l‖² against the layers between a gradient and the loss, nats a layer",
    "attenuation": "Σ_l ln ‖J_l‖ of a chain of scaled orthogonal layers, nats",
    "train_accuracy": "share of training images told right after the short training",
    "test_accuracy": "share of test images told right after the short training",
    "diverged": "1 where the short training diverged, else 0",
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
# ‖J_l‖ of two chains of scaled orthogonal layers: both below 1 everywhere, one of them uniformly
SCALED: dict[str, Callable[[int], float]] = {"uniform": lambda layer: 0.9, "not uniform": lambda layer: 1 - 1 / (layer + 1) ** 2}
SUPREMUM = {"uniform": 0.9, "not uniform": 1.0}


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(len(grid.depths) >= 2 and min(grid.depths) >= 2, "grid.depths: at least two depths, each of at least 2 weight layers")
    require(min(grid.train_depths) >= 2, "grid.train_depths: each of at least 2 weight layers")
    require(grid.rate_depth >= 4, "grid.rate_depth: at least 4 weight layers, for a slope over the deeper half")
    require(min(grid.weight_vars + grid.train_weight_vars) > 0, "grid.weight_vars, grid.train_weight_vars: σw² above 0")
    require(config.model.width >= data.classes, f"model.width: at least {data.classes}, one a class, for an orthogonal readout")
    require(grid.samples <= len(data.test), f"grid.samples: at most {len(data.test)}, the test images")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    steps = context.steps()
    return [
        *(Work(model, grid.certified_seeds, measuring=context.certify) for model in _bounded(config)),
        *(Work(model, 1, measuring=context.certify) for _, model in _scaled(config)),
        *(Work(model, grid.seeds, measuring=context.certify) for model in _rated(config)),
        Work(_hidden_net(config), grid.seeds),
        *(Work(model, grid.train_seeds, steps) for model in _short(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    parts = (_bounds, _scaled_chains, _rates, _hiding, _edge)
    return pd.DataFrame([row for part in parts for row in part(context)])


def _bounded(config: Config) -> list[ModelConfig]:
    return [replace(config.model, **net, depth=depth) for net in BOUNDED for depth in config.grid.depths]


def _bounds(context: Context) -> Iterator[Row]:
    """Both forms of the bound on every sample, and ‖J_l‖ beside them."""
    grid = context.config.grid
    inputs, targets = context.samples(context.data.test, grid.samples)
    for model in context.progress(_bounded(context.config), "bounds"):
        for seed in range(grid.certified_seeds):
            certificate = certify(exact_network(context, model, seed), inputs, targets)
            where = {"part": "bound", **network_columns(model, seed)}
            if seed == 0 and model.depth == max(grid.depths):
                context.tracker.certificate(f"{model.activation} {model.weight_var:g}", certificate)
            yield {"quantity": "mean_norm", "value": certificate.layers["norm"].mean(), **where}
            for sample in certificate.bound().itertuples():
                at = {**where, "sample": sample.sample}
                yield {"quantity": "gradient", "value": sample.lhs, **at}
                yield {"quantity": "bound_as_stated", "value": sample.rhs_as_stated, **at}
                yield {"quantity": "bound", "value": sample.rhs, **at}
                norm = inputs[sample.sample].double().square().sum().add(1).sqrt()
                yield {"quantity": "input_norm", "value": float(norm), **at}


def exact_network(context: Context, model: ModelConfig, seed: int) -> nn.Sequential:
    """A random network; weights that are to be orthogonal are made so in float64: float32 leaves them so to seven digits."""
    network = context.network(model, seed).double()
    if model.init == "orthogonal":
        for linear in linears(network):
            U, _, Vh = torch.linalg.svd(linear.weight, full_matrices=False)
            linear.weight = nn.Parameter(np.sqrt(model.weight_var) * U @ Vh)
    return network


def linears(network: nn.Sequential) -> list[nn.Linear]:
    """The dense layers of a network, first to last."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def _scaled(config: Config) -> list[tuple[str, ModelConfig]]:
    orthogonal: dict[str, Any] = {"activation": "linear", "init": "orthogonal", "weight_var": 1.0, "bias_var": 0.0}
    return [(kind, replace(config.model, **orthogonal, depth=depth)) for kind in SCALED for depth in config.grid.depths]


def _scaled_chains(context: Context) -> Iterator[Row]:
    """Orthogonal linear chains whose layers are scaled to a given ‖J_l‖ < 1."""
    grid = context.config.grid
    inputs, targets = context.samples(context.data.test, grid.samples)
    for kind, model in _scaled(context.config):
        network = exact_network(context, model, 0)
        scale_layers(network, SCALED[kind])
        where = {"part": "scaled", "chain": kind, **network_columns(model, 0)}
        certificate = certify(network, inputs, targets)
        yield {"quantity": "attenuation", "value": float(certificate.log_attenuation.mean()), **where}
        for layer, value in context.error_signals(network).items():
            yield {"quantity": "error_signal", "value": value, "layer": layer, **where}


@torch.no_grad()
def scale_layers(network: nn.Sequential, norm: Callable[[int], float]) -> None:
    """Scale the weights of layer l by norm(l), l = 1…L."""
    for layer, linear in enumerate(linears(network), start=1):
        linear.weight.mul_(norm(layer))


def _rated(config: Config) -> list[ModelConfig]:
    settings = [(activation, weight_var) for activation in ACTIVATIONS for weight_var in config.grid.weight_vars]
    return [replace(config.model, activation=phi, weight_var=weight_var, depth=config.grid.rate_depth) for phi, weight_var in settings]


def _rates(context: Context) -> Iterator[Row]:
    """χ and the gradient's own rate for every activation, σw² and seed."""
    grid = context.config.grid
    inputs, _ = context.samples(context.data.test, grid.samples)
    for model in context.progress(_rated(context.config), "rates"):
        for seed in range(grid.seeds):
            network = context.network(model, seed)
            where = {"part": "rate", **network_columns(model, seed)}
            yield {"quantity": "chi", "value": mean_squared_singular_value(network, inputs.double()), **where}
            signal = context.error_signals(network)
            for layer, value in signal.items():
                yield {"quantity": "error_signal", "value": value, "layer": layer, **where}
            deep = range(grid.rate_depth // 2, grid.rate_depth)
            distances = [grid.rate_depth - layer for layer in deep]
            yield {"quantity": "rate", "value": slope(distances, [2 * signal[layer] for layer in deep]).value, **where}


def mean_squared_singular_value(network: nn.Sequential, inputs: torch.Tensor) -> float:
    """Σσ²/n = ‖J_l‖_F²/n over the second half of the hidden layers, where the variance has settled, and the samples."""
    chain = cut(network, None, torch.float64, "eval")
    states = chain.states(inputs)
    deep = range(len(chain.stages) // 2, len(chain.stages) - 1)
    squares = [layer_jacobian(chain.stages[index], states[index]).square().sum((1, 2)) / states[index][0].numel() for index in deep]
    return float(torch.stack(squares).mean())


def _hidden_net(config: Config) -> ModelConfig:
    return replace(config.model, **HIDING, depth=config.grid.rate_depth)


def _hiding(context: Context) -> Iterator[Row]:
    """Profiles of a net in which ‖∇W_l‖ does not tell what becomes of ‖g_l‖."""
    grid = context.config.grid
    inputs, targets = context.samples(context.data.test, grid.samples)
    model = _hidden_net(context.config)
    for seed in range(grid.seeds):
        chain = cut(context.network(model, seed), None, torch.float64, "eval")
        for stage in gradient_profile(chain, inputs.double(), targets, cross_entropy).itertuples():
            where = {"part": "hiding", "layer": stage.index, **network_columns(model, seed)}
            yield {"quantity": "error_signal", "value": stage.log_error_norm, **where}
            yield {"quantity": "weight_gradient", "value": stage.log_weight_grad_norm, **where}


def _short(config: Config) -> list[ModelConfig]:
    grid = config.grid
    return [
        replace(config.model, activation="tanh", weight_var=weight_var, depth=depth, width=grid.train_width)
        for weight_var in grid.train_weight_vars
        for depth in grid.train_depths
    ]


def _edge(context: Context) -> Iterator[Row]:
    """Short trainings over (depth, σw²) for tanh."""
    for model in context.progress(_short(context.config), "short trainings"):
        for seed in range(context.config.grid.train_seeds):
            network = context.network(model, seed)
            outcome = context.train(network, f"depth {model.depth}, weight_var {model.weight_var:g}, seed {seed}", seed)
            where = {"part": "edge", **network_columns(model, seed)}
            for quantity, value in outcome.metrics().items():
                yield {"quantity": quantity, "value": value, **where}


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    settled = _settled(rows)
    cells = {
        "bound_as_stated": _slack(rows, "bound_as_stated"),
        "bound": _slack(rows, "bound"),
        "orthogonal_violation": _violation(rows),
        "small_norms_vanish": _vanishing(rows),
        "uniform_norms_vanish": _vanishing(rows),
        "large_norms_vanish": _large_norms(rows),
        "chi": _by_setting(settled, lambda net: net["chi"] / net["prediction"] - 1),
        "rate": _by_setting(settled, lambda net: np.exp(net["rate"]) / net["prediction"] - 1),
        "chi_decides": _by_setting(settled, lambda net: net["rate"]),
        "depth_scale": _by_setting(settled[_has_known_scale(settled)], lambda net: net["rate"] / np.log(net["prediction"])),
        "trainable_depth": _trainable_depth(rows),
        "weight_gradient_hides": _hidden(rows),
    }
    return judge_forms("vanishing_products", criteria, cells)


def _slack(rows: pd.DataFrame, form: str) -> pd.DataFrame:
    """The least slack of each network family and depth; every draw counts."""
    keys = ["activation", "init", "weight_var", "depth"]
    wide = _by_sample(rows)
    slack = (wide[form] - wide["gradient"]).groupby(keys)
    return pd.DataFrame([cell(least(values), **dict(zip(keys, at, strict=True))) for at, values in slack])


def _violation(rows: pd.DataFrame) -> pd.DataFrame:
    """How far the orthogonal linear net is from breaking the stated bound by exactly √(‖x‖²+1)."""
    wide = _by_sample(rows).xs("linear", level="activation")
    error = (wide["gradient"] - wide["bound_as_stated"] - np.log(wide["input_norm"])).abs().groupby("depth")
    return pd.DataFrame([cell(greatest(values), depth=depth) for depth, values in error])


def _by_sample(rows: pd.DataFrame) -> pd.DataFrame:
    index = ["activation", "init", "weight_var", "depth", "net_seed", "sample"]
    of_samples = rows[(rows["part"] == "bound") & rows["sample"].notna()]
    return of_samples.pivot(index=index, columns="quantity", values="value")


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
    """The slope of ln ‖g_l‖² against the distance from the loss in tanh nets, over seeds, beside the mean ‖J_l‖ of the deepest."""
    where = {"activation": "tanh", "weight_var": BOUNDED[0]["weight_var"]}
    norms = pick(rows, "mean_norm", part="bound", **where)
    mean_norm = norms[norms["depth"] == norms["depth"].max()]["value"].mean()
    rates = pick(rows, "rate", part="rate", **where)["value"]
    return pd.DataFrame([cell(t_interval(rates), mean_norm=mean_norm, **where)] if len(rates) else [])


def _settled(rows: pd.DataFrame) -> pd.DataFrame:
    """Each random net's χ and rate beside the mean-field χ of its activation, σw² and σb²."""
    keys = ["activation", "weight_var", "bias_var", "net_seed"]
    measured = rows[rows["quantity"].isin(["chi", "rate"])].pivot(index=keys, columns="quantity", values="value").reset_index()
    measured["prediction"] = [mean_field.chi(net.activation, net.weight_var, net.bias_var) for net in measured.itertuples()]
    return measured


def _has_known_scale(settled: pd.DataFrame) -> pd.Series:
    return (settled["activation"] == "tanh") & settled["weight_var"].isin(KNOWN_SCALE)


def _by_setting(settled: pd.DataFrame, statistic: Callable[[pd.DataFrame], pd.Series]) -> pd.DataFrame:
    """The t-interval of a statistic over the seeds of each setting."""
    cells = []
    for (activation, weight_var), nets in settled.groupby(["activation", "weight_var"]):
        at = {"activation": activation, "weight_var": weight_var, "chi": nets["prediction"].iloc[0]}
        cells.append(cell(t_interval(statistic(nets)), **at))
    return pd.DataFrame(cells)


def trainable_depths(rows: pd.DataFrame) -> pd.DataFrame:
    """How deep short training reaches at each σw²: the deepest net before the first that fails, and that first one.

    A net trains when its mean train accuracy is at least half of the best in the grid. A failure counts only at depths where the
    net nearest to χ = 1, the control, trains: elsewhere it is the length of the training that decides.

    Returns: weight_var, chi, scale (ξ in layers), reached, failed (inf where none is known to fail), n (seeds).
    """
    accuracy = pick(rows, "train_accuracy", part="edge")
    table = accuracy.pivot_table(index="weight_var", columns="depth", values="value", aggfunc="mean")
    trains = (table >= table.to_numpy().max() / 2).cummin(axis=1)
    depths = table.columns.to_numpy()
    bias_var = float(accuracy["bias_var"].iloc[0])
    chi = {weight_var: mean_field.chi("tanh", float(weight_var), bias_var) for weight_var in table.index}
    control = trains.loc[min(chi, key=lambda weight_var: abs(np.log(chi[weight_var])))]
    found = []
    for weight_var, reached in trains.iterrows():
        bracket = {"reached": max(depths[reached], default=0), "failed": min(depths[~reached & control], default=np.inf)}
        scale = mean_field.depth_scale(chi[weight_var])
        seeds = accuracy[accuracy["weight_var"] == weight_var]["net_seed"].nunique()
        found.append({"weight_var": weight_var, "chi": chi[weight_var], "scale": scale, **bracket, "n": seeds})
    return pd.DataFrame(found)


def _trainable_depth(rows: pd.DataFrame) -> pd.DataFrame:
    """The depth that training reaches, in units of ξ, where gradients vanish (χ < 1)."""
    cells = []
    for edge in trainable_depths(rows).query("chi < 1").itertuples():
        lo, hi = edge.reached / edge.scale, edge.failed / edge.scale
        middle = np.sqrt(lo * hi) if np.isfinite(hi) else lo
        bracket = Estimate(middle, lo, hi, edge.n, "between the last depth that trains and the first that does not")
        cells.append(cell(bracket, weight_var=edge.weight_var))
    return pd.DataFrame(cells)


def _hidden(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope of ln ‖∇W_l‖ in units of the slope of ln ‖g_l‖, against l."""
    hiding = rows[(rows["part"] == "hiding") & rows["layer"].between(2, rows["depth"] - 1)]
    slopes = hiding.groupby(["quantity", "net_seed"])[["layer", "value"]].apply(lambda net: slope(net["layer"], net["value"]).value)
    return pd.DataFrame([cell(t_interval(slopes["weight_gradient"] / slopes["error_signal"]), **HIDING)])
