"""Figure and table of greedy_layerwise: what later layers do to a gradient, and accuracy and cost against backpropagation."""

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.greedy_layerwise import LOCAL, RULE, THOUSANDTH, Schedule
from paper_figures.style import DASHES, MARKERS, panels, t_error, title
from src.rows import pick

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
COSTS = {"multiply_adds": "multiply-adds, 10⁹", "parameters": "parameters", "auxiliary_parameters": "auxiliary parameters"}
CHAINS = {"critical": "not locked", "vanishing": "locked backwards", "collapsing": "locked both ways"}
K = "layers a block, k"


def draw(rows: pd.DataFrame) -> Figure:
    """Nine panels: influence, gradients, accuracy of three chains, the lock afterwards, multiply-adds, parameters, accuracy and cost."""
    depth = int(rows.loc[rows["part"] == "training", "depth"].max())
    nets = rows[(rows["part"] != "published") & (rows["depth"] == depth)]
    accuracies = pick(nets, "test_accuracy", part="training")
    costs = _costs(nets)
    with panels(rows, count=9, columns=3, height=2.4) as (figure, axes):
        _influence(axes[0], pick(nets, "later_influence"))
        _gradients(axes[1], pick(nets, "log_gradient", chain="vanishing", moment="before"))
        for axis, (chain, what) in zip(axes[2:5], CHAINS.items(), strict=True):
            _accuracy(axis, accuracies[accuracies["chain"] == chain], f"{what}, L = {depth}")
        _lock(axes[5], pick(nets, "flow", chain="vanishing"))
        _relative(axes[6], costs, "multiply-adds", "multiply-adds (backprop = 1)", "time: multiply-adds")
        _relative(axes[7], costs, "parameters with heads", "parameters (backprop = 1)", "chain and heads in training")
        axes[7].annotate("chain alone, every rule", (1, 1), xytext=(0, -9), textcoords="offset points", fontsize=6.5)
        _cost(axes[8], accuracies[accuracies["chain"] == "critical"].merge(costs, on=RULE))
        rules, labels = axes[2].get_legend_handles_labels()
        figure.legend(rules, labels, loc="outside upper center", ncols=7, handlelength=2.6)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every rule in every chain, and what it takes, also in units of backpropagation."""
    at = ["depth", *RULE]
    costs = pd.concat([_costs(rows[rows["depth"] == depth]).assign(depth=depth) for depth in pick(rows, "multiply_adds")["depth"].unique()])
    by_rule = ["chain", *at]
    accuracies = pick(rows, "test_accuracy", part="training").groupby(by_rule, sort=False)["value"]
    rates = pick(rows, "learning_rate", part="training").groupby(by_rule, sort=False)["value"]
    lines = accuracies.agg(["mean", "min", "max", "size"]).join(rates.first()).reset_index().merge(costs, on=at)
    names = {"mean": "test accuracy", "min": "least", "max": "greatest", "size": "seeds", "value": "learning rate"}
    relative = {column: f"{column} / backprop" for column in ("multiply-adds", "parameters with heads")}
    return lines.rename(columns=names | COSTS | relative)


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
    axis.set(xlabel="layers before those drawn anew", ylabel="largest change of ∇θ (relative)")
    axis.set_ylim(top=1.45 * axis.get_ylim()[1])
    title(axis, "later layers drawn anew")
    axis.legend(loc="upper center", ncols=2)


def _gradients(axis: Axes, gradients: pd.DataFrame) -> None:
    linear = gradients[gradients["hidden"] == 0]
    for index, loss in enumerate((*LOCAL, "backprop")):
        nets = linear[(linear["loss"] == loss) & ((linear["block"] == 1) | (loss == "backprop"))]
        colour = "k" if loss == "backprop" else f"C{index}"
        axis.plot(nets["layer"], nets["value"], linestyle="none", marker=MARKERS[index], color=colour, alpha=0.4, markersize=3)
        mean = nets.groupby("layer")["value"].mean()
        axis.plot(mean.index, mean, linestyle=DASHES[index], color=colour, label=loss)
    axis.set(xlabel="layer l", ylabel="initial ln ‖∇θ_l‖ (nats)")
    bottom, top = axis.get_ylim()
    axis.set_ylim(top=top + 0.35 * (top - bottom))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    title(axis, "locked backwards, k = 1")
    axis.legend(loc="upper center", ncols=2)


def _over_blocks(axis: Axes, values: pd.DataFrame) -> None:
    """Every seed of every rule against the layers a block, and means with their t-intervals; −∞ at the lower edge, and then no mean."""
    for place, nets, look in _kinds(values):
        nets = nets.assign(x=nets["block"] + 0.06 * (place - 2.5), finite=np.isfinite(nets["value"]))
        single = {"color": look["color"], "linestyle": "none", "alpha": 0.3}
        known = nets[nets["finite"]]
        axis.plot(known["x"], known["value"], marker=look["marker"], markersize=2.5, **single)
        if not nets["finite"].all():
            nothing = nets[~nets["finite"]]
            axis.plot(nothing["x"], np.zeros(len(nothing)), marker="v", clip_on=False, transform=axis.get_xaxis_transform(), **single)
        means = known[known.groupby("x")["value"].transform("size") == known["x"].map(nets.groupby("x").size())].groupby("x")["value"]
        if not len(means):
            continue
        low, high = np.array([t_error(np.array(seeds)) for _, seeds in means]).T
        mean = means.mean()
        axis.errorbar(mean.index, mean, [mean - low, high - mean], elinewidth=0.8, markersize=3, **look)
    axis.set_xticks(_sizes(values))
    axis.set(xlabel=K)


def _accuracy(axis: Axes, accuracies: pd.DataFrame, what: str) -> None:
    _reference(axis, accuracies[accuracies["loss"] == "backprop"])
    _over_blocks(axis, accuracies)
    axis.set(ylabel="test accuracy", ylim=(0, 1))
    title(axis, what)


def _reference(axis: Axes, backprop: pd.DataFrame) -> None:
    axis.axhline(backprop["value"].mean(), color="k", linewidth=0.9, label="backprop")
    axis.axhspan(backprop["value"].min(), backprop["value"].max(), color="k", alpha=0.15, linewidth=0)


def _lock(axis: Axes, flows: pd.DataFrame) -> None:
    """What backpropagation would pass through the chain once a rule has trained it."""
    _reference(axis, flows[(flows["loss"] == "backprop") & (flows["moment"] == "after")])
    _over_blocks(axis, flows[flows["moment"] == "after"])
    axis.axhline(
        flows.loc[flows["moment"] == "before", "value"].mean(), color="0.3", linewidth=0.9, linestyle="--", label="before training"
    )
    axis.axhline(THOUSANDTH, color="0.3", linewidth=0.9, linestyle=":", label="locked below")
    axis.set_yscale("symlog")
    axis.set(ylabel="ln ‖g_1‖/‖g_{L−1}‖ (nats)")
    axis.set_ylim(top=100)
    axis.legend(handles=axis.get_lines()[-2:], loc="upper right")
    title(axis, "the same, trained; ▼: −∞")


def _relative(axis: Axes, costs: pd.DataFrame, column: str, label: str, what: str) -> None:
    for _, rules, look in _kinds(costs):
        axis.plot(rules["block"], rules[column], **look)
    deeper = costs[costs["hidden"] > 0]
    axis.plot(np.ones(len(deeper)), deeper[column], "_", color="C0", markersize=9)
    for hidden, value in zip(deeper["hidden"], deeper[column], strict=True):
        axis.annotate(f"+{hidden} hidden", (1, value), xytext=(6, 0), textcoords="offset points", fontsize=6, color="C0", va="center")
    axis.axhline(1, color="k", linewidth=0.9)
    axis.set_xticks(_sizes(costs))
    axis.set(xlabel=K, ylabel=label, ylim=(0, None))
    title(axis, what)


def _cost(axis: Axes, points: pd.DataFrame) -> None:
    backprop = points[points["loss"] == "backprop"]
    axis.plot(backprop["multiply-adds"], backprop["value"], "X", color="k", alpha=0.6)
    for _, nets, look in _kinds(points.assign(hidden=0)):
        axis.plot(nets["multiply-adds"], nets["value"], alpha=0.5, markersize=3, **{**look, "linestyle": "none"})
    axis.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
    axis.set(xlabel="multiply-adds (backprop ✕ = 1)", ylabel="test accuracy", ylim=(0, 1))
    title(axis, "cost where not locked")


def _sizes(rows: pd.DataFrame) -> list[int]:
    return sorted(rows.loc[rows["loss"] != "backprop", "block"].astype(int).unique())
