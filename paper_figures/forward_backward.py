"""Figure and table of forward_backward: four chains with the measures of both ways, and what each remedy gains either way."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.forward_backward import GAIN, LOCKS, PATIENTS, WAYS, mean_gain, remedy_gains
from paper_figures.style import DASHES, MARKERS, PREDICTION, beyond, criteria, panels, title
from src import mean_field
from src.rows import pick
from src.verdict import cells_by

CHAINS = {"neither": "orthogonal linear", "forwards": "ReLU, σw²=2", "backwards": "latching tanh", "both": "tanh, σw²=1"}
REMEDIES = {"plain": "plain", "skip": "skip", "batch": "BatchNorm", "layer": "LayerNorm", "exits": "auxiliary losses"}
NOTE = "thin lines, small points: single seeds; bars: 95% t-intervals; black: mean field, where it has a rate: χ a layer"
MOMENTS = ("initial", "trained")
WORDS = {"forward": "forwards (decades)", "backward": "backwards (decades)", "accuracy": "test accuracy"}


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: what the four chains do to states (left) and to gradients (right), and what the remedies gain either way."""
    with panels(rows, count=6, columns=2, height=2.25, note=NOTE) as (figure, axes):
        _states(axes[0], rows)
        _signals(axes[1], rows)
        _dimensions(axes[2], rows)
        _severities(axes[3], rows)
        _gains(axes[4], rows, "forward")
        _gains(axes[5], rows, "backward")
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Forwards and backwards against plain, skip, norm and auxiliary losses, for every chain, before and after training.

    Under "plain" the chain's own lock, under a remedy by how much it brings the chain nearer to no lock, paired by seed; decades, each
    with half of its 95% interval; −∞ where a training diverged. Below them the accuracies, and how many of the trainings diverged.
    """
    treated = rows[(rows["part"] == "remedy") & (rows["remedy"] != "local")]
    locks = treated[treated["quantity"].isin(LOCKS) & (treated["remedy"] == "plain")]
    own = locks.assign(way=locks["quantity"].str.removesuffix("_lock"))
    accuracies = pick(treated, "test_accuracy").assign(way="accuracy")
    entries = cells_by(pd.concat([own, remedy_gains(rows), accuracies]), GAIN, mean_gain).set_index(GAIN)
    diverged = pick(treated, "diverged").groupby(["patient", "remedy"])["value"].sum()
    lines = []
    for patient in PATIENTS:
        for when, what in [*((when, way) for when in MOMENTS for way in WAYS), ("trained", "accuracy")]:
            line: dict[str, Any] = {"chain": patient, "when": when, "of": WORDS[what]}
            for remedy, name in REMEDIES.items():
                entry = entries.reindex([(what, when, patient, remedy)]).iloc[0]
                line |= {
                    name: entry["estimate"],
                    f"± {name}": entry["hi"] - entry["estimate"] if np.isfinite(entry["estimate"]) else np.nan,
                }
            lines.append(line)
        counts = {name: diverged[patient, remedy] for remedy, name in REMEDIES.items()}
        lines.append({"chain": patient, "when": "trained", "of": "diverged (nets)", **counts})
    return pd.DataFrame(lines)


def _along(axis: Axes, rows: pd.DataFrame, quantity: str, transform: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """A profile of each of the four chains, seeds thin."""
    for k, (chain, name) in enumerate(CHAINS.items()):
        profile = transform(pick(rows, quantity, part="chain", chain=chain).pivot(index="layer", columns="net_seed", values="value"))
        axis.plot(profile.index, profile, color=f"C{k}", alpha=0.25, linewidth=0.6)
        axis.plot(profile.index, profile.mean(axis=1), color=f"C{k}", linestyle=DASHES[k], label=name)
    axis.set_xlabel("layer l")


def _ranks(axis: Axes, rows: pd.DataFrame, quantity: str) -> None:
    """The mean rank of each of the four chains, as small markers at every fourth layer."""
    for k, chain in enumerate(CHAINS):
        mean = pick(rows, quantity, part="chain", chain=chain).groupby("layer")["value"].mean()
        axis.plot(mean.index, mean, linestyle="none", marker=MARKERS[k], markersize=3, markevery=(k, 4), color=f"C{k}", fillstyle="none")


def _settled(rows: pd.DataFrame) -> tuple[np.ndarray, float]:
    """The layers of the chain that is locked both ways, and its χ."""
    chain = pick(rows, "error_signal", part="chain", chain="both")
    first = chain.iloc[0]
    return np.sort(chain["layer"].unique()), mean_field.chi(first["activation"], first["weight_var"], first["bias_var"])


def _threshold(axis: Axes) -> None:
    axis.axhline(criteria("forward_backward").distinct.given.locked_decades, color="0.3", linewidth=0.8, linestyle=":")


def _states(axis: Axes, rows: pd.DataFrame) -> None:
    _along(axis, rows, "dissimilarity", lambda profile: -np.log10(profile))
    _threshold(axis)
    # 1 − c_l shrinks by χ a layer once the variance has settled; what it starts from is measured
    layers, chi = _settled(rows)
    alike = -np.log10(pick(rows, "dissimilarity", part="chain", chain="both").groupby("layer")["value"].mean())
    start = layers[len(layers) // 2]
    deeper = layers[layers >= start]
    axis.plot(deeper, alike[start] - (deeper - start) * np.log10(chi), **PREDICTION)
    axis.set_ylabel("1/(1 − c_l) (decades)")
    title(axis, "correlation of states; locked above ···")
    axis.legend(loc="upper left")


def _signals(axis: Axes, rows: pd.DataFrame) -> None:
    _along(axis, rows, "error_signal", lambda profile: (profile.iloc[-1] - profile) / np.log(10))
    _threshold(axis)
    layers, chi = _settled(rows)
    axis.plot(layers, (layers - layers[-1]) * np.log10(chi) / 2, **PREDICTION)
    axis.plot(layers, np.zeros_like(layers), **PREDICTION)  # χ = 1, of orthogonal layers exactly, of ReLU's in mean field
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("‖g_{L−1}‖/‖g_l‖ (decades)")
    title(axis, "loss of gradient; locked above ···")


def _dimensions(axis: Axes, rows: pd.DataFrame) -> None:
    _along(axis, rows, "participation", lambda profile: profile)
    _ranks(axis, rows, "state_rank")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("directions of the states")
    title(axis, "participation ratio; markers: rank")


def _severities(axis: Axes, rows: pd.DataFrame) -> None:
    _along(axis, rows, "severity", lambda profile: -np.log10(1 - profile))
    axis.set_ylabel("1/(1 − λ_l) (decades)")
    title(axis, "severity of the gradients")


def _gains(axis: Axes, rows: pd.DataFrame, way: str) -> None:
    gains = remedy_gains(rows).query("way == @way")
    remedies = [remedy for remedy in REMEDIES if remedy != "plain"]
    diverged: list[tuple[float, float, dict[str, Any]]] = []
    for k, (patient, when) in enumerate((patient, when) for patient in PATIENTS for when in MOMENTS):
        pairs = gains.query("patient == @patient and when == @when")
        places = {remedy: place + (k - 2.5) * 0.14 for place, remedy in enumerate(remedies)}
        style: dict[str, Any] = {"linestyle": "none", "marker": MARKERS[k // 2], "color": f"C{k // 2}"}
        found = cells_by(pairs, ["remedy"], mean_gain)
        lost = found[np.isinf(found["estimate"])]
        diverged += [(places[cell.remedy], cell.estimate, style) for cell in lost.itertuples()]
        pairs, found = pairs[np.isfinite(pairs["value"])], found.drop(lost.index).replace([-np.inf, np.inf], np.nan)
        if pairs.empty:
            continue
        axis.plot(pairs["remedy"].map(places), pairs["value"], **style, alpha=0.25, markersize=2)
        half = [found["estimate"] - found["lo"], found["hi"] - found["estimate"]]
        style |= {"markerfacecolor": style["color"] if when == "trained" else "w", "label": patient if when == "initial" else None}
        axis.errorbar(found["remedy"].map(places), found["estimate"], half, **style, elinewidth=0.8)
    axis.axhline(0, color="0.3", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(remedies)), [REMEDIES[remedy] for remedy in remedies])
    axis.set(xlabel="open: untrained, full: trained, ∞: diverged", ylabel="gain over plain (decades)")
    title(axis, f"what a remedy gains {way}s")
    low, high = axis.get_ylim()
    if max(-low, high) > 10:  # decades: one net that went wild would hide all others
        axis.set_yscale("symlog", linthresh=5)
        axis.set_yticks([tick for tick in (-100, -30, -10, -5, 0, 5, 10, 30, 100) if low <= tick <= high])
        axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    signs: tuple[Literal[-1, 1], ...] = (-1, 1)
    for sign in signs:
        if lost_so := [(place, style) for place, gain, style in diverged if gain * sign > 0]:
            at = beyond(axis, "y", sign)
            for place, style in lost_so:
                axis.plot(place, at, **style)
    scale = axis.yaxis.get_transform()
    bottom, top = scale.transform(axis.get_ylim())
    axis.set_ylim(bottom=scale.inverted().transform([bottom - 0.25 * (top - bottom)])[0])
    axis.legend(loc="lower center", ncols=3, columnspacing=0.8, handletextpad=0.1)
