"""Figure and table of forward_backward: four chains with both measures, one rate, and what each remedy gains either way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.forward_backward import GAIN, PATIENTS, WAYS, gain_cells, remedy_gains
from paper_figures.style import DASHES, MARKERS, panels, title
from src import mean_field
from src.rows import pick

CHAINS = {"neither": "orthogonal linear", "forwards": "ReLU, σw²=2", "backwards": "latching tanh", "both": "tanh, σw²=1"}
REMEDIES = {"skip": "skip", "batch": "BatchNorm", "layer": "LayerNorm", "exits": "auxiliary losses"}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: states and gradients along the four chains, both locks of each, the two rates, gains of the remedies either way."""
    with panels(rows, count=6, columns=2, height=2.25) as (figure, axes):
        _states(axes[0], rows)
        _signals(axes[1], rows)
        _quadrants(axes[2], rows)
        _rates(axes[3], rows)
        _gains(axes[4], rows, "forward")
        _gains(axes[5], rows, "backward")
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Both locks of every patient with every remedy, their gains over the plain chain with intervals, and the accuracy reached."""
    gains = gain_cells(remedy_gains(rows)).set_index(GAIN)
    gains = gains.assign(half=gains["hi"] - gains["estimate"])
    treated = rows[(rows["part"] == "remedy") & (rows["remedy"] != "local")]
    lines = []
    for (patient, remedy), nets in treated.groupby(["patient", "remedy"], sort=False):
        for when in ("initial", "trained"):
            line = {"chain": patient, "remedy": remedy, "when": when}
            for way in WAYS:
                gain = gains.reindex([(way, when, patient, remedy)]).iloc[0]
                lock = pick(nets, f"{way}_lock", when=when)["value"]
                line |= {f"{way} lock (decades)": lock.mean(), f"{way} gain": gain["estimate"], f"± {way} gain": gain["half"]}
            accuracy = pick(nets, "test_accuracy")["value"].mean() if when == "trained" else np.nan
            lines.append({**line, "test accuracy": accuracy, "nets": len(lock)})
    return pd.DataFrame(lines)


def _along(axis: Axes, rows: pd.DataFrame, quantity: str, transform: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """A profile of each of the four chains, seeds thin."""
    for k, (chain, name) in enumerate(CHAINS.items()):
        profile = transform(pick(rows, quantity, part="chain", chain=chain).pivot(index="layer", columns="net_seed", values="value"))
        axis.plot(profile.index, profile, color=f"C{k}", alpha=0.25, linewidth=0.6)
        axis.plot(profile.index, profile.mean(axis=1), color=f"C{k}", linestyle=DASHES[k], label=name)
    axis.set_xlabel("layer l")


def _states(axis: Axes, rows: pd.DataFrame) -> None:
    _along(axis, rows, "dissimilarity", lambda profile: -np.log10(profile))
    axis.set_ylabel("1/(1 − c_l) (decades)")
    title(axis, "states: how alike")
    axis.legend(loc="upper left")


def _signals(axis: Axes, rows: pd.DataFrame) -> None:
    _along(axis, rows, "error_signal", lambda profile: (profile.iloc[-1] - profile) / np.log(10))
    axis.set_ylabel("‖g_{L−1}‖/‖g_l‖ (decades)")
    title(axis, "gradients: how small")


def _quadrants(axis: Axes, rows: pd.DataFrame) -> None:
    for k, (chain, name) in enumerate(CHAINS.items()):
        locks = rows[(rows["part"] == "chain") & (rows["chain"] == chain) & rows["quantity"].isin(["forward_lock", "backward_lock"])]
        wide = locks.pivot(index="net_seed", columns="quantity", values="value")
        axis.plot(wide["forward_lock"], wide["backward_lock"], linestyle="none", marker=MARKERS[k], color=f"C{k}", alpha=0.6, label=name)
    threshold = pick(rows, "forward_lock", part="chain")["threshold"].iloc[0]
    axis.axhline(threshold, color="0.3", linewidth=0.8, linestyle=":")
    axis.axvline(threshold, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(top=3 * pick(rows, "backward_lock", part="chain")["value"].max())
    axis.set(xlabel="forward lock (decades)", ylabel="backward lock (decades)")
    title(axis, "a point a net; dotted: locked")


def _rates(axis: Axes, rows: pd.DataFrame) -> None:
    rates = rows[rows["part"] == "rate"]
    for k, ((activation, weight_var, bias_var), nets) in enumerate(rates.groupby(["activation", "weight_var", "bias_var"])):
        wide = nets.pivot(index="net_seed", columns="quantity", values="value")
        points: dict[str, Any] = {"linestyle": "none", "marker": MARKERS[k], "color": f"C{k}"}
        axis.plot(wide["backward_rate"], wide["forward_rate"], alpha=0.6, label=f"{activation}, σw²={weight_var:g}", **points)
        chi = np.log(mean_field.chi(activation, weight_var, bias_var))
        axis.axvline(chi, color=f"C{k}", linewidth=0.8, linestyle=":")
    ends = [rates["value"].min(), 0]
    axis.plot(ends, ends, color="k", linewidth=0.7)
    axis.set(xlabel="rate of ‖g_l‖² (nats a layer)", ylabel="rate of 1 − c_l (nats a layer)")
    title(axis, "one rate? dotted: ln χ")
    axis.legend(loc="lower right")


def _gains(axis: Axes, rows: pd.DataFrame, way: str) -> None:
    gains = remedy_gains(rows).query("way == @way")
    places = {remedy: place for place, remedy in enumerate(REMEDIES)}
    slots = [(patient, when) for patient in PATIENTS for when in ("initial", "trained")]
    for k, (patient, when) in enumerate(slots):
        colour, offset = f"C{k // 2}", (k - 2.5) * 0.14
        style: dict[str, Any] = {"linestyle": "none", "marker": MARKERS[k // 2], "color": colour}
        pairs = gains.query("patient == @patient and when == @when")
        if pairs.empty:  # all diverged
            continue
        axis.plot(pairs["remedy"].map(places) + offset, pairs["gain"], **style, alpha=0.15, markersize=2)
        found = gain_cells(pairs).replace([-np.inf, np.inf], np.nan)  # one pair bounds nothing
        half = [found["estimate"] - found["lo"], found["hi"] - found["estimate"]]
        style["markerfacecolor"] = colour if when == "trained" else "w"
        label = patient if when == "initial" else None
        axis.errorbar(found["remedy"].map(places) + offset, found["estimate"], half, **style, elinewidth=0.8, label=label)
    axis.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(REMEDIES)), list(REMEDIES.values()))
    axis.set(xlabel="remedy (open: before training, full: after)", ylabel="gain over plain (decades)")
    title(axis, f"what a remedy gains {way}s")
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom=bottom - 0.2 * (top - bottom))
    if axis.get_legend_handles_labels()[0]:  # none where every training diverged
        axis.legend(loc="lower center", ncols=3, columnspacing=0.8, handletextpad=0.1)
