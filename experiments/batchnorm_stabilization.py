"""Step 6, normalisation: what batch normalisation does to Jacobian norms, and what depth still does to the gradient behind it.

Train-mode BatchNorm is one operator on the batch. Its Jacobian against the closed form (γ/σ)(I − 11ᵀ/N − x̂x̂ᵀ/N); the invariance of BN∘W to
the scale of W; the growth of ‖g‖² a layer against the mean field of Yang et al. 2019 (A Mean Field Theory of Batch Normalization), at
initialisation and along training; the depth to which short training reaches; layer normalisation beside it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy

from src.chain import cut
from src.config import Config, Criterion, ModelConfig, Norm, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.materialised import layer_jacobian
from src.jacobian.normalised import batch_norm_growth, closed_form, deviation, normalisation_jacobian, normalisation_norms
from src.locking import walk_back
from src.plan import Work
from src.rows import pick
from src.spectrum import spectrum
from src.statistics import Estimate, greatest, least, paired_difference, slope, t_interval
from src.verdict import Verdict, cell, judge_forms

Row = dict[str, Any]

QUANTITIES = {
    "operator_norm": "‖J‖ of a normalisation, from its Jacobian written out",
    "norm_error": "‖J‖ over max |γ|/σ, minus 1, absolute",
    "form_error": "largest |entry| of J minus its closed form, over max |γ|/σ",
    "spectrum_error": "largest |singular value over |γ|/σ − predicted| of any channel or sample: 1 (N−2 times), ε/(var+ε), 0",
    "output_change": "‖BN(sWx) − BN(Wx)‖ over ‖BN(Wx)‖",
    "gradient_change": "‖g − g at s = 1‖ over the latter's norm, g the gradient by x of a random linear function of BN(sWx)",
    "eps_share": "ε/(var+ε), the largest of any channel",
    "step_factor": "‖∇W‖/‖W‖ at sW over the same at W",
    "mean_norm": "‖J‖ = max |γ|/σ of a normalisation, mean over the layers of a net",
    "layer_norm": "‖J_l‖ of the middle layer, one operator on the batch",
    "error_signal": "ln ‖∂ℒ/∂H_l‖ over the whole batch, nats",
    "rate": "slope of ln ‖∂ℒ/∂H_l‖² against the layers between l and the loss, nats a layer",
    "flow": "ln ‖∂ℒ/∂H_1‖ − ln ‖∂ℒ/∂H_{L−1}‖, nats: 0 where the gradient passes unchanged",
    "range": "greatest minus least ln ‖∂ℒ/∂H_l‖ over the hidden layers, nats",
    "train_accuracy": "share of training images told right after the short training",
    "test_accuracy": "share of test images told right after the short training",
    "diverged": "1 where the short training diverged, else 0",
}
NORMS: tuple[Norm, ...] = ("batch", "layer")
CRITICAL = 2.0  # He's σw² for ReLU
# of the operators written out: values normalised together, ε, and how many units stand beside them
TOGETHER, EPSILONS, BESIDE = (2, 3, 4, 16), (1e-3, 1e-5, 1e-9, 1e-12), 8
# the scale of W over nine decades, with PyTorch's ε and without one to speak of (PyTorch refuses 0)
GAINS, GAIN_EPSILONS = np.logspace(-4.5, 4.5, 19), (1e-5, 1e-30)
LOOKED_AT = (0, 1, 2, 5, 10, 20, 50, 100)  # steps


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(min(grid.batch_sizes) >= 4, "grid.batch_sizes: at least 4 images: the growth is infinite at 3")
    for axis, sizes in (("batch_sizes", grid.batch_sizes), ("train_batch_sizes", grid.train_batch_sizes)):
        require(max(sizes) <= len(data.train), f"grid.{axis}: at most {len(data.train)}, the training images")
    require(min(grid.train_batch_sizes) >= 2, "grid.train_batch_sizes: at least 2 images, to be normalised together")
    require(2 <= grid.samples <= len(data.train), f"grid.samples: 2 to {len(data.train)}, the training images")
    require(min(grid.depths) >= 3, "grid.depths: each of at least 3 weight layers")
    require(grid.rate_depth >= 8, "grid.rate_depth: at least 8 weight layers, for a slope over the deeper half")
    require(all(d >= 4 and d % 2 == 0 for d in grid.train_depths), "grid.train_depths: 2n+2 weight layers, n ≥ 1: those of the control")
    require(min(grid.weight_vars + grid.train_weight_vars) > 0, "grid.weight_vars, grid.train_weight_vars: σw² above 0")
    require(CRITICAL in grid.train_weight_vars, f"grid.train_weight_vars: {CRITICAL:g} among them, the σw² that others are held against")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    return [
        Work(_gained(config), grid.seeds),
        *(Work(model, grid.seeds) for model in [*_varied(config), *_flowing(config)]),
        *(Work(model, grid.seeds * len(grid.batch_sizes)) for model in _rated(config)),
        *(Work(model, grid.train_seeds, context.steps()) for model in [*_tracked(config), *_repaired(config)]),
        *(Work(model, grid.train_seeds, context.steps(replace(config.training, batch_size=batch))) for batch, model in _deepened(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    parts = (_operators, _gains, _norms, _rates, _flows, _along, _repairs, _depths)
    return pd.DataFrame([row for part in parts for row in part(context)])


def _net(config: Config, **changes: object) -> ModelConfig:
    """A ReLU chain with normalisation, at He's σw² unless it is changed."""
    he = {"activation": "relu", "weight_var": CRITICAL, "bias_var": 0.0, "norm": "batch"}
    return replace(config.model, **cast(Any, {**he, **changes}))


def _operators(context: Context) -> Iterator[Row]:
    """Jacobians of normalisations written out, on random values with random gains, against the closed form."""
    for together in TOGETHER:
        for seed in range(context.config.grid.seeds):
            generator = context.generator("operator", together, seed)
            values = torch.randn(BESIDE, together, generator=generator, dtype=torch.float64)
            gains = torch.randn(BESIDE, generator=generator, dtype=torch.float64)
            for eps in EPSILONS:
                for norm, operator in (("batch", _batch_norm(gains, eps)), ("layer", _layer_norm(gains[0], together, eps))):
                    gain = gains if norm == "batch" else gains[:1].expand(BESIDE)
                    found = operator_errors(normalisation_jacobian(operator, values), values, gain, eps)
                    where = {"part": "operator", "norm": norm, "together": together, "eps": eps, "net_seed": seed}
                    yield from ({"quantity": quantity, "value": value, **where} for quantity, value in found.items())


def _batch_norm(gains: Tensor, eps: float) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(len(gains), eps, dtype=gains.dtype)
    norm.weight.data.copy_(gains)
    return norm


def _layer_norm(gain: Tensor, units: int, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(units, eps, dtype=gain.dtype)
    norm.weight.data.fill_(gain)
    return norm


def operator_errors(J: Tensor, values: Tensor, gains: Tensor, eps: float) -> dict[str, float]:
    """How far a normalisation's Jacobian [G, N, G, N] is from its closed form, from its norm and from its singular values."""
    groups, count = values.shape
    sigma, at = deviation(values, eps), torch.arange(groups)
    scales = gains.abs() / sigma
    norm, scale = spectrum(J.reshape(groups * count, -1)).norm, scales.max()
    form = torch.zeros_like(J)
    form[at, :, at] = closed_form(values, gains, eps)
    predicted = torch.ones(groups, count, dtype=values.dtype)
    predicted[:, -1] = 0
    predicted[:, -2] = eps / sigma.square()
    relative = spectrum(J[at, :, at]).values / scales.unsqueeze(1)
    return {
        "operator_norm": float(norm),
        "norm_error": float((norm / scale - 1).abs()),
        "form_error": float((J - form).abs().max() / scale),
        "spectrum_error": float((relative - predicted).abs().max()),
    }


def _gained(config: Config) -> ModelConfig:
    return _net(config, depth=2, width=config.grid.train_width)


def _gains(context: Context) -> Iterator[Row]:
    """BN∘W behind a random first layer's W scaled by s, against s = 1: outputs, and gradients by the input and by W."""
    grid, model = context.config.grid, _gained(context.config)
    images, _ = context.samples(context.data.train, context.config.training.batch_size)
    inputs = images.double().flatten(1)
    for seed in range(grid.seeds):
        W = next(module.weight for module in context.network(model, seed).modules() if isinstance(module, nn.Linear)).detach().double()
        covectors = torch.randn(len(inputs), len(W), generator=context.generator("covectors", seed), dtype=W.dtype).to(W.device)
        for eps in GAIN_EPSILONS:
            plain = normalised_product(W, inputs, covectors, eps)
            for gain in GAINS:
                scaled = normalised_product(float(gain) * W, inputs, covectors, eps)
                outputs, gradient = (float((new - old).norm() / old.norm()) for new, old in zip(scaled[:2], plain[:2], strict=True))
                where = {"part": "gain", "gain": float(gain), "eps": eps, **network_columns(model, seed)}
                yield {"quantity": "eps_share", "value": float(1 - scaled[0].var(0, correction=0).min()), **where}
                yield {"quantity": "output_change", "value": outputs, **where}
                yield {"quantity": "gradient_change", "value": gradient, **where}
                step = float(scaled[2].norm() / plain[2].norm()) / float(gain)
                yield {"quantity": "step_factor", "value": step, **where}


def normalised_product(W: Tensor, inputs: Tensor, covectors: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """BN(Wx) in train mode, and what covectors at it become at the inputs and at W."""
    inputs, W = inputs.clone().requires_grad_(), W.clone().requires_grad_()
    outputs = batch_norm(inputs @ W.T, None, None, training=True, eps=eps)
    by_inputs, by_W = torch.autograd.grad(outputs, (inputs, W), covectors)
    return outputs.detach(), by_inputs, by_W


def mean_norm(network: nn.Sequential, inputs: Tensor) -> float:
    """‖J‖ of the normalisations in train mode, mean over the layers."""
    return float(np.mean(normalisation_norms(cut(network, None, torch.float64, "train"), inputs.double())))


def middle_norm(network: nn.Sequential, inputs: Tensor) -> float:
    """‖J_l‖ of the middle layer in train mode, one operator on the batch."""
    chain = cut(network, None, torch.float64, "train")
    states = chain.states(inputs.double().unsqueeze(0))
    middle = len(chain.stages) // 2
    return float(spectrum(layer_jacobian(chain.stages[middle], states[middle])).norm)


def batch_signals(network: nn.Sequential, inputs: Tensor, targets: Tensor) -> dict[int, float]:
    """Compute ln ‖∂ℒ/∂H_l‖ of every layer l in train mode, ℒ the mean cross-entropy and H_l the whole batch; nats, in float64."""
    chain = cut(network, None, torch.float64, "train")
    return {link.index: link.signal.log_rms() for link in walk_back(chain, inputs.double(), targets, cross_entropy)}


def _signal_rows(signals: Mapping[int, float], where: Row) -> Iterator[Row]:
    """The error signals, and how they differ over the hidden layers."""
    hidden = [signals[layer] for layer in range(1, len(signals))]
    for layer, value in signals.items():
        yield {"quantity": "error_signal", "value": value, "layer": layer, **where}
    yield {"quantity": "flow", "value": hidden[0] - hidden[-1], **where}
    yield {"quantity": "range", "value": max(hidden) - min(hidden), **where}


def rate(signals: Mapping[int, float]) -> float:
    """The slope of ln ‖g_l‖² over the deeper half of the hidden layers.

    The last is left out: its gradient comes from the readout and has been through no normalisation.
    """
    depth = len(signals)
    deep = range(depth // 2, depth - 1)
    return slope([depth - layer for layer in deep], [2 * signals[layer] for layer in deep]).value


def _varied(config: Config) -> list[ModelConfig]:
    nets = [(norm, weight_var) for norm in NORMS for weight_var in config.grid.weight_vars]
    return [_net(config, norm=norm, weight_var=var, depth=8, width=config.grid.train_width) for norm, var in nets]


def _norms(context: Context) -> Iterator[Row]:
    """‖J‖ of the normalisations at every σw²."""
    inputs, _ = context.samples(context.data.train, context.config.training.batch_size)
    for model in context.progress(_varied(context.config), "norms"):
        for seed in range(context.config.grid.seeds):
            where = {"part": "norm", "when": "initial", **network_columns(model, seed)}
            yield {"quantity": "mean_norm", "value": mean_norm(context.network(model, seed), inputs), **where}


def _rated(config: Config) -> list[ModelConfig]:
    return [_net(config, norm=norm, depth=config.grid.rate_depth) for norm in NORMS]


def _rates(context: Context) -> Iterator[Row]:
    """The growth of ‖g‖² a layer at every batch size."""
    grid = context.config.grid
    nets = [(batch, model) for batch in grid.batch_sizes for model in _rated(context.config)]
    for batch, model in context.progress(nets, "rates"):
        inputs, targets = context.samples(context.data.train, batch)
        for seed in range(grid.seeds):
            signals = batch_signals(context.network(model, seed), inputs, targets)
            where = {"part": "rate", "batch": batch, **network_columns(model, seed)}
            yield {"quantity": "rate", "value": rate(signals), **where}


def _flowing(config: Config) -> list[ModelConfig]:
    return [_net(config, norm=norm, depth=depth, width=config.grid.train_width) for norm in NORMS for depth in config.grid.depths]


def _flows(context: Context) -> Iterator[Row]:
    """Gradients end to end against depth, at initialisation."""
    inputs, targets = context.samples(context.data.train, context.config.training.batch_size)
    for model in context.progress(_flowing(context.config), "flows"):
        for seed in range(context.config.grid.seeds):
            signals = batch_signals(context.network(model, seed), inputs, targets)
            yield from _signal_rows(signals, {"part": "flow", **network_columns(model, seed)})


def _tracked(config: Config) -> list[ModelConfig]:
    grid = config.grid
    nets: tuple[tuple[Norm, int], ...] = (*((norm, grid.rate_depth) for norm in NORMS), ("batch", max(grid.train_depths)))
    return [_net(config, norm=norm, depth=depth, width=grid.train_width) for norm, depth in nets]


def _along(context: Context) -> Iterator[Row]:
    """Gradients over the layers, before training and after its first steps, and ‖J‖ before and after it; on one batch."""
    inputs, targets = context.samples(context.data.train, context.config.training.batch_size)
    few, _ = context.samples(context.data.train, context.config.grid.samples)
    for model in context.progress(_tracked(context.config), "along training"):
        for seed in range(context.config.grid.train_seeds):
            network = context.network(model, seed)
            where = {"part": "along", **network_columns(model, seed)}
            found: list[Row] = []

            def look(step: int, network: nn.Sequential = network, where: Row = where, found: list[Row] = found) -> None:
                if step in LOOKED_AT:
                    signals, at = batch_signals(network, inputs, targets), {"step": step, **where}
                    found.extend(_signal_rows(signals, at))
                    found.append({"quantity": "rate", "value": rate(signals), **at})

            def norms(when: str, network: nn.Sequential = network, where: Row = where) -> Iterator[Row]:
                yield {"quantity": "mean_norm", "value": mean_norm(network, inputs), "when": when, **where}
                yield {"quantity": "layer_norm", "value": middle_norm(network, few), "when": when, **where}

            look(0)
            yield from norms("initial")
            context.train(network, f"{model.norm}, depth {model.depth}, seed {seed}", seed, on_step=look)
            yield from norms("trained")
            yield from found


def _repaired(config: Config) -> list[ModelConfig]:
    grid = config.grid
    norms: tuple[Norm, ...] = ("batch", "none")
    nets = [(norm, weight_var) for norm in norms for weight_var in grid.train_weight_vars]
    return [_net(config, norm=norm, weight_var=var, depth=8, width=grid.train_width) for norm, var in nets]


def _repairs(context: Context) -> Iterator[Row]:
    """Trainings at every σw², with and without BatchNorm."""
    for model in context.progress(_repaired(context.config), "gains trained"):
        for seed in range(context.config.grid.train_seeds):
            outcome = context.train(context.network(model, seed), f"{model.norm}, σw² {model.weight_var:g}, seed {seed}", seed)
            where = {"part": "repair", **network_columns(model, seed)}
            yield from ({"quantity": quantity, "value": value, **where} for quantity, value in outcome.metrics().items())


def _deepened(config: Config) -> list[tuple[int, ModelConfig]]:
    """Plain BN chains, their control with skips, and plain LN chains, at every batch size and depth of training."""
    grid = config.grid
    kinds: tuple[dict[str, object], ...] = ({"norm": "batch"}, {"family": "residual_mlp", "skip": "preactivation"}, {"norm": "layer"})
    nets = [(batch, depth, kind) for batch in grid.train_batch_sizes for depth in grid.train_depths for kind in kinds]
    return [(batch, _net(config, depth=depth, width=grid.train_width, **kind)) for batch, depth, kind in nets]


def _depths(context: Context) -> Iterator[Row]:
    """Short trainings over depth and batch size."""
    for batch, model in context.progress(_deepened(context.config), "depths trained"):
        for seed in range(context.config.grid.train_seeds):
            name = f"{model.norm}, {model.skip}, batch {batch}, depth {model.depth}, seed {seed}"
            training = replace(context.config.training, batch_size=batch)
            outcome = context.train(context.network(model, seed), name, seed, config=training)
            where = {"part": "depth", "batch": batch, "chance": 1 / context.data.classes, **network_columns(model, seed)}
            yield from ({"quantity": quantity, "value": value, **where} for quantity, value in outcome.metrics().items())


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    growth = pick(rows, "rate", part="rate").assign(value=lambda nets: np.exp(nets["value"]))
    normalised = growth[growth["norm"] == "batch"]
    step = pick(rows, "step_factor")
    cells = {
        "norm_near_one": _by(pick(rows, "mean_norm", norm="batch"), ["weight_var", "depth", "when"], t_interval),
        "layer_norm_near_one": _by(pick(rows, "layer_norm", norm="batch"), ["depth", "when"], t_interval),
        "consistent_flow": _by(_absolute(pick(rows, "flow", part="flow", norm="batch")), ["depth"], t_interval),
        "flow_along_training": _by(_absolute(pick(rows, "flow", part="along", norm="batch")), ["depth", "step"], t_interval),
        "norm_formula": _by(pick(rows, "norm_error"), ["norm", "together", "eps"], greatest),
        "closed_form": _by(pick(rows, "form_error"), ["norm", "together", "eps"], greatest),
        "null_directions": _by(pick(rows, "spectrum_error", norm="batch"), ["together", "eps"], greatest),
        "two_samples": _vanishing(rows),
        "gain_invariance": _scaled(rows, rows[rows["quantity"].isin(["output_change", "gradient_change"])], [greatest]),
        "relative_step": _scaled(rows, step.assign(value=step["value"] * step["gain"] ** 2), [least, greatest]),
        "gain_repaired": _repair(rows),
        "large_batch_rate": _against(normalised, lambda batch: batch_norm_growth(math.inf)),
        "finite_batch_rate": _against(normalised, batch_norm_growth),
        "layer_norm_rate": _by(growth, ["norm", "batch"], t_interval),
        "untrainable_depth": _trained_like_control(rows),
        "trainable_up_to_there": _trained_like_control(rows),
        "settles_in_training": _settling(rows),
        "deep_settles_in_training": _settling(rows),
        "rate_falls_in_training": _falling(rows),
    }
    return judge_forms("batchnorm_stabilization", criteria, cells)


def _by(values: pd.DataFrame, keys: list[str], estimate: Callable[[pd.Series], Estimate]) -> pd.DataFrame:
    """An estimate of the values of each group."""
    return pd.DataFrame([cell(estimate(group), **dict(zip(keys, at, strict=True))) for at, group in values.groupby(keys)["value"]])


def _absolute(values: pd.DataFrame) -> pd.DataFrame:
    return values.assign(value=values["value"].abs())


def _vanishing(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope d ln ‖J_BN‖ / d ln ε between the two smallest ε, the least of all draws."""
    norms = np.log(pick(rows, "operator_norm", norm="batch").pivot(index=["together", "net_seed"], columns="eps", values="value"))
    small, next_small = sorted(norms)[:2]
    slopes = (norms[next_small] - norms[small]) / np.log(next_small / small)
    return pd.DataFrame([cell(least(draws), together=int(count)) for count, draws in slopes.groupby("together")])


def _scaled(rows: pd.DataFrame, values: pd.DataFrame, estimates: Sequence[Callable[[pd.Series], Estimate]]) -> pd.DataFrame:
    """Estimates over all draws at each ε and scale of W, beside ε's largest share."""
    keys = ["eps", "gain"]
    share = pick(rows, "eps_share").groupby(keys)["value"].max().rename("eps_share")
    return pd.concat([_by(values, keys, estimate) for estimate in estimates]).join(share, on=keys)


def _repair(rows: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy at a σw² minus that at He's, paired by seed."""
    cells = []
    for norm, nets in pick(rows, "test_accuracy", part="repair").groupby("norm"):
        accuracy = nets.pivot(index="net_seed", columns="weight_var", values="value")
        for var in accuracy.columns.drop(CRITICAL):
            cells.append(cell(paired_difference(accuracy[var], accuracy[CRITICAL]), norm=norm, weight_var=var))
    return pd.DataFrame(cells)


def _against(growth: pd.DataFrame, predicted: Callable[[float], float]) -> pd.DataFrame:
    """Growth over its prediction − 1, over seeds, at every batch size."""
    relative = growth.assign(value=growth["value"] / growth["batch"].map(predicted) - 1)
    return _by(relative, ["batch"], t_interval)


def trained_depths(rows: pd.DataFrame) -> pd.DataFrame:
    """Train accuracies above chance of plain and control chains, a line a seed, where the control trains.

    It trains where its mean over seeds is at least half of the greatest such mean.

    Returns: index batch, depth, net_seed; columns plain (BN), layer (LN, plain), control.
    """
    accuracy = pick(rows, "train_accuracy", part="depth")
    kind = accuracy["norm"].map({"batch": "plain", "layer": "layer"}).where(accuracy["skip"] == "none", "control")
    accuracy = accuracy.assign(value=accuracy["value"] - accuracy["chance"], kind=kind)
    table = accuracy.pivot(index=["batch", "depth", "net_seed"], columns="kind", values="value")
    control = table["control"].groupby(["batch", "depth"]).transform("mean")
    return table[control >= control.max() / 2]


def _trained_like_control(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy above chance of the plain BN chain minus half of the control's, paired by seed."""
    keys = ["batch", "depth"]
    groups = trained_depths(rows).groupby(keys)
    cells = [(at, paired_difference(nets["plain"], nets["control"] / 2)) for at, nets in groups]
    return pd.DataFrame([cell(difference, **dict(zip(keys, at, strict=True))) for at, difference in cells])


def _along_training(rows: pd.DataFrame, quantity: str) -> Iterator[tuple[int, pd.DataFrame]]:
    """A quantity of the BN chains of each depth, seeds × steps."""
    for depth, nets in pick(rows, quantity, part="along", norm="batch").groupby("depth"):
        yield int(depth), nets.pivot(index="net_seed", columns="step", values="value")


def _settling(rows: pd.DataFrame) -> pd.DataFrame:
    """The range of ln ‖g_l‖ over the layers in units of what it was before training, over seeds."""
    ranges = _along_training(rows, "range")
    return pd.DataFrame([cell(t_interval(nets[step] / nets[0]), depth=depth, step=int(step)) for depth, nets in ranges for step in nets])


def _falling(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope of ln ‖g_l‖² a layer after the last looked-at step minus before the first, paired by seed."""
    rates = _along_training(rows, "rate")
    return pd.DataFrame([cell(paired_difference(nets[max(nets)], nets[0]), depth=depth, step=int(max(nets))) for depth, nets in rates])
