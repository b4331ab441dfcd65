"""Step 7, layer-wise training: what local losses lift, and what they cost, against backpropagation at equal parameters.

Blocks of k layers, each trained by a loss of its own on features whose past is cut off: a linear head, similarity matching and predsim
(Nøkland & Eidnes 2019), all blocks at once or one after the other, and heads with hidden layers (Belilovsky et al. 2019). Whether ∇θ_l
depends on any later layer; whether the gradient reaches the first layer, before and after the training; the accuracy where backpropagation
works and where it is locked, every rule at a learning rate of its own, and what a linear probe tells from every hidden layer beside it;
the multiply-adds that each takes. Backpropagation is the rule whose one block is the whole chain.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.greedy_rules import (
    LOCAL,
    RULE,
    Rate,
    Rule,
    all_at_once,
    applied,
    best,
    costs,
    paces,
    rates,
    told,
    train_by,
    trained,
    turn_count,
)
from src.chain import cut
from src.config import Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.models.start import latch
from src.plan import Work
from src.probe import probe_accuracy
from src.rows import Row, measured, pick
from src.statistics import Estimate, greatest, paired, t_interval
from src.training.local import Blockwise, gradients, later_influence
from src.training.loop import planned_steps
from src.trainings import Trainee
from src.verdict import Verdict, cell, cells_by, judge_forms

log = logging.getLogger(__name__)

QUANTITIES = {
    "later_influence": "‖∇θ_l − ∇θ_l'‖/‖∇θ_l‖ when every stage after a border is drawn anew, the largest over the stages l before it",
    "log_gradient": "ln ‖∇θ_l‖ of the sum of all blocks' losses, nats",
    "flow": "½ ln mean ‖g‖² behind the first stage minus before the last, by backpropagation through the chain, nats",
    "scale": "ln of the root mean square of the last hidden layer's states, nats",
    "separation": "½ ln of the share of Σ‖h‖² of the last hidden layer that differs between images, nats: 0 or less",
    "probe_accuracy": "share of test images that ridge regression on a hidden layer, fitted to the training images, tells right",
    "parameters": "parameters of the chain",
    "auxiliary_parameters": "parameters of the heads, which are thrown away after training",
    "multiply_adds": "multiply-adds of the matrix products and convolutions of the whole training",
    "learning_rate": "at which a rule tells most training images right, of those tried, on a network of which nothing else is measured",
    "adam": "1 where that is Adam's, 0 where it is SGD's",
    "at_edge": "1 where it is the least or the greatest that its optimiser is tried at, else 0",
    "at_chance": "1 where even at it less than twice as many training images are told right as by guessing, else 0",
    "train_accuracy": "share of training images told right",
    "test_accuracy": "share of test images told right",
    "diverged": "1 where the training diverged, else 0",
}
# tanh chains by (σw², σb²). critical, χ = 1: neither gradients nor differences between images vanish. vanishing, χ < 1 without biases: both
# shrink, and the states with them. collapsing, χ < 1 with biases: states keep their size, and all images end up in one. latched: behind the
# first layer each is h ↦ tanh(6h), so that states run to ±1 and stay apart, and no gradient goes through.
CHAINS = {"critical": (1.0, 0.0), "vanishing": (0.15, 0.0), "collapsing": (0.2, 0.2), "latched": (1.0, 0.0)}
LATCH = 6.0
SETTING = ["chain", "depth"]
LABELS = ["locked", "locked_forwards"]
THOUSANDTH = -math.log(1000)
FAINTEST = math.log(torch.finfo(torch.float64).tiny) / 2  # ln of the faintest error signal that counts


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    # deeper, the first gradient of a locked chain leaves float32
    require(min(grid.train_depths) >= 3 and max(grid.train_depths) <= 32, "grid.train_depths: 3 to 32 weight layers")
    require(1 in grid.block_sizes, "grid.block_sizes: 1 among them, the layer-wise training that the claim speaks of")
    require(max(grid.block_sizes) < min(grid.train_depths), "grid.block_sizes: less than the smallest of grid.train_depths")
    require(set(grid.similarity_blocks) <= set(grid.block_sizes), "grid.similarity_blocks: of grid.block_sizes")
    require(grid.samples <= len(data.test), f"grid.samples: at most {len(data.test)}, the test images")
    require(planned_steps(config.training, len(data.train)) >= 2, "training.max_steps: at least 2")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config = context.config
    seeds, steps = config.grid.train_seeds, context.steps()
    look = partial(probes, context)
    works = [Work(model, 2) for model in _models(config, "critical")]
    for chain, model in _settings(config):
        for rule in _rules(config, chain, model.depth):
            asked = turn_count(rule, model.depth) * steps
            works += [Work(model, len(rates(config)), asked), Work(model, seeds, asked, look)]
    return works


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_independence, _trainings)


def _models(config: Config, chain: str) -> list[ModelConfig]:
    """The critical chain at every depth; the others, which only depth locks, at the greatest."""
    weight_var, bias_var = CHAINS[chain]
    depths = config.grid.train_depths if chain == "critical" else [max(config.grid.train_depths)]
    return [replace(config.model, weight_var=weight_var, bias_var=bias_var, depth=depth) for depth in depths]


def _settings(config: Config) -> list[tuple[str, ModelConfig]]:
    return [(chain, model) for chain in CHAINS for model in _models(config, chain)]


def _rules(config: Config, chain: str, depth: int) -> list[Rule]:
    return trained(config, depth, locked=chain != "critical")


def _network(context: Context, chain: str, model: ModelConfig, seed: int) -> nn.Sequential:
    network = context.network(model, seed)
    if chain == "latched":
        latch(network, LATCH)
    return network


def _independence(context: Context) -> Iterator[Row]:
    """Draw every stage after a border anew, and see whether the gradient before it moves; in float64. What a training takes beside it."""
    inputs, labels = context.samples(context.data.test, context.config.grid.samples)
    for model in context.progress(_models(context.config, "critical"), "later layers drawn anew"):
        networks = [context.network(model, seed).double() for seed in range(2)]
        for rule in dict.fromkeys([*all_at_once(context.config, model.depth), *_rules(context.config, "critical", model.depth)]):
            here, there = (applied(context, rule, network, model, seed) for seed, network in enumerate(networks))
            where = {"part": "independence", **network_columns(model, 0), **asdict(rule)}
            yield from measured(where, **costs(context, here, rule))
            for border in range(1, model.depth) if rule.schedule == "simultaneous" else ():
                at = {"border": border, "at_border": border in here.borders, **where}
                yield from measured(at, later_influence=later_influence(here, there, border, inputs.double(), labels))


def _trainings(context: Context) -> Iterator[Row]:
    """Every rule from the same weights and over the same images, with what passes backwards and forwards before and after."""
    config, seconds = context.config, defaultdict[tuple[int, Rule], list[float]](list)
    for chain, model in context.progress(_settings(config), "trainings"):
        for rule in _rules(config, chain, model.depth):
            at = {"chain": chain, **asdict(rule)}
            tried = _tried(context, chain, model, rule)
            where = {"part": "rates", **at, **network_columns(model, config.grid.train_seeds)}
            for rate, accuracy in tried.items():
                yield from measured({"optimizer": rate.optimizer, "rate": rate.lr, **where}, train_accuracy=accuracy)
            yield from measured(where, **told(tried, context.data.classes))
            training = best(tried).of(config.training)
            networks = [_network(context, chain, model, seed) for seed in range(config.grid.train_seeds)]
            trainees = []
            for seed, network in enumerate(networks):
                blocks = applied(context, rule, network, model, seed)
                before = {"part": "training", "moment": "before", **at, **network_columns(model, seed)}
                if rule.loss == "backprop":
                    yield from _looks(context, network, before)
                yield from _gradients(context, blocks, rule, before)
                trainees.append(Trainee(blocks, f"{chain}, depth {model.depth}", seed, config=training))
            for network, trainee, outcome in zip(networks, trainees, train_by(context, rule, trainees), strict=True):
                seconds[model.depth, rule].append(outcome.seconds)
                where = {"part": "training", **at, **network_columns(model, trainee.seed)}
                yield from measured(where, **outcome.metrics)
                if not outcome.metrics["diverged"]:
                    after = {"moment": "after", **where}
                    yield from _looks(context, network, after)
                    yield from _gradients(context, trainee.network, rule, after)
    # no row holds a time: the same seed must give the same rows
    for line in paces(seconds):
        log.info(line)


def _tried(context: Context, chain: str, model: ModelConfig, rule: Rule) -> dict[Rate, float]:
    """The accuracy on training images that a rule reaches at every learning rate, on a network of which nothing else is measured."""
    seed, tried = context.config.grid.train_seeds, rates(context.config)
    trainees = []
    for rate in tried:
        blocks = applied(context, rule, _network(context, chain, model, seed), model, seed)
        name = f"{chain}, depth {model.depth}, {rate.optimizer} at {rate.lr:g}"
        trainees.append(Trainee(blocks, name, seed, config=rate.of(context.config.training)))
    outcomes = zip(tried, train_by(context, rule, trainees), strict=True)
    return {rate: outcome.metrics["train_accuracy"] for rate, outcome in outcomes}


def _looks(context: Context, network: nn.Sequential, where: Row) -> Iterator[Row]:
    """What passes through a chain either way, in float64, and what a linear probe tells from each of its hidden layers."""
    inputs, _ = context.samples(context.data.test, context.config.grid.samples)
    signals, (*_, states, _) = context.error_signals(network), cut(network, None, torch.float64, "eval").states(inputs.double())
    first, last = (max(signals[stage], FAINTEST) for stage in (1, len(network) - 1))
    yield from measured(where, flow=first - last, scale=scale(states), separation=separation(states))
    for layer, accuracy in enumerate(probes(context, network), start=1):
        yield from measured({"layer": layer, **where}, probe_accuracy=accuracy)


@torch.no_grad()
def probes(context: Context, network: nn.Sequential) -> list[float]:
    """The accuracy of a linear probe of each hidden layer, fitted to all training images."""
    data, accuracies = context.data, []
    train_states, test_states = (data.standardise(split.images) for split in (data.train, data.test))
    for stage in network[:-1]:
        train_states, test_states = stage(train_states), stage(test_states)
        accuracies.append(probe_accuracy(train_states.double(), data.train.labels, test_states.double(), data.test.labels, data.classes))
    return accuracies


def _gradients(context: Context, blocks: Blockwise, rule: Rule, where: Row) -> Iterator[Row]:
    """The gradient of every layer by a rule; one block after the other has those of all at once."""
    inputs, labels = context.samples(context.data.test, context.config.grid.samples)
    for layer, gradient in enumerate(gradients(blocks, inputs, labels) if rule.schedule == "simultaneous" else (), start=1):
        # a trained tanh may be flat in float32
        norm = gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)
        yield from measured({"layer": layer, **where}, log_gradient=math.log(norm))


def scale(states: Tensor) -> float:
    """½ ln of the mean square of the states of a batch, nats."""
    return float(states.square().mean().log()) / 2


def separation(states: Tensor) -> float:
    """½ ln Σ_n‖h_n − h̄‖² / Σ_n‖h_n‖², nats: what of the states of a batch tells its images apart."""
    return float(((states - states.mean(0)).norm() / states.norm()).log())


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    nets = _with_labels(pick(rows, "test_accuracy", part="training"), rows)
    probed = _with_labels(_last_probes(rows), rows)
    backprop, local = nets.query("loss == 'backprop'"), nets.query("loss != 'backprop'")
    linear = local.query("hidden == 0")
    layerwise = linear.query("block == 1")
    against_backprop = _gaps(local, backprop)
    single = against_backprop.query("block == 1 and hidden == 0 and schedule == 'simultaneous'")
    learnt = probed.query("moment == 'after' and loss != 'backprop'")
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
        "layers_learn": _gaps(learnt, probed.query("moment == 'after' and loss == 'backprop'")),
        "better_than_untrained": _gaps(learnt, probed.query("moment == 'before'")),
        "readout_tells": _gaps(local, learnt, RULE),
        "suboptimal": _largest_deficit(layerwise.query("schedule == 'sequential' and not locked"), backprop),
        "suboptimal_simultaneous": _largest_deficit(layerwise.query("schedule == 'simultaneous' and not locked"), backprop),
        "costs_little_unlocked": against_backprop,
        "larger_blocks": _gaps(linear.query("block > 1"), layerwise, ["loss", "schedule"]),
        "deeper_heads": _gaps(local.query("hidden > 0"), layerwise, ["loss", "schedule"]),
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
    return cells_by(_with_labels(flows, rows), [*SETTING, *LABELS, "tuned"], t_interval)


def _last_probes(rows: pd.DataFrame) -> pd.DataFrame:
    """The probes of the last hidden layers."""
    probes = pick(rows, "probe_accuracy")
    return probes[probes["layer"] == probes["depth"] - 1]


def chosen_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """The learning rate by setting and rule; `tuned`: chance where it tells nothing, edge where one beyond may be better, else inner."""
    told = rows[(rows["part"] == "rates") & (rows["quantity"] != "train_accuracy")]
    found = told.pivot(index=[*SETTING, *RULE], columns="quantity", values="value")
    return found.assign(tuned=np.select([found["at_chance"] == 1, found["at_edge"] == 1], ["chance", "edge"], "inner"))


def _with_labels(nets: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Beside each net how its rate is to be trusted, and the labels of its setting.

    locked: less than a thousandth of ‖g‖ comes back; locked_forwards: images differ by less than a thousandth.
    """
    quantities = ("flow", "scale", "separation")
    means = {name: pick(rows, name, loss="backprop", moment="before").groupby(SETTING)["value"].mean() for name in quantities}
    labels = {"locked": means["flow"] < THOUSANDTH, "locked_forwards": means["scale"] + means["separation"] < THOUSANDTH}
    return nets.join(pd.DataFrame(labels), on=SETTING).join(chosen_rates(rows)["tuned"], on=[*SETTING, *RULE])


def _gaps(nets: pd.DataFrame, others: pd.DataFrame, shared: Sequence[str] = ()) -> pd.DataFrame:
    """The value of every rule minus the others' of the setting and seed; beside it the others', and how far both rates are trusted."""
    on = [*SETTING, "net_seed", *shared]
    trust = others.drop_duplicates(on).set_index(on)["tuned"].rename("tuned_other")
    pairs = paired(nets, others, on).join(trust, on=on)
    pairs["other"] = pairs.groupby([*SETTING, *RULE])["value_other"].transform("mean")
    return cells_by(pairs, [*SETTING, *LABELS, *RULE, "other", "tuned", "tuned_other"], t_interval)


def _largest_deficit(nets: pd.DataFrame, backprop: pd.DataFrame) -> pd.DataFrame:
    """The largest mean of backpropagation minus a rule over m rules and settings, in a simultaneous interval (Bonferroni, 1 − 5%/m)."""
    groups = paired(nets, backprop, [*SETTING, "net_seed"]).groupby([*SETTING, *RULE, "tuned"])
    bounds = {at: t_interval(-gaps["value"], 1 - 0.05 / len(groups)) for at, gaps in groups}
    if not bounds:
        return pd.DataFrame()
    at = max(bounds, key=lambda at: bounds[at].value)
    value, lo, hi = (max(getattr(bound, limit) for bound in bounds.values()) for limit in ("value", "lo", "hi"))
    largest = dict(zip([*SETTING, *RULE, "tuned"], at, strict=True))
    return pd.DataFrame(
        [cell(Estimate(value, lo, hi, bounds[at].n, "Bonferroni", bounds[at].freedom), rules_and_settings=len(bounds), **largest)]
    )
