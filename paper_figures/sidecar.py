"""Writing what is drawn, with a sidecar NAME.json that says from what: rows, config, code, command."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from paper_figures.sources import Source
from src.code import ROOT
from src.results import hash_of, sha256, write_atomically

# of a run
TOLD = ("experiment", "data", "scale", "root_seed", "run", "commit", "dirty")


@dataclass(frozen=True)
class Product:
    """What is drawn under one name.

    Attributes:
        contents: the content of each file by its ending.
        sources: the runs it is drawn from.
        complaints: what could not be taken into it, a line each.
    """

    contents: Mapping[str, bytes | str]
    sources: Sequence[Source]
    complaints: Sequence[str] = ()


def write(name: str, product: Product, out: Path, command: str, code: Mapping[str, object]) -> list[Path]:
    """Write the files of a product and its sidecar; return them.

    Args:
        name: of the files.
        product: what is in them.
        out: the folder; made if need be.
        command: that draws this again.
        code: commit of this repository and whether files differ from it.
    """
    out.mkdir(parents=True, exist_ok=True)
    sidecar = json.dumps(told(name, product, command, code), indent=2, ensure_ascii=False) + "\n"
    contents = {**product.contents, "json": sidecar}
    for kind, content in contents.items():
        write_atomically(out / f"{name}.{kind}", content)
    return [out / f"{name}.{kind}" for kind in contents]


def told(name: str, product: Product, command: str, code: Mapping[str, object]) -> dict[str, Any]:
    """What the sidecar says: by what command and code the files were made, from which rows and settings, and the sha256 of all."""
    configs: dict[str, object] = {}
    return {
        "command": command,
        "code": dict(code),
        "files": {f"{name}.{kind}": _sha256(content) for kind, content in product.contents.items()},
        "rows": [_of(source, configs) for source in product.sources],
        "configs": configs,
    }


def tabular(table: pd.DataFrame, printed: Mapping[str, float | None] | None = None) -> dict[str, str]:
    """A table in its formats, by the ending of the file.

    Args:
        table: texts and numbers; its headings are texts.
        printed: the columns that LaTeX shows, each with a width in cm if it is to be broken into lines; such a table may run over
            pages and needs the package longtable. None: all of them, none broken.
    """
    return {"tex": latex(table, printed), "md": markdown(table), "csv": table.to_csv(index=False)}


def latex(table: pd.DataFrame, printed: Mapping[str, float | None] | None) -> str:
    """A table of booktabs."""
    styled = (table if printed is None else table[list(printed)]).style.hide(axis="index")
    styled.format(_number, escape="latex", na_rep="–").format_index(escape="latex", axis="columns")
    if printed is None:
        return styled.to_latex(hrules=True)
    columns = (rf"p{{{width}cm}}" if width else "l" for width in printed.values())
    return styled.to_latex(hrules=True, environment="longtable", column_format="".join(columns))


def markdown(table: pd.DataFrame) -> str:
    """A table of pipes."""
    safe = table.rename(columns=piped).map(lambda value: piped(value) if isinstance(value, str) else value)
    return safe.to_markdown(index=False, floatfmt=".4g", missingval="–") + "\n"


def _number(value: object) -> object:
    """A number to four digits, as LaTeX prints it; the rest as it is."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return r"$\infty$" if value > 0 else r"$-\infty$"
    digits, _, power = f"{value:.4g}".partition("e")
    return rf"${digits}\times 10^{{{int(power)}}}$" if power else f"${digits}$"


def piped(text: str) -> str:
    """A text as the cell of a table of pipes."""
    return text.replace("|", r"\|")


def shown(path: Path) -> str:
    """A path, from the repository's root on where it lies in it."""
    resolved = path.resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else str(path)


def _of(source: Source, configs: dict[str, object]) -> dict[str, Any]:
    """What is said of one source; its config, but for the seed, is put among those of all, where thousands of runs have few."""
    settings = source.settings()
    if settings is not None:
        del settings["seed"]
        configs[hash_of(settings)] = settings
    return {
        "files": {shown(file): sha256(file) for file in source.files},
        "runs": [{key: stamp[key] for key in TOLD} for stamp in source.stamps],
        "config": None if settings is None else hash_of(settings),
    }


def _sha256(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
