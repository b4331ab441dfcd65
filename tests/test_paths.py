import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from src import trace
from src.errors import UserError
from src.jacobian import structured
from src.paths import depth, in_line, path_lengths, skip_depth


class Function(nn.Module):
    """A module with given children and a given forward(self, x)."""

    def __init__(self, forward, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def linear():
    return nn.Linear(4, 4)


def matrix(*shape):
    return nn.Parameter(torch.ones(*(shape or (4, 4))))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (linear(), (1, 1)),
        (nn.Conv2d(3, 3, 3), (1, 1)),
        (nn.Identity(), (0, 0)),
        (nn.BatchNorm1d(4), (0, 0)),
        (nn.LayerNorm(4), (0, 0)),
        (nn.PReLU(4), (0, 0)),
        (nn.Sequential(linear(), nn.Tanh(), linear()), (2, 2)),
        (nn.utils.parametrizations.orthogonal(linear()), (1, 1)),
    ],
)
def test_single_modules(module, expected):
    assert path_lengths(module) == expected


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: x + m.a(x), (0, 1)),
        (lambda m, x: m.a(x) + m.b(m.a(x)), (1, 2)),
        (lambda m, x: torch.cat([m.a(x), m.b(m.c(x))], 1), (1, 2)),
        (lambda m, x: m.c(x + m.b(x + m.a(x))), (1, 3)),  # nested skips
        (lambda m, x: m.c(torch.cat([x, m.b(torch.cat([x, m.a(x)], 1))], 1)), (1, 3)),  # densely connected
        (lambda m, x: m.a(m.a(m.a(x))), (3, 3)),  # one module, three calls
        (lambda m, x: (m.a(x), m.b(m.c(x)))[1], (2, 2)),  # a branch that goes nowhere
        (lambda m, x: (m.a(x), m.b(m.c(x))), (1, 2)),  # two outputs
        (lambda m, x: functional.linear(x, m.w) @ m.w.t(), (2, 2)),
        (lambda m, x: x.matmul(m.w), (1, 1)),
        (lambda m, x: torch.einsum("nc,cd->nd", x, m.w), (1, 1)),
        (lambda m, x: x + m.w, (0, 0)),  # a sum is no weight layer
        (lambda m, x: x * m.v, (0, 0)),  # nor is a gain
        (lambda m, x: x @ m.fixed, (0, 0)),  # nor a constant matrix
        (lambda m, x: x @ x.t() @ m.a(x), (0, 1)),  # nor the product of two signals
        (lambda m, x: m.a(m.w) + m.b(x), (1, 1)),  # a path that starts at a parameter
    ],
)
def test_hand_built_graphs(forward, expected):
    module = Function(forward, a=linear(), b=linear(), c=linear(), w=matrix(), v=matrix(4))
    module.register_buffer("fixed", torch.ones(4, 4))
    assert path_lengths(module) == expected


@pytest.mark.parametrize(
    "no_gradient",
    [lambda x: x.detach(), torch.detach, torch.zeros_like, lambda x: x.new_zeros(4, 4), lambda x: x.size(0), lambda x: x.shape[0]],
)
def test_paths_without_gradient_are_no_paths(no_gradient):
    module = Function(lambda m, x: m.a(x) + no_gradient(x), a=linear())
    assert path_lengths(module) == (1, 1)
    with pytest.raises(UserError, match="no gradient"):
        path_lengths(Function(lambda m, x: m.w + no_gradient(x), w=matrix()))


def test_untraceable_module_is_named():
    untraceable = Function(lambda m, x: x if x.sum() > 0 else -x)
    for find in (path_lengths, lambda module: skip_depth([linear(), nn.Sequential(nn.Tanh(), module), linear()])):
        with pytest.raises(UserError, match=r"^Function: torch\.fx cannot trace it"):
            find(untraceable)


class Dag(nn.Module):
    """Nodes 0 … n in order; node j sums its sources, through a weight layer where `weighted`."""

    def __init__(self, sources: list[list[int]], weighted: list[bool]):
        super().__init__()
        self.sources = sources
        self.layers = nn.ModuleList(linear() if has_weight else nn.Tanh() for has_weight in weighted)

    def forward(self, x: Tensor | fx.Proxy):
        values = [x]
        for sources, layer in zip(self.sources, self.layers, strict=True):
            values.append(layer(sum(values[source] for source in sources)))
        return values[-1]


def enumerated_lengths(dag: Dag):
    """Weight layers on every path from node 0 to the last, one path at a time."""

    def lengths_to(node):
        if node == 0:
            return [0]
        weight = int(isinstance(dag.layers[node - 1], nn.Linear))
        return [length + weight for source in dag.sources[node - 1] for length in lengths_to(source)]

    return lengths_to(len(dag.sources))


@st.composite
def dags(draw):
    nodes = draw(st.integers(1, 7))
    sources = [sorted(draw(st.sets(st.integers(0, node), min_size=1))) for node in range(nodes)]
    return Dag(sources, draw(st.lists(st.booleans(), min_size=nodes, max_size=nodes)))


@settings(max_examples=40, deadline=None)
@given(dags())
def test_dynamic_programming_agrees_with_enumerated_paths(dag):
    lengths = enumerated_lengths(dag)
    assert path_lengths(dag) == (min(lengths), max(lengths))


def test_shortest_and_longest_differ_from_the_count_of_weight_layers():
    """A count of all weight layers, the naive answer, is wrong on parallel branches."""
    module = Function(lambda m, x: m.a(x) + m.b(x), a=linear(), b=linear())
    count = sum(isinstance(child, nn.Linear) for child in module.modules())
    assert path_lengths(module) == (1, 1)
    assert count == 2


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_plain_chain(layers):
    chain = nn.Sequential(*(nn.Sequential(linear(), nn.Tanh()) for _ in range(layers)))
    assert skip_depth(chain) == depth(chain) == layers - 1


def test_residual_chain():
    def block(m, x):
        return x + m.b(torch.relu(m.a(x)))

    chain = nn.Sequential(linear(), *(Function(block, a=linear(), b=linear()) for _ in range(5)), linear())
    assert skip_depth(chain) == 1  # the readout
    assert depth(chain) == 11


def test_lengths_of_stages_add_up_to_those_of_the_whole():
    block = [Function(lambda m, x: x + m.a(x), a=linear()) for _ in range(3)]
    stages = list(itertools.chain([linear()], block, [linear()]))
    shortest, longest = zip(*(path_lengths(stage) for stage in stages[1:]), strict=True)
    assert (skip_depth(stages), depth(stages)) == (sum(shortest), sum(longest)) == (1, 4)


class Own(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x):
        return super().forward(x) + x


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (nn.Linear(3, 3), [""]),
        (nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Identity())), ["0", "1.0", "1.1"]),
        (nn.Sequential(), []),
        (Own(3, 3), None),
        (nn.Sequential(nn.Tanh(), Own(3, 3)), None),
        (nn.TransformerEncoderLayer(4, 2), None),
        (nn.ModuleList([nn.Tanh()]), None),
        (nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), None),
    ],
)
def test_only_torchs_own_modules_in_a_row_are_known_without_a_graph(stage, names):
    found = in_line(stage)
    assert found is names is None or list(found) == names
    if found:
        assert all(stage.get_submodule(name) is module for name, module in found.items())


@pytest.mark.parametrize("stage", [nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh()), nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))])
def test_what_is_known_in_a_row_is_what_its_graph_tells(stage, monkeypatch):
    known = structured.only_linear(stage), trace.branch(stage), trace.is_traceable(stage)
    for user in (structured, trace):
        monkeypatch.setattr(user, "in_line", lambda stage: None)
    assert known == (structured.only_linear(stage), trace.branch(stage), trace.is_traceable(stage))
