"""How figures look and how they become bytes: the same rows give the same bytes."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from paper_figures.sources import mixture
from src.run import CONF
from src.statistics import t_interval

WIDE = 7.2  # inches: two columns
RC: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "backlock",
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    "legend.title_fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}
THEME: dict[Any, Any] = {**sns.axes_style("ticks"), **sns.plotting_context("paper")}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


@contextmanager
def panels(rows: pd.DataFrame, count: int, columns: int, height: float, wide: Collection[int] = ()) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of lettered panels, with a line on where its rows come from; a fallback data set is called out in red.

    Args:
        rows: what is drawn.
        count: panels.
        columns: panels in a line.
        height: of a line of panels, inches.
        wide: the panels, counted from 0, that take two columns.
    """
    spans = [2 if place in wide else 1 for place in range(count)]
    starts = np.cumsum([0, *spans])
    with mpl.rc_context(THEME | RC), sns.color_palette("colorblind"):
        lines = -(-starts[-1] // columns)
        figure = Figure(figsize=(WIDE, height * lines), layout="constrained")
        grid = figure.add_gridspec(lines, columns)
        places = [(start // columns, slice(start % columns, start % columns + span)) for start, span in zip(starts, spans, strict=False)]
        axes = [figure.add_subplot(grid[place], label=letter) for letter, place in zip("abcdefghijkl", places, strict=False)]
        yield figure, axes
        sns.despine(fig=figure)
        alarming = rows["fallback"].any() or mixture([rows])
        figure.supxlabel(origin(rows), fontsize=6, color="tab:red" if alarming else "0.4", x=0.99, ha="right")
        _set_subscripts(figure)


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
    if told := mixture([rows]):
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


def t_error(values: np.ndarray) -> tuple[float, float]:
    """The 95% t-interval, for seaborn: its own bootstrap covers too little at few seeds."""
    interval = t_interval(values)
    return interval.lo, interval.hi


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
