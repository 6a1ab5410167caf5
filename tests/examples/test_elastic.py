"""A machine is cut off from an elastic run: the other one plans again, and the losses are those of a quiet run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from two_networks import INTERFACE, Network, two_networks

STEPS = 40
TIMEOUT_S = 6
CONF = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5"


class Agent:
    """torchrun on one of the machines; ``lines`` are what its ranks print."""

    def __init__(self, network: Network, host: Network, script: str, *options: str) -> None:
        conf = f"is_host={str(network is host).lower()},{CONF}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
        torchrun += ["--max-restarts", "3", "--rdzv-id", "test", "--rdzv-backend", "c10d", "--rdzv-conf", conf]
        torchrun += ["--rdzv-endpoint", f"{host.address}:29400", "--local-addr", network.address]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE}
        self.process = subprocess.Popen(
            network.command(*torchrun, script, *options),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        self.lines: list[str] = []
        self.when: list[float] = []
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip())
                self.when.append(time.monotonic())
                self._news.notify_all()

    def text(self) -> str:
        """Return all that was printed."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float, since: float = 0.0) -> tuple[re.Match[str], float]:
        """Wait until something is printed; return it, and when it was."""
        compiled = re.compile(pattern)

        def found() -> list[tuple[re.Match[str], float]]:
            said = [(line, t) for line, t in zip(self.lines, self.when) if t >= since]
            return [(match, t) for line, t in said if (match := compiled.search(line))]

        with self._news:
            assert self._news.wait_for(found, timeout_s), f"no {pattern!r} in:\n{self.text()}"
            return found()[0]


def ended(processes: list[psutil.Process], timeout_s: float = 30.0) -> bool:
    """Say whether processes end in time; their parent need not have noticed."""
    until = time.monotonic() + timeout_s
    while alive := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > until:
            return False
        psutil.wait_procs(alive, timeout=0.2)
    return True


def test_the_machine_that_is_left_goes_on_alone_and_loses_nothing(repository: Path, tmp_path: Path) -> None:
    script = str(repository / "examples" / "elastic.py")
    quiet, disturbed = tmp_path / "quiet.json", tmp_path / "disturbed.json"
    common = ["--steps", str(STEPS), "--timeout-s", str(TIMEOUT_S)]
    with two_networks() as (lost, kept):  # of which the lost one has rank 0, and with it the store of the ranks
        options = [*common, "--folder", str(tmp_path / "checkpoints"), "--losses", str(disturbed)]
        agents = [Agent(network, kept, script, *options) for network in (lost, kept)]
        cut_off, left = agents
        together, _ = cut_off.wait_for(r"stages: 2, from step (\d+)", 240)
        cut_off.wait_for(rf"^step {int(together[1]) + 5}: ", 60)
        cut_at = time.monotonic()
        lost.cut_off()
        _, noticed = left.wait_for(r"StallError: rank 1 heard nothing of another rank for too long", 60, cut_at)
        assert noticed - cut_at < TIMEOUT_S + 20
        begun, _ = left.wait_for(r"stages: 1, from step (\d+)", 120, cut_at)
        assert left.process.wait(120) == 0, left.text()
        # Its checkpoint is there when a step is printed; what was cut short was not yet a step.
        last = max(int(step) for step in re.findall(r"^step (\d+): ", cut_off.text(), re.MULTILINE))
        assert int(begun[1]) in (last, last + 1)
        assert last + 1 < STEPS
        # The rank on the other side ended by itself too; its agent is torch's, and waits for a store it cannot reach.
        cut_off.wait_for(r"StallError: rank 0 heard nothing of another rank for too long", 60, cut_at)
        assert ended(psutil.Process(cut_off.process.pid).children())
    for agent in agents:
        agent.process.wait(10)
    alone = [sys.executable, script, *common, "--folder", str(tmp_path / "quiet"), "--losses", str(quiet)]
    subprocess.run(alone, capture_output=True, timeout=120, check=True)
    losses = json.loads(quiet.read_text())
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert json.loads(disturbed.read_text()) == losses
