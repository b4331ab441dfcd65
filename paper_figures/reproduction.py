"""Figure of one paper's nets as they are trained here, and the table of what all papers report beside what was measured.

A test error that was measured at another scale than paper, or on other images, stands in the table with its scale, with what was reduced,
and is compared with nothing.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reproduction import NAME, NET, Setting, errors, reports_of, settings
from paper_figures.sidecar import Product, tabular
from paper_figures.sources import Shelf, composed, gather, stamps_of, todays_config
from paper_figures.style import DASHES, MARKERS, PREDICTION, SEEDS, WIDE, over_seeds, panels, title
from src.config import Config
from src.data.catalogue import CATALOGUE
from src.rows import pick
from src.run import CONF
from src.statistics import t_interval
from src.training.loop import planned_steps
from src.verdict import Verdict, phrase

PAPERS = sorted(file.stem for file in (CONF / "experiment" / NAME).glob("*.yaml"))
NOT_RUN, NO_NUMBER, ERROR = "not run", "no number is published", "test error, %"
ACCURACIES = ("published", "published_failure")  # forms whose verdict stands beside every net
OPTIMISER = ("optimizer", "lr", "momentum", "weight_decay", "schedule")  # keys of a training
# in LaTeX, with the widths of what is long in cm
PRINTED: dict[str, float | None] = {
    "source": 3,
    "what": 4.5,
    "data": None,
    "published": 3,
    "measured": None,
    "lo": None,
    "hi": None,
    "n": None,
    "scale": None,
    "verdict": 2.5,
    "reduced": 5,
}
COLUMNS = ["paper", *PRINTED]


def draw(rows: pd.DataFrame) -> Figure:
    """Test errors of the nets, their course, and that of the last hidden layer."""
    note = f"{SEEDS}; of courses: means over seeds" + ("; short black bars: published" if rows["published"].notna().any() else "")
    with panels(rows, 3, 3, 2.9, note=note, width=WIDE + 1.6) as (figure, (left, middle, right)):
        nets = [net for _, net in rows.groupby("net", sort=False)]
        over_depth = rows.groupby("net")[["depth", "weight_var"]].nunique().max(axis=None) > 1
        (_against_depth if over_depth else _by_net)(left, errors(rows))
        courses = rows[rows["part"] == "course"]
        _course(middle, pick(courses, "test_error"), "test error, %", "test error along training", over_depth)
        _course(right, pick(courses, "top_activation"), "98th percentile", "last hidden layer's activations", over_depth)
        right.set_xscale("log")
        if len(nets) > 1 or over_depth:
            handles, labels = middle.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper")
    return figure


def _by_net(axis: Axes, nets: pd.DataFrame) -> None:
    names = list(dict.fromkeys(nets["net"]))
    placed = nets.assign(place=nets["net"].map(names.index))
    labels = [f"{name}\nL = {depth}" for name, depth in nets.groupby("net", sort=False)["depth"].first().items()]
    for place, (_, net) in enumerate(placed.groupby("place")):
        over_seeds(axis, net, "place", place % len(MARKERS), color=f"C{place % 10}")
        for published in net["published"].dropna().unique():
            axis.plot([place - 0.3, place + 0.3], [published, published], **PREDICTION)
    axis.set_xticks(range(len(names)), labels, rotation=40, ha="right")
    axis.set(xlabel="net; L: its weight layers here", ylabel="test error, %", xlim=(-0.5, len(names) - 0.5))
    title(axis, "test error at the end")


def _against_depth(axis: Axes, nets: pd.DataFrame) -> None:
    for place, (_, net) in enumerate(nets.groupby(["net", "weight_var"], sort=False)):
        over_seeds(axis, net, "depth", place % len(MARKERS), color=f"C{place % 10}")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="depth L (weight layers)", ylabel="test error, %")
    title(axis, "test error at the end")


def _course(axis: Axes, course: pd.DataFrame, what: str, told: str, over_depth: bool) -> None:
    """The mean over seeds, of the deepest and the shallowest nets where there are many."""
    for place, ((net, weight_var), nets) in enumerate(course.groupby(["net", "weight_var"], sort=False)):
        label = f"{net}, σw² {weight_var:g}" if over_depth else f"{net}"
        for depth, lightness in {int(nets["depth"].min()): 0.45, int(nets["depth"].max()): 1.0}.items():
            of_depth = nets[(nets["depth"] == depth) & (nets["step"] > 0)]
            means = of_depth.groupby("step")["value"].mean()
            own = f"{label}, L = {depth}"
            look: dict[str, Any] = {"color": f"C{place % 10}", "linestyle": DASHES[place % len(DASHES)], "alpha": lightness}
            axis.plot(means.index, means, marker=MARKERS[place % len(MARKERS)], markersize=2, label=own, **look)
    axis.set(xlabel="steps", ylabel=what)
    title(axis, told)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every net's errors at the end, means over seeds with 95% intervals, in percent."""
    lines = []
    for at, nets in rows[rows["part"] == "net"].groupby([*NET, "width", "batch", "steps"], sort=False):
        error = t_interval(errors(nets)["value"])
        line = dict(zip([*NET, "width", "batch", "steps"], at, strict=True))
        train = errors(nets, "train_error")["value"].mean()
        lines.append({**line, "test error": error.value, "lo": error.lo, "hi": error.hi, "n": error.n, "train error": train})
    return pd.DataFrame(lines)


def product(shelf: Shelf, mixed: bool) -> Product:
    """The table; each line says at which scale it was measured, and what was reduced."""
    found = gather([NAME], shelf.papers, lambda source: (source.read(), source.judged()))
    lines = [line for rows, verdicts in found.taken for line in (*_nets(rows, verdicts), *_forms(rows, verdicts))]
    measured = {tuple(net) for rows, _ in found.taken for net in rows[["paper", "data", "net"]].drop_duplicates().to_numpy()}
    lines += [line for paper in PAPERS for line in _not_run(paper, measured)]
    lines.sort(key=lambda line: str(line["paper"]))
    return Product(tabular(pd.DataFrame(lines, columns=COLUMNS), PRINTED), found.sources, found.complaints)


@cache
def full(paper: str, data: str) -> tuple[Config, dict[str, Setting]]:
    """A paper's nets as scale=paper trains them on a data set that it reports on, by name."""
    config = composed(f"{NAME}/{paper}", data, "paper", 0)
    return config, {setting.net.name: setting for setting in settings(config, data)}


def _full(stamp: pd.Series) -> tuple[Config, dict[str, Setting]]:
    """The same of rows, for their data set if the paper reports on it, or else for the first that it does."""
    known = [data for _, data, _, _ in reports_of(stamp["paper"])]
    return full(stamp["paper"], stamp["data_requested"] if stamp["data_requested"] in known else known[0])


def _reductions(rows: pd.DataFrame, name: str) -> list[str]:
    """What of a net and its training is otherwise than at scale=paper; its optimiser's keys by today's file."""
    # of nets of many depths the deepest
    net, whole = errors(rows).query("net == @name").sort_values("depth").iloc[-1], _full(rows.iloc[0])[1][name]
    images = CATALOGUE[whole.net.data].train_size
    sizes = {
        "weight layers": (net["depth"], whole.model.depth),
        "units or channels": (net["width"], whole.model.width),
        "steps": (net["steps"], whole.turns * planned_steps(whole.training, images)),
        "images": (net["train_images"], images),
    }
    found = [f"{here:,} of {there:,} {what}" for what, (here, there) in sizes.items() if here != there]
    (training, *_) = (
        setting.training for setting in settings(todays_config(stamps_of(rows)[0]), net["data_requested"]) if setting.net.name == name
    )
    found += [
        f"{key} {getattr(training, key)}, not {there}"
        for key in OPTIMISER
        if (there := getattr(whole.training, key)) != getattr(training, key)
    ]
    return [*([f"measured on {net['data']}"] if net["data"] != whole.net.data else []), *found]


def _nets(rows: pd.DataFrame, verdicts: Sequence[Verdict]) -> Iterator[dict[str, object]]:
    """A line a net, but for those that a paper varies over depth or σw²."""
    first = rows.iloc[0]
    config, whole = _full(first)
    for name, nets in errors(rows).groupby("net", sort=False):
        if name not in whole or len(nets[["depth", "weight_var"]].drop_duplicates()) > 1:
            continue
        error, net = t_interval(nets["value"]), whole[str(name)].net
        held = nets[["published", "published_above"]].notna().any(axis=None)
        telling = [phrase(entry.verdict, entry.condition) for entry in verdicts if entry.claim.rpartition("/")[2] in _form_of(net)]
        yield {
            **_of_paper(config, first["data"]),
            "what": f"{name}, {ERROR}",
            "published": _number(net),
            "measured": error.value,
            "lo": error.lo,
            "hi": error.hi,
            "n": error.n,
            "scale": first["scale"],
            "verdict": "; ".join(telling) if held else _not_compared(net, first),
            "reduced": "; ".join([*_reductions(rows, str(name)), *config.grid.leaves_out]),
        }


def _form_of(net: Any) -> tuple[str, ...]:
    return ACCURACIES[1:] if net.published is None else ACCURACIES[:1]


def _number(net: Any) -> str:
    """What a paper reports of a net."""
    if net.published is not None:
        return f"{net.published:g}"
    return NO_NUMBER if net.published_above is None else f"> {net.published_above:g}"


def _not_compared(net: Any, stamp: pd.Series) -> str:
    """Why a net's error is held to no published one."""
    if _number(net) == NO_NUMBER:
        return NO_NUMBER
    return f"not compared: {stamp['data']}, {stamp['train_images']:,} images, scale={stamp['scale']}"


def _forms(rows: pd.DataFrame, verdicts: Sequence[Verdict]) -> Iterator[dict[str, object]]:
    """What a paper says of the order of its nets, or of where training reaches: the number is the criterion's, at the cell that decided."""
    first = rows.iloc[0]
    config, whole = _full(first)
    smaller = sorted({part for name in dict.fromkeys(errors(rows)["net"]) if name in whole for part in _reductions(rows, name)})
    for entry in verdicts:
        if entry.claim.rpartition("/")[2] in ACCURACIES:
            continue
        ran = "no cell" not in entry.evidence
        yield {
            **_of_paper(config, first["data"]),
            "what": entry.criterion,
            "published": entry.statement,
            "measured": entry.estimate if ran else np.nan,
            "lo": entry.interval[0] if ran else np.nan,
            "hi": entry.interval[1] if ran else np.nan,
            "n": entry.n,
            "scale": first["scale"],
            "verdict": phrase(entry.verdict, entry.condition) if ran else f"not measured at scale={first['scale']}",
            "reduced": "; ".join([*smaller, *config.grid.leaves_out]),
        }


def _not_run(paper: str, measured: set[tuple[str, ...]]) -> Iterator[dict[str, object]]:
    """A line a net that no run has trained on the data set of its report, and a line a form where no run is on that at all."""
    for data in sorted({data for _, data, _, _ in reports_of(paper)}):
        config, whole = full(paper, data)
        ran = {name for name in whole if (paper, data, name) in measured}
        nets = {} if config.grid.depths else {f"{name}, {ERROR}": _number(whole[name].net) for name in whole if name not in ran}
        forms = {} if ran else {form.criterion: form.statement for name, form in config.criteria.items() if name not in ACCURACIES}
        for what, published in {**nets, **forms}.items():
            yield {
                **_of_paper(config, data),
                "what": what,
                "published": published,
                "n": 0,
                "scale": "paper",
                "verdict": NOT_RUN,
                "reduced": "; ".join(config.grid.leaves_out),
            }


def _of_paper(config: Config, data: str) -> dict[str, object]:
    return {"paper": config.grid.paper, "source": config.grid.source, "data": data}
