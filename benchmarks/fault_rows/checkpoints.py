"""Faults of checkpoints: a disk that is full or read-only, kills, damage, pickles."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import stagecut

from .injector import Injector, batch
from .outcome import Outcome, Row
from .steps import compiled, equal

_KILLS = re.compile(r"(\d+) kills, (\d+) .* written, (\d+) steps saved: (\d+) bad loads\n")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Have a small file system of its own in a folder; needs root."""
    place = folder / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def limited_files(n_bytes: int) -> Iterator[None]:
    """Let no file become larger, as a quota would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def refused_save(pm: stagecut.Pipeline, place: Path) -> Outcome:
    """Save where that cannot be done; the earlier checkpoint loads, and training goes on."""
    try:
        pm.save(place, 2)
    except stagecut.CheckpointError as error:
        named = str(place) in str(error)
        unfinished = [path.name for path in place.iterdir() if path.name != "step-00000001"]
        return Outcome(int(named), f"CheckpointError: {os.strerror(error.__cause__.errno)}", equal=not unfinished)  # type: ignore[union-attr]
    return Outcome(0, "nothing")


def _goes_on(pm: stagecut.Pipeline, place: Path, found: Outcome) -> Outcome:
    before = {name: value.clone() for name, value in pm.state_dict().items()}
    loaded = pm.load(place)
    x, y = batch(0)
    found.equal = found.equal and loaded.step == 1 and equal(dict(pm.state_dict()), before)
    pm.step(x, target=y)
    return found


def full(folder: Path) -> Outcome:
    """Save on a disk that has room for one and a half checkpoints."""
    with mounted(folder, "size=48k") as place, compiled(Injector("none", folder, times=0), launch="inline") as pm:
        pm.save(place, 1)
        return _goes_on(pm, place, refused_save(pm, place))


def read_only(folder: Path) -> Outcome:
    """Save on a disk that cannot be written."""
    with mounted(folder, "size=1m") as place, compiled(Injector("none", folder, times=0), launch="inline") as pm:
        pm.save(place, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        return _goes_on(pm, place, refused_save(pm, place))


def quota(folder: Path) -> Outcome:
    """Save where no file may be as large as a stage's."""
    place = folder / "checkpoints"
    with compiled(Injector("none", folder, times=0), launch="inline") as pm:
        pm.save(place, 1)
        with limited_files(256):
            found = refused_save(pm, place)
        return _goes_on(pm, place, found)


def kills(folder: Path) -> Outcome:
    """Kill a process while it saves, forty times."""
    script = str(Path(__file__).parents[1] / "save_kills.py")
    done = subprocess.run([sys.executable, script, "--kills", "40"], capture_output=True, text=True, check=True)
    found = _KILLS.fullmatch(done.stdout)
    assert found is not None, done.stdout
    return Outcome(int(found[2]), "the newest whole one loads", equal=found[4] == "0")


def damaged(how: Callable[[Path], None]) -> Callable[[Path], Outcome]:
    """Make a row in which the newest checkpoint is damaged, and the one before it is loaded."""

    def run(folder: Path) -> Outcome:
        place = folder / "checkpoints"
        with compiled(Injector("none", folder, times=0), launch="inline") as pm:
            pm.save(place, 1)
            wanted = {name: value.clone() for name, value in pm.state_dict().items()}
            with torch.no_grad():
                pm.model.first.bias.add_(1.0)  # type: ignore[union-attr, operator]
            how(pm.save(place, 2).wait())
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                loaded = pm.load(place)
            same = loaded.step == 1 and equal(dict(pm.state_dict()), wanted)
        said = any("passed over" in str(one.message) for one in told)
        return Outcome(int(said), "passed over, with a warning", equal=same and not (folder / "owned").exists())

    return run


def _flip(path: Path) -> None:
    file = path / "stage-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path / "stage-0000.safetensors", 100)


def _swap(path: Path) -> None:
    first, second = path / "stage-0000.safetensors", path / "stage-0001.safetensors"
    shutil.move(first, path / "kept")
    shutil.move(second, first)
    shutil.move(path / "kept", second)


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.marker),)


def _pickle(path: Path) -> None:
    (path / "process-0000.safetensors").write_bytes(pickle.dumps(_Evil(path.parents[1] / "owned")))


def pickled_plan(folder: Path) -> Outcome:
    """Load a pickle as a plan."""
    path = folder / "plan.json"
    path.write_bytes(pickle.dumps(_Evil(folder / "owned")))
    try:
        stagecut.load(path)
    except stagecut.PlanError as error:
        return Outcome(1, type(error).__name__, equal=not (folder / "owned").exists())
    return Outcome(0, "nothing")


ROWS = [
    Row("disk full while saving", full, needs_root=True),
    Row("read-only disk", read_only, needs_root=True),
    Row("quota", quota),
    Row("kill during save, 40 times", kills),
    Row("checkpoint: flipped bit", damaged(_flip)),
    Row("checkpoint: truncated file", damaged(_truncate)),
    Row("checkpoint: missing file", damaged(lambda path: (path / "stage-0001.safetensors").unlink())),
    Row("checkpoint: swapped files", damaged(_swap)),
    Row("pickle in a checkpoint", damaged(_pickle)),
    Row("pickle as a plan", pickled_plan),
]
