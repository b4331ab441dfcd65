"""Any traceable model as named stages: its graph is cut where one tensor separates what is before from what is after."""

import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.random import fork_rng

from src.errors import UserError
from src.paths import SEVERAL, BlockTracer, in_line, node_lengths, operation

ADVICE = "wrap its stages in an nn.Sequential, in order, or name submodules as its stages"
SUMS = {"add", "iadd", "add_", "__add__", "__radd__"}
# machine precisions by which two ways to compute the same may differ, relative to the largest output
ROUNDING = 1e4
END = 2**63 - 1  # of a slice without one


class UntraceableError(UserError):
    """A model whose graph is not to be had."""


def traced_stages(model: nn.Module, inputs: Tensor | None = None) -> dict[str, nn.Module]:
    """Cut a model into stages of one weight layer, or of one block where skips cross: f_1 … f_L by name.

    A stage begins at a tensor that every path passes and ends before the next such tensor that a weight layer reads; what has no
    weights goes with the weight layer before it. Stages are keyed by call site: a module called twice is two stages.

    Args:
        model: has one tensor as input and one as output; the stages share its parameters.
        inputs: a batch to run; with it torch.export takes over where torch.fx cannot trace the model, or where its graph misses
            something that is written in place.

    Raises: UntraceableError where the model is; UserError where it has more than one input.
    """
    try:
        stages = _cut(_traced(model))
        if inputs is None or composes(stages.values(), model, inputs):
            return stages
        refusal: UserError = UntraceableError(
            f"{type(model).__name__}: torch.fx cannot trace it (a tensor is written over in place); {ADVICE}"
        )
    except UserError as error:
        if inputs is None:
            raise
        refusal = error
    try:
        stages = _cut(exported(model, inputs))
        if not composes(stages.values(), model, inputs):
            raise UserError("its graph computes something else")
    except Exception as error:  # tracing runs the model's own code: anything may be raised
        if not isinstance(refusal, UntraceableError):
            raise refusal from error
        tried, _, advice = str(refusal).rpartition("; ")
        raise UntraceableError(f"{tried}, nor torch.export ({_first_line(error)}); {advice}") from error
    return stages


def is_traceable(stage: nn.Module) -> bool:
    """Whether torch.fx can trace a stage."""
    if in_line(stage) is not None:
        return True
    try:
        _traced(nn.Sequential(stage))
    except UntraceableError:
        return False
    return True


def traceable(stage: nn.Module, inputs: Tensor) -> nn.Module:
    """The stage itself where torch.fx can trace it, or torch.export cannot either; else its exported graph.

    Args:
        stage: f.
        inputs: a batch of its inputs.
    """
    if is_traceable(stage):
        return stage
    try:
        root = exported(stage, inputs)
    except Exception:  # exporting runs the stage's own code: anything may be raised
        return stage
    return root if composes([root], stage, inputs) else stage


def composes(stages: Iterable[nn.Module], model: nn.Module, inputs: Tensor) -> bool:
    """Whether the stages, one behind the other, keep the samples first and compute and differentiate what the model does, up to rounding.

    Both draw the same random numbers. An exported graph has lost a backward pass that is not that of its forward.

    Raises: UserError where the model itself fails, or gives no tensor.
    """
    stages = list(stages)
    with fork_rng([inputs.device] if inputs.is_cuda else []):
        try:
            expected, gradient = _with_gradient(model, inputs)
        except Exception as error:  # of the user's own code
            raise UserError(f"{type(model).__name__}: it fails on these inputs in {inputs.dtype} ({_first_line(error)})") from error
        if not isinstance(expected, Tensor):
            raise UserError(f"{type(model).__name__}: it gives a {type(expected).__name__}; certify a model that gives one tensor")
    with fork_rng([inputs.device] if inputs.is_cuda else []), torch.no_grad():
        state = inputs.clone()
        for stage in stages:
            state = stage(state)
            if not isinstance(state, Tensor) or state.shape[:1] != inputs.shape[:1]:
                return False
    with fork_rng([inputs.device] if inputs.is_cuda else []):
        found, own = _with_gradient(nn.Sequential(*stages), inputs)
    return _agree(found, expected) and (gradient is None or (own is not None and _agree(own, gradient)))


def _with_gradient(model: nn.Module, inputs: Tensor) -> tuple[Any, Tensor | None]:
    """The outputs of a model, and the gradient of their sum by the inputs; None where there is none."""
    with torch.enable_grad():
        x = inputs.detach().clone().requires_grad_(inputs.is_floating_point())
        outputs = model(x.clone())
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            return outputs, None
        try:
            return outputs.detach(), torch.autograd.grad(outputs.real.sum(), x, allow_unused=True)[0]
        except RuntimeError:  # of a model that writes over what its backward pass needs
            return outputs.detach(), None


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same up to rounding; whatever is NaN is refused later, by stage and sample."""
    if found.shape != expected.shape:
        return False
    error = (found - expected).abs().max() / expected.abs().max()
    return not error > ROUNDING * torch.finfo(expected.dtype).eps


def branch(stage: nn.Module) -> nn.Module | None:
    """What a block adds to its skip: B of φ(S(x) + B(x)), where every path of B passes more weight layers than S.

    Args:
        stage: f, of one block.

    Returns: x ↦ B(x), sharing the stage's modules; None where the stage is no such block.
    """
    if in_line(stage) is not None:
        return None
    try:
        root = _traced(nn.Sequential(stage))
    except UntraceableError:
        return None
    lengths = node_lengths(root.graph, root)
    weighted = [end for entry, end in pairwise(separating(root.graph)) if _weigh(lengths, entry, end)]
    if len(weighted) != 1 or operation(weighted[0]) not in SUMS or weighted[0].kwargs:
        return None
    addends = sorted((node for node in weighted[0].all_input_nodes if node in lengths), key=lengths.__getitem__)
    if len(addends) != 2 or lengths[addends[0]][1] >= lengths[addends[1]][0]:
        return None
    entry = next(node for node in root.graph.nodes if node.op == "placeholder")
    return _between(root, entry, addends[1])


def _cut(root: GraphModule) -> dict[str, nn.Module]:
    tensors = separating(root.graph)
    lengths = node_lengths(root.graph, root)
    stages: list[tuple[str, list[nn.Module]]] = []
    weighted = False
    for entry, end in pairwise(tensors):
        piece = _between(root, entry, end)
        has_weights = _weigh(lengths, entry, end)
        if not stages or (has_weights and weighted):
            stages.append((_name(piece, end), []))
        elif has_weights:
            stages[-1] = _name(piece, end), stages[-1][1]
        weighted |= has_weights
        stages[-1][1].append(piece)
    return dict(numbered((name, pieces[0] if len(pieces) == 1 else nn.Sequential(*pieces)) for name, pieces in stages))


def separating(graph: Graph) -> list[Node]:
    """The tensors that every path from the input to the output passes, first to last: no edge jumps over them.

    Args:
        graph: in topological order, with one input.
    """
    nodes = _between_ends(graph)
    place = {node: index for index, node in enumerate(nodes)}
    found, reach = [], 0
    for index, node in enumerate(nodes):
        if index >= reach and not _holds_several(node) and _samples_first(node, nodes[0]):
            found.append(node)
        reach = max([reach, *(place[user] for user in node.users if user in place)])
    return found


def _traced(model: nn.Module) -> GraphModule:
    try:
        graph = BlockTracer().trace(model)
    except Exception as error:  # tracing runs the model's own code: anything may be raised
        raise UntraceableError(f"{type(model).__name__}: torch.fx cannot trace it ({_first_line(error)}); {ADVICE}") from error
    return GraphModule(model, graph)


def exported(model: nn.Module, inputs: Tensor) -> GraphModule:
    """The graph that torch.export makes of a model for batches of any size, with nothing written in place.

    Args:
        model: of one input; the graph has its parameters.
        inputs: a batch.
    """
    batch = inputs if len(inputs) > 1 else torch.cat([inputs, inputs])  # a batch of one would stay one
    with _quietly():
        program = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        if any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in program.graph.nodes):
            program = program.run_decompositions({})
        root = program.module(check_guards=False)
    root.graph.set_codegen(CodeGen())  # of a function of tensors
    for node in root.graph.nodes:
        if node.target is torch.ops.aten.view.default:  # of what lies otherwise in memory under torch.func
            node.target = torch.ops.aten.reshape.default
        elif node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif node.target is torch.ops.aten.slice_scatter.default:  # the end of which, under torch.func, may be no sentinel
            node.args = tuple(None if isinstance(value, int) and value == END else value for value in node.args)
        elif node.op == "output":
            node.args = (node.args[0][0],)
    return GraphModule(root, root.graph)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch.export prints and warns of, and without the call for a whole encoder layer, which has no derivative."""
    fast, disabled = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        logging.disable(disabled)


def _weigh(lengths: dict[Node, tuple[int, int]], entry: Node, end: Node) -> bool:
    """Whether a weight layer stands between two separating tensors; beyond a detached one there is none."""
    return end in lengths and lengths[end][1] > lengths[entry][1]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _between_ends(graph: Graph) -> list[Node]:
    """The nodes that depend on the input, by more than its number of samples, and that the output depends on, in order."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise UserError(f"the model takes {len(inputs)} inputs; certify a model of one")
    after = _closure(inputs, lambda node: [user for user in node.users if not _counts(user)])
    output = next(node for node in graph.nodes if node.op == "output")
    before = _closure(output.all_input_nodes, lambda node: [] if _counts(node) else node.all_input_nodes)
    return [node for node in graph.nodes if node in after and node in before]


def _counts(node: Node) -> bool:
    """Whether a node is the number of samples, read off the graph's input; every state tells it."""
    source = node.args[0] if node.args else None
    if node.op == "call_method" and node.target == "size":
        return isinstance(source, Node) and source.op == "placeholder" and node.args[1:] == (0,)
    if node.target is not operator.getitem or node.args[1] != 0 or not isinstance(source, Node):
        return False
    return operation(source) in ("shape", "size") and len(source.args) == 1 + (source.target is getattr) and _reads_input(source)


def _reads_input(node: Node) -> bool:
    return node.all_input_nodes[0].op == "placeholder"


def _samples_first(node: Node, entry: Node) -> bool:
    """Whether the first axis of a tensor is that of the samples, where an exported graph tells."""
    value, batch = node.meta.get("val"), entry.meta.get("val")
    return batch is None or (isinstance(value, Tensor) and str(value.shape[:1]) == str(batch.shape[:1]))


def _closure(start: Iterable[Node], neighbours: Callable[[Node], Iterable[Node]]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(neighbours(node))
    return found


def _holds_several(node: Node) -> bool:
    """Whether a node is a tuple of tensors, which is no state: a numbered part of it is used."""
    parts = [user for user in node.users if user.op == "call_function" and user.target is operator.getitem]
    return any(isinstance(part.args[1], int) for part in parts)


def _between(root: GraphModule, entry: Node, end: Node) -> GraphModule:
    """The part of a graph that computes one tensor from another, as a module of its own."""
    graph = Graph()
    copies = {entry: graph.placeholder("x")}

    def copy(node: Node) -> Node:
        if _counts(node):
            copies[node] = graph.call_method("size", (copies[entry], 0))
            return copies[node]
        for source in node.all_input_nodes:
            if source not in copies:
                copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    graph.output(copy(end))
    return GraphModule(root, graph)


def _name(piece: GraphModule, end: Node) -> str:
    """The module that all its calls belong to, or where there is none its last node."""
    targets = [path.split(".") for node in piece.graph.nodes if (path := _called(node)) is not None]
    shared = []
    for parts in zip(*targets, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or end.name


def _called(node: Node) -> str | None:
    """The module that a node calls, or where it is a function of parameters, the one that has them."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    is_of_module = isinstance(node.target, OpOverload) or operation(node) in SEVERAL
    if stack and is_of_module and any(source.op == "get_attr" for source in node.all_input_nodes):
        return str([*stack.values()][-1][0]).partition("@")[0]  # of a second call too
    return None


def numbered(stages: Iterable[tuple[str, nn.Module]]) -> Iterable[tuple[str, nn.Module]]:
    """The second stage of a name becomes name@2."""
    seen: dict[str, int] = {}
    for name, stage in stages:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}@{seen[name]}"), stage
