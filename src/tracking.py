"""Weights & Biases as a mirror of the run folder; `tracker=none` never imports it."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from src.certificate import Certificate
from src.config import Config
from src.errors import UserError
from src.results import to_plain

# the columns of a table, as plain values
Columns = Mapping[str, list[Any]]


@runtime_checkable
class Tracker(Protocol):
    """What a run tells while it goes and when it ends."""

    def curve(self, name: str, history: Columns) -> None:
        """The curves of one training: a row an evaluation, with its step."""

    def certificate(self, name: str, certificate: Mapping[str, Any]) -> None:
        """A certificate, as `in_brief` has it."""

    def finish(self, folder: Path, verdicts: pd.DataFrame) -> None:
        """The verdicts, the figure as an image, the run folder as an artifact."""


class Silent:
    """Tracks nothing."""

    def curve(self, name: str, history: Columns) -> None:
        """Nothing."""

    def certificate(self, name: str, certificate: Mapping[str, Any]) -> None:
        """Nothing."""

    def finish(self, folder: Path, verdicts: pd.DataFrame) -> None:
        """Nothing."""


class WandB:
    """Mirrors a run into Weights & Biases."""

    def __init__(self, run: Any):
        self.run = run

    def curve(self, name: str, history: Columns) -> None:
        """Log every row under `curves/<name>/`, over the training's own steps."""
        self.run.define_metric(f"curves/{name}/*", step_metric=f"curves/{name}/step")
        for row in pd.DataFrame(history).to_dict("records"):
            self.run.log({f"curves/{name}/{key}": value for key, value in row.items()})

    def certificate(self, name: str, certificate: Mapping[str, Any]) -> None:
        """Put K_back into the summary; log the layers as a table and their singular values as histograms."""
        import wandb

        for key, value in certificate["K_back"].items():
            self.run.summary[f"certificate/{name}/{key}"] = value
        self.run.log({f"certificate/{name}/layers": wandb.Table(dataframe=pd.DataFrame(certificate["layers"]))})
        for stage, counts_and_edges in certificate["singular_values"].items():
            self.run.log({f"certificate/{name}/singular_values/{stage}": wandb.Histogram(np_histogram=counts_and_edges)})

    def finish(self, folder: Path, verdicts: pd.DataFrame) -> None:
        """Log the verdicts as a table, the figure, and the folder.

        Raises: UserError when Weights & Biases can't take them, for example on a full disk.
        """
        import wandb

        text = verdicts.assign(interval=verdicts["interval"].map(str))
        try:
            self.run.log({"verdicts": wandb.Table(dataframe=text), "figure": wandb.Image(str(folder / "figure.png"))})
            artifact = wandb.Artifact(f"{folder.parts[-4]}-{self.run.id}", type="run-folder")
            for file in sorted(folder.iterdir()):
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)
        except (OSError, wandb.Error) as error:
            raise UserError(
                f"{folder}: finished, but Weights & Biases can't take it ({error}); mend that, or do with tracker=none"
            ) from error


class ActiveRun:
    """Adds scalars to the row that the active run of Weights & Biases is at, if there is a run: the steps stay those of who logs there."""

    def __init__(self) -> None:
        self.row: tuple[str, int] | None = None

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Log scalars named `backlock/…` over backlock/step."""
        wandb = sys.modules.get("wandb")  # who has a run has imported it
        if wandb is None or wandb.run is None:
            return
        run = wandb.run
        if self.row == (run.id, run.step):  # nobody has logged since: the row still holds what came before
            run.log({}, commit=True)
        run.define_metric("backlock/*", step_metric="backlock/step")
        run.log({**scalars, "backlock/step": step}, commit=False)
        self.row = run.id, run.step


def in_brief(certificate: Certificate) -> dict[str, Any]:
    """What a mirror shows of a certificate, as plain values.

    Returns: K_back, the medians over the samples of its entries; layers, the columns of the table of layers; and by stage
    singular_values, counts and edges of their histogram.
    """
    stages = zip(certificate.severity["stage"], certificate.singular_values, strict=True)
    return {
        "K_back": certificate.to_frame().drop(columns="sample").median().to_dict(),
        "layers": certificate.layers.to_dict("list"),
        "singular_values": {stage: [part.tolist() for part in histogram(values.cpu().numpy())] for stage, values in stages},
    }


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of 64 bins; singular values that differ only by rounding still get bins of some width."""
    margin = 1e-6 * np.abs(values).max() or 1.0
    return np.histogram(values, bins=64, range=(values.min() - margin, values.max() + margin))


@contextmanager
def open_tracker(config: Config, run_id: str) -> Iterator[Tracker]:
    """The tracker of a run: group = sweep or else experiment, job type = claim, name and id = the run's hash.

    Args:
        config: its `tracker.mode` is none, offline or online.
        run_id: the hash of what decides the run's numbers.

    Raises: UserError when Weights & Biases can't be had: no key, no network.
    """
    if config.tracker.mode == "none":
        yield Silent()
        return
    # wandb calls home about its own use, even offline
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # a service handed down may be on another node, or still at the killed run that this one continues
    os.environ.pop("WANDB_SERVICE", None)
    import wandb

    directory = Path(config.results_dir)
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False)
    try:
        run = wandb.init(
            project=config.tracker.project,
            entity=config.tracker.entity,
            group=config.tracker.group or config.claim.name,
            job_type=config.claim.heading,
            name=run_id,
            id=run_id,
            mode=config.tracker.mode,
            dir=directory,
            config=to_plain(config),
            settings=settings,
        )
    except wandb.Error as error:
        raise UserError(
            f"tracker={config.tracker.mode}: Weights & Biases can't be had ({error}); use tracker=offline, and `wandb sync` later"
        ) from error
    failed = True
    try:
        with _staging_in(directory / "wandb"):
            yield WandB(run)
        failed = False
    finally:
        run.finish(exit_code=int(failed))


@contextmanager
def _staging_in(folder: Path) -> Iterator[None]:
    """Keep what is to be uploaded with the offline runs, for another machine may sync them; unless the user keeps it elsewhere."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder.absolute())
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]
