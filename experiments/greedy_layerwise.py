"""Step 7, layer-wise training: what local losses lift, and what they cost, against backpropagation at equal parameters.

Blocks of k layers, each trained by a loss of its own on features whose past is cut off: a linear head, similarity matching and predsim
(Nøkland & Eidnes 2019), all blocks at once or one after the other, and heads with hidden layers (Belilovsky et al. 2019). Whether ∇θ_l
depends on any later layer; whether the gradient reaches the first layer; the accuracy where backpropagation works and where it is locked;
the multiply-adds that each takes. Backpropagation is the rule whose one block is the whole chain.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from src.chain import cut
from src.config import Config, Criterion, ModelConfig, TrainingConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.models.layers import Layers
from src.plan import Work
from src.rows import pick
from src.statistics import Estimate, greatest, paired_difference, t_interval
from src.training.local import Blockwise, LocalLoss, OneBlock, all_blocks, blockwise, end_to_end_block, gradients, later_influence, shares
from src.training.loop import Objective, planned_steps
from src.verdict import Verdict, cell, judge_forms

Row = dict[str, Any]
Loss = LocalLoss | Literal["backprop"]
Schedule = Literal["simultaneous", "sequential"]
log = logging.getLogger(__name__)

QUANTITIES = {
    "later_influence": "‖∇θ_l − ∇θ_l'‖/‖∇θ_l‖ when every stage after a border is drawn anew, the largest over the stages l before it",
    "log_gradient": "ln ‖∇θ_l‖ of the sum of all blocks' losses at initialisation, nats",
    "flow": "½ ln mean ‖g‖² behind the first stage minus before the last, under backpropagation at initialisation, nats",
    "separation": "½ ln of the share of Σ‖h‖² of the last hidden layer that differs between images, at initialisation, nats: 0 or less",
    "parameters": "parameters of the chain",
    "auxiliary_parameters": "parameters of the heads, which are thrown away after training",
    "multiply_adds": "multiply-adds of the matrix products and convolutions of the whole training",
    "train_accuracy": "share of training images told right",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
# Test errors in percent: Nøkland & Eidnes 2019, MLP 3×1024; accuracies 88.3/90.4/91.7 of Belilovsky et al. 2019, k = 1, 2, 3.
NOKLAND: dict[str, dict[Loss, float]] = {
    "mnist": {"backprop": 0.75, "pred": 0.68, "sim": 0.80, "predsim": 0.62},
    "cifar10": {"backprop": 33.56, "pred": 32.33, "sim": 33.48, "predsim": 30.93},
}
BELILOVSKY = {"cifar10": {1: 11.7, 2: 9.6, 3: 8.3}}
# tanh chains by (σw², σb²). χ = 1: neither gradients nor differences between images vanish. χ < 1 without biases: both shrink, but so do
# the states, whose directions still tell the images apart. χ < 1 with biases: all images end up in one state besides.
CHAINS = {"critical": (1.0, 0.0), "vanishing": (0.2, 0.0), "collapsing": (0.2, 0.2)}
SETTING = ["chain", "depth"]
RULE = ["loss", "block", "hidden", "schedule"]
THOUSANDTH = -math.log(1000)


@dataclass(frozen=True)
class Rule:
    """How a chain is trained: columns of every row.

    Args:
        loss: of each block; backprop: one block of all stages, and no other head.
        block: stages between two borders that no gradient crosses.
        hidden: layers of a head before its linear classifier; k = 1 + hidden is that of Belilovsky et al. (2019) at block 1.
        schedule: all blocks in every step, or one after the other, each its share of the steps.
    """

    loss: Loss
    block: int
    hidden: int = 0
    schedule: Schedule = "simultaneous"


@dataclass(frozen=True)
class Published:
    """A training whose test error was published, in percent."""

    model: ModelConfig
    rule: Rule
    error: float


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    # deeper, the first gradient of a locked chain leaves float32
    require(min(grid.train_depths) >= 3 and max(grid.train_depths) <= 32, "grid.train_depths: 3 to 32 weight layers")
    require(1 in grid.block_sizes, "grid.block_sizes: 1 among them, the layer-wise training that the claim speaks of")
    require(max(grid.block_sizes) < min(grid.train_depths), "grid.block_sizes: less than the smallest of grid.train_depths")
    require(grid.samples <= len(data.test), f"grid.samples: at most {len(data.test)}, the test images")
    steps = planned_steps(config.training, len(data.train))
    require(steps >= max(grid.train_depths), f"training.max_steps: at least {max(grid.train_depths)}, a step a block")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config = context.config
    return [
        *(Work(model, 2) for model in _models(config, "critical")),
        *(
            Work(model, config.grid.train_seeds, context.steps())
            for chain in CHAINS
            for model in _models(config, chain)
            for _ in _rules(config, model)
        ),
        *(Work(run.model, config.grid.train_seeds, context.steps(_long(config))) for run in _published(context)),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    parts = (_independence, _trainings, _published_trainings)
    return pd.DataFrame([row for part in parts for row in part(context)])


def _models(config: Config, chain: str) -> list[ModelConfig]:
    weight_var, bias_var = CHAINS[chain]
    return [replace(config.model, weight_var=weight_var, bias_var=bias_var, depth=depth) for depth in config.grid.train_depths]


def _rules(config: Config, model: ModelConfig) -> list[Rule]:
    """Backpropagation; each local loss at each block size, all blocks at once; pred one block after the other, and with deeper heads."""
    sizes, losses = config.grid.block_sizes, get_args(LocalLoss)
    return [
        Rule("backprop", model.depth),
        *(Rule(loss, size) for loss, size in product(losses, sizes)),
        *(Rule("pred", size, schedule="sequential") for size in sizes),
        *(Rule("pred", 1, hidden) for hidden in config.grid.auxiliary_layers),
    ]


def _applied(context: Context, rule: Rule, network: nn.Sequential, model: ModelConfig, seed: int) -> Blockwise:
    """The network cut as a rule asks; the heads draw numbers of their own."""
    if rule.loss == "backprop":
        return end_to_end_block(network)
    layers = Layers(model, context.generator("heads", seed))
    return blockwise(network, rule.block, rule.loss, layers, context.data.classes, rule.hidden)


def _independence(context: Context) -> Iterator[Row]:
    """Draw every stage after a border anew, and see whether the gradient before it moves; in float64. What a training takes beside it."""
    inputs, labels = context.samples(context.data.test, context.config.grid.samples)
    for model in context.progress(_models(context.config, "critical"), "later layers drawn anew"):
        networks = [context.network(model, seed).double() for seed in range(2)]
        for rule in _rules(context.config, model):
            here, there = (_applied(context, rule, network, model, seed) for seed, network in enumerate(networks))
            where = {"part": "independence", **network_columns(model, 0), **asdict(rule)}
            yield from _costs(context, here, rule, where)
            # one block after the other has the gradients of all at once
            for border in range(1, model.depth) if rule.schedule == "simultaneous" else ():
                value = later_influence(here, there, border, inputs.double(), labels)
                yield {"quantity": "later_influence", "value": value, "border": border, "at_border": border in here.borders, **where}


def _trainings(context: Context) -> Iterator[Row]:
    """Every rule from the same weights and over the same images, with its gradient at initialisation."""
    for chain in context.progress(list(CHAINS), "trainings"):
        for model in _models(context.config, chain):
            for rule, seed in product(_rules(context.config, model), range(context.config.grid.train_seeds)):
                network = context.network(model, seed)
                where = {"part": "training", "chain": chain, **network_columns(model, seed), **asdict(rule)}
                blocks = _applied(context, rule, network, model, seed)
                yield from _initial(context, network, blocks, rule, where)
                yield from _trained(context, blocks, rule, context.config.training, where)


def _initial(context: Context, network: nn.Sequential, blocks: Blockwise, rule: Rule, where: Row) -> Iterator[Row]:
    """Before training: what passes backwards and forwards, and the gradient by a rule."""
    inputs, labels = context.samples(context.data.test, context.config.grid.samples)
    if rule.loss == "backprop":
        signals = context.error_signals(network)
        yield {"quantity": "flow", "value": signals[1] - signals[len(network) - 1], **where}
        states = cut(network, None, torch.float64, "eval").states(inputs.double())
        yield {"quantity": "separation", "value": separation(states[-2]), **where}
    if rule.schedule == "simultaneous":
        for layer, gradient in enumerate(gradients(blocks, inputs, labels), start=1):
            yield {"quantity": "log_gradient", "value": math.log(gradient.norm()), "layer": layer, **where}


def separation(states: Tensor) -> float:
    """½ ln Σ_n‖h_n − h̄‖² / Σ_n‖h_n‖², nats: what of the states of a batch tells its images apart."""
    return math.log((states - states.mean(0)).norm() / states.norm())


def _trained(context: Context, model: Blockwise, rule: Rule, training: TrainingConfig, where: Row) -> Iterator[Row]:
    """Train by a rule, and say how long it took."""
    started, name = time.monotonic(), f"{where.get('chain', 'published')}, depth {where['depth']}, {_named(rule)}, seed {where['net_seed']}"
    for turn, (objective, steps) in enumerate(_turns(context, model, rule, training), start=1):
        outcome = context.train(model, f"{name}, turn {turn}", where["net_seed"], objective, config=replace(training, max_steps=steps))
    # wall time is logged only: the same seed must give the same rows
    log.info("%s: %.2f s", name, time.monotonic() - started)
    for quantity, value in outcome.metrics().items():
        yield {"quantity": quantity, "value": value, **where}


def _costs(context: Context, model: Blockwise, rule: Rule, where: Row) -> Iterator[Row]:
    """What a training by a rule takes: the same for every chain of that depth and every seed."""
    turns = _turns(context, model, rule, context.config.training)
    multiply_adds = sum(steps * _multiply_adds(context, model, objective) for objective, steps in turns)
    yield {"quantity": "multiply_adds", "value": multiply_adds, **where}
    for quantity, modules in (("parameters", model.blocks), ("auxiliary_parameters", model.heads)):
        yield {"quantity": quantity, "value": float(sum(p.numel() for p in modules.parameters())), **where}


def _named(rule: Rule) -> str:
    return " ".join(str(value) for value in asdict(rule).values())


def _turns(context: Context, model: Blockwise, rule: Rule, training: TrainingConfig) -> list[tuple[Objective, int]]:
    """What is minimised, and for how many steps: as many in all by every rule."""
    steps = context.steps(training)
    if rule.schedule == "simultaneous":
        return [(all_blocks, steps)]
    return [(OneBlock(index), share) for index, share in enumerate(shares(steps, len(model.blocks)))]


def _multiply_adds(context: Context, model: Blockwise, objective: Objective) -> float:
    """Of one step, forwards and backwards."""
    split, size = context.data.train, context.config.training.batch_size
    with FlopCounterMode(display=False) as counter:
        objective(model, context.data.standardise(split.images[:size]).double(), split.labels[:size]).backward()
    return counter.get_total_flops() / 2


def _long(config: Config) -> TrainingConfig:
    """The published trainings': Adam from 5e-4 (Nøkland & Eidnes 2019), though with a cosine and without their augmentation and dropout."""
    return replace(config.training, optimizer="adam", lr=5e-4, epochs=config.grid.published_epochs, max_steps=None)


def _published(context: Context) -> list[Published]:
    """The trainings whose error was published for this data set: 3 dense hidden layers, and VGG-like of an eighth of the width."""
    runs: list[Published] = []
    data = context.data.name
    for width in context.config.grid.published_widths:
        base = replace(context.config.model, activation="relu", weight_var=2.0, bias_var=0.0, norm="batch")
        dense = replace(base, depth=4, width=width)
        conv = replace(base, family="vgg", depth=8, width=max(1, width // 8))
        runs += [Published(dense, Rule(loss, 4 if loss == "backprop" else 1), error) for loss, error in NOKLAND.get(data, {}).items()]
        runs += [Published(conv, Rule("pred", 1, k - 1, "sequential"), error) for k, error in BELILOVSKY.get(data, {}).items()]
    return runs


def _published_trainings(context: Context) -> Iterator[Row]:
    """Long trainings beside their published errors; none unless `grid.published_widths` asks for them."""
    for run in context.progress(_published(context), "published trainings"):
        for seed in range(context.config.grid.train_seeds):
            network = context.network(run.model, seed)
            where = {"part": "published", "published": run.error, **network_columns(run.model, seed), **asdict(run.rule)}
            yield from _trained(context, _applied(context, run.rule, network, run.model, seed), run.rule, _long(context.config), where)


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    nets = _accuracies(rows)
    backprop, local = nets.query("loss == 'backprop'"), nets.query("loss != 'backprop'")
    linear = local.query("hidden == 0")
    layerwise = linear.query("block == 1")
    against_backprop = _gaps(local, backprop, [])
    single = against_backprop.query("block == 1 and hidden == 0 and schedule == 'simultaneous'")
    larger = _gaps(linear.query("block > 1"), layerwise, ["loss", "schedule"])
    deeper = _gaps(local.query("hidden > 0"), layerwise, ["loss", "schedule"])
    cells = {
        "no_backprop_through": _influence(rows, ["loss", "hidden", "block"]),
        "no_gradient_across_borders": _influence(rows, ["loss", "hidden", "block", "at_border"]),
        "gradient_reaches_first": _first_gradient(rows),
        "avoids_locking": against_backprop,
        **{f"avoids_locking_{loss}": single.query("loss == @loss") for loss in get_args(LocalLoss)},
        "avoids_backward_only": against_backprop,
        "suboptimal": _largest_deficit(layerwise.query("schedule == 'sequential' and not locked"), backprop),
        "suboptimal_at_equal_updates": _largest_deficit(layerwise.query("schedule == 'simultaneous' and not locked"), backprop),
        "costs_little_unlocked": against_backprop.query("schedule == 'simultaneous' and not locked"),
        "larger_blocks": larger.query("not locked"),
        "deeper_heads": deeper.query("not locked"),
        "published_mlp": _published_cells(rows, "mlp"),
        "published_greedy_cnn": _published_cells(rows, "vgg"),
    }
    return judge_forms("greedy_layerwise", criteria, cells)


def _by(rows: pd.DataFrame, keys: list[str], estimate: Callable[[pd.DataFrame], Estimate]) -> pd.DataFrame:
    """A cell a group of rows."""
    return pd.DataFrame([cell(estimate(group), **dict(zip(keys, at, strict=True))) for at, group in rows.groupby(keys)])


def _influence(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The greatest influence of later layers of any network and border."""
    return _by(pick(rows, "later_influence"), keys, lambda group: greatest(group["value"]))


def _first_gradient(rows: pd.DataFrame) -> pd.DataFrame:
    """The first layer's gradient, ln ‖∇θ_1‖ minus the largest ln ‖∇θ_l‖ of the same network, over seeds."""
    keys = [*SETTING, "loss", "block", "hidden"]
    gradients = pick(rows, "log_gradient").pivot(index=[*keys, "net_seed"], columns="layer", values="value")
    shares = (gradients[1] - gradients.max(axis=1)).rename("value").reset_index()
    return _by(shares, keys, lambda nets: t_interval(nets["value"]))


def _accuracies(rows: pd.DataFrame) -> pd.DataFrame:
    """Test accuracies of the compared trainings, and whether their setting lets less than a thousandth pass back or forwards."""
    nets = pick(rows, "test_accuracy", part="training")[[*SETTING, *RULE, "net_seed", "value"]]
    for column, quantity in (("locked", "flow"), ("collapsed", "separation")):
        means = pick(rows, quantity).groupby(SETTING)["value"].mean()
        nets = nets.join((means < THOUSANDTH).rename(column), on=SETTING)
    return nets


def _paired(nets: pd.DataFrame, others: pd.DataFrame, shared: list[str]) -> pd.DataFrame:
    """Each net beside the other of its setting, its seed and its `shared` columns."""
    keys = [*SETTING, "net_seed", *shared]
    return nets.merge(others[[*keys, "value"]], on=keys, suffixes=("", "_other"), validate="many_to_one")


def _gaps(nets: pd.DataFrame, others: pd.DataFrame, shared: list[str]) -> pd.DataFrame:
    """Accuracy of every rule minus the others', paired by seed; beside it the others' accuracy."""
    pairs = _paired(nets, others, shared)
    pairs["against"] = pairs.groupby([*SETTING, *RULE])["value_other"].transform("mean")
    keys = [*SETTING, "locked", "collapsed", *RULE, "against"]
    return _by(pairs, keys, lambda pair: paired_difference(pair["value"], pair["value_other"]))


def _largest_deficit(nets: pd.DataFrame, backprop: pd.DataFrame) -> pd.DataFrame:
    """The largest mean of backpropagation minus a rule over m rules and settings, in a simultaneous interval (Bonferroni, 1 − 5%/m)."""
    tried = [pair for _, pair in _paired(nets, backprop, []).groupby([*SETTING, *RULE])]
    bounds = [paired_difference(pair["value_other"], pair["value"], 1 - 0.05 / len(tried)) for pair in tried]
    if not bounds:
        return pd.DataFrame()
    value, lo, hi = (max(getattr(bound, limit) for bound in bounds) for limit in ("value", "lo", "hi"))
    return pd.DataFrame([cell(Estimate(value, lo, hi, bounds[0].n, "Bonferroni"), rules_and_settings=len(tried))])


def _published_cells(rows: pd.DataFrame, family: str) -> pd.DataFrame:
    """Test error over the published one, over seeds."""
    nets = pick(rows, "test_accuracy", part="published", family=family)
    if nets.empty:
        return nets
    ratios = nets.assign(value=100 * (1 - nets["value"]) / nets["published"])
    return _by(ratios, [*RULE, "published"], lambda group: t_interval(group["value"]))
