"""Servers end with the command that started them, by whatever signal it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtl_ranker.commands.processes import descendants, started
from mtl_ranker.commands.serve import answers
from mtl_ranker.tracking.connection import create_database
from mtl_ranker.workspace import Workspace
from tests.integration.commands import command, environment, free_port
from tests.projects import SMALL, write_project

# A child that ignores what it is asked, with one in a session of its own, as Prefect's flow runs
# are. Both write their numbers to a file.
STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
again = [sys.executable, "-c", "import time; time.sleep(600)"]
other = subprocess.Popen(again, start_new_session=True)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {other.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
# The same that ends when it is asked, and its own child with it: what a server should do.
WELL_BEHAVED = """
import os, signal, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def stop(*_):
    other.kill()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {other.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
CALL = (
    "import sys; from mtl_ranker.commands.processes import call; "
    "sys.exit(call([sys.executable, '-c', sys.argv[1], sys.argv[2]], grace=0.3))"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel offers it on Linux only")


def until(holds: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def start(program: str, folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """A process that waits for a child in `call`; the numbers of the child and the child's own."""
    file = folder / "numbers"
    process = subprocess.Popen([sys.executable, "-c", CALL, program, str(file)])
    until(file.is_file, "the child runs")
    return process, [int(word) for word in file.read_text().split()]


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_children_that_ignore_it_and_have_left_the_group(tmp_path, number):
    process, numbers = start(STUBBORN, tmp_path)
    assert all(runs(pid) for pid in numbers)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert not any(runs(pid) for pid in numbers)


@linux
def test_a_killed_command_ends_its_child(tmp_path):
    process, numbers = start(WELL_BEHAVED, tmp_path)
    process.kill()
    process.wait(10)
    until(lambda: not any(runs(pid) for pid in numbers), "the children ended", 10)


@linux
def test_a_killed_child_leaves_nothing_and_its_signal_is_the_exit_code(tmp_path):
    process, (child, other) = start(STUBBORN, tmp_path)
    os.kill(child, signal.SIGKILL)
    assert process.wait(20) == 128 + signal.SIGKILL
    assert not runs(other)


@linux
def test_children_from_before_are_left_alone(tmp_path):
    """The process's other children, and what those start later."""
    code = "import subprocess, sys, time; sys.stdin.read(1); " + STUBBORN
    line = [sys.executable, "-c", code, str(tmp_path / "numbers")]
    before = subprocess.Popen(line, stdin=subprocess.PIPE)
    assert before.stdin is not None
    try:
        with started([sys.executable, "-c", "import time; time.sleep(600)"], grace=0.3) as process:
            before.stdin.write(b"!")
            before.stdin.flush()
            until((tmp_path / "numbers").is_file, "the child runs")
        assert process.poll() is not None
        assert all(runs(int(pid)) for pid in (tmp_path / "numbers").read_text().split())
    finally:
        for pid in (before.pid, *descendants(before.pid)):
            os.kill(pid, signal.SIGKILL)
        before.wait()


def test_exit_code_of_a_child_that_ends_by_itself():
    code = CALL.replace("sys.argv[2]", "''")
    done = subprocess.run([sys.executable, "-c", code, "raise SystemExit(7)"], timeout=20)
    assert done.returncode == 7


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_nights_own_prefect_server_ends_with_it(tiny, number):
    """The night waits for a log that does not arrive."""
    late = ("--date", "2026-03-08", "--wait-minutes", "5")
    process = subprocess.Popen(
        command("nightly", "-c", "project.toml", "-d", ".", "-w", "ws", *late),
        env=environment(),
        cwd=tiny,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("night "), process.stdout.read()
    assert process.stdout.readline().startswith("wait "), process.stdout.read()
    started = descendants(process.pid)
    assert started
    process.send_signal(number)
    process.wait(30)
    until(lambda: not any(runs(pid) for pid in started), "its server ended", 30)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_ui_ends_with_all_its_processes(tmp_path, number):
    create_database(Workspace(tmp_path))
    port = free_port()
    process = subprocess.Popen(
        command("ui", "--workspace", tmp_path, "--port", str(port)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ends_with_all(process, f"http://127.0.0.1:{port}/health", number)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_serve_ends_with_its_server_and_its_runner(tmp_path, feed, number):
    project = write_project(tmp_path, SMALL)
    port = free_port()
    out = tmp_path / "out.txt"
    with open(out, "w") as file:
        process = subprocess.Popen(
            command(
                *("serve", "-c", project, "-d", feed, "-w", tmp_path / "ws", "--port", str(port))
            ),
            env=environment(),
            stdout=file,
            stderr=file,
        )
    until(lambda: "Prefect on" in out.read_text(), "the schedules are there", 120)
    time.sleep(3)  # the runner registers its deployments
    ends_with_all(process, f"http://127.0.0.1:{port}/api/health", number)


def ends_with_all(process: subprocess.Popen, address: str, number: signal.Signals) -> None:
    try:
        until(lambda: answers(address), f"{address} answers", 120)
        family = descendants(process.pid)
        assert len(family) >= 2
        process.send_signal(number)
        process.wait(60)
        until(lambda: not any(runs(pid) for pid in family), "all processes ended", 60)
        assert not answers(address)
    finally:
        process.kill()
        process.wait()
