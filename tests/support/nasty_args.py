"""Nasty models, kinds ``args`` and ``results``: what goes in and comes out is not just tensors."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from nasty_base import STEPS, WIDTH, Registry, Small, features, no_kwargs, sequences, two
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

arguments = Registry("args")
results = Registry("results")


@dataclass
class Batch:
    x: torch.Tensor
    mask: torch.Tensor | None = None
    kind: str = "plain"


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Cache:
    """What a decoder keeps between calls: an object that torch does not know."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.length = 0

    def update(self, key: torch.Tensor) -> torch.Tensor:
        self.keys.append(key)
        self.length += key.shape[1]
        return torch.cat(self.keys, 1)


def x(rows: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH)


@arguments.forward(lambda rows: (x(rows), None, 2, "tanh", True))
def none_int_text_and_bool(self, x, mask, power, kind, flag):
    h = getattr(torch, kind)(self.lin(x)) ** power
    h = h if mask is None else h * mask
    return self.out(h) if flag else h


@arguments.forward(kwargs=lambda rows: {"shift": 0.5, "scale": 2.0})
def defaults_and_keyword_only(self, x, mask=None, *, scale=1.0, shift: float = 0.0, kind="relu"):
    return self.out(getattr(torch, kind)(self.lin(x)) * scale + shift)


@arguments.forward(lambda rows: (x(rows), x(rows), x(rows)), kwargs=lambda rows: {"b": x(rows), "a": x(rows)})
def stars(self, *many, **named):
    h = sum(self.lin(value) * (i + 1) for i, value in enumerate(many))
    for name, value in named.items():
        h = h + value * len(name) if name != "a" else h * value
    return self.out(h)


@arguments.forward(lambda rows: ({"x": x(rows), "extra": {"scale": 3.0, "y": x(rows)}},))
def nested_dicts(self, batch):
    h = self.lin(batch["x"]) * batch["extra"]["scale"]
    return self.out(h + batch.get("mask", 0) + batch["extra"]["y"])


@arguments.forward(lambda rows: ({"x": x(rows), "y": x(rows)},))
def dict_popped(self, batch):
    batch = dict(batch)
    y = batch.pop("y")
    batch["z"] = y * 2
    return self.out(self.lin(batch["x"]) + sum(value for key, value in sorted(batch.items())))


@arguments.forward(lambda rows: ([x(rows), x(rows)], (x(rows), [x(rows), 4])))
def lists_and_tuples(self, many, rest):
    first, (second, number) = rest
    return self.out(self.lin(torch.stack(many).sum(0)) * first + second * number + len(many))


@arguments.forward(lambda rows: (Batch(x(rows), torch.rand(rows, 1) > 0.5),))
def dataclass_given(self, batch):
    h = self.lin(batch.x)
    if batch.mask is not None and batch.kind == "plain":
        h = h * batch.mask
    return self.out(h)


@arguments.forward(lambda rows: (Pair(x(rows), x(rows)),))
def named_tuple_given(self, pair):
    return self.out(self.lin(pair.left) * pair.right) + len(pair._fields)


@arguments.forward(lambda rows: (torch.randn(rows, STEPS, WIDTH), Cache()))
def cache_filled(self, x, cache):
    h = cache.update(self.lin(x))
    h = cache.update(h.tanh())
    return self.out(h), cache.length


@arguments.forward(lambda rows: (torch.randn(rows, STEPS, WIDTH), None))
def cache_made_and_returned(self, x, cache):
    cache = Cache() if cache is None else cache
    return self.out(cache.update(self.lin(x))), cache


@arguments.forward(lambda rows: (x(rows), torch.randn(WIDTH), torch.tensor(2.0)))
def tensors_without_rows(self, x, vector, number):
    return self.out(self.lin(x) * vector + number)


@arguments.forward(lambda rows: (x(rows), torch.randn(4, WIDTH)))
def table_with_as_many_rows(self, x, table):
    """The second argument has four rows whatever the batch is; the example's batch has four too."""
    return self.out(self.lin(x) + self.lin(table).mean(0))


@arguments.forward(lambda rows: (lambda value: (value, value))(x(rows)))
def one_tensor_twice(self, x, y):
    return self.out(self.lin(x) * y + (0 if x is y else 1))


@arguments.forward(lambda rows: (x(rows), torch.tanh, torch.float32, slice(0, 3), range(2)))
def python_objects(self, x, function, dtype, part, times):
    h = self.lin(x).to(dtype)
    for _ in times:
        h = function(h)
    return h[:, part] + self.out(h)


@arguments.forward(lambda rows: ([torch.randn(2 + i % 3, WIDTH) for i in range(rows)],), other_rows=False)
def tensors_of_many_lengths(self, many):
    return self.out(torch.stack([self.lin(value).sum(0) for value in many]))


@arguments.forward(
    lambda rows: (pack_sequence([torch.randn(3, WIDTH)] * rows),), parts={"gru": lambda: nn.GRU(WIDTH, WIDTH)}
)
def packed_given(self, packed: PackedSequence):
    return self.out(self.gru(packed)[1][0]) + packed.batch_sizes[0]


@arguments.forward(lambda rows: (x(rows).requires_grad_(),))
def input_with_gradient(self, x):
    h = self.lin(x)
    return self.out(h * 2 if x.requires_grad and x.is_leaf else h)


@arguments.forward(two, kwargs=lambda rows: {"mask": torch.rand(rows, WIDTH) > 0.3})
def mask_by_keyword(self, x, y, mask=None, **others):
    h = torch.where(mask, self.lin(x), y) if mask is not None else x
    return self.out(h) + len(others)


@arguments.forward(lambda rows: (torch.randn(STEPS, WIDTH), x(rows)), other_rows=False)
def rows_only_in_the_second(self, shared, x):
    return self.out(self.lin(x) + shared.mean(0))


# A capture keeps what is not a tensor as it was, so a batch of other rows would be another call.
@arguments.forward(lambda rows: (x(rows), rows), other_rows=False)
def rows_as_a_number(self, x, n):
    return self.out(self.lin(x)).view(n, 3) / n


@arguments.forward(lambda rows: (x(rows), [1] * rows), other_rows=False)
def rows_as_a_list(self, x, lengths):
    return self.out(self.lin(x) * torch.tensor(lengths)[:, None]) + len(lengths)


@results.forward()
def dict_result(self, x):
    h = self.lin(x)
    return {"logits": self.out(h), "hidden": [h, (h.detach(), None)], "rows": x.shape[0], 3: "three"}


@results.forward()
def ordered_result(self, x):
    h = self.lin(x)
    return OrderedDict(out=self.out(h), many=defaultdict(list, {"h": [h]}))


@results.forward()
def dataclass_result(self, x):
    return Batch(self.out(self.lin(x)), kind=f"width {x.shape[1]}")


@results.forward()
def named_tuple_result(self, x):
    h = self.lin(x)
    return Pair(self.out(h), Pair(h, x))


class Answer:
    __slots__ = ("extra", "logits")

    def __init__(self, logits: torch.Tensor, extra: Any) -> None:
        self.logits, self.extra = logits, extra


@results.forward()
def object_result(self, x):
    return Answer(self.out(self.lin(x)), {"rows": len(x), "mean": x.mean()})


@results.forward()
def numbers_result(self, x):
    y = self.out(self.lin(x))
    return y, x.shape[0], x.shape, y.dtype, str(x.device), float(x.shape[0]) / 2, x.shape[0] > 3, ()


@results.forward()
def numbers_of_data_result(self, x):
    y = self.out(self.lin(x))
    return y, y.max().item(), y.argmax(1).tolist(), f"{y.mean():.4f}", bool(y[0, 0] > 0), y.detach().numpy()


@results.forward()
def same_tensor_twice_result(self, x):
    h = self.lin(x)
    y = self.out(h)
    return [y, y, h, h.view(-1), x, x[:1]]


@results.forward()
def parameter_result(self, x):
    return self.out(self.lin(x)), self.lin.weight, self.out.weight.norm(), self.lin.bias * 2


@results.forward(sequences, kwargs=no_kwargs)
def list_of_steps_result(self, x):
    return [self.out(self.lin(step)) for step in x.unbind(1)], list(x.shape)


@results.forward()
def loss_result(self, x):
    y = self.out(self.lin(x))
    return y.pow(2).mean(), {"loss": y.detach().mean(), "rows": torch.tensor(x.shape[0])}


@results.forward()
def list_per_row_result(self, x):
    return list(self.out(self.lin(x))), {i: row * 2 for i, row in enumerate(x)}


@results.forward(features)
def changed_later_result(self, x):
    h = self.lin(x) * 1
    kept = {"h": h, "y": h.mean(1)}
    h += 1
    kept["z"] = self.out(h)
    return kept


@results.model()
class NothingElse(Small):
    """A single result of None beside the loss that is left as an attribute would be lost; here it is returned."""

    def forward(self, x):
        return None, self.out(self.lin(x)), None
