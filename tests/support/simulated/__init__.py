"""A simulated accelerator: two devices of type "simulated" whose memory is not the CPU's, open to several processes.

Workers of a test build it, or load what was built before, when they are told to open its memory.
"""

from __future__ import annotations

import functools
import mmap
import os
from pathlib import Path
from types import ModuleType

import ninja
import torch
from torch.utils import cpp_extension

from stagecut.runtime import accelerators

TYPE = "simulated"
_mapped: list[mmap.mmap] = []


@functools.cache
def load() -> None:
    """Build the device, once per user and version of torch, and make it known to this process and to stagecut."""
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    version = torch.__version__.replace(".", "_").replace("+", "_")
    source = str(Path(__file__).with_name("device.cpp"))
    cpp_extension.load(f"stagecut_simulated_{version}", [source], extra_cflags=["-O1"], is_python_module=False)
    torch.utils.rename_privateuse1_backend(TYPE)
    torch._register_device_module(TYPE, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    accelerators.SHARED_MEMORY[TYPE] = accelerators.SharedMemory(_allocate, _share)


def _module() -> ModuleType:
    """Make what is ``torch.simulated``; ops that draw random numbers use the CPU's generator."""
    module = ModuleType(f"torch.{TYPE}")
    module.is_available = lambda: True
    module.device_count = lambda: 2
    module.current_device = lambda: 0
    module.manual_seed_all = lambda seed: None
    module._is_in_bad_fork = lambda: False
    module.get_rng_state = lambda device: torch.get_rng_state()
    module.set_rng_state = lambda state, device: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


_files: dict[int, tuple[int, int, torch.device]] = {}  # by address: descriptor, bytes, device


def _allocate(n_bytes: int, device: torch.device) -> torch.Tensor:
    fd = os.memfd_create("simulated")
    os.ftruncate(fd, n_bytes)
    memory = _over(fd, n_bytes, device)
    _files[memory.data_ptr()] = fd, n_bytes, device
    return memory


def _share(memory: torch.Tensor):
    fd, n_bytes, device = _files[memory.data_ptr()]
    return opened, (f"/proc/{os.getpid()}/fd/{fd}", n_bytes, str(device))


def opened(path: str, n_bytes: int, device: str) -> torch.Tensor:
    """Use memory of another process."""
    load()
    fd = os.open(path, os.O_RDWR)
    try:
        return _over(fd, n_bytes, torch.device(device))
    finally:
        os.close(fd)


def _over(fd: int, n_bytes: int, device: torch.device) -> torch.Tensor:
    mapped = mmap.mmap(fd, n_bytes)
    _mapped.append(mapped)  # for as long as the process lives
    address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    return torch.ops.stagecut_simulated.over(address, n_bytes, device)
