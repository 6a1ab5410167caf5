"""Packets: the values of one wire group and microbatch as one block of bytes, without pickle.

Layout: 8 bytes total length, 8 bytes header length, the header (JSON), then each tensor at a multiple of 64 bytes.
The header keeps dtype, shape, stride order and whether a gradient is wanted; scalars and nesting stand in it as JSON.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PREFIX_BYTES = 16
_ALIGN = 64
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a packet, and how it is to be read."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, packet: torch.Tensor) -> torch.Tensor:
        """Return the tensor over the packet's memory, with a version counter of its own."""
        start = packet.storage_offset() + self.offset
        over = torch.empty(0, dtype=self.dtype, device=packet.device)
        return over.set_(packet.untyped_storage(), start // self.dtype.itemsize, self.shape, self.strides)


@dataclass(frozen=True)
class Packed:
    """Values that are ready to be written into ``n_bytes`` of memory, wherever that lies."""

    tensors: list[torch.Tensor]
    header: str
    start: np.ndarray[Any, np.dtype[np.uint8]]
    places: tuple[_Place, ...]
    n_bytes: int

    def write(self, packet: torch.Tensor) -> torch.Tensor:
        """Write the packet into a 1-D uint8 CPU tensor of ``n_bytes``, and return it."""
        packet.numpy()[: len(self.start)] = self.start
        return self.write_body(packet)

    def write_body(self, packet: torch.Tensor) -> torch.Tensor:
        """Write the tensors alone, each where it lies in the packet, into memory of any device."""
        for tensor, place in zip(self.tensors, self.places):
            if tensor.numel():
                place.view(packet).copy_(tensor)
        return packet


@dataclass(frozen=True)
class DevicePacket:
    """A packet whose body lies in the memory of an accelerator, and its head in a string."""

    header: str
    body: torch.Tensor

    @classmethod
    def of(cls, header: str, device: torch.device) -> DevicePacket:
        """Make room for the body that belongs to a header."""
        return cls(header, torch.empty(_parsed(header.encode())[3], dtype=torch.uint8, device=device))

    def numel(self) -> int:
        """Return how many bytes it has."""
        return self.body.numel()


def pack(values: list[Any], wants_gradient: list[bool]) -> Packed:
    """Describe ``values`` as a packet; nothing is copied yet.

    ``wants_gradient[i]`` says, for a tensor ``values[i]``, that the receiver shall send a gradient back.
    """
    tensors: list[torch.Tensor] = []
    described = [_describe(value, tensors) for value in values]
    header = json.dumps([described, wants_gradient])
    return Packed(tensors, header, *_prepared(header))


def encode(values: list[Any], wants_gradient: list[bool]) -> torch.Tensor:
    """Pack ``values`` into a new 1-D uint8 CPU tensor; see :func:`pack`."""
    packed = pack(values, wants_gradient)
    return packed.write(torch.empty(packed.n_bytes, dtype=torch.uint8))


@functools.lru_cache(maxsize=4096)
def _prepared(text: str) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], tuple[_Place, ...], int]:
    """Return prefix and header as bytes, where the tensors go, and the packet's length."""
    header = text.encode()
    _, _, places, total = _parsed(header)
    prefix = total.to_bytes(8, sys.byteorder) + len(header).to_bytes(8, sys.byteorder)
    return np.frombuffer(prefix + header, dtype=np.uint8), places, total


@functools.lru_cache(maxsize=4096)
def _parsed(header: bytes) -> tuple[Any, list[bool], tuple[_Place, ...], int]:
    described, wants_gradient = json.loads(header)
    places = []
    offset = _aligned(PREFIX_BYTES + len(header))
    for item in _tensor_items(described):
        place = _Place(offset, _DTYPES[item["d"]], tuple(item["s"]), tuple(item["r"]))
        places.append(place)
        offset = _aligned(offset + math.prod(place.shape) * place.dtype.itemsize)
    return described, wants_gradient, tuple(places), offset


def decode(packet: torch.Tensor | DevicePacket, device: torch.device) -> tuple[list[Any], list[bool]]:
    """Unpack what :func:`encode` packed; tensors on ``device`` share the packet's memory where that is."""
    if isinstance(packet, DevicePacket):
        described, wants_gradient, places, _ = _parsed(packet.header.encode())
        tensors = [place.view(packet.body) for place in places]
        return [_rebuild(item, tensors) for item in described], list(wants_gradient)
    raw = packet.numpy()
    header_bytes = int.from_bytes(raw[8:PREFIX_BYTES].tobytes(), sys.byteorder)
    header = raw[PREFIX_BYTES : PREFIX_BYTES + header_bytes].tobytes()
    described, wants_gradient, places, _ = _parsed(header)
    tensors = [place.view(packet) for place in places]
    if device.type != "cpu":
        tensors = [tensor.to(device) for tensor in tensors]
    return [_rebuild(item, tensors) for item in described], list(wants_gradient)


def total_bytes(prefix: torch.Tensor) -> int:
    """Read a packet's total length from its first 8 bytes."""
    return int.from_bytes(prefix[:8].numpy().tobytes(), sys.byteorder)


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise TypeError(f"a {value.layout} tensor cannot cross a stage boundary")
        index = len(tensors)
        tensors.append(value.detach())
        return {"t": index, "d": _DTYPE_NAMES[value.dtype], "s": list(value.shape), "r": list(_dense_strides(value))}
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


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return strides that keep the order of dimensions (``channels_last`` stays so) without gaps or overlaps."""
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
