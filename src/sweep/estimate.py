"""What the missing runs of a sweep will take: by finished runs of their kinds in the results, or else by the committed ones."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.code import ROOT
from src.sweep.folder import Sweep
from src.sweep.plan import Run

SAMPLED = 5  # finished runs whose time tells that of their like
COMMITTED = ROOT / "paper_figures/reference"


def estimate(sweep: Sweep, missing: Sequence[Run], gpus: float) -> str:
    """How many runs there are to do, the hours of work and of GPUs, and on what these were timed, in words.

    Args:
        sweep: whose runs.
        missing: the runs to do.
        gpus: that each has.
    """
    kinds = Counter(sweep.folder(run).parent for run in missing)
    timed = {kind: times for kind in kinds if (times := _sampled(kind))}
    hours = sum(kinds[kind] * sum(seconds for seconds, _ in times) / len(times) for kind, times in timed.items()) / 3600
    told = [f"{len(missing)} to do"]
    if timed:
        devices = sorted({device for times in timed.values() for _, device in times})
        told.append(
            f"about {hours:.2g} hours of work{f' and {hours * gpus:.2g} GPU-hours' if gpus else ''}, as timed on {', '.join(devices)}"
        )
    if unknown := sum(count for kind, count in kinds.items() if kind not in timed):
        told.append(f"{unknown} of them of a kind of which none is finished to go by")
    return ", ".join(told)


def _sampled(kind: Path) -> list[tuple[float, str]]:
    """Seconds and device of a few finished runs of a kind that did all their work at once; else of the committed one."""
    found: list[tuple[float, str]] = []
    for file in kind.glob("seed*/provenance.json"):
        with suppress(OSError, ValueError, KeyError):
            told = json.loads(file.read_bytes())
            found += [] if told.get("resumed") else [(float(told["wall_time_s"]), told["device"])]
        if len(found) == SAMPLED:
            break
    return found or [(told["wall_time_s"], told["device"]) for told in _committed(*kind.parts[-3:])]


def _committed(experiment: str, data: str, scale: str) -> Iterator[dict[str, Any]]:
    """The provenance of the committed rows of an experiment on a data set at a scale."""
    from src.collect import distinct

    for file in COMMITTED.glob(f"**/{experiment}.parquet"):
        told = json.loads(file.with_suffix(".provenance.json").read_bytes())
        if told["data_requested"] == data and distinct(file, ("scale",)) == [{"scale": scale}]:
            yield told
