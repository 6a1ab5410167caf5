"""Known accelerators: rates, memory and links from their makers' datasheets (docs/clusters.md lists the sources)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import DeviceError
from .cluster import DeviceKind, Link

GIB = 1 << 30

# What of the datasheets' peaks is taken for granted. Tensor cores: Narayanan et al., 2021
# (https://arxiv.org/abs/2104.04473, table 1) reach 44 to 52 % of the A100's peak in whole training steps.
TENSOR_CORE_SHARE = 0.5
# Matrix products without 16-bit tensor cores, copies in device memory, and messages come closer to their peaks.
OTHER_SHARE = 0.8
# Of an eager PyTorch: what launching one kernel takes when the CPU does not run ahead.
KERNEL_OVERHEAD_S = 5e-6

_TENSOR_CORE = ("bfloat16", "float16")
_TERA = 1e12


@dataclass(frozen=True)
class _Sheet:
    """A datasheet: dense peaks in TFLOP/s by dtype, TB/s, GiB, and GB/s per direction to peers and to the network."""

    document: str
    tflops: dict[str, float]
    memory_tb_s: float
    memory_gib: int
    peers: str
    peers_gb_s: float
    network: str
    network_gb_s: float


_HDR = ("8 x 200 Gb/s HDR InfiniBand per 8 GPUs", 25.0)
_NDR = ("8 x 400 Gb/s NDR InfiniBand per 8 GPUs", 50.0)
_EDR = ("4 x 100 Gb/s EDR InfiniBand per 8 GPUs", 6.25)
_ONE_CARD = ("one 100 Gb/s card per 8 GPUs", 1.5625)
_A100 = {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5, "float64": 19.5}
_H100 = {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9, "float64": 66.9}
# V100 has no tensor cores for bfloat16: products in it run at the rate of float32.
_V100 = {"bfloat16": 15.7, "float16": 125.0, "float32": 15.7, "float64": 7.8}
_L4 = {"bfloat16": 121.0, "float16": 121.0, "float32": 30.3, "float64": 0.47}
_RTX4090 = {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6, "float64": 1.29}
# Peers of an RTX 4090 cannot reach each other's memory: every byte goes to the host and back.
_SHEETS = {
    "A100-40GB": _Sheet("A100 40GB SXM datasheet", _A100, 1.555, 40, "NVLink 3", 300.0, *_HDR),
    "A100-80GB": _Sheet("A100 80GB SXM datasheet", _A100, 2.039, 80, "NVLink 3", 300.0, *_HDR),
    "H100-80GB": _Sheet("H100 SXM datasheet", _H100, 3.35, 80, "NVLink 4", 450.0, *_NDR),
    "H200-141GB": _Sheet("H200 SXM datasheet", _H100, 4.8, 141, "NVLink 4", 450.0, *_NDR),
    "L4-24GB": _Sheet("L4 datasheet", _L4, 0.3, 24, "PCIe 4.0 x16", 32.0, *_ONE_CARD),
    "RTX4090-24GB": _Sheet("Ada architecture paper", _RTX4090, 1.008, 24, "PCIe 4.0 x16 by host", 16.0, *_ONE_CARD),
    "V100-16GB": _Sheet("V100 SXM2 datasheet", _V100, 0.9, 16, "NVLink 2", 150.0, *_EDR),
    "V100-32GB": _Sheet("V100 SXM2 datasheet", _V100, 0.9, 32, "NVLink 2", 150.0, *_EDR),
}
# The size that a name without one means.
_USUAL = {"A100": "A100-80GB", "V100": "V100-16GB"}
NAMES = tuple(_SHEETS)
_PEER_LATENCY_S = 10e-6
_NETWORK_LATENCY_S = 20e-6


@dataclass(frozen=True)
class KnownDevice:
    """A device of the table: its kind, its link to others in its host, and its share of the host's network."""

    kind: DeviceKind
    inside: Link
    between: Link


_MOST_GIB = 999_999


def known_device(name: str, memory_gib: int | None = None) -> KnownDevice:
    """Look up an accelerator: ``"A100-40GB"``, or ``"A100"`` with or without ``memory_gib``.

    A memory that the table does not have keeps everything else of the usual size.

    Raises:
        DeviceError: no such accelerator is known.
    """
    plain, _, size = name.upper().partition("-")
    if size.endswith("GB") and size[:-2].isdecimal() and memory_gib is None:
        memory_gib = int(size[:-2]) if len(size) <= 8 else _MOST_GIB + 1
    if memory_gib is not None and not 0 < memory_gib <= _MOST_GIB:
        raise DeviceError(f"{name!r} has no such memory; expected 1 to {_MOST_GIB} GB", hint="sim:8xH100-80GB")
    found = next((key for key in _SHEETS if key.partition("-")[0] == plain), None)
    if found is None:
        raise DeviceError(f"{name!r} is no known device; known are {', '.join(NAMES)}", hint="sim:8xH100-80GB")
    key = f"{plain}-{memory_gib}GB" if memory_gib is not None else _USUAL.get(plain, found)
    if key in _SHEETS:
        return _from_sheet(key, _SHEETS[key])
    assert memory_gib is not None
    known = _from_sheet(key, _SHEETS[_USUAL.get(plain, found)])
    kind = replace(known.kind, memory_bytes=memory_gib * GIB, source=f"{known.kind.source}; memory as asked for")
    return replace(known, kind=kind)


def _from_sheet(name: str, sheet: _Sheet) -> KnownDevice:
    rates = {
        dtype: peak * _TERA * (TENSOR_CORE_SHARE if _on_tensor_cores(sheet, dtype) else OTHER_SHARE)
        for dtype, peak in sheet.tflops.items()
    }
    source = (
        f"NVIDIA {sheet.document}; {TENSOR_CORE_SHARE:.0%} of its dense 16-bit tensor-core peak, "
        f"{OTHER_SHARE:.0%} of its other peaks"
    )
    bandwidth = sheet.memory_tb_s * _TERA * OTHER_SHARE
    return KnownDevice(
        DeviceKind(name, rates, bandwidth, KERNEL_OVERHEAD_S, sheet.memory_gib * GIB, source),
        _link(sheet.peers, sheet.peers_gb_s, _PEER_LATENCY_S),
        _link(sheet.network, sheet.network_gb_s, _NETWORK_LATENCY_S),
    )


def _on_tensor_cores(sheet: _Sheet, dtype: str) -> bool:
    return dtype in _TENSOR_CORE and sheet.tflops[dtype] > sheet.tflops["float32"]


def _link(medium: str, gb_s: float, latency_s: float) -> Link:
    source = f"assumed: {medium}, {OTHER_SHARE:.0%} of {gb_s:g} GB/s per direction, {latency_s * 1e6:g} us"
    return Link(latency_s, gb_s * 1e9 * OTHER_SHARE, source)
