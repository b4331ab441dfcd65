"""What a user would otherwise write to learn of layer Jacobians."""

import warnings

from jaxtyping import Float
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.func import jacrev, vmap

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a dependency that compiles with torch.jit
    from curvlinops import JacobianLinearOperator


def jacobians(stage: nn.Module, inputs: Float[Tensor, "n ..."]) -> Float[Tensor, "n m d"]:
    """J of every sample by `vmap(jacrev)`."""

    def alone(x: Tensor) -> Tensor:
        outputs: Tensor = stage(x.unsqueeze(0))
        return outputs.flatten()

    found: Tensor = vmap(jacrev(alone))(inputs)
    return found.flatten(2)


class _OfItsInput(nn.Module):
    """A stage as a function of its one input, held as the only parameter: curvlinops differentiates by parameters."""

    def __init__(self, stage: nn.Module, x: Float[Tensor, " ..."]):
        super().__init__()
        self.apply_stage = stage.forward  # not a submodule: its weights are no parameters here
        self.x = nn.Parameter(x)

    def forward(self, _: Tensor) -> Tensor:
        outputs: Tensor = self.apply_stage(self.x.unsqueeze(0))
        return outputs.flatten(1)


def norm_by_curvlinops(stage: nn.Module, x: Float[Tensor, " ..."], tolerance: float) -> float:
    """σ₁ of one sample's J by curvlinops' JacobianLinearOperator and scipy's svds (ARPACK)."""
    model = _OfItsInput(stage, x)
    batch = [(x.new_zeros(1, 1), x.new_zeros(1, stage(x.unsqueeze(0)).numel()))]
    operator = JacobianLinearOperator(model, [model.x], batch, check_deterministic=False)
    return float(svds(operator.to_scipy(), k=1, tol=tolerance, return_singular_vectors=False)[0])
