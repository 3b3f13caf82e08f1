"""One training on two hosts, each a network namespace of this machine (tests/hosts.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.hosts import Host
from tests.training.test_distributed import WORKER
from tests.training.test_distributed import run as on_one_host


def run(hosts: list[Host], folder: Path, how: str) -> dict[str, torch.Tensor]:
    """Run `torchrun` on each host, as documented for two machines."""
    folder.mkdir()
    (folder / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].address}:29400"]
    launch += ["--rdzv-id=night", "--max-restarts=2"]
    started = [
        host.start(
            *launch,
            f"--local-addr={host.address}",
            f"--rdzv-conf=is_host={int(host is hosts[0])}",
            *(str(folder / "worker.py"), str(folder), how),
        )
        for host in hosts
    ]
    try:
        for process in started:
            output = process.communicate(timeout=240)[0]
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in started:
            process.kill()
    return torch.load(folder / "weights.pt")


@pytest.mark.slow
def test_the_hosts_do_not_see_each_others_loopback(hosts):
    """A precondition of the next test."""
    listen = (
        "import socket; s = socket.create_server(('127.0.0.1', 29_999)); "
        "print(1, flush=True); s.accept()"
    )
    server = hosts[0].start(sys.executable, "-c", listen)
    assert server.stdout is not None
    assert server.stdout.readline() == "1\n"
    connect = "import socket; socket.create_connection(('127.0.0.1', 29_999), 3)"
    assert hosts[1].start(sys.executable, "-c", connect).wait(20) != 0
    assert hosts[0].start(sys.executable, "-c", connect).wait(20) == 0
    assert server.wait(20) == 0


@pytest.mark.slow
def test_two_hosts_train_what_one_process_does(hosts, tmp_path):
    one = on_one_host(tmp_path / "one", 0)
    two = run(hosts, tmp_path / "two", "live")
    assert (tmp_path / "two" / "ranks.txt").read_text() == "2"
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_rank_lost_on_one_host_resumes_from_the_checkpoint(hosts, tmp_path):
    whole = run(hosts, tmp_path / "whole", "live")
    resumed = run(hosts, tmp_path / "lost", "die")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
