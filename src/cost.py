"""By which method a stage is measured, and what that costs: decided for all stages before the first is measured."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from src.chain import Chain
from src.errors import UserError
from src.jacobian.structured import only_linear

Method = Literal["auto", "exact", "matrix_free"]

# one layer's Jacobians of all samples; beyond it they are not written out
MEMORY_BYTES = 2**31
# the same where nobody asked for them: their decomposition needs several times as much
WRITTEN_BYTES = 2**29
# operations on a stage; what takes more than these some ten seconds is left to products with vectors
BUDGET = 4e11
# N·m·d·min(m, d) of a stage; beyond it one factorisation of a dense layer for all samples costs less than their decompositions
FACTORISED = 1e8
# multiplications of a matrix product in whose time an SVD does one of m·d·min(m, d), as timed
SVD = 20
# steps that σ₁ takes, each a product with J and one with Jᵀ
STEPS = 50
# passes forwards in whose time a product with J or Jᵀ is formed, as timed
PRODUCT = 3
# seconds that a stage takes beside its arithmetic
OVERHEAD = 0.02


@dataclass(frozen=True)
class Planned:
    """How a stage is measured.

    Attributes:
        stage: its name.
        method: "exact", "factorised" or "matrix_free".
        gflop: the predicted work, in 10⁹ operations of a matrix product.
        layer: its only dense layer; None unless only pointwise operations follow one.
        seconds: that its products with vectors will take, by a pass forwards that was timed; 0 where J is written out.
    """

    stage: str
    method: Literal["exact", "factorised", "matrix_free"]
    gflop: float
    layer: str | None
    seconds: float = 0.0


def plan(chain: Chain, states: Sequence[Tensor], method: Method) -> list[Planned]:
    """Choose for every stage the method that tells most of those whose memory and work are in bounds.

    Args:
        chain: f_1 … f_L.
        states: H_0 … H_L.
        method: "auto", or the one to take.

    Raises: UserError when "exact" is asked for and a stage's Jacobians don't fit.
    """
    pairs = zip(chain.names, chain.stages, states, states[1:], strict=False)
    return [_planned(name, stage, before, behind, method) for name, stage, before, behind in pairs]


def _planned(name: str, stage: nn.Module, before: Tensor, behind: Tensor, method: Method) -> Planned:
    n, m, d = len(before), behind[0].numel(), before[0].numel()
    layer, decomposed = only_linear(stage), n * m * d * min(m, d)
    size = n * m * d * before.dtype.itemsize
    if method == "exact" and size > MEMORY_BYTES:
        raise UserError(
            f"certificate: stage '{name}' has {n} Jacobians of {m}×{d}, {size / 2**30:.1f} GiB; "
            "give fewer samples or smaller inputs, or method='auto'"
        )
    factorised = 4 * m * m * d + 4 * STEPS * n * m * m
    if method == "auto" and layer is not None and m <= d and decomposed > FACTORISED and factorised <= BUDGET:
        return Planned(name, "factorised", factorised / 1e9, layer)
    forward, seconds = _forward(stage, before)
    exact = 2 * SVD * decomposed + (m * forward if layer is None else 0)  # a pass backwards for every row
    if method == "exact" or (method == "auto" and size <= WRITTEN_BYTES and exact <= BUDGET):
        return Planned(name, "exact", exact / 1e9, layer)
    return Planned(name, "matrix_free", 2 * STEPS * forward / 1e9, layer, 2 * STEPS * PRODUCT * seconds)


def _forward(stage: nn.Module, inputs: Tensor) -> tuple[int, float]:
    """Operations of a pass forwards, and the seconds that it takes here: of a convolution far more than its operations tell."""
    started = time.perf_counter()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage(inputs)
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)
    return int(counter.get_total_flops()), time.perf_counter() - started


def described(planned: Sequence[Planned], device: torch.device, dtype: torch.dtype) -> str:
    """A plan in one line, with the time that it will roughly take here."""
    methods = [entry.method for entry in planned]
    counts = ", ".join(f"{methods.count(method)} {method.replace('_', '-')}" for method in dict.fromkeys(methods))
    gflop = sum(entry.gflop for entry in planned)
    written = sum(entry.gflop for entry in planned if not entry.seconds)
    seconds = written / _rate(device, dtype) + sum(entry.seconds for entry in planned) + OVERHEAD * len(planned)
    return f"plan: {len(planned)} stages ({counts}), {gflop:.2g} GFLOP, about {_duration(seconds)}"


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """10⁹ operations a second of a matrix product here."""
    matrix = torch.ones(512, 512, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    started = time.perf_counter()
    (matrix @ matrix).sum().item()
    return 2 * 512**3 / 1e9 / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
