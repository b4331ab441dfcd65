"""The singular values of every stage's Jacobians, each by the method that is planned for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from src.chain import Chain, require_finite
from src.cost import Planned
from src.jacobian import matrix_free, structured
from src.jacobian.backpropagated import Call
from src.jacobian.materialised import layer_jacobian
from src.jacobian.structured import Dense, at_layer
from src.locking import Link
from src.seeds import generator
from src.spectrum import Extremes, spectrum

# the factors and directions of the dense layers that are measured at once
STACK_BYTES = 2**27


@dataclass(frozen=True)
class Measured:
    """What is known of the Jacobians of one stage.

    Attributes:
        extremes: of their singular values.
        structure: J = diag(s) W, where it is.
        jacobians: J, where it was written out.
    """

    extremes: Extremes
    structure: Dense | None
    jacobians: Float[Tensor, "n m d"] | None


class Spectra:
    """Measures stages one by one, the last first; dense layers of one height that follow each other are factorised at once.

    Args:
        chain: f_1 … f_L.
        states: H_0 … H_L.
        planned: a method a stage.
    """

    def __init__(self, chain: Chain, states: Sequence[Tensor], planned: Sequence[Planned]):
        self.chain, self.states, self.planned = chain, states, planned
        self.ahead: dict[int, Measured] = {}

    def of(self, link: Link, start: Float[Tensor, "n d"], trained: Call) -> Measured:
        """The singular values of a stage's Jacobians.

        Args:
            link: the stage.
            start: random directions.
            trained: the stage as training differentiates it.

        Raises: UserError when a Jacobian is not finite.
        """
        at, method = link.index - 1, self.planned[link.index - 1].method
        if method == "factorised" and at not in self.ahead:
            self.ahead = self._factorised(at)
        if at in self.ahead:
            return self.ahead.pop(at)
        structure = self._structure(at)
        m, d = link.signal.direction[0].numel(), link.inputs[0].numel()
        if method != "matrix_free":
            if structure is not None:
                J, lines, largest = structure.jacobians(), structure.lines(), structure.largest()
            else:
                J = layer_jacobian(link.stage, link.inputs)
                size = J.abs()
                lines, largest = torch.minimum(*((size.amax(axis) > 0).sum(1) for axis in (1, 2))), size.amax((1, 2))
            require_finite(largest, f"the Jacobian of stage '{link.name}'")
            return Measured(Extremes.of(spectrum(J), max(m, d), lines), structure, J)
        rough = trained if trained[1].dtype == torch.float32 != link.inputs.dtype else None
        return Measured(matrix_free.extremes(link.stage, link.inputs, start, rough), structure, None)

    def _structure(self, at: int) -> Dense | None:
        layer = self.planned[at].layer
        return None if layer is None else at_layer(self.chain.stages[at], layer, self.states[at])

    def _factorised(self, last: int) -> dict[int, Measured]:
        """What one factorisation tells of a stage and of those of its height before it, as many as memory is meant for."""
        samples, height = len(self.states[last]), self.states[last + 1][0].numel()
        fit = STACK_BYTES // (self.states[last].dtype.itemsize * height * (3 * height + 50 * samples))
        stack: dict[int, Dense] = {}
        for at in range(last, max(last - fit, 0) - 1, -1):
            structure = self._structure(at) if self.planned[at].method == "factorised" else None
            if structure is None or len(structure.weight) != height:
                break
            stack[at] = structure
        if not stack:
            return {}
        draws = generator(0, "factorised")
        start = torch.randn(len(stack), samples, height, generator=draws, dtype=self.states[last].dtype).to(self.states[last].device)
        found = structured.extremes([*stack.values()], start)
        return {at: Measured(of, structure, None) for (at, structure), of in zip(stack.items(), found, strict=True) if of is not None}
