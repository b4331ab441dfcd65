"""Figure and table of information_bottleneck: rank and energy of the error signals before a code, and accuracy, against its width."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.information_bottleneck import BELOW, NETS, PREDICTED
from paper_figures.style import MARKERS, PREDICTION, SEEDS, over_seeds, panels, title
from src.rows import pick

KEYS = ["activation", "code"]
TIMES = {"untrained": "-", "trained": ":"}
INITS = dict(zip(PREDICTED, ("-", "--"), strict=True))
# where an energy is drawn logarithmically from
LEAST = {"untrained": 1e-3, "trained": 0.1}
PARTS = {"code": "-", "filter": "--"}
NOTE = f"{SEEDS}, those of shares and energies cut where there are none: below 0 and, of shares, above 1"


def draw(rows: pd.DataFrame) -> Figure:
    """Six panels: rank before the code and below, energy outside r directions, energy untrained and trained, accuracy."""
    with panels(rows, count=6, columns=3, height=2.4, note=NOTE) as (figure, axes):
        _ranks(axes[0], rows, BELOW, "rank before the code")
        _ranks(axes[1], rows, BELOW - 1, "rank one layer below")
        _leak(axes[2], rows)
        _energy(axes[3], rows, "untrained")
        _energy(axes[4], rows, "trained")
        _accuracy(axes[5], rows)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Gaussian codes: ranks, energy outside r directions, energy over that at r = d; accuracy with code and filter. Means over seeds."""
    columns = {}
    for when in TIMES:
        nets = rows[(rows["when"] == when) & (rows["init"] == "gaussian")]
        for layer in (BELOW, BELOW - 1):
            columns[f"rank g_{layer}, {when}"] = _mean(pick(nets, "signal_rank", layer=layer))
        columns[f"outside, {when}"] = _mean(pick(nets, "outside", layer=BELOW - 1))
        columns[f"energy, {when}"] = _mean(_relative_energy(nets))
    columns |= {f"test accuracy, {part}": _mean(pick(rows, "test_accuracy", part=part)) for part in PARTS}
    return pd.DataFrame(columns).rename_axis(["activation", "r"]).reset_index()


def _mean(values: pd.DataFrame) -> pd.Series:
    return values.groupby(KEYS)["value"].mean()


def _relative_energy(rows: pd.DataFrame) -> pd.DataFrame:
    """The energy that arrives before each code in units of the mean before one as wide as the net."""
    kept = pick(rows, "energy_kept")
    wide = kept[kept["code"] == kept["width"]].groupby(["init", "activation"])["value"].mean()
    return kept.assign(value=kept["value"] / wide.loc[pd.MultiIndex.from_frame(kept[["init", "activation"]])].to_numpy())


def _ranks(axis: Axes, rows: pd.DataFrame, layer: int, what: str) -> None:
    """The rank of the signals at initialisation, with r and C − 1."""
    ranks = pick(rows, "signal_rank", layer=layer, when="untrained", init="gaussian")
    _curves(axis, ranks)
    ends = [ranks["code"].min(), ranks["code"].max()]
    axis.plot(ends, ends, **PREDICTION)
    axis.axhline(ranks["classes"].max() - 1, linestyle=":", **PREDICTION)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel(f"rank of the signals $g_{layer}$")
    title(axis, what)
    colours = [_line(activation, color=f"C{k}", marker=MARKERS[k]) for k, activation in enumerate(NETS)]
    axis.legend(handles=[*colours, *_dashes({"r": "-", "C−1": ":"}, linewidth=0.7)])


def _leak(axis: Axes, rows: pd.DataFrame) -> None:
    leak = pick(rows[rows["code"] < rows["width"]], "outside", layer=BELOW - 1, init="gaussian")
    for when, dash in TIMES.items():
        _curves(axis, leak[leak["when"] == when], dash, (0, 1))
    axis.set_ylabel(f"energy of $g_{BELOW - 1}$ outside r directions")
    title(axis, "leak one layer below")
    axis.legend(handles=_dashes(TIMES))


def _energy(axis: Axes, rows: pd.DataFrame, when: str) -> None:
    """The energy that arrives before the code, with what is predicted of random codes; logarithmic from LEAST on, with room for 0."""
    energy = _relative_energy(rows[rows["when"] == when])
    inits = {init: dash for init, dash in INITS.items() if init in set(energy["init"])}
    widths = np.sort(energy["code"].unique())
    for init, dash in inits.items():
        _curves(axis, energy[energy["init"] == init], dash, (0, np.inf))
        if when == "untrained":
            axis.plot(widths, [PREDICTED[init](width / widths[-1]) for width in widths], **PREDICTION)
    axis.set_yscale("symlog", linthresh=LEAST[when], linscale=0.4)
    axis.set_ylabel(f"energy of $g_{BELOW}$, over that at r = d")
    title(axis, f"energy arriving, {when}")
    axis.legend(handles=[*_dashes(inits), *([_line("predicted", **PREDICTION)] if when == "untrained" else [])])


def _accuracy(axis: Axes, rows: pd.DataFrame) -> None:
    for part, dash in PARTS.items():
        _curves(axis, pick(rows, "test_accuracy", part=part), dash, (0, 1))
    axis.axvline(rows["classes"].max() - 1, linestyle=":", **PREDICTION)
    axis.set(ylabel="test accuracy", ylim=(0, 1), xlabel="r: code units, or filter directions")
    title(axis, "code, gradient filter; ··· C−1")
    axis.legend(handles=_dashes(PARTS), loc="lower right")


def _curves(axis: Axes, values: pd.DataFrame, dash: str = "-", bounds: tuple[float, float] = (0, np.inf)) -> None:
    """A line an activation, means over seeds, with its 95% t-interval; a point a seed."""
    # logarithmic from 1 on, with room for a filter to no direction
    axis.set_xscale("symlog", base=2, linthresh=1)
    for k, activation in enumerate(NETS):
        nets = values[values["activation"] == activation]
        over_seeds(axis, nets, "code", k, bounds=bounds, linestyle=dash)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("code width r")


def _dashes(names: dict[str, str], linewidth: float = 1.2) -> list[Line2D]:
    """What the dashes stand for."""
    return [_line(name, color="k", linestyle=dash, linewidth=linewidth) for name, dash in names.items()]


def _line(name: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=name, **style)
