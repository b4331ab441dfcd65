"""Run an experiment and tell its verdicts on the terminal."""

import sys

from rich.console import Console

from src.config import Config
from src.results import RunFolder
from src.verdict import Verdict, to_table


def run_and_report(config: Config) -> None:
    """Run one experiment, or find it finished, and print its table of verdicts."""
    folder = RunFolder(config)
    folder.refuse_another_config()
    finished = folder.answers
    if not finished:
        # torch is imported only for a run that has something to do
        from src.experiment import run_experiment

        folder, finished = run_experiment(config)
    verdicts = [Verdict.of(entry) for entry in folder.verdicts()]
    # a file or a pipe has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(to_table(verdicts, title=f"{config.claim.title} ({config.data.name}, scale={config.scale.name}, seed {config.seed})"))
    console.print(f"{'already finished, force=true runs it again' if finished else 'run folder'}: {folder.path}", soft_wrap=True)
