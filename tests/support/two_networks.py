"""Two network namespaces with an address each and a link between them: two machines, as far as sockets can tell."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

INTERFACE = "veth0"


@dataclass(frozen=True)
class Network:
    """A namespace, and its address."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """Return the command that runs another one there."""
        return ["ip", "netns", "exec", self.name, *words]

    def cut_off(self) -> None:
        """Take its link down: what is sent disappears, and no connection is told."""
        subprocess.run(["ip", "-n", self.name, "link", "set", INTERFACE, "down"], check=True)

    def end(self) -> None:
        """Kill whatever still runs there, and remove it."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in map(int, found.stdout.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        subprocess.run(["ip", "netns", "del", self.name], check=False)


@contextmanager
def two_networks() -> Iterator[tuple[Network, Network]]:
    """Make the two, and leave nothing of them behind; skip the test where the system does not let us."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the ip command (apt-get install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    networks = tuple(Network(f"stagecut-{os.getpid()}-{n}", f"10.203.7.{n}") for n in (1, 2))
    try:
        for network in networks:
            made = subprocess.run(["ip", "netns", "add", network.name], capture_output=True, text=True, check=False)
            if made.returncode != 0:
                pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
        first, second = networks
        _ip(first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second.name)
        for network in networks:
            _ip(network, "addr", "add", f"{network.address}/24", "dev", INTERFACE)
            _ip(network, "link", "set", INTERFACE, "up")
            _ip(network, "link", "set", "lo", "up")
        yield first, second
    finally:
        for network in networks:
            network.end()


def _ip(network: Network, *words: str) -> None:
    subprocess.run(["ip", "-n", network.name, *words], check=True)
