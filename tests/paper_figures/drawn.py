"""Rows as a finished run leaves them, and what every figure must have."""

import importlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from paper_figures.sources import HERE, Shelf
from src import rows as row_table
from src.experiment import stamp_of
from tests.experiments.measured import experiment, module, small_context, small_rows, verdicts

REFERENCE = Shelf(Path("nowhere"), HERE / "reference")
PROVENANCE = {"wall_time_s": 1.0, "training_seconds": {}, "device": "a CPU", "versions": {"torch": "0.0"}}


@cache
def parquet(name: str, run: str = "a-run", fallback: bool = False, **stamp: object) -> bytes:
    """Rows of a tiny run, as its rows.parquet; digits in place of MNIST if it is a fallback."""
    measured = small_context(name)
    own = stamp_of(measured.config, measured.data, run, {"commit": "0" * 40, "dirty": False})
    if fallback:
        own |= {"data_requested": "mnist", "fallback": True}
    return row_table.to_parquet(small_rows(name), experiment(name).QUANTITIES, {**own, **stamp})


def finished_run(results: Path, name: str, run: str = "a-run", data: str = "digits", fallback: bool = False) -> Path:
    """Put a finished run into a results folder; return its rows."""
    folder = results / module(name) / ("mnist" if fallback else data) / "smoke" / f"seed0-{run}"
    folder.mkdir(parents=True)
    (folder / "rows.parquet").write_bytes(parquet(name, run, fallback, data=data, **({} if fallback else {"data_requested": data})))
    (folder / "verdicts.json").write_text(json.dumps([asdict(verdict) for verdict in verdicts(name, small_rows(name)).values()]))
    (folder / "status.json").write_text('{"status": "done"}', encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    return folder / "rows.parquet"


def read(name: str, folder: Path, fallback: bool = False) -> pd.DataFrame:
    file = folder / "rows.parquet"
    file.write_bytes(parquet(name, fallback=fallback))
    return row_table.read(file)


def draw(name: str, rows: pd.DataFrame) -> Figure:
    return importlib.import_module(f"paper_figures.{module(name)}").draw(rows)


def cut_off(figure: Figure) -> list[str]:
    """What is drawn of rows but not within the limits of its panel, markers included: far out, or a zero on a logarithmic axis."""
    found = []
    for axis in figure.axes:
        drawn: list[tuple[Any, float, str]] = []
        for line in axis.get_lines():
            if line.get_transform() is axis.transData and line.zorder <= 2:
                drawn.append((line.get_xydata(), line.get_markersize() * (line.get_marker() not in ("None", "")), str(line.get_label())))
        bars = [bar for container in axis.containers if isinstance(container, ErrorbarContainer) for bar in container.lines[2]]
        drawn += [(ends, 0, "an interval") for bar in bars for ends in bar.get_segments()]
        drawn += [(points.get_offsets(), 0, str(points.get_label())) for points in axis.collections if isinstance(points, PathCollection)]
        box = axis.get_window_extent()
        for points, size, label in drawn:
            there = np.asarray(points, dtype=float)
            there = there[np.isfinite(there).all(axis=1)]
            radius = size / 2 * figure.dpi / 72 - 2  # the width of the axis hides two pixels
            within = axis.transData.transform(there)
            if not ((within - radius >= box.p0) & (within + radius <= box.p1)).all():
                found.append(f"{axis.get_label()}: {label}")
    return found


def check_panels(figure: Figure) -> None:
    """Every panel has its letter, a title and labelled axes, and shows something."""
    lettered = [axis for axis in figure.axes if axis.get_label() in set("abcdefghijkl")]
    assert lettered
    for letter, axis in zip("abcdefghijkl", lettered, strict=False):
        assert axis.get_title(loc="left").startswith(rf"$\mathbf{{{letter}}}$  ")
        assert len(axis.get_title(loc="left")) > len(rf"$\mathbf{{{letter}}}$  ")
        assert axis.get_xlabel()
        assert axis.get_ylabel()
        assert axis.has_data()
        for line in axis.get_lines():
            assert np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any(), (letter, line.get_label())
