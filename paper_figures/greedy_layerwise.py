"""Figure and table of greedy_layerwise: what later layers do to a gradient; accuracy, probes and cost against backpropagation."""

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.greedy_layerwise import SETTING, THOUSANDTH, chosen_rates
from experiments.greedy_rules import LOCAL, RULE, Schedule
from paper_figures.style import DASHES, MARKERS, PREDICTION, SMALL, over_seeds, panels, title
from src import mean_field
from src.rows import pick

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
COSTS = {"multiply_adds": "multiply-adds, 10⁹", "parameters": "parameters", "auxiliary_parameters": "auxiliary parameters"}
CHAINS = {"critical": "not locked", "latched": "backwards only", "vanishing": "both ways, small", "collapsing": "both ways, alike"}
NOTE = (
    "a–d: accuracy in chains that are locked so; f–h: in the chain of c, k = 1 in f and h\n"
    "points: single seeds; means with 95% t-intervals, of shares cut at 0 and 1; black: backprop, band: all its seeds"
)
K = "layers a block, k"


def draw(rows: pd.DataFrame) -> Figure:
    """Eleven panels: accuracy of four chains; influence, gradients, the lock afterwards; probes, multiply-adds, parameters."""
    depth = int(rows.loc[rows["part"] == "training", "depth"].max())
    trust = chosen_rates(rows)["tuned"]
    nets = rows[rows["depth"] == depth].join(trust, on=[*SETTING, *RULE])
    accuracies = pick(nets, "test_accuracy", part="training")
    costs = _costs(nets)
    with panels(rows, count=11, columns=4, height=2.2, wide=(8,), note=NOTE) as (figure, axes):
        for axis, (chain, what) in zip(axes[:4], CHAINS.items(), strict=True):
            _accuracy(axis, accuracies[accuracies["chain"] == chain], what)
        _influence(axes[4], pick(nets, "later_influence"))
        _gradients(axes[5], pick(nets, "log_gradient", chain="vanishing", moment="before"))
        _lock(axes[6], pick(nets, "flow", chain="vanishing"))
        _probes(axes[7], pick(nets, "probe_accuracy", chain="vanishing"))
        _beside(axes[8], accuracies, pick(nets, "probe_accuracy", moment="after", layer=depth - 1))
        _relative(axes[9], costs, "multiply-adds", "multiply-adds / backprop's", "time")
        _relative(axes[10], costs, "parameters with heads", "parameters / backprop's", "chain and heads")
        axes[10].annotate("chain alone", (1, 1), xytext=(0, -9), textcoords="offset points", fontsize=SMALL)
        rules, labels = axes[0].get_legend_handles_labels()
        figure.legend(rules, labels, loc="outside upper center", ncols=7, handlelength=2.6)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every rule in every chain, its learning rate, a probe of the last hidden layer, and what the training takes."""
    at, by_rule = ["depth", *RULE], [*SETTING, *RULE]
    costs = pd.concat([_costs(rows[rows["depth"] == depth]).assign(depth=depth) for depth in pick(rows, "multiply_adds")["depth"].unique()])
    trained = pick(rows, "test_accuracy", part="training").groupby(by_rule, sort=False)["value"]
    probes = pick(rows, "probe_accuracy", moment="after").query("layer == depth - 1").groupby(by_rule)["value"].mean()
    rates = chosen_rates(rows)[["learning_rate", "adam", "tuned"]]
    lines = trained.agg(["mean", "min", "max", "size"]).join([rates, probes])
    names = {
        **{"mean": "test accuracy", "min": "least", "max": "greatest", "size": "seeds"},
        **{"learning_rate": "learning rate", "adam": "of Adam", "tuned": "it is", "value": "last hidden layer, probed"},
        **{column: f"{column} / backprop" for column in ("multiply-adds", "parameters with heads")},
    }
    return lines.reset_index().merge(costs, on=at).rename(columns=names | COSTS)


def _costs(nets: pd.DataFrame) -> pd.DataFrame:
    """What a training by each rule takes at one depth; multiply-adds and parameters in training also in units of backpropagation's."""
    costs = nets[nets["quantity"].isin(COSTS)].pivot(index=RULE, columns="quantity", values="value").reset_index()
    costs["multiply_adds"] /= 1e9
    costs["with heads"] = costs["parameters"] + costs["auxiliary_parameters"]
    backprop = costs[costs["loss"] == "backprop"].iloc[0]
    costs["multiply-adds"] = costs["multiply_adds"] / backprop["multiply_adds"]
    costs["parameters with heads"] = costs.pop("with heads") / backprop["parameters"]
    return costs


def _kinds(values: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame, dict[str, Any]]]:
    """Each loss and schedule with linear heads: its place, its rows, and how its line looks."""
    for place, (schedule, (index, loss)) in enumerate(product(SCHEDULES, enumerate(LOCAL))):
        chosen = values[(values["loss"] == loss) & (values["schedule"] == schedule) & (values["hidden"] == 0)]
        label = loss if schedule == "simultaneous" else f"{loss}, sequential"
        if chosen.empty:
            continue
        yield (
            place,
            chosen,
            {"color": f"C{index}", "marker": MARKERS[place], "linestyle": DASHES[SCHEDULES.index(schedule)], "label": label},
        )


def _influence(axis: Axes, influence: pd.DataFrame) -> None:
    linear = influence[influence["hidden"] == 0]
    backprop = linear[linear["loss"] == "backprop"]
    axis.plot(backprop["border"], backprop["value"], "k-", marker="X", label="backprop")
    for index, size in enumerate(_sizes(linear)):
        curve = linear[(linear["loss"] == "pred") & (linear["block"] == size)]
        axis.plot(curve["border"], curve["value"], DASHES[index], marker=MARKERS[index], color=f"C{index + 4}", label=f"pred, k = {size}")
    axis.set(xlabel="layers that are kept", ylabel="relative change of ∇θ")
    axis.set_ylim(top=1.9 * axis.get_ylim()[1])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    title(axis, "later layers redrawn")
    axis.legend(loc="upper left", handlelength=1.5, labelspacing=0.2)


def _gradients(axis: Axes, gradients: pd.DataFrame) -> None:
    linear = gradients[gradients["hidden"] == 0]
    for index, loss in enumerate((*LOCAL, "backprop")):
        nets = linear[(linear["loss"] == loss) & ((linear["block"] == 1) | (loss == "backprop"))]
        colour = "k" if loss == "backprop" else f"C{index}"
        marker = "X" if loss == "backprop" else MARKERS[index]
        over_seeds(axis, nets, "layer", index, loss, color=colour, marker=marker, linestyle="-", markersize=3)
    axis.set(xlabel="layer l", ylabel="initial ln ‖∇θ_l‖ (nats)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    title(axis, "initial gradients")


def _over_blocks(axis: Axes, values: pd.DataFrame, bounds: tuple[float, float] = (-np.inf, np.inf)) -> None:
    """Every seed of every rule against the layers a block, and means with their t-intervals; a ring where the rate is not to be trusted."""
    for place, nets, look in _kinds(values):
        nets = nets.assign(x=nets["block"] + 0.08 * (place - 2))
        over_seeds(axis, nets, "x", place, bounds=bounds, **look)
        doubtful = nets[nets["tuned"] != "inner"].groupby("x")["value"].mean()
        axis.plot(doubtful.index, doubtful, "o", markersize=8, fillstyle="none", color=look["color"])
    axis.set_xticks(_sizes(values))
    axis.set(xlabel=K, xlim=(0.6, max(_sizes(values)) + 0.4))


def _accuracy(axis: Axes, accuracies: pd.DataFrame, what: str) -> None:
    _reference(axis, accuracies[accuracies["loss"] == "backprop"])
    _over_blocks(axis, accuracies, (0, 1))
    axis.set(ylabel="test accuracy", ylim=(0, 1))
    title(axis, what)


def _reference(axis: Axes, backprop: pd.DataFrame) -> None:
    axis.axhline(backprop["value"].mean(), color="k", linewidth=0.9, label="backprop")
    axis.axhspan(backprop["value"].min(), backprop["value"].max(), color="k", alpha=0.15, linewidth=0)
    if (backprop["tuned"] != "inner").any():
        axis.plot(
            1, backprop["value"].mean(), "o", markersize=8, fillstyle="none", color="k", transform=axis.get_yaxis_transform(), clip_on=False
        )


def _lock(axis: Axes, flows: pd.DataFrame) -> None:
    """What backpropagation would pass through the chain once a rule has trained it."""
    _reference(axis, flows[(flows["loss"] == "backprop") & (flows["moment"] == "after")])
    _over_blocks(axis, flows[flows["moment"] == "after"])
    before = flows[flows["moment"] == "before"]
    axis.axhline(before["value"].mean(), color="0.3", linewidth=0.9, linestyle="--", label="before training")
    axis.axhline(THOUSANDTH, color="0.3", linewidth=0.9, linestyle=":", label="locked below")
    chi = mean_field.chi(*before[["activation", "weight_var", "bias_var"]].iloc[0])
    axis.axhline((before["depth"].iloc[0] - 2) * np.log(chi) / 2, label="before: mean field", **PREDICTION)
    axis.set_yscale("symlog")
    axis.set(ylabel="ln ‖g_1‖/‖g_{L−1}‖ (nats)")
    axis.set_ylim(-30, 1000)
    axis.legend(handles=axis.get_lines()[-3:], loc="upper left", handlelength=1.5, labelspacing=0.2)
    title(axis, "lock, once trained")


def _probes(axis: Axes, probes: pd.DataFrame) -> None:
    """What a linear probe tells from every hidden layer, single layers."""
    after = probes[(probes["moment"] == "after") & (probes["schedule"] == "simultaneous")]
    curves = {loss: after[(after["loss"] == loss) & ((after["block"] == 1) | (loss == "backprop"))] for loss in (*LOCAL, "backprop")}
    curves["untrained"] = probes[probes["moment"] == "before"]
    for index, (name, nets) in enumerate(curves.items()):
        own = {"backprop": {"color": "k", "marker": "X"}, "untrained": {"color": "0.6", "marker": "v", "linestyle": "--"}}
        look: dict[str, Any] = {"linestyle": "-", "markersize": 3} | own.get(name, {})
        over_seeds(axis, nets, "layer", index, name, (0, 1), **look)
    axis.set(xlabel="layer l", ylabel="accuracy of a probe", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(handles=[axis.get_legend_handles_labels()[0][-1]], loc="lower left")
    title(axis, "probed layers")


def _beside(axis: Axes, accuracies: pd.DataFrame, probes: pd.DataFrame) -> None:
    """The chain's own readout beside a probe of its last hidden layer: a point a rule and chain."""
    by_rule = ["chain", *RULE]
    means = [values.groupby(by_rule)["value"].mean() for values in (probes, accuracies)]
    points = pd.concat(means, axis=1, keys=["probe", "readout"]).reset_index()
    for marker, (chain, what) in zip(MARKERS, CHAINS.items(), strict=False):
        at = points[points["chain"] == chain]
        colours = ["k" if loss == "backprop" else f"C{LOCAL.index(loss)}" for loss in at["loss"]]
        axis.scatter(at["probe"], at["readout"], c=colours, marker=marker, s=14, alpha=0.7, linewidths=0, label=what)
    axis.plot([0, 1], [0, 1], **PREDICTION | {"linestyle": ":"})
    axis.set(
        xlabel="probe of the last hidden layer", ylabel="the chain's own readout", xlim=(0, 1), ylim=(0, 1), yticks=np.linspace(0, 1, 6)
    )
    for collection in axis.legend(loc="upper left", handletextpad=0.1).findobj(PathCollection):
        collection.set(color="0.4")
    title(axis, "test accuracy, all rules; ··· equal")


def _relative(axis: Axes, costs: pd.DataFrame, column: str, label: str, what: str) -> None:
    for _, rules, look in _kinds(costs):
        axis.plot(rules["block"], rules[column], **look)
    deeper = costs[costs["hidden"] > 0]
    axis.plot([1] * len(deeper), deeper[column], "_", color="C0", markersize=9)
    for hidden, value in zip(deeper["hidden"], deeper[column], strict=True):
        beside: dict[str, Any] = {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
        axis.annotate(f"{hidden} hidden", (1, value), fontsize=SMALL, color="C0", **beside)
    axis.axhline(1, color="k", linewidth=0.9)
    axis.set_xticks(_sizes(costs))
    axis.set(xlabel=K, ylabel=label, xlim=(-0.9, max(_sizes(costs)) + 0.3), ylim=(0, 1.08 * costs[column].max()))
    title(axis, what)


def _sizes(rows: pd.DataFrame) -> list[int]:
    return sorted(rows.loc[rows["loss"] != "backprop", "block"].astype(int).unique())
