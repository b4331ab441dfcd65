"""Figure and table of wide_layers: ranks of J_l, ∇W_l and N×P_l against width, their share of it, stable ranks, and the batch size."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.wide_layers import predicted_sample_rank
from paper_figures.style import DASHES, MARKERS, panels, t_error, title
from src.rows import pick

RANKS = {"jacobian_rank": "rank J_l", "gradient_rank": "rank ∇W_l", "sample_gradients_rank": "rank N×P_l"}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: the three ranks at initialisation, stable ranks, ∇W_l after training, and ∇W_l against the batch size."""
    initial, largest, widths = hidden(rows, "initial"), rows["batch_size"].max(), np.sort(rows["width"].unique())
    classes = int(rows["classes"].max())
    full = over_largest_batch(initial)
    with panels(rows, count=6, columns=3, height=2.4) as (figure, axes):
        _against_width(axes[0], pick(full, "jacobian_rank"), "rank J_l", "rank J_l; black: w and w/2")
        for share in (1.0, 0.5):
            axes[0].plot(widths, share * widths, color="k", linewidth=0.7, zorder=0)
        axes[0].set_yscale("log", base=2)
        _against_width(axes[1], pick(full, "gradient_rank"), "rank ∇W_l", f"rank ∇W_l; black: C−1, N = {largest:.0f}")
        _against_width(axes[2], pick(full, "sample_gradients_rank").query("layer > 1"), "rank of N×P_l", "N×P_l; black: linear theory")
        predicted = [predicted_sample_rank(int(width), int(largest), classes) for width in widths]
        axes[2].plot(widths, predicted, color="k", linewidth=0.7, zorder=0)
        _stable(axes[3], full)
        trained = over_largest_batch(hidden(rows, "trained"))
        _against_width(axes[4], pick(trained, "gradient_rank"), "rank ∇W_l", "rank ∇W_l, trained")
        for axis in (axes[1], axes[4]):
            for cap in (classes - 1, largest):
                axis.axhline(cap, color="k", linewidth=0.7, zorder=0)
            axis.set_yscale("log", base=2)
            axis.legend(loc="center right")
        _against_batch(axes[5], pick(initial, "gradient_rank", width=widths.max()), classes)
    return figure


def hidden(rows: pd.DataFrame, when: str) -> pd.DataFrame:
    """The ranks of hidden layers at one time."""
    return rows[(rows["part"] == "rank") & (rows["when"] == when) & (rows["layer"] < rows["depth"])]


def over_largest_batch(ranks: pd.DataFrame) -> pd.DataFrame:
    """The ranks of gradients over the largest batch, and those of Jacobians."""
    return ranks[(ranks["batch_size"] == ranks["batch_size"].max()) | ranks["quantity"].str.startswith("jacobian")]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Ranks and stable ranks between hidden layers at every width, over the largest batch, and the accuracy reached; means over seeds."""
    largest = rows["batch_size"].max()
    ranks = rows[(rows["part"] == "rank") & (rows["layer"].between(2, rows["depth"] - 1))]
    ranks = over_largest_batch(ranks)
    keys = ["when", "activation", "width"]
    means = ranks.groupby([*keys, "quantity"])["value"].mean().unstack()
    accuracy = pick(rows, "test_accuracy").groupby(["activation", "width"])["value"].mean()
    lines = []
    for (when, activation, width), line in means.iterrows():
        named = {name: line[quantity] for quantity, name in RANKS.items()}
        stable = {f"stable {name}": line[quantity.replace("_rank", "_stable_rank")] for quantity, name in RANKS.items()}
        reached = accuracy.get((activation, width), np.nan) if when == "trained" else np.nan
        lines.append(
            {"when": when, "activation": activation, "width": int(width), "N": int(largest), **named, **stable, "test accuracy": reached}
        )
    return pd.DataFrame(lines)


def _against_width(axis: Axes, ranks: pd.DataFrame, ylabel: str, what: str) -> None:
    """A line an activation, means over hidden layers, with its 95% t-interval over seeds; a point a network."""
    nets = ranks.groupby(["activation", "width", "net_seed"], as_index=False)["value"].mean()
    _lines(axis, nets, "width")
    axis.set(xlabel="width w (units)", ylabel=ylabel)
    title(axis, what)
    axis.legend()


def _stable(axis: Axes, ranks: pd.DataFrame) -> None:
    for j, quantity in enumerate(RANKS):
        stable = pick(ranks, quantity.replace("_rank", "_stable_rank"))
        for k, (activation, nets) in enumerate(stable.groupby("activation")):
            seeds = nets.groupby(["width", "net_seed"], as_index=False)["value"].mean()
            axis.plot(seeds["width"], seeds["value"], linestyle="none", marker=MARKERS[j], color=f"C{k}", alpha=0.2, markersize=2)
            mean = nets.groupby("width")["value"].mean()
            label = f"{activation}" if j == 0 else None
            axis.plot(mean.index, mean, color=f"C{k}", linestyle=DASHES[j], marker=MARKERS[j], markersize=3, label=label)
    widths = np.sort(ranks["width"].unique())
    axis.plot(widths, widths / 4, color="k", linewidth=0.7, zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set(xlabel="width w (units)", ylabel="stable rank Σσ²/σ₁²")
    title(axis, "J_l —, ∇W_l --, N×P_l -·; black: w/4")
    axis.legend()


def _against_batch(axis: Axes, ranks: pd.DataFrame, classes: int) -> None:
    nets = ranks.groupby(["activation", "batch_size", "net_seed"], as_index=False)["value"].mean()
    _lines(axis, nets, "batch_size")
    sizes = np.sort(nets["batch_size"].unique())
    axis.plot(sizes, sizes, color="k", linewidth=0.7, zorder=0)
    axis.axhline(classes - 1, color="k", linewidth=0.7, zorder=0)
    axis.set_yscale("log", base=2)
    axis.set(xlabel="batch size N", ylabel="rank ∇W_l")
    title(axis, f"width {ranks['width'].max()}; black: N, C−1")
    axis.legend()


def _lines(axis: Axes, nets: pd.DataFrame, x: str) -> None:
    for k, (activation, values) in enumerate(nets.groupby("activation")):
        axis.plot(values[x], values["value"], linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.3, markersize=3)
        sns.lineplot(values, x=x, y="value", ax=axis, color=f"C{k}", linestyle=DASHES[k], errorbar=t_error, label=activation)
    axis.set_xscale("log", base=2)
