"""Figure and table of wide_layers: ranks of J_l, ∇W_l and N×P_l against width, their share of it, stable ranks, and the batch size."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.wide_layers import predicted_sample_rank
from paper_figures.style import ACTIVATIONS, DASHES, MARKERS, PREDICTION, SEEDS, over_seeds, panels, title
from src.rows import pick

FACES = {"linear": "w", "relu": "C1", "tanh": "k", "sigmoid": "C3"}  # told apart in grey too
RANKS = {"jacobian_rank": "rank J_l", "gradient_rank": "rank ∇W_l", "sample_gradients_rank": "rank N×P_l"}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: the three ranks at initialisation, stable ranks, ∇W_l after training, and ∇W_l against the batch size."""
    initial, largest, widths = hidden(rows, "initial"), rows["batch_size"].max(), np.sort(rows["width"].unique())
    classes = int(rows["classes"].max())
    full = over_largest_batch(initial)
    with panels(rows, count=6, columns=3, height=2.4, note=SEEDS) as (figure, axes):
        _against_width(axes[0], pick(full, "jacobian_rank"), "rank J_l", "rank J_l; black: w and w/2")
        for share in (1.0, 0.5):
            axes[0].plot(widths, share * widths, **PREDICTION)
        axes[0].set_yscale("log", base=2)
        _against_width(axes[1], pick(full, "gradient_rank"), "rank ∇W_l", f"rank ∇W_l; black: C−1, N = {largest:.0f}")
        _against_width(axes[2], pick(full, "sample_gradients_rank").query("layer > 1"), "rank of N×P_l", "N×P_l; black: linear theory")
        predicted = [predicted_sample_rank(int(width), int(largest), classes) for width in widths]
        axes[2].plot(widths, predicted, **PREDICTION)
        _stable(axes[3], full)
        trained = over_largest_batch(hidden(rows, "trained"))
        _against_width(axes[4], pick(trained, "gradient_rank"), "rank ∇W_l", "rank ∇W_l, trained")
        for axis in (axes[1], axes[4]):
            for cap in (classes - 1, largest):
                axis.axhline(cap, **PREDICTION)
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
    """Stable ranks; the marker and dash tell the matrix, the colour and the face the activation."""
    for k, activation in enumerate(ACTIVATIONS):
        for j, quantity in enumerate(RANKS):
            stable = pick(ranks, quantity.replace("_rank", "_stable_rank"), activation=activation)
            nets = stable.groupby(["width", "net_seed"], as_index=False)["value"].mean()
            look: dict[str, Any] = {"marker": MARKERS[j], "linestyle": DASHES[j], "markerfacecolor": FACES[activation]}
            over_seeds(axis, nets, "width", k, activation if j == 0 else None, **look)
    widths = np.sort(ranks["width"].unique())
    axis.plot(widths, widths / 4, **PREDICTION)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set(xlabel="width w (units)", ylabel="stable rank Σσ²/σ₁²")
    title(axis, "J_l —, ∇W_l --, N×P_l -·; black: w/4")
    axis.legend()


def _against_batch(axis: Axes, ranks: pd.DataFrame, classes: int) -> None:
    nets = ranks.groupby(["activation", "batch_size", "net_seed"], as_index=False)["value"].mean()
    _lines(axis, nets, "batch_size")
    sizes = np.sort(nets["batch_size"].unique())
    axis.plot(sizes, sizes, **PREDICTION)
    axis.axhline(classes - 1, **PREDICTION)
    axis.set_yscale("log", base=2)
    axis.set(xlabel="batch size N", ylabel="rank ∇W_l")
    title(axis, f"width {ranks['width'].max()}; black: N, C−1")
    axis.legend()


def _lines(axis: Axes, nets: pd.DataFrame, x: str) -> None:
    for k, activation in enumerate(ACTIVATIONS):
        over_seeds(axis, nets[nets["activation"] == activation], x, k, activation)
    axis.set_xscale("log", base=2)
