"""Table of what each experiment takes: wall time, how much of it is training, and on what machine."""

import math

import pandas as pd

from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, Source

UNKNOWN = "no provenance: not known"


def product(shelf: Shelf, mixed: bool) -> Product:
    """The table of the newest run of every experiment on each data set; each line says which run it is of."""
    sources = [(source, source.read()) for name in EXPERIMENTS for source in shelf.each(name)]
    return Product(tabular(table(sources)), sources)


def table(sources: list[tuple[Source, pd.DataFrame]]) -> pd.DataFrame:
    """A line a run; what no provenance tells is said to be unknown. Runs that shared their machine took longer than they would alone."""
    lines = []
    for source, rows in sources:
        run, told = rows.iloc[0], source.told()
        seconds = (told or {}).get("training_seconds", {})
        lines.append(
            {
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
        )
    return pd.DataFrame(lines).astype({"trainings": "Int64"})
