"""Gradients in shared memory: where backwards leave them, and how replicas sum them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stagecut.runtime.shared_gradients import GradientSlots, SharedMemoryReducer, _parts

property_test = settings(max_examples=80, deadline=None, derandomize=True)


def slots_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(parameter, torch.nan) for name, parameter in module.named_parameters()}


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


@property_test
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_every_element_is_summed_by_one_replica_and_shares_are_equal(sizes: list[int], n_replicas: int) -> None:
    seen: list[tuple[int, int]] = []
    shares = []
    for replica in range(n_replicas):
        mine = [(i, e) for i, start, end in _parts(sizes, replica, n_replicas) for e in range(start, end)]
        shares.append(len(mine))
        seen += mine
    assert sorted(seen) == [(index, element) for index, size in enumerate(sizes) for element in range(size)]
    assert max(shares) - min(shares) <= 1


def test_backwards_add_up_in_the_slots() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain = copy.deepcopy(module)
    slots = slots_of(module)
    own = GradientSlots(parameters_of(module), slots)
    for x in torch.randn(3, 5, 3, dtype=torch.float64):
        module(x).square().mean().backward()
        plain(x).square().mean().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == slots[name].data_ptr()
            assert torch.equal(slots[name], plain.get_parameter(name).grad), name
    assert own.written() == tuple(slots)


def test_only_parameters_with_a_gradient_are_reported() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    own = GradientSlots(parameters_of(module), slots_of(module))
    module["frozen"].requires_grad_(False)
    (module["used"](torch.ones(1, 2)) + module["frozen"](torch.ones(1, 2))).sum().backward()
    assert own.written() == ("used.weight", "used.bias")


def test_a_sparse_gradient_lies_dense_in_its_slot_and_is_added_to() -> None:
    module = nn.Embedding(5, 2, sparse=True)
    slots = slots_of(module)
    own = GradientSlots(parameters_of(module), slots)
    for tokens in ([0, 3], [3, 3]):
        module(torch.tensor(tokens)).sum().backward()
    assert own.written() == ("weight",)
    assert slots["weight"].tolist() == [[1, 1], [0, 0], [0, 0], [3, 3], [0, 0]]


class Meeting:
    """What ``all_reduce(MAX)`` is between processes, between threads."""

    def __init__(self, n: int) -> None:
        self._barrier = threading.Barrier(n, timeout=30)
        self._seen: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> None:
        self._seen.append(tensor.clone())
        self._barrier.wait()
        tensor.copy_(torch.stack(self._seen).amax(0))
        self._barrier.wait()


def reduced(uses: Sequence[Sequence[bool]]) -> tuple[list[nn.ModuleList], list[GradientSlots]]:
    """Let replicas go backward through the layers that each uses, then sum; return replicas and their slots."""
    torch.manual_seed(len(uses))
    first = nn.ModuleList(nn.Linear(3, size + 1) for size in range(len(uses[0]))).double()
    replicas = [copy.deepcopy(first) for _ in uses]
    slots = [slots_of(replica) for replica in replicas]
    own = [GradientSlots(parameters_of(replica), s) for replica, s in zip(replicas, slots)]
    meeting = Meeting(len(uses))
    names = list(slots[0])
    reducers = [SharedMemoryReducer(o, names, slots, r, meeting) for r, o in enumerate(own)]
    for r, replica in enumerate(replicas):
        for layer, used in zip(replica, uses[r]):
            if used:
                layer(torch.full((1, 3), r + 1.0, dtype=torch.float64)).sum().backward()
    threads = [threading.Thread(target=reducer.complete) for reducer in reducers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replicas, own


@property_test
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=n, max_size=n)
    )
)
def test_the_first_replica_has_the_sums_of_those_that_used_a_parameter(uses: list[list[bool]]) -> None:
    replicas, own = reduced(uses)
    written = own[0].written()
    for index in range(3):
        users = [r for r, row in enumerate(uses) if row[index]]
        assert (f"{index}.weight" in written) == bool(users)
        gradient = replicas[0][index].weight.grad
        if users:
            assert torch.equal(gradient, torch.full_like(gradient, sum(r + 1.0 for r in users)))
        else:
            assert gradient is None


def test_a_stage_without_parameters_has_nothing_to_sum() -> None:
    own = GradientSlots({}, {})
    met: list[torch.Tensor] = []
    SharedMemoryReducer(own, [], [{}, {}], 1, met.append).complete()
    assert own.written() == ()
    assert not met, "nor anybody to wait for"
