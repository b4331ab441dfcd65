"""Step 9, forward against backward locking: chains locked one way and not the other, and which remedy helps which way.

Forwards a chain is locked when its last states are alike: the lock is −log₁₀(1 − c), c the mean cosine between two samples of what the
readout reads. Backwards it is locked when the error signal does not arrive: the lock is log₁₀ ‖g_{L−1}‖/‖g_1‖. Both are decades.

In random plain chains the two are tied: where the variance has settled, 1 − c_l and ‖g_l‖² shrink by the same χ a layer (Schoenholz et
al. 2017, Deep information propagation). They part where gradients are kept at χ = 1 while ReLU states draw together (Hayou et al. 2019),
and where states latch on to attractors, through which no gradient goes (Bengio et al. 1994).

Jaderberg et al. 2016, "Decoupled neural interfaces", call backward locking something else: that no layer can be updated before the pass
back has returned to it. That is a matter of schedule, not of size: skips, normalisation and auxiliary losses leave it as it is, local
losses lift it.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from src import mean_field
from src.config import Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.diversity import dissimilarity, participation_ratio, rank
from src.experiment import Context, network_columns
from src.locking import ErrorSignal, severity
from src.models.exits import MultiExit
from src.plan import Work
from src.rows import pick
from src.statistics import Estimate, slope, t_interval
from src.training.loop import Objective, end_to_end
from src.training.objectives import DeepSupervision, exit_losses
from src.verdict import INTERVAL, Verdict, cell, judge_forms

Row = dict[str, Any]

QUANTITIES = {
    "dissimilarity": "1 − c_l, c_l the mean cosine between two samples' states behind stage l",
    "participation": "(Σλ)²/Σλ² of the Gram matrix of the states behind stage l",
    "state_rank": "numerical rank of the states behind stage l",
    "error_signal": "½ ln mean ‖g_l‖² behind stage l, nats",
    "signal_rank": "numerical rank of the error signals g_1 over the samples",
    "severity": "1 − σ_r/σ_1 of the error signals g_1 over the samples, over the r nonzero singular values",
    "forward_lock": "−log₁₀(1 − c), c the mean cosine between two samples of what the readout reads, decades",
    "backward_lock": "log₁₀ ‖g_{L−1}‖/‖g_1‖, root mean squares over the samples, of the loss that is trained on; decades",
    "main_lock": "the same of the chain's own loss alone",
    "forward_rate": "slope of ln (1 − c_l) over layers, nats a layer",
    "backward_rate": "slope of ln ‖g_l‖² against the distance from the loss, nats a layer",
    "schedule_lock": "‖∇θ_1 − ∇θ_1'‖/‖∇θ_1‖, the latter after the signs of the last weights are flipped",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
# by what is locked; each is a plain chain
CHAINS: dict[str, dict[str, Any]] = {
    "neither": {"activation": "linear", "init": "orthogonal", "weight_var": 1.0, "bias_var": 0.0},
    "forwards": {"activation": "relu", "init": "gaussian", "weight_var": 2.0, "bias_var": 0.0},
    "backwards": {"activation": "tanh", "init": "gaussian", "weight_var": 4.0, "bias_var": 0.0},
    "both": {"activation": "tanh", "init": "gaussian", "weight_var": 1.0, "bias_var": 0.05},
}
RATED: tuple[dict[str, Any], ...] = (
    {"activation": "tanh", "weight_var": 1.0, "bias_var": 0.05},
    {"activation": "tanh", "weight_var": 1.3, "bias_var": 0.05},
    {"activation": "relu", "weight_var": 1.0, "bias_var": 0.0},
)
# plain chains that want a remedy
PATIENTS: dict[str, dict[str, Any]] = {
    "ReLU, σw²=2": {"activation": "relu", "weight_var": 2.0, "bias_var": 0.0},
    "ReLU, σw²=1": {"activation": "relu", "weight_var": 1.0, "bias_var": 0.0},
    "tanh, σw²=1": {"activation": "tanh", "weight_var": 1.0, "bias_var": 0.05},
}
REMEDIES: dict[str, dict[str, Any]] = {
    "plain": {"skip": "none", "norm": "none"},
    "skip": {"skip": "preactivation", "norm": "none"},
    "batch": {"skip": "none", "norm": "batch"},
    "layer": {"skip": "none", "norm": "layer"},
    "exits": {"skip": "none", "norm": "none"},
}
WAYS = ("forward", "backward")
GAIN = ["way", "when", "patient", "remedy"]
SCHEDULED = "ReLU, σw²=2"  # the patient whose schedule is looked at: its gradient reaches the first stage
ALPHA = 0.3  # the weight of an auxiliary loss (Szegedy et al. 2015, Going deeper with convolutions, section 5)


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid, depth = config.grid, config.model.depth
    require(depth >= 8 and depth % 2 == 0, "model.depth: 2n+2 weight layers, at least 8 (8, 10, 12, …)")
    require(grid.rate_depth >= 6, "grid.rate_depth: at least 6 weight layers, for a slope over half of them")
    require(config.model.width >= 8, "model.width: at least 8 units: narrower chains die")
    require(grid.train_width >= 8, "grid.train_width: at least 8 units: narrower chains die")
    require(min(grid.seeds, grid.train_seeds) >= 2, "grid.seeds, grid.train_seeds: at least 2, for an interval")
    require(2 <= grid.samples <= len(data.test), f"grid.samples: 2 to {len(data.test)}, the test images")
    require(2 <= grid.calibration <= len(data.train), f"grid.calibration: 2 to {len(data.train)}, the training images")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    steps = context.steps()
    return [
        *(Work(model, grid.seeds) for model in [*_exhibited(config).values(), *_rated(config)]),
        *(Work(model, grid.train_seeds, steps) for _, _, model in _treated(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return pd.DataFrame([row for part in (_exhibits, _rates, _treatments) for row in part(context)])


def _exhibited(config: Config) -> dict[str, ModelConfig]:
    return {chain: replace(config.model, family="mlp", skip="none", norm="none", **settings) for chain, settings in CHAINS.items()}


def _exhibits(context: Context) -> Iterator[Row]:
    """The four chains, stage by stage, with all measures of either way."""
    for chain, model in _exhibited(context.config).items():
        for seed in range(context.config.grid.seeds):
            network = context.network(model, seed)
            if chain == "backwards":
                latch(network, math.sqrt(model.weight_var))
            where = {"part": "chain", "chain": chain, **network_columns(model, seed)}
            passed = passing(context, network)
            yield from _locks(context, passed, where)
            for layer, (state, signal) in enumerate(zip(passed.states[:-1], passed.signals[:-1], strict=True), start=1):
                at = {**where, "layer": layer}
                yield {"quantity": "dissimilarity", "value": dissimilarity(state), **at}
                yield {"quantity": "participation", "value": participation_ratio(state), **at}
                yield {"quantity": "state_rank", "value": float(rank(state)), **at}
                yield {"quantity": "error_signal", "value": log_rms(signal), **at}
            spread = severity(ErrorSignal.of(passed.signals[0], torch.zeros_like(passed.signals[0][:, 0])))
            yield {"quantity": "signal_rank", "value": float(spread["rank"]), **where}
            yield {"quantity": "severity", "value": spread["lambda_nonzero"], **where}


@torch.no_grad()
def latch(network: nn.Sequential, gain: float) -> None:
    """Make every hidden layer but the first h ↦ tanh(gain·h): each unit runs to an attractor and keeps its sign (Bengio et al. 1994)."""
    for linear in [module for module in network.modules() if isinstance(module, nn.Linear)][1:-1]:
        linear.weight.copy_(gain * torch.eye(len(linear.weight)))


def _rated(config: Config) -> list[ModelConfig]:
    model = replace(config.model, family="mlp", skip="none", norm="none", init="gaussian", depth=config.grid.rate_depth)
    return [replace(model, **settings) for settings in RATED]


def _rates(context: Context) -> Iterator[Row]:
    """How fast 1 − c_l and ‖g_l‖² shrink in the second half of random plain chains."""
    for model in _rated(context.config):
        deep = range(model.depth // 2, model.depth)
        for seed in range(context.config.grid.seeds):
            passed = passing(context, context.network(model, seed))
            apart = [math.log(dissimilarity(passed.states[layer - 1])) for layer in deep]
            kept = [2 * log_rms(passed.signals[layer - 1]) for layer in deep]
            where = {"part": "rate", **network_columns(model, seed)}
            yield {"quantity": "forward_rate", "value": slope(deep, apart).value, **where}
            yield {"quantity": "backward_rate", "value": slope([-layer for layer in deep], kept).value, **where}


def _treated(config: Config) -> list[tuple[str, str, ModelConfig]]:
    model = replace(config.model, family="residual_mlp", init="gaussian", width=config.grid.train_width)
    return [(p, r, replace(model, **PATIENTS[p], **REMEDIES[r])) for p in PATIENTS for r in REMEDIES]


def _treatments(context: Context) -> Iterator[Row]:
    """Every patient with every remedy, before and after a training; the seeds pair them."""
    for patient, remedy, model in context.progress(_treated(context.config), "remedies"):
        for seed in range(context.config.grid.train_seeds):
            network, objective = _with_losses(context, model, remedy, seed)
            where = {"part": "remedy", "patient": patient, "remedy": remedy, **network_columns(model, seed)}
            yield from _locks(context, passing(context, network, objective), {**where, "when": "initial"})
            if patient == SCHEDULED:
                yield from _schedule(context, network, objective, where)
            outcome = context.train(network, f"{patient}, {remedy}, seed {seed}", seed, objective)
            for quantity in ("test_accuracy", "diverged"):
                yield {"quantity": quantity, "value": outcome.metrics()[quantity], **where}
            if outcome.status == "finished":
                yield from _locks(context, passing(context, network, objective), {**where, "when": "trained"})
                if remedy == "exits":
                    main = passing(context, network, end_to_end)
                    yield {"quantity": "main_lock", "value": main.backward_lock(), "when": "trained", **where}


def _with_losses(context: Context, model: ModelConfig, remedy: str, seed: int) -> tuple[nn.Module, Objective]:
    """A network and what it is trained on: with "exits", also the auxiliary loss of every stage but the last two."""
    network = context.calibrated(model, seed)
    if remedy != "exits":
        return network, end_to_end
    names = [name for name, _ in network.named_children()][:-2]
    return context.with_exits(network, model, names, seed), DeepSupervision(dict.fromkeys(names, ALPHA))


def _locks(context: Context, passed: "Passed", where: Row) -> Iterator[Row]:
    at = {**where, "threshold": context.config.grid.locked_decades}
    yield {"quantity": "forward_lock", "value": passed.forward_lock(), **at}
    yield {"quantity": "backward_lock", "value": passed.backward_lock(), **at}


def _schedule(context: Context, network: nn.Module, objective: Objective, where: Row) -> Iterator[Row]:
    """What the last weights have to do with ∇θ_1; for a network with exits also where stage 1 learns from its own exit alone."""
    yield {"quantity": "schedule_lock", "value": schedule_lock(context, network, objective), **where}
    if where["remedy"] == "exits":
        yield {"quantity": "schedule_lock", "value": schedule_lock(context, network, first_exit), **{**where, "remedy": "local"}}


def first_exit(model: MultiExit, images: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"]) -> Float[Tensor, ""]:
    """The loss that greedy training gives to stage 1: that of its own exit."""
    return next(iter(exit_losses(model, images, labels).values()))


def schedule_lock(context: Context, network: nn.Module, objective: Objective) -> float:
    """How much ∇θ_1 depends on the last weights W_L: its relative change when W_L becomes −W_L."""
    inputs, targets = context.samples(context.data.test, context.config.grid.samples)
    twin = copy.deepcopy(network).double().eval()
    chain = chain_of(twin)

    def gradient() -> Tensor:
        found = torch.autograd.grad(objective(twin, inputs.double(), targets), list(chain[0].parameters()))
        return torch.cat([part.flatten() for part in found])

    before = gradient()
    with torch.no_grad():
        readout_of(chain).weight.neg_()
    return float((gradient() - before).norm() / before.norm())


@dataclass(frozen=True)
class Passed:
    """One pass forwards and backwards: H_l and g_l of every stage, l = 1…L, a row a sample, and what the readout reads."""

    states: Sequence[Tensor]
    signals: Sequence[Tensor]
    features: Tensor

    def forward_lock(self) -> float:
        """−log₁₀(1 − c) of what the readout reads; what lies below the rounding of directions counts as that."""
        return -math.log10(max(dissimilarity(self.features), torch.finfo(torch.float64).eps ** 2))

    def backward_lock(self) -> float:
        """log₁₀ ‖g_{L−1}‖/‖g_1‖, of root mean squares over the samples."""
        return (log_rms(self.signals[-2]) - log_rms(self.signals[0])) / math.log(10)


def passing(context: Context, network: nn.Module, objective: Objective = end_to_end) -> Passed:
    """States and error signals of `grid.samples` test images, in float64 and with frozen statistics; g_l is of each sample's own loss."""
    inputs, targets = context.samples(context.data.test, context.config.grid.samples)
    twin = copy.deepcopy(network).double().eval()
    chain = chain_of(twin)
    states: list[Tensor] = []
    features: list[Tensor] = []
    for part in chain:
        part.register_forward_hook(lambda module, arguments, output: states.append(output))
    readout_of(chain).register_forward_pre_hook(lambda module, arguments: features.append(arguments[0].detach()))
    # the samples do not meet: a row of N∇ℒ is the gradient of that sample's own loss
    signals = torch.autograd.grad(len(targets) * objective(twin, inputs.double(), targets), states)
    return Passed([state.detach() for state in states], signals, features[0])


def chain_of(network: nn.Module) -> nn.Sequential:
    """The chain of a network, with exits or without."""
    chain = network.chain if isinstance(network, MultiExit) else network
    assert isinstance(chain, nn.Sequential)
    return chain


def readout_of(chain: nn.Sequential) -> nn.Linear:
    """The last weight layer."""
    return [module for module in chain.modules() if isinstance(module, nn.Linear)][-1]


def log_rms(signals: Float[Tensor, "n d"]) -> float:
    """½ ln mean_n ‖g_n‖²."""
    return float(signals.square().sum(1).mean().clamp(min=torch.finfo(signals.dtype).tiny).log() / 2)


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    gains = remedy_gains(rows)
    ill, well = gain_cells(gains.query("ill")), gain_cells(gains.query("not ill"))
    cells = {
        "distinct": _exhibit_cells(rows, ("forwards", "backwards")),
        "both_present": _exhibit_cells(rows, ("both",)),
        "neither": _exhibit_cells(rows, ("neither",)),
        "one_rate": _rate_ratio(rows),
        "skips_help_backward": ill.query("remedy == 'skip' and way == 'backward'"),
        "skips_help_forward": ill.query("remedy == 'skip' and way == 'forward'"),
        "normalisation_helps_both": ill.query("remedy == 'batch'"),
        "layer_normalisation_helps_both": ill.query("remedy == 'layer'"),
        "exits_help_backward": ill.query("remedy == 'exits' and way == 'backward'"),
        "exits_leave_forward": ill.query("remedy == 'exits' and way == 'forward'"),
        "exits_leave_forward_untrained": ill.query("remedy == 'exits' and way == 'forward'"),
        "exits_open_the_chain": gain_cells(_main_gain(rows)),
        "unneeded": well.query("remedy in ('skip', 'batch') and way == 'backward' and when == 'initial'"),
        "schedule": _schedule_cells(rows),
    }
    return judge_forms("forward_backward", criteria, cells)


def _exhibit_cells(rows: pd.DataFrame, chains: Sequence[str]) -> pd.DataFrame:
    """By how many decades each chain is on its side of both thresholds, the lesser margin of a net, over seeds."""
    cells = []
    for chain in chains:
        nets = pick(rows, "forward_lock", part="chain", chain=chain).set_index("net_seed")
        backward = pick(rows, "backward_lock", part="chain", chain=chain).set_index("net_seed")["value"]
        ahead = (nets["value"] - nets["threshold"]) * (1 if chain in ("forwards", "both") else -1)
        back = (backward - nets["threshold"]) * (1 if chain in ("backwards", "both") else -1)
        cells.append(cell(t_interval(np.minimum(ahead, back)), chain=chain))
    return pd.DataFrame(cells)


def _rate_ratio(rows: pd.DataFrame) -> pd.DataFrame:
    """The rate of 1 − c_l over that of ‖g_l‖², paired by net, beside the variance q* at which the chain settles."""
    keys = ["activation", "weight_var", "bias_var"]
    cells = []
    for at, nets in rows[rows["part"] == "rate"].groupby(keys):
        rates = nets.pivot(index="net_seed", columns="quantity", values="value")
        settled = mean_field.fixed_point(*at)
        cells.append(cell(t_interval(rates["forward_rate"] / rates["backward_rate"]), **dict(zip(keys, at, strict=True)), settled=settled))
    return pd.DataFrame(cells)


def remedy_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """By how many decades each remedy brings a chain nearer to no lock than the plain chain of the same seed is.

    Forwards the gain is in the lock, backwards in its size: a gradient that explodes has not been helped. A patient is ill where the
    plain chain's lock, mean over seeds at the same moment, reaches the threshold.

    Returns: a row a pair: way, when, patient, remedy, net_seed, ill, gain.
    """
    gains = []
    locked = rows[(rows["part"] == "remedy") & rows["quantity"].isin([f"{way}_lock" for way in WAYS])]
    for (quantity, when, patient), nets in locked.groupby(["quantity", "when", "patient"]):
        way = str(quantity).removesuffix("_lock")
        locks = nets.pivot(index="net_seed", columns="remedy", values="value")
        if "plain" not in locks:  # every plain chain diverged
            continue
        ill = bool(locks["plain"].mean() >= nets["threshold"].max())
        distance = locks if way == "forward" else locks.abs()
        for remedy in locks.columns.drop("plain"):
            pairs = (distance["plain"] - distance[remedy]).dropna()
            at = {"way": way, "when": when, "patient": patient, "remedy": remedy, "ill": ill}
            gains += [{**at, "net_seed": seed, "gain": gain} for seed, gain in pairs.items()]
    return pd.DataFrame(gains, columns=[*GAIN, "ill", "net_seed", "gain"]).astype({"ill": bool})


def gain_cells(gains: pd.DataFrame) -> pd.DataFrame:
    """The gain of each remedy over seeds."""
    cells = [cell(t_interval(pairs), **dict(zip(GAIN, at, strict=True))) for at, pairs in gains.groupby(GAIN)["gain"]]
    return pd.DataFrame(cells, columns=[*GAIN, *INTERVAL])


def _main_gain(rows: pd.DataFrame) -> pd.DataFrame:
    """What training with auxiliary losses does to the gradient of the chain's own loss, where the plain chain is locked backwards."""
    own = pick(rows, "main_lock").assign(quantity="backward_lock", remedy="chain's own loss")
    plain = pick(rows, "backward_lock", part="remedy", when="trained", remedy="plain")
    return remedy_gains(pd.concat([plain, own])).query("ill")


def _schedule_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The least and the greatest change of ∇θ_1 over seeds."""
    cells = []
    for remedy, values in pick(rows, "schedule_lock").groupby("remedy")["value"]:
        spread = Estimate(values.mean(), values.min(), values.max(), len(values), "least and greatest draw")
        cells.append(cell(spread, remedy=remedy, local=remedy == "local"))
    return pd.DataFrame(cells)
