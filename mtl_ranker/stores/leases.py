"""Leases: locks of a store, which end when their holder does not renew them.

A lease is an object that names its holder and the time at which it ends. It is written by
conditional puts only, so of two runs that want it one gets it (Gray and Cheriton, 1989, "Leases: an
efficient fault-tolerant mechanism for distributed file cache consistency"). A thread of the holder
renews it. A lease that has ended is taken over by the next run; its former holder finds out before
it publishes anything (`confirm`).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from mtl_ranker.errors import ProjectError
from mtl_ranker.stores import objects

LOG = logging.getLogger(__name__)

SECONDS = 60.0  # from a renewal to the end of a lease; clocks of hosts must agree much better
BEATS = 4  # renewals in that time
POLL = 1.0  # seconds between two looks at a lease that is waited for
RELEASED = 0.0  # the end of a lease that its holder gave back


@dataclass(frozen=True)
class Holder:
    """Who has a lease.

    Attributes:
        owner: a name that no other run has.
        what: the run, for messages.
        ends: when the lease ends, in seconds since 1970, unless it is renewed.
    """

    owner: str
    what: str
    host: str
    process: int
    ends: float

    def __str__(self) -> str:
        return f"{self.what}, process {self.process} on {self.host}"


class Lease:
    """A lease that this process has, renewed by a thread until `release`."""

    def __init__(self, address: str, holder: Holder, version: objects.Version) -> None:
        self.address, self.owner = address, holder.owner
        self._holder, self._version = holder, version
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew_often, daemon=True)
        self._renewer.start()

    def release(self) -> None:
        """Give the lease back, unless another run has taken it over."""
        self._stop.set()
        self._renewer.join()
        try:
            self._write(RELEASED)
        except ProjectError as error:  # it ends by itself
            LOG.warning("%s", error)

    def _renew_often(self) -> None:
        while not self._stop.wait(SECONDS / BEATS):
            try:
                if not self._write(time.time() + SECONDS):
                    return  # the next `confirm` says who has it
            except ProjectError as error:  # the store may answer again before the lease ends
                LOG.warning("%s", error)

    def _write(self, ends: float) -> bool:
        """Set the lease's end; whether it is still this run's."""
        self._holder = replace(self._holder, ends=ends)
        version = _put(self.address, self._holder, self._version)
        if version is not None:
            self._version = version
        return version is not None


@contextmanager
def leased(address: str, what: str, wait: bool = False) -> Iterator[Lease]:
    """Hold the lease of an address.

    Args:
        what: the run, for the message of another one.
        wait: wait until another run has given it back, or its lease has ended.

    Raises ProjectError naming the other run, unless `wait`.
    """
    lease = _taken(address, what)
    while isinstance(lease, Holder):
        if not wait:
            ends = datetime.fromtimestamp(lease.ends, UTC)
            raise ProjectError(
                f"{address}: another run works in this workspace ({lease}); start again when it "
                f"has ended; if it was killed, its lease ends at {ends:%H:%M:%S} UTC"
            )
        time.sleep(POLL)
        lease = _taken(address, what)
    try:
        yield lease
    finally:
        lease.release()


def confirm(address: str, owner: str) -> None:
    """Raise ProjectError if another run has taken the lease over, or it has disappeared."""
    found = _read(address)
    if found is None or found[0].owner != owner:
        by = "it is gone" if found is None else f"it was taken over by {found[0]}"
        raise ProjectError(
            f"{address}: the lease of this run has ended and {by}; nothing more is published"
        )


def _taken(address: str, what: str) -> Lease | Holder:
    """The lease, or the run that has it."""
    me = Holder(uuid.uuid4().hex, what, socket.gethostname(), os.getpid(), time.time() + SECONDS)
    found = _read(address)
    if found is not None and found[0].ends > time.time():
        return found[0]
    version = _put(address, me, None if found is None else found[1])
    return _taken(address, what) if version is None else Lease(address, me, version)


def _read(address: str) -> tuple[Holder, objects.Version] | None:
    found = objects.read(address)
    return None if found is None else (Holder(**json.loads(found[0])), found[1])


def _put(address: str, holder: Holder, before: objects.Version | None) -> objects.Version | None:
    """Write the lease if it is as before; the new version, or None where it has changed.

    A put that is repeated after an error may find what it wrote itself.
    """
    version = objects.put_if(address, json.dumps(asdict(holder)).encode(), before)
    if version is None:
        found = _read(address)
        return found[1] if found is not None and found[0] == holder else None
    return version
