"""Numbers with units, and names from models made safe to print."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..partitioner.plan import Plan, StageRecord

# What cluster.py and the planner write for a worker without a limit is larger than any memory.
NO_LIMIT = 2.0**61


def duration(seconds: float) -> str:
    """Write seconds with three digits.

    >>> duration(0.0123456), duration(2.5e-5), duration(12.0)
    ('12.3 ms', '0.025 ms', '12 s')
    """
    return f"{seconds:.3g} s" if seconds >= 10 else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def size(n_bytes: float) -> str:
    """Write bytes with three digits and a binary unit.

    >>> size(65536), size(0), size(3.5 * 2**40)
    ('64 KiB', '0 B', '3.5 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1000 or unit == "TiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.3g} {unit}"


def share(value: float) -> str:
    """Write a share of 1 as percent; what is small and not nothing is not written as nothing.

    >>> share(0.44), share(0.00004), share(0.0)
    ('44%', '<1%', '0%')
    """
    return "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun.

    >>> count(1, "value"), count(2, "value"), count(2, "box", "boxes")
    ('1 value', '2 values', '2 boxes')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def clean(name: str) -> str:
    """Escape what is no printable character: a name cannot move a terminal's cursor or break an XML file.

    >>> clean("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def columns(text: str) -> int:
    """Count the columns of ``text``; wide characters have two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, limit: int) -> str:
    """Cut ``text`` to ``limit`` columns and keep its end, which tells modules of one parent apart.

    >>> shorten("encoder.layers.11.norm", 12)
    '…ers.11.norm'
    """
    if columns(text) <= limit:
        return text
    while columns(text) > limit - 1:
        text = text[1:]
    return f"…{text}"


def memory(stage: StageRecord) -> str:
    """Write what is held on a stage's device against its limit."""
    if stage.memory_limit_bytes >= NO_LIMIT:
        return f"{size(stage.device_bytes)}, no limit"
    filled = stage.device_bytes / stage.memory_limit_bytes if stage.memory_limit_bytes > 0 else 1.0
    return f"{size(stage.device_bytes)} of {size(stage.memory_limit_bytes)} ({share(filled)})"


def filled(plan: Plan, stage: StageRecord) -> float:
    """Return what a device holds as a share of its limit; without one, of what the fullest device holds."""
    if stage.memory_limit_bytes >= NO_LIMIT:
        return stage.device_bytes / (max(other.device_bytes for other in plan.stages) or 1)
    return stage.device_bytes / stage.memory_limit_bytes if stage.memory_limit_bytes > 0 else 1.0


def bar(part: float) -> str:
    """Draw a share of 1 as ten characters; more than all of it ends in a sign of its own.

    >>> bar(0.42), bar(0.001), bar(1.3), bar(0.0)
    ('####......', '|.........', '#########>', '..........')
    """
    if part > 1 + 1e-9:
        return "#" * 9 + ">"
    full = round(part * 10)
    return ("#" * full or ("|" if part > 0 else "")).ljust(10, ".")


def devices(stage: StageRecord) -> str:
    """List a stage's devices; many of one name are counted.

    >>> from dataclasses import replace
    >>> stage = StageRecord(0, ("cpu", "cpu"), (0, 1), 0.0, 0.0, 0, 0, 1, 0, 1.0)
    >>> devices(stage), devices(replace(stage, devices=("A100:0", "A100:1")))
    ('2 x cpu', 'A100:0, A100:1')
    """
    names = list(dict.fromkeys(stage.devices))
    counts = [stage.devices.count(name) for name in names]
    return ", ".join(clean(name) if n == 1 else f"{n} x {clean(name)}" for name, n in zip(names, counts))


def device_kinds(stage: StageRecord) -> str:
    """Write a stage's devices in little room: the name of one, the kinds of several.

    >>> device_kinds(StageRecord(0, ("A100:0", "A100:1"), (0, 1), 0.0, 0.0, 0, 0, 1, 0, 1.0))
    '2 x A100'
    """
    if len(stage.devices) == 1:
        return clean(stage.devices[0])
    kinds = [name.partition(":")[0] for name in stage.devices]
    return ", ".join(f"{kinds.count(kind)} x {clean(kind)}" for kind in dict.fromkeys(kinds))


def n_ops(plan: Plan, stage: int) -> int:
    """Count the ops of a stage."""
    return sum(1 for op in plan.ops if op.stage == stage)


def shape(replicas: Sequence[int], recomputed: Sequence[int], n_workers: int) -> str:
    """Name stages by their replica counts, and say how many of them compute activations again.

    >>> shape([1], [], 1), shape([2, 2], [0], 4), shape([3, 1], [], 4), shape([1, 1, 1, 1], [], 2)
    ('1 x 1', '2 x 2, 1 recomputed', '3 + 1', '4 x 1, 2 to a device')
    """
    if not replicas:
        return ""
    equal = len(set(replicas)) == 1
    text = f"{len(replicas)} x {replicas[0]}" if equal else " + ".join(map(str, replicas))
    if n_workers < sum(replicas):
        text += f", {sum(replicas) // n_workers} to a device"
    return f"{text}, {len(recomputed)} recomputed" if recomputed else text
