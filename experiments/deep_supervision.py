"""Step 8, auxiliary losses: what ℒ = ℒ_L + Σ_l α_l ℒ_l sends to the first layer, and what it does for the chain's own output.

Exits at every k-th stage of random tanh MLPs (Lee et al. 2015): the part of ∇θ_1 that comes straight from the first exit against the
rest, its size against mean-field theory (Schoenholz et al. 2017) and its angle, at initialisation and along training; two opposite
heads that cancel exactly; a chain severed above its first exit; accuracy of the chain and of each exit where plain backpropagation
trains and where it is locked, α, k and a fading α varied.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from src import mean_field
from src.config import Activation, Config, Criterion, ModelConfig, require
from src.data.load import Data
from src.experiment import Context, network_columns
from src.models.exits import MultiExit
from src.plan import Work
from src.rows import Row, measured, pick
from src.statistics import least, paired, slope, t_interval
from src.training.loop import Outcome, evaluate
from src.training.objectives import DeepSupervision, split_gradients
from src.trainings import Trainee, train_all
from src.verdict import Verdict, cells_by, judge_forms

QUANTITIES = {
    "direct": "ln α‖∇θ_1 ℒ_l‖ of the first exit l, nats",
    "rest": "ln ‖∇θ_1(ℒ − α ℒ_l)‖ of all other losses, nats",
    "final": "ln ‖∇θ_1 ℒ_L‖ of the chain's own loss, nats",
    "total": "ln ‖∇θ_1 ℒ‖ of the whole objective, nats",
    "cosine": "cosine between the first exit's part of ∇θ_1 and the rest",
    "early_accuracy": "share of test images told right by the chain after a quarter of the steps",
    "train_accuracy": "share of training images told right by the chain",
    "test_accuracy": "share of test images told right by the chain",
    "exit_accuracy": "share of test images told right by the exit at a layer, or by the chain at its last",
    "diverged": "1 where the training diverged, else 0",
}
CHAIN = ["weight_var", "depth"]
GRADIENT = ["part", "heads", *CHAIN, "alpha", "every", "when"]
THEORY = ["activation", "weight_var", "bias_var"]
SETTING = ["alpha", "every", "schedule", "boost", "adam"]


@dataclass(frozen=True)
class Supervision:
    """Exits at every `every`-th stage, all with the weight α (constant, or fading linearly to 0).

    SGD has `boost` times the configured learning rate, unless Adam trains at the rate `adam`.
    """

    alpha: float
    every: int
    schedule: Literal["none", "constant", "fading"]
    boost: float = 1.0
    adam: float = 0.0


PLAIN = Supervision(0.0, 0, "none")
# nats that ‖g‖² loses: beyond, L > 6ξ, plain training is also tried with the learning rate of all losses together, and by Adam
CONTROLLED, ADAM_RATES = 6.0, (1e-3, 1e-2)
# how convolutional nets are trained: without exits, and with a single exit half-way as Inception-v3 has it
CONVOLUTIONAL = (PLAIN, Supervision(0.3, 4, "constant"))
INCEPTION_EARLY_GAIN = 0.0  # "did not result in improved convergence early in the training" (Szegedy et al. 2016, section 4)


def check(config: Config, data: Data) -> None:
    """Refuse a grid that this experiment can't measure.

    Raises: UserError naming the key.
    """
    grid = config.grid
    require(min(grid.depths) >= 3 and len(set(grid.depths)) >= 2, "grid.depths: at least two, each of at least 3 weight layers")
    require(min(grid.train_depths) >= 3, "grid.train_depths: each of at least 3 weight layers, a stage between the first exit and the last")
    require(min(grid.exit_weights) > 0 and max(grid.exit_weights) <= 1, "grid.exit_weights: above 0, at most 1; 0 is always measured too")
    require(1 in grid.exit_spacings, "grid.exit_spacings: 1 among them, an exit at every stage")
    require(max(grid.exit_spacings) < max(grid.train_depths), "grid.exit_spacings: each below the largest of grid.train_depths")
    require(min(grid.weight_vars + grid.train_weight_vars) > 0, "grid.weight_vars, grid.train_weight_vars: σw² above 0")
    require(grid.samples <= len(data.train), f"grid.samples: at most {len(data.train)}, the training images")


def plan(context: Context) -> list[Work]:
    """What is measured and trained."""
    config, grid, steps = context.config, context.config.grid, context.steps()

    def measuring(network: nn.Sequential) -> None:
        list(_of_every_setting(context, network, config.model, 0, {}))

    return [
        *(Work(model, grid.seeds, measuring=measuring) for model in _chains(config, grid.weight_vars, grid.depths)),
        Work(_severed(config), grid.seeds),
        Work(_two_stages(config), 2 * grid.train_seeds, steps),
        *(Work(model, len(settings) * grid.train_seeds, steps) for model, settings in _trained(context).items()),
    ]


def measure(context: Context) -> pd.DataFrame:
    """Measure every part of the claim; one row a measurement."""
    return context.rows(_gradients, _severed_chains, _opposed_heads, _trainings)


def _chains(config: Config, weight_vars: list[float], depths: list[int]) -> list[ModelConfig]:
    return [replace(config.model, weight_var=weight_var, depth=depth) for weight_var in weight_vars for depth in depths]


def supervise(context: Context, network: nn.Sequential, model: ModelConfig, every: int, seed: int) -> MultiExit:
    """Put exits at stages k, 2k, … before the last, k = `every`; none where k = 0."""
    names = [name for name, _ in network.named_children()][:-1]
    return context.with_exits(network, model, names[every - 1 :: every] if every else [], seed)


def gradient_rows(context: Context, network: MultiExit, weights: Sequence[float], where: Row) -> Iterator[Row]:
    """Yield the norms of the parts of ∇θ_1, and the cosine between the first exit's and the rest, for every α."""
    images, labels = context.samples(context.data.train, context.config.grid.samples)
    for alpha, gradients in zip(weights, split_gradients(network, images, labels, weights), strict=True):
        norms = {quantity: gradient.norm() for quantity, gradient in gradients.items()}
        at = {**where, "alpha": alpha}
        yield from measured(at, **{quantity: float(norm.log()) for quantity, norm in norms.items()})
        if norms["direct"] > 0 and norms["rest"] > 0:
            yield from measured(at, cosine=float(gradients["direct"] @ gradients["rest"] / (norms["direct"] * norms["rest"])))


def _gradients(context: Context) -> Iterator[Row]:
    """∇θ_1 of random chains, for every weight and spacing of the exits."""
    grid = context.config.grid
    for model in context.progress(_chains(context.config, grid.weight_vars, grid.depths), "gradients"):
        for seed in range(grid.seeds):
            where = {"part": "gradient", "heads": "random", "when": "initial", **network_columns(model, seed)}
            yield from _of_every_setting(context, context.network(model, seed), model, seed, where)


def _of_every_setting(context: Context, network: nn.Sequential, model: ModelConfig, seed: int, where: Row) -> Iterator[Row]:
    grid = context.config.grid
    for every in [every for every in grid.exit_spacings if every < len(network)]:
        supervised = supervise(context, network, model, every, seed)
        yield from gradient_rows(context, supervised, grid.exit_weights, {**where, "every": every})


def _severed(config: Config) -> ModelConfig:
    return replace(config.model, weight_var=max(config.grid.weight_vars), depth=max(config.grid.depths))


def _severed_chains(context: Context) -> Iterator[Row]:
    """∇θ_1 where the second stage passes no gradient at all, with auxiliary losses and without."""
    grid, model = context.config.grid, _severed(context.config)
    for seed in range(grid.seeds):
        network = context.network(model, seed)
        weight, _ = network[1].parameters()
        nn.init.zeros_(weight)
        where = {"part": "severed", "every": 1, **network_columns(model, seed)}
        yield from gradient_rows(context, supervise(context, network, model, 1, seed), (0.0, *grid.exit_weights), where)


def _two_stages(config: Config) -> ModelConfig:
    return replace(config.model, weight_var=max(config.grid.weight_vars), bias_var=0.0, depth=2)


@torch.no_grad()
def oppose(network: MultiExit) -> None:
    """Make the exit the readout's opposite, and the first stage's θ_1 = 0.

    Then H_1 = 0 and both heads say the same p, so that g_1 = Wᵀ(p−y) + (−W)ᵀ(p−y) = 0 for every image and label. Neither head's weights
    get a gradient either, and both biases get the same: so it remains throughout training, whatever the optimiser.
    """
    for parameter in network.chain[0].parameters():
        parameter.zero_()
    (weight, bias), (exit_weight, exit_bias) = network.chain[1].parameters(), network.exits.parameters()
    exit_weight.copy_(-weight)
    exit_bias.copy_(bias)


def _opposed_heads(context: Context) -> Iterator[Row]:
    """The counterexample: two opposite heads on one layer, trained with the auxiliary loss and without."""
    model = _two_stages(context.config)
    for setting in (PLAIN, Supervision(1.0, 1, "constant")):
        trainees, wheres = [], []
        for seed in range(context.config.grid.train_seeds):
            network = supervise(context, context.network(model, seed), model, 1, seed)
            oppose(network)
            name = f"opposite heads, α {setting.alpha:g}, seed {seed}"
            trainees.append(Trainee(network, name, seed, DeepSupervision.alike(network, setting.alpha)))
            wheres.append({"part": "training", "heads": "opposed", **asdict(setting), **network_columns(model, seed)})
            yield from _along_training(context, network, setting, wheres[-1], "initial")
        for where, trainee, outcome in zip(wheres, trainees, train_all(context, trainees), strict=True):
            yield from measured(where, **outcome.metrics())
            yield from _along_training(context, trainee.network, setting, where, "trained")


def _trained(context: Context) -> dict[ModelConfig, list[Supervision]]:
    """The chains and their settings; convolutional nets on CIFAR-10 where the grid asks for them."""
    config, grid = context.config, context.config.grid
    usual = replace(config.model, family="vgg", depth=8, activation="relu", weight_var=2.0, bias_var=0.0, norm="batch")
    widths = grid.conv_widths if context.data.name == "cifar10" else []
    chains = {model: [*_settings(config, model)] for model in _chains(config, grid.train_weight_vars, grid.train_depths)}
    return chains | {replace(usual, width=width): [*CONVOLUTIONAL] for width in widths}


def _settings(config: Config, model: ModelConfig) -> Iterator[Supervision]:
    """No exit; α at k = 1; k at the largest α, constant and fading; where it is locked, no exit with larger steps and by Adam."""
    grid, depth, largest = config.grid, model.depth, max(config.grid.exit_weights)
    locked = depth * _loss(model.activation, model.weight_var, model.bias_var) > CONTROLLED
    yield PLAIN
    yield from (replace(PLAIN, adam=rate) for rate in ADAM_RATES if locked)
    for alpha in grid.exit_weights:
        yield Supervision(alpha, 1, "constant")
        if locked:
            yield replace(PLAIN, boost=total_weight(alpha, 1, depth))
    for every in grid.exit_spacings:
        if 1 < every < depth:
            yield Supervision(largest, every, "constant")
        if every < depth:
            yield Supervision(largest, every, "fading")


def _loss(activation: Activation, weight_var: float, bias_var: float) -> float:
    """−ln χ, the nats that ‖g‖² loses a layer on its way back (Schoenholz et al. 2017)."""
    return -math.log(mean_field.chi(activation, weight_var, bias_var))


def total_weight(alpha: float, every: int, depth: int) -> float:
    """1 + Σα_l, the weight of all losses together."""
    return 1 + alpha * ((depth - 1) // every)


def _trainings(context: Context) -> Iterator[Row]:
    """Accuracies of the chain and its exits, and ∇θ_1 along the way, for every chain and setting."""
    for model, settings in context.progress([*_trained(context).items()], "trainings"):
        lessons = [Lesson.of(context, model, setting, seed) for setting in settings for seed in range(context.config.grid.train_seeds)]
        yield from _taught(context, lessons)


def _taught(context: Context, lessons: Sequence["Lesson"]) -> Iterator[Row]:
    """The rows of lessons, before and after they are given."""
    for lesson in lessons:
        yield from lesson.gradients("initial")
    for lesson, outcome in zip(lessons, train_all(context, [lesson.trainee() for lesson in lessons]), strict=True):
        yield from lesson.rows(outcome)


@dataclass(frozen=True)
class Lesson:
    """A network with its exits, and the setting that it is trained in."""

    context: Context
    model: ModelConfig
    setting: Supervision
    seed: int
    network: MultiExit

    @classmethod
    def of(cls, context: Context, model: ModelConfig, setting: Supervision, seed: int) -> "Lesson":
        """Draw the network."""
        return cls(context, model, setting, seed, supervise(context, context.network(model, seed), model, setting.every, seed))

    @property
    def where(self) -> Row:
        """What tells its rows from others."""
        part = "published" if self.model.family == "vgg" else "training"
        return {"part": part, "heads": "random", **asdict(self.setting), **network_columns(self.model, self.seed)}

    def trainee(self) -> Trainee[MultiExit]:
        """What is trained, and how."""
        model, setting, training = self.model, self.setting, self.context.config.training
        fading = self.context.steps() if setting.schedule == "fading" else None
        name = f"{model.family}, σw² {model.weight_var:g}, depth {model.depth}, {describe(setting)}, seed {self.seed}"
        step = {"optimizer": "adam", "lr": setting.adam} if setting.adam else {"lr": training.lr * setting.boost}
        objective = DeepSupervision.alike(self.network, setting.alpha, fading)
        return Trainee(self.network, name, self.seed, objective, self.early, replace(training, **step))

    def early(self, step: int) -> list[Row] | None:
        """Rows of the moment when a quarter of the training is over."""
        if step != max(1, self.context.steps() // 4):
            return None
        data = self.context.data
        return [*measured(self.where, early_accuracy=evaluate(self.network, data, data.test)[1]), *self.gradients("early")]

    def gradients(self, when: str) -> Iterator[Row]:
        """∇θ_1 at a moment of the training."""
        return _along_training(self.context, self.network, self.setting, self.where, when)

    def rows(self, outcome: Outcome) -> Iterator[Row]:
        """How it came out."""
        metrics = outcome.metrics()
        yield from measured(self.where, **metrics)
        if outcome.status == "finished":
            for seen in outcome.seen.values():
                yield from seen
            yield from self.gradients("trained")
        else:
            yield from measured(self.where, early_accuracy=metrics["test_accuracy"])
        if self.setting == Supervision(max(self.context.config.grid.exit_weights), 1, "constant"):
            yield from _exit_rows(self.context, self.network, self.where)


def _along_training(context: Context, network: MultiExit, setting: Supervision, where: Row, when: str) -> Iterator[Row]:
    """∇θ_1 at a moment of a training with constant weights."""
    if setting.schedule == "constant":
        yield from gradient_rows(context, network, [setting.alpha], {**where, "when": when})


def describe(setting: Supervision) -> str:
    """A setting in words."""
    if setting.schedule == "none":
        step = f", Adam {setting.adam:g}" if setting.adam else "" if setting.boost == 1 else f", learning rate × {setting.boost:g}"
        return f"no exit{step}"
    return f"α {setting.alpha:g} {setting.schedule}, k {setting.every}"


def _exit_rows(context: Context, network: MultiExit, where: Row) -> Iterator[Row]:
    """The accuracy of every exit, and of the chain beside them."""
    layers = {name: layer for layer, (name, _) in enumerate(network.chain.named_children(), start=1)}
    for layer, part in {**{layers[name]: network.leaving_at(name) for name in network.exits}, len(layers): network}.items():
        yield from measured({**where, "layer": layer}, exit_accuracy=evaluate(part, context.data, context.data.test)[1])


def judge(rows: pd.DataFrame, criteria: Mapping[str, Criterion]) -> list[Verdict]:
    """Hold every form of the claim against its criterion."""
    nets = gradients_of(rows)
    kept, gains = _kept_cells(nets), gain_cells(rows, "test_accuracy")
    same_rate = gains.query("against == 'same rate'")
    cells = {
        "direct_path": _severed_cells(rows),
        "provides_gradient": kept,
        "triangle": _triangle_cells(nets),
        "unless_opposed": kept,
        "angle": cells_by(nets.query("heads == 'random'").rename(columns={"cosine": "value"}), GRADIENT, t_interval),
        "direct_share": cells_by(shares(rows), [*CHAIN, "vanished"], t_interval),
        "share_rate": _share_rates(rows),
        "unlocks": same_rate.query("heads == 'random'"),
        "unlocks_within_reach": same_rate.query("heads == 'random'"),
        "more_than_the_step": gains.query("against == 'same weight'"),
        "more_than_the_optimiser": gains.query("against == 'Adam'"),
        "no_harm": same_rate,
        "no_faster_early": gain_cells(rows, "early_accuracy").query("against == 'same rate'"),
        "fading": _fading_cells(rows),
        "later_exits": _exit_cells(rows),
        "published_early": gain_cells(rows, "early_accuracy", part="published").assign(published=INCEPTION_EARLY_GAIN),
    }
    return judge_forms("deep_supervision", criteria, cells)


def _severed_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """‖∇θ_1 ℒ‖ of severed chains, the least over seeds."""
    totals = pick(rows, "total", part="severed")
    return cells_by(totals.assign(value=np.exp(totals["value"])), ["alpha"], least)


def gradients_of(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a network, setting and time: the logarithms of the norms of ∇θ_1's parts, and their cosine."""
    index = [*GRADIENT, "activation", "bias_var", "net_seed"]
    return rows[rows["when"].notna()].pivot(index=index, columns="quantity", values="value").reset_index()


def _kept_cells(nets: pd.DataFrame) -> pd.DataFrame:
    """‖∇θ_1 ℒ‖ in units of the direct part, the least over seeds, beside the least cosine."""
    kept = nets.assign(value=np.exp(nets["total"] - nets["direct"]), cosine=nets.groupby(GRADIENT)["cosine"].transform("min"))
    return cells_by(kept, [*GRADIENT, "cosine"], least)


def _triangle_cells(nets: pd.DataFrame) -> pd.DataFrame:
    """‖∇θ_1 ℒ‖ − (‖direct‖ − ‖rest‖) in units of the larger part, the least over seeds."""
    larger = nets[["direct", "rest"]].max(axis=1)
    total, direct, rest = (np.exp(nets[part] - larger) for part in ("total", "direct", "rest"))
    return cells_by(nets.assign(value=total - direct + rest), GRADIENT, least)


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Compare ∇θ_1 ℒ_1, the first exit right behind the first stage, with ∇θ_1 ℒ_L.

    Returns: the random chains with `value` = ln ‖∇θ_1 ℒ_1‖/‖∇θ_1 ℒ_L‖, `loss` and `vanished`.
    """
    nets = _with_losses(gradients_of(rows).query("part == 'gradient' and every == 1 and alpha == alpha.max()"))
    return nets.assign(value=nets["direct"] - np.log(nets["alpha"]) - nets["final"])


def _with_losses(nets: pd.DataFrame) -> pd.DataFrame:
    """The nets beside the nats that ‖g‖² loses: `loss` = −ln χ a layer, `vanished` = −L ln χ along the chain."""
    theory = list(nets[THEORY].itertuples(index=False, name=None))
    found = {at: _loss(*at) for at in set(theory)}
    loss = np.array([found[at] for at in theory])
    return nets.assign(loss=loss, vanished=loss * nets["depth"])


def _share_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """The slope of that logarithm against depth, a slope a seed, minus −½ ln χ."""
    slopes = pd.DataFrame(
        {"weight_var": weight_var, "value": slope(nets["depth"], nets["value"]).value - nets["loss"].iloc[0] / 2}
        for (weight_var, _), nets in shares(rows).groupby(["weight_var", "net_seed"])
    )
    return cells_by(slopes, ["weight_var"], t_interval)


def gain_cells(rows: pd.DataFrame, quantity: str, part: str = "training") -> pd.DataFrame:
    """An accuracy of the chain with constant auxiliary losses minus without, paired by seed, for every chain and setting.

    Against plain training with the same learning rate; and, where they were done, with the rate times 1 + Σα_l, the total weight of all
    losses, and by Adam at the rate that has the higher training accuracy of the chain.

    Returns: the cells; `best` is the greater mean accuracy of the two; `vanished` = −L ln χ and `reach` = −k ln χ are the nats that
        ‖g‖² loses along the chain, and from exit to exit.
    """
    nets = _with_losses(pick(rows, quantity, part=part))
    plain, supervised = nets.query("schedule == 'none'"), nets.query("schedule == 'constant'")
    supervised = supervised.assign(reach=supervised["every"] * supervised["loss"])
    weights = total_weight(supervised["alpha"], supervised["every"], supervised["depth"])
    rates = best_adam(pick(rows, "train_accuracy", part=part))
    against = pd.concat(
        [
            supervised.assign(against="same rate"),
            supervised.assign(against="same weight", boost=weights),
            supervised[supervised["every"] == 1].drop(columns="adam").merge(rates, on=CHAIN).assign(against="Adam"),
        ]
    )
    keys = ["heads", *CHAIN, "alpha", "every", "vanished", "reach", "against"]
    pairs = paired(against, plain, ["heads", *CHAIN, "boost", "adam", "net_seed"])
    means = pairs.assign(own=pairs["value"] + pairs["value_other"]).groupby(keys)[["own", "value_other"]].transform("mean")
    return cells_by(pairs.assign(best=means.max(axis=1)), [*keys, "best"], t_interval)


def best_adam(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Adam's rate of the highest mean accuracy, a line a chain."""
    means = accuracies.query("adam > 0").groupby([*CHAIN, "adam"])["value"].mean().reset_index()
    return means.sort_values("value").drop_duplicates(CHAIN, keep="last").drop(columns="value")


def _fading_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the chain with fading auxiliary losses minus with constant ones, paired by seed."""
    nets = pick(rows, "test_accuracy", part="training", heads="random").query("alpha == alpha.max()")
    fading, constant = nets.query("schedule == 'fading'"), nets.query("schedule == 'constant'")
    return cells_by(paired(fading, constant, [*CHAIN, "every", "net_seed"]), [*CHAIN, "every"], t_interval)


def _exit_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the chain minus that of its first exit, paired by seed."""
    nets = _with_losses(pick(rows, "exit_accuracy"))
    return cells_by(paired(nets.query("layer == depth"), nets.query("layer == 1"), [*CHAIN, "net_seed"]), [*CHAIN, "vanished"], t_interval)
