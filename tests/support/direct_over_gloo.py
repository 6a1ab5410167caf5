"""Imported by a worker before anything else: packets between any two workers go as those between two GPUs do."""

from stagecut.runtime import direct, shared_memory

direct.BACKENDS["cpu"] = "gloo"
direct.direct_pairs = lambda pairs, places: list(pairs)
_send = shared_memory.SharedMemoryTransport.send


def _send_heads_only(self, i, packed):
    assert not packed.tensors, "a body went through shared memory"
    _send(self, i, packed)


shared_memory.SharedMemoryTransport.send = _send_heads_only
