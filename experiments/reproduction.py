"""The trained results of the literature, each paper a file under conf/experiment/reproduction/: its nets, reports, recipe and criteria.

Every net of a paper is trained as its file says, several seeds of it side by side. At scale=paper, on all images of the data set that the
paper reports on, its test error stands beside the published one; what a paper says of the order of its nets, or of where training
reaches, is tried at every scale.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import nn

from experiments.deep_supervision import supervise
from experiments.greedy_rules import Rule, applied, turn_count, turns
from experiments.sigmoid_top_layer import courses_of
from experiments.vanishing_products import depth_scales, trainable_depth_cells
from src.config import Config, Criterion, ModelConfig, ReportedNet, TrainingConfig, changed, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.models.exits import MultiExit
from src.models.start import standard_start
from src.plan import Work
from src.rows import Row, measured, pick
from src.run import own_file
from src.saturation import activity
from src.statistics import Estimate, paired, t_interval
from src.training.local import Blockwise
from src.training.loop import Objective, Outcome, end_to_end
from src.training.objectives import DeepSupervision
from src.trainings import Trainee, train_all
from src.verdict import INTERVAL, Verdict, cell, cells_by, judge_forms

QUANTITIES = {
    "test_error": "share of test images told wrong, %; of the part course after a number of steps, of the part net at the end",
    "train_error": "share of training images told wrong at the end, %",
    "diverged": "1 where the training diverged, else 0",
    "top_activation": "98th percentile of the activations of the last hidden layer over the samples, by whose statistics it is normalised, "
    "after a number of steps",
}
NAME = "reproduction"
LOOKS = 40  # times that the last hidden layer is looked at in a training, evenly in the logarithm of the steps
PERCENTILE = 98.0
NET = ["net", "depth", "weight_var"]


@dataclass(frozen=True)
class Setting:
    """A net as it is trained here."""

    net: ReportedNet
    model: ModelConfig
    training: TrainingConfig

    @property
    def rule(self) -> Rule:
        """How its layers are trained by losses of their own."""
        return Rule(self.net.loss, 1, self.net.auxiliary, "sequential" if self.net.sequential else "simultaneous")

    @property
    def turns(self) -> int:
        """How many times all steps of a training are done."""
        return 1 if self.net.loss == "backprop" else turn_count(self.rule, self.model.depth)


def settings(config: Config, data: str) -> list[Setting]:
    """The nets that the paper reports on for a data set; for another, one of each name; at every depth and σw² that the grid has.

    Raises: UserError naming a net whose changes of model or training are wrong.
    """
    grid = config.grid
    own = [net for net in grid.nets if net.data == data] or [*{net.name: net for net in reversed(grid.nets)}.values()][::-1]
    found = []
    for net in own:
        if grid.trained and net.name not in grid.trained:
            continue
        training = changed(config.training, net.training, f"grid.nets: {net.name}: training")
        axes: Sequence[tuple[str, Sequence[float]]] = (("depth", grid.depths or ()), ("weight_var", grid.weight_vars or ()))
        for at in product(*([(key, value) for value in values] for key, values in axes if values)):
            found.append(Setting(net, changed(config.model, {**net.model, **dict(at)}, f"grid.nets: {net.name}: model"), training))
    return found


@cache
def _own_grid(paper: str) -> Any:
    return OmegaConf.load(own_file(NAME, paper)).grid


def orders_of(paper: str) -> dict[str, list[list[str]]]:
    """Which nets a paper reports to be better than which, by criterion; they stand in its file before anything is run."""
    return {name: [list(pair) for pair in pairs] for name, pairs in _own_grid(paper).get("orders", {}).items()}


def reports_of(paper: str) -> list[tuple[str, str, float | None, float | None]]:
    """The nets that a paper reports on by name and data set, and the test error, or what it exceeds, in percent."""
    return [(net.name, net.data, net.get("published"), net.get("published_above")) for net in _own_grid(paper).nets]


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    names = {net.name for net in grid.nets}
    require(set(grid.trained) <= names, f"grid.trained: among {', '.join(sorted(names))}")
    require((grid.orders or {}) == orders_of(grid.paper), "grid.orders: stand in the paper's file and are not for the command line")
    require({name for pairs in orders_of(grid.paper).values() for pair in pairs for name in pair} <= names, "grid.orders: of grid.nets")
    require(grid.samples <= len(data.test), f"grid.samples: at most {len(data.test)}, the test images")
    for setting in settings(config, data.name):
        size = setting.training.batch_size
        require(size <= len(data.train), f"grid.nets: {setting.net.name}: batch_size: {size} exceeds the {len(data.train)} training images")
    asked = [(net.name, net.data, net.published, net.published_above) for net in grid.nets]
    require(asked == reports_of(grid.paper), "grid.nets: names and reported errors stand in the paper's file")


def plan(context: Context) -> list[Work]:
    """What is trained."""
    return [
        Work(setting.model, context.config.grid.seeds, setting.turns * context.steps(setting.training))
        for setting in settings(context.config, context.data.name)
    ]


def measure(context: Context) -> pd.DataFrame:
    """Train every net; one row a measurement."""
    return context.rows(*(partial(_trained, setting=setting) for setting in settings(context.config, context.data.name)))


def _trained(context: Context, setting: Setting) -> Iterator[Row]:
    """All seeds of a net: how each came out, and its course."""
    net, model, seeds = setting.net, setting.model, range(context.config.grid.seeds)
    steps = context.steps(setting.training)
    nets = [_whole(context, setting, seed) for seed in seeds]
    look = _Look(context.samples(context.data.test, context.config.grid.samples)[0], steps)
    courses = [{0: look.at(whole)} for whole in nets]
    outcomes: list[Outcome] = []
    for turn, objective in enumerate(_objectives(setting, nets[0], steps)):
        name = f"{net.name}, depth {model.depth}, σw² {model.weight_var:g}, turn {turn + 1}"
        trainees = [
            Trainee(whole, f"{name}, seed {seed}", seed, objective, partial(look, whole), setting.training)
            for seed, whole in zip(seeds, nets, strict=True)
        ]
        outcomes = train_all(context, trainees)
        for course, outcome in zip(courses, outcomes, strict=True):
            course |= {turn * steps + step: seen for step, seen in outcome.seen.items()}
    where = {
        "paper": context.config.grid.paper,
        "net": net.name,
        "loss": net.loss,
        "batch": setting.training.batch_size,
        "steps": setting.turns * steps,
        "chance": 100 * (1 - 1 / context.data.classes),
        **_reported(context, net),
    }
    for seed, course, outcome in zip(seeds, courses, outcomes, strict=True):
        yield from _told({**where, **network_columns(model, seed)}, outcome, course, before=(setting.turns - 1) * steps)


def _told(where: Row, outcome: Outcome, course: Mapping[int, float], before: int) -> Iterator[Row]:
    """The rows of one training, whose last turn began after so many steps."""
    metrics = outcome.metrics()
    told_wrong = {f"{split}_error": 100 * (1 - metrics[f"{split}_accuracy"]) for split in ("test", "train")}
    yield from measured({"part": "net", **where}, **told_wrong, diverged=metrics["diverged"])
    for point in outcome.history.itertuples():
        yield from measured({"part": "course", "step": before + point.step, **where}, test_error=100 * (1 - point.test_accuracy))
    for step, seen in course.items():
        yield from measured({"part": "course", "step": step, **where}, top_activation=seen)


def _reported(context: Context, net: ReportedNet) -> dict[str, float | None]:
    """What the net's test error may be held to: nothing unless it is trained as the paper's file says, on all images of its data set."""
    config, data = context.config, context.data
    whole = config.scale.name == "paper" and config.data.train_size is None and config.data.test_size is None
    comparable = whole and data.name == net.data
    bounds = {"published": net.published, "published_above": net.published_above}
    return {name: value if comparable and value is not None else np.nan for name, value in bounds.items()}


def _whole(context: Context, setting: Setting, seed: int) -> nn.Module:
    """What is trained: the network, with its exits, or with the losses of its layers."""
    net, model = setting.net, setting.model
    network = context.network(model, seed)
    if net.start == "uniform":
        standard_start(network, context.generator("uniform", seed))
    if net.exit_weight is not None:
        return supervise(context, network, model, 1, seed)
    return network if net.loss == "backprop" else applied(context, setting.rule, network, model, seed)


def _objectives(setting: Setting, whole: nn.Module, steps: int) -> Sequence[Objective]:
    """What is minimised, turn by turn."""
    if isinstance(whole, MultiExit):
        return [DeepSupervision.alike(whole, setting.net.exit_weight or 0.0, fading=steps)]
    return turns(setting.rule, len(whole.blocks)) if isinstance(whole, Blockwise) else [end_to_end]


def _chain(whole: nn.Module) -> list[nn.Module]:
    """The stages of what is trained."""
    if isinstance(whole, Blockwise):
        return whole.stages
    return [*(whole.chain if isinstance(whole, MultiExit) else whole).children()]


class _Look:
    """Looks at the last hidden layer after some of the steps.

    Args:
        images: that its activations are taken on.
        steps: of a training.
    """

    def __init__(self, images: torch.Tensor, steps: int) -> None:
        self.images = images
        self.due = set(np.geomspace(1, steps, LOOKS).astype(int).tolist())

    def __call__(self, whole: nn.Module, step: int) -> float | None:
        return self.at(whole) if step in self.due else None

    def at(self, whole: nn.Module) -> float:
        """Its activations' percentile, on a copy that normalises by these images: early in a training running statistics are none."""
        hidden = copy.deepcopy(nn.Sequential(*_chain(whole)[:-1])).train()
        (found,) = activity(nn.Sequential(hidden), self.images, (PERCENTILE,))
        return found[f"p{PERCENTILE:g}"]


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the paper against its criterion."""
    pairs = orders_of(rows["paper"].iloc[0])
    cells = {
        name: _order_cells(rows, pairs[name]) if name in pairs else CELLS[name](rows, criterion)
        for name, criterion in criteria.items()
        if name in pairs or name in CELLS
    }
    return judge_forms(NAME, criteria, cells)


def errors(rows: pd.DataFrame, quantity: str = "test_error") -> pd.DataFrame:
    """A kind of error of every net at the end, a line a seed."""
    return pick(rows, quantity, part="net")


def _order_cells(rows: pd.DataFrame, pairs: Sequence[Sequence[str]]) -> pd.DataFrame:
    """The test error of the worse net minus that of the better, percentage points, paired by seed; for pairs whose nets are trained.

    Beside it `told`, the greater mean share of test images told right of the two: where both guess, their order says nothing.
    """
    nets = errors(rows)
    of_net = dict(iter(nets.groupby("net")))
    found = [pd.DataFrame(columns=[*nets.columns, "better", "worse", "told"])]
    for better, worse in pairs:
        if better in of_net and worse in of_net:
            told = 1 - min(of_net[name]["value"].mean() for name in (better, worse)) / 100
            pair = paired(of_net[worse], of_net[better], ["net_seed"])
            found.append(pair.assign(better=better, worse=worse, told=told))
    return cells_by(pd.concat(found[1:] or found), ["better", "worse", "told"], t_interval)


def _published_cells(rows: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Test errors in units of the published ones, over seeds, beside both in percent."""
    nets = errors(rows).dropna(subset="published")
    ratios = nets.assign(value=nets["value"] / nets["published"])
    return cells_by(ratios, ["net", "published"], t_interval).assign(measured=lambda cells: cells["estimate"] * cells["published"])


def _failure_cells(rows: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Test errors minus the bound that they are reported to exceed, percentage points, over seeds."""
    nets = errors(rows).dropna(subset="published_above")
    bounds = nets["published_above"]
    excess = nets.assign(value=nets["value"] - bounds, published=[f"> {bound:g}" for bound in bounds])
    return cells_by(excess, ["net", "published"], t_interval)


def learnt(rows: pd.DataFrame) -> pd.DataFrame:
    """What every net has learnt of its training images: 0 by chance, 1 where it is the best of all settings, mean over seeds."""
    nets = errors(rows, "train_error")
    gained = nets.assign(value=nets["chance"] - nets["value"])
    return gained.assign(value=gained["value"] / gained.groupby(NET)["value"].mean().max())


def _edge(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as vanishing_products has those of its short trainings."""
    nets = errors(rows, "train_error")
    return nets.assign(part="edge", quantity="train_accuracy", value=1 - nets["value"] / 100)


def _trainable_depth(rows: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """The depth that training reaches in units of ξ, where gradients vanish."""
    return trainable_depth_cells(_edge(rows), criterion)


def reaches(rows: pd.DataFrame) -> pd.DataFrame:
    """What every net has learnt beside `reach`, its depth over 6ξ: where gradients vanish, and a net near χ = 1 learns at that depth."""
    scales, nets = depth_scales(_edge(rows)), learnt(rows)
    control = scales["weight_var"][np.log(scales["chi"]).abs().idxmin()]
    means = nets[nets["weight_var"] == control].groupby("depth")["value"].mean()
    vanishing = scales[scales["chi"] < 1].set_index("weight_var")["scale"]
    found = nets[nets["depth"].isin(means.index[means >= 0.5]) & nets["weight_var"].isin(vanishing.index)]
    return found.assign(reach=found["depth"] / (6 * found["weight_var"].map(vanishing)))


def _reach_cells(rows: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    return cells_by(reaches(rows), ["weight_var", "depth", "reach"], t_interval)


def _deepest_cells(rows: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """The training error of every net at its greatest depth minus that at its least, percentage points, paired by seed."""
    nets = errors(rows, "train_error")
    by_net = nets.groupby("net")["depth"]
    deepest, shallowest = (nets[nets["depth"] == by_net.transform(which)] for which in ("max", "min"))
    return cells_by(paired(deepest, shallowest, ["net", "net_seed"]), ["net", "depth"], t_interval)


def _limit_cells(rows: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Between the last depth that learns half of what the best net does and the first that doesn't, in units of the published limit."""
    limit = criterion.given["published"]
    cells = []
    for (net, steps), nets in learnt(rows).groupby(["net", "steps"]):
        learns = nets.groupby("depth")["value"].mean() >= 0.5
        reached = learns.cummin()
        lo, hi = max(reached.index[reached], default=0), min(learns.index[~reached], default=np.inf)
        middle = np.sqrt(lo * hi) if np.isfinite(hi) else float(lo)
        bracket = Estimate(middle / limit, lo / limit, hi / limit, nets["net_seed"].nunique(), "between two depths")
        cells.append(cell(bracket, net=net, steps=steps, published=limit))
    return pd.DataFrame(cells, columns=["net", "steps", "published", *INTERVAL])


def _course_cells(rows: pd.DataFrame, criterion: Criterion, quantity: str) -> pd.DataFrame:
    """The course of the last hidden layer, the mean over trainings; of those alone that fall below `lowest` where the criterion has it."""
    courses = courses_of(pick(rows, "top_activation", part="course"))
    low = courses[courses["lowest"] < criterion.given.get("lowest", np.inf)]
    return cells_by(low.assign(value=low[quantity]), ["hidden_layers", "steps"], t_interval)


# the forms of a paper by their criteria's names; the others are its orders
CELLS: Mapping[str, Callable[[pd.DataFrame, Criterion], pd.DataFrame]] = {
    "published": _published_cells,
    "published_failure": _failure_cells,
    "trainable_depth": _trainable_depth,
    "learns_within_reach": _reach_cells,
    "deepest_is_worse": _deepest_cells,
    "depth_limit": _limit_cells,
    "top_layer_saturates": partial(_course_cells, quantity="lowest_early"),
    "top_layer_escapes": partial(_course_cells, quantity="rise"),
    "five_never_escape": partial(_course_cells, quantity="rise"),
}
