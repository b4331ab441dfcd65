"""How figures look and how they become bytes: the same rows give the same bytes."""

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from paper_figures.sources import mixture, stamps_of
from src.run import CONF
from src.statistics import t_interval

WIDE, NARROW = 7.2, 3.5  # inches: two columns of a page, and one
SMALL = 7  # points: the least that prints legibly
RC: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    # C0, C1 … are looked up when a figure becomes bytes
    "axes.prop_cycle": cycler(color=sns.color_palette("colorblind")),
    "svg.hashsalt": "backlock",
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}
THEME: dict[Any, Any] = {**sns.axes_style("ticks"), **sns.plotting_context("paper")}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
# the place of each is its colour, marker and dash in every figure, whatever else a figure shows
ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid")
# rows are drawn at Matplotlib's own depths of collections and lines, 1 and 2; what is predicted lies above them or below
PREDICTION: dict[str, Any] = {"color": "k", "linewidth": 0.7, "zorder": 2.5}
SEEDS = "points: single seeds; lines: means with 95% t-intervals"


@contextmanager
def panels(
    rows: pd.DataFrame, count: int, columns: int, height: float, wide: Collection[int] = (), note: str = "", width: float = WIDE
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of lettered panels, with a line on where its rows come from; a fallback data set is called out in red.

    What Matplotlib warns of while it is drawn is told only of a figure whose panels all show rows.

    Args:
        rows: what is drawn.
        count: panels.
        columns: panels in a line.
        height: of a line of panels, inches.
        wide: the panels, counted from 0, that take two columns.
        note: a line on what all panels have in common.
        width: of the figure, inches.

    Raises: ValueError when a panel shows no row.
    """
    spans = [2 if place in wide else 1 for place in range(count)]
    starts = np.cumsum([0, *spans])
    with mpl.rc_context(THEME | RC), warnings.catch_warnings(record=True, action="always") as told:
        lines = -(-starts[-1] // columns)
        figure = Figure(figsize=(width, height * lines), layout="constrained")
        grid = figure.add_gridspec(lines, columns)
        places = [(start // columns, slice(start % columns, start % columns + span)) for start, span in zip(starts, spans, strict=False)]
        axes = [figure.add_subplot(grid[place], label=letter) for letter, place in zip("abcdefghijkl", places, strict=False)]
        yield figure, axes
        if empty := [axis.get_label() for axis in axes if not shows_rows(axis)]:
            raise ValueError(f"no rows for {'panel' if len(empty) == 1 else 'panels'} {', '.join(map(str, empty))}")
        sns.despine(fig=figure)
        alarming = rows["fallback"].any() or mixture(stamps_of(rows))
        below = f"{origin(rows)}\n{note}".rstrip()
        figure.supxlabel(below, fontsize=SMALL, color="tab:red" if alarming else "0.4", x=0.99, ha="right")
        _set_subscripts(figure)
    for warning in told:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def shows_rows(axis: Axes) -> bool:
    """Whether a panel shows any row: a finite value that is neither predicted nor a mark across the whole panel."""
    lines = [line.get_xydata() for line in axis.get_lines() if line.get_transform() is axis.transData and line.zorder in (1, 2)]
    points = [found.get_offsets() for found in axis.collections if isinstance(found, PathCollection)]
    meshes = [found.get_array() for found in axis.collections if isinstance(found, QuadMesh)]
    values: Iterator[np.ndarray] = (np.ma.filled(np.ma.asarray(drawn, dtype=float), np.nan) for drawn in (*lines, *points, *meshes))
    return any(np.isfinite(each.reshape(len(each), -1)).all(axis=1).any() for each in values)


def over_seeds(
    axis: Axes,
    nets: pd.DataFrame,
    x: str,
    k: int,
    label: str | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    geometric: bool = False,
    **look: Any,
) -> None:
    """Every seed as a point, and a line through their means with their 95% t-intervals.

    Seaborn's own intervals are bootstraps, which cover too little at few seeds.

    Args:
        axis: to draw on.
        nets: a row a seed, with the columns x and value.
        x: the column across.
        k: the place of these nets among those compared: their colour, marker and dash.
        label: in the legend.
        bounds: what the quantity lies between; intervals are cut there, which the figure must say.
        geometric: whether means and intervals are those of logarithms; values are above 0 then.
        look: of the means, where it isn't that of k.
    """
    nets = nets[np.isfinite(nets["value"])]
    if nets.empty:
        return
    look = {"color": f"C{k}", "marker": MARKERS[k], "linestyle": DASHES[k], "markersize": 3.5, "elinewidth": 0.9} | look
    axis.plot(nets[x], nets["value"], linestyle="none", marker=look["marker"], color=look["color"], alpha=0.25, markersize=2.5)
    to, back = (np.log, np.exp) if geometric else (np.asarray, np.asarray)
    found = {at: t_interval(to(values)) for at, values in nets.groupby(x)["value"]}
    means = back([estimate.value for estimate in found.values()])
    ends = np.array([[each.lo, each.hi] for each in found.values()]).T
    ends = back(np.where(np.isinf(ends), np.nan, ends))  # a single seed has no interval
    errors = np.abs(np.clip(ends, *bounds) - means)
    axis.errorbar(np.array(list(found), dtype=float), means, errors, label=label, **look)


def beyond(axis: Axes, along: Literal["x", "y"], sign: Literal[-1, 1]) -> float:
    """Make room for what is infinite: a grey row beyond all that is finite, ticked −∞ or ∞; return where it is along the axis."""
    scaled = axis.xaxis if along == "x" else axis.yaxis
    scale = scaled.get_transform()
    low, high = scale.transform(sorted(axis.get_xlim() if along == "x" else axis.get_ylim()))
    ticks = [tick for tick in scaled.get_majorticklocs() if low <= scale.transform([tick])[0] <= high]
    labels = scaled.get_major_formatter().format_ticks(ticks)
    places = (low if sign < 0 else high) + sign * 0.18 * (high - low) * np.array([0.25, 0.6, 0.95])
    near, at, far = scale.inverted().transform(places)
    (axis.axvspan if along == "x" else axis.axhspan)(near, far, color="0.93", zorder=0)
    scaled.minorticks_off()
    scaled.set_ticks([*ticks, at], labels=[*labels, "−∞" if sign < 0 else "∞"])
    axis.set(**{f"{along}lim": scale.inverted().transform([min(low, places[2]), max(high, places[2])])})
    return float(at)


def title(axis: Axes, text: str) -> None:
    """The panel's letter and what it shows."""
    axis.set_title(rf"$\mathbf{{{axis.get_label()}}}$  {text}", loc="left")


def _set_subscripts(figure: Figure) -> None:
    """Write J_l and g_{L−1} with their subscripts below the line, wherever a panel's words have them."""
    for axis in figure.axes:
        texts = [axis.xaxis.label, axis.yaxis.label, axis.title, axis._left_title, *axis.texts]  # type: ignore[attr-defined]
        for legend in (axis.get_legend(), *figure.legends):
            texts += [*legend.get_texts(), legend.get_title()] if legend else []
        for text in texts:
            text.set_text(subscripts(text.get_text()))
        for labelled in (axis.xaxis, axis.yaxis):
            labels = [label.get_text() for label in labelled.get_ticklabels()]
            if labels != (set_off := [subscripts(label) for label in labels]):
                labelled.set_ticklabels(set_off)


def subscripts(text: str) -> str:
    """A text with its subscripts in mathtext, but for what is mathtext already."""
    outside = text.split("$")[::2]
    inside = text.split("$")[1::2]
    set_off = [re.sub(r"_(\{[^}]*\}|back|min|\w)", lambda found: rf"$_{{{found[1].strip('{}')}}}$", part) for part in outside]
    return "".join(part for pair in zip(set_off, [*(f"${part}$" for part in inside), ""], strict=False) for part in pair)


def origin(rows: pd.DataFrame) -> str:
    """Where rows come from, in one line."""
    first = rows.iloc[0]
    images, seeds, runs = (_span(rows[column]) for column in ("train_images", "root_seed", "run"))
    where = f"{_span(rows['data'])}, {images} training images, scale={_span(rows['scale'])}, seed {seeds}, "
    where += f"run {runs}" if "," not in runs else f"{rows['run'].nunique()} runs"
    if told := mixture(stamps_of(rows)):
        where = f"MIXED {told} — {where}"
    return f"FALLBACK: measured on {first['data']} in place of {first['data_requested']} — {where}" if rows["fallback"].any() else where


def _span(values: pd.Series) -> str:
    """The one value there is, or all of them; numbers from the least to the greatest."""
    found = sorted(values.unique())
    if isinstance(found[0], str):
        return ", ".join(found)
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,}–{found[-1]:,}"


def criteria(experiment: str) -> Any:
    """The criteria of an experiment, for the limits that its figure shows."""
    return OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").criteria


def to_bytes(figure: Figure, kind: Literal["png", "pdf", "svg"]) -> bytes:
    """A figure as the bytes of a file, without the time it was made."""
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}[kind]
    with mpl.rc_context(RC):
        if layout := figure.get_layout_engine():
            # one layout for all formats; with any engine left, "none" too, Matplotlib would draw each twice
            layout.execute(figure)
            figure.set_layout_engine(None)
        out = BytesIO()
        figure.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()
