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

from src.config import Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.diversity import dissimilarity, participation_ratio, rank
from src.experiment import Context, network_columns
from src.locking import ErrorSignal, severity
from src.models.exits import MultiExit
from src.plan import Work
from src.rows import Row, measured, pick
from src.statistics import Estimate, slope, t_interval
from src.training.loop import Objective, end_to_end
from src.training.objectives import DeepSupervision, exit_losses
from src.verdict import Verdict, cell, cells_by, judge_forms

QUANTITIES = {
    "dissimilarity": "1 − c_l, c_l the mean cosine between two samples' states behind stage l",
    "participation": "(Σλ)²/Σλ² of the Gram matrix of the states behind stage l",
    "state_rank": "numerical rank of the states behind stage l",
    "error_signal": "½ ln mean ‖g_l‖² behind stage l, nats",
    "severity": "1 − σ_r/σ_1 of the error signals g_l over the samples, over the r nonzero singular values",
    "signal_rank": "numerical rank of the error signals g_l over the samples",
    "forward_lock": "−log₁₀(1 − c), c the mean cosine between two samples of what the readout reads, decades",
    "backward_lock": "log₁₀ ‖g_{L−1}‖/‖g_1‖, root mean squares over the samples, of the loss that is trained on; decades",
    "main_lock": "the same of the chain's own loss alone",
    "schedule_lock": "‖∇θ_1 − ∇θ_1'‖/‖∇θ_1‖, the latter after the signs of the last weights are flipped",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
WAYS = ("forward", "backward")
LOCKS = [f"{way}_lock" for way in WAYS]
# plain chains by what is locked
CHAINS: dict[str, dict[str, Any]] = {
    "neither": {"activation": "linear", "init": "orthogonal", "weight_var": 1.0, "bias_var": 0.0},
    "forwards": {"activation": "relu", "init": "gaussian", "weight_var": 2.0, "bias_var": 0.0},
    "backwards": {"activation": "tanh", "init": "gaussian", "weight_var": 4.0, "bias_var": 0.0},
    "both": {"activation": "tanh", "init": "gaussian", "weight_var": 1.0, "bias_var": 0.05},
}
LOCKED = {"neither": (), "forwards": ("forward",), "backwards": ("backward",), "both": WAYS}
# what else is measured of the last states and of the first error signals, by the way it is about
MEASURES = {"participation": "forward", "state_rank": "forward", "severity": "backward", "signal_rank": "backward"}
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
PATIENT = ["way", "when", "patient"]
GAIN = [*PATIENT, "remedy"]
SCHEDULED = "ReLU, σw²=2"  # the patient whose schedule is looked at: its gradient reaches the first stage
ALPHA = 0.3  # the weight of an auxiliary loss (Szegedy et al. 2015, Going deeper with convolutions, section 5)
FAINTEST = math.log(torch.finfo(torch.float64).tiny) / 2  # ln of the faintest error signal that counts


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid, depth = config.grid, config.model.depth
    require(depth >= 8 and depth % 2 == 0, "model.depth: 2n+2 weight layers, at least 8 (8, 10, 12, …)")
    require(config.model.width >= 8, "model.width: at least 8 units: narrower chains die")
    require(grid.train_width >= 8, "grid.train_width: at least 8 units: narrower chains die")
    require(min(grid.seeds, grid.train_seeds) >= 2, "grid.seeds, grid.train_seeds: at least 2, for an interval")
    require(2 <= grid.samples <= len(data.test), f"grid.samples: 2 to {len(data.test)}, the test images")
    require(2 <= grid.calibration <= len(data.train), f"grid.calibration: 2 to {len(data.train)}, the training images")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid, steps = context.config, context.config.grid, context.steps()

    def exhibiting(network: nn.Sequential) -> None:
        list(_both_ways(context, network, {}))

    def treating(network: nn.Sequential) -> None:
        for _ in ("before", "after"):
            list(_locks(context, passing(context, network), {}))

    return [
        *(Work(model, grid.seeds, measuring=exhibiting) for model in _exhibited(config).values()),
        *(Work(model, grid.train_seeds, steps, measuring=treating) for _, _, model in _treated(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return pd.DataFrame([row for part in (_exhibits, _treatments) for row in part(context)])


def _exhibited(config: Config) -> dict[str, ModelConfig]:
    return {chain: replace(config.model, family="mlp", skip="none", norm="none", **settings) for chain, settings in CHAINS.items()}


def _exhibits(context: Context) -> Iterator[Row]:
    """The four chains, stage by stage, with all measures of either way."""
    for chain, model in _exhibited(context.config).items():
        for seed in range(context.config.grid.seeds):
            network = context.network(model, seed)
            if chain == "backwards":
                latch(network, math.sqrt(model.weight_var))
            yield from _both_ways(context, network, {"part": "chain", "chain": chain, **network_columns(model, seed)})


def _both_ways(context: Context, network: nn.Sequential, where: Row) -> Iterator[Row]:
    """Both locks of a chain; how much its states differ and how far its error signals get, behind every stage but the readout."""
    passed = passing(context, network)
    yield from _locks(context, passed, where)
    for layer, (state, signal) in enumerate(zip(passed.states[:-1], passed.signals[:-1], strict=True), start=1):
        spread = severity(signal)
        yield from measured(
            {**where, "layer": layer},
            dissimilarity=dissimilarity(state),
            participation=participation_ratio(state),
            state_rank=float(rank(state)),
            error_signal=signal.log_rms(),
            severity=spread["lambda_nonzero"],
            signal_rank=float(spread["rank"]),
        )


@torch.no_grad()
def latch(network: nn.Sequential, gain: float) -> None:
    """Make every hidden layer but the first h ↦ tanh(gain·h): each unit runs to an attractor and keeps its sign (Bengio et al. 1994)."""
    for linear in [module for module in network.modules() if isinstance(module, nn.Linear)][1:-1]:
        linear.weight.copy_(gain * torch.eye(len(linear.weight)))


def _treated(config: Config) -> list[tuple[str, str, ModelConfig]]:
    model = replace(config.model, family="residual_mlp", init="gaussian", width=config.grid.train_width)
    return [(p, r, replace(model, **PATIENTS[p], **REMEDIES[r])) for p in PATIENTS for r in REMEDIES]


def _treatments(context: Context) -> Iterator[Row]:
    """Every patient with every remedy, before and after a training; the seeds pair them."""
    for patient, remedy, model in context.progress(_treated(context.config), "remedies"):
        for seed in range(context.config.grid.train_seeds):
            network, objective = _with_losses(context, model, remedy, seed)
            where = {"part": "remedy", "patient": patient, "remedy": remedy, **network_columns(model, seed)}
            trained = {**where, "when": "trained"}
            yield from _locks(context, passing(context, network, objective), {**where, "when": "initial"})
            if patient == SCHEDULED:
                yield from _schedule(context, network, objective, where)
            outcome = context.train(network, f"{patient}, {remedy}, seed {seed}", seed, objective)
            yield from measured(trained, **{quantity: outcome.metrics()[quantity] for quantity in ("test_accuracy", "diverged")})
            if outcome.status == "finished":
                yield from _locks(context, passing(context, network, objective), trained)
                if remedy == "exits":
                    yield from measured(trained, main_lock=passing(context, network).backward_lock())


def _with_losses(context: Context, model: ModelConfig, remedy: str, seed: int) -> tuple[nn.Module, Objective]:
    """A network and what it is trained on: with "exits", also the auxiliary loss of every stage but the last two."""
    network = context.calibrated(model, seed)
    if remedy != "exits":
        return network, end_to_end
    names = [name for name, _ in network.named_children()][:-2]
    return context.with_exits(network, model, names, seed), DeepSupervision(dict.fromkeys(names, ALPHA))


def _locks(context: Context, passed: "Passed", where: Row) -> Iterator[Row]:
    at = {**where, "threshold": context.config.grid.locked_decades}
    return measured(at, forward_lock=passed.forward_lock(), backward_lock=passed.backward_lock())


def _schedule(context: Context, network: nn.Module, objective: Objective, where: Row) -> Iterator[Row]:
    """What the last weights have to do with ∇θ_1; for a network with exits also where stage 1 learns from its own exit alone."""
    yield from measured(where, schedule_lock=schedule_lock(context, network, objective))
    if where["remedy"] == "exits":
        yield from measured({**where, "remedy": "local"}, schedule_lock=schedule_lock(context, network, first_exit))


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
    signals: Sequence[ErrorSignal]
    features: Tensor

    def forward_lock(self) -> float:
        """−log₁₀(1 − c) of what the readout reads; what lies below the rounding of directions counts as that."""
        return -math.log10(max(dissimilarity(self.features), torch.finfo(torch.float64).eps ** 2))

    def backward_lock(self) -> float:
        """log₁₀ ‖g_{L−1}‖/‖g_1‖, of root mean squares over the samples."""
        last, first = (max(signal.log_rms(), FAINTEST) for signal in (self.signals[-2], self.signals[0]))
        return (last - first) / math.log(10)


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
    unscaled = inputs.new_zeros(len(inputs), dtype=torch.float64)
    return Passed([state.detach() for state in states], [ErrorSignal.of(signal, unscaled) for signal in signals], features[0])


def chain_of(network: nn.Module) -> nn.Sequential:
    """The chain of a network, with exits or without."""
    chain = network.chain if isinstance(network, MultiExit) else network
    assert isinstance(chain, nn.Sequential)
    return chain


def readout_of(chain: nn.Sequential) -> nn.Linear:
    """The last weight layer."""
    return [module for module in chain.modules() if isinstance(module, nn.Linear)][-1]


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    gains, margins, told = remedy_gains(rows), _margins(rows), _told_apart(rows)
    ill, well = (cells_by(gains[gains["ill"] == locked], GAIN, t_interval) for locked in (True, False))
    cells = {
        "distinct": margins.query("chain in ('forwards', 'backwards')"),
        "both_present": margins.query("chain == 'both'"),
        "neither": margins.query("chain == 'neither'"),
        "one_rate": _rate_ratio(rows),
        **{f"{measure}_tells": told.query("measure == @measure") for measure in MEASURES},
        "skips_help_backward": ill.query("remedy == 'skip' and way == 'backward'"),
        "skips_help_forward": ill.query("remedy == 'skip' and way == 'forward'"),
        "normalisation_helps_both": ill.query("remedy == 'batch'"),
        "layer_normalisation_helps_both": ill.query("remedy == 'layer'"),
        "exits_help_backward": ill.query("remedy == 'exits' and way == 'backward'"),
        "exits_leave_forward": ill.query("remedy == 'exits' and way == 'forward'"),
        "exits_open_the_chain": cells_by(_main_gain(rows), GAIN, t_interval),
        "unneeded": well.query("remedy in ('skip', 'batch') and way == 'backward' and when == 'initial'"),
        "schedule": _schedule_cells(rows),
    }
    return judge_forms("forward_backward", criteria, cells)


def _margins(rows: pd.DataFrame) -> pd.DataFrame:
    """By how many decades each of the four chains is on its side of both thresholds, the lesser margin of a net, over seeds."""
    locks = rows[(rows["part"] == "chain") & rows["quantity"].isin(LOCKS)]
    locked = [quantity.removesuffix("_lock") in LOCKED[chain] for quantity, chain in zip(locks["quantity"], locks["chain"], strict=True)]
    beyond = locks["value"] - locks["threshold"]
    margins = locks.assign(value=beyond.where(locked, -beyond)).groupby(["chain", "net_seed"], as_index=False)["value"].min()
    return cells_by(margins, ["chain"], t_interval)


def rates(rows: pd.DataFrame) -> pd.DataFrame:
    """How fast 1 − c_l and ‖g_l‖² shrink in the deeper half of chains of one kind, a line a net; nats a layer."""
    profiles = rows[rows["layer"] >= rows["depth"] // 2].pivot(index=["net_seed", "layer"], columns="quantity", values="value")
    nets = [net.reset_index() for _, net in profiles.groupby("net_seed")]
    forward = [slope(net["layer"], np.log(net["dissimilarity"])).value for net in nets]
    return pd.DataFrame({"forward": forward, "backward": [slope(-net["layer"], 2 * net["error_signal"]).value for net in nets]})


def _rate_ratio(rows: pd.DataFrame) -> pd.DataFrame:
    """The one rate over the other in the random chains that are locked both ways."""
    found = rates(rows[(rows["part"] == "chain") & (rows["chain"] == "both")])
    return pd.DataFrame([cell(t_interval(found["forward"] / found["backward"]), chain="both")])


def _told_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """How many times smaller, as a logarithm, a measure is in a chain that is locked its way than in one that is not, paired by seed.

    Forwards of the last hidden states, backwards of g_1; of the severity λ it is 1 − λ = σ_r/σ_1 that is compared.
    """
    cells = []
    for measure, way in MEASURES.items():
        layer = 1 if way == "backward" else rows["layer"].max()
        nets = pick(rows, measure, part="chain", layer=layer).pivot(index="net_seed", columns="chain", values="value")
        logs = np.log(1 - nets if measure == "severity" else nets)
        locked = [chain for chain in CHAINS if way in LOCKED[chain]]
        for pair in [{"locked": one, "unlocked": other} for one in locked for other in CHAINS if other not in locked]:
            cells.append(cell(t_interval(logs[pair["unlocked"]] - logs[pair["locked"]]), measure=measure, **pair))
    return pd.DataFrame(cells)


def remedy_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """By how many decades each remedy brings a chain nearer to no lock than the plain chain of the same seed is.

    Forwards the gain is in the lock, backwards in its size: a gradient that explodes has not been helped. A patient is ill where the
    plain chain's lock, mean over seeds at the same moment, reaches the threshold. Trainings that diverged are in no pair.

    Returns: a row a pair, with way, when, patient, remedy, net_seed, ill; the gain is the value.
    """
    locks = rows[(rows["part"] == "remedy") & rows["quantity"].isin(LOCKS)]
    locks = locks.assign(way=locks["quantity"].str.removesuffix("_lock"))
    locks["distance"] = locks["value"].where(locks["way"] == "forward", locks["value"].abs())
    plain = locks[locks["remedy"] == "plain"]
    plain = plain.assign(ill=plain.groupby(PATIENT)["value"].transform("mean") >= plain["threshold"])
    on = [*PATIENT, "net_seed"]
    pairs = locks[locks["remedy"] != "plain"].merge(plain[[*on, "distance", "ill"]], on=on, suffixes=("", "_plain"))
    return pairs.assign(value=pairs["distance_plain"] - pairs["distance"])


def _main_gain(rows: pd.DataFrame) -> pd.DataFrame:
    """What training with auxiliary losses does to the gradient of the chain's own loss, where the plain chain is locked backwards."""
    own = pick(rows, "main_lock").assign(quantity="backward_lock", remedy="chain's own loss")
    plain = pick(rows, "backward_lock", part="remedy", when="trained", remedy="plain")
    return remedy_gains(pd.concat([plain, own])).query("ill")


def _schedule_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The least and the greatest change of ∇θ_1 over seeds."""
    changes = pick(rows, "schedule_lock")

    def spread(draws: pd.Series) -> Estimate:
        return Estimate(draws.mean(), draws.min(), draws.max(), len(draws), "least and greatest draw")

    return cells_by(changes.assign(local=changes["remedy"] == "local"), ["remedy", "local"], spread)
