"""Figure and table of certificate: accuracy against each entry, rank correlations with intervals, foretold against reached accuracy."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.certificate import CONVOLUTIONAL, ENTRIES, K_BACK, KINDS, READINGS, networks, told
from paper_figures.style import MARKERS, PREDICTION, beyond, criteria, panels, title
from src.prediction import association, predict_left_out, rank_correlation
from src.statistics import Estimate

NAMES = {
    "attenuation": "Σ ln ‖J_l‖",
    "rank": "min rank J_l",
    "conditioning": "max cond J_l",
    "skip_depth": "skip depth",
    "attenuation_either_way": "|Σ ln ‖J_l‖|",
    "relative_rank": "relative rank",
    "severity": "λ as stated",
    "severity_nonzero": "λ, nonzero σ",
    "lock_condition": "share locked",
    "gradient_ratio": "|ln ‖g_1‖/‖g_L‖|",
    "chi": "|½ Σ ln χ_l|",
    "path_depth": "depth (control)",
    "width": "width (control)",
}
# of the six readings whose scatter is shown: the axis, its scale, and whether the reading is the quantity's negative
SHOWN = {
    "attenuation": ("Σ ln ‖J_l‖ (nats)", "symlog", 1),
    "rank": ("min rank J_l", "linear", 1),
    "conditioning": ("max cond J_l", "log", -1),
    "skip_depth": ("skip depth (weight layers)", "linear", -1),
    "gradient_ratio": ("|ln ‖g_1‖/‖g_L‖| (nats)", "symlog", -1),
    "severity": ("severity λ, mean over stages", "linear", -1),
}
COMBINATIONS = {"best of K_back": K_BACK, "best of all": tuple(READINGS)}  # each foretells a family from the others
LEVEL = float(criteria("certificate").rank_predicts.at_least)  # of a correlation that counts
WORDS = {"predicts": "", "predicts nothing": ": nothing", "predicts the reverse": ": the reverse", "undecided": ": undecided"}
MARKS = {"predicts": "o", "predicts nothing": "D", "predicts the reverse": "v", "undecided": "s"}
COLOURS = {"predicts": "C2", "predicts nothing": "0.5", "predicts the reverse": "C3", "undecided": "C1"}


def draw(rows: pd.DataFrame) -> Figure:
    """Nine panels: accuracy against six readings, rank correlations, and the accuracy that two combinations foretell."""
    nets = networks(rows)
    combined = {name: predict_left_out(nets, readings, "accuracy", "kind") for name, readings in COMBINATIONS.items()}
    with panels(rows, count=9, columns=3, height=2.4) as (figure, axes):
        rhos = {reading: association(nets[reading], nets["accuracy"]) for reading in NAMES}
        for axis, reading in zip(axes, SHOWN, strict=False):
            _against(axis, nets, reading, rhos[reading])
        _correlations(axes[6], nets, rhos, combined)
        for axis, (name, foretold) in zip(axes[7:], combined.items(), strict=True):
            _foretold(axis, foretold, name)
        kinds = axes[0].get_legend_handles_labels()[0]
        said = [Line2D([], [], color=COLOURS[words], marker=mark, label=f"g: {words}") for words, mark in MARKS.items()]
        figure.legend(handles=[*kinds, *said], loc="outside upper center", ncols=4, columnspacing=1)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Spearman's ρ of every reading with the accuracy over the zoo, its interval and what it says; ρ within each width and each family.

    The last lines are those of the best combinations, each family foretold from the others.
    """
    nets = networks(rows)
    known = rows.groupby("quantity")["known"].first()
    quantities = {name: quantity for name, (quantity, _) in READINGS.items()}
    lines = []
    for reading, name in NAMES.items():
        kind = {"reading": name, "in K_back": "yes" if reading in ENTRIES else "no", "known": known.get(quantities.get(reading), "exact")}
        lines.append({**kind, **_line(nets, nets[reading])})
    for name, readings in COMBINATIONS.items():
        kind = {"reading": f"{name}, family left out", "in K_back": "yes" if readings is K_BACK else "no", "known": "fitted"}
        foretold = predict_left_out(nets, readings, "accuracy", "kind")
        lines.append({**kind, **_line(foretold, foretold["predicted"])})
    return pd.DataFrame(lines)


def _line(nets: pd.DataFrame, values: pd.Series) -> dict[str, Any]:
    rho = association(values, nets["accuracy"])
    within = {f"ρ, {kind}": rank_correlation(values[part.index], part["accuracy"]) for kind, part in nets.groupby("kind")}
    fixed = association(values, nets["accuracy"], nets["width"])
    given = {"ρ, given width": fixed.value, "given width, low": fixed.lo, "given width, high": fixed.hi}
    return {"ρ": rho.value, "low": rho.lo, "high": rho.hi, "says": told(rho, LEVEL), **given, **within, "architectures": rho.n}


def _kinds(nets: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kind of network and how its points look."""
    for k, kind in enumerate((*KINDS.values(), CONVOLUTIONAL)):
        if (nets["kind"] == kind).any():
            yield kind, {"marker": MARKERS[k], "color": f"C{k}", "label": kind, "linestyle": "none", "alpha": 0.5, "markersize": 3}


def _against(axis: Axes, nets: pd.DataFrame, reading: str, rho: Estimate) -> None:
    """The accuracy reached against one reading, a point an architecture: right is less locked."""
    label, scale, sign = SHOWN[reading]
    values = sign * nets[reading]
    finite = values[np.isfinite(values)]
    axis.set_xscale(scale)
    for kind, look in _kinds(nets):
        axis.plot(finite[nets["kind"] == kind], nets.loc[finite.index, "accuracy"][nets["kind"] == kind], **look)
    if scale == "symlog" and finite.min() < 0 < finite.max():  # ticks at ±1 would run into the one at 0
        axis.set_xticks([tick for tick in (-100, -10, 0, 10, 100) if finite.min() <= tick <= finite.max()])
    if np.isinf(values).any():
        at = beyond(axis, "x", -1 if sign > 0 else 1)
        for kind, look in _kinds(nets):
            lost = nets.loc[np.isinf(values) & (nets["kind"] == kind), "accuracy"]
            if len(lost):
                axis.plot([at] * len(lost), lost, **look | {"label": None})
    if sign < 0:
        axis.invert_xaxis()
    axis.set(xlabel=label, ylabel="test accuracy", ylim=(0, 1))
    title(axis, f"ρ = {rho.value:.2f}{WORDS[told(rho, LEVEL)]}".replace("-", "−"))


def _correlations(axis: Axes, nets: pd.DataFrame, rhos: Mapping[str, Estimate], combined: Mapping[str, pd.DataFrame]) -> None:
    """ρ of every reading and combination with its interval and what that says, K_back's filled, and ρ within each width as a cross.

    Dotted: the criterion's level.
    """
    found = [(name, reading in ENTRIES, nets, nets[reading], rhos[reading]) for reading, name in NAMES.items()]
    for name, n in combined.items():
        found.append((name, COMBINATIONS[name] is K_BACK, n, n["predicted"], association(n["predicted"], n["accuracy"])))
    for place, (_, is_entry, n, values, rho) in enumerate(found):
        colour = COLOURS[told(rho, LEVEL)]
        axis.plot(rank_correlation(values, n["accuracy"], n["width"]), place, "x", color="k", markersize=3)
        axis.plot([rho.lo, rho.hi], [place, place], color=colour)
        axis.plot(rho.value, place, MARKS[told(rho, LEVEL)], color=colour, markerfacecolor=colour if is_entry else "w")
    for level, dash in ((0, "-"), (LEVEL, ":")):
        axis.plot([level, level], [-0.5, len(found) - 0.5], color="0.3", linewidth=0.8, linestyle=dash)  # not through the legend
    axis.set_yticks(range(len(found)), [name for name, *_ in found])
    axis.set(xlim=(-1, 1), ylim=(len(found) - 0.5, -0.5), xlabel="Spearman ρ with accuracy", ylabel="reading (K_back filled)")
    title(axis, "95% intervals; ×: within a width")


def _foretold(axis: Axes, foretold: pd.DataFrame, what: str) -> None:
    """The accuracy of each family as fitted to the others, against the accuracy reached; black: where the two agree."""
    for kind, look in _kinds(foretold):
        part = foretold[foretold["kind"] == kind]
        rho = rank_correlation(part["predicted"], part["accuracy"])
        axis.plot(part["predicted"], part["accuracy"], **{**look, "label": f"{kind}, {rho:.2f}"})
    axis.plot([0, 1], [0, 1], **PREDICTION)
    axis.set(xlabel="foretold accuracy", ylabel="test accuracy", ylim=(0, 1.5), yticks=np.linspace(0, 1, 6))
    title(axis, f"{what}, family left out")
    # above the points
    axis.legend(title="ρ within", loc="upper left", bbox_to_anchor=(0, 1), handletextpad=0.1, borderpad=0.1, labelspacing=0.3)
