"""Where each dataset lives, and how a partition is published: written aside, then renamed.

A partition is one Parquet file, so that `os.replace` makes publishing atomic: a reader sees the
previous partition or the new one, never a part. What the partition was made from travels, name by
name, in the file's own metadata, so the two cannot disagree, and a rebuild can say why.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl

from mtl_ranker.errors import ProjectError

PROVENANCE = "mtl_ranker.made_from"
ABANDONED = 7 * 86_400.0  # seconds
_HELD: set[str] = set()  # roots of workspaces that this process has locked
Provenance = Mapping[str, str]  # what a partition was made from: name → fingerprint


def fingerprint(*parts: object) -> str:
    """Short hash of settings, SQL texts, file states or other fingerprints."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:32]


def file_state(path: Path) -> str:
    """A file's name, size and modification time: changes whenever the file was rewritten."""
    stat = path.stat()
    return f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}"


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Figures to the file that `--json` names, if it was given."""
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
    """Seconds since it was written to; 0 once it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@dataclass(frozen=True)
class Workspace:
    """A folder with everything a project produced: datasets, MLflow's database, Prefect's."""

    root: Path

    def path(self, dataset: str, day: date) -> Path:
        return self.root / dataset / f"date={day.isoformat()}" / "part-0.parquet"

    def days(self, dataset: str) -> list[date]:
        """Published days of a dataset, ascending."""
        folder = self.root / dataset
        found = folder.glob("date=*/part-0.parquet") if folder.is_dir() else []
        return sorted(date.fromisoformat(p.parent.name.removeprefix("date=")) for p in found)

    def scan(self, dataset: str, days: list[date]) -> pl.LazyFrame:
        return pl.scan_parquet(
            [self.path(dataset, day) for day in days], missing_columns="insert", glob=False
        )

    def provenance(self, dataset: str, day: date) -> dict[str, str] | None:
        """What the published partition was made from, or None without one."""
        path = self.path(dataset, day)
        if not path.is_file():
            return None
        return json.loads(pl.read_parquet_metadata(path).get(PROVENANCE, "{}"))

    def published_fingerprint(self, dataset: str, day: date) -> str | None:
        """One hash of all that the published partition was made from, or None without one."""
        made = self.provenance(dataset, day)
        return None if made is None else fingerprint(json.dumps(made, sort_keys=True))

    def stale(self, dataset: str, day: date, made: Provenance) -> str | None:
        """Why the partition has to be built, in words; None when it is up to date."""
        known = self.provenance(dataset, day)
        if known is None:
            return "not built yet"
        changed = [name for name in {**known, **made} if known.get(name) != made.get(name)]
        return f"changed: {', '.join(changed)}" if changed else None

    def publish(
        self, dataset: str, day: date, frame: pl.LazyFrame | pl.DataFrame, made: Provenance
    ) -> Path:
        """Write `frame` as the day's partition of `dataset`, atomically, streaming."""
        target = self.path(dataset, day)
        with self.staged(target) as temporary:
            frame.lazy().sink_parquet(
                temporary,
                metadata={PROVENANCE: json.dumps(dict(made))},
                engine="streaming",
                mkdir=True,
            )
        return target

    def publish_file(self, place: str, content: str | bytes) -> Path:
        """Write a report, a picture or figures at a path below the root, atomically."""
        target = self.root / place
        with self.staged(target) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        return target

    @contextmanager
    def lock(self, what: str) -> Iterator[None]:
        """One run at a time builds in a workspace; a killed run's lock is free at once.

        A run may take the lock it already holds. Raises ProjectError naming the other run.
        """
        root = str(self.root.resolve())
        if root in _HELD:
            yield
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            _HELD.add(root)
            try:
                yield
            finally:
                _HELD.discard(root)

    @contextmanager
    def staged(self, target: Path) -> Iterator[Path]:
        """A temporary path on the same file system that replaces `target` on success."""
        temporary = self.staging()
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def parts(self, dataset: str, day: date, made: Provenance, count: int) -> list[Path]:
        """Where the parts of a partition lie until `publish_parts`, whoever makes them.

        What an earlier attempt made from the same stays; what was made from anything else goes.
        """
        folder = self._parts_of(dataset, day)
        own = folder / fingerprint(json.dumps(dict(made), sort_keys=True), count)
        for other in folder.iterdir() if folder.is_dir() else []:
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
        own.mkdir(parents=True, exist_ok=True)
        return [own / f"{number:06d}.parquet" for number in range(count)]

    def publish_parts(self, dataset: str, day: date, parts: list[Path], made: Provenance) -> Path:
        """Publish the parts, one after the other, as the day's partition, and remove them."""
        target = self.publish(dataset, day, pl.scan_parquet(parts, glob=False), made)
        shutil.rmtree(self._parts_of(dataset, day))
        return target

    def _parts_of(self, dataset: str, day: date) -> Path:
        return self.root / ".parts" / dataset / f"date={day.isoformat()}"

    def staging(self) -> Path:
        """A path, named after this host and process, for what is not published yet."""
        self.clean_staging()
        found = self.root / ".staging"
        found.mkdir(parents=True, exist_ok=True)
        return found / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"

    def clean_staging(self) -> None:
        """Remove what killed runs left behind.

        Files of this host's living processes stay, and those of other hosts, which may share this
        folder, for a week.
        """
        staging = self.root / ".staging"
        for left in staging.glob("*-*-*") if staging.is_dir() else []:
            host, pid, _ = left.name.rsplit("-", 2)
            here = host == socket.gethostname()
            if not _alive(int(pid)) if here else _age(left) > ABANDONED:
                left.unlink(missing_ok=True)
