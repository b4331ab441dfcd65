"""What is shown of a certificate while it is measured."""

import sys

import torch
from rich.console import Console
from rich.progress import Progress

from src.cost import Planned, described


class Watched:
    """Prints the plan, then a bar on standard error while it is carried out, where that is a terminal."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())

    def __call__(self, planned: list[Planned], done: int) -> None:
        """Show how far the plan is; the last stage is measured first."""
        if done == 0:
            print(described(planned, self.device, self.dtype), flush=True)
            self.task = self.bar.add_task("certifying", total=sum(entry.gflop for entry in planned))
            self.bar.start()
        else:
            entry = planned[-done]
            self.bar.update(self.task, advance=entry.gflop, description=entry.stage)
        if done == len(planned):
            self.bar.stop()
