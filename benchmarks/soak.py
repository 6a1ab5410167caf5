"""Train for long with a random fault every so often, and compare with a run in which nothing happens.

    python benchmarks/soak.py --steps 10000 --every 200

Two workers train a small model with BatchNorm, dropout and a shared weight in float64. About every 200 steps a fault
that is drawn at random happens: a worker is killed in a forward, in a backward, or between steps, or exits; it is
stopped, raises, or runs out of memory, which the loop catches, restarts and does again; a checkpoint is saved and the
whole training thrown away and loaded; the process's own Ctrl-C comes in the middle of a step. Losses of all steps have
to be those of the undisturbed run, and at the end there must not be more memory, descriptors, shared memory or
processes than after the first faults.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from fault_rows.injector import RemoteInjector, batch
from fault_rows.steps import compiled

import stagecut

LOST = ("kill in a forward", "kill in a backward", "exit in a forward", "kill between steps")
CAUGHT = ("stop", "raise in a forward", "raise in a backward", "memory", "Ctrl-C")
FAULTS = (*LOST, *CAUGHT, "save and load")
_STALL_S = 5.0
_WARM = 10  # faults, after which nothing may grow any more


@dataclass(frozen=True)
class Held:
    """What the process has: bytes of its own memory, descriptors, threads, child processes, files in /dev/shm."""

    memory_bytes: int
    descriptors: int
    threads: int
    children: int
    shared_files: int

    @classmethod
    def now(cls) -> Held:
        """Look."""
        gc.collect()
        own = psutil.Process()
        shared = len(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else 0
        return cls(own.memory_info().rss, own.num_fds(), own.num_threads(), len(own.children()), shared)


class Training:
    """A pipeline, its optimizer, and the losses so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[float] = []
        self.injector = RemoteInjector(folder)
        self.pm: stagecut.Pipeline
        self.start()

    def start(self) -> None:
        """Begin with new weights, which are those of every beginning."""
        self.pm = compiled(self.injector, timeout_s=_STALL_S)
        self.optimizer = torch.optim.AdamW(self.pm.parameters(), 1e-3)

    def step(self, step: int, *, marked: bool = False, tries: int = 2) -> None:
        """Do one step; a failure is mended and the step done again."""
        x, y = batch(step, marked=marked)
        for attempt in range(tries):
            torch.manual_seed(step)
            try:
                loss = self.pm.step(x, target=y).loss
                break
            except (Exception, KeyboardInterrupt):
                if attempt + 1 == tries:
                    raise
                self.pm.restart()
        self.losses.append(float(loss))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fault(self, kind: str, step: int) -> None:
        """Let a fault happen in a step."""
        if kind == "save and load":
            self.pm.save(self.folder / "checkpoints", step, optimizer=self.optimizer, keep=2)
            self.pm.close()
            self.start()
            self.pm.load(self.folder / "checkpoints", optimizer=self.optimizer)
            self.step(step, marked=True)
        elif kind == "kill between steps":
            os.kill(self.pm._engine.pool.workers[step % 2].process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            self.step(step, marked=True)
        elif kind == "Ctrl-C":
            with self.armed("hang"):
                thread = interrupt_when_fired(self.folder)
                self.step(step, marked=True)
                thread.join()
        else:
            with self.armed(kind):
                self.step(step, marked=True)

    @contextmanager
    def armed(self, kind: str) -> Iterator[None]:
        """Have the injector, which new workers are given too, misbehave once."""
        for path in self.folder.glob("fired-*"):
            path.unlink()
        (self.folder / "armed").write_text(kind)
        yield
        (self.folder / "armed").unlink()
        if not list(self.folder.glob("fired-*")):
            raise RuntimeError(f"{kind} was to happen, and did not")


def interrupt_when_fired(folder: Path) -> threading.Thread:
    """Send this process SIGINT once a worker hangs in the middle of a step."""

    def send() -> None:
        while not list(folder.glob("fired-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def soak(
    steps: int, every: int, seed: int, tell: Callable[[str], None], kinds: Sequence[str] = FAULTS
) -> dict[str, Any]:
    """Run both trainings, and return the figures."""
    moments = random.Random(seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as quiet, tempfile.TemporaryDirectory() as disturbed:
        calm = Training(Path(quiet))
        begin = time.monotonic()
        at = {step for step in range(1, steps) if moments.random() < 1 / every}
        for step in range(steps):
            calm.step(step, marked=step in at)
        calm_s = time.monotonic() - begin
        calm.pm.close()
        del calm.pm
        tell(f"undisturbed: {steps} steps in {calm_s:.0f} s")
        training, warm, begin = Training(Path(disturbed)), None, time.monotonic()
        bag: list[str] = []
        for step in range(steps):
            if step not in at:
                training.step(step)
                continue
            if not bag:
                bag = moments.sample(kinds, len(kinds))
            kind = bag.pop()
            training.fault(kind, step)
            counts[kind] += 1
            if sum(counts.values()) == _WARM:
                warm = Held.now()
            tell(f"step {step}: {kind}")
        held = Held.now()
        different = sum(a != b for a, b in zip(training.losses, calm.losses, strict=True))
        figures = {
            "faults": dict(counts),
            "different losses": different,
            "restarts": training.pm.stats().n_restarts,
            "seconds": (calm_s, time.monotonic() - begin),
            "held after the first ten": warm,
            "held at the end": held,
        }
        training.pm.close()
    return figures


def main() -> None:
    """Print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=200, help="steps between faults, on average")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    figures = soak(options.steps, options.every, options.seed, lambda text: print(text, file=sys.stderr, flush=True))
    for name, value in figures.items():
        print(f"{name}: {value}")
    raise SystemExit(bool(figures["different losses"]))


if __name__ == "__main__":
    main()
