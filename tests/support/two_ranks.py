"""Run by tests/runtime/test_groups.py as rank 0 and rank 1: one works long, then is silent, then is gone."""

import os
import sys
import time

import torch
import torch.distributed as dist

from stagecut.errors import StallError, WorkerLost
from stagecut.runtime.groups import all_ranks, at_work, ensure_process_group, make_group, peers_told

TIMEOUT_S = 2.0


def main(rank: int) -> None:
    ensure_process_group(TIMEOUT_S)
    group, other = all_ranks(TIMEOUT_S), make_group(None, "gloo", TIMEOUT_S)
    assert all_ranks(TIMEOUT_S) is group
    with at_work(group, TIMEOUT_S):
        if rank == 0:
            time.sleep(2.5 * TIMEOUT_S)
    print(f"rank {rank} saw the work done", flush=True)
    if rank == 0:
        sys.stdin.read()  # until the test closes it
        os._exit(0)
    begin = time.monotonic()
    try:
        with at_work(group, TIMEOUT_S):
            pass
    except StallError as error:
        print(f"stalled after {time.monotonic() - begin:.1f} s: {error.message}", flush=True)
    sys.stdin.read()
    try:
        with peers_told("in the test"):
            while True:  # until the other end of the connection is known to be closed
                dist.all_reduce(torch.ones(1), group=other)
    except WorkerLost as error:
        print(f"lost: {error.message}", flush=True)
    try:
        with peers_told("in the test"):
            raise RuntimeError("a model's own error")
    except RuntimeError as error:
        print(f"left alone: {error}", flush=True)
    os._exit(0)


main(int(sys.argv[1]))
