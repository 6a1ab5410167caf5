"""The published schedules by name: where stages are placed, how backwards are split, and each worker's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import ConstraintError
from ..instructions import Action, Layout
from . import interleaved, vee, zero_bubble
from .eager_1f1b import order as eager_order
from .fill_drain import fill_drain
from .one_way import warm_then_alternate
from .placement import Column, columns, on_stages, require

Orders = tuple[tuple[Action, ...], ...]
OrderOf = Callable[[Column, int], list[Action]]


@dataclass(frozen=True)
class Family:
    """One published schedule.

    Attributes:
        name: as users write it.
        paper: where it was published.
        placement: how stages lie on workers: ``"chain"``, ``"loop"`` or ``"vee"``.
        splits_backward: whether input and weight gradients are computed apart.
        make: the order of every worker, from a layout and a microbatch count.
        trains: whether there are backwards.
        least: the fewest microbatches, for so many workers.
    """

    name: str
    paper: str
    placement: str
    splits_backward: bool
    make: Callable[[Layout, int], Orders]
    trains: bool = True
    least: Callable[[int], int] = lambda n_workers: 1


def _in_chain(name: str, order: Callable[[int, int, int], list[tuple[str, int]]]) -> Callable[[Layout, int], Orders]:
    """Order the neighbouring stages of each worker as if they were one."""

    def order_of(column: Column, position: int) -> list[Action]:
        require(name, column, "chain")
        units = order(position, len(column.workers), len(column.microbatches))
        stages = column.positions[position]
        return [a for kind, m in units for a in on_stages(kind, stages, column.microbatches[m])]

    return lambda layout, m: _by_column(name, layout, m, order_of)


def _in_loop(
    name: str, order: Callable[[int, int, int, int], list[tuple[str, int, int]]]
) -> Callable[[Layout, int], Orders]:
    def order_of(column: Column, position: int) -> list[Action]:
        n_chunks = require(name, column, "loop")
        units = order(position, len(column.workers), n_chunks, len(column.microbatches))
        return [Action(kind, column.positions[position][c], column.microbatches[m]) for kind, c, m in units]

    return lambda layout, m: _by_column(name, layout, m, order_of)


def _in_vee(name: str, order: Callable[[int, int, int], list[tuple[str, int, int]]]) -> Callable[[Layout, int], Orders]:
    def order_of(column: Column, position: int) -> list[Action]:
        require(name, column, "vee", 2)
        units = order(position, len(column.workers), len(column.microbatches))
        return [Action(kind, column.positions[position][c], column.microbatches[m]) for kind, c, m in units]

    return lambda layout, m: _by_column(name, layout, m, order_of)


def _by_column(name: str, layout: Layout, n_microbatches: int, order_of: OrderOf) -> Orders:
    orders: list[tuple[Action, ...]] = [()] * layout.n_workers
    for column in columns(name, layout, n_microbatches):
        if not column.microbatches:
            continue  # a batch of fewer rows than replicas
        least = FAMILIES[name].least(len(column.workers))
        if len(column.microbatches) < least:
            n_columns = layout.n_replicas
            raise ConstraintError(
                f"{name} on {len(column.workers)} workers needs at least {least} microbatches"
                f"{' per replica' if n_columns > 1 else ''}, got {len(column.microbatches)}",
                hint=f"use {least * n_columns} microbatches",
            )
        for position, worker in enumerate(column.workers):
            orders[worker] = tuple(order_of(column, position))
    return tuple(orders)


def _one_f_one_b(position: int, n_workers: int, n_microbatches: int) -> list[tuple[str, int]]:
    return warm_then_alternate(n_workers - position, n_microbatches)


def _forwards(position: int, n_workers: int, n_microbatches: int) -> list[tuple[str, int]]:
    return [("F", m) for m in range(n_microbatches)]


def _fill_drain(position: int, n_workers: int, n_microbatches: int) -> list[tuple[str, int]]:
    return warm_then_alternate(n_microbatches, n_microbatches)


_ZERO_BUBBLE = "Qi et al., ICLR 2024, https://arxiv.org/abs/2401.10241"
_CONTROLLABLE = "Qi et al., NeurIPS 2024, https://arxiv.org/abs/2405.15362"
_MEGATRON = "Narayanan et al., SC 2021, https://arxiv.org/abs/2104.04473"
_GPIPE = "Huang et al., 2019, https://arxiv.org/abs/1811.06965"

FAMILIES = {
    family.name: family
    for family in (
        Family("fill-drain", _GPIPE, "chain", False, _in_chain("fill-drain", _fill_drain)),
        Family(
            "1f1b",
            "Narayanan et al., ICML 2021, https://arxiv.org/abs/2006.09503",
            "chain",
            False,
            _in_chain("1f1b", _one_f_one_b),
        ),
        Family(
            "eager-1f1b",
            "Zhuang et al., 2022, https://arxiv.org/abs/2211.05322",
            "chain",
            False,
            _in_chain("eager-1f1b", eager_order),
        ),
        Family("interleaved-1f1b", _MEGATRON, "loop", False, _in_loop("interleaved-1f1b", interleaved.order_1f1b)),
        Family(
            "looped-breadth-first", "Lamy-Poirier, 2022, https://arxiv.org/abs/2211.05953", "loop", False, fill_drain
        ),
        Family("zb-h1", _ZERO_BUBBLE, "chain", True, _in_chain("zb-h1", zero_bubble.order_h1)),
        Family("zb-h2", _ZERO_BUBBLE, "chain", True, _in_chain("zb-h2", zero_bubble.order_h2)),
        Family("zb-v", _ZERO_BUBBLE, "vee", True, _in_vee("zb-v", vee.order_zb_v)),
        Family("v-half", _CONTROLLABLE, "vee", True, _in_vee("v-half", vee.order_v_half)),
        Family("v-min", _CONTROLLABLE, "vee", True, _in_vee("v-min", vee.order_v_min)),
        Family(
            "interleaved-zero-bubble",
            f"{_MEGATRON}; {_ZERO_BUBBLE}",
            "loop",
            True,
            _in_loop("interleaved-zero-bubble", interleaved.order_zero_bubble),
        ),
        Family(
            "dualpipe-v",
            "DeepSeek-AI, 2025, https://github.com/deepseek-ai/DualPipe",
            "vee",
            True,
            _in_vee("dualpipe-v", vee.order_dualpipe_v),
            least=lambda n_workers: 2 * n_workers,
        ),
        Family("forward-only", _GPIPE, "chain", False, _in_chain("forward-only", _forwards), trains=False),
    )
}
