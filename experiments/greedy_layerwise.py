"""Step 7, layer-wise training: what local losses lift, and what they cost, against backpropagation at equal parameters.

Blocks of k layers, each trained by a loss of its own on features whose past is cut off: a linear head, similarity matching and predsim
(Nøkland & Eidnes 2019), all blocks at once or one after the other, and heads with hidden layers (Belilovsky et al. 2019). Whether ∇θ_l
depends on any later layer; whether the gradient reaches the first layer, before and after the training; the accuracy where backpropagation
works and where it is locked, each loss at a learning rate of its own; the multiply-adds that each takes. Backpropagation is the rule whose
one block is the whole chain.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Literal, get_args

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
from src.rows import Row, measured, pick
from src.statistics import Estimate, greatest, t_interval
from src.training.local import Blockwise, LocalLoss, OneBlock, all_blocks, blockwise, end_to_end_block, gradients, later_influence, shares
from src.training.loop import Objective, planned_steps
from src.verdict import Verdict, cell, cells_by, judge_forms

Loss = LocalLoss | Literal["backprop"]
Schedule = Literal["simultaneous", "sequential"]
LOCAL: tuple[LocalLoss, ...] = get_args(LocalLoss)

QUANTITIES = {
    "later_influence": "‖∇θ_l − ∇θ_l'‖/‖∇θ_l‖ when every stage after a border is drawn anew, the largest over the stages l before it",
    "log_gradient": "ln ‖∇θ_l‖ of the sum of all blocks' losses, nats",
    "flow": "½ ln mean ‖g‖² behind the first stage minus before the last, by backpropagation through the chain, nats",
    "separation": "½ ln of the share of Σ‖h‖² of the last hidden layer that differs between images, nats: 0 or less",
    "parameters": "parameters of the chain",
    "auxiliary_parameters": "parameters of the heads, which are thrown away after training",
    "learning_rate": "that the loss was found to train best at, on a network of which nothing else is measured",
    "multiply_adds": "multiply-adds of the matrix products and convolutions of the whole training",
    "train_accuracy": "share of training images told right",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
# Published test errors in percent. Nøkland & Eidnes 2019: an MLP with three hidden layers, of 1024 units on MNIST and of 3000 on CIFAR-10
# (2.9 and 27.3 million parameters); Belilovsky et al. 2019: a CNN with k = 1, 2, 3, accuracies 88.3/90.4/91.7%.
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
    require(
        len(grid.published_widths) in (0, 3), "grid.published_widths: three, of the MLP on MNIST, the MLP on CIFAR-10 and the CNN, or none"
    )
    steps = planned_steps(config.training, len(data.train))
    require(steps >= max(grid.train_depths), f"training.max_steps: at least {max(grid.train_depths)}, a step a block")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config = context.config
    grid, steps = config.grid, context.steps()
    look = partial(_flows, context)
    works = [Work(model, 2) for model in _models(config, "critical")]
    for _, model in _settings(config):
        works.append(Work(model, len(_losses(model)) * len(grid.rates), steps))
        works.append(Work(model, len(_rules(config, model)) * grid.train_seeds, steps, look))
    return [*works, *(Work(run.model, grid.train_seeds, context.steps(_long(config))) for run in _published(context))]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    parts = (_independence, _trainings, _published_trainings)
    return pd.DataFrame([row for part in parts for row in part(context)])


def _models(config: Config, chain: str) -> list[ModelConfig]:
    weight_var, bias_var = CHAINS[chain]
    return [replace(config.model, weight_var=weight_var, bias_var=bias_var, depth=depth) for depth in config.grid.train_depths]


def _settings(config: Config) -> list[tuple[str, ModelConfig]]:
    return [(chain, model) for chain in CHAINS for model in _models(config, chain)]


def _rules(config: Config, model: ModelConfig) -> list[Rule]:
    """Backpropagation; each local loss at each block size, all blocks at once and one after the other; pred with deeper heads."""
    settings = product(LOCAL, config.grid.block_sizes, get_args(Schedule))
    return [
        Rule("backprop", model.depth),
        *(Rule(loss, size, schedule=schedule) for loss, size, schedule in settings),
        *(Rule("pred", 1, hidden) for hidden in config.grid.auxiliary_layers),
    ]


def _losses(model: ModelConfig) -> list[Rule]:
    """The rules by which the learning rate of each loss is chosen: single layers, all at once."""
    return [Rule("backprop", model.depth), *(Rule(loss, 1) for loss in LOCAL)]


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
            yield from measured(where, **_costs(context, here, rule))
            for border in range(1, model.depth) if rule.schedule == "simultaneous" else ():
                at = {"border": border, "at_border": border in here.borders, **where}
                yield from measured(at, later_influence=later_influence(here, there, border, inputs.double(), labels))


def _trainings(context: Context) -> Iterator[Row]:
    """Every rule from the same weights and over the same images, with what passes backwards and forwards before and after."""
    config = context.config
    for chain, model in context.progress(_settings(config), "trainings"):
        tried = list(_tried(context, chain, model))
        yield from tried
        rates = {rule.loss: _best_rate(tried, rule.loss) for rule in _losses(model)}
        for rule, seed in product(_rules(config, model), range(config.grid.train_seeds)):
            network, training = context.network(model, seed), replace(config.training, lr=rates[rule.loss])
            blocks = _applied(context, rule, network, model, seed)
            where = {"part": "training", "chain": chain, **network_columns(model, seed), **asdict(rule)}
            before, after = ({"moment": moment, **where} for moment in ("before", "after"))
            if rule.loss == "backprop":
                yield from measured(before, **_flows(context, network))
            yield from _gradients(context, blocks, rule, before)
            outcome = _train(context, blocks, rule, training, f"{chain}, depth {model.depth}, {_named(rule)}", seed)
            yield from measured(where, learning_rate=training.lr, **outcome)
            if not outcome["diverged"]:
                yield from measured(after, **_flows(context, network))
                yield from _gradients(context, blocks, rule, after)


def _tried(context: Context, chain: str, model: ModelConfig) -> Iterator[Row]:
    """The accuracy on training images of every loss at every learning rate, on a network of which nothing else is measured."""
    grid, training = context.config.grid, context.config.training
    seed = grid.train_seeds
    for rule, rate in product(_losses(model), grid.rates):
        lr = rate * training.lr
        blocks = _applied(context, rule, context.network(model, seed), model, seed)
        outcome = _train(
            context, blocks, rule, replace(training, lr=lr), f"{chain}, depth {model.depth}, {_named(rule)}, rate {lr:g}", seed
        )
        where = {"part": "rates", "chain": chain, "rate": lr, **network_columns(model, seed), **asdict(rule)}
        yield from measured(where, train_accuracy=outcome["train_accuracy"])


def _best_rate(tried: Sequence[Row], loss: Loss) -> float:
    """The rate of the highest accuracy, the first of those that tie."""
    rate: float = max((row for row in tried if row["loss"] == loss), key=lambda row: float(row["value"]))["rate"]
    return rate


def _flows(context: Context, network: nn.Sequential) -> dict[str, float]:
    """What passes backwards by backpropagation, and what of the images forwards."""
    inputs, _ = context.samples(context.data.test, context.config.grid.samples)
    signals = context.error_signals(network)
    states = cut(network, None, torch.float64, "eval").states(inputs.double())
    return {"flow": signals[1] - signals[len(network) - 1], "separation": separation(states[-2])}


def _gradients(context: Context, blocks: Blockwise, rule: Rule, where: Row) -> Iterator[Row]:
    """The gradient of every layer by a rule; one block after the other has those of all at once."""
    inputs, labels = context.samples(context.data.test, context.config.grid.samples)
    for layer, gradient in enumerate(gradients(blocks, inputs, labels) if rule.schedule == "simultaneous" else (), start=1):
        # a trained tanh may be flat in float32
        norm = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
        yield from measured({"layer": layer, **where}, log_gradient=math.log(norm))


def separation(states: Tensor) -> float:
    """½ ln Σ_n‖h_n − h̄‖² / Σ_n‖h_n‖², nats: what of the states of a batch tells its images apart."""
    return float(((states - states.mean(0)).norm() / states.norm()).log())


def _train(context: Context, model: Blockwise, rule: Rule, training: TrainingConfig, name: str, seed: int) -> dict[str, float]:
    """Train by a rule, turn by turn; the metrics after the last."""
    for turn, (objective, steps) in enumerate(_turns(context, model, rule, training), start=1):
        config = replace(training, max_steps=steps)
        outcome = context.train(model, f"{name}, seed {seed}, turn {turn}", seed, objective, config=config)
    return outcome.metrics()


def _costs(context: Context, model: Blockwise, rule: Rule) -> dict[str, float]:
    """What a training by a rule takes: the same for every chain of that depth and every seed."""
    turns = _turns(context, model, rule, context.config.training)
    return {
        "multiply_adds": sum(steps * _multiply_adds(context, model, objective) for objective, steps in turns),
        "parameters": _size(model.blocks),
        "auxiliary_parameters": _size(model.heads),
    }


def _size(modules: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in modules.parameters()))


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
    """The trainings whose error was published for this data set: 3 dense hidden layers, and a VGG-like net of 8 weight layers."""
    data, widths = context.data.name, context.config.grid.published_widths
    if not widths or data not in NOKLAND:
        return []
    *dense_widths, channels = widths
    base = replace(context.config.model, activation="relu", weight_var=2.0, bias_var=0.0, norm="batch")
    dense = replace(base, depth=4, width=dict(zip(NOKLAND, dense_widths, strict=True))[data])
    conv = replace(base, family="vgg", depth=8, width=channels)
    return [
        *(Published(dense, Rule(loss, 4 if loss == "backprop" else 1), error) for loss, error in NOKLAND[data].items()),
        *(Published(conv, Rule("pred", 1, k - 1, "sequential"), error) for k, error in BELILOVSKY.get(data, {}).items()),
    ]


def _published_trainings(context: Context) -> Iterator[Row]:
    """Long trainings beside their published errors; none unless `grid.published_widths` asks for them."""
    for run, seed in context.progress(list(product(_published(context), range(context.config.grid.train_seeds))), "published trainings"):
        blocks = _applied(context, run.rule, context.network(run.model, seed), run.model, seed)
        where = {"part": "published", "published": run.error, **network_columns(run.model, seed), **asdict(run.rule)}
        name = f"published, {run.model.family}, {_named(run.rule)}"
        yield from measured(where, **_train(context, blocks, run.rule, _long(context.config), name, seed))


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    nets = _with_locks(pick(rows, "test_accuracy", part="training"), rows)
    backprop, local = nets.query("loss == 'backprop'"), nets.query("loss != 'backprop'")
    linear = local.query("hidden == 0")
    layerwise = linear.query("block == 1")
    against_backprop = _gaps(local, backprop)
    single = against_backprop.query("block == 1 and hidden == 0 and schedule == 'simultaneous'")
    larger = _gaps(linear.query("block > 1"), layerwise, ["loss", "schedule"])
    deeper = _gaps(local.query("hidden > 0"), layerwise, ["loss", "schedule"])
    cells = {
        "no_backprop_through": _influence(rows, ["loss", "hidden", "block"]),
        "no_gradient_across_borders": _influence(rows, ["loss", "hidden", "block", "at_border"]),
        "equal_parameters": _parameters(rows),
        "gradient_reaches_first": _first_gradient(rows, "before"),
        "gradient_still_reaches_first": _first_gradient(rows, "after").query("loss != 'backprop'"),
        "lock_lasts": _lasting(rows),
        "avoids_locking": against_backprop,
        **{f"avoids_locking_{loss}": single.query("loss == @loss") for loss in LOCAL},
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


def _influence(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The greatest influence of later layers of any network and border."""
    return cells_by(pick(rows, "later_influence"), keys, greatest)


def _parameters(rows: pd.DataFrame) -> pd.DataFrame:
    """Parameters of the chain that a rule leaves, over those that backpropagation leaves."""
    counts = pick(rows, "parameters")
    backprop = counts[counts["loss"] == "backprop"].set_index("depth")["value"]
    return cells_by(counts.assign(value=counts["value"] / counts["depth"].map(backprop)), ["depth", *RULE], greatest)


def _first_gradient(rows: pd.DataFrame, moment: str) -> pd.DataFrame:
    """The first layer's gradient, ln ‖∇θ_1‖ minus the largest ln ‖∇θ_l‖ of the same network, over seeds."""
    keys = [*SETTING, "loss", "block", "hidden"]
    gradients = pick(rows, "log_gradient", moment=moment).pivot(index=[*keys, "net_seed"], columns="layer", values="value")
    return cells_by((gradients[1] - gradients.max(axis=1)).rename("value").reset_index(), keys, t_interval)


def _lasting(rows: pd.DataFrame) -> pd.DataFrame:
    """What passes backwards after backpropagation, over seeds, and whether the setting was locked before."""
    flows = pick(rows, "flow", loss="backprop", moment="after")
    return cells_by(_with_locks(flows, rows), [*SETTING, "locked", "collapsed"], t_interval)


def _with_locks(nets: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Beside each net whether its setting lets less than a thousandth pass back or forwards, before backpropagation."""
    for column, quantity in (("locked", "flow"), ("collapsed", "separation")):
        means = pick(rows, quantity, loss="backprop", moment="before").groupby(SETTING)["value"].mean()
        nets = nets.join((means < THOUSANDTH).rename(column), on=SETTING)
    return nets


def _paired(nets: pd.DataFrame, others: pd.DataFrame, shared: Sequence[str] = ()) -> pd.DataFrame:
    """Accuracy of each net minus that of the other of its setting, its seed and its `shared` columns."""
    keys = [*SETTING, "net_seed", *shared]
    pairs = nets.merge(others[[*keys, "value"]], on=keys, suffixes=("", "_other"), validate="many_to_one")
    return pairs.assign(value=pairs["value"] - pairs["value_other"])


def _gaps(nets: pd.DataFrame, others: pd.DataFrame, shared: Sequence[str] = ()) -> pd.DataFrame:
    """Accuracy of every rule minus the others', paired by seed; beside it the others' accuracy."""
    pairs = _paired(nets, others, shared)
    pairs["against"] = pairs.groupby([*SETTING, *RULE])["value_other"].transform("mean")
    return cells_by(pairs, [*SETTING, "locked", "collapsed", *RULE, "against"], t_interval)


def _largest_deficit(nets: pd.DataFrame, backprop: pd.DataFrame) -> pd.DataFrame:
    """The largest mean of backpropagation minus a rule over m rules and settings, in a simultaneous interval (Bonferroni, 1 − 5%/m)."""
    tried = [-gaps["value"] for _, gaps in _paired(nets, backprop).groupby([*SETTING, *RULE])]
    bounds = [t_interval(deficits, 1 - 0.05 / len(tried)) for deficits in tried]
    if not bounds:
        return pd.DataFrame()
    value, lo, hi = (max(getattr(bound, limit) for bound in bounds) for limit in ("value", "lo", "hi"))
    return pd.DataFrame([cell(Estimate(value, lo, hi, bounds[0].n, "Bonferroni"), rules_and_settings=len(tried))])


def _published_cells(rows: pd.DataFrame, family: str) -> pd.DataFrame:
    """Test error over the published one, over seeds; beside it both, in percent."""
    nets = pick(rows, "test_accuracy", part="published", family=family)
    if nets.empty:
        return nets
    errors = nets.assign(error=100 * (1 - nets["value"]))
    errors["measured"] = errors.groupby(RULE)["error"].transform("mean")
    return cells_by(errors.assign(value=errors["error"] / errors["published"]), [*RULE, "published", "measured"], t_interval)
