"""Where each dataset is stored, and how its partitions are published atomically.

A partition is one Parquet file: the rows of one day. It is staged (written to a temporary path,
then renamed with `os.replace`), so that a reader finds the previous partition or the new one, never
half of one. A large partition can be built in parts, files that are kept until all are there and
are then published as one.

A partition's provenance (name → fingerprint of each input it was built from) is stored in the
file's metadata, so the two cannot disagree, and a rebuild can name what has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from mtl_ranker.errors import ProjectError

PROVENANCE = "mtl_ranker.made_from"  # key in the metadata of the Parquet file
VERSION = "version of "  # of a Delta or Iceberg table, in a provenance
CACHE = ".cache"
ABANDONED = 7 * 86_400.0  # seconds
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
    stat = path.stat()
    stamp = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
    return f"{path.name}:{workspace.cached(f'content of {path.resolve()}', stamp, digest)}"


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write figures to the file that `--json` names; without it, do nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=str), "utf-8")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _age(path: Path) -> float:
    """Seconds since the file was written; 0 if it has been removed."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@dataclass(frozen=True)
class Workspace:
    """A folder with all outputs of a project: datasets, and the databases of MLflow and Prefect."""

    root: Path

    def path(self, dataset: str, day: date) -> Path:
        """The day's partition."""
        return self.root / dataset / f"date={day.isoformat()}" / "part-0.parquet"

    def days(self, dataset: str) -> list[date]:
        """Published days of a dataset, ascending."""
        folder = self.root / dataset
        files = folder.glob("date=*/part-0.parquet") if folder.is_dir() else []
        return sorted(date.fromisoformat(f.parent.name.removeprefix("date=")) for f in files)

    def scan(self, dataset: str, days: list[date]) -> pl.LazyFrame:
        """The rows of some days, with the columns of all.

        A column that one day lacks is null in its rows. Numbers of several types are read as the
        widest one, and a column without any value on one day as another day has it.
        """
        return self.scan_files([self.path(dataset, day) for day in days])

    @staticmethod
    def scan_files(paths: list[Path]) -> pl.LazyFrame:
        """The rows of partitions' files, as `scan`."""
        schemas = ((path, pl.read_parquet_schema(path)) for path in paths)
        groups = [
            [path for path, _ in group]
            for _, group in groupby(schemas, lambda pair: tuple(pair[1].items()))
        ]
        frames = [pl.scan_parquet(group, glob=False) for group in groups]
        return frames[0] if len(frames) == 1 else pl.concat(frames, how="diagonal_relaxed")

    def provenance(self, dataset: str, day: date) -> dict[str, str] | None:
        """Provenance of the published partition, or None without one."""
        path = self.path(dataset, day)
        if not path.is_file():
            return None
        return json.loads(pl.read_parquet_metadata(path).get(PROVENANCE, "{}"))

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
        self, dataset: str, day: date, frame: pl.LazyFrame | pl.DataFrame, provenance: Provenance
    ) -> Path:
        """Publish `frame` as the day's partition of `dataset`; a lazy frame is streamed."""
        target = self.path(dataset, day)
        with self.staged(target) as temporary:
            frame.lazy().sink_parquet(
                temporary,
                metadata={PROVENANCE: json.dumps(dict(provenance))},
                engine="streaming",
                mkdir=True,
            )
        return target

    def publish_file(self, place: str, content: str | bytes) -> Path:
        """Publish a report, a picture or figures at a path below the root."""
        target = self.root / place
        with self.staged(target) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        return target

    def cached(self, subject: str, stamp: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it returned last for this subject if the stamp was the same.

        Nothing is stored in a workspace that does not exist.

        Args:
            compute: returns what JSON can hold.
        """
        place = f"{CACHE}/{fingerprint(subject)}.json"
        file = self.root / place
        if _LOADED.get(file, {}).get("stamp") != stamp and file.is_file():
            _LOADED[file] = json.loads(file.read_text("utf-8"))
        stored = _LOADED.get(file)
        if stored is None or stored["stamp"] != stamp:
            stored = {"subject": subject, "stamp": stamp, "value": compute()}
            _LOADED[file] = stored
            if self.root.is_dir():
                self.publish_file(place, json.dumps(stored))
        return stored["value"]

    @contextmanager
    def lock(self, what: str, scope: str = BUILD, wait: bool = False) -> Iterator[None]:
        """Hold a lock of the workspace, so that only one run writes what it protects.

        The operating system releases the lock when a run is killed. A process that holds the lock
        of `BUILD` may take it again, as a flow does whose steps run in threads. Raises
        ProjectError naming the other run, unless `wait`.

        Args:
            what: the run, for the message of another one.
            scope: what is written: `BUILD` for events, aggregates, examples and trainings;
                otherwise any name, such as that of a day's ranking.
            wait: wait until the other run ends.
        """
        path = self.root / (".lock" if scope == BUILD else f".locks/{scope.replace('/', '-')}")
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
    def staged(self, target: Path) -> Iterator[Path]:
        """A temporary path on the same file system, renamed to `target` on success."""
        temporary = self._staging_path()
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def parts(self, dataset: str, day: date, provenance: Provenance, count: int) -> list[Path]:
        """Files of the `count` parts of a partition, kept until `publish_parts`.

        Parts that an earlier attempt wrote with the same provenance are kept, others are removed.
        """
        every = self._parts_folder(dataset, day)
        current = every / fingerprint(json.dumps(dict(provenance), sort_keys=True), count)
        for folder in every.iterdir() if every.is_dir() else []:
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)
        current.mkdir(parents=True, exist_ok=True)
        return [current / f"{number:06d}.parquet" for number in range(count)]

    def publish_parts(
        self, dataset: str, day: date, parts: list[Path], provenance: Provenance
    ) -> Path:
        """Publish the parts, concatenated in order, as the day's partition, and remove them."""
        target = self.publish(dataset, day, pl.scan_parquet(parts, glob=False), provenance)
        shutil.rmtree(self._parts_folder(dataset, day))
        return target

    def _parts_folder(self, dataset: str, day: date) -> Path:
        return self.root / ".parts" / dataset / f"date={day.isoformat()}"

    def _staging_path(self) -> Path:
        """A new temporary path, named after this host and process."""
        self._clean_staging()
        folder = self.root / ".staging"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"

    def _clean_staging(self) -> None:
        """Remove temporary files of killed runs.

        Files of this host's living processes are kept. Other hosts may share this folder: their
        files are kept for a week.
        """
        folder = self.root / ".staging"
        for file in folder.glob("*-*-*") if folder.is_dir() else []:
            host, pid, _ = file.name.rsplit("-", 2)
            here = host == socket.gethostname()
            if not _alive(int(pid)) if here else _age(file) > ABANDONED:
                file.unlink(missing_ok=True)
