"""Nasty models, kind ``state``: one call leaves something behind for the next."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict, deque

import torch
from nasty_base import WIDTH, Registry, Small, sequences
from torch import nn

state = Registry("state")
TABLE = torch.linspace(-1, 1, WIDTH)
CALLS = {"count": 0}
SEEN: list[int] = []


def forget_calls() -> None:
    CALLS["count"] = 0
    SEEN.clear()
    Counting.made = 0


def forget_tables() -> None:
    sinusoid.cache_clear()
    table_of_rows.cache_clear()


@functools.lru_cache(maxsize=8)
def sinusoid(width: int, scale: float = 1.0) -> torch.Tensor:
    return torch.sin(torch.arange(width) * scale)


@functools.cache
def table_of_rows(rows: int) -> torch.Tensor:
    return torch.arange(rows, dtype=torch.float32)[:, None]


@state.forward(parts={"calls": lambda: 0})
def counter_as_a_factor(self, x):
    self.calls += 1
    return self.out(self.lin(x) * self.calls)


@state.forward(parts={"calls": lambda: 0})
def warm_up(self, x):
    h = self.lin(x)
    if self.calls < 2:
        h = h.detach()
    self.calls = self.calls + 1
    return self.out(h)


@state.forward(parts={"flip": lambda: False})
def toggle(self, x):
    self.flip = not self.flip
    return self.out(self.lin(x) if self.flip else x.flip(1))


@state.forward(parts={"counts": lambda: [0, {"n": 0}]})
def counter_in_a_list(self, x):
    self.counts[0] += 1
    self.counts[1]["n"] += self.counts[0]
    return self.out(self.lin(x) + self.counts[1]["n"])


@state.forward(parts={"seen": Counter, "by_name": lambda: defaultdict(list)})
def counters_of_collections(self, x):
    self.seen[x.ndim] += 1
    self.by_name["rows"].append(x.shape[0])
    return self.out(self.lin(x) * self.seen[2]) + sum(self.by_name["rows"])


@state.forward(parts={"numbers": itertools.count})
def counter_of_itertools(self, x):
    return self.out(self.lin(x) + next(self.numbers))


@state.forward(reset=forget_calls)
def global_counter(self, x):
    CALLS["count"] += 1
    SEEN.append(x.shape[1])
    return self.out(self.lin(x) * CALLS["count"]) + len(SEEN)


@state.model(reset=forget_calls)
class Counting(Small):
    made = 0

    def forward(self, x):
        type(self).made += 1
        return self.out(self.lin(x) + Counting.made)


@state.forward(parts={"losses": list})
def losses_collected(self, x):
    h = self.lin(x)
    self.losses.append(h.detach().pow(2).mean())
    return self.out(h) + torch.stack(self.losses).mean()


@state.forward(parts={"recent": lambda: deque(maxlen=2)}, modes=True)
def recent_means(self, x):
    h = self.lin(x)
    self.recent.append(h.mean().item())
    return self.out(h) - sum(self.recent)


@state.forward(parts={"last": lambda: None})
def leaves_its_hidden_units(self, x):
    self.last = self.lin(x).relu()
    return self.out(self.last)


@state.forward(parts={"previous": lambda: None}, other_rows=False)
def previous_output(self, x):
    h = self.lin(x)
    if self.previous is not None:
        h = h + self.previous
    self.previous = h.detach().tanh()
    return self.out(h)


@state.forward(parts={"tables": dict})
def cache_by_size(self, x):
    key = (x.shape[-1], x.dtype)
    if key not in self.tables:
        self.tables[key] = torch.cos(torch.arange(x.shape[-1], dtype=x.dtype))
    return self.out(self.lin(x) + self.tables[key])


@state.forward(parts={"tables": dict})
def cache_by_rows(self, x):
    table = self.tables.setdefault(len(x), torch.arange(len(x))[:, None])
    return self.out(self.lin(x) * table)


@state.forward(reset=forget_tables)
def cached_functions(self, x):
    return self.out(self.lin(x) + sinusoid(x.shape[1], scale=0.5) + table_of_rows(x.shape[0]))


@state.model(sequences)
class GrowingTable(Small):
    """The table of positions is made anew when a longer sequence comes, and is a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(0, WIDTH), persistent=False)

    def forward(self, x):
        if self.table.shape[0] < x.shape[1]:
            self.register_buffer("table", torch.randn(1).item() * torch.ones(x.shape[1], WIDTH), persistent=False)
        return self.out(self.lin(x) + self.table[: x.shape[1]])


@state.model()
class MadeAtFirstCall(Small):
    def forward(self, x):
        if not hasattr(self, "scale"):
            self.scale = 1.0 / x.shape[1]
            self.register_buffer("offset", x.new_ones(x.shape[1]))
        return self.out(self.lin(x) * self.scale + self.offset)


@state.model(sequences, other_rows=False)
class CarriedHidden(Small):
    """The state of the recurrent layer goes on to the next batch, detached."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.hidden = None

    def forward(self, x):
        y, hidden = self.gru(x, self.hidden)
        self.hidden = hidden.detach()
        return self.out(y)


@state.forward(parts={"plain": lambda: torch.ones(WIDTH)})
def plain_tensor_in_place(self, x):
    self.plain.mul_(1.5)
    return self.out(self.lin(x) * self.plain + TABLE)


@state.forward()
def weights_clipped(self, x):
    with torch.no_grad():
        self.lin.weight.clamp_(-0.2, 0.2)
    self.out.weight.data.div_(self.out.weight.data.norm())
    return self.out(self.lin(x))


@state.forward(parts={"scale": lambda: nn.Parameter(torch.zeros(())), "ready": lambda: False})
def parameter_set_by_first_data(self, x):
    if not self.ready:
        with torch.no_grad():
            self.scale.copy_(x.std())
        self.ready = True
    return self.out(self.lin(x) * self.scale)
