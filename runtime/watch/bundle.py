"""The crash bundle: one JSON file about a step that failed, to attach to an issue; no tensor's values are in it.

``STAGECUT_TRACE`` names the folder. What is in it: the plan, the instructions that were run and where each worker was
among them, the error as Python shows it (its text is whatever the model raised), versions, devices, threads, settings
from the environment that bear on how torch runs, and the counts of ``pm.stats()``.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...records import to_json
from ..instructions import Instruction
from ..requests import StepRequest
from .stats import Stats

VARIABLE = "STAGECUT_TRACE"
FORMAT = 1
_BEFORE = 8  # instructions that are shown of each worker before the one that it is at
# Nothing else of the environment: it holds passwords and tokens.
_SETTINGS = re.compile(r"STAGECUT_\w+|TORCH\w*|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES")
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Scene:
    """What a step was, and how far it came.

    Attributes:
        request: what was asked for; None if workers could not be set up.
        plan: the plan that runs; None while several are tried.
        devices: per worker.
        n_threads: that each worker computes with.
        launch: where workers live.
        program: per worker, its instructions; () where there was none yet.
        positions: by worker, the index of the instruction that it began last, of those that this process knows of.
        stats: what was counted until then.
    """

    request: StepRequest | None
    plan: Any
    devices: tuple[str, ...]
    n_threads: int | None
    launch: str
    program: tuple[tuple[Instruction, ...], ...]
    positions: Mapping[int, int]
    stats: Stats


def keep(error: Exception, scene: Callable[[], Scene]) -> Path | None:
    """Write the bundle if ``STAGECUT_TRACE`` is set, and add a note to the error that says where it is.

    Whatever goes wrong here becomes a note too: the error that is shown stays the step's own.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    try:
        path = _write(Path(folder), bundle(error, scene()))
    except Exception as problem:
        error.add_note(f"stagecut: {VARIABLE}={folder}: no crash bundle: {type(problem).__name__}: {problem}")
        return None
    error.add_note(f"stagecut: what is known of this step is in {path}")
    return path


def bundle(error: BaseException, scene: Scene) -> dict[str, Any]:
    """Return what the file holds."""
    return {
        "format": FORMAT,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "error": _about(error),
        "request": None if scene.request is None else _request(scene.request),
        "workers": [_worker(w, own, scene) for w, own in enumerate(scene.program)],
        "launch": scene.launch,
        "devices": list(scene.devices),
        "n_threads": scene.n_threads,
        "stats": to_json(scene.stats),
        "versions": _versions(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if _SETTINGS.fullmatch(key)},
        "plan": to_json(scene.plan),
    }


def _request(request: StepRequest) -> dict[str, Any]:
    return {
        "kind": request.kind,
        "call": request.call,
        "n_microbatches": request.n_microbatches,
        "autocast": None if request.autocast is None else str(request.autocast),
        "sync": request.sync,
    }


def text_of(error: BaseException) -> str:
    """Return the text of an exception, whose class may be unable to make one."""
    try:
        return str(error)
    except Exception as problem:
        return f"(no text: {type(problem).__name__} in its __str__)"


def _about(error: BaseException) -> dict[str, Any]:
    site = getattr(error, "stagecut", None)
    return {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": text_of(error),
        "site": None if site is None else str(site),
        "traceback": "".join(traceback.format_exception(error)),  # notes included, those of the worker among them
    }


def _worker(worker: int, instructions: tuple[Instruction, ...], scene: Scene) -> dict[str, Any]:
    at = scene.positions.get(worker)
    known = at is not None and at < len(instructions)
    return {
        "worker": worker,
        "position": at,
        "at": str(instructions[at]) if at is not None and known else None,
        "before": [] if at is None else [str(i) for i in instructions[max(0, at - _BEFORE) : at]],
        "instructions": [str(i) for i in instructions],
    }


def _versions() -> dict[str, Any]:
    package = sys.modules[__name__.partition(".")[0]]
    return {
        "stagecut": package.__version__,
        "torch": str(torch.__version__),
        "python": sys.version,
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _write(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write the file, which has its name once it is whole; ranks and processes may share the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = f"-rank{os.environ['RANK']}" if os.environ.get("RANK", "").isdigit() else ""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = folder / f"stagecut-crash-{stamp}{rank}-{os.getpid()}-{next(_numbers)}.json"
    unfinished = path.with_suffix(".tmp")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return path.resolve()
