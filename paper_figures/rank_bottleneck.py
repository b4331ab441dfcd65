"""Figure and table of rank_bottleneck: ranks by layer before and during training, against r and N, updates outside, computed ranks."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.rank_bottleneck import EXAMPLE, EXAMPLE_BATCH, MODES, NETS, SETTING, SOURCES, UNTRAINED, span
from paper_figures.style import DASHES, MARKERS, PREDICTION, SEEDS, SMALL, over_seeds, panels, title
from src.rows import pick

ROUNDING = 1e-32  # what a share of exactly 0 is drawn at
NOTE = f"{SEEDS}; e: of logarithms, a share of exactly 0 stands at 10$^{{-32}}$"
PRECISIONS = {"exact": 3, "float32": 4, "float64": 5}
PLACE, RANK = EXAMPLE["place"], EXAMPLE["rank"]
# the nets often coincide: ReLU a broad pale line, the others narrow on it
BREADTH = {"linear": 1.2, "relu": 3.5, "tanh": 1.2}
NUDGE = {"linear": -0.2, "relu": 0.0, "tanh": 0.2}
COLOUR = {activation: f"C{k}" for k, activation in enumerate(NETS)}
MARKER = dict(zip(NETS, MARKERS, strict=False))


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: rank ∇W_l by layer at initialisation and during training, rank ∇W_1 against r and N, updates outside, computed ranks."""
    ranks = pick(rows, "gradient_rank", part="ranks")
    training, lowest = ranks[ranks["steps"] > 0], ranks[(ranks["steps"] == 0) & (ranks["layer"] == 1) & (ranks["place"] == PLACE)]
    with panels(rows, count=6, columns=3, height=2.5, note=NOTE) as (figure, axes):
        _by_layer(axes[0], pick(rows, "gradient_rank", part="example"), f"start: Gaussian, 64 classes, N={EXAMPLE_BATCH}")
        axes[0].legend(loc="center right", bbox_to_anchor=(1, 0.55))
        _by_layer(axes[1], training, f"steps 1–{training['steps'].max():.0f}: images, N={training['batch'].max():.0f}")
        _against(axes[2], lowest[lowest["batch"] == lowest["batch"].max()], "rank", f"start: below $W_3$, N={lowest['batch'].max():.0f}")
        axes[2].set_xlabel("rank r of $W_3$")
        _key(axes[2], zip(("Gaussian, 64 classes", "images"), DASHES, strict=False), loc="upper left", bbox_to_anchor=(0, 0.92))
        _against(axes[3], lowest[lowest["rank"] == RANK], "batch", f"start: below $W_3$ of rank {RANK}")
        axes[3].set_xlabel("batch size N")
        _outside(axes[4], rows)
        _key(axes[4], zip(MODES, DASHES, strict=False), loc="center right", bbox_to_anchor=(1, 0.5), title="trained")
        _precision(axes[5], rows)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The ranks of ∇W_1 … ∇W_5 over the largest batch, least–greatest over the draws, and the largest tolerance.

    In the example, around a bottleneck of every rank at layer 3 and of rank 4 at every layer, and at the end of training.
    """
    found = rows[rows["quantity"].isin(["gradient_rank", "gradient_tolerance"])].fillna(UNTRAINED)
    shown = (found["place"] == PLACE) | (found["rank"] == RANK)
    shown &= found["steps"].isin([0, found["steps"].max()]) & (found["batch"] == found.groupby("part")["batch"].transform("max"))
    lines = []
    for (part, *at), nets in found[shown].groupby(["part", *SETTING]):
        ranks = pick(nets, "gradient_rank")
        layers = {f"∇W_{layer:.0f}": span(values) for layer, values in ranks.groupby("layer")["value"]}
        measured = {"tolerance": pick(nets, "gradient_tolerance")["value"].max(), "nets": ranks["net_seed"].nunique()}
        lines.append({"part": part, **dict(zip(SETTING, at, strict=True)), "batch": ranks["batch"].iloc[0], **layers, **measured})
    return pd.DataFrame(lines).astype(dict.fromkeys(["place", "rank", "steps", "batch"], int))


def _by_layer(axis: Axes, ranks: pd.DataFrame, what: str) -> None:
    """Rank ∇W_l of every net, each at the side of its layer."""
    for activation, nets in ranks.groupby("activation"):
        place = nets["layer"] + NUDGE[activation]
        axis.plot(place, nets["value"], MARKER[activation], color=COLOUR[activation], alpha=0.5, label=activation)
    axis.axhline(RANK, linestyle="--", **PREDICTION)
    axis.axvspan(PLACE - 0.4, PLACE + 0.4, color="0.92", zorder=0)
    axis.annotate(f"$W_{PLACE}$: rank {RANK}", (PLACE, 33), fontsize=SMALL, ha="center", rotation=90)
    axis.annotate(f"as stated: ≤ {RANK}", (0.65, RANK + 2), fontsize=SMALL)
    axis.set(xlabel="layer l", ylabel=r"rank $\nabla W_l$", ylim=(0, 70), xticks=range(1, 6))
    title(axis, what)


def _against(axis: Axes, ranks: pd.DataFrame, column: str, what: str) -> None:
    """Rank ∇W_1 of every net against r or N, its mean a line; images dashed, the bound as stated black."""
    dashes = dict(zip(SOURCES, DASHES, strict=False))
    for (activation, source), nets in ranks.groupby(["activation", "source"]):
        look: dict[str, Any] = {"linestyle": dashes[source], "linewidth": BREADTH[activation], "alpha": 0.7}
        over_seeds(axis, nets, column, list(NETS).index(activation), **look)
    bound = ranks.groupby(column)["rank"].first()
    axis.plot(bound.index, bound, label="as stated: ≤ r", **PREDICTION)
    axis.legend(loc="upper left", handlelength=1, borderaxespad=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_ylabel(r"rank $\nabla W_1$")
    title(axis, what)


def _outside(axis: Axes, rows: pd.DataFrame) -> None:
    """The share of every net's update of W_1 outside."""
    shares = pick(rows, "outside", layer=1)
    dashes = dict(zip(MODES, DASHES, strict=False))
    for (activation, mode), nets in shares.groupby(["activation", "trained"]):
        drawn, k = nets.assign(value=nets["value"].clip(lower=ROUNDING)), list(NETS).index(activation)
        over_seeds(axis, drawn, "steps", k, geometric=True, linestyle=dashes[mode], markersize=2.5)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="training step", ylabel=r"share of $\Delta W_1$ in frozen directions", ylim=(1e-34, 1e3))
    axis.set_yscale("log")
    title(axis, "updates below $W_3$")


def _key(axis: Axes, styles: Iterable[tuple[str, Any]], **legend: Any) -> None:
    """What the dashes stand for, and what has a label; the colours are those of the first panel."""
    handles = [Line2D([], [], color="0.3", linestyle=dash, label=style) for style, dash in styles]
    axis.legend(handles=[*handles, *axis.get_legend_handles_labels()[0]], **legend)


def _precision(axis: Axes, rows: pd.DataFrame) -> None:
    exact = pick(rows, "exact_rank").assign(precision="exact")
    computed = pick(rows, "product_rank")
    of_nets = pd.concat([exact, computed]).groupby(["precision", "depth", "net_seed"], as_index=False)["value"].mean()
    for precision, nets in of_nets.groupby("precision"):
        over_seeds(axis, nets, "depth", PRECISIONS[str(precision)], str(precision), (0, np.inf))
    axis.set_xscale("log", base=2)
    axis.set(xlabel="depth L (weight layers)", ylabel=r"mean rank $\partial H_L/\partial H_0$", ylim=(0, None))
    title(axis, "ReLU, no bottleneck")
    axis.legend()
