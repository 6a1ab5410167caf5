"""How evenly a captured graph can be cut: FLOPs per node, and the best four contiguous parts of them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

N_PARTS = 4
MIN_BLOCKS = 8


def repeated_blocks(model: nn.Module) -> list[str]:
    """List the paths of the blocks that the model repeats.

    Blocks are children of ``nn.ModuleList`` and ``nn.Sequential`` containers of one class that hold a weight of two
    or more dimensions; the class with the most of them over the whole model wins. A block inside a block of its own
    class does not count. So 12 encoder layers are 12 blocks, a ResNet-18 has 8 (2 in each of 4 layers), and VGG-11
    has its 8 convolutions.
    """
    found: dict[type, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            inside = any(below.startswith(f"{other}.") for other in found[type(child)])
            container = type(child) in (nn.ModuleList, nn.Sequential, nn.ModuleDict)
            if not container and not inside and any(weight.dim() > 1 for weight in child.parameters()):
                found[type(child)].append(below)
    return max(found.values(), key=len, default=[])


def best_parts(costs: list[float], n_parts: int = N_PARTS) -> float | None:
    """Return the largest of ``n_parts`` contiguous parts over their mean, for the partition where it is smallest.

    Bisection on the limit with a greedy fill: O(n log(1 / epsilon)). ``None`` without any cost.
    """
    total = sum(costs)
    if total <= 0:
        return None
    low, high = max(max(costs), total / n_parts), total
    for _ in range(60):
        middle = (low + high) / 2
        parts, load = 1, 0.0
        for cost in costs:
            if load + cost > middle:
                parts, load = parts + 1, 0.0
            load += cost
        low, high = (low, middle) if parts <= n_parts else (middle, high)
    return high / (total / n_parts)


def captured_flops(captured: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    """Count the forward FLOPs of every node of a stagecut capture, in graph order, as its planner does."""
    from stagecut.partitioner.analysis import analyse
    from stagecut.structure import call_leaves

    leaves, _ = call_leaves(captured.model.forward, args, kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    rows = next(tensor.shape[0] for tensor in tensors if tensor.dim())
    facts = analyse(captured, tensors, rows)
    return [float(facts[node.name].flops) for node in captured.graph.nodes if node.name in facts]


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.flops: list[float] = []

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        self.flops.append(float(counter.get_total_flops()))
        return value


def graph_flops(module: fx.GraphModule, flat_inputs: list[Any]) -> list[float]:
    """Count the forward FLOPs of every node of a graph module by running it on ``flat_inputs``."""
    counter = _Counter(module)
    counter.run(*flat_inputs, enable_io_processing=False)
    return counter.flops
