"""The ledger over many runs: how often each form of a claim had which verdict over the root seeds of a sweep."""

import pandas as pd

from paper_figures.ledger import lines_of
from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, gather
from src.verdict import COLOURS

WHERE = ["claim", "form", "data", "scale"]


def product(shelf: Shelf, mixed: bool) -> Product:
    """A line a form, data set and scale; of all finished runs, else of the committed ones."""
    found = gather(EXPERIMENTS, shelf.every, lines_of)
    if not found.taken:
        return Product({}, [], found.complaints)
    return Product(tabular(counted(pd.DataFrame([line for run in found.taken for line in run]))), found.sources, found.complaints)


def counted(lines: pd.DataFrame) -> pd.DataFrame:
    """How the verdicts stand over the runs.

    Args:
        lines: of the ledger, one a run and form.

    Returns: claim, form, data, scale, runs, commits, how many runs have each verdict, and the least, middle and greatest estimate.
    """
    of = lines.groupby(WHERE)
    counts = lines.pivot_table(index=WHERE, columns="verdict", values="seed", aggfunc="count", fill_value=0)
    about = of.agg(runs=("seed", "count"), commits=("commit", lambda commits: ", ".join(sorted(set(commits)))))
    estimates = of["estimate"].agg(["min", "median", "max"]).add_prefix("estimate, ")
    return pd.concat([about, counts.reindex(columns=list(COLOURS), fill_value=0), estimates], axis=1).reset_index()
