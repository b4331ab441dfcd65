"""Where numbers come from."""

import subprocess
from pathlib import Path

import pytest
import torch

from src import code, provenance


def test_the_commit_is_that_of_the_repository_and_unknown_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()
    found = provenance.surroundings(torch.device("cpu"))
    assert found["commit"] == head
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "CPU" in found["device"]
    monkeypatch.setattr(code, "ROOT", tmp_path)
    assert provenance.surroundings(torch.device("cpu"))["commit"] == "unknown"
