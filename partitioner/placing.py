"""Several stages for each device: groups of devices that come back, in a loop or in a V."""

from __future__ import annotations

from collections.abc import Sequence

Groups = tuple[tuple[int, ...], ...]  # the devices of each stage, by index


def owners_of(groups: Sequence[Sequence[int]]) -> Groups:
    """List each group once, in the order of the stages.

    >>> owners_of([(0, 1), (2, 3), (2, 3), (0, 1)])
    ((0, 1), (2, 3))
    """
    return tuple(dict.fromkeys(map(tuple, groups)))


def placed(owners: Groups, placement: str, n_chunks: int) -> Groups:
    """Give each group ``n_chunks`` stages: ``loop`` starts again after the last one, ``vee`` goes back from there.

    >>> placed(((0,), (1,)), "loop", 2), placed(((0,), (1,)), "vee", 2)
    (((0,), (1,), (0,), (1,)), ((0,), (1,), (1,), (0,)))
    """
    return owners * n_chunks if placement == "loop" else owners + owners[::-1]


def placement_of(groups: Sequence[Sequence[int]]) -> str:
    """Name how stages lie on groups of devices: ``chain`` (one stage each), ``loop``, ``vee``, or ``other``."""
    own, owners = tuple(map(tuple, groups)), owners_of(groups)
    if len(owners) == len(own):
        return "chain"
    if len(own) % len(owners) == 0 and own == placed(owners, "loop", len(own) // len(owners)):
        return "loop"
    return "vee" if own == placed(owners, "vee", 2) else "other"
