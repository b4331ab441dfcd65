"""index.html: all figures and the ledger in one file that needs neither network nor server."""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from paper_figures.ledger import ledger
from paper_figures.sidecar import Product, write
from paper_figures.sources import HERE, Shelf
from src.verdict import COLOURS, phrase

HEADINGS = ("form", "as", "statement", "verdict", "estimate", "interval", "n", "data", "scale")


def write_page(shelf: Shelf, out: Path, figures: Sequence[str], code: Mapping[str, object]) -> list[Path]:
    """Write index.html and its sidecar; return them.

    Args:
        shelf: where the ledger's verdicts are looked for.
        out: the folder with the figures' SVG, where the page goes too.
        figures: the names of those that were drawn.
        code: commit of this repository and whether files differ from it.
    """
    lines, sources, _ = ledger(shelf)
    page = render(lines, {name: (out / f"{name}.svg").read_text(encoding="utf-8") for name in figures})
    return write("index", Product({"html": page}, sources), out, "python -m paper_figures page", code)


def render(lines: pd.DataFrame, figures: Mapping[str, str]) -> str:
    """The page.

    Args:
        lines: the ledger.
        figures: the SVG of each figure by its name.
    """
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    told = [_told(line) for line in lines.astype(object).where(lines.notna(), "").to_dict("records")]
    claims, verdicts, data = (sorted({line[column] for line in told} - {""}) for column in ("experiment", "verdict", "data"))
    where = lines[["data", "scale", "seed", "commit"]].dropna().drop_duplicates().itertuples(index=False)
    return environment.get_template("page.html.jinja").render(
        lines=told,
        claims=claims,
        headings=HEADINGS,
        words=list(COLOURS),
        filters=[("claim", "claim", claims), ("verdict", "verdict", verdicts), ("data", "data set", data)],
        origin="; ".join(f"{run.data} at scale={run.scale}, seed {run.seed:.0f}, commit {run.commit}" for run in where),
        figures=[{"name": name, "svg": Markup(inline(svg, name)), "caption": caption(name)} for name, svg in figures.items()],
    )


def inline(svg: str, name: str) -> str:
    """An SVG as part of a page: without its prologue and metadata, and with ids that no other figure has."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg)
    return re.sub(r"url\(#", f"url(#{name}-", svg)


def caption(name: str) -> str:
    """What a figure shows: the first paragraph of its module's docstring, read without importing the module."""
    module = ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(module) or "").replace("\n\n", " ").replace("\n", " ")


def _told(line: Mapping[Any, Any]) -> dict[str, Any]:
    """A line of the ledger as the page shows it."""
    known = line["estimate"] != "" and math.isfinite(line["estimate"])
    return {
        **line,
        "experiment": line["claim"].partition("/")[0],
        "claim": line["claim"].replace("/", "/\u200b"),
        "form": line["form"].replace("_", " "),
        "told": phrase(line["verdict"], line["condition"]),
        "key": line["estimate"] if known else "",
        "estimate": _short(line["estimate"]),
        "interval": f"[{_short(line['lo'])}, {_short(line['hi'])}]" if known else "",
        "n": "" if line["n"] == "" else int(line["n"]),
    }


def _short(value: Any) -> str:
    return "–" if value == "" else f"{value:.4g}".replace("-", "−")
