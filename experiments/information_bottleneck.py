"""Source "information bottleneck": what a narrow code does to the gradient that goes back through it.

A code c = φ(V h + b) of r units is put into the middle of an MLP. Measured against r: the rank of the error signals g_{l−1} of a batch just
before V and further below, and their energy in units of that behind the code, untrained and trained, with fan-in scaled Gaussian and with
orthogonal weights; accuracy, with the code and with its filter on the gradient alone, the state passing whole.

Binned mutual information is no evidence here: in a deterministic net it measures how states contract into bins, not how gradients flow
(Saxe et al. 2018; Goldfeld et al. 2019), and is not used.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
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
from src.rows import pick
from src.spectrum import spectrum
from src.statistics import greatest, paired_difference, t_interval
from src.training.loop import planned_steps
from src.verdict import Verdict, cell, judge_forms

Row = dict[str, Any]

QUANTITIES = {
    "signal_rank": "rank of the N×d matrix of error signals behind layer l, float64",
    "outside": "share of the energy of the error signals behind layer l outside their r leading directions",
    "energy_kept": "Σ_n‖g‖² just before the code over Σ_n‖g‖² behind the layer that reads it",
    "live_units": "units of the code with φ' > 0 on some input",
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
INITS = ("gaussian", "orthogonal")


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid, width = config.grid, config.model.width
    require(max(grid.code_widths) == width, f"grid.code_widths: at most {width}, the width, and {width} among them")
    require(len(set(grid.code_widths)) >= 2, "grid.code_widths: at least two widths")
    require(width <= grid.samples <= len(data.test), f"grid.samples: {width} (the width) to {len(data.test)} (the test images)")
    require(width >= data.classes, f"model.width: at least {data.classes}, the classes")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid = context.config, context.config.grid
    steps, codes = planned_steps(config.training, len(context.data.train)), len(grid.code_widths)
    return [
        *(Work(_model(config, kind, init), grid.seeds * codes) for kind in NETS for init in INITS),
        *(Work(_model(config, kind), grid.train_seeds * 2 * codes, steps) for kind in NETS),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    parts = (_untrained, _trained, _filtered)
    return pd.DataFrame([row for part in parts for row in part(context)])


def _model(config: Config, kind: str, init: Any = "gaussian") -> ModelConfig:
    return replace(config.model, **NETS[kind], init=init, depth=DEPTH)


def coded(context: Context, model: ModelConfig, width: int, seed: int) -> nn.Sequential:
    """A random network with a code of the given width."""
    return with_code(context.network(model, seed), READER, width, Layers(model, context.generator("code", width, seed)))


def _untrained(context: Context) -> Iterator[Row]:
    """Rank and energy of the error signals before codes of every width, at initialisation."""
    grid = context.config.grid
    for kind, init in context.progress([(kind, init) for kind in NETS for init in INITS], "untrained codes"):
        model = _model(context.config, kind, init)
        for width in grid.code_widths:
            for seed in range(grid.seeds):
                where = {"part": "signal", "when": "untrained", **_columns(context, model, width, seed)}
                yield from _signals(context, coded(context, model, width, seed), where)


def _columns(context: Context, model: ModelConfig, width: int, seed: int) -> Row:
    return {"code": width, "classes": context.data.classes, **network_columns(model, seed)}


def _signals(context: Context, network: nn.Sequential, where: Row) -> Iterator[Row]:
    """Rank of the error signals behind every layer below the code, their energy outside r directions, and the energy that the code kept."""
    inputs, targets = context.samples(context.data.test, context.config.grid.samples)
    energy: dict[str, float] = {}
    for link in walk_back(cut(network, None, torch.float64, "eval"), inputs.double(), targets, cross_entropy):
        energy[link.name] = float((2 * link.signal.log_norm).exp().sum())
        if link.name == "code":
            live = live_units(link.stage, link.inputs)
            yield {"quantity": "live_units", "value": float(live), **where}
        if link.index <= BELOW:
            s = spectrum(link.signal.relative())
            at = {"layer": link.index, "tolerance": float(s.tolerance), **where}
            squares = s.values.square()
            yield {"quantity": "signal_rank", "value": float(s.rank), **at}
            if squares.sum() > 0:
                yield {"quantity": "outside", "value": float(squares[where["code"] :].sum() / squares.sum()), **at}
    yield {"quantity": "energy_kept", "value": energy[f"layer{BELOW}"] / energy[READER], **where}


def live_units(code: nn.Module, inputs: torch.Tensor) -> int:
    """Units whose slope φ' is not 0 on every input."""
    states = inputs.detach().requires_grad_()
    outputs = code(states)
    slopes = [torch.autograd.grad(unit.sum(), states, retain_graph=True)[0].abs().sum() for unit in outputs.unbind(1)]
    return int((torch.stack(slopes) > 0).sum())


def _trained(context: Context) -> Iterator[Row]:
    """Networks with codes of every width trained alike, and the error signals after it."""
    grid = context.config.grid
    cases = [(kind, width) for kind in NETS for width in grid.code_widths]
    for kind, width in context.progress(cases, "trained codes"):
        model = _model(context.config, kind)
        for seed in range(grid.train_seeds):
            network = coded(context, model, width, seed)
            where = {"when": "trained", **_columns(context, model, width, seed)}
            outcome = context.train(network, f"{kind}, code of {width}, seed {seed}", seed)
            for quantity, value in outcome.metrics().items():
                yield {"quantity": quantity, "value": value, "part": "code", **where}
            if outcome.status == "finished":
                yield from _signals(context, network, {"part": "signal", **where})


def _filtered(context: Context) -> Iterator[Row]:
    """Networks with a code as wide as they are, whose gradient alone is filtered to r directions, trained alike."""
    grid = context.config.grid
    cases = [(kind, rank) for kind in NETS for rank in grid.code_widths]
    for kind, rank in context.progress(cases, "filtered gradients"):
        model = _model(context.config, kind)
        for seed in range(grid.train_seeds):
            gradient_filter = GradientFilter(model.width, rank, context.generator("filter", rank, seed)).to(context.device)
            network = before(coded(context, model, model.width, seed), "code", "filter", gradient_filter)
            outcome = context.train(network, f"{kind}, gradient filtered to {rank}, seed {seed}", seed)
            for quantity, value in outcome.metrics().items():
                yield {"quantity": quantity, "value": value, "part": "filter", "when": "trained", **_columns(context, model, rank, seed)}


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    every_layer = _rank_excess(rows)
    cells = {
        "filtered_rank": every_layer,
        "rank_before_code": every_layer[every_layer["layer"] == BELOW],
        "rank_below": every_layer,
        "rank_reached": _rank_reached(rows),
        "filtered_energy": _energy_lost(rows),
        "energy_orthogonal": _energy_against(rows, "orthogonal", lambda share: share),
        "energy_gaussian": _energy_against(rows, "gaussian", lambda share: 1.0),
        "wide_code": _accuracy_lost(rows, "code"),
        "filter_alone": _accuracy_lost(rows, "filter"),
        "filter_explains": _filter_share(rows),
    }
    return judge_forms("information_bottleneck", criteria, cells)


def _rank_excess(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest rank of the error signals minus r, at every layer below a code narrower than the net."""
    ranks = pick(rows, "signal_rank").query("code < width")
    keys = ["when", "init", "activation", "code", "layer"]
    excess = (ranks["value"] - ranks["code"]).groupby([ranks[key] for key in keys])
    return pd.DataFrame([cell(greatest(values), **dict(zip(keys, at, strict=True))) for at, values in excess])


def _rank_reached(rows: pd.DataFrame) -> pd.DataFrame:
    """How far the rank before an untrained code is from its live units, at most C − 1 in a linear net."""
    keys = ["init", "activation", "code"]
    ranks = pick(rows, "signal_rank", when="untrained", layer=BELOW).set_index([*keys, "net_seed"])
    live = pick(rows, "live_units", when="untrained").set_index([*keys, "net_seed"])["value"]
    linear = ranks.index.get_level_values("activation") == "linear"
    reachable = live.loc[ranks.index].clip(upper=(ranks["classes"] - 1).where(linear, ranks["width"]))
    gaps = (ranks["value"] - reachable).abs().groupby(keys)
    return pd.DataFrame([cell(greatest(values), **dict(zip(keys, at, strict=True))) for at, values in gaps])


def _energy(rows: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """The energy kept of each kind of net: a row a seed, a column a code width."""
    keys = ["when", "init", "activation"]
    for at, kept in pick(rows, "energy_kept").groupby(keys):
        yield dict(zip(keys, at, strict=True)), kept.pivot(index="net_seed", columns="code", values="value").dropna()


def _energy_lost(rows: pd.DataFrame) -> pd.DataFrame:
    """The energy kept by a code minus that kept by one as wide as the net, relative to the latter's mean; paired by seed."""
    cells = []
    for at, kept in _energy(rows):
        widest = kept[kept.columns.max()]
        for code in kept.columns[:-1]:
            cells.append(cell(paired_difference(kept[code] / widest.mean(), widest / widest.mean()), **at, code=code))
    return pd.DataFrame(cells)


def _energy_against(rows: pd.DataFrame, init: str, predicted: Callable[[float], float]) -> pd.DataFrame:
    """The energy kept by an untrained code over that kept by one as wide as the net, over its prediction from r/d."""
    cells = []
    for at, kept in _energy(rows):
        if (at["when"], at["init"]) == ("untrained", init):
            widest = kept.columns.max()
            for code in kept.columns[:-1]:
                ratio = kept[code] / kept[widest].mean() / predicted(code / widest)
                cells.append(cell(t_interval(ratio), **at, code=code))
    return pd.DataFrame(cells)


def _accuracy(rows: pd.DataFrame, part: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Test accuracies of each activation: a row a seed, a column a width."""
    for activation, nets in pick(rows, "test_accuracy", part=part).groupby("activation"):
        yield str(activation), nets.pivot(index="net_seed", columns="code", values="value")


def _accuracy_lost(rows: pd.DataFrame, part: str) -> pd.DataFrame:
    """The accuracy of the widest code, or filter, minus that of a narrower one, paired by seed."""
    classes = int(rows["classes"].max())
    cells = []
    for activation, accuracy in _accuracy(rows, part):
        widest = accuracy.columns.max()
        for code in accuracy.columns[:-1]:
            cells.append(cell(paired_difference(accuracy[widest], accuracy[code]), activation=activation, code=code, cap=classes - 1))
    return pd.DataFrame(cells)


def _filter_share(rows: pd.DataFrame) -> pd.DataFrame:
    """The accuracy that filtering the gradient alone costs minus half of what the code costs, paired by seed, for codes below C − 1."""
    filtered, classes = dict(_accuracy(rows, "filter")), int(rows["classes"].max())
    cells = []
    for activation, accuracy in _accuracy(rows, "code"):
        widest = accuracy.columns.max()
        for code in accuracy.columns[accuracy.columns < classes - 1]:
            lost, by_filter = (table[widest] - table[code] for table in (accuracy, filtered[activation]))
            cells.append(cell(paired_difference(by_filter, lost / 2), activation=activation, code=code))
    return pd.DataFrame(cells)
