"""Tests of what runs a recorded op: the same as the op itself, for each that has another entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stagecut.entries import _PYTHON, entry

_aten = torch.ops.aten


def _x(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64)


# Arguments as recordings have them, defaults spelled out and left out.
_CALLS: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    _aten.linear.default: [((_x(2, 4, 3), _x(5, 3), _x(5)), {}), ((_x(4, 3), _x(5, 3)), {})],
    _aten.addmm.default: [((_x(5), _x(4, 3), _x(3, 5)), {}), ((_x(5), _x(4, 3), _x(3, 5)), {"beta": 2, "alpha": 0.5})],
    _aten.mm.default: [((_x(4, 3), _x(3, 5)), {})],
    _aten.bmm.default: [((_x(2, 4, 3), _x(2, 3, 5)), {})],
    _aten.mv.default: [((_x(4, 3), _x(3)), {})],
    _aten.convolution.default: [
        ((_x(2, 4, 6, 6), _x(6, 2, 3, 3), _x(6), [2, 1], [1, 0], [1, 1], False, [0, 0], 2), {}),
        ((_x(2, 4, 6, 6), _x(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1), {}),
    ],
    _aten.native_layer_norm.default: [
        ((_x(2, 4, 6), [6], _x(6), _x(6), 1e-5), {}),
        ((_x(4, 6), [6], None, None, 0.1), {}),
    ],
    _aten.native_batch_norm.default: [
        ((_x(4, 3, 5), _x(3), _x(3), torch.zeros(3).double(), torch.ones(3).double(), True, 0.1, 1e-5), {}),
        ((_x(4, 3, 5), None, None, None, None, True, 0.1, 1e-5), {}),
    ],
    _aten.t.default: [((_x(4, 3),), {}), ((_x(3),), {})],
    _aten.transpose.int: [((_x(2, 3, 4), 0, -1), {})],
    _aten.permute.default: [((_x(2, 3, 4), [2, 0, 1]), {})],
    _aten.view.default: [((_x(2, 3, 4), [6, -1]), {}), ((_x(1), []), {})],
    _aten.expand.default: [((_x(3, 1), [2, 3, 4]), {}), ((_x(3, 1), [-1, 4]), {"implicit": True})],
    _aten.select.int: [((_x(3, 4), 1, -1), {})],
    _aten.unsqueeze.default: [((_x(3, 4), -1), {})],
    _aten.squeeze.dim: [((_x(3, 1, 4), 1), {}), ((_x(3, 4), 0), {})],
    _aten.clone.default: [((_x(3, 4).t(),), {}), ((_x(3, 4).t(),), {"memory_format": torch.contiguous_format})],
    _aten.detach.default: [((_x(3, 4).t(),), {})],
    _aten.add.Tensor: [((_x(3, 4), _x(4)), {"alpha": 3}), ((_x(3, 4), 2.5), {}), ((torch.arange(3), 1), {})],
    _aten.add_.Tensor: [((_x(3, 4), _x(4)), {"alpha": 0.5}), ((_x(3, 4), 2), {})],
    _aten.mul.Tensor: [((_x(3, 4), _x(4)), {}), ((_x(3, 4).float(), _x(1)), {}), ((torch.arange(3), 1.5), {})],
    _aten.mul_.Tensor: [((_x(3, 4), _x(4)), {}), ((_x(3, 4), 0.1), {})],
    _aten.sub.Tensor: [((_x(3, 4), _x(4)), {"alpha": 3}), ((_x(3, 4), 1.5), {})],
    _aten.sub_.Tensor: [((_x(3, 4), _x(4)), {}), ((_x(3, 4), 1.5), {"alpha": 2})],
    _aten.div.Tensor: [((_x(3, 4), _x(4)), {}), ((torch.arange(3), 2), {})],
    _aten.div_.Tensor: [((_x(3, 4), _x(4)), {}), ((_x(3, 4), 3), {})],
    _aten.neg.default: [((_x(3),), {})],
    _aten.neg_.default: [((_x(3),), {})],
    _aten.sum.dim_IntList: [
        ((_x(3, 4), [0]), {}),
        ((_x(3, 4, 2), [0, 2], True), {}),
        ((_x(3, 4), None), {}),
        ((_x(3, 4), [0]), {"dtype": torch.float32}),
        ((_x(3, 4), []), {}),
    ],
    _aten.relu.default: [((_x(3, 4),), {})],
    _aten.relu_.default: [((_x(3, 4),), {})],
    _aten.gelu.default: [((_x(3, 4),), {}), ((_x(3, 4),), {"approximate": "tanh"})],
    _aten.silu.default: [((_x(3, 4),), {})],
    _aten.tanh.default: [((_x(3, 4),), {})],
    _aten.tanh_.default: [((_x(3, 4),), {})],
    _aten.sigmoid.default: [((_x(3, 4),), {})],
    _aten.sigmoid_.default: [((_x(3, 4),), {})],
}


def _copied(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("op", _PYTHON, ids=str)
def test_the_entry_does_what_the_op_does(op: Any) -> None:
    for arguments, keywords in _CALLS[op]:
        ours, its = _copied(arguments), _copied(arguments)
        found, expected = entry(op)(*ours, **keywords), op(*its, **keywords)
        pairs = list(zip(found, expected)) if isinstance(expected, tuple) else [(found, expected)]
        pairs += [(a, b) for a, b in zip(ours, its) if isinstance(a, torch.Tensor)]  # what it did in place
        for a, b in pairs:
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a, b)
        shares = isinstance(found, torch.Tensor) and found.data_ptr() == ours[0].data_ptr()
        assert shares == (isinstance(expected, torch.Tensor) and expected.data_ptr() == its[0].data_ptr())


def test_other_ops_run_by_their_own_entry_and_functions_as_they_are() -> None:
    a, b = _x(3, 4), _x(3, 4)
    assert torch.equal(entry(_aten.threshold_backward.default)(a, b, 0), _aten.threshold_backward.default(a, b, 0))
    assert entry(_copied) is _copied
