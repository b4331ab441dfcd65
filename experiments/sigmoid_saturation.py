"""Step 4, activation saturation: what saturated logistic units do to the Jacobians, to the gradient and to learning.

Measured on random logistic MLPs and real images, saturated by σb² at fixed weights or by σw²: J_l = diag(σ')W_l and its bounds, ‖J_l‖
against the share of saturated units, the growth χ of ‖g_l‖² a layer and the σw² beyond which it exceeds 1 (Poole et al. 2016;
Schoenholz et al. 2017), and short trainings; logistic nets mapped from tanh nets; the top hidden layer through a long training, which
saturates and escapes (Glorot & Bengio 2010, section 3.1 and Figure 2).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from math import log
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.sigmoid_top_layer import RECIPE, WATCHED_IMAGES, courses, long_nets, watch
from src import mean_field
from src.chain import cut
from src.config import Activation, Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.locking import growth
from src.models.logistic import InTanhCoordinates, logistic_twin
from src.models.start import neutral_readout
from src.plan import Work
from src.rows import Row, measured, pick
from src.saturation import of_logistic_layer, slopes
from src.statistics import greatest, paired, slope, t_interval
from src.trainings import Trainee, train_all
from src.units import SATURATED, Units
from src.verdict import Verdict, cells_by, judge_forms

QUANTITIES = {
    "saturated": f"share of units whose slope σ' is below {SATURATED:g} of its maximum ¼, mean over samples and layers",
    "norm": "mean ‖J_l‖ over samples and layers",
    "log_norm": "mean ln ‖J_l‖ over samples and layers, nats",
    "chi": "mean squared singular value of J_l over samples and layers",
    "equation_error": "‖J_l − diag(σ')W_l‖_F / ‖J_l‖_F, the worst sample and layer",
    "norm_bound": "‖J_l‖ / (max σ'·‖W_l‖), the worst sample and layer",
    "quarter_bound": "‖J_l‖ / (¼‖W_l‖), the worst sample and layer",
    "contribution": "share of ‖J_l‖_F² in the rows of saturated units, over samples and layers",
    "tail_slope": "largest σ'(z) among units with |z| ≥ threshold; 0 where there are none",
    "rate": "slope of ln mean_n ‖g_l‖² against the layers between a gradient and the loss, nats a layer",
    "square_slope": "mean φ'(z)² over units and samples of a layer whose z have variance q",
    "error_signal": "½ ln mean_n ‖g_l‖² at layer l, nats",
    "activation_mean": "mean activation of a hidden layer over units and test images",
    "activation_std": "standard deviation of the activations of a hidden layer over units and test images",
    "activation_p2": "2nd percentile of the activations of a hidden layer over units and test images",
    "activation_p50": "median activation of a hidden layer over units and test images",
    "activation_p98": "98th percentile of the activations of a hidden layer over units and test images",
    "train_accuracy": "share of training images told right",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
SETTING = ["varied", "weight_var", "bias_var"]
# what is reported at its worst, by the criterion
EXACT = {"jacobian_equation": "equation_error", "norm_bound": "norm_bound", "quarter_bound": "quarter_bound"}
THRESHOLDS = (1.0, 3.0, 5.0, 8.0)  # of |z|
VARIANCES = (0.0, 0.5, 1.0, 4.0)  # q, at which E[φ'²] is held against theory
BOUNDED: tuple[Activation, ...] = ("sigmoid", "tanh")
WIDE = 4  # times the configured width, for a mean over units
# where the mapped tanh net is critical, χ = 1
CRITICAL: dict[str, Any] = {"activation": "tanh", "weight_var": 1.761, "bias_var": 0.05}
USUAL: dict[str, Any] = {"activation": "sigmoid", "weight_var": 1.0, "bias_var": 0.0}


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    critical = mean_field.critical_weight_var("sigmoid", 0.0)
    require(min(grid.weight_vars) > 0, "grid.weight_vars: σw² above 0")
    require(min(grid.weight_vars) < critical < max(grid.weight_vars), f"grid.weight_vars: on both sides of {critical:.1f}, where χ = 1")
    require(len(set(grid.bias_vars)) > 1, "grid.bias_vars: at least two σb²")
    require(grid.rate_depth >= 4, "grid.rate_depth: at least 4 weight layers, for a slope over the deeper half")
    require(min(grid.train_depths + grid.long_depths) >= 2, "grid.train_depths, grid.long_depths: each of at least 2 weight layers")
    require(grid.samples <= len(data.test), f"grid.samples: at most {len(data.test)}, the test images")
    require(len(data.test) >= WATCHED_IMAGES, f"data.test_size: at least {WATCHED_IMAGES} images, that activations are watched on")
    require(len(data.train) >= RECIPE["batch_size"], f"data.train_size: at least {RECIPE['batch_size']} images, one batch")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    short, measuring = context.steps(), partial(of_net, context=context)
    return [
        *(Work(model, grid.seeds, measuring=measuring) for _, model in _saturating(config, depth=grid.rate_depth)),
        *(Work(model, grid.seeds) for model in _wide(config)),
        *(Work(model, grid.seeds) for model in _mapped(config)),
        *(Work(model, grid.train_seeds, short) for depth in grid.train_depths for _, model in _learning(config, depth)),
        *(Work(model, nets * grid.train_seeds, short) for model, nets in zip(_mapped_short(config), (3, 1), strict=True)),
        *(Work(model, grid.long_seeds, grid.long_steps) for model in long_nets(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_jacobians, _square_slopes, _mapped_signals, _learn, _mapped_trainings, watch)


def _saturating(config: Config, **changes: Any) -> list[tuple[str, ModelConfig]]:
    """Logistic nets that are saturated by σw², or by σb² at σw² = 1, beside what is varied."""
    settings = [("weight_var", weight_var, 0.0) for weight_var in config.grid.weight_vars]
    settings += [("bias_var", 1.0, bias_var) for bias_var in config.grid.bias_vars]
    return [(varied, replace(config.model, activation="sigmoid", weight_var=w, bias_var=b, **changes)) for varied, w, b in settings]


def of_net(network: nn.Sequential, context: Context) -> list[Row]:
    """Saturation and Jacobians of a logistic net, over every second layer of the deeper half, and the gradient's rate over that half."""
    inputs, _ = context.samples(context.data.test, context.config.grid.samples)
    chain = cut(network, None, torch.float64, "eval")
    deep = list(zip(chain.stages, chain.states(inputs.double()), strict=False))[len(chain.stages) // 2 - 1 : -1 : 2]
    layers = pd.DataFrame([of_logistic_layer(*layer) for layer in deep])
    found = {**layers.mean().to_dict(), **layers[[*EXACT.values()]].max().to_dict(), "rate": growth(context.error_signals(network))}
    z, steepness = (torch.stack(of_layers) for of_layers in zip(*(slopes(*layer) for layer in deep), strict=True))
    tails = {threshold: float((steepness * (z.abs() >= threshold)).max()) for threshold in THRESHOLDS}
    return [*measured({}, **found), *(row for at, tail in tails.items() for row in measured({"threshold": at}, tail_slope=tail))]


def _jacobians(context: Context) -> Iterator[Row]:
    """Random nets at every degree of saturation."""
    for varied, model in context.progress(_saturating(context.config, depth=context.config.grid.rate_depth), "saturated nets"):
        for seed in range(context.config.grid.seeds):
            where = {"part": "jacobian", "varied": varied, **network_columns(model, seed)}
            yield from (row | where for row in of_net(context.network(model, seed), context))


def _wide(config: Config) -> list[ModelConfig]:
    settings = [(phi, q) for phi in BOUNDED for q in VARIANCES]
    return [
        replace(config.model, activation=phi, weight_var=q, bias_var=0.0, depth=2, width=WIDE * config.model.width) for phi, q in settings
    ]


def _square_slopes(context: Context) -> Iterator[Row]:
    """Mean φ'(z)² of a layer on images of mean square 1, so that z has the variance σw²."""
    inputs, _ = context.samples(context.data.test, context.config.grid.samples)
    images = inputs.double().flatten(1)
    images = images / images.square().mean(1, keepdim=True).sqrt()
    for model in context.progress(_wide(context.config), "slopes"):
        for seed in range(context.config.grid.seeds):
            layer = cut(context.network(model, seed), None, torch.float64, "eval").stages[0]
            _, steepness = slopes(layer, images)
            yield from measured({"part": "slope", **network_columns(model, seed)}, square_slope=float(steepness.square().mean()))


def _mapped(config: Config) -> list[ModelConfig]:
    return [replace(config.model, **start, depth=config.grid.rate_depth) for start in (CRITICAL, USUAL)]


def _mapped_signals(context: Context) -> Iterator[Row]:
    """‖g_l‖ of critical tanh nets, of the logistic nets mapped from them, and of logistic nets with the usual start."""
    critical, usual = _mapped(context.config)
    for seed in range(context.config.grid.seeds):
        tanh = context.network(critical, seed).double()
        nets = {"tanh": (critical, tanh), "mapped": (critical, logistic_twin(tanh)), "usual": (usual, context.network(usual, seed))}
        for start, (model, network) in nets.items():
            signals = context.error_signals(network)
            where = {"part": "mapped", "start": start, **network_columns(model, seed)}
            yield from measured(where, rate=growth(signals))
            yield from (row for layer, value in signals.items() for row in measured({"layer": layer, **where}, error_signal=value))


def _learning(config: Config, depth: int) -> list[tuple[str, ModelConfig]]:
    return _saturating(config, depth=depth, width=config.grid.train_width)


def _learn(context: Context) -> Iterator[Row]:
    """Short trainings of nets that are saturated at the start; only their hidden layers differ."""
    grid = context.config.grid
    inputs, _ = context.samples(context.data.test, grid.samples)
    for depth in context.progress(grid.train_depths, "short trainings"):
        nets = [*product(_learning(context.config, depth), range(grid.train_seeds))]
        trainees = []
        for (_, model), seed in nets:
            network = context.network(model, seed)
            neutral_readout(network, model.weight_var)
            trainees.append(Trainee(network, f"σw²={model.weight_var:g}, σb²={model.bias_var:g}, depth {depth}, seed {seed}", seed))
        shares = [_saturated_share(trainee.network, inputs) for trainee in trainees]
        for ((varied, model), seed), share, outcome in zip(nets, shares, train_all(context, trainees), strict=True):
            where = {"part": "learning", "varied": varied, **network_columns(model, seed)}
            yield from measured(where, saturated=share, **outcome.metrics())


def _saturated_share(network: nn.Module, inputs: Tensor) -> float:
    """The share of saturated hidden units, mean over layers."""
    chain = cut(network, None, torch.float64, "eval")
    states = zip(chain.stages[:-1], chain.states(inputs.double()), strict=False)
    return float(torch.stack([Units.of(*stage).saturation.mean() for stage in states]).mean())


def _mapped_short(config: Config) -> list[ModelConfig]:
    return [replace(model, width=config.grid.train_width) for model in _mapped(config)]


def _mapped_trainings(context: Context) -> Iterator[Row]:
    """A critical tanh net, the logistic net that is that net, trained in either's coordinates, and the usual start."""
    critical, usual = _mapped_short(context.config)
    nets: dict[str, tuple[ModelConfig, Callable[[nn.Sequential], nn.Module]]] = {
        "tanh net": (critical, lambda net: net),
        "tanh": (critical, InTanhCoordinates),
        "logistic": (critical, logistic_twin),
        "usual": (usual, lambda net: net),
    }
    seeds = range(context.config.grid.train_seeds)
    for coordinates, (model, mapped) in context.progress([*nets.items()], "mapped nets"):
        networks = [mapped(context.network(model, seed)) for seed in seeds]
        names = [f"{coordinates}, depth {model.depth}, seed {seed}" for seed in seeds]
        for seed, outcome in enumerate(train_all(context, [*map(Trainee, networks, names, seeds)])):
            where = {"part": "mapped training", "coordinates": coordinates, **network_columns(model, seed)}
            yield from measured(where, **outcome.metrics())


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    nets, learning = jacobian_nets(rows), learning_nets(rows)
    by_weights = nets[nets["varied"] == "weight_var"]
    usual = by_weights[by_weights["weight_var"] <= 1]
    norm_falls = falls(nets, ["varied"], "log_norm")
    learning_falls = falls(learning, ["varied", "depth", "best"], "test_accuracy")
    long = courses(rows)
    cells = {
        "flat_tails": cells_by(pick(rows, "tail_slope"), ["threshold"], greatest),
        **{name: cells_by(pick(rows, quantity), ["weight_var", "bias_var"], greatest) for name, quantity in EXACT.items()},
        "saturated_contribution": _by_setting(nets, nets["contribution"]).query("saturated >= 0.05"),
        "near_zero_jacobian": _by_setting(nets, nets["norm"]),
        "norm_falls": norm_falls,
        "norm_falls_at_fixed_weights": norm_falls,
        "slopes_fall": falls(nets.assign(log_slope=np.log(nets["chi"] / nets["weight_var"])), ["varied"], "log_slope"),
        "mean_square_slope": _square_slope_cells(rows),
        "rate": _by_setting(usual, np.exp(usual["rate"]) / usual["prediction"] - 1),
        "saturation_locks": _by_setting(nets, nets["rate"]),
        "large_norms_vanish": _by_setting(by_weights, by_weights["rate"]),
        "chi_decides": _by_setting(nets, nets["rate"]),
        "critical_variance": _crossings(by_weights),
        "learning_falls": learning_falls,
        "learning_falls_at_fixed_weights": learning_falls,
        "mapped_signal": _mapped_ratio(rows),
        "mapped_flow": cells_by(pick(rows, "rate", part="mapped").query("start != 'tanh'"), ["start"], t_interval),
        "mapped_training": _mapped_accuracy(rows, "tanh net"),
        "mapped_gain": _mapped_accuracy(rows, "usual"),
        "top_layer_saturates": _by_depth(long, "lowest_early"),
        **{name: _by_depth(_low(long, criteria[name]), "rise") for name in ("top_layer_escapes", "five_never_escape")},
    }
    return judge_forms("sigmoid_saturation", criteria, cells)


def _wide_form(rows: pd.DataFrame, part: str, keys: list[str]) -> pd.DataFrame:
    """A row a network, a column a quantity."""
    of_part = rows[(rows["part"] == part) & (rows["quantity"] != "tail_slope")]
    return of_part.pivot(index=keys, columns="quantity", values="value").reset_index()


def jacobian_nets(rows: pd.DataFrame) -> pd.DataFrame:
    """Each saturated random net: what was measured, a column a quantity, beside the mean-field χ of its σw² and σb² (`prediction`)."""
    nets = _wide_form(rows, "jacobian", [*SETTING, "net_seed"])
    return nets.assign(prediction=[mean_field.chi("sigmoid", net.weight_var, net.bias_var) for net in nets.itertuples()])


def learning_nets(rows: pd.DataFrame) -> pd.DataFrame:
    """Each short training of a saturated net, a column a quantity, beside the mean accuracy of the best setting (`best`)."""
    nets = _wide_form(rows, "learning", ["depth", *SETTING, "net_seed"])
    means = nets.groupby(["depth", *SETTING])["test_accuracy"].transform("mean")
    return nets.assign(best=means.groupby([nets["depth"], nets["varied"]]).transform("max"))


def _by_setting(nets: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """The t-interval of a value a net over the seeds of each setting, beside the setting's mean saturation, mean ‖J_l‖ and χ in theory."""
    means = nets.groupby(SETTING)[["saturated", "norm"]].transform("mean").rename(columns={"norm": "mean_norm"})
    of_setting = nets[SETTING].join(means).assign(chi=nets["prediction"])
    return cells_by(of_setting.assign(value=values), [*of_setting], t_interval)


def falls(nets: pd.DataFrame, keys: list[str], quantity: str) -> pd.DataFrame:
    """The slope of a quantity against the share of saturated units: one a seed over its settings, which share their random numbers.

    Its interval is over seeds, at these settings; beside it the interval over settings, from the residuals of their means, and R².
    """
    seeds = nets.groupby([*keys, "net_seed"])[["saturated", quantity]]
    slopes_of_seeds = seeds.apply(lambda own: slope(own["saturated"], own[quantity]).value)
    means = nets.groupby([*keys, "weight_var", "bias_var"])[["saturated", quantity]].mean()
    over_settings = means.groupby(keys).apply(_regression)
    return cells_by(slopes_of_seeds.reset_index(name="value").join(over_settings, on=keys), [*keys, *over_settings], t_interval)


def _regression(means: pd.DataFrame) -> pd.Series:
    """The 95% interval that the residuals give the slope of the second column against the first, and R²; 0 of a constant."""
    x, y = (means[column] for column in means)
    fit = slope(x, y)
    explained = fit.value**2 * x.var() / y.var() if y.var() > 0 else 0.0
    return pd.Series({"settings": len(means), "settings_lo": fit.lo, "settings_hi": fit.hi, "r_squared": explained})


def _square_slope_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured E[φ'²] over predicted − 1."""
    layers = pick(rows, "square_slope").rename(columns={"weight_var": "q"})
    predicted = np.array([mean_field.mean_square_derivative(layer.activation, layer.q) for layer in layers.itertuples()])
    relative = layers.assign(predicted=predicted, value=layers["value"] / predicted - 1)
    return cells_by(relative, ["activation", "q", "predicted"], t_interval)


def _crossings(nets: pd.DataFrame) -> pd.DataFrame:
    """The σw² at which a growth per layer crosses 1, over predicted − 1: between the nearest on either side, in logs."""
    critical = mean_field.critical_weight_var("sigmoid", 0.0)
    low, high = (nets.loc[side, "weight_var"] for side in (nets["weight_var"] < critical, nets["weight_var"] > critical))
    found = []
    for of, values in (("singular values", np.log(nets["chi"])), ("gradient", nets["rate"])):
        table = nets.assign(growth=values).pivot(index="net_seed", columns="weight_var", values="growth")
        below, above = table[low.max()], table[high.min()]
        crossing = np.exp(log(low.max()) - below * log(high.min() / low.max()) / (above - below))
        found.append(pd.DataFrame({"value": crossing / critical - 1, "growth": of, "predicted": critical}))
    return cells_by(pd.concat(found), ["growth", "predicted"], t_interval)


def _mapped_ratio(rows: pd.DataFrame) -> pd.DataFrame:
    """How far ‖∇ by a logistic state‖ is from twice ‖∇ by the tanh state‖, hidden layers."""
    signals = pick(rows, "error_signal", part="mapped")
    hidden = signals[signals["layer"] < signals["depth"]].pivot(index=["layer", "net_seed"], columns="start", values="value").reset_index()
    return cells_by(hidden.assign(value=(hidden["mapped"] - hidden["tanh"] - log(2)).abs()), ["layer"], greatest)


def _mapped_accuracy(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Test accuracy of the mapped net, trained in either's coordinates, minus that of a reference, paired by seed."""
    accuracy = pick(rows, "test_accuracy", part="mapped training")
    twins, others = accuracy[accuracy["coordinates"].isin(["tanh", "logistic"])], accuracy[accuracy["coordinates"] == reference]
    return cells_by(paired(twins, others, ["net_seed"]), ["coordinates"], t_interval)


def _low(trainings: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Those in which the top layer saturates."""
    return trainings[trainings["lowest"] < criterion.given["lowest"]]


def _by_depth(trainings: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The mean over long trainings."""
    return cells_by(trainings.assign(value=trainings[quantity]), ["hidden_layers", "steps"], t_interval)
