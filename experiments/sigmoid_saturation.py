"""Step 4, activation saturation: what saturated logistic units do to the Jacobians, to the gradient and to learning.

Measured on random logistic MLPs and real images, saturated by σb² at fixed weights or by σw²: J_l = diag(σ')W_l and its bounds, ‖J_l‖
against the share of saturated units, the growth χ of ‖g_l‖² a layer and the σw² beyond which it exceeds 1 (Poole et al. 2016;
Schoenholz et al. 2017), and short trainings; logistic nets mapped from tanh nets; the top hidden layer through a long training, which
saturates and escapes (Glorot & Bengio 2010, section 3.1 and Figure 2).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import ceil, log
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from src import mean_field
from src.chain import cut
from src.config import Activation, Config, Criterion, ModelConfig, TrainingConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.locking import SATURATED, saturation
from src.models.logistic import InTanhCoordinates, logistic_twin
from src.models.start import neutral_readout, standard_start
from src.plan import Work
from src.rows import pick
from src.saturation import activity, of_logistic_layer, slopes
from src.statistics import Estimate, greatest, least, paired_difference, slope, t_interval
from src.verdict import Verdict, cell, judge_forms

Row = dict[str, Any]

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
WORST = ("equation_error", "norm_bound", "quarter_bound")  # of the quantities of a layer, those reported at their worst
THRESHOLDS = (1.0, 3.0, 5.0, 8.0)  # of |z|
VARIANCES = (0.0, 0.5, 1.0, 4.0)  # q, at which E[φ'²] is held against theory
BOUNDED: tuple[Activation, ...] = ("sigmoid", "tanh")
WIDE = 4  # times the configured width, for a mean over units
NEAR_ZERO = 0.1  # mean activation of a saturated top layer
LEARNT = 0.3  # test accuracy of a net that has left its plateau: three times chance of ten classes
# where the mapped tanh net is critical, χ = 1
CRITICAL: dict[str, Any] = {"activation": "tanh", "weight_var": 1.761, "bias_var": 0.05}
USUAL: dict[str, Any] = {"activation": "sigmoid", "weight_var": 1.0, "bias_var": 0.0}
# Glorot & Bengio 2010, sections 2.3 and 3.1: plain SGD on batches of ten; activations on 300 test images
RECIPE: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "batch_size": 10, "schedule": "constant"}
WATCHED_IMAGES, WATCHED_TIMES, PERCENTILES = 300, 40, (2.0, 50.0, 98.0)


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
    short = context.steps()
    return [
        *(Work(model, grid.seeds, measuring=context.certify) for _, model in _saturating(config, depth=grid.rate_depth)),
        *(Work(model, grid.seeds) for model in _wide(config)),
        *(Work(model, grid.seeds) for model in _mapped(config)),
        *(Work(model, grid.train_seeds, short) for _, model in _learning(config)),
        *(Work(model, nets * grid.train_seeds, short) for model, nets in zip(_mapped_short(config), (3, 1), strict=True)),
        *(Work(model, grid.long_seeds, grid.long_steps) for model in _long(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    parts = (_jacobians, _square_slopes, _mapped_signals, _learn, _mapped_trainings, _watch)
    return pd.DataFrame([row for part in parts for row in part(context)])


def _saturating(config: Config, **changes: Any) -> list[tuple[str, ModelConfig]]:
    """Logistic nets that are saturated by σw², or by σb² at σw² = 1, beside what is varied."""
    settings = [("weight_var", weight_var, 0.0) for weight_var in config.grid.weight_vars]
    settings += [("bias_var", 1.0, bias_var) for bias_var in config.grid.bias_vars]
    return [(varied, replace(config.model, activation="sigmoid", weight_var=w, bias_var=b, **changes)) for varied, w, b in settings]


def _jacobians(context: Context) -> Iterator[Row]:
    """Saturation, Jacobians and the gradient's rate of random nets, over the second half of the hidden layers."""
    grid = context.config.grid
    inputs, _ = context.samples(context.data.test, grid.samples)
    for varied, model in context.progress(_saturating(context.config, depth=grid.rate_depth), "saturated nets"):
        for seed in range(grid.seeds):
            network = context.network(model, seed)
            where = {"part": "jacobian", "varied": varied, **network_columns(model, seed)}
            chain = cut(network, None, torch.float64, "eval")
            deep = list(zip(chain.stages, chain.states(inputs.double()), strict=False))[grid.rate_depth // 2 - 1 : -1]
            for quantity, by_layer in pd.DataFrame([of_logistic_layer(*layer) for layer in deep]).items():
                yield {"quantity": quantity, "value": by_layer.max() if quantity in WORST else by_layer.mean(), **where}
            z, steepness = (torch.stack(of_layers) for of_layers in zip(*(slopes(*layer) for layer in deep), strict=True))
            for threshold in THRESHOLDS:
                tail = steepness[z.abs() >= threshold]
                yield {"quantity": "tail_slope", "value": float(tail.max()) if len(tail) else 0.0, "threshold": threshold, **where}
            yield {"quantity": "rate", "value": growth(context.error_signals(network)), **where}


def growth(signals: Mapping[int, float]) -> float:
    """The slope of ln mean_n ‖g_l‖² against L − l over the second half of the hidden layers, from ½ ln mean_n ‖g_l‖² of l = 1…L."""
    deep = range(len(signals) // 2, len(signals))
    return slope([len(signals) - layer for layer in deep], [2 * signals[layer] for layer in deep]).value


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
            yield {"quantity": "square_slope", "value": float(steepness.square().mean()), "part": "slope", **network_columns(model, seed)}


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
            yield {"quantity": "rate", "value": growth(signals), **where}
            yield from ({"quantity": "error_signal", "value": value, "layer": layer, **where} for layer, value in signals.items())


def _learning(config: Config) -> list[tuple[str, ModelConfig]]:
    grid = config.grid
    return [net for depth in grid.train_depths for net in _saturating(config, depth=depth, width=grid.train_width)]


def _learn(context: Context) -> Iterator[Row]:
    """Short trainings of nets that are saturated at the start; only their hidden layers differ."""
    inputs, _ = context.samples(context.data.test, context.config.grid.samples)
    for varied, model in context.progress(_learning(context.config), "short trainings"):
        for seed in range(context.config.grid.train_seeds):
            network = context.network(model, seed)
            neutral_readout(network, model.weight_var)
            where = {"part": "learning", "varied": varied, **network_columns(model, seed)}
            chain = cut(network, None, torch.float64, "eval")
            shares = [saturation(*stage).mean() for stage in zip(chain.stages[:-1], chain.states(inputs.double()), strict=False)]
            yield {"quantity": "saturated", "value": float(torch.stack(shares).mean()), **where}
            outcome = context.train(network, f"σw²={model.weight_var:g}, σb²={model.bias_var:g}, depth {model.depth}, seed {seed}", seed)
            for quantity, value in outcome.metrics().items():
                yield {"quantity": quantity, "value": value, **where}


def _mapped_short(config: Config) -> list[ModelConfig]:
    return [replace(model, width=config.grid.train_width) for model in _mapped(config)]


def _mapped_trainings(context: Context) -> Iterator[Row]:
    """A critical tanh net, the logistic net that is that net, trained in either's coordinates, and the usual start."""
    critical, usual = _mapped_short(context.config)
    for seed in context.progress(range(context.config.grid.train_seeds), "mapped nets"):
        nets: dict[str, tuple[ModelConfig, nn.Module]] = {
            "tanh net": (critical, context.network(critical, seed)),
            "tanh": (critical, InTanhCoordinates(context.network(critical, seed))),
            "logistic": (critical, logistic_twin(context.network(critical, seed))),
            "usual": (usual, context.network(usual, seed)),
        }
        for coordinates, (model, network) in nets.items():
            where = {"part": "mapped training", "coordinates": coordinates, **network_columns(model, seed)}
            for quantity, value in context.train(network, f"{coordinates}, depth {model.depth}, seed {seed}", seed).metrics().items():
                yield {"quantity": quantity, "value": value, **where}


def _long(config: Config) -> list[ModelConfig]:
    """The standard start of Glorot & Bengio 2010, equation 1: U[−1/√n, 1/√n] has the variance 1/(3n)."""
    start: dict[str, Any] = {"activation": "sigmoid", "weight_var": 1 / 3, "bias_var": 0.0, "width": config.grid.long_width}
    return [replace(config.model, **start, depth=depth) for depth in config.grid.long_depths]


def _watch(context: Context) -> Iterator[Row]:
    """The activations of every hidden layer through a long training."""
    grid = context.config.grid
    images, _ = context.samples(context.data.test, WATCHED_IMAGES)
    times = set(np.geomspace(1, grid.long_steps, WATCHED_TIMES).astype(int).tolist())
    recipe = recipe_of(context)
    for model in context.progress(_long(context.config), "long trainings"):
        for seed in range(grid.long_seeds):
            network = context.network(model, seed)
            standard_start(network, context.generator("uniform", seed))
            seen = {0: activity(network[:-1], images, PERCENTILES)}

            def watch(step: int, network: nn.Sequential = network, seen: dict[int, Any] = seen) -> None:
                if step in times:
                    seen[step] = activity(network[:-1], images, PERCENTILES)

            outcome = context.train(network, f"{model.depth - 1} hidden layers, seed {seed}", seed, on_step=watch, config=recipe)
            where = {"part": "long", **network_columns(model, seed)}
            for step, layers in seen.items():
                for layer, of_layer in enumerate(layers, start=1):
                    for name, value in of_layer.items():
                        yield {"quantity": f"activation_{name}", "value": value, "step": step, "layer": layer, **where}
            for point in outcome.history.itertuples():
                yield {"quantity": "test_accuracy", "value": point.test_accuracy, "step": point.step, **where}


def recipe_of(context: Context) -> TrainingConfig:
    """The training of Glorot & Bengio 2010, `grid.long_steps` long."""
    grid = context.config.grid
    epochs = ceil(grid.long_steps / (len(context.data.train) // RECIPE["batch_size"]))
    return replace(context.config.training, **RECIPE, lr=grid.long_lr, epochs=epochs, max_steps=grid.long_steps)


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    nets = jacobian_nets(rows)
    by_weights = nets[nets["varied"] == "weight_var"]
    usual = by_weights[by_weights["weight_var"] <= 1]
    learning = learning_nets(rows)
    norm_falls = _falls(nets, ["varied"], "log_norm")
    learning_falls = _falls(learning, ["varied", "depth", "best"], "test_accuracy")
    courses = _courses(rows)

    def by_net(quantity: str) -> pd.DataFrame:
        return _by_setting(nets, nets[quantity])

    cells = {
        "flat_tails": _worst(pick(rows, "tail_slope"), "threshold"),
        "jacobian_equation": _worst(pick(rows, "equation_error"), "weight_var", "bias_var"),
        "norm_bound": _worst(pick(rows, "norm_bound"), "weight_var", "bias_var"),
        "quarter_bound": _worst(pick(rows, "quarter_bound"), "weight_var", "bias_var"),
        "saturated_contribution": by_net("contribution").query("saturated >= 0.05"),
        "near_zero_jacobian": by_net("norm"),
        "norm_falls": norm_falls,
        "norm_falls_at_fixed_weights": norm_falls,
        "slopes_fall": _falls(nets.assign(log_slope=np.log(nets["chi"] / nets["weight_var"])), ["varied"], "log_slope"),
        "mean_square_slope": _square_slope_cells(rows),
        "rate": _by_setting(usual, np.exp(usual["rate"]) / usual["prediction"] - 1),
        "saturation_locks": by_net("rate"),
        "large_norms_vanish": by_net("rate").query("varied == 'weight_var'"),
        "chi_decides": by_net("rate"),
        "critical_variance": _crossings(by_weights),
        "learning_falls": learning_falls,
        "learning_falls_at_fixed_weights": learning_falls,
        "mapped_signal": _mapped_ratio(rows),
        "mapped_flow": _mapped_rates(rows),
        "mapped_training": _mapped_accuracy(rows, "tanh net", ["tanh", "logistic"]),
        "mapped_gain": _mapped_accuracy(rows, "usual", ["tanh"]),
        "top_layer_saturates": _course_cells(courses[courses["learnt"]], "lowest_early", greatest),
        "top_layer_escapes": _course_cells(courses[courses["learnt"] & (courses["lowest"] < NEAR_ZERO)], "rise", least),
        "five_never_escape": _course_cells(courses[(courses["lowest"] < NEAR_ZERO) & (courses["hidden_layers"] == 5)], "rise", greatest),
    }
    return judge_forms("sigmoid_saturation", criteria, cells)


def _wide_form(rows: pd.DataFrame, part: str, keys: list[str]) -> pd.DataFrame:
    """A row a network, a column a quantity."""
    of_part = rows[(rows["part"] == part) & (rows["quantity"] != "tail_slope")]
    return of_part.pivot(index=keys, columns="quantity", values="value").reset_index()


def jacobian_nets(rows: pd.DataFrame) -> pd.DataFrame:
    """Each saturated random net: what was measured, a column a quantity, beside the mean-field χ of its σw² and σb² (`prediction`)."""
    nets = _wide_form(rows, "jacobian", ["varied", "weight_var", "bias_var", "net_seed"])
    nets["prediction"] = [mean_field.chi("sigmoid", net.weight_var, net.bias_var) for net in nets.itertuples()]
    return nets


def learning_nets(rows: pd.DataFrame) -> pd.DataFrame:
    """Each short training of a saturated net, a column a quantity, beside the mean accuracy of the best setting (`best`)."""
    nets = _wide_form(rows, "learning", ["depth", "varied", "weight_var", "bias_var", "net_seed"])
    means = nets.groupby(["depth", "varied", "weight_var", "bias_var"])["test_accuracy"].transform("mean")
    return nets.assign(best=means.groupby([nets["depth"], nets["varied"]]).transform("max"))


def _worst(values: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """The largest of a quantity over all networks of a kind."""
    return pd.DataFrame([cell(greatest(own["value"]), **dict(zip(keys, at, strict=True))) for at, own in values.groupby(list(keys))])


def _by_setting(nets: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """The t-interval of a value a net over the seeds of each setting, beside the setting's mean saturation, mean ‖J_l‖ and χ in theory."""
    cells = []
    for (varied, weight_var, bias_var), own in nets.groupby(["varied", "weight_var", "bias_var"]):
        means = {"saturated": own["saturated"].mean(), "mean_norm": own["norm"].mean(), "chi": own["prediction"].iloc[0]}
        cells.append(cell(t_interval(values[own.index]), varied=varied, weight_var=weight_var, bias_var=bias_var, **means))
    return pd.DataFrame(cells)


def _falls(nets: pd.DataFrame, keys: list[str], quantity: str) -> pd.DataFrame:
    """The slope of a quantity against the share of saturated units: one a seed over its settings, which share their random numbers."""
    cells = []
    for at, own in nets.groupby(keys):
        slopes = [slope(net["saturated"], net[quantity]).value for _, net in own.groupby("net_seed")]
        cells.append(cell(t_interval(slopes), **dict(zip(keys, at, strict=True))))
    return pd.DataFrame(cells)


def _square_slope_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured E[φ'²] over predicted − 1."""
    cells = []
    for (activation, q), layers in pick(rows, "square_slope").groupby(["activation", "weight_var"]):
        prediction = mean_field.mean_square_derivative(activation, q)
        cells.append(cell(t_interval(layers["value"] / prediction - 1), activation=activation, q=q, predicted=prediction))
    return pd.DataFrame(cells)


def _crossings(nets: pd.DataFrame) -> pd.DataFrame:
    """The σw² at which a growth per layer crosses 1, over predicted − 1: between the nearest on either side, in logs."""
    critical = mean_field.critical_weight_var("sigmoid", 0.0)
    low, high = (nets.loc[side, "weight_var"] for side in (nets["weight_var"] < critical, nets["weight_var"] > critical))
    cells = []
    for growth, values in (("singular values", np.log(nets["chi"])), ("gradient", nets["rate"])):
        table = nets.assign(growth=values).pivot(index="net_seed", columns="weight_var", values="growth")
        below, above = table[low.max()], table[high.min()]
        crossing = log(low.max()) - below * log(high.min() / low.max()) / (above - below)
        cells.append(cell(t_interval(np.exp(crossing) / critical - 1), growth=growth, predicted=critical))
    return pd.DataFrame(cells)


def _mapped_ratio(rows: pd.DataFrame) -> pd.DataFrame:
    """How far ‖∇ by a logistic state‖ is from twice ‖∇ by the tanh state‖, hidden layers."""
    signals = pick(rows, "error_signal", part="mapped")
    hidden = signals[signals["layer"] < signals["depth"]].pivot(index=["net_seed", "layer"], columns="start", values="value")
    return pd.DataFrame([cell(greatest((hidden["mapped"] - hidden["tanh"] - log(2)).abs()), activation="sigmoid")])


def _mapped_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope of ln‖g_l‖² against the distance from the loss, for the mapped and the usual start."""
    rates = pick(rows, "rate", part="mapped").query("start != 'tanh'")
    return pd.DataFrame([cell(t_interval(own["value"]), start=start) for start, own in rates.groupby("start")])


def _mapped_accuracy(rows: pd.DataFrame, reference: str, coordinates: list[str]) -> pd.DataFrame:
    """Test accuracy of the mapped net, trained in the given coordinates, minus that of a reference, paired by seed."""
    accuracy = pick(rows, "test_accuracy", part="mapped training").pivot(index="net_seed", columns="coordinates", values="value")
    return pd.DataFrame([cell(paired_difference(accuracy[own], accuracy[reference]), coordinates=own) for own in coordinates])


def _courses(rows: pd.DataFrame) -> pd.DataFrame:
    """Each long training's lowest mean activation of the top hidden layer, the lowest in the first half, and the rise from the lowest."""
    means = pick(rows, "activation_mean", part="long")
    courses = []
    for (depth, seed), course in means[means["layer"] == means["depth"] - 1].groupby(["depth", "net_seed"]):
        course = course.sort_values("step").set_index("step")["value"]
        early, late = course[: course.index.max() / 2], course[course.idxmin() :]
        accuracy = pick(rows, "test_accuracy", part="long", depth=depth, net_seed=seed).sort_values("step")["value"].iloc[-1]
        of_course = {"lowest_early": early.min(), "lowest": course.min(), "rise": late.max() - course.min()}
        courses.append({"hidden_layers": int(depth) - 1, "net_seed": seed, "learnt": accuracy >= LEARNT, **of_course})
    return pd.DataFrame(courses)


def _course_cells(courses: pd.DataFrame, quantity: str, bound: Callable[[pd.Series], Estimate]) -> pd.DataFrame:
    """The extreme of a quantity over the long trainings of a depth."""
    return pd.DataFrame([cell(bound(own[quantity]), hidden_layers=hidden) for hidden, own in courses.groupby("hidden_layers")])
