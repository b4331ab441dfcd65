"""Figure and table of vanishing_products: the bound and its slack, products below one, χ, gradient profiles, the trainable depth."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.vanishing_products import BOUNDED, SCALED, depth_scales
from paper_figures.style import ACTIVATIONS, DASHES, MARKERS, PREDICTION, SMALL, over_seeds, panels, title
from src import mean_field
from src.rows import pick
from src.statistics import t_interval

NOTE = "points, thin lines: single seeds; c: means with 95% t-intervals; a: the least of nets and samples; b: not random"
PROFILED = (1.0, 1.3, 1.7, 2.5)


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: slack of the bound, scaled chains, χ, error signals, trainable depth, hidden vanishing."""
    with panels(rows, count=6, columns=3, height=2.4, note=NOTE) as (figure, axes):
        _slack(axes[0], rows)
        _scaled(axes[1], rows)
        _chi(axes[2], rows)
        _profiles(axes[3], rows)
        _edge(axes[4], rows)
        _hiding(axes[5], rows)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """χ, its measured value and the gradient's measured rate with intervals, and the depth scale, for every setting."""
    lines = []
    for (activation, weight_var, bias_var), nets in rows[rows["part"] == "rate"].groupby(["activation", "weight_var", "bias_var"]):
        chi = mean_field.chi(activation, weight_var, bias_var)
        measured = t_interval(pick(nets, "chi")["value"])
        rate = t_interval(np.exp(pick(nets, "rate")["value"]))
        lines.append(
            {
                "activation": activation,
                "σw²": weight_var,
                "σb²": bias_var,
                "χ predicted": chi,
                "χ measured": measured.value,
                "± χ": measured.hi - measured.value,
                "growth of ‖g‖² a layer": rate.value,
                "± growth": rate.hi - rate.value,
                "ξ predicted (layers)": mean_field.depth_scale(chi),
                "nets": measured.n,
            }
        )
    return pd.DataFrame(lines)


def _slack(axis: Axes, rows: pd.DataFrame) -> None:
    bound = rows[(rows["part"] == "bound") & rows["sample"].notna()]
    keys = ["activation", "weight_var", "depth", "net_seed", "sample"]
    wide = bound.pivot(index=keys, columns="quantity", values="value")
    kinds = [(net["activation"], net["weight_var"]) for net in BOUNDED]
    for (activation, weight_var), net in wide.groupby(["activation", "weight_var"]):
        k = kinds.index((activation, weight_var))
        for form, style in (("bound", "-"), ("bound_as_stated", ":")):
            least = (net[form] - net["gradient"]).groupby("depth").min()
            label = f"{activation} {weight_var:g}" if form == "bound" else None
            axis.plot(least.index, least, style, marker=MARKERS[k], color=f"C{k}", label=label)
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="depth L (weight layers)", ylabel="least slack of the bound (nats)")
    title(axis, "bound: precise —, stated ···")
    axis.set_ylim(top=1e6)
    axis.legend(title="φ, σw²", ncols=2, loc="upper left", handlelength=1.2, columnspacing=0.8)


def _scaled(axis: Axes, rows: pd.DataFrame) -> None:
    product = pick(rows, "attenuation", part="scaled")
    for k, kind in enumerate(SCALED):
        chains = product[product["chain"] == kind].sort_values("depth")
        axis.plot(
            chains["depth"],
            chains["value"],
            marker=MARKERS[k],
            color=f"C{k}",
            linestyle="none",
            label="‖J_l‖ = 0.9" if kind == "uniform" else "‖J_l‖ = 1−1/(l+1)²",
        )
        layers = np.arange(1, chains["depth"].max() + 1)
        prediction = np.cumsum(np.log([SCALED[kind](layer) for layer in layers]))
        axis.plot(layers, prediction, **PREDICTION | {"linestyle": DASHES[k]})
    axis.axhline(np.log(0.5), color="0.3", linewidth=0.8, linestyle=":")
    axis.annotate("ln ½", (layers[-1], np.log(0.5)), xytext=(-8, -3), textcoords="offset points", fontsize=SMALL, ha="right", va="top")
    axis.set(xlabel="depth L (weight layers)", ylabel="Σ ln ‖J_l‖ (nats)")
    title(axis, "all ‖J_l‖ < 1; black: exact")
    axis.legend(loc="lower left")


def _chi(axis: Axes, rows: pd.DataFrame) -> None:
    measured = pick(rows, "chi", part="rate")
    bias_var = measured["bias_var"].iloc[0]
    grid = np.linspace(measured["weight_var"].min(), measured["weight_var"].max(), 60)
    for activation, nets in measured.groupby("activation"):
        axis.plot(grid, [mean_field.chi(activation, w, bias_var) for w in grid], **PREDICTION)
        over_seeds(axis, nets, "weight_var", ACTIVATIONS.index(str(activation)), str(activation), (0, np.inf), linestyle="none")
    axis.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
    axis.set(xlabel="weight variance σw²", ylabel="mean σ² of J_l")
    axis.set_yscale("log")
    title(axis, "χ; black: mean field")
    axis.legend(loc="center right")


def _profiles(axis: Axes, rows: pd.DataFrame) -> None:
    signal = pick(rows, "error_signal", part="rate", activation="tanh")
    for weight_var, nets in signal[signal["weight_var"].isin(PROFILED)].groupby("weight_var"):
        k = PROFILED.index(float(str(weight_var)))
        table = nets.pivot(index="layer", columns="net_seed", values="value")
        depth = table.index.max()
        relative = (table - table.loc[depth - 1]).loc[: depth - 1]
        axis.plot(relative.index, relative, color=f"C{k}", alpha=0.25, linewidth=0.7)
        axis.plot(relative.index, relative.mean(axis=1), color=f"C{k}", linestyle=DASHES[k], label=f"{weight_var:g}")
        chi = mean_field.chi("tanh", weight_var, nets["bias_var"].iloc[0])
        axis.plot(relative.index, (depth - 1 - relative.index) * np.log(chi) / 2, **PREDICTION)
    axis.set(xlabel="layer l", ylabel="ln ‖g_l‖ / ‖g_{L−1}‖ (nats)")
    title(axis, "tanh; black: mean field")
    axis.margins(y=0.3)
    axis.legend(title="σw²", loc="upper right", ncols=4, handlelength=1.3, columnspacing=0.7)


def _edge(axis: Axes, rows: pd.DataFrame) -> None:
    accuracy = pick(rows, "train_accuracy", part="edge").groupby(["depth", "weight_var"])["value"].mean().unstack()
    colours = {"cmap": "cividis", "vmin": 0, "vmax": 1, "cbar": False}
    sns.heatmap(accuracy.iloc[::-1], ax=axis, annot=True, fmt=".2f", annot_kws={"size": SMALL}, **colours)
    depths = np.log2(accuracy.index.to_numpy())
    for column, edge in enumerate(depth_scales(rows).itertuples()):
        if edge.chi < 1:
            place = np.interp(np.log2(6 * edge.scale), depths, np.arange(len(depths)), left=-0.5, right=len(depths) - 0.5)
            axis.plot([column, column + 1], [len(depths) - 0.5 - place] * 2, color="w", linewidth=3)
            axis.plot([column, column + 1], [len(depths) - 0.5 - place] * 2, color="tab:red", linewidth=1.5)
    axis.set(xlabel="weight variance σw²", ylabel="depth L (weight layers)")
    title(axis, "train accuracy, tanh; red: 6ξ")
    axis.tick_params(rotation=0)


def _hiding(axis: Axes, rows: pd.DataFrame) -> None:
    for k, (quantity, label) in enumerate((("error_signal", "‖g_l‖"), ("weight_gradient", "‖∇W_l‖"))):
        profile = pick(rows, quantity, part="hiding").pivot(index="layer", columns="net_seed", values="value")
        axis.plot(profile.index, profile, color=f"C{k}", alpha=0.25, linewidth=0.7)
        axis.plot(profile.index, profile.mean(axis=1), color=f"C{k}", linestyle=DASHES[k], label=label)
    axis.set(xlabel="layer l", ylabel="ln norm (nats)")
    title(axis, "ReLU, σw² = 1, σb² = 0")
    axis.legend(loc="lower right")
