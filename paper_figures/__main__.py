"""Draw figures and tables from rows: `python -m paper_figures [NAME ...] [--data SET] [--results DIR] [--out DIR] [--mixed]`.

    python -m paper_figures                 draws all of them, and a page that shows them, from the newest finished run of each
                                            experiment, else from the committed reference rows; never trains
    python -m paper_figures ledger          the verdict on every form of every claim
    python -m paper_figures --check         holds the runs under --results against the reference
    python -m paper_figures wandb           holds what W&B's offline runs hold against the run folders

Exit code 1 when something could not be drawn, is not reproduced or differs, 2 for what the user can mend.
"""

import argparse
import difflib
import sys
from pathlib import Path

from paper_figures import drawing
from paper_figures.products import NAMES
from paper_figures.sources import HERE, Shelf
from src.data.catalogue import CATALOGUE
from src.errors import UserError


def main() -> int:
    """Answer the command line; return the exit code."""
    asked = _parser().parse_args()
    shelf = Shelf(asked.results, HERE / "reference", asked.data)
    try:
        if asked.results != drawing.DEFAULT and not asked.results.is_dir():
            raise UserError(f"--results {asked.results}: no such folder")
        if asked.check:
            from paper_figures.check import show_check

            return show_check(shelf, asked.names, asked.out)
        if asked.names == ["wandb"]:
            from paper_figures.mirror import show_mirror

            return show_mirror(asked.results, asked.out)
        _refuse_unknown(asked.names)
        everything = not asked.names or "page" in asked.names
        names = NAMES if everything else asked.names
        return drawing.draw_all(names, shelf, asked.out, asked.mixed, page=everything)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description="Draw figures and tables from rows.")
    known = f"one of {', '.join(NAMES)}, page or wandb; all of them and the page when none is given"
    parser.add_argument("names", nargs="*", metavar="NAME", help=known)
    parser.add_argument("--data", choices=CATALOGUE, help="only what was measured on this data set (default: on any)")
    parser.add_argument("--results", type=Path, default=drawing.DEFAULT, help="the results folder (default: results)")
    parser.add_argument("--out", type=Path, default=HERE / "output", help="where to write (default: paper_figures/output)")
    parser.add_argument("--mixed", action="store_true", help="draw a figure though its rows mix commits, data sets or scales, and say so")
    parser.add_argument("--check", action="store_true", help="compare the verdicts under --results with the reference, form by form")
    return parser


def _refuse_unknown(names: list[str]) -> None:
    known = [*NAMES, "page", "wandb"]
    for name in names:
        if name == "wandb":
            raise UserError("wandb stands alone: python -m paper_figures wandb [--results DIR]")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"no figure or table '{name}'; {hint}there are {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
