"""Draw figures and tables from rows: `python -m paper_figures [NAME ...] [--results DIR] [--out DIR]`.

The newest finished run of each experiment is drawn; where there is none, the committed reference rows. `ledger` prints the verdicts on
every form of every claim.
Exit code 1 when something could not be drawn, 2 for a name that does not exist.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from rich.console import Console

from paper_figures.ledger import ledger, to_table
from paper_figures.style import to_bytes
from src import rows as row_table
from src.errors import UserError
from src.results import write_atomically

HERE = Path(__file__).parent
FIGURES = sorted(file.stem for file in HERE.glob("*.py") if file.stem not in ("__init__", "__main__", "ledger", "style"))
NAMES = [*FIGURES, "ledger"]


def main() -> int:
    """Answer the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description="Draw figures and tables from rows.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}; all of them when none is given")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the results folder (default: results)")
    parser.add_argument("--out", type=Path, default=HERE / "output", help="where to write (default: paper_figures/output)")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            print(f"error: no figure '{name}'; {hint}there are {', '.join(NAMES)}", file=sys.stderr)
            return 2
    failures = 0
    for name in arguments.names or NAMES:
        try:
            if name == "ledger":
                show_ledger(arguments.results, arguments.out)
                continue
            source = newest_rows(name, arguments.results)
            for file in draw(name, read(name, source), arguments.out):
                print(f"{file}  ←  {source}")
        except (UserError, OSError) as error:
            failures += 1
            print(f"error: {name}: {error}", file=sys.stderr)
    return 1 if failures else 0


def newest_rows(name: str, results: Path) -> Path:
    """The rows of an experiment's newest finished run, else the committed reference.

    Raises: UserError when there are neither.
    """
    runs = row_table.finished_runs(results, name)
    reference = HERE / "reference" / f"{name}.parquet"
    if not runs and not reference.exists():
        raise UserError(f"no finished run under {results} and no reference rows; run python -m src.run experiment={name}")
    return runs[-1] / "rows.parquet" if runs else reference


def read(name: str, source: Path) -> pd.DataFrame:
    """The rows of an experiment from a file.

    Raises: UserError when the file is damaged, or holds none or another experiment's.
    """
    rows = row_table.read(source)
    if set(rows["experiment"]) != {name}:
        raise UserError(f"{source}: not the rows of {name}; run python -m src.run experiment={name} with force=true")
    return rows


def draw(name: str, rows: pd.DataFrame, out: Path) -> list[Path]:
    """Write one figure as PDF and PNG and its table as LaTeX, Markdown and CSV; return the files."""
    module = importlib.import_module(f"paper_figures.{name}")
    figure = module.draw(rows)
    return _write(name, {"pdf": to_bytes(figure, "pdf"), "png": to_bytes(figure, "png"), **_as_text(module.table(rows))}, out)


def show_ledger(results: Path, out: Path) -> None:
    """Print the ledger; write it as LaTeX, Markdown and CSV."""
    lines = ledger(results, HERE / "reference")
    Console(width=None if sys.stdout.isatty() else 200).print(to_table(lines))
    for file in _write("ledger", _as_text(lines), out):
        print(file)


def _as_text(table: pd.DataFrame) -> dict[str, str]:
    """A table in its formats, by the ending of the file."""
    return {
        "tex": table.style.hide(axis="index").format(precision=4, escape="latex").to_latex(hrules=True),
        "md": table.to_markdown(index=False, floatfmt=".4g") + "\n",
        "csv": table.to_csv(index=False),
    }


def _write(name: str, contents: Mapping[str, bytes | str], out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.{kind}" for kind in contents]
    for file, content in zip(files, contents.values(), strict=True):
        write_atomically(file, content)
    return files


if __name__ == "__main__":
    sys.exit(main())
