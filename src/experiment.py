"""One experiment: measure, judge, draw, log; one run folder."""

import importlib
import logging
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float, Int64
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from src import rows as row_table
from src.certificate import Certificate, certify
from src.checkpoint import Checkpoint, Training, plain
from src.code import ROOT, fingerprint
from src.config import Config, Criterion, ModelConfig, TrainingConfig
from src.data.load import Data, Split, load
from src.errors import UserError
from src.locking import error_signals
from src.models import build, calibrate
from src.models.exits import MultiExit, with_exits
from src.models.layers import Layers
from src.plan import Work, describe
from src.provenance import surroundings
from src.results import RunError, RunFolder
from src.rows import Row
from src.seeds import generator
from src.tracking import Tracker, in_brief, open_tracker
from src.training.loop import Outcome, planned_steps
from src.verdict import Verdict, to_frame

Item = TypeVar("Item")
ROWS = "rows"  # the checkpoint's entry for all that the finished parts have left
# what a tracker is shown: a curve or a certificate, its name, and plain values
Shown = tuple[Literal["curve", "certificate"], str, dict[str, Any]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What an experiment measures with."""

    config: Config
    data: Data
    device: torch.device
    tracker: Tracker
    # None: nothing is kept before the run is finished
    checkpoint: Checkpoint | None = None
    bars: Progress = field(default_factory=lambda: Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True))
    # random networks drawn and training steps done so far, what the plan foretold, and trainings
    tally: Counter[str] = field(default_factory=Counter)
    # wall time of every training's steps by its name; no row holds it, for the same seed must give the same rows
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    # what the tracker was shown so far
    shown: list[Shown] = field(default_factory=list)

    def generator(self, *purpose: str | int | float) -> torch.Generator:
        """The CPU generator of a purpose, derived from the root seed."""
        return generator(self.config.seed, *purpose)

    def network(self, model: ModelConfig, seed: int) -> nn.Sequential:
        """The `seed`-th random network of an architecture for this data set.

        Architectures draw the same numbers for the same seed, so that they can be compared in pairs.
        """
        self.tally["networks"] += 1
        return build(model, self.data.shape, self.data.classes, self.generator("init", seed)).to(self.device)

    def calibrated(self, model: ModelConfig, seed: int) -> nn.Sequential:
        """The same, its BatchNorm statistics those of `grid.calibration` training images."""
        network = self.network(model, seed)
        calibrate(network, self.samples(self.data.train, self.config.grid.calibration)[0])
        return network

    def with_exits(self, network: nn.Sequential, model: ModelConfig, names: Sequence[str], seed: int) -> MultiExit:
        """The network, in place, with a linear exit at the named stages; the exits draw numbers of their own."""
        layers = Layers(model, self.generator("exits", seed))
        return with_exits(network, names, layers, self.data.shape, self.data.classes)

    def steps(self, training: TrainingConfig | None = None) -> int:
        """The steps that a training takes unless it diverges, as configured or otherwise."""
        return planned_steps(training or self.config.training, len(self.data.train))

    def error_signals(self, network: nn.Sequential) -> dict[int, float]:
        """½ ln mean_n ‖g_l‖² of every stage l, over `grid.samples` test images, in float64; nats."""
        return error_signals(network, *self.samples(self.data.test, self.config.grid.samples))

    def certify(self, network: nn.Sequential) -> Certificate:
        """The certificate of a network on `grid.samples` test images."""
        return certify(network, *self.samples(self.data.test, self.config.grid.samples))

    def samples(self, split: Split, count: int) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """`count` images drawn without replacement, the same for every network, standardised; and their labels.

        Raises: UserError when the split has fewer.
        """
        if count > len(split):
            raise UserError(f"grid.samples: {count} asked for, the set has {len(split)}")
        chosen = torch.randperm(len(split), generator=self.generator("samples"))[:count].to(split.labels.device)
        return self.data.standardise(split.images[chosen]), split.labels[chosen]

    def rows(self, *parts: Callable[["Context"], Iterable[Row]]) -> pd.DataFrame:
        """The rows of an experiment's parts, one after the other; a part that an earlier try at the run has finished isn't measured again.

        Args:
            parts: each yields its rows, which depend on the config and the data alone.
        """
        kept = self.checkpoint and self.checkpoint.load(ROWS)
        rows: list[Row] = kept["rows"] if kept else []
        finished: int = kept["parts"] if kept else 0
        if kept:
            log.info("goes on from a checkpoint: %d of %d parts are finished", finished, len(parts))
            self.tally.update(kept["tally"])
            self.seconds.update(kept["seconds"])
            for kind, name, content in kept["shown"]:
                self._show(kind, name, content)
        for done, part in enumerate(parts[finished:], start=finished + 1):
            first = self.tally["trainings"]
            rows += map(plain, part(self))
            if self.checkpoint:
                so_far = {"tally": self.tally, "seconds": self.seconds, "shown": self.shown}
                self.checkpoint.keep(ROWS, {"parts": done, "rows": rows, **so_far})
                for n in range(first, self.tally["trainings"]):
                    Training(self.checkpoint, n).drop()
        return pd.DataFrame(rows)

    def show(self, name: str, certificate: Certificate) -> None:
        """Show the tracker a certificate under a name."""
        self._show("certificate", name, in_brief(certificate))

    def _show(self, kind: Literal["curve", "certificate"], name: str, content: dict[str, Any]) -> None:
        """Show the tracker something; a run that goes on from a checkpoint shows all again, for its mirror is another."""
        self.shown.append((kind, name, content))
        {"curve": self.tracker.curve, "certificate": self.tracker.certificate}[kind](name, content)

    def progress(self, items: Sequence[Item], description: str) -> Iterable[Item]:
        """The items, behind a progress bar when standard error is a terminal."""
        return self.bars.track(items, total=len(items), description=description)

    def record(self, name: str, outcome: Outcome) -> None:
        """Count a training that has ended, and show its curves under a name."""
        self.tally.update({"trainings": 1, "steps": outcome.steps})
        self.seconds[name] += outcome.seconds
        self._show("curve", name, outcome.history.to_dict("list"))


def network_columns(model: ModelConfig, seed: int) -> dict[str, object]:
    """What tells one random network from another, as columns of a row."""
    columns = ("family", "activation", "init", "weight_var", "bias_var", "norm", "skip", "branch_scale", "depth", "width")
    return {**{column: getattr(model, column) for column in columns}, "net_seed": seed}


@runtime_checkable
class Experiment(Protocol):
    """A module under experiments/."""

    QUANTITIES: Mapping[str, str]
    check: Callable[[Config, Data], None]
    plan: Callable[[Context], list[Work]]
    measure: Callable[[Context], pd.DataFrame]
    judge: Callable[[pd.DataFrame, Mapping[str, Criterion]], list[Verdict]]


def run_experiment(config: Config) -> tuple[RunFolder, bool]:
    """Run one experiment into its folder; one that is finished is left as it is unless `force`.

    Returns: the run's folder, and whether it was finished before.
    Raises: UserError for what the user can mend: the device, the data, the folder, the disk; RunError for a crash.
    """
    device = choose_device(config.device)
    data = load(config.data, device)
    if config.training.batch_size > len(data.train):
        raise UserError(f"training.batch_size: {config.training.batch_size} exceeds the {len(data.train)} training images of {data.name}")
    folder = RunFolder(config, data.name)
    folder.refuse_another_config()
    if folder.answers:
        return folder, True
    try:
        experiment = cast(Experiment, importlib.import_module(f"experiments.{config.claim.name}"))
    except ImportError as error:
        raise RunError(f"{config.claim.name} can't be imported: {type(error).__name__}: {error}") from error
    experiment.check(config, data)
    with ExitStack() as stack:
        with folder.running(), _logging_to(folder.path / "log.txt"), Checkpoint(folder.checkpoint, _made_by(data, device)) as checkpoint:
            tracker = stack.enter_context(open_tracker(config, folder.id))
            verdicts = _carry_out(experiment, Context(config, data, device, tracker, checkpoint), folder)
        # the mirror shows a run folder that is complete
        tracker.finish(folder.path, to_frame(verdicts))
    return folder, False


def _carry_out(experiment: Experiment, context: Context, folder: RunFolder) -> list[Verdict]:
    config, data, device = context.config, context.data, context.device
    started = time.monotonic()
    log.info("%s on %s at scale=%s, seed %d, %s", config.claim.name, data.name, config.scale.name, config.seed, device)
    if data.is_fallback:
        log.warning("FALLBACK: %s could not be had, everything below is measured on %s", data.requested, data.name)
    log.info(describe(experiment.plan(context), config, data))
    provenance = provenance_of(config, data, device)
    with _deterministic(), context.bars:
        rows = experiment.measure(context)
    folder.write("rows.parquet", row_table.to_parquet(rows, experiment.QUANTITIES, stamp_of(config, data, folder.id, provenance)))
    verdicts = experiment.judge(rows, config.criteria)
    folder.write_json("verdicts.json", [asdict(verdict) for verdict in verdicts])
    times = {
        "wall_time_s": round(time.monotonic() - started, 1),
        "resumed": context.checkpoint is not None and context.checkpoint.resumed,
        "training_seconds": {name: round(seconds, 3) for name, seconds in context.seconds.items()},
    }
    folder.write_json("provenance.json", {**provenance, **times, "sha256": folder.digests("rows.parquet", "verdicts.json")})
    drawing = importlib.import_module(f"paper_figures.{config.claim.name}")
    style = importlib.import_module("paper_figures.style")
    folder.write("figure.png", style.to_bytes(drawing.draw(row_table.read(folder.path / "rows.parquet")), "png"))
    log.info("finished in %.0f s: %s", time.monotonic() - started, folder.path)
    return verdicts


def choose_device(name: str) -> torch.device:
    """The device of a run; `auto` takes CUDA where there is one.

    Raises: UserError when CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device here; use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def provenance_of(config: Config, data: Data, device: torch.device) -> dict[str, object]:
    """Where a run's numbers come from: its surroundings, command, data and seed."""
    return {
        **surroundings(device),
        "command": f"python -m src.run {' '.join(sys.argv[1:])}",
        "data": data.name,
        "data_requested": data.requested,
        "data_sha256": data.sha256,
        "seed": config.seed,
    }


def stamp_of(config: Config, data: Data, run: str, provenance: Mapping[str, object]) -> dict[str, object]:
    """What every row of a run says about where it comes from."""
    return {
        "experiment": config.claim.name,
        "data": data.name,
        "data_requested": data.requested,
        "fallback": data.is_fallback,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "scale": config.scale.name,
        "root_seed": config.seed,
        "run": run,
        "commit": provenance["commit"],
        "dirty": provenance["dirty"],
    }


def _made_by(data: Data, device: torch.device) -> dict[str, object]:
    """What a run's numbers depend on beside its config."""
    known = surroundings(device)
    return {"code": fingerprint(ROOT), "data": data.sha256, **{key: known[key] for key in ("python", "versions", "device")}}


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels while measuring: the same seed gives the same rows."""
    memory: Any = torch.utils.deterministic  # its one attribute is unknown to type checkers
    before, fills = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    # cuBLAS is deterministic only with a fixed workspace
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # to fill what a kernel is about to write takes a third of the time of small nets
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fills


class _RunLog(logging.FileHandler):
    """A log file whose failures are the run's: logging itself would print them and go on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
