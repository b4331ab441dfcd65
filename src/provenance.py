"""Where numbers come from: code, versions, machine and time."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

VERSIONED = ("torch", "torchvision", "numpy", "scipy", "pandas", "hydra-core")


def surroundings(device: torch.device) -> dict[str, object]:
    """What is the same for all that is measured now, on a device.

    Returns: commit of this repository ("unknown" without one), dirty (whether files differ from it), python, versions, device, and time.
    """
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in VERSIONED},
        "device": _named(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
