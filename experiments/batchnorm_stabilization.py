"""Step 6, normalisation: what batch normalisation does to Jacobian norms, and what depth still does to the gradient behind it.

Train-mode BatchNorm is one operator on the batch. Its Jacobian against the closed form (γ/σ)(I − 11ᵀ/N − x̂x̂ᵀ/N); the invariance of BN∘W to
the scale of W; the growth of ‖g‖² a layer against the mean field of Yang et al. 2019 (A Mean Field Theory of Batch Normalization), at
initialisation and along training; the depth to which training reaches; layer normalisation beside it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from src.config import Config, Criterion, ModelConfig, Norm, TrainingConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.jacobian.normalised import (
    batch_norm_growth,
    closed_form_errors,
    normalisation_jacobian,
    normalised_product,
)
from src.models.start import neutral_readout
from src.plan import Work
from src.rows import Row, measured, pick
from src.statistics import Estimate, greatest, least, paired, t_interval
from src.train_mode import look, middle_norm
from src.training.loop import end_to_end, lasting
from src.training.objectives import ScaledSteps
from src.trainings import Trainee, train_all
from src.verdict import Verdict, cells_by, judge_forms

QUANTITIES = {
    "operator_norm": "‖J‖ of a normalisation, from its Jacobian written out",
    "norm_error": "‖J‖ over max |γ|/σ, minus 1, absolute",
    "form_error": "largest |entry| of J minus its closed form, over max |γ|/σ",
    "spectrum_error": "largest |singular value over |γ|/σ − predicted| of any channel or sample: 1 (N−2 times), ε/(var+ε), 0",
    "direction_error": "largest ‖J1‖/‖1‖ or ‖Jx̂ − ε/(var+ε)·γ/σ·x̂‖/‖x̂‖ of any channel or sample, over |γ|/σ",
    "output_change": "‖BN(sWx) − BN(Wx)‖ over ‖BN(Wx)‖",
    "gradient_change": "‖g − g at s = 1‖ over the latter's norm, g the gradient by x of a random linear function of BN(sWx)",
    "eps_share": "ε/(var+ε), the largest of any channel",
    "step_factor": "‖∇W‖/‖W‖ at sW over the same at W",
    "mean_norm": "‖J‖ = max |γ|/σ of a normalisation, mean over the layers of a net",
    "stage_norm": "‖J_l‖ of the middle layer, one operator on the batch",
    "rate": "slope of ln ‖∂ℒ/∂H_l‖² against the layers between l and the loss, nats a layer",
    "flow": "ln ‖∂ℒ/∂H_1‖ − ln ‖∂ℒ/∂H_{L−1}‖, nats: 0 where the gradient passes unchanged",
    "range": "greatest minus least ln ‖∂ℒ/∂H_l‖ over the hidden layers, nats",
    "train_accuracy": "share of training images told right after the training",
    "test_accuracy": "share of test images told right after the training",
    "diverged": "1 where the training diverged, else 0",
}
NORMS: tuple[Norm, ...] = ("batch", "layer")
CRITICAL = 2.0  # He's σw² for ReLU
# of the operators written out: values normalised together, ε, and how many units stand beside them
TOGETHER, EPSILONS, BESIDE = (2, 3, 4, 16), (1e-3, 1e-5, 1e-9, 1e-12), 8
# the scale of W over nine decades, with PyTorch's ε and without one to speak of (PyTorch refuses 0)
GAINS, GAIN_EPSILONS = np.logspace(-4.5, 4.5, 19).tolist(), (1e-5, 1e-30)
HIDDEN_LR = ("equal", "scaled")  # of the weights behind a normalisation: one at every σw², or ∝ σw²
LOOKED_AT = (0, 1, 2, 5, 10, 20, 50, 100)  # steps
# trained over depth: plain BN and its control with skips
CHAINS: tuple[dict[str, object], ...] = ({"norm": "batch"}, {"family": "residual_mlp", "skip": "preactivation"})


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(min(grid.batch_sizes) >= 4, "grid.batch_sizes: at least 4 images: the growth is infinite at 3")
    for axis, sizes in (("batch_sizes", grid.batch_sizes), ("train_batch_sizes", grid.train_batch_sizes)):
        require(max(sizes) <= len(data.train), f"grid.{axis}: at most {len(data.train)}, the training images")
    require(min(grid.train_batch_sizes) >= 2, "grid.train_batch_sizes: at least 2 images, to be normalised together")
    require(max(TOGETHER) <= len(data.train), f"data.train_size: at least {max(TOGETHER)} images, to be normalised together")
    require(2 <= grid.samples <= len(data.train), f"grid.samples: 2 to {len(data.train)}, the training images")
    require(min(*grid.depths, grid.rate_depth) >= 6, "grid.depths, grid.rate_depth: each of at least 6 weight layers, for a slope")
    require(all(d >= 4 and d % 2 == 0 for d in grid.train_depths), "grid.train_depths: 2n+2 weight layers, n ≥ 1: those of the control")
    require(max(grid.train_depths) >= 6, "grid.train_depths: 6 weight layers or more among them, for a slope")
    require(min(grid.weight_vars + grid.train_weight_vars) > 0, "grid.weight_vars, grid.train_weight_vars: σw² above 0")
    require(CRITICAL in grid.train_weight_vars, f"grid.train_weight_vars: {CRITICAL:g} among them, the σw² that others are held against")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    looking = {batch: partial(look, examples=_batch(context, batch)) for batch in (config.training.batch_size, *grid.batch_sizes)}

    def watching(network: nn.Sequential) -> None:
        for _ in LOOKED_AT:
            looking[config.training.batch_size](network)

    return [
        Work(_scaled_net(config), grid.seeds),
        *(Work(model, grid.seeds, measuring=looking[batch]) for batch, _, model in _initial(config)),
        *(Work(model, grid.train_seeds, context.steps(), watching) for model in _tracked(config)),
        *(Work(model, grid.train_seeds, context.steps()) for _, model in _repaired(config)),
        *(Work(model, grid.train_seeds, grid.depth_steps) for _, model in _deep(context)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_operators, _gains, _at_initialisation, _along, _repairs, _depths)


def _net(config: Config, **changes: object) -> ModelConfig:
    """A ReLU chain with normalisation, at He's σw² and as wide as those that are trained, unless it is changed."""
    he: dict[str, Any] = {"activation": "relu", "weight_var": CRITICAL, "bias_var": 0.0, "norm": "batch", "width": config.grid.train_width}
    return replace(config.model, **he | changes)


def _batch(context: Context, size: int) -> tuple[Tensor, Tensor]:
    return context.samples(context.data.train, size)


def _operators(context: Context) -> Iterator[Row]:
    """Jacobians of normalisations written out, of random linear functions of images and with random γ, against the closed form."""
    for together, seed in product(TOGETHER, range(context.config.grid.seeds)):
        generator = context.generator("operator", together, seed)
        images = context.samples(context.data.train, together)[0].flatten(1).double().cpu()
        values = torch.randn(BESIDE, images.shape[1], generator=generator, dtype=images.dtype) @ images.T / math.sqrt(images.shape[1])
        gains = torch.randn(BESIDE, generator=generator, dtype=images.dtype)
        for eps in EPSILONS:
            batch, layer = nn.BatchNorm1d(BESIDE, eps, dtype=values.dtype), nn.LayerNorm(together, eps, dtype=values.dtype)
            batch.weight.data.copy_(gains)
            for norm, operator, gain in (("batch", batch, gains), ("layer", layer, torch.ones_like(gains))):
                where = {"part": "operator", "norm": norm, "together": together, "eps": eps, "net_seed": seed}
                yield from measured(where, **closed_form_errors(normalisation_jacobian(operator, values), values, gain, eps))


def _scaled_net(config: Config) -> ModelConfig:
    return _net(config, depth=2)


def _gains(context: Context) -> Iterator[Row]:
    """BN∘W behind a random first layer's W scaled by s, against s = 1: outputs, and gradients by the input and by W."""
    model = _scaled_net(context.config)
    inputs = _batch(context, context.config.training.batch_size)[0].double().flatten(1)
    for seed in range(context.config.grid.seeds):
        W = context.network(model, seed)[0].get_parameter("linear.weight").detach().double()
        covectors = torch.randn(len(inputs), len(W), generator=context.generator("covectors", seed), dtype=W.dtype).to(W.device)
        for eps in GAIN_EPSILONS:
            plain = normalised_product(W, inputs, covectors, eps)
            for gain in GAINS:
                scaled = normalised_product(gain * W, inputs, covectors, eps)
                outputs, by_inputs, _ = (float((new - old).norm() / old.norm()) for new, old in zip(scaled, plain, strict=True))
                yield from measured(
                    {"part": "gain", "gain": gain, "eps": eps, **network_columns(model, seed)},
                    eps_share=float(1 - scaled[0].var(0, correction=0).min()),
                    output_change=outputs,
                    gradient_change=by_inputs,
                    step_factor=float(scaled[2].norm() / plain[2].norm()) / gain,
                )


def _initial(config: Config) -> list[tuple[int, str, ModelConfig]]:
    """Nets at every σw², at every batch size, and at every depth."""
    grid, usual = config.grid, config.training.batch_size
    nets: list[tuple[int, str, ModelConfig]] = []
    for norm in NORMS:
        nets += [(usual, "norm", _net(config, norm=norm, depth=8, weight_var=weight_var)) for weight_var in grid.weight_vars]
        wide = _net(config, norm=norm, depth=grid.rate_depth, width=config.model.width)
        nets += [(batch, "rate", wide) for batch in grid.batch_sizes]
        nets += [(usual, "flow", _net(config, norm=norm, depth=depth)) for depth in grid.depths]
    return nets


def _at_initialisation(context: Context) -> Iterator[Row]:
    """‖J‖ of the normalisations and the gradient over the layers, at initialisation."""
    for batch, part, model in context.progress(_initial(context.config), "initial nets"):
        examples = _batch(context, batch)
        for seed in range(context.config.grid.seeds):
            where = {"part": part, "batch": batch, "step": 0, **network_columns(model, seed)}
            yield from measured(where, **look(context.network(model, seed), examples))


def _tracked(config: Config) -> list[ModelConfig]:
    nets: tuple[tuple[Norm, int], ...] = (*((norm, config.grid.rate_depth) for norm in NORMS), ("batch", max(config.grid.train_depths)))
    return [_net(config, norm=norm, depth=depth) for norm, depth in nets]


def _along(context: Context) -> Iterator[Row]:
    """The same before training and after its first steps, and ‖J_l‖ before and after it; on one batch."""
    examples = _batch(context, context.config.training.batch_size)
    few, _ = context.samples(context.data.train, context.config.grid.samples)
    for model in context.progress(_tracked(context.config), "along training"):
        seeds = range(context.config.grid.train_seeds)
        networks = [context.network(model, seed) for seed in seeds]
        before = [look(network, examples) | {"stage_norm": middle_norm(network, few)} for network in networks]
        trainees = [
            Trainee(network, f"{model.norm}, depth {model.depth}, seed {seed}", seed, on_step=partial(_watch, network, examples))
            for seed, network in zip(seeds, networks, strict=True)
        ]
        for seed, network, initial, outcome in zip(seeds, networks, before, train_all(context, trainees), strict=True):
            seen = {0: initial, **outcome.seen}
            seen.setdefault(outcome.steps, {})["stage_norm"] = middle_norm(network, few)
            for step, found in seen.items():
                yield from measured({"part": "along", "step": step, **network_columns(model, seed)}, **found)


def _watch(network: nn.Sequential, examples: tuple[Tensor, Tensor], step: int) -> dict[str, float] | None:
    return look(network, examples) if step in LOOKED_AT else None


def _repaired(config: Config) -> list[tuple[str, ModelConfig]]:
    """Nets at every σw², with and without BatchNorm, trained at one learning rate, and away from He's σw² also where it goes with σw²."""
    norms: tuple[Norm, ...] = ("batch", "none")
    nets = product(HIDDEN_LR, norms, config.grid.train_weight_vars)
    return [(lr, _net(config, norm=norm, weight_var=var, depth=8)) for lr, norm, var in nets if lr == "equal" or var != CRITICAL]


def _repairs(context: Context) -> Iterator[Row]:
    """Short trainings at every σw². Behind BatchNorm the relative step goes as 1/σw², unless the learning rate goes with σw²."""
    nets = [*product(_repaired(context.config), range(context.config.grid.train_seeds))]
    trainees = []
    for (hidden_lr, model), seed in nets:
        network = context.network(model, seed)
        neutral_readout(network, model.weight_var)
        objective = ScaledSteps(model.weight_var / CRITICAL) if hidden_lr == "scaled" else end_to_end
        trainees.append(Trainee(network, f"{model.norm}, σw² {model.weight_var:g}, {hidden_lr} lr, seed {seed}", seed, objective))
    for ((hidden_lr, model), seed), outcome in zip(nets, train_all(context, trainees), strict=True):
        where = {"part": "repair", "hidden_lr": hidden_lr, **network_columns(model, seed)}
        yield from measured(where, **outcome.metrics())


def _deep(context: Context) -> list[tuple[TrainingConfig, ModelConfig]]:
    """BN chains, their controls with skips, and LN chains over depth and batch size, trained for `grid.depth_steps`."""
    grid, usual, images = context.config.grid, context.config.training, len(context.data.train)
    chains = [_net(context.config, depth=depth, **kind) for depth, kind in product(grid.train_depths, CHAINS)]
    chains += [_net(context.config, depth=depth, norm="layer") for depth in grid.layer_norm_depths]
    trainings = (lasting(replace(usual, batch_size=batch), grid.depth_steps, images) for batch in grid.train_batch_sizes)
    return list(product(trainings, chains))


def _depths(context: Context) -> Iterator[Row]:
    """Trainings of chains that differ in depth and in what holds them."""
    for training, model in context.progress(_deep(context), "chains over depth"):
        length = {"batch": training.batch_size, "steps": context.steps(training)}
        trainees = []
        for seed in range(context.config.grid.train_seeds):
            network = context.network(model, seed)
            neutral_readout(network, model.weight_var)
            name = f"{model.norm}, {model.skip}, batch {training.batch_size}, depth {model.depth}, seed {seed}"
            trainees.append(Trainee(network, name, seed, config=training))
        for seed, outcome in enumerate(train_all(context, trainees)):
            where = {"part": "depth", **length, "chance": 1 / context.data.classes, **network_columns(model, seed)}
            yield from measured(where, **outcome.metrics())


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    rates = pick(rows, "rate", part="rate")
    growths = rates.assign(value=np.exp(rates["value"]))
    normalised = growths[growths["norm"] == "batch"]
    norms = pick(rows, "mean_norm", norm="batch")
    step = pick(rows, "step_factor")
    repair = cells_by(_against_critical(rows), ["norm", "hidden_lr", "weight_var"], t_interval)
    along = rows[(rows["part"] == "along") & (rows["norm"] == "batch")]
    ranges, falls = (_since_the_start(pick(along, quantity)) for quantity in ("range", "rate"))
    settling = cells_by(ranges.assign(value=1 + ranges["value"] / ranges["value_other"]), ["depth", "step"], t_interval)
    cells = {
        "norm_near_one": cells_by(norms[norms["part"].isin(["norm", "along"])], ["part", "weight_var", "depth", "step"], t_interval),
        "stage_norm_near_one": cells_by(pick(along, "stage_norm"), ["depth", "step"], t_interval),
        "consistent_flow": cells_by(_absolute(pick(rows, "flow", part="flow", norm="batch")), ["depth"], t_interval),
        "flow_along_training": cells_by(_absolute(pick(along, "flow")), ["depth", "step"], t_interval),
        "norm_formula": cells_by(pick(rows, "norm_error"), ["norm", "together", "eps"], greatest),
        "closed_form": cells_by(pick(rows, "form_error"), ["norm", "together", "eps"], greatest),
        "null_directions": cells_by(_either(rows, "spectrum_error", "direction_error"), ["norm", "together", "eps"], greatest),
        "two_samples": cells_by(_vanishing(rows), ["together"], least),
        "gain_invariance": _scaled(rows, _either(rows, "output_change", "gradient_change"), greatest),
        "relative_step": _scaled(rows, step.assign(value=step["value"] * step["gain"] ** 2), least, greatest),
        "gain_repaired": repair[repair["hidden_lr"] == "equal"],
        "gain_is_a_step_size": repair,
        "large_batch_rate": _against(normalised, lambda batch: batch_norm_growth(math.inf)),
        "finite_batch_rate": _against(normalised, batch_norm_growth),
        "layer_norm_rate": cells_by(growths, ["norm", "batch"], t_interval),
        "untrainable_depth": trained_like_control(rows),
        "trainable_up_to_there": trained_like_control(rows),
        "settles_in_training": settling,
        "deep_settles_in_training": settling,
        "rate_falls_in_training": cells_by(falls[falls["step"] == falls["step"].max()], ["depth", "step"], t_interval),
    }
    return judge_forms("batchnorm_stabilization", criteria, cells)


def _absolute(values: pd.DataFrame) -> pd.DataFrame:
    return values.assign(value=values["value"].abs())


def _either(rows: pd.DataFrame, *quantities: str) -> pd.DataFrame:
    return rows[rows["quantity"].isin(quantities)]


def _against_critical(rows: pd.DataFrame) -> pd.DataFrame:
    """Test accuracies at every other σw² minus that at He's, of the same seed."""
    accuracy = pick(rows, "test_accuracy", part="repair")
    critical = accuracy["weight_var"] == CRITICAL
    return paired(accuracy[~critical], accuracy[critical], ["norm", "net_seed"])


def _since_the_start(along: pd.DataFrame) -> pd.DataFrame:
    """What a value has changed by since before the first step, in the same training."""
    return paired(along, along[along["step"] == 0], ["depth", "net_seed"])


def _vanishing(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope d ln ‖J_BN‖ / d ln ε between the two smallest ε."""
    norms = np.log(pick(rows, "operator_norm", norm="batch").pivot(index=["together", "net_seed"], columns="eps", values="value"))
    small, next_small = sorted(norms)[:2]
    return ((norms[next_small] - norms[small]) / np.log(next_small / small)).reset_index(name="value")


def _scaled(rows: pd.DataFrame, values: pd.DataFrame, *estimates: Callable[[pd.Series], Estimate]) -> pd.DataFrame:
    """Estimates over all draws at each ε and scale of W, beside ε's largest share."""
    keys = ["eps", "gain"]
    share = pick(rows, "eps_share").groupby(keys)["value"].max().rename("eps_share")
    return pd.concat([cells_by(values, keys, estimate) for estimate in estimates]).join(share, on=keys)


def _against(growths: pd.DataFrame, prediction: Callable[[float], float]) -> pd.DataFrame:
    """Growth over its prediction − 1, at every batch size."""
    predicted = growths["batch"].map(prediction)
    return cells_by(growths.assign(value=growths["value"] / predicted - 1, predicted=predicted), ["batch", "predicted"], t_interval)


def trained_like_control(rows: pd.DataFrame) -> pd.DataFrame:
    """Train accuracy above chance of the plain BN chain minus half of the control's, paired by seed, where the control trains.

    It trains where its mean over seeds is at least half of the greatest such mean.
    """
    accuracy, keys = pick(rows, "train_accuracy", part="depth", norm="batch"), ["batch", "depth", "steps"]
    above = accuracy.assign(value=accuracy["value"] - accuracy["chance"])
    plain, control = (above[above["skip"] == skip] for skip in ("none", "preactivation"))
    means = control.groupby(keys)["value"].transform("mean")
    half = control[means >= means.max() / 2].assign(value=control["value"] / 2)
    return cells_by(paired(plain, half, [*keys, "net_seed"]), keys, t_interval)
