"""Table of what each experiment takes: wall time, how much of it is training, and on what machine."""

import math
from collections.abc import Sequence

import pandas as pd

from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, Source, gather

UNKNOWN = "no provenance: not known"


def product(shelf: Shelf, mixed: bool) -> Product:
    """The table of the newest run of every experiment on each data set at each scale; each line says which run it is of."""
    found = gather(EXPERIMENTS, shelf.each, line)
    return Product(tabular(table(found.taken)), found.sources, found.complaints)


def line(source: Source, rows: pd.DataFrame) -> dict[str, object]:
    """The line of a run; what no provenance tells is said to be unknown.

    Runs that shared their machine took longer than they would alone.
    """
    run, told = rows.iloc[0], source.told()
    seconds = (told or {}).get("training_seconds", {})
    return {
        "experiment": source.experiment,
        "data": run["data"],
        "scale": run["scale"],
        "seed": run["root_seed"],
        "wall time (s)": told["wall_time_s"] if told else math.nan,
        "of it training (s)": round(sum(seconds.values()), 1) if told else math.nan,
        "trainings": len(seconds) if told else math.nan,
        "rows": len(rows),
        "device": told["device"] if told else UNKNOWN,
        "torch": told["versions"]["torch"] if told else "",
        "commit": run["commit"][:7],
    }


def table(lines: Sequence[dict[str, object]]) -> pd.DataFrame:
    """The lines as a table."""
    return pd.DataFrame(lines).astype({"trainings": "Int64"} if lines else {})
