"""Figure and table of information_bottleneck: rank and energy of the error signals before a code, and accuracy, against its width."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.information_bottleneck import BELOW, INITS, NETS
from paper_figures.style import DASHES, MARKERS, panels, t_error, title
from src.rows import pick

CODE = "code width r"


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: rank before the code and below, energy outside r directions, energy kept, accuracy with codes and with filters."""
    with panels(rows, count=6, columns=3, height=2.3) as (figure, axes):
        for axis, layer, what in ((axes[0], BELOW, "just before the code"), (axes[1], BELOW - 1, "a layer further below")):
            ranks = pick(rows, "signal_rank", layer=layer, when="untrained", init="gaussian")
            _curves(axis, ranks)
            widths = np.sort(ranks["code"].unique())
            axis.plot(widths, widths, color="k", linewidth=0.9, label="r")
            axis.set_yscale("log", base=2)
            axis.set(xlabel=CODE, ylabel=f"rank of the signals g_{layer}")
            title(axis, what)
            axis.legend()
        _outside(axes[2], rows)
        _energy(axes[3], rows)
        for axis, part, what in ((axes[4], "code", "trained with a code"), (axes[5], "filter", "gradient filtered, state whole")):
            _curves(axis, pick(rows, "test_accuracy", part=part))
            axis.axvline(rows["classes"].max() - 1, color="0.3", linewidth=0.8, linestyle=":")
            axis.set(xlabel=CODE if part == "code" else "directions r that pass", ylabel="test accuracy", ylim=(0, 1))
            title(axis, what)
            axis.legend(loc="lower right")
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rank just before the code and a layer below, energy kept, and accuracy with code and with filter, mean over seeds."""
    lines = []
    trained = rows[rows["when"] == "trained"]
    untrained = rows[(rows["when"] == "untrained") & (rows["init"] == "gaussian")]
    for (activation, code), nets in untrained.groupby(["activation", "code"]):
        after = trained[(trained["activation"] == activation) & (trained["code"] == code)]
        lines.append(
            {
                "activation": activation,
                "r": int(code),
                **{f"rank g_{layer}": pick(nets, "signal_rank", layer=layer)["value"].mean() for layer in (BELOW, BELOW - 1)},
                **{f"rank g_{layer} trained": pick(after, "signal_rank", layer=layer)["value"].mean() for layer in (BELOW, BELOW - 1)},
                "energy kept": pick(nets, "energy_kept")["value"].mean(),
                "energy kept trained": pick(after, "energy_kept")["value"].mean(),
                "test accuracy, code": pick(after, "test_accuracy", part="code")["value"].mean(),
                "test accuracy, filter": pick(after, "test_accuracy", part="filter")["value"].mean(),
                "seeds": pick(after, "test_accuracy", part="code")["net_seed"].nunique(),
            }
        )
    return pd.DataFrame(lines)


def _curves(axis: Axes, values: pd.DataFrame) -> None:
    """A line an activation with its 95% t-interval, and every seed as a point."""
    for k, activation in enumerate(NETS):
        nets = values[values["activation"] == activation]
        axis.plot(nets["code"], nets["value"], linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.3, markersize=3)
        sns.lineplot(nets, x="code", y="value", ax=axis, color=f"C{k}", linestyle=DASHES[k], errorbar=t_error, label=activation)
    axis.set_xscale("log", base=2)


def _outside(axis: Axes, rows: pd.DataFrame) -> None:
    shares = pick(rows, "outside", layer=BELOW - 1, init="gaussian").query("code < width")
    for k, activation in enumerate(NETS):
        for when, dash in (("untrained", "-"), ("trained", ":")):
            nets = shares[(shares["activation"] == activation) & (shares["when"] == when)]
            mean = nets.groupby("code")["value"].mean()
            axis.plot(mean.index, mean, dash, color=f"C{k}", label=activation if when == "untrained" else None)
            axis.plot(nets["code"], nets["value"], linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.3, markersize=3)
    axis.set_xscale("log", base=2)
    axis.set(xlabel=CODE, ylabel=f"energy of g_{BELOW - 1} outside r directions")
    title(axis, "leak; dotted: trained")
    axis.legend()


def _energy(axis: Axes, rows: pd.DataFrame) -> None:
    kept = pick(rows, "energy_kept", when="untrained")
    widest = kept["code"].max()
    for k, activation in enumerate(NETS):
        for init, dash in zip(INITS, DASHES, strict=False):
            nets = kept[(kept["activation"] == activation) & (kept["init"] == init)]
            mean = nets.groupby("code")["value"].mean()
            axis.plot(mean.index, mean / mean[widest], linestyle=dash, color=f"C{k}", marker=MARKERS[k], markersize=3)
    widths = np.sort(kept["code"].unique())
    axis.plot(widths, widths / widest, color="k", linewidth=0.7, label="r/d: orthogonal (dashed)")
    axis.plot(widths, np.ones_like(widths), color="k", linewidth=0.7, linestyle=":", label="1: Gaussian (solid)")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel=CODE, ylabel="energy kept, over r = d")
    title(axis, "untrained; colours as a")
    axis.legend(loc="lower right")
