"""Table of what each experiment takes: wall time, how much of it is training, and on what machine."""

from collections.abc import Sequence

import pandas as pd

from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, Source, gather


def product(shelf: Shelf, mixed: bool) -> Product:
    """The table of the newest run of every experiment on each data set at each scale; each line says which run it is of."""
    found = gather(EXPERIMENTS, shelf.each, line)
    return Product(tabular(table(found.taken)), found.sources, found.complaints)


def line(source: Source) -> dict[str, object]:
    """The line of a run. Runs that shared their machine took longer than they would alone."""
    run, told = source.stamps[0], source.told()
    seconds = told["training_seconds"]
    return {
        "experiment": source.experiment,
        "data": run["data"],
        "scale": run["scale"],
        "seed": run["root_seed"],
        "wall time (s)": told["wall_time_s"],
        "of it training (s)": round(sum(seconds.values()), 1),
        "trainings": len(seconds),
        "rows": len(source.read()),
        "device": told["device"],
        "torch": told["versions"]["torch"],
        "commit": run["commit"][:7],
    }


def table(lines: Sequence[dict[str, object]]) -> pd.DataFrame:
    """The lines as a table."""
    return pd.DataFrame(lines)
