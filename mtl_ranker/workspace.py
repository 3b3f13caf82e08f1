"""Where each dataset is stored, and how its partitions are published atomically.

A partition is one Parquet file: the rows of one day. It is staged (written to a temporary path,
then renamed with `os.replace`), so that a reader finds the previous partition or the new one, never
half of one. A large partition can be built in parts, files that are kept until all are there and
are then published as one.

A partition's provenance (name → fingerprint of each input it was built from) is stored in the
file's metadata, so the two cannot disagree, and a rebuild can name what has changed.

Places are paths below the workspace's root, such as `reports/2026-11-24.html`. In an object store
each file is an object of the same place, published by one put (`stores/copies.py`).
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import polars as pl

from mtl_ranker.errors import ProjectError
from mtl_ranker.stores.copies import StoredFolder
from mtl_ranker.stores.objects import Address, address_of, is_address
from mtl_ranker.stores.staging import staging_path

PROVENANCE = "mtl_ranker.made_from"  # key in the metadata of the Parquet file
VERSION = "version of "  # of a Delta or Iceberg table, in a provenance
CACHE = ".cache"
PARTS = ".parts"
BUILD = "build"  # the lock of everything up to a trained model
_LOADED: dict[Path, dict[str, Any]] = {}  # entries of caches that this process has read
_HELD: set[str] = set()  # files of the build locks that this process holds
Provenance = Mapping[str, str]  # input of a partition, by name → its fingerprint


def fingerprint(*parts: object) -> str:
    """Short hash of settings, SQL texts, file states or other fingerprints."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:32]


class FileSize(NamedTuple):
    """A file's name, size in bytes and modification time in seconds since 1970.

    They change while the file is written.
    """

    name: str
    size: int
    modified: float

    @classmethod
    def of(cls, path: Path) -> FileSize:
        stat = path.stat()
        return cls(path.name, stat.st_size, stat.st_mtime)


def file_content(path: Path, workspace: Workspace | None = None) -> str:
    """A file's name and the SHA-256 of its content.

    With a workspace, a file of the same path, size and times as before is not read again.
    """

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if workspace is None:
        return f"{path.name}:{digest()}"
    stored = workspace.cached(f"content of {path.resolve()}", file_stamp(path), digest)
    return f"{path.name}:{stored}"


def file_stamp(path: Path) -> str:
    """What changes when a file is written again: its size, times and number."""
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write figures to the file that `--json` names; without it, do nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=str), "utf-8")


@dataclass(frozen=True)
class Workspace:
    """All outputs of a project: datasets, reports, and the databases of MLflow and Prefect.

    Attributes:
        root: a folder. Of a workspace in a store, that of this host's copies and of what is never
            in a store: databases, checkpoints and other files of one training.
        store: where datasets and reports are; None for the folder itself.
    """

    root: Path
    store: StoredFolder | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Callable[..., Workspace], tuple[Any]]:
        """On another host, a workspace in a store has the folder of that host."""
        return (Workspace, (self.root,)) if self.store is None else (_stored, (self.store,))

    def where(self, place: str = "") -> PurePath:
        """The path or address of a place, for messages and results."""
        return (self.root if self.store is None else Address(self.store.address)) / place

    def exists(self) -> bool:
        """Whether the folder is there, or anything in the store."""
        return self.root.is_dir() if self.store is None else self.store.exists()

    def refresh(self) -> None:
        """Look again at what other processes have published in the store."""
        if self.store is not None:
            self.store.refresh()

    def confirm(self) -> None:
        """Raise ProjectError if another run has taken over a lease of this run.

        Files are published after this check; changes elsewhere, such as those of MLflow's registry,
        call it themselves.
        """
        if self.store is not None:
            self.store.confirm()

    def has(self, place: str | PurePath) -> bool:
        """Whether a file is published at a place."""
        if self.store is None:
            return (self.root / place).is_file()
        return self.store.has(str(place))

    def file(self, place: str | PurePath) -> Path:
        """The published file of a place, to be read; without one, a path at which there is none."""
        return self.files([place])[0]

    def files(self, places: Sequence[str | PurePath]) -> list[Path]:
        """The published files of places, as `file`."""
        if self.store is None:
            return [self.root / place for place in places]
        return self.store.files([str(place) for place in places])

    def places(self, folder: str) -> dict[str, int]:
        """Place → size in bytes of each file that is published below a folder, ascending."""
        if self.store is not None:
            return self.store.places(folder)
        found = sorted(file for file in (self.root / folder).rglob("*") if file.is_file())
        return {file.relative_to(self.root).as_posix(): file.stat().st_size for file in found}

    def remove(self, place: str) -> None:
        """Remove a published file, or all that is published below a folder."""
        if self.store is not None:
            self.store.remove(place)
        elif (self.root / place).is_dir():
            shutil.rmtree(self.root / place)
        else:
            (self.root / place).unlink(missing_ok=True)

    def place(self, dataset: str, day: date) -> str:
        """Where the day's partition is published."""
        return f"{dataset}/date={day.isoformat()}/part-0.parquet"

    def path(self, dataset: str, day: date) -> Path:
        """The day's partition, to be read."""
        return self.file(self.place(dataset, day))

    def days(self, dataset: str) -> list[date]:
        """Published days of a dataset, ascending."""
        files: Iterable[PurePath]
        if self.store is None:
            folder = self.root / dataset
            files = folder.glob("date=*/part-0.parquet") if folder.is_dir() else []
        else:
            below = map(PurePath, self.store.places(dataset))
            files = [f for f in below if f.match(f"{dataset}/date=*/part-0.parquet")]
        return sorted(date.fromisoformat(f.parent.name.removeprefix("date=")) for f in files)

    def scan(self, dataset: str, days: list[date]) -> pl.LazyFrame:
        """The rows of some days, with the columns of all.

        A column that one day lacks is null in its rows. Numbers of several types are read as the
        widest one, and a column without any value on one day as another day has it.
        """
        return self.scan_files(self.files([self.place(dataset, day) for day in days]))

    def rows(self, dataset: str, day: date) -> int:
        """Number of rows of the published partition, by its footer."""
        source = self._footer(dataset, day)
        assert source is not None, self.place(dataset, day)
        return int(pl.scan_parquet(source, glob=False).select(pl.len()).collect().item())

    @staticmethod
    def scan_files(paths: list[Path]) -> pl.LazyFrame:
        """The rows of partitions' files, as `scan`."""
        schemas = ((path, pl.scan_parquet(path, glob=False).collect_schema()) for path in paths)
        groups = [
            [path for path, _ in group]
            for _, group in groupby(schemas, lambda pair: tuple(pair[1].items()))
        ]
        frames = [pl.scan_parquet(group, glob=False) for group in groups]
        return frames[0] if len(frames) == 1 else pl.concat(frames, how="diagonal_relaxed")

    def provenance(self, dataset: str, day: date) -> dict[str, str] | None:
        """Provenance of the published partition, or None without one."""
        source = self._footer(dataset, day)
        if source is None:
            return None
        return json.loads(pl.read_parquet_metadata(source).get(PROVENANCE, "{}"))

    def _footer(self, dataset: str, day: date) -> Path | io.BytesIO | None:
        """What the partition's metadata is read from, or None without a partition."""
        place = self.place(dataset, day)
        if self.store is not None:
            return self.store.end(place)
        path = self.root / place
        return path if path.is_file() else None

    def published_fingerprint(self, dataset: str, day: date) -> str | None:
        """One hash of the published partition's provenance, or None without a partition."""
        published = self.provenance(dataset, day)
        return None if published is None else fingerprint(json.dumps(published, sort_keys=True))

    def with_versions(
        self, dataset: str, day: date, made: Provenance, versions: Mapping[str, str]
    ) -> dict[str, str]:
        """A provenance with the versions of the tables that a partition is read from.

        A commit that changes nothing of what the partition is made from leaves it up to date, with
        the versions it was read at.

        Args:
            made: provenance without them.
            versions: setting → version of the table that it names.
        """
        published = self.provenance(dataset, day) or {}
        same = all(published.get(name) == value for name, value in made.items())
        keys = {f"{VERSION}{setting}": version for setting, version in versions.items()}
        return dict(made) | {k: published.get(k, v) if same else v for k, v in keys.items()}

    def versions(self, dataset: str, days: list[date]) -> dict[str, dict[str, str]]:
        """Of each day with tables: setting → version of the table that was read."""
        found = {}
        for day in days:
            made = self.provenance(dataset, day) or {}
            own = {k.removeprefix(VERSION): v for k, v in made.items() if k.startswith(VERSION)}
            if own:
                found[day.isoformat()] = own
        return found

    def stale(self, dataset: str, day: date, provenance: Provenance) -> str | None:
        """Why the partition must be built, naming the changed inputs; None if it is up to date.

        Args:
            provenance: of the partition if it were built now.
        """
        published = self.provenance(dataset, day)
        if published is None:
            return "not built yet"
        names = {**published, **provenance}
        changed = [name for name in names if published.get(name) != provenance.get(name)]
        return f"changed: {', '.join(changed)}" if changed else None

    def publish(
        self,
        dataset: str,
        day: date,
        frame: pl.LazyFrame | pl.DataFrame,
        provenance: Provenance,
        row_group_size: int | None = None,
    ) -> PurePath:
        """Publish `frame` as the day's partition of `dataset`; a lazy frame is streamed.

        Returns where it is.

        Args:
            row_group_size: rows of each row group of the file; None for polars' default.
        """
        place = self.place(dataset, day)
        with self.published(place) as temporary:
            frame.lazy().sink_parquet(
                temporary,
                metadata={PROVENANCE: json.dumps(dict(provenance))},
                row_group_size=row_group_size,
                engine="streaming",
                mkdir=True,
            )
        return self.where(place)

    def publish_file(self, place: str, content: str | bytes) -> PurePath:
        """Publish a report, a picture or figures at a place; returns where it is."""
        with self.published(place) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        return self.where(place)

    def cached(self, subject: str, stamp: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it returned last for this subject if the stamp was the same.

        Values are stored below `root`, so each host has its own. Nothing is stored where that
        folder does not exist.

        Args:
            compute: returns what JSON can hold.
        """
        file = self.root / CACHE / f"{fingerprint(subject)}.json"
        if _LOADED.get(file, {}).get("stamp") != stamp and file.is_file():
            _LOADED[file] = json.loads(file.read_text("utf-8"))
        stored = _LOADED.get(file)
        if stored is None or stored["stamp"] != stamp:
            stored = {"subject": subject, "stamp": stamp, "value": compute()}
            _LOADED[file] = stored
            if self.root.is_dir():
                with self.staged(file) as temporary:
                    temporary.write_text(json.dumps(stored), "utf-8")
        return stored["value"]

    @contextmanager
    def lock(self, what: str, scope: str = BUILD, wait: bool = False) -> Iterator[None]:
        """Hold a lock of the workspace, so that only one run writes what it protects.

        The operating system releases the lock when a run is killed; in a store it is a lease, which
        ends when it is not renewed (`stores/leases.py`). A process that holds the lock of `BUILD`
        may take it again, as a flow does whose steps run in threads. Raises ProjectError naming
        the other run, unless `wait`.

        Args:
            what: the run, for the message of another one.
            scope: what is written: `BUILD` for events, aggregates, examples and trainings;
                otherwise any name, such as that of a day's ranking.
            wait: wait until the other run ends.
        """
        name = scope.replace("/", "-")
        if self.store is not None:
            with self.store.lease(name, what, again=scope == BUILD, wait=wait):
                yield
            return
        path = self.root / (".lock" if scope == BUILD else f".locks/{name}")
        if str(path.resolve()) in _HELD:
            yield
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.seek(0)
                raise ProjectError(
                    f"{self.root}: another run works in this workspace ({file.read().strip()}); "
                    "start again when it has ended"
                ) from None
            file.seek(0)
            file.truncate()
            file.write(f"{what}, process {os.getpid()}")
            file.flush()
            if scope == BUILD:
                _HELD.add(str(path.resolve()))
            try:
                yield
            finally:
                _HELD.discard(str(path.resolve()))

    @contextmanager
    def published(self, place: str | PurePath) -> Iterator[Path]:
        """A temporary path, whose file is published at a place on success."""
        if self.store is None:
            with self.staged(self.root / place) as temporary:
                yield temporary
            return
        temporary = staging_path(self.root)
        try:
            yield temporary
            self.store.publish(temporary, str(place))
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """An empty folder of this host, which is removed with its files."""
        folder = staging_path(self.root)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    @contextmanager
    def staged(self, target: Path) -> Iterator[Path]:
        """A temporary path below `root`, renamed to the path `target` on success."""
        temporary = staging_path(self.root)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def parts(self, dataset: str, day: date, provenance: Provenance, count: int) -> list[PurePath]:
        """Places of the `count` parts of a partition, kept until `publish_parts`.

        Parts that an earlier attempt wrote with the same provenance are kept, others are removed.
        """
        every = self._parts_folder(dataset, day)
        current = f"{every}/{fingerprint(json.dumps(dict(provenance), sort_keys=True), count)}"
        others = {str(PurePath(place).parent) for place in self.places(every)} - {current}
        for folder in others:
            self.remove(folder)
        return [PurePath(current) / f"{number:06d}.parquet" for number in range(count)]

    def publish_parts(
        self, dataset: str, day: date, parts: Sequence[PurePath], provenance: Provenance
    ) -> PurePath:
        """Publish the parts, concatenated in order, as the day's partition, and remove them.

        Returns where it is.
        """
        rows = pl.scan_parquet(self.files(parts), glob=False)
        target = self.publish(dataset, day, rows, provenance)
        self.remove(self._parts_folder(dataset, day))
        return target

    def unfinished(self) -> dict[str, int]:
        """Folder → bytes of the parts of each partition that a run did not finish, ascending."""
        found: Counter[str] = Counter()
        for place, size in self.places(PARTS).items():
            found[PurePath(place).parents[1].as_posix()] += size
        return dict(found)

    def unfinished_parts(self, dataset: str) -> list[str]:
        """Places of the parts of partitions that are not published yet, ascending."""
        return list(self.places(f"{PARTS}/{dataset}"))

    def _parts_folder(self, dataset: str, day: date) -> str:
        return f"{PARTS}/{dataset}/date={day.isoformat()}"


def open_workspace(place: Path | str) -> Workspace:
    """The workspace in a folder, or below an address of an object store.

    Raises ProjectError for an address of an unknown kind, and without obstore.
    """
    return _stored(StoredFolder(address_of(place))) if is_address(place) else Workspace(Path(place))


def _stored(store: StoredFolder) -> Workspace:
    return Workspace(store.cache, store)
