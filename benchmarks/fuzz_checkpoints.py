"""Fuzz target: checkpoints, with mistakes in what they hold and checksums that fit, or without."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_documents import Choices, folder, mutated, only_reading, text_of
from torch import nn

from stagecut.errors import CheckpointError
from stagecut.runtime.checkpoint import folder as folders
from stagecut.runtime.checkpoint import read_state
from stagecut.runtime.checkpoint.folder import MANIFEST, newest, step_folder
from stagecut.runtime.checkpoint.peers import Alone
from stagecut.runtime.checkpoint.reading import Reader, check_fits, restore
from stagecut.runtime.checkpoint.records import Placement, Training
from stagecut.runtime.checkpoint.saving import snapshot, write
from stagecut.runtime.checkpoint.values import decoded, encoded

Files = dict[str, bytes]
_STRANGE_NAMES = ("../stage-0000.safetensors", "/etc/hostname", "", ".", "..", "a\x00b", "x" * 300, "manifest.json",
                  "process-0000.json", "\ud800", "link")  # fmt: skip


def run(data: bytes) -> bool:
    """Read a checkpoint with the mistakes that the bytes make; say whether it was accepted.

    Only a CheckpointError may leave the reader, and nothing but reading may be done.
    """
    choices = Choices(data)
    kind = choices.number(6)
    if kind == 5:
        return _values(choices)
    files = dict(valid()[choices.number(len(valid()))])
    for _ in range(1 + choices.number(2)):
        _MISTAKES[kind](files, choices)
    return _read(_written(files, choices))


def seeds() -> dict[str, bytes]:
    """Return inputs to begin with: each kind of mistake in each checkpoint."""
    return {
        f"{kind}-{which}-{n}": bytes([kind, which, n, 1, n]) for kind in range(6) for which in (0, 1) for n in range(6)
    }


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.norm(self.first(x)))
        return found


def _training(kind: type[torch.optim.Optimizer]) -> tuple[_Net, Training]:
    model = _Net()
    optimizer = kind(model.parameters(), lr=torch.tensor(0.1) if kind is torch.optim.Adam else 0.1)  # type: ignore[call-arg]
    return model, Training(optimizer, None, None, {"epoch": 3, "order": (1, math.inf)})


@cache
def valid() -> tuple[Files, ...]:
    """Two checkpoints as files: a tied weight, buffers, and the state of two kinds of optimizer."""
    found = []
    for kind in (torch.optim.Adam, torch.optim.Rprop):
        model, training = _training(kind)
        assert training.optimizer is not None
        model(torch.randn(4, 3)).square().sum().backward()
        training.optimizer.step()
        names = list(model.state_dict())
        placement = Placement({"stage-0000": names[:3], "stage-0001": names[3:]}, lambda name: True)
        taken = snapshot(model, placement, training, 12, ("abc", (1, 1)), 0, True)
        with tempfile.TemporaryDirectory() as name:
            path = write(Path(name), taken, Alone(), None)
            found.append({file.name: file.read_bytes() for file in sorted(path.iterdir())})
    folders.read_manifest(path_of_any(found[0]))  # types of records are looked up once, which compiles their names
    for files in found:
        assert _read(_written(dict(files), Choices(b""))), "the seeds are whole"
    return tuple(found)


def path_of_any(files: Files) -> Path:
    """Write files; return the checkpoint's folder."""
    return step_folder(_written(files, Choices(b"")), 12)


def _written(files: Files, choices: Choices) -> Path:
    """Write the files as the newest of two checkpoints, sometimes one that is cut short or has a stranger in it."""
    parent = folder() / "checkpoints"
    shutil.rmtree(parent, ignore_errors=True)
    path = step_folder(parent, 12)
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    what = choices.number(16) if choices.more else 0
    if what == 13:
        (path / "stranger").write_bytes(b"")
    elif what == 14:
        (path / sorted(files)[choices.number(len(files))]).unlink()
    elif what == 15:
        path.rename(step_folder(parent, choices.pick((0, 1, 10**8, 10**12))))
    return parent


def _read(parent: Path) -> bool:
    """Read as ``pm.load`` does."""
    generator, python, numpy = torch.get_rng_state(), _python_state(), np.random.get_state()
    try:
        with only_reading(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                state = read_state(parent)
                path, manifest, _ = newest(parent)
                with Reader(path, manifest) as reader:
                    accepted = _use(reader, state)
            except CheckpointError:
                return False
    finally:
        torch.set_rng_state(generator)
        _set_python_state(python)
        np.random.set_state(numpy)
    return accepted


def _use(reader: Reader, state: dict[str, torch.Tensor]) -> bool:
    assert set(state) == reader.names()
    for name, tensor in state.items():
        assert tuple(tensor.shape) == reader.shape(name)
    kind = (
        torch.optim.Adam if reader.values["groups"] and "betas" in str(reader.values["groups"]) else torch.optim.Rprop
    )
    model, training = _training(kind)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    check_fits(reader, training, names)
    restore(reader, training, names, lambda name: True, 0)
    assert isinstance(training.optimizer, torch.optim.Optimizer)
    for parameter, own in training.optimizer.state.items():
        assert isinstance(parameter, nn.Parameter)
        assert isinstance(own, dict)
    return True


def _python_state() -> Any:
    import random

    return random.getstate()


def _set_python_state(state: Any) -> None:
    import random

    random.setstate(state)


def _manifest(files: Files) -> Any:
    """Return the manifest, a valid one where a first mistake has left none."""
    found = _loaded(files[MANIFEST])
    found = found["manifest"] if isinstance(found, dict) else None
    whole = isinstance(found, dict) and isinstance(found.get("values"), str)
    whole = whole and isinstance(found.get("files"), list) and all(isinstance(r, dict) for r in found["files"])
    whole = whole and all(isinstance(record.get("name"), str) for record in found["files"])
    return found if whole else json.loads(valid()[0][MANIFEST])["manifest"]


def _loaded(text: bytes | str) -> Any:
    """Return a JSON value, None where a first mistake has left none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _seal(files: Files, manifest: Any, *, anew: bool) -> None:
    """Write the manifest, with sums of the files as they are where ``anew``, and its own sum."""
    if anew:
        for record in manifest["files"]:
            data = files.get(record["name"], b"")
            record["n_bytes"], record["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    text = text_of(manifest)
    try:
        canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
        own = hashlib.sha256(canonical.encode()).hexdigest()
    except (RecursionError, ValueError, TypeError):
        own = "0" * 64
    files[MANIFEST] = f'{{"manifest": {text}, "sha256": "{own}"}}'.encode("utf-8", "surrogatepass")


def _in_manifest(files: Files, choices: Choices) -> None:
    manifest = _manifest(files)
    if choices.number(3) == 0 and manifest["files"]:
        choices.pick(manifest["files"])["name"] = choices.pick(_STRANGE_NAMES)
    _seal(files, mutated(manifest, choices), anew=False)


def _in_values(files: Files, choices: Choices) -> None:
    manifest = _manifest(files)
    manifest["values"] = text_of(mutated(_loaded(manifest["values"]), choices))
    _seal(files, manifest, anew=False)


def _in_process(files: Files, choices: Choices) -> None:
    manifest = _manifest(files)
    files["process-0000.json"] = text_of(mutated(_loaded(files["process-0000.json"]), choices)).encode(
        "utf-8", "surrogatepass"
    )
    _seal(files, manifest, anew=True)


def _in_tensors(files: Files, choices: Choices) -> None:
    """Change the header of a safetensors file (its length fits), or the bytes of the file."""
    manifest = _manifest(files)
    name = choices.pick(sorted(name for name in files if name.endswith(".safetensors")))
    data = files[name]
    (length,) = struct.unpack("<Q", data[:8]) if len(data) >= 8 else (0,)
    if choices.number(3):
        header = text_of(mutated(_loaded(data[8 : 8 + length]), choices)).encode("utf-8", "surrogatepass")
        files[name] = struct.pack("<Q", len(header)) + header + data[8 + length :]
    else:
        at = choices.number(len(data) + 1)
        files[name] = data[:at] + choices.rest() + data[at + choices.number(2) :]
    _seal(files, manifest, anew=True)


def _in_bytes(files: Files, choices: Choices) -> None:
    """Damage any file, and leave the sums as they are."""
    name = choices.pick(sorted(files))
    at = choices.number(max(1, len(files[name])))
    files[name] = files[name][:at] + choices.rest() + files[name][at + choices.number(2) :]


def _values(choices: Choices) -> bool:
    """Decode a value that nobody encoded; what is accepted comes back after another round."""
    whole = encoded({"a": [1, (2, math.inf)], 3: torch.ones(2), "b": [None, "x"]}, "value")
    text = text_of(mutated(whole, choices))
    value = _loaded(text)
    with only_reading():
        try:
            found = decoded(value)
        except CheckpointError:
            return False
    again = decoded(json.loads(json.dumps(encoded(found, "value"))))
    assert repr(again) == repr(found)
    return True


_MISTAKES = (_in_manifest, _in_values, _in_process, _in_tensors, _in_bytes)
