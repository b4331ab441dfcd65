"""Depth and skip depth: how many weight layers a backward path passes, read off the traced graph."""

from collections.abc import Iterable
from itertools import islice

from torch import nn
from torch.fx import Graph, Node, Tracer

from src.errors import UserError

# of torch.nn itself, but with skips inside: no leaves
BLOCKS = nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
MULTIPLIES = {
    "linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot",
    "convolution",
}  # fmt: skip
CUTS_GRADIENT = {
    "detach", "data", "shape", "size", "dim", "ndim", "numel", "dtype", "device", "argmax", "argmin", "zeros_like", "ones_like",
    "rand_like", "randn_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
}  # fmt: skip


# what holds several weight layers on every path
SEVERAL = {"MultiheadAttention": 2, "multi_head_attention_forward": 2, "shifted_window_attention": 2}


class BlockTracer(Tracer):
    """Traces into whatever holds skips."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one node."""
        return not isinstance(m, BLOCKS) and super().is_leaf_module(m, module_qualified_name)


def in_line(stage: nn.Module) -> dict[str, nn.Module] | None:
    """The modules that a stage is known to apply one after the other, by name; None where only its graph tells.

    Known are torch.nn's own modules that have no parts, and `nn.Sequential` of such: the graph of these need not be traced.
    """
    if type(stage) is nn.Sequential:
        parts = {name: in_line(part) for name, part in stage._modules.items() if part is not None}
        if any(modules is None for modules in parts.values()):
            return None
        return {f"{name}.{inner}".rstrip("."): module for name, modules in parts.items() for inner, module in (modules or {}).items()}
    own = type(stage).__module__.startswith("torch.nn.modules") and not stage._modules and keeps_its_forward(stage)
    return {"": stage} if own else None


def keeps_its_forward(module: nn.Module) -> bool:
    """Whether a module computes what its type says: no forward of its own, but one of `src.jacobian.steady`."""
    own = vars(module).get("forward")
    return own is None or hasattr(own, "formula")


def path_lengths(module: nn.Module) -> tuple[int, int]:
    """Count the weight layers on the shortest and the longest path that carries gradient from input to output.

    Dynamic programming over the graph: length(v) = [v is a weight layer] + min or max of length(u) over the edges u → v.
    A weight layer is a leaf module that owns a parameter of two or more dimensions, or a product of something that depends on the
    input with such a parameter; a leaf counts once, whatever it holds, but attention twice. Paths through sizes and `detach` carry no
    gradient.

    Raises: UserError where torch.fx cannot trace the module, or no gradient reaches its input.
    """
    root = nn.Sequential(module)  # so that a leaf stays one node
    try:
        graph = BlockTracer().trace(root)
    except Exception as error:  # tracing runs the module's own code: anything may be raised
        for part in module if isinstance(module, nn.Sequential) else ():
            path_lengths(part)  # the part at fault names itself
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{_name(module)}: torch.fx cannot trace it ({cause}); take data-dependent control flow out of its forward"
        ) from error
    lengths = node_lengths(graph, root)
    output = next(node for node in graph.nodes if node.op == "output")
    if output not in lengths:
        raise UserError(f"{_name(module)}: no gradient reaches its input, for its output does not depend on it; check its forward")
    return lengths[output]


def skip_depth(stages: Iterable[nn.Module]) -> int:
    """Count the fewest weight layers that a backward path passes from the loss to H_1: in stages 2 … L, whose shortest paths add."""
    return path_lengths(_above_first(stages))[0]


def depth(stages: Iterable[nn.Module]) -> int:
    """Count the most weight layers that a backward path passes from the loss to H_1: in stages 2 … L, whose longest paths add."""
    return path_lengths(_above_first(stages))[1]


def _above_first(stages: Iterable[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*islice(stages, 1, None))


def node_lengths(graph: Graph, root: nn.Module) -> dict[Node, tuple[int, int]]:
    """Fewest and most weight layers between the input and every node that gradient leads back from to the input."""
    modules, parameters = dict(root.named_modules(remove_duplicate=False)), dict(root.named_parameters(remove_duplicate=False))
    lengths: dict[Node, tuple[int, int]] = {}
    weights: set[Node] = set()  # what is computed from parameters of two or more dimensions alone
    for node in graph.nodes:
        paths = [lengths[source] for source in node.all_input_nodes if source in lengths]
        if node.op == "placeholder":
            lengths[node] = (0, 0)
        elif node.op == "get_attr":
            if node.target in parameters and parameters[node.target].ndim >= 2:
                weights.add(node)
        elif paths and operation(node) not in CUTS_GRADIENT:
            if node.op == "call_module":
                module = modules[str(node.target)]
                name, weighs = type(module).__name__, any(parameter.ndim >= 2 for parameter in module.parameters())
            else:
                name = operation(node)
                weighs = name in MULTIPLIES | SEVERAL.keys() and any(source in weights for source in node.all_input_nodes)
            passed = SEVERAL.get(name, 1) if weighs else 0
            lengths[node] = (min(low for low, _ in paths) + passed, max(high for _, high in paths) + passed)
        elif any(source in weights for source in node.all_input_nodes):
            weights.add(node)
    return lengths


def operation(node: Node) -> str:
    """Name what a node calls: the same for `x.detach()`, `torch.detach(x)` and aten.detach.default; for an attribute, its name."""
    if node.op == "call_function":
        name = node.args[1] if node.target is getattr else node.target.__name__  # type: ignore[union-attr]
        return str(name).partition(".")[0]
    return str(node.target)


def _name(module: nn.Module) -> str:
    return type(module).__name__
