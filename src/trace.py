"""Any traceable model as named stages: its graph is cut where one tensor separates what is before from what is after."""

import operator
from collections.abc import Callable, Iterable
from itertools import pairwise

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer

from src.errors import UserError
from src.paths import path_lengths


def traced_stages(model: nn.Module) -> dict[str, nn.Module]:
    """Cut a model into stages of one weight layer, or of one block where skips cross: f_1 … f_L by name.

    A stage begins at a tensor that every path passes and ends before the next such tensor that a weight layer reads; what has no
    weights goes with the weight layer before it. Stages are keyed by call site: a module called twice is two stages.

    Args:
        model: has one tensor as input and one as output; the stages share its modules.

    Raises: UserError where torch.fx cannot trace it, or it has more than one input.
    """
    root = _traced(model)
    tensors = separating(root.graph)
    stages: list[tuple[str, list[nn.Module]]] = []
    weighted = False
    for entry, end in pairwise(tensors):
        piece = _between(root, entry, end)
        has_weights = path_lengths(piece)[1] > 0
        if not stages or (has_weights and weighted):
            stages.append((_name(piece, end), []))
        elif has_weights:
            stages[-1] = _name(piece, end), stages[-1][1]
        weighted |= has_weights
        stages[-1][1].append(piece)
    return dict(_numbered((name, pieces[0] if len(pieces) == 1 else nn.Sequential(*pieces)) for name, pieces in stages))


def separating(graph: Graph) -> list[Node]:
    """The tensors that every path from the input to the output passes, first to last: no edge jumps over them.

    Args:
        graph: in topological order, with one input.
    """
    nodes = _between_ends(graph)
    place = {node: index for index, node in enumerate(nodes)}
    found, reach = [], 0
    for index, node in enumerate(nodes):
        if index >= reach and not _holds_several(node):
            found.append(node)
        reach = max([reach, *(place[user] for user in node.users if user in place)])
    return found


def _traced(model: nn.Module) -> GraphModule:
    try:
        graph = Tracer().trace(model)
    except Exception as error:  # tracing runs the model's own code: anything may be raised
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "wrap its stages in an nn.Sequential, in order"
        raise UserError(f"{type(model).__name__}: torch.fx cannot trace it ({cause}); {advice}") from error
    return GraphModule(model, graph)


def _between_ends(graph: Graph) -> list[Node]:
    """The nodes that depend on the input and that the output depends on, in order."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise UserError(f"the model takes {len(inputs)} inputs; certify a model of one")
    after = _closure(inputs, lambda node: node.users)
    output = next(node for node in graph.nodes if node.op == "output")
    before = _closure(output.all_input_nodes, lambda node: node.all_input_nodes)
    return [node for node in graph.nodes if node in after and node in before]


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
        for source in node.all_input_nodes:
            if source not in copies:
                copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    graph.output(copy(end))
    return GraphModule(root, graph)


def _name(piece: GraphModule, end: Node) -> str:
    """The module that all its calls belong to, or where there is none its last node."""
    targets = [str(node.target).split(".") for node in piece.graph.nodes if node.op == "call_module"]
    shared = []
    for parts in zip(*targets, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or end.name


def _numbered(stages: Iterable[tuple[str, nn.Module]]) -> Iterable[tuple[str, nn.Module]]:
    """The second stage of a name becomes name@2."""
    seen: dict[str, int] = {}
    for name, stage in stages:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}@{seen[name]}"), stage
