"""Cost graphs with the shapes of well-known networks, at any size, for the cut's tests and benchmarks/cut_scale.py.

Seconds are those of a forward and backward pass of one microbatch.  A value's transfer takes seconds in proportion to
its size; a residual stream costs about a twelfth of a transformer layer.  All seconds are jittered by a seeded
generator, so that no two layers are alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import networkx as nx

STREAM_S = 1.0  # the transfer of a residual stream; a transformer layer takes about 12


class Builder:
    """Adds operators one by one, each after its inputs, and then one transfer for every value."""

    def __init__(self, seed: int) -> None:
        self.graph = nx.DiGraph()
        self.random = random.Random(seed)
        self.output_s: dict[str, float] = {}

    def op(self, seconds: float, inputs: Iterable[str] = (), out: float = 1.0) -> str:
        """Add an operator and return its name; ``out`` is the size of its value in residual streams."""
        name = f"n{len(self.output_s)}"
        jitter = 1.0 + 0.1 * self.random.uniform(-1.0, 1.0)
        static_bytes = 1e6 * seconds * self.random.uniform(0.5, 1.5)
        self.graph.add_node(name, compute_s={"gpu": seconds * jitter}, memory_bytes=static_bytes, stash_bytes=1e5 * out)
        self.graph.add_edges_from((u, name) for u in inputs)
        self.output_s[name] = out * STREAM_S * (1.0 + 0.01 * self.random.uniform(-1.0, 1.0))
        return name

    def chain(self, seconds: Iterable[float], x: str, out: float = 1.0) -> str:
        """Add operators one after the other."""
        for each in seconds:
            x = self.op(each, [x], out)
        return x

    def finish(self) -> nx.DiGraph:
        """Add the transfers."""
        self.graph.graph["transfers"] = [
            {"nodes": [v, *self.graph.successors(v)], "seconds": self.output_s[v]}
            for v in self.graph
            if self.graph.out_degree(v)
        ]
        return self.graph


def attention(b: Builder, x: str, memory: str, mask: str | None) -> str:
    """Add 16 operators: projections and two reshapes each of q, k and v, scores, mask, softmax, dropout, output."""
    q, k, v = (b.op(0.9, [source]) for source in (x, memory, memory))
    q, k, v = (b.op(0.05, [b.op(0.04, [each])]) for each in (q, k, v))
    scores = b.op(0.5, [q, k], out=2.0)
    masked = b.op(0.1, [scores] if mask is None else [scores, mask], out=2.0)
    weights = b.op(0.08, [b.op(0.2, [masked], out=2.0)], out=2.0)
    heads = b.op(0.5, [weights, v])
    return b.op(0.9, [b.op(0.05, [heads])])


def attention_block(b: Builder, x: str, memory: str | None = None, mask: str | None = None) -> str:
    """Add 19 operators: norm, attention, dropout, residual add."""
    y = b.op(0.15, [x])
    y = attention(b, y, y if memory is None else memory, mask)
    return b.op(0.06, [x, b.op(0.08, [y])])


def mlp_block(b: Builder, x: str) -> str:
    """Add 7 operators: norm, up, bias, activation, down, dropout, residual add."""
    y = b.op(3.0, [b.op(0.15, [x])], out=4.0)
    y = b.chain([0.1, 0.2], y, out=4.0)
    y = b.chain([3.0, 0.08], y)
    return b.op(0.06, [x, y])


def transformer(n_layers: int, seed: int = 0) -> nx.DiGraph:
    """A residual transformer with one mask for all layers: 26 nodes a layer, and 2."""
    b = Builder(seed)
    x, mask = b.op(0.5), b.op(0.0, out=0.05)
    for _ in range(n_layers):
        x = mlp_block(b, attention_block(b, x, mask=mask))
    return b.finish()


def chain(n: int, seed: int = 0) -> nx.DiGraph:
    """Operators in a row."""
    b = Builder(seed)
    b.chain([1.0] * (n - 1), b.op(1.0))
    return b.finish()


def unet(depth: int, seed: int = 0) -> nx.DiGraph:
    """Residual blocks down and up, with a skip from each block on the way down to its mirror image."""
    b = Builder(seed)
    x, skips = b.op(1.0), []
    for _ in range(depth):
        x = b.op(0.06, [x, b.chain([0.3, 0.2, 2.0, 0.3, 0.2, 2.0], x)])
        skips.append(x)
    for skip in reversed(skips):
        x = b.op(0.1, [x, skip], out=2.0)
        x = b.op(0.06, [b.op(0.3, [x]), b.chain([0.3, 0.2, 2.0, 0.3, 0.2, 2.0], x)])
    return b.finish()


def narrow_skips(depth: int, seed: int = 0) -> nx.DiGraph:
    """A U-Net whose skips pass through operators that make them smaller, so that nothing orders these operators."""
    b = Builder(seed)
    x, skips = b.op(1.0), []
    for _ in range(depth):
        x = b.op(0.06, [x, b.chain([0.3, 0.2, 2.0, 0.3, 0.2, 2.0], x)])
        skips.append(b.op(0.1, [x], out=0.2))
    for skip in reversed(skips):
        x = b.op(0.1, [x, skip], out=1.2)
        x = b.op(0.06, [b.op(0.3, [x]), b.chain([0.3, 0.2, 2.0, 0.3, 0.2, 2.0], x)])
    return b.finish()


def encoder_decoder(n_layers: int, seed: int = 0) -> nx.DiGraph:
    """An encoder, and a decoder whose every layer attends to the encoder's output as well."""
    b = Builder(seed)
    x = b.op(0.5)
    for _ in range(n_layers):
        x = mlp_block(b, attention_block(b, x))
    y = b.op(0.5)
    for _ in range(n_layers):
        y = mlp_block(b, attention_block(b, attention_block(b, y), memory=x))
    return b.finish()


def inception(n_cells: int, seed: int = 0) -> nx.DiGraph:
    """Cells of four branches of convolution, norm and activation, concatenated."""
    b = Builder(seed)
    x = b.op(1.0)
    for _ in range(n_cells):
        branches = [b.chain([1.0, 0.1, 0.1] * length, x, out=0.25) for length in (1, 2, 3, 1)]
        x = b.op(0.2, branches)
    return b.finish()


def two_towers(n_layers: int, seed: int = 0) -> nx.DiGraph:
    """Two independent transformers whose outputs meet in the end."""
    b = Builder(seed)
    ends = []
    for _ in range(2):
        x = b.op(0.5)
        for _ in range(n_layers):
            x = mlp_block(b, attention_block(b, x))
        ends.append(b.op(0.5, [x], out=0.1))
    b.op(0.1, ends)
    return b.finish()


def mixture(n_layers: int, n_experts: int = 8, seed: int = 0) -> nx.DiGraph:
    """Transformer layers with a router and experts in place of the dense half."""
    b = Builder(seed)
    x = b.op(0.5)
    for _ in range(n_layers):
        x = attention_block(b, x)
        y = b.op(0.15, [x])
        router = b.op(0.1, [y], out=0.1)
        experts = [b.chain([0.7, 0.05, 0.7], b.op(0.05, [y, router], out=0.25), 0.25) for _ in range(n_experts)]
        x = b.op(0.06, [x, b.op(0.1, [router, *experts])])
    return b.finish()


SHAPES: dict[str, tuple[Callable[[int], nx.DiGraph], int]] = {  # with the number of nodes of one unit
    "transformer": (transformer, 26),
    "chain": (chain, 1),
    "unet": (unet, 16),
    "narrow_skips": (narrow_skips, 17),
    "encoder_decoder": (encoder_decoder, 71),
    "inception": (inception, 22),
    "two_towers": (two_towers, 52),
    "mixture": (mixture, 55),
}


def of_size(shape: str, n_nodes: int) -> nx.DiGraph:
    """Build the named shape with about ``n_nodes`` nodes."""
    build, unit = SHAPES[shape]
    return build(max(1, n_nodes // unit))
