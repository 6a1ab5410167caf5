"""Packets: the values of one wire group and microbatch as one block of bytes, without pickle.

Layout: 8 bytes total length, 8 bytes header length, the header (JSON), then each tensor at a multiple of 64 bytes.
The header keeps dtype, shape, stride order and whether a gradient is wanted; scalars and nesting stand in it as JSON.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

PREFIX_BYTES = 16
_ALIGN = 64
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def encode(values: list[Any], wants_gradient: list[bool]) -> torch.Tensor:
    """Pack ``values`` into a new 1-D uint8 CPU tensor.

    ``wants_gradient[i]`` says, for a tensor ``values[i]``, that the receiver shall send a gradient back.
    """
    tensors: list[torch.Tensor] = []
    described = [_describe(value, tensors) for value in values]
    header = _header_bytes(json.dumps([described, wants_gradient]))
    offsets, total = _offsets(len(header), tensors)
    packet = torch.empty(total, dtype=torch.uint8)
    packet[:PREFIX_BYTES] = torch.tensor([total, len(header)], dtype=torch.int64).view(torch.uint8)
    packet[PREFIX_BYTES : PREFIX_BYTES + len(header)] = header
    for tensor, offset in zip(tensors, offsets):
        if tensor.numel():
            _view(packet, offset, tensor.dtype, tensor.shape, _dense_strides(tensor)).copy_(tensor)
    return packet


def decode(packet: torch.Tensor, device: torch.device) -> tuple[list[Any], list[bool]]:
    """Unpack what :func:`encode` packed; tensors on a CPU share the packet's memory."""
    header_bytes = int(packet[8:PREFIX_BYTES].view(torch.int64).item())
    header = packet[PREFIX_BYTES : PREFIX_BYTES + header_bytes].numpy().tobytes()
    described, wants_gradient = _parsed(header)
    tensors = _read_tensors(packet, header_bytes, described, device)
    values = [_rebuild(item, tensors) for item in described]
    return values, list(wants_gradient)


def total_bytes(prefix: torch.Tensor) -> int:
    """Read a packet's total length from its first 8 bytes."""
    return int(prefix[:8].view(torch.int64).item())


@functools.lru_cache(maxsize=4096)
def _header_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@functools.lru_cache(maxsize=4096)
def _parsed(header: bytes) -> Any:
    return json.loads(header)


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise TypeError(f"a {value.layout} tensor cannot cross a stage boundary")
        index = len(tensors)
        tensors.append(value.detach())
        dtype = str(value.dtype).removeprefix("torch.")
        return {"t": index, "d": dtype, "s": list(value.shape), "r": list(_dense_strides(value))}
    if isinstance(value, torch.Size):
        return {"z": list(value)}
    if isinstance(value, torch.dtype):
        return {"y": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"v": str(value)}
    if type(value) is tuple:
        return {"u": [_describe(item, tensors) for item in value]}
    if type(value) is list:
        return {"l": [_describe(item, tensors) for item in value]}
    if type(value) is dict:
        return {"m": {key: _describe(item, tensors) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"c": value}
    raise TypeError(f"a value of type {type(value).__name__} cannot cross a stage boundary")


def _rebuild(item: Any, tensors: list[torch.Tensor]) -> Any:
    if "t" in item:
        return tensors[item["t"]]
    if "z" in item:
        return torch.Size(item["z"])
    if "y" in item:
        return _DTYPES[item["y"]]
    if "v" in item:
        return torch.device(item["v"])
    if "u" in item:
        return tuple(_rebuild(child, tensors) for child in item["u"])
    if "l" in item:
        return [_rebuild(child, tensors) for child in item["l"]]
    if "m" in item:
        return {key: _rebuild(child, tensors) for key, child in item["m"].items()}
    return item["c"]


def _tensor_items(described: Any) -> list[Any]:
    found: list[Any] = []

    def walk(item: Any) -> None:
        if isinstance(item, list):
            for child in item:
                walk(child)
        elif "t" in item:
            found.append(item)
        elif "u" in item or "l" in item:
            walk(item.get("u", item.get("l")))
        elif "m" in item:
            walk(list(item["m"].values()))

    walk(described)
    return found


def _read_tensors(packet: torch.Tensor, header_bytes: int, described: Any, device: torch.device) -> list[torch.Tensor]:
    tensors = []
    offset = _aligned(PREFIX_BYTES + header_bytes)
    for item in _tensor_items(described):
        dtype = _DTYPES[item["d"]]
        tensor = _view(packet, offset, dtype, item["s"], item["r"])
        tensors.append(tensor if device.type == "cpu" else tensor.to(device))
        offset = _aligned(offset + tensor.numel() * dtype.itemsize)
    return tensors


def _offsets(header_bytes: int, tensors: list[torch.Tensor]) -> tuple[list[int], int]:
    offsets = []
    offset = _aligned(PREFIX_BYTES + header_bytes)
    for tensor in tensors:
        offsets.append(offset)
        offset = _aligned(offset + tensor.numel() * tensor.element_size())
    return offsets, offset


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return strides that keep the order of dimensions (``channels_last`` stays so) without gaps or overlaps."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()


def _view(packet: torch.Tensor, offset: int, dtype: torch.dtype, shape: Any, strides: Any) -> torch.Tensor:
    n = 1
    for size in shape:
        n *= size
    flat = packet[offset : offset + n * dtype.itemsize].view(dtype)
    return flat.as_strided(tuple(shape), tuple(strides))
