"""Drawing many figures and tables, in as many processes as there are cores; one that fails is told and leaves the others alone."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from paper_figures.ledger import ledger, to_table
from paper_figures.products import FIGURES, produce
from paper_figures.sidecar import shown, write
from paper_figures.sources import Shelf
from src import code
from src.errors import UserError
from src.processes import PROCESSES, cpus

DEFAULT = Path("results")
PRELOADED = ["paper_figures.overview", "src.run"]


@dataclass(frozen=True)
class Drawn:
    """What came of one name: its files, the rows they are drawn from, and what went wrong, a line each."""

    name: str
    files: Sequence[Path]
    rows: Sequence[Path]
    complaints: Sequence[str]


def draw_all(names: Sequence[str], shelf: Shelf, out: Path, mixed: bool, page: bool) -> int:
    """Draw what is named, telling each file and each fault in a line; return the exit code.

    Args:
        names: of products.NAMES.
        shelf: where rows are looked for.
        out: the folder to write to.
        mixed: whether rows of several commits, data sets or scales may stand in one figure.
        page: whether to make index.html of it.
    """
    figures: list[str] = []
    faults: set[str] = set()
    for drawn in _each(names, partial(_draw, shelf=shelf, out=out, mixed=mixed, revision=code.commit())):
        sources = f"  ←  {', '.join(map(str, drawn.rows))}" if len(drawn.rows) == 1 else f"  ←  {len(drawn.rows)} tables of rows"
        for file in drawn.files:
            print(f"{file}{sources}", flush=True)
        figures += [drawn.name] if drawn.files and drawn.name in FIGURES else []
        # a damaged file is told once, whatever it is missing in
        for complaint in dict.fromkeys(drawn.complaints):
            if complaint not in faults:
                print(f"error: {drawn.name}: {' '.join(complaint.split())}", file=sys.stderr, flush=True)
            faults.add(complaint)
    if list(names) == ["ledger"]:
        Console(width=None if sys.stdout.isatty() else 200).print(to_table(ledger(shelf)[0]))
    if page:
        from paper_figures.page import write_page

        for file in write_page(shelf, out, figures, code.commit()):
            print(file)
    return 1 if faults else 0


def _each(names: Sequence[str], draw: partial) -> Iterator[Drawn]:
    """What comes of each name, in order."""
    if (processes := min(len(names), cpus())) == 1:
        yield from map(draw, names)
        return
    PROCESSES.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(processes, PROCESSES) as pool:
        yield from pool.map(draw, names)


def _draw(name: str, shelf: Shelf, out: Path, mixed: bool, revision: dict[str, object]) -> Drawn:
    again = ["python -m paper_figures", name, *([f"--results {shown(shelf.results)}"] if shelf.results != DEFAULT else [])]
    command = " ".join([*again, *([f"--data {shelf.data}"] if shelf.data else []), *(["--mixed"] if mixed else [])])
    try:
        product = produce(name, shelf, mixed)
        files = write(name, product, out, command, revision) if product.contents else []
    except (UserError, OSError) as error:
        return Drawn(name, [], [], [str(error)])
    return Drawn(name, files, [source.rows for source in product.sources], product.complaints)
