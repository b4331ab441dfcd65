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
from src.models.start import latch
from src.plan import Work
from src.rows import Row, measured, pick
from src.statistics import Estimate, exactly, slope, t_interval
from src.training.loop import Objective, end_to_end
from src.training.objectives import DeepSupervision, exit_losses
from src.trainings import Trainee, train_all
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
    "forward_rate": "slope of ln (1 − c_l) over the deeper half of a random plain chain, nats a layer",
    "backward_rate": "slope of ln ‖g_l‖² against the distance from the loss, over the same layers, nats a layer",
    "schedule_lock": "‖∇θ_1 − ∇θ_1'‖/‖∇θ_1‖, the latter after the signs of the last weights are flipped",
    "learning_rate": "that a chain with a remedy was found to train best at, on a network of which nothing else is measured",
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
# random plain chains whose two rates are compared
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
GAIN = ["way", "when", "patient", "remedy"]
LEARNING = {
    "skips_help_learning": "skip",
    "normalisation_helps_learning": "batch",
    "layer_normalisation_helps_learning": "layer",
    "exits_help_learning": "exits",
}
SCHEDULED = "ReLU, σw²=2"  # the patient whose schedule is looked at: its gradient reaches the first stage
ALPHA = 0.3  # the weight of an auxiliary loss (Szegedy et al. 2015, Going deeper with convolutions, section 5)
FAINTEST = math.log(torch.finfo(torch.float64).tiny) / 2  # ln of the faintest error signal that counts


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
    config, grid, steps = context.config, context.config.grid, context.steps()

    def exhibiting(network: nn.Sequential) -> None:
        list(_both_ways(context, network, {}))

    def rating(network: nn.Sequential) -> None:
        rates(passing(context, network))

    def treating(network: nn.Sequential) -> None:
        for _ in ("before", "after"):
            list(_locks(passing(context, network), {}))

    return [
        *(Work(model, grid.seeds, measuring=exhibiting) for model in _exhibited(config).values()),
        *(Work(model, grid.seeds, measuring=rating) for model in _rated(config)),
        *(Work(model, len(grid.rates), steps) for _, _, model in _treated(config)),
        *(Work(model, grid.train_seeds, steps, measuring=treating) for _, _, model in _treated(config)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_exhibits, _rates, _treatments)


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
    yield from _locks(passed, where)
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


def _rated(config: Config) -> list[ModelConfig]:
    model = replace(config.model, family="mlp", skip="none", norm="none", init="gaussian", depth=config.grid.rate_depth)
    return [replace(model, **settings) for settings in RATED]


def _rates(context: Context) -> Iterator[Row]:
    """How fast states draw together and gradients shrink in random plain chains."""
    for model in _rated(context.config):
        for seed in range(context.config.grid.seeds):
            forward, backward = rates(passing(context, context.network(model, seed)))
            where = {"part": "rate", **network_columns(model, seed)}
            yield from measured(where, forward_rate=forward, backward_rate=backward)


def rates(passed: "Passed") -> tuple[float, float]:
    """How fast 1 − c_l and ‖g_l‖² shrink in the deeper half of a chain, nats a layer."""
    deep = range(len(passed.states) // 2, len(passed.states))
    apart = [math.log(dissimilarity(passed.states[layer - 1])) for layer in deep]
    kept = [2 * passed.signals[layer - 1].log_rms() for layer in deep]
    return slope(deep, apart).value, slope([-layer for layer in deep], kept).value


def _treated(config: Config) -> list[tuple[str, str, ModelConfig]]:
    model = replace(config.model, family="residual_mlp", init="gaussian", width=config.grid.train_width)
    return [(p, r, replace(model, **PATIENTS[p], **REMEDIES[r])) for p in PATIENTS for r in REMEDIES]


def _treatments(context: Context) -> Iterator[Row]:
    """Every patient with every remedy, before and after a training at a rate of its own; the seeds pair them."""
    for patient, remedy, model in context.progress(_treated(context.config), "remedies"):
        rate = _best_rate(context, patient, remedy, model)
        yield from measured({"part": "rates", "patient": patient, "remedy": remedy}, learning_rate=rate)
        where = {"part": "remedy", "patient": patient, "remedy": remedy}
        trainees = []
        for seed in range(context.config.grid.train_seeds):
            network, objective = _with_losses(context, model, remedy, seed)
            at = {**where, **network_columns(model, seed)}
            yield from _locks(passing(context, network, objective), {**at, "when": "initial"})
            if patient == SCHEDULED:
                yield from _schedule(context, network, objective, at)
            trainees.append(_trainee(context, network, f"{patient}, {remedy}, seed {seed}", seed, objective, rate))
        for trainee, outcome in zip(trainees, train_all(context, trainees), strict=True):
            trained = {**where, **network_columns(model, trainee.seed), "when": "trained"}
            yield from measured(trained, **{quantity: outcome.metrics()[quantity] for quantity in ("test_accuracy", "diverged")})
            if outcome.status == "finished":
                yield from _locks(passing(context, trainee.network, trainee.objective), trained)
                if remedy == "exits":
                    yield from measured(trained, main_lock=passing(context, trainee.network).backward_lock())


def _best_rate(context: Context, patient: str, remedy: str, model: ModelConfig) -> float:
    """The rate that tells most training images right on one more network, the smaller of those that tie; one that diverges tells none."""
    grid = context.config.grid
    rates = sorted(context.config.training.lr * factor for factor in grid.rates)
    trainees = []
    for rate in rates:
        network, objective = _with_losses(context, model, remedy, grid.train_seeds)
        trainees.append(_trainee(context, network, f"{patient}, {remedy}, rate {rate:g}", grid.train_seeds, objective, rate))
    outcomes = zip(rates, train_all(context, trainees), strict=True)
    reached = {rate: outcome.metrics()["train_accuracy"] if outcome.status == "finished" else 0.0 for rate, outcome in outcomes}
    return max(reached, key=reached.__getitem__)


def _trainee(context: Context, network: nn.Module, name: str, seed: int, objective: Objective, rate: float) -> Trainee[nn.Module]:
    return Trainee(network, name, seed, objective, config=replace(context.config.training, lr=rate))


def _with_losses(context: Context, model: ModelConfig, remedy: str, seed: int) -> tuple[nn.Module, Objective]:
    """A network and what it is trained on: with "exits", also the auxiliary loss of every stage but the last two."""
    network = context.calibrated(model, seed)
    if remedy != "exits":
        return network, end_to_end
    names = [name for name, _ in network.named_children()][:-2]
    return context.with_exits(network, model, names, seed), DeepSupervision(dict.fromkeys(names, ALPHA))


def _locks(passed: "Passed", where: Row) -> Iterator[Row]:
    return measured(where, forward_lock=passed.forward_lock(), backward_lock=passed.backward_lock())


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
    told, gains, learning = _told_apart(rows), gain_cells(rows, remedy_gains(rows)), _learning_cells(rows)
    cells = {
        "distinct": _margins(rows, ("forwards", "backwards"), criteria["distinct"]),
        "both_present": _margins(rows, ("both",), criteria["both_present"]),
        "neither": _margins(rows, ("neither",), criteria["neither"]),
        "one_rate": _rate_ratio(rows),
        **{f"{measure}_tells": told.query("measure == @measure") for measure in MEASURES},
        "skips_help_backward": gains.query("remedy == 'skip' and way == 'backward'"),
        "skips_help_forward": gains.query("remedy == 'skip' and way == 'forward'"),
        "normalisation_helps_both": gains.query("remedy == 'batch'"),
        "layer_normalisation_helps_both": gains.query("remedy == 'layer'"),
        "exits_help_backward": gains.query("remedy == 'exits' and way == 'backward'"),
        "exits_leave_forward": gains.query("remedy == 'exits' and way == 'forward'"),
        "exits_leave_forward_untrained": gains.query("remedy == 'exits' and way == 'forward'"),
        "exits_open_the_chain": gain_cells(rows, _main_gains(rows)),
        **{form: learning.query("remedy == @remedy") for form, remedy in LEARNING.items()},
        "unneeded": gains.query("remedy in ('skip', 'batch') and way == 'backward' and when == 'initial'"),
        "schedule": _schedule_cells(rows),
    }
    return judge_forms("forward_backward", criteria, cells)


def _margins(rows: pd.DataFrame, chains: Sequence[str], criterion: Criterion) -> pd.DataFrame:
    """By how many decades each of the chains is on its side of both thresholds, the lesser margin of a net, over seeds."""
    locks = rows[(rows["part"] == "chain") & rows["quantity"].isin(LOCKS) & rows["chain"].isin(chains)]
    locked = [quantity.removesuffix("_lock") in LOCKED[chain] for quantity, chain in zip(locks["quantity"], locks["chain"], strict=True)]
    beyond = locks["value"] - criterion.given["locked_decades"]
    margins = locks.assign(value=beyond.where(locked, -beyond)).groupby(["chain", "net_seed"], as_index=False)["value"].min()
    return cells_by(margins, ["chain"], t_interval)


def _rate_ratio(rows: pd.DataFrame) -> pd.DataFrame:
    """The one rate over the other, paired by net, beside the variance q* that the chain settles at."""
    keys = ["activation", "weight_var", "bias_var"]
    nets = rows[rows["part"] == "rate"].pivot(index=[*keys, "net_seed"], columns="quantity", values="value").reset_index()
    settled = [mean_field.fixed_point(*at) for at in nets[keys].itertuples(index=False)]
    return cells_by(nets.assign(settled=settled, value=nets["forward_rate"] / nets["backward_rate"]), [*keys, "settled"], t_interval)


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

    Forwards the gain is in the lock, backwards in its size: a gradient that explodes has not been helped. A training that diverged leaves
    no lock: where it is the remedy's the gain is −∞, where the plain chain's alone +∞.

    Returns: a row a pair, with way, when, patient, remedy, net_seed; the gain is the value.
    """
    locks = rows[(rows["part"] == "remedy") & rows["quantity"].isin(LOCKS)]
    lost = [pick(rows, "diverged", value=1.0).assign(quantity=quantity, value=np.inf) for quantity in LOCKS]
    locks = pd.concat([*lost, locks], ignore_index=True).drop_duplicates(["quantity", "when", "patient", "remedy", "net_seed"])
    way = locks["quantity"].str.removesuffix("_lock")
    return _gains(locks.assign(way=way, value=-locks["value"].where(way == "forward", locks["value"].abs())))


def accuracy_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """By how much more of the test images a chain with a remedy tells right than the plain chain of the same seed; as `remedy_gains`."""
    return _gains(pick(rows, "test_accuracy", part="remedy").assign(way="accuracy"))


def _gains(nets: pd.DataFrame) -> pd.DataFrame:
    """The value of every net with a remedy less that of the plain net of its seed; −∞ where it has none."""
    on = ["way", "when", "patient", "net_seed"]
    plain = nets.loc[nets["remedy"] == "plain", [*on, "value"]]
    pairs = nets[nets["remedy"] != "plain"].merge(plain, on=on, suffixes=("", "_plain"))
    diverged = np.isneginf(pairs["value"])
    return pairs.assign(value=(pairs["value"] - pairs["value_plain"]).where(~diverged, -np.inf))


def gain_cells(rows: pd.DataFrame, gains: pd.DataFrame) -> pd.DataFrame:
    """A cell a remedy, patient, way and moment, over seeds, beside how many trainings diverged and how far the patient was locked.

    That is the plain chain's lock, mean over seeds, at initialisation: before any remedy and any training; of an accuracy it is the
    backward lock.
    """
    untreated = rows[(rows["when"] == "initial") & (rows["remedy"] == "plain")].groupby(["quantity", "patient"])["value"].mean()
    locks = gains["way"].replace("accuracy", "backward") + "_lock"
    lock = untreated.reindex(pd.MultiIndex.from_arrays([locks, gains["patient"]])).to_numpy()
    lost = pick(rows, "diverged").groupby(["when", "patient", "remedy"])["value"].sum()
    diverged = lost.reindex(pd.MultiIndex.from_frame(gains[["when", "patient", "remedy"]]), fill_value=0).to_numpy().astype(int)
    return cells_by(gains.assign(plain_lock=lock, diverged=diverged), [*GAIN, "plain_lock", "diverged"], mean_gain)


def _learning_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The cells of the accuracy, beside the greater mean accuracy of the two: where none has learnt, nothing tells them apart."""
    means = pick(rows, "test_accuracy", part="remedy").groupby(["patient", "remedy"])["value"].mean()
    cells = gain_cells(rows, accuracy_gains(rows))
    best = [max(means[patient, remedy], means[patient, "plain"]) for patient, remedy in zip(cells["patient"], cells["remedy"], strict=True)]
    return cells.assign(best=best)


def mean_gain(gains: pd.Series) -> Estimate:
    """The mean with its t-interval; −∞ where one of them is, else +∞ where one is, of which nothing is known: no lock was compared."""
    infinite = gains[np.isinf(gains)]
    return t_interval(gains) if infinite.empty else replace(exactly(infinite.min()), lo=-math.inf, hi=math.inf, n=len(gains))


def _main_gains(rows: pd.DataFrame) -> pd.DataFrame:
    """What training with auxiliary losses does to the gradient of the chain's own loss."""
    trained = rows[(rows["when"] == "trained") & rows["remedy"].isin(["plain", "exits"])]
    own = trained[(trained["remedy"] == "plain") | (trained["quantity"] != "backward_lock")]
    return remedy_gains(own.replace({"quantity": {"main_lock": "backward_lock"}})).query("way == 'backward'")


def _schedule_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The least and the greatest change of ∇θ_1 over seeds."""
    changes = pick(rows, "schedule_lock")

    def spread(draws: pd.Series) -> Estimate:
        return Estimate(draws.mean(), draws.min(), draws.max(), len(draws), "least and greatest draw")

    return cells_by(changes.assign(local=changes["remedy"] == "local"), ["remedy", "local"], spread)
