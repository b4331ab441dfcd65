"""What can be drawn, by name, and how each comes from rows."""

import importlib
from collections.abc import Sequence

import pandas as pd

from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, Source, lacking, require_one

# a table of all claims, by the module that makes it: each has `product(shelf, mixed)`
TABLES = ("ledger", "seeds", "published", "reproduction", "zoo", "cost")
FIGURES = ("overview", *EXPERIMENTS)
NAMES = (*FIGURES, *TABLES, "numbers", "summary")


def produce(name: str, shelf: Shelf, mixed: bool) -> Product:
    """Draw one figure with its table, or make one table.

    Args:
        name: of NAMES.
        shelf: where rows are looked for.
        mixed: whether rows of several commits, data sets or scales may stand together, as its caption then says.

    Raises: UserError naming the file whose rows are missing, damaged, foreign or partial, or what rows mix that must not.
    """
    if name in EXPERIMENTS:
        return _drawn(name, [shelf.newest(name)], mixed)
    if name == "overview":
        module = importlib.import_module("paper_figures.overview")
        return _drawn(name, list(map(shelf.newest, module.EXPERIMENTS)), mixed)
    module = importlib.import_module(f"paper_figures.{name}")
    return module.product(shelf, mixed)


def _drawn(name: str, sources: Sequence[Source], mixed: bool) -> Product:
    tables = [source.read() for source in sources]
    module, style = importlib.import_module(f"paper_figures.{name}"), importlib.import_module("paper_figures.style")
    files = [source.rows for source in sources]
    if not mixed:
        require_one(
            [stamp for source in sources for stamp in source.stamps],
            f"{files[0]} and {len(files) - 1} more" if files[1:] else str(files[0]),
        )
    rows = tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)
    with lacking(*files):
        figure, table = module.draw(rows), module.table(rows)
    images = {kind: style.to_bytes(figure, kind) for kind in ("pdf", "svg", "png")}
    return Product({**images, **tabular(table)}, sources)
