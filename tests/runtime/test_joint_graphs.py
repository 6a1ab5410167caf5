"""What recorded graphs leave out and write over: results and gradients stay those of autograd, to the last bit."""

from __future__ import annotations

import linecache
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from stagecut.runtime.apart import backward, backward_input, backward_weight, run_forward
from stagecut.runtime.parts import FILE
from stagecut.runtime.recorded import record
from stagecut.runtime.seeding import Seed
from stagecut.runtime.sinks import Accumulate
from stagecut.structure import flatten

ROWS, WIDTH = 4, 6
UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "negative": torch.neg,
    "half": lambda x: x / 2,
    "layer norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "swap": lambda x: x.reshape(ROWS, 2, 3).transpose(1, 2).reshape(ROWS, WIDTH),
    "thirds": lambda x: torch.cat([x[:, :2] * 2, x[:, 4:], x[:, 2:4].tanh()], dim=1),
    "planes": lambda x: _planes(x),
    "part": lambda x: F.pad(x[:, 1:4] * 3, (0, 3)),
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "plus": torch.add,
    "minus": torch.sub,
    "times": torch.mul,
}


def _planes(x: torch.Tensor) -> torch.Tensor:
    """Take a tensor apart as attention does its queries, keys and values."""
    q, k, v = (x.reshape(ROWS, 3, 2).permute(1, 0, 2)[i] for i in range(3))
    return torch.cat([q * k, v.tanh(), q], dim=1)


class Drawn(nn.Module):
    """Ops on earlier values, by their numbers; the last value and the sum of all others are the results."""

    def __init__(self, ops: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.ops = ops
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for kind, first, second in self.ops:
            a, b = values[first % len(values)], values[second % len(values)]
            if kind in UNARY:
                values.append(UNARY[kind](a))
            elif kind in BINARY:
                values.append(BINARY[kind](a, b))
            else:
                values.append(self.layers[second % 3](a))
        return values[-1] + values[len(values) // 2]


def by_autograd(module: nn.Module, x: torch.Tensor, times: int = 1) -> list[torch.Tensor | None]:
    module.zero_grad()
    for _ in range(times):
        leaf = x.clone().requires_grad_()
        result = module(leaf)
        result.backward(torch.ones_like(result))
    return [result.detach(), leaf.grad, *(p.grad for p in module.parameters())]


def by_recording(
    module: nn.Module, x: torch.Tensor, *, splits: bool, fuses: bool = False, times: int = 1
) -> tuple[list[torch.Tensor | None], str]:
    """Return what autograd would, and the source of all parts; weight gradients of so many microbatches."""
    module.zero_grad()
    known = set(linecache.cache)
    graph = fx.symbolic_trace(module)
    leaves, structure = flatten([x.clone().requires_grad_()])
    found = record(graph, leaves, structure, None, Seed(), fuses)
    weights = [p for _, p in graph.named_parameters()]
    for _ in range(times):
        leaf = x.clone().requires_grad_()
        result, apart = run_forward(found, weights, [leaf])
        assert isinstance(result, torch.Tensor)
        roots, ones = [result], [torch.ones_like(result)]
        sink = Accumulate(weights, [None] * len(weights), fuses)
        if splits:
            backward_input(apart, roots, ones)
            backward_weight(apart, sink)
        else:
            backward(apart, roots, ones, sink)
    files = [linecache.cache[name] for name in linecache.cache if name not in known and name.startswith(FILE)]
    of_name = dict(graph.named_parameters())
    gradients = [of_name[name].grad if name in of_name else None for name, _ in module.named_parameters()]
    return [result.detach(), leaf.grad, *gradients], "".join("".join(file[2]) for file in files)  # type: ignore[misc]


def same(ours: list[torch.Tensor | None], theirs: list[torch.Tensor | None]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)


OPS = st.tuples(st.sampled_from([*UNARY, *BINARY, "linear"]), st.integers(0, 9), st.integers(0, 9))


@given(st.lists(OPS, min_size=1, max_size=9), st.booleans(), st.booleans(), st.integers(1, 3))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_results_and_gradients_of_a_recording_are_autograds(
    ops: list[tuple[str, int, int]], splits: bool, fuses: bool, times: int
) -> None:
    torch.manual_seed(0)
    module = Drawn(ops).double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    expected = by_autograd(module, x, times)
    found, _ = by_recording(module, x, splits=splits, fuses=fuses, times=times)
    if not splits and not fuses:
        assert same(found, expected)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            # Sums of several gradients may come in another order where a backward is in two parts.
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


class Attention(nn.Module):
    """Queries, keys and values from one projection, in two of the ways in which models take it apart."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "permuted":
            qkv = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
        else:
            qkv = self.qkv(x)
            q, k, v = (qkv[..., 8 * i : 8 * (i + 1)].unflatten(-1, (2, 4)).transpose(1, 2) for i in range(3))
        return self.out(F.gelu(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def test_gradients_of_queries_keys_and_values_are_put_side_by_side_once() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for kind in ("permuted", "sliced"):
        torch.manual_seed(0)
        module = Attention(kind).double()
        found, source = by_recording(module, x, splits=False)
        assert same(found, by_autograd(module, x)), kind
        assert "joined" in source, kind
        assert "grad_input=" in source, "gelu's gradient goes where the incoming one was"


def test_parts_that_overlap_are_added() -> None:
    def overlapping(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :4] * 2, (0, 2)) + F.pad(x[:, 2:].tanh(), (2, 0))

    class Overlap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return overlapping(self.layer(x))

    module = Overlap().double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    found, source = by_recording(module, x, splits=False)
    assert same(found, by_autograd(module, x))
    assert "joined" not in source


def test_what_somebody_still_needs_is_not_written_over() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = self.layer(x)
            return torch.relu(made) * made + made.view(ROWS, WIDTH) / 2

    module = Kept().double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    found, _ = by_recording(module, x, splits=False)
    assert same(found, by_autograd(module, x))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 64), nn.Linear(64, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.relu(self.first(x)))
        return result


def test_gradients_of_linear_layers_are_made_where_they_belong_and_added_as_autograd_adds() -> None:
    for rows in (1, 700):  # of 700, a product that adds rounds otherwise
        torch.manual_seed(0)
        module, x = Layers(), torch.randn(rows, WIDTH)
        found, source = by_recording(module, x, splits=False, times=3)
        assert same(found, by_autograd(module, x, times=3)), rows
        whole = source.rpartition("def part(")[2]
        assert whole.count("_sink.add_product(") == 2, whole
        assert whole.count("_sink.add(") == 1, whole


def test_a_fused_sum_of_gradients_is_a_product_too() -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        torch.manual_seed(0)
        module, x = Layers().to(dtype), torch.randn(700, WIDTH, dtype=dtype)
        found, source = by_recording(module, x, splits=False, fuses=True, times=3)
        torch.testing.assert_close(found, by_autograd(module, x, times=3), rtol=tolerance, atol=tolerance)
        whole = source.rpartition("def part(")[2]
        assert (whole.count("_sink.add_product("), whole.count("_sink.add_sums(")) == (2, 1), whole
        assert "_sink.add(" not in whole, whole


def test_many_rows_are_summed_in_a_tree() -> None:
    torch.manual_seed(0)
    module, x = Layers(), torch.randn(5000, WIDTH)
    found, source = by_recording(module, x, splits=False, fuses=True)
    assert "add_sums" not in source
    assert torch.equal(found[3], by_autograd(module, x)[3])  # type: ignore[arg-type]
