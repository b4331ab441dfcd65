"""Source "information bottleneck": what a narrow code does to the gradient that goes back through it.

A code c = φ(V h + b) of r units is put into the middle of an MLP. Against r are measured, untrained and trained: the rank of the error
signals of a batch just before V and further below, how much of their energy lies outside r directions, and how much energy arrives there,
with fan-in scaled Gaussian and with orthogonal weights. Then accuracy, with the code, and with a wide code before which the gradient alone
is filtered to r random directions, its energy kept and the state passing whole: the one compresses both ways, the other backwards only.
Filtered to no direction at all, the layers below stay as they were drawn: that is the control.

What rank a code leaves is a matter of its width; what energy, of the scale of its weights: through V and the weights U that read the code
comes E‖VᵀUᵀg‖² = d r Var(V) Var(U) ‖g‖², all of it where the variances are 1/fan-in, (r/d)‖g‖² where both are orthogonal.

Binned mutual information is no evidence here: in a deterministic net it measures how states contract into bins, not how gradients flow
(Saxe et al. 2018; Goldfeld et al. 2019), and is not used.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import structural_rank
from torch import nn
from torch.nn.functional import cross_entropy

from src.chain import cut
from src.config import Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.locking import walk_back
from src.models.bottleneck import GradientFilter, before, with_code
from src.models.layers import Layers
from src.plan import Work
from src.rows import Row, measured, pick
from src.spectrum import spectrum
from src.statistics import greatest, jackknife, t_interval
from src.trainings import Trainee, train_all
from src.verdict import Verdict, cell, cells_by, judge_forms

QUANTITIES = {
    "signal_rank": "rank of the N×d matrix of error signals behind layer l, float64",
    "rank_tolerance": "what a singular value must exceed to count in it, the longest signal being of length 1",
    "outside": "share of the energy of the error signals behind layer l outside their r leading directions; 0 where there is none",
    "energy_kept": "Σ_n‖g‖² just before the code over Σ_n‖g‖² at the logits",
    "live_units": "units of the code that can each be matched to an image of their own on which they are not 0 (structural rank)",
    "train_accuracy": "share of training images told right",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
DEPTH = 5  # weight layers without the code's
READER = "layer3"  # reads the code
BELOW = 2  # layers below the code: g_2 is just before it
NETS: dict[str, dict[str, Any]] = {
    "linear": {"activation": "linear", "weight_var": 1.0},
    "relu": {"activation": "relu", "weight_var": 2.0},
    "tanh": {"activation": "tanh", "weight_var": 1.0},
}
SETTING = ["when", "init", "activation", "code"]
# of the energy that a code as wide as the net keeps, the share that a random one of r = share · d units keeps in the mean
PREDICTED: dict[str, Callable[[float], float]] = {"gaussian": lambda share: 1.0, "orthogonal": lambda share: share}


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid, width = config.grid, config.model.width
    ascending = grid.code_widths == sorted(set(grid.code_widths))
    require(
        ascending and len(grid.code_widths) >= 2 and grid.code_widths[-1] == width,
        f"grid.code_widths: at least two, ascending, the last of them {width}, the width",
    )
    require(width <= grid.samples <= len(data.test), f"grid.samples: {width} (the width) to {len(data.test)} (the test images)")
    require(width >= data.classes, f"model.width: at least {data.classes}, the classes")
    require(grid.seeds >= 2, "grid.seeds: at least 2, for an interval of the mean energies")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid

    def measuring(network: nn.Sequential) -> list[Row]:
        widest = with_code(network, READER, config.model.width, Layers(config.model, context.generator("plan")))
        return list(_signals(context, widest, config.model.width, {}))

    codes, filters = len(grid.code_widths), len(_filters(config))
    return [
        *(Work(_model(config, kind, init), grid.seeds * codes, measuring=measuring) for kind, init in product(NETS, PREDICTED)),
        *(Work(_model(config, kind), grid.train_seeds * codes, context.steps(), measuring) for kind in NETS),
        *(Work(_model(config, kind), grid.train_seeds * filters, context.steps()) for kind in NETS),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_untrained, _trained)


def _model(config: Config, kind: str, init: Any = "gaussian") -> ModelConfig:
    return replace(config.model, **NETS[kind], init=init, depth=DEPTH)


def _filters(config: Config) -> list[int]:
    """How many directions filters let pass: none, and as many as the narrow codes have units."""
    return [0, *config.grid.code_widths[:-1]]


def coded(context: Context, model: ModelConfig, width: int, seed: int) -> nn.Sequential:
    """A random network with a code of the given width."""
    return with_code(context.network(model, seed), READER, width, Layers(model, context.generator("code", width, seed)))


def filtered(context: Context, model: ModelConfig, rank: int, seed: int) -> nn.Sequential:
    """A random network with a code as wide as it is, and before that a filter on the gradient alone."""
    gradient_filter = GradientFilter(model.width, rank, context.generator("filter", rank, seed)).to(context.device)
    return before(coded(context, model, model.width, seed), "code", "filter", gradient_filter)


def _untrained(context: Context) -> Iterator[Row]:
    """The error signals before codes of every width, at initialisation."""
    grid = context.config.grid
    for kind, init, width in context.progress([*product(NETS, PREDICTED, grid.code_widths)], "untrained codes"):
        model = _model(context.config, kind, init)
        for seed in range(grid.seeds):
            where = {"part": "code", "when": "untrained", **_columns(context, model, width, seed)}
            yield from _signals(context, coded(context, model, width, seed), width, where)


def _trained(context: Context) -> Iterator[Row]:
    """Networks with codes, or with filters, of every width trained alike; and the error signals before the codes after it."""
    grid = context.config.grid
    narrowed = [*(("code", coded, width) for width in grid.code_widths), *(("filter", filtered, rank) for rank in _filters(context.config))]
    for kind, (part, make, width) in context.progress([*product(NETS, narrowed)], "trainings"):
        model = _model(context.config, kind)
        seeds = range(grid.train_seeds)
        networks = [make(context, model, width, seed) for seed in seeds]
        names = [f"{kind}, {part} of {width}, seed {seed}" for seed in seeds]
        outcomes = train_all(context, [*map(Trainee, networks, names, seeds)])
        for seed, network, outcome in zip(seeds, networks, outcomes, strict=True):
            where = {"part": part, "when": "trained", **_columns(context, model, width, seed)}
            yield from measured(where, **outcome.metrics())
            if part == "code" and outcome.status == "finished":
                yield from _signals(context, network, width, where)


def _columns(context: Context, model: ModelConfig, width: int, seed: int) -> Row:
    return {"code": width, "classes": context.data.classes, **network_columns(model, seed)}


def _signals(context: Context, network: nn.Sequential, width: int, where: Row) -> Iterator[Row]:
    """Rank and energy outside r directions of the error signals behind every layer below the code; the energy that arrives before it."""
    inputs, targets = context.samples(context.data.test, context.config.grid.samples)
    energy: dict[str, float] = {}
    for link in walk_back(cut(network, None, torch.float64, "eval"), inputs.double(), targets, cross_entropy):
        energy[link.name] = float((2 * link.signal.log_norm).exp().sum())
        if link.name == "code":
            yield from measured(where, live_units=float(structural_rank(csr_array(link.stage(link.inputs).cpu().numpy()))))
        if link.index <= BELOW:
            s = spectrum(link.signal.relative())
            outside = (s.values[width:].square().sum() / s.values.square().sum()).nan_to_num()
            at = {"layer": link.index, **where}
            yield from measured(at, signal_rank=float(s.rank), rank_tolerance=float(s.tolerance), outside=float(outside))
    yield from measured(where, energy_kept=energy[f"layer{BELOW}"] / energy["readout"])


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    narrow = rows[rows["code"] < rows["width"]]
    ranks = pick(narrow, "signal_rank")
    excess = cells_by(ranks.assign(value=ranks["value"] - ranks["code"]), [*SETTING, "layer"], greatest)
    lost, cap = _lost(rows), int(rows["classes"].max()) - 1
    filters = _over_seeds(lost["filter"].drop(columns=0, errors="ignore")).assign(cap=cap)  # to no direction at all is a cut, not a filter
    cells = {
        "filtered_rank": excess,
        "filtered_directions": cells_by(pick(narrow, "outside"), [*SETTING, "layer"], t_interval),
        "filtered_energy": _exponents(rows),
        "filter_explains": _explained(lost, cap, **criteria["filter_explains"].given),
        "rank_before_code": excess[excess["layer"] == BELOW],
        "rank_below": excess[excess["layer"] < BELOW],
        "rank_reached": _rank_reached(rows),
        "energy_orthogonal": _against_prediction(rows, "orthogonal"),
        "energy_gaussian": _against_prediction(rows, "gaussian"),
        "wide_code": _over_seeds(lost["code"]).assign(cap=cap),
        "filter_alone": filters,
        "filter_of_the_cap": filters,
    }
    return judge_forms("information_bottleneck", criteria, cells)


def _rank_reached(rows: pd.DataFrame) -> pd.DataFrame:
    """How far the rank before an untrained code is from its live units, at most C − 1 in a linear net."""
    ranks = pick(rows, "signal_rank", when="untrained", layer=BELOW)
    nets = ranks.merge(pick(rows, "live_units"), on=[*SETTING, "net_seed"], suffixes=("", "_live"))
    reachable = nets["value_live"].where(nets["activation"] != "linear", np.minimum(nets["value_live"], nets["classes"] - 1))
    return cells_by(nets.assign(value=(nets["value"] - reachable).abs()), SETTING, greatest)


def _exponents(rows: pd.DataFrame) -> pd.DataFrame:
    """The exponent a of energy kept ∝ (r/d)^a, against a code as wide as the net, paired by seed; of codes that are dead in no draw."""
    kept = pick(rows, "energy_kept").pivot(index=["when", "init", "activation", "width", "net_seed"], columns="code", values="value")
    shares = kept.iloc[:, :-1].div(kept.iloc[:, -1], axis=0).melt(ignore_index=False).dropna().reset_index()
    alive = shares[shares.groupby(SETTING)["value"].transform("min") > 0]
    return cells_by(alive.assign(value=np.log(alive["value"]) / np.log(alive["code"] / alive["width"])), SETTING, t_interval)


def _against_prediction(rows: pd.DataFrame, init: str) -> pd.DataFrame:
    """The mean energy kept by an untrained code over that kept by one as wide as the net, over its prediction, by the jackknife of ln."""
    kept = pick(rows, "energy_kept", when="untrained", init=init).pivot(index=["activation", "net_seed"], columns="code", values="value")
    *codes, width = kept.columns
    cells = []
    for (activation, nets), code in product(kept.groupby("activation"), codes):
        pairs = nets[[code, width]] / [PREDICTED[init](code / width), 1]
        log = jackknife(lambda energies: np.log(energies[..., 0].mean(-1) / energies[..., 1].mean(-1)), pairs)
        ratio = replace(log, value=np.exp(log.value), lo=np.exp(log.lo), hi=np.exp(log.hi))
        cells.append(cell(ratio, activation=activation, code=code))
    return pd.DataFrame(cells)


def _lost(rows: pd.DataFrame) -> pd.DataFrame:
    """The test accuracy lost against a code as wide as the net: a row an activation and seed, a column a code or filter and its width."""
    accuracy = pick(rows, "test_accuracy").pivot(index=["activation", "net_seed"], columns=["part", "code"], values="value")
    wide = accuracy["code"].iloc[:, -1]
    return -accuracy.drop(columns=("code", wide.name)).sub(wide, axis=0)


def _over_seeds(lost: pd.DataFrame) -> pd.DataFrame:
    return cells_by(lost.melt(ignore_index=False).dropna().reset_index(), ["activation", "code"], t_interval)


def _explained(lost: pd.DataFrame, cap: int, share: float, noticed: float) -> pd.DataFrame:
    """The accuracy that a filter of the gradient costs minus a share of what the code costs, paired by seed; of codes < C−1 that cost."""
    by_code = lost["code"].loc[:, lambda codes: codes.columns < cap]
    costly = by_code.groupby("activation").transform("mean") >= noticed
    return _over_seeds((lost["filter"][by_code.columns] - share * by_code).where(costly))
