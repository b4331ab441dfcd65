"""Where numbers come from: code, versions, machine and time."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from src import code

VERSIONED = ("torch", "torchvision", "numpy", "scipy", "pandas", "hydra-core")


def surroundings(device: torch.device) -> dict[str, object]:
    """What is the same for all that is measured now, on a device.

    Returns: commit of this repository ("unknown" without one), dirty (whether files differ from it), python, versions, device, and time.
    """
    return {
        **code.commit(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in VERSIONED},
        "device": _named(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
