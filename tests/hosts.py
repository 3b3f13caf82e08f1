"""Two hosts on one machine: network namespaces that share no address, on a bridge with this one.

Needs root and Debian's iproute2; tests are skipped, visibly, without.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    interface: str
    gateway: str  # this machine's address, as the host sees it

    def start(
        self, *command: str, log: Path | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """A process of this host; what it says goes to `log` or a pipe."""
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        own["GLOO_SOCKET_IFNAME"] = self.interface
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            env=os.environ | own | environment,
            stdout=subprocess.PIPE if log is None else open(log, "w"),
            stderr=subprocess.STDOUT,
            text=True,
        )


def free_subnet() -> str:
    """The first three numbers of a private network that no device of this machine is in.

    A test run that was killed leaves its bridge and its addresses behind.
    """
    taken = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True).stdout
    free = [net for net in (f"10.99.{n}" for n in range(256)) if f" {net}." not in taken]
    return random.choice(free)  # test runs side by side choose different ones


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and `ip` (iproute2) for network namespaces")
    # A namespace and its cable outlive `ip netns del` for as long as a killed process is dying.
    mark = uuid.uuid4().hex[:8]
    net = free_subnet()
    gateway = f"{net}.254"
    made = [
        Host(f"mtl-{end}-{mark}", f"{net}.{number}", f"v{end}{mark}", gateway)
        for number, end in enumerate("ab", start=1)
    ]
    bridge = f"br{mark}"

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if "not permitted" in done.stderr:
            pytest.skip(f"network namespaces are forbidden here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{gateway}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for host in made:
            ip("netns", "add", host.name)
            ours = f"{host.interface}p"
            ip("link", "add", ours, "type", "veth", "peer", "name", host.interface)
            ip("link", "set", ours, "master", bridge)
            ip("link", "set", ours, "up")
            ip("link", "set", host.interface, "netns", host.name)
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for device in ("lo", host.interface):
                ip("-n", host.name, "link", "set", device, "up")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "link", "del", f"{host.interface}p"], capture_output=True)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)
