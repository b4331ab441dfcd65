"""TF32 is off unless asked for, and the flags come back."""

import pytest
import torch

from src.training.precision import tf32

SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def flags() -> list[str]:
    return [switch.fp32_precision for switch in SWITCHES]


@pytest.mark.parametrize(("allowed", "inside"), [(True, "tf32"), (False, "ieee")])
def test_flags_are_set_within_and_put_back_after(allowed: bool, inside: str) -> None:
    before = flags()
    with tf32(allowed):
        assert flags() == [inside] * 3
        with tf32(not allowed):
            assert flags() != [inside] * 3
        assert flags() == [inside] * 3
    assert flags() == before


def test_flags_are_put_back_after_an_error() -> None:
    before = flags()
    with pytest.raises(RuntimeError, match="within"), tf32(True):
        raise RuntimeError("within")
    assert flags() == before


def test_the_older_switches_can_still_be_read_afterwards() -> None:
    with tf32(True):
        pass
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"
