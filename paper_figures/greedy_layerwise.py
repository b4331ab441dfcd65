"""Figure and table of greedy_layerwise: what later layers do to a gradient, and accuracy and cost against backpropagation."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paper_figures.style import DASHES, MARKERS, panels, t_error, title
from src.rows import pick

RULES = {  # loss and schedule
    ("pred", "simultaneous"): "pred",
    ("sim", "simultaneous"): "sim",
    ("predsim", "simultaneous"): "predsim",
    ("pred", "sequential"): "pred, sequential",
}
RULE = ["loss", "block", "hidden", "schedule"]
COSTS = {"multiply_adds": "multiply-adds, 10⁹", "parameters": "parameters", "auxiliary_parameters": "auxiliary parameters"}
CHAINS = {"critical": "not locked", "vanishing": "locked backwards", "collapsing": "locked both ways"}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: influence of later layers, gradients at initialisation, accuracy of three chains, accuracy against cost."""
    depth = _deepest(rows)
    nets = rows[(rows["part"] != "published") & (rows["depth"] == depth)]
    with panels(rows, count=6, columns=3, height=2.4) as (figure, axes):
        _influence(axes[0], pick(nets, "later_influence"))
        _gradients(axes[1], pick(nets, "log_gradient", chain="vanishing"))
        for axis, (chain, what) in zip(axes[2:5], CHAINS.items(), strict=True):
            _accuracy(axis, pick(nets, "test_accuracy", part="training", chain=chain), f"{what}, L = {depth}")
        axes[4].legend(loc="upper right")
        _cost(axes[5], pick(nets, "multiply_adds"), pick(nets, "test_accuracy", part="training", chain="critical"))
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every rule in every chain, and what it takes."""
    at = ["depth", *RULE]
    costs = rows[rows["quantity"].isin(COSTS)].pivot(index=at, columns="quantity", values="value")
    groups = pick(rows, "test_accuracy", part="training").groupby(["chain", *at], sort=False)["value"]
    lines = groups.agg(["mean", "min", "max", "size"]).join(costs, on=at)
    lines["multiply_adds"] /= 1e9
    return lines.reset_index().rename(columns={"mean": "test accuracy", "min": "least", "max": "greatest", "size": "seeds", **COSTS})


def _deepest(rows: pd.DataFrame) -> int:
    return int(rows.loc[rows["part"] == "training", "depth"].max())


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
    for index, loss in enumerate(("pred", "sim", "predsim", "backprop")):
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


def _accuracy(axis: Axes, accuracies: pd.DataFrame, what: str) -> None:
    backprop = accuracies.loc[accuracies["loss"] == "backprop", "value"]
    axis.axhline(backprop.mean(), color="k", linewidth=0.9, label="backprop")
    axis.axhspan(backprop.min(), backprop.max(), color="k", alpha=0.15, linewidth=0)
    for index, ((loss, schedule), label) in enumerate(RULES.items()):
        chosen = (accuracies["loss"] == loss) & (accuracies["schedule"] == schedule) & (accuracies["hidden"] == 0)
        nets = accuracies[chosen].assign(block=accuracies["block"] + 0.06 * (index - 1.5))
        axis.plot(nets["block"], nets["value"], linestyle="none", marker=MARKERS[index], color=f"C{index}", alpha=0.4, markersize=3)
        sns.lineplot(
            nets, x="block", y="value", ax=axis, color=f"C{index}", linestyle=DASHES[index], errorbar=t_error, err_style="bars", label=label
        )
    axis.legend().remove()
    axis.set_xticks(_sizes(accuracies))
    axis.set(xlabel="layers a block, k", ylabel="test accuracy", ylim=(0, 1))
    title(axis, what)


def _cost(axis: Axes, costs: pd.DataFrame, accuracies: pd.DataFrame) -> None:
    reference = costs.loc[costs["loss"] == "backprop", "value"].iloc[0]
    points = accuracies.merge(costs[[*RULE, "value"]], on=RULE, suffixes=("", "_cost"))
    kinds = {("backprop", "simultaneous"): "k", **{kind: f"C{index}" for index, kind in enumerate(RULES)}}
    for (loss, schedule), colour in kinds.items():
        nets = points[(points["loss"] == loss) & (points["schedule"] == schedule)]
        marker = "X" if loss == "backprop" else MARKERS[int(colour[1:])]
        axis.plot(nets["value_cost"] / reference, nets["value"], linestyle="none", marker=marker, color=colour, alpha=0.6)
    axis.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
    axis.set(xlabel="multiply-adds (backprop ✕ = 1)", ylabel="test accuracy", ylim=(0, 1))
    title(axis, "what it takes, not locked")


def _sizes(rows: pd.DataFrame) -> list[int]:
    return sorted(rows.loc[rows["loss"] != "backprop", "block"].astype(int).unique())
