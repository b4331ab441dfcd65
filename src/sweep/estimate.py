"""What the missing runs of a sweep will take: by finished runs of their kinds in the results, or else by the committed ones."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

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
    kinds = Counter((sweep.folder(run).parent, sweep.configs[run.config].grid.paper) for run in missing)
    timed = {kind: times for kind in kinds if (times := _sampled(*kind))}
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


def _sampled(kind: Path, paper: str | None) -> list[tuple[float, str]]:
    """Seconds and device of a few finished runs of a kind that did all their work at once; else of the committed one.

    The runs of all papers lie together, and differ in length: of these the committed ones are gone by.
    """
    own = map(_timing, kind.glob("seed*/provenance.json") if paper is None else ())
    if found := list(islice(filter(None, own), SAMPLED)):
        return found
    experiment, *measured = kind.parts[-3:]
    like = COMMITTED.glob(f"**/{f'{paper}-*' if paper else experiment}.parquet")
    return list(filter(None, (_timing(file.with_suffix(".provenance.json")) for file in like if _measured(file) == measured)))


def _timing(provenance: Path) -> tuple[float, str] | None:
    """Seconds and device of a run; None where it was interrupted, or its provenance is damaged: an estimate can do without."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        told = json.loads(provenance.read_bytes())
        if not told.get("resumed") and (seconds := float(told["wall_time_s"])) >= 0:
            return seconds, str(told["device"])
    return None


def _measured(rows: Path) -> list[str]:
    """The data set that was asked for, and the scale, of committed rows."""
    from src.collect import distinct

    (told,) = distinct(rows, ("data_requested", "scale"))
    return [told["data_requested"], told["scale"]]
