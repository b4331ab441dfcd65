"""Schedules of the learning rate against their closed forms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.training.optimizer import build_optimizer, build_schedule
from tests.training.test_loop import config


def rates(schedule: str, steps: int) -> list[float]:
    """The rate of every step of a training, by the optimiser's own books."""
    asked = replace(config(), schedule=schedule, lr=1.0)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), asked)
    scheduler = build_schedule(optimizer, asked, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "starts"),
    [("steps", {0: 1.0, 320: 0.1, 480: 0.01}), ("warm_steps", {0: 0.1, 4: 1.0, 320: 0.1, 480: 0.01}), ("constant", {0: 1.0})],
)
def test_a_hundredth_of_the_published_schedule_changes_where_it_says(schedule: str, starts: dict[int, float]) -> None:
    """Of 640 steps those of He et al. 2016: 32,000 and 48,000 of 64,000, and 400 to warm up."""
    found = rates(schedule, 640)
    changes = {step: rate for step, rate in enumerate(found) if step == 0 or rate != found[step - 1]}
    assert changes == pytest.approx(starts)


@given(st.integers(1, 50))
def test_a_training_of_any_length_ends_its_second_half_lower(steps: int) -> None:
    found = rates("steps", steps)
    assert found == pytest.approx([1.0 if t < steps / 2 else 0.1 if t < 3 * steps / 4 else 0.01 for t in range(steps)])
    assert rates("warm_steps", steps)[0] == pytest.approx(0.1)
