"""A folder of objects, with copies on this host of those that it has read or written.

The store is the truth. A copy is named after its object's tag, so a copy of an earlier content is
never taken for the present one, and a file that is being read is never replaced. What exists is
said by one listing, which is made anew at the beginning of a run (`refresh`) and kept up to date
with what this process publishes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from mtl_ranker.stores import leases, objects
from mtl_ranker.stores.objects import Meta
from mtl_ranker.stores.staging import age, staging_path

COPIES = ".objects"
LEASES = ".leases"
END = ".end"  # of a copy of the last bytes only
END_BYTES = 65_536  # holds the footer of most Parquet files
DOWNLOADS = 8  # at a time
UNUSED = 86_400.0  # seconds after which the copy of a replaced object is removed
_HELD: dict[str, leases.Lease] = {}  # leases that this process holds, by address


def cache_folder(address: str) -> Path:
    """The folder of this host for copies of what lies below an address.

    It is below $MTL_RANKER_CACHE, or `mtl_ranker` in the user's cache directory.
    """
    own = os.environ.get("MTL_RANKER_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    place = Path(own) if own else Path(user).expanduser() / "mtl_ranker"
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", address)[:60].strip("-")
    return place.absolute() / f"{readable}-{_short(address)}"


def local_folder(workspace: Path | str) -> Path:
    """A workspace's folder on this host: itself, or the one for copies of an address."""
    if objects.is_address(workspace):
        return cache_folder(objects.address_of(workspace))
    return Path(workspace)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class StoredFolder:
    """A folder of objects. Places are paths below it, such as `events/date=2026-11-24/…`.

    A pickled one, such as that of a Dask task, lists the store anew where it is loaded, has the
    copies of that host, and publishes under the leases that the first process held.

    Args:
        address: as `address_of` returns it.
        inherited: address of a lease → its owner, of the process that this one works for.
    """

    def __init__(self, address: str, inherited: dict[str, str] | None = None) -> None:
        self.address = address
        self.cache = cache_folder(address)
        self._key = f"{address.split('://', 1)[1].partition('/')[2]}/".lstrip("/")
        self._inherited = inherited or {}
        self._listing: dict[str, Meta] | None = None
        self._ends: dict[tuple[str, str], bytes] = {}
        self._guard = threading.RLock()

    def __reduce__(self) -> tuple[type[StoredFolder], tuple[str, dict[str, str]]]:
        return StoredFolder, (self.address, self._owners())

    def refresh(self) -> None:
        """List the store again at the next look, for what other processes have published."""
        with self._guard:
            self._listing = None

    def exists(self) -> bool:
        """Whether anything is published."""
        return bool(self._listed())

    def has(self, place: str) -> bool:
        return place in self._listed()

    def places(self, folder: str) -> dict[str, int]:
        """Place → bytes of all that is published below a folder, ascending."""
        with self._guard:
            found = sorted(self._listed().items())
        return {place: meta.size for place, meta in found if place.startswith(f"{folder}/")}

    def files(self, places: Sequence[str]) -> list[Path]:
        """The copies of objects, which are downloaded where they are missing.

        A place at which nothing is published gives a path without a file.
        """
        missing = [place for place in places if not self._copy(place).is_file()]
        if len(missing) > 1:
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                list(pool.map(self.file, missing))
        return [self.file(place) for place in places]

    def file(self, place: str) -> Path:
        """The copy of an object, as `files`."""
        copy = self._copy(place)
        if not self.has(place) or copy.is_file():
            return copy
        temporary = staging_path(self.cache)
        try:
            meta = objects.download(self._at(place), temporary)
            if meta is None:  # removed since the listing
                with self._guard:
                    self._listed().pop(place, None)
                return copy
            return self._keep(place, meta, temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def end(self, place: str) -> Path | io.BytesIO | None:
        """What the footer of a Parquet object can be read from; None where nothing is published.

        Without a copy of the object only its last bytes are read, and kept.
        """
        found = self._listed().get(place)
        if found is None:
            return None
        copy = self._copy(place)
        if copy.is_file():
            return copy
        key = place, found.tag
        if key not in self._ends:
            kept = copy.with_name(copy.name + END)
            content = kept.read_bytes() if kept.is_file() else self._footer(place)
            if content is None:
                return None
            if not kept.is_file():
                temporary = staging_path(self.cache)
                temporary.write_bytes(content)
                _move(temporary, kept)
            self._ends[key] = content
        return io.BytesIO(self._ends[key])

    def publish(self, temporary: Path, place: str) -> None:
        """Make a file the object of a place by one put, and its copy here.

        Raises ProjectError if a lease of this run has been taken over, and where the store refuses
        the put; nothing is published then.
        """
        self.confirm()
        size = temporary.stat().st_size
        tag = objects.upload(temporary, self._at(place))
        self._keep(place, Meta(size, datetime.now(UTC), tag), temporary)

    def remove(self, folder: str) -> None:
        """Remove an object, or all objects below a folder."""
        gone = [folder] if self.has(folder) else list(self.places(folder))
        if gone:
            self.confirm()
            objects.remove(self._at(place) for place in gone)
        with self._guard:
            for place in gone:
                self._listed().pop(place, None)

    @contextlib.contextmanager
    def lease(self, scope: str, what: str, again: bool, wait: bool) -> Iterator[None]:
        """Hold a lease of this folder (`stores/leases.py`).

        Args:
            again: whether a process that holds it may take it again.
        """
        address = self._at(f"{LEASES}/{scope}.json")
        self.refresh()
        if again and address in _HELD:
            yield
            return
        with leases.leased(address, what, wait) as lease:
            _HELD[address] = lease
            self.refresh()
            try:
                if again:
                    self._clean()
                yield
            finally:
                del _HELD[address]

    def confirm(self) -> None:
        """Raise ProjectError if a lease that this run published under was taken over."""
        for address, owner in self._owners().items():
            leases.confirm(address, owner)

    def _owners(self) -> dict[str, str]:
        below = f"{self.address}/{LEASES}/"
        own = {lease.address: lease.owner for lease in list(_HELD.values())}
        return self._inherited | {a: owner for a, owner in own.items() if a.startswith(below)}

    def _at(self, place: str) -> str:
        return f"{self.address}/{place}"

    def _listed(self) -> dict[str, Meta]:
        """Place → object; leases are left out."""
        with self._guard:
            if self._listing is None:
                found = sorted(objects.listing(self.address).items())
                below = {key.removeprefix(self._key): m for key, m in found if key != self._key}
                self._listing = {
                    place: meta
                    for place, meta in below.items()
                    if not place.startswith(f"{LEASES}/")
                }
            return self._listing

    def _copy(self, place: str) -> Path:
        """Where the copy of the present object is, or would be."""
        found = self._listed().get(place)
        return self._copy_of(place, "" if found is None else found.tag)

    def _copy_of(self, place: str, tag: str) -> Path:
        return self.cache / COPIES / (_short(tag) if tag else "none") / place

    def _keep(self, place: str, meta: Meta, temporary: Path) -> Path:
        """Move a complete file to where the copy of an object is."""
        copy = self._copy_of(place, meta.tag)
        _move(temporary, copy)
        with self._guard:
            self._listed()[place] = meta
        return copy

    def _footer(self, place: str) -> bytes | None:
        """The footer of a Parquet object, which ends with its length and four letters."""
        content = objects.end_of(self._at(place), END_BYTES)
        if content is None:
            return None
        size = int.from_bytes(content[-8:-4], "little") + 8
        if size > len(content):
            content = objects.end_of(self._at(place), size)
        return None if content is None else content[-size:]

    def _clean(self) -> None:
        """Remove copies of objects that were replaced more than a day ago."""
        present = {_short(meta.tag) for meta in self._listed().values()}
        folder = self.cache / COPIES
        for copies in folder.iterdir() if folder.is_dir() else []:
            if copies.name not in present and age(copies) > UNUSED:
                shutil.rmtree(copies, ignore_errors=True)


def _move(temporary: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, target)
