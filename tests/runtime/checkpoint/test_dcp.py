"""Exchange with torch.distributed.checkpoint: both ways, exact, and nothing of it is executed."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F

import stagecut
from stagecut.errors import CheckpointError
from stagecut.runtime.checkpoint import from_dcp, read_dcp, to_dcp

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
    made[5].weight = made[0].weight  # tied
    return made.double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=made, dtype=torch.float64)
    return x, torch.randn(8, 6, generator=made, dtype=torch.float64)


def plain_steps(plain: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = F.mse_loss(plain(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pipeline_steps(pm: stagecut.Pipeline, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        losses.append(float(pm.step(x, target=y).loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def compiled(seed: int = 1) -> stagecut.Pipeline:
    return stagecut.compile(
        model(seed), [["cpu"], ["cpu"]], loss_fn=F.mse_loss, microbatches=1, launch="inline", costs="analytic"
    )


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), 1e-2)


def test_training_of_the_plain_model_goes_on_in_a_pipeline(tmp_path: Path) -> None:
    plain = model()
    optimizer = adamw(plain)
    plain_steps(plain, optimizer, range(3))
    state, optimizer_state = get_state_dict(plain, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state, "epoch": 7}, checkpoint_id=tmp_path / "dcp")
    path = from_dcp(tmp_path / "dcp", tmp_path / "checkpoints", 3, optimizer="optimizer")
    assert path == tmp_path / "checkpoints" / "step-00000003"
    pm = compiled()
    own = adamw(pm)
    generator = torch.get_rng_state()
    assert pm.resume(tmp_path / "checkpoints", optimizer=own).step == 3
    assert torch.equal(torch.get_rng_state(), generator)
    assert pipeline_steps(pm, own, range(3, 6)) == plain_steps(plain, optimizer, range(3, 6))
    with pytest.raises(CheckpointError, match="exists, and no checkpoint is overwritten"):
        from_dcp(tmp_path / "dcp", tmp_path / "checkpoints", 3)


def test_training_in_a_pipeline_goes_on_with_the_plain_model(tmp_path: Path) -> None:
    pm = compiled(0)
    own = adamw(pm)
    pipeline_steps(pm, own, range(3))
    pm.save(tmp_path / "checkpoints", 3, optimizer=own, data={"epoch": 7})
    assert to_dcp(tmp_path / "checkpoints", tmp_path / "dcp") == tmp_path / "dcp"
    plain = model(1)
    optimizer = adamw(plain)
    state, optimizer_state = get_state_dict(plain, optimizer)
    whole: dict[str, Any] = {"model": state, "optimizer": optimizer_state, "step": 0, "data": {"epoch": 0}}
    dcp.load(whole, checkpoint_id=tmp_path / "dcp")
    set_state_dict(plain, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optimizer"])
    assert (whole["step"], whole["data"]) == (3, {"epoch": 7})
    assert plain_steps(plain, optimizer, range(3, 6)) == pipeline_steps(pm, own, range(3, 6))
    with pytest.raises(CheckpointError, match="exists, and no checkpoint is overwritten"):
        to_dcp(tmp_path / "checkpoints", tmp_path / "dcp")


def test_weights_alone_load_into_a_pipeline(tmp_path: Path) -> None:
    expected = model().state_dict()
    dcp.save({"model": expected}, checkpoint_id=tmp_path / "under a key")
    dcp.save(dict(expected), checkpoint_id=tmp_path / "alone")
    pm = compiled()
    pm.load_state_dict(read_dcp(tmp_path / "under a key")["model"])
    assert all(torch.equal(pm.state_dict()[name], tensor) for name, tensor in expected.items())
    from_dcp(tmp_path / "alone", tmp_path / "checkpoints", 0, model=None)
    again = compiled()
    again.load(tmp_path / "checkpoints")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in expected.items())


SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35, dtype=torch.float32).reshape(7, 5)
state = {f"along {d}": distribute_tensor(whole, mesh, [Shard(d)]) for d in (0, 1)}
dcp.save({"model": state}, checkpoint_id=sys.argv[1])
dist.barrier()
os._exit(0)  # now and then a thread of gloo lets go of a tensor after the interpreter's end, and aborts the process
"""


def test_tensors_that_ranks_saved_shares_of_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SHARDED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "script.py"), str(tmp_path / "dcp")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    found = read_dcp(tmp_path / "dcp")["model"]
    whole = torch.arange(35, dtype=torch.float32).reshape(7, 5)
    assert all(torch.equal(found[f"along {d}"], whole) for d in (0, 1))


class Malicious:
    """Unpickling this runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def saved(folder: Path, value: Any = 1.0) -> Path:
    dcp.save({"model": {"w": torch.arange(6.0).reshape(2, 3)}, "value": value}, checkpoint_id=folder)
    return folder


def test_metadata_that_runs_a_command_runs_nothing(tmp_path: Path) -> None:
    folder, trace = saved(tmp_path / "dcp"), tmp_path / "it ran"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for hidden in (Malicious(trace), {**vars(metadata), "planner_data": Malicious(trace)}):
        (folder / ".metadata").write_bytes(pickle.dumps(hidden))
        with pytest.raises(CheckpointError, match=r"\.metadata: it names posix\.system.* nothing of it was executed"):
            read_dcp(folder)
        with pytest.raises(CheckpointError, match=r"posix\.system"):
            from_dcp(folder, tmp_path / "checkpoints", 1)
    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cbuiltins\neval\n(V1+1\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch\nload\n.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",  # a dotted name
    ],
)
def test_metadata_that_names_anything_else_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = saved(tmp_path / "dcp")
    (folder / ".metadata").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"it names .*, which no metadata needs"):
        read_dcp(folder)


def test_a_value_that_runs_a_command_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    folder = saved(tmp_path / "dcp", Malicious(trace))
    with pytest.raises(CheckpointError, match=r"value holds more than tensors and numbers: .*posix\.system"):
        read_dcp(folder)
    assert not trace.exists()


def change(folder: Path, change_it: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change_it(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def tensor_entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.w"]


def place(metadata: Any) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == "model.w")


def unnamed() -> Any:
    index = dcp.metadata.MetadataIndex("")
    object.__setattr__(index, "fqn", 7)
    return index


@pytest.mark.parametrize(
    ("change_it", "words"),
    [
        (lambda m: setattr(place(m), "relative_path", "../elsewhere"), "which is no file of the folder"),
        (lambda m: setattr(place(m), "relative_path", "/etc/passwd"), "which is no file of the folder"),
        (lambda m: setattr(place(m), "length", 10**12), "missing, or shorter than"),
        (lambda m: setattr(place(m), "offset", -1), "nowhere in the files"),
        (lambda m: setattr(place(m), "transform_descriptors", ["zstd"]), "cannot undo"),
        (lambda m: setattr(tensor_entry(m), "size", torch.Size([2, 4])), "do not make it up"),
        (lambda m: setattr(tensor_entry(m).chunks[0], "sizes", torch.Size([9, 9])), "and shape"),
        (lambda m: setattr(tensor_entry(m).properties, "dtype", torch.int32), "not the tensor that the metadata says"),
        (lambda m: m.storage_data.update({unnamed(): place(m)}), "a place belongs to 7"),
        (lambda m: m.storage_data.clear(), "nowhere in the files"),
        (lambda m: m.planner_data.pop("model.w"), "nowhere in the state dict"),
        (lambda m: m.planner_data.update({"model.w": ("value",)}), "there twice"),
        (lambda m: setattr(m, "state_dict_metadata", None), "lists no entries"),
    ],
)
def test_metadata_that_contradicts_itself_or_its_files_is_refused(
    tmp_path: Path, change_it: Callable[[Any], None], words: str
) -> None:
    folder = saved(tmp_path / "dcp")
    read_dcp(folder)
    change(folder, change_it)
    with pytest.raises(CheckpointError, match=words):
        read_dcp(folder)


def test_a_tensor_too_large_for_its_bytes_takes_no_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dcp")

    def grow(metadata: Any) -> None:
        huge = torch.Size([1 << 40, 3])
        tensor_entry(metadata).size = tensor_entry(metadata).chunks[0].sizes = huge

    change(folder, grow)
    with pytest.raises(CheckpointError, match=r"a chunk of \(1099511627776, 3\), in \d+ bytes"):
        read_dcp(folder)


def test_damaged_metadata_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dcp", [1.0, {"a": 2}])
    good, refused = (folder / ".metadata").read_bytes(), 0
    chance = random.Random(0)
    for _ in range(400):
        damaged = bytearray(good)
        for _ in range(chance.choice([1, 2, 4])):
            damaged[chance.randrange(len(damaged))] = chance.choice([chance.randrange(256), *b"()].}RbX\x94\x8cK"])
        (folder / ".metadata").write_bytes(damaged)
        try:
            read_dcp(folder)
        except CheckpointError:
            refused += 1
    assert refused > 200
    index = pickle.dumps(dcp.metadata.MetadataIndex("model.w")).replace(b"model.w", b"MODEL.W")
    (folder / ".metadata").write_bytes(index)
    with pytest.raises(CheckpointError, match="holds no metadata of a checkpoint"):
        read_dcp(folder)


@pytest.mark.parametrize("n_bytes", [0, 100])
def test_what_is_cut_short_is_refused(tmp_path: Path, n_bytes: int) -> None:
    for name in (".metadata", "__0_0.distcp"):
        folder = saved(tmp_path / f"dcp of {name}")
        os.truncate(folder / name, n_bytes)
        with pytest.raises(CheckpointError, match=r"no metadata of a checkpoint|shorter than"):
            read_dcp(folder)


def test_what_does_not_belong_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no \.metadata"):
        read_dcp(tmp_path)
    plain = model()
    optimizer = adamw(plain)
    plain_steps(plain, optimizer, range(1))
    dcp.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "numbered")
    with pytest.raises(CheckpointError, match=r"no parameter's name\n.*get_state_dict"):
        from_dcp(tmp_path / "numbered", tmp_path / "checkpoints", 1, optimizer="optimizer")
    with pytest.raises(CheckpointError, match=r"has no 'net'\n.*there are model, optimizer"):
        from_dcp(tmp_path / "numbered", tmp_path / "checkpoints", 1, model="net")
    with pytest.raises(CheckpointError, match=r"model .* is no tensor"):
        from_dcp(tmp_path / "numbered", tmp_path / "checkpoints", 1, model=None)
    assert not (tmp_path / "checkpoints").exists()


def test_nothing_is_left_of_what_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pm = compiled()
    pm.save(tmp_path / "checkpoints", 1)

    def full(state: Any, *, checkpoint_id: Path, **options: Any) -> None:
        checkpoint_id.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=r"dcp could not be written: .*No space left"):
        to_dcp(tmp_path / "checkpoints", tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()
