"""What can be drawn, by name, and how each comes from rows."""

import importlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import pandas as pd

from paper_figures.sidecar import Product, tabular
from paper_figures.sources import EXPERIMENTS, Shelf, Source, require_one
from src.errors import UserError

Made = TypeVar("Made")
# a table of all claims, by the module that makes it: each has `table(shelf)`
TABLES = ("ledger", "seeds", "published", "zoo", "cost")
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
        source = shelf.newest(name)
        return _drawn(name, [(source, source.read())], mixed)
    if name == "overview":
        module = importlib.import_module("paper_figures.overview")
        return _drawn(name, [(source, source.read()) for source in map(shelf.newest, module.EXPERIMENTS)], mixed)
    module = importlib.import_module(f"paper_figures.{name}")
    return module.product(shelf, mixed)


def _drawn(name: str, sources: Sequence[tuple[Source, pd.DataFrame]], mixed: bool) -> Product:
    tables = [rows for _, rows in sources]
    module, style = importlib.import_module(f"paper_figures.{name}"), importlib.import_module("paper_figures.style")
    first, *others = (source.rows for source, _ in sources)
    files = f"{first} and {len(others)} more" if others else str(first)
    try:
        require_one(tables, mixed)
    except UserError as error:
        raise UserError(f"{files}: {error}") from error
    rows = tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)
    figure, table = _or_partial(files, lambda: (module.draw(rows), module.table(rows)))
    images = {kind: style.to_bytes(figure, kind) for kind in ("pdf", "svg", "png")}
    return Product({**images, **tabular(table)}, sources)


def _or_partial(files: str, make: Callable[[], Made]) -> Made:
    """What is made of rows; that they lack what is shown is told with their file."""
    try:
        return make()
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{files}: partial, its rows lack what is shown ({type(error).__name__}: {error})") from error
