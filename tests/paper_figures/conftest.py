"""No test of a figure may train."""

import pytest

from tests.experiments.measured import NAMES, small_rows


@pytest.fixture(autouse=True)
def _nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:  # these rows are measured before, once
        small_rows(name)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a figure trained a network")

    for module in ("src.training.loop", "src.experiment"):
        monkeypatch.setattr(f"{module}.train", refuse)
