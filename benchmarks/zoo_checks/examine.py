"""Examine one entry by one method, in a process of its own; what is known so far is written as it becomes known."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo_entries import Entry, load_group

from .balance import MIN_BLOCKS, N_PARTS, best_parts, captured_flops, repeated_blocks
from .judge import Subject, call_of, doubtful, judge
from .peers import export_subject, fx_subject, peer_flops, pipelining_subject

METHODS = ("eager", "stagecut", "fx", "export", "pipelining")
PEERS = METHODS[2:]
MEBIBYTE = 1 << 20
# Models with more parameters are not judged again in float64.
_MAX_DOUBLE = 100_000_000


def examine_into(group: str, name: str, method: str, path: str, limit_s: float, memory: int) -> None:
    """Examine an entry and write the record to ``path``; called in a new process, whose output goes beside it.

    The process is killed after ``limit_s`` seconds of its processor's time, which does not depend on what else runs,
    and may take ``memory`` bytes.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    _end_with_parent()
    with open(f"{path}.log", "w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")

        def save(record: dict[str, Any]) -> None:
            Path(f"{path}.part").write_text(json.dumps(record))
            Path(f"{path}.part").replace(path)

        try:
            examine(load_group(group).entries[name], method, save)
        except Exception as error:
            trace = traceback.format_exc().splitlines()[-12:]
            save({"kind": "broken", "error": f"{type(error).__name__}: {str(error)[:300]}", "traceback": trace})


def _end_with_parent() -> None:
    """Ask the kernel to end this process when the one that forked it ends, where there is such a call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def examine(entry: Entry, method: str, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Capture, compare, and measure the balance; the record is also handed to ``save`` whenever it grows."""
    record: dict[str, Any] = {"kind": "crashed"}
    save(record)
    verdicts, subject, maker = _judged(entry, method, record, save)
    if subject is not None and doubtful(verdicts) and _n_parameters(subject.owner) < _MAX_DOUBLE:
        record["float32"] = verdicts
        again: dict[str, Any] = {}
        verdicts, _, _ = _judged(entry, method, again, lambda _: None, double=True)
        record["double"] = bool(verdicts)
        verdicts = verdicts or record["float32"]
    record["checks"] = verdicts
    record["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEBIBYTE
    save(record)
    if subject is not None and method != "eager" and record["n_blocks"] >= MIN_BLOCKS:
        record["balance"] = _balance(entry, method, subject, maker)
    record["cpu_s"] = time.process_time()
    save(record)
    return record


class _Maker:
    """Makes the subject of a method, and notes what capturing took."""

    def __init__(self, method: str, record: dict[str, Any]) -> None:
        self.method = method
        self.record = record
        self.captured: Any = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
        self.record["n_parameters"] = _n_parameters(model)
        self.record["n_blocks"] = len(repeated_blocks(model))
        before = _reset_peak()
        start, start_cpu = time.perf_counter(), time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subject, facts = self._make(model, args, kwargs)
        self.record["capture_s"] = time.perf_counter() - start
        self.record["capture_cpu_s"] = time.process_time() - start_cpu
        self.record["capture_mib"] = max(0.0, _status("VmHWM") - before)
        said = [str(item.message) for item in caught if "stagecut" in str(item.message)]
        self.record.update(facts, warnings=said)
        return subject

    def _make(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Subject, dict[str, Any]]:
        if self.method == "eager":
            return Subject(model, model), {"kind": "whole"}
        if self.method == "stagecut":
            return self._stagecut(model, args, kwargs)
        makers = {"fx": fx_subject, "export": export_subject, "pipelining": pipelining_subject}
        return makers[self.method](model, args, kwargs)

    def _stagecut(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Subject, dict[str, Any]]:
        import stagecut

        self.captured = stagecut.capture(model, args, kwargs)
        opaque = self.captured.opaque
        return Subject(self.captured.module, model), {
            "kind": "opaque" if self.captured.is_whole else "parts" if opaque else "whole",
            "opaque": [str(call) for call in opaque],
            "n_ops": sum(node.op.startswith("call_") for node in self.captured.graph.nodes),
        }


def _judged(
    entry: Entry, method: str, record: dict[str, Any], save: Callable[[dict[str, Any]], None], *, double: bool = False
) -> tuple[dict[str, Any], Subject | None, _Maker]:
    maker = _Maker(method, record)

    def make(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
        try:
            return maker(model, args, kwargs)
        except Exception as error:
            lines = str(error).strip().splitlines()
            record.update(kind="refused", error=f"{type(error).__name__}: {lines[0][:300] if lines else ''}")
            raise _RefusedError from error
        finally:
            save(record)

    try:
        verdicts, subject = judge(entry, make, double=double)
    except _RefusedError:
        return {}, None, maker
    return verdicts, subject, maker


class _RefusedError(Exception):
    """The method gave an error instead of a graph."""


def _balance(entry: Entry, method: str, subject: Subject, maker: _Maker) -> float | None:
    if method == "pipelining":
        return None
    args, kwargs = call_of(entry, entry.batch, seed=1)
    try:
        stagecut = method == "stagecut"
        costs = captured_flops(maker.captured, args, kwargs) if stagecut else peer_flops(subject, args, kwargs)
        if sum(costs) > 0:
            maker.record["heaviest"] = max(costs) * N_PARTS / sum(costs)
        return best_parts(costs)
    except Exception as error:
        maker.record["balance_error"] = f"{type(error).__name__}: {str(error)[:200]}"
        return None


def _n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _reset_peak() -> float:
    """Start the peak of resident memory again from what is resident now, where the kernel lets us; return that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmHWM")
    return _status("VmRSS")


def _status(key: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), 0.0)
