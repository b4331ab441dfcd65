"""Figure and table of rank_bottleneck: the five-layer example, ranks against bottleneck and batch, computed ranks, updates."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.rank_bottleneck import EXAMPLE, MODES, NETS
from paper_figures.style import DASHES, MARKERS, panels, title
from src.rows import pick

ROUNDING = 1e-32  # what a share of exactly 0 is drawn at
NUDGE = {"linear": -0.15, "relu": 0.0, "tanh": 0.15}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: the example, rank against r (Gaussian and images) and against N, computed ranks, updates outside."""
    with panels(rows, count=6, columns=3, height=2.3) as (figure, axes):
        _example(axes[0], rows)
        below = _below(rows)
        _against(axes[1], below.query("source == 'gaussian' and batch == batch.max()"), "rank", "Gaussian, 64 classes")
        _against(axes[2], below.query("source == 'images' and batch == batch.max()"), "rank", "images")
        _against(axes[3], below.query("source == 'gaussian' and rank == @EXAMPLE['rank']"), "batch", f"Gaussian, r = {EXAMPLE['rank']}")
        _precision(axes[4], rows)
        _outside(axes[5], rows)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The ranks of ∇W_1 … ∇W_5 around a bottleneck at layer 3 over the largest batch, least–greatest over the draws."""
    ranks = pick(rows, "gradient_rank", place=EXAMPLE["place"])
    ranks = ranks[ranks["batch"] == ranks.groupby("part")["batch"].transform("max")]
    lines = []
    for (part, source, activation, rank), nets in ranks.groupby(["part", "source", "activation", "rank"]):
        at = {"inputs": source if part == "neighbours" else "example", "activation": activation, "r": int(rank)}
        layers = {f"∇W_{layer}": f"{least:g}–{most:g}" if least < most else f"{most:g}" for layer, least, most in _range(nets)}
        lines.append({**at, "N": int(nets["batch"].iloc[0]), **layers, "nets": nets["net_seed"].nunique()})
    return pd.DataFrame(lines)


def _range(nets: pd.DataFrame) -> list[tuple[int, float, float]]:
    return [(int(layer), values.min(), values.max()) for layer, values in nets.groupby("layer")["value"]]


def _example(axis: Axes, rows: pd.DataFrame) -> None:
    ranks = pick(rows, "gradient_rank", part="example")
    for k, activation in enumerate(NETS):
        nets = ranks[ranks["activation"] == activation]
        place = nets["layer"] + NUDGE[activation]
        axis.plot(place, nets["value"], linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.5, label=activation)
    axis.axhline(EXAMPLE["rank"], color="k", linewidth=0.9, linestyle="--")
    axis.annotate("as stated: rank J_3 = 4", (5.2, EXAMPLE["rank"]), xytext=(0, 3), textcoords="offset points", fontsize=6.5, ha="right")
    axis.set(xlabel="layer l", ylabel="rank ∇W_l", ylim=(0, 70))
    title(axis, f"W_3 of rank 4, N = {EXAMPLE['batch']}")
    axis.legend(loc="center right", bbox_to_anchor=(1, 0.4))


def _below(rows: pd.DataFrame) -> pd.DataFrame:
    """The rank of ∇W_1 below a bottleneck at layer 3."""
    return pick(rows, "gradient_rank", part="neighbours", layer=1, place=EXAMPLE["place"])


def _against(axis: Axes, ranks: pd.DataFrame, column: str, what: str) -> None:
    for k, activation in enumerate(NETS):
        nets = ranks[ranks["activation"] == activation]
        axis.plot(nets[column], nets["value"], linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.4, markersize=3)
        sns.lineplot(nets, x=column, y="value", ax=axis, color=f"C{k}", linestyle=DASHES[k], errorbar=None, label=activation)
    line = ranks.groupby(column, as_index=False).agg(bound=("rank", "first"))
    axis.plot(line[column], line["bound"], color="k", linewidth=0.9, label="r")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_ylim(0.8, 160)
    largest = f", N = {ranks['batch'].max():.0f}" if column == "rank" else ""
    axis.set(xlabel="rank r of W_3" if column == "rank" else "batch size N", ylabel="rank ∇W_1")
    title(axis, what + largest)
    axis.legend(loc="upper left", ncols=2, handlelength=1.8, columnspacing=0.8)


def _precision(axis: Axes, rows: pd.DataFrame) -> None:
    exact = pick(rows, "exact_rank").assign(precision="exact")
    for k, (label, ranks) in enumerate(pd.concat([exact, pick(rows, "product_rank")]).groupby("precision")):
        axis.plot(ranks["depth"], ranks["value"], linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.3, markersize=3)
        mean = ranks.groupby("depth")["value"].mean()
        axis.plot(mean.index, mean, DASHES[k], color=f"C{k}", label=str(label))
    axis.set_xscale("log", base=2)
    axis.set(xlabel="depth L (weight layers)", ylabel="rank ∂H_L/∂H_0", ylim=(0, None))
    title(axis, "ReLU, no bottleneck")
    axis.legend()


def _outside(axis: Axes, rows: pd.DataFrame) -> None:
    shares = pick(rows, "outside", part="training", layer=1)
    for k, activation in enumerate(NETS):
        for dash, mode in zip(DASHES, MODES, strict=False):
            nets = shares[(shares["activation"] == activation) & (shares["mode"] == mode)]
            mean = np.log(nets["value"].clip(lower=ROUNDING)).groupby(nets["steps"]).mean()
            axis.plot(mean.index, np.exp(mean), linestyle=dash, color=f"C{k}", label=mode if activation == "linear" else None)
            axis.plot(
                nets["steps"], nets["value"].clip(lower=ROUNDING), linestyle="none", marker=".", color=f"C{k}", alpha=0.3, markersize=2
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="training step", ylabel="share of ΔW_1 outside", ylim=(1e-34, 1e3))
    title(axis, "updates outside; colours as a")
    axis.legend(title="trained", loc="center left", bbox_to_anchor=(0, 0.55), handlelength=2)
