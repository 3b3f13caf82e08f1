"""Read a log of Parquet files one day at a time, with its columns renamed to the canonical ones.

Scans are lazy; only Parquet footers, the days of an undivided log and the keys of a table are read
eagerly. Errors name the file and the column.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

import polars as pl

from mtl_ranker.config import CANONICAL, Log, Project, Table, load_project
from mtl_ranker.context import Context, Source
from mtl_ranker.errors import ProjectError
from mtl_ranker.workspace import Workspace, file_state


@dataclass(frozen=True)
class ParquetSource:
    """A log of Parquet files, in folders of days or undivided, with its user and item tables."""

    log: Log
    root: Path

    def path(self) -> Path:
        """The log's file or folder. Raises ProjectError where there is none."""
        path = self.root / self.log.path
        if not path.exists():
            raise ProjectError(
                f"{path}: not found; [log] path = {self.log.path!r} must be a Parquet file, "
                f"a folder of them, or a folder of {self.log.partition or 'date'}=YYYY-MM-DD "
                "folders below --data"
            )
        return path

    def days(self) -> list[date]:
        """Days present in the log, ascending."""
        partitions = self._partitions()
        if partitions:
            return sorted(partitions)
        days = self._undivided().select(pl.col("date").unique().sort()).collect()["date"]
        return days.drop_nulls().to_list()

    def state(self, day: date) -> list[str]:
        """One text per file that the day's rows are read from; changes when it is rewritten."""
        return [file_state(f) for f in self._day_files(day)]

    def tables_state(self) -> list[str]:
        """The same for the user and item tables, including how they are read."""
        tables = [t for t in (self.log.users, self.log.items) if t is not None]
        missing = [self.root / t.path for t in tables if not (self.root / t.path).is_file()]
        if missing:
            raise ProjectError(f"{missing[0]}: not found (log.users.path or log.items.path)")
        return [f"{file_state(self.root / t.path)} {t.model_dump_json()}" for t in tables]

    def scan_day(self, day: date) -> pl.LazyFrame:
        """One day's rows in canonical columns, unchecked. Raises ProjectError."""
        files = self._day_files(day)
        if self._partitions():
            lazy = _scan_files(files).with_columns(pl.lit(day).alias("date"))
            return _canonical(lazy, self.log, files[0])
        return self._undivided().filter(pl.col("date").is_null() | (pl.col("date") == day))

    def table(self, which: str) -> pl.LazyFrame | None:
        """The users' or items' table keyed by `user_id` or `item_id`, or None."""
        settings: Table | None = getattr(self.log, which)
        if settings is None:
            return None
        key = {"users": "user_id", "items": "item_id"}[which]
        return _scan_table(settings, self.root / settings.path, key, f"log.{which}")

    def _partitions(self) -> dict[date, Path]:
        path, name = self.path(), self.log.partition
        if name is None or not path.is_dir():
            return {}
        folders = {}
        for folder in sorted(path.glob(f"{name}=*")):
            text = folder.name.removeprefix(f"{name}=")
            try:
                folders[date.fromisoformat(text)] = folder
            except ValueError as error:
                raise ProjectError(
                    f"{folder}: partition {text!r} is not a day; expected {name}=YYYY-MM-DD"
                ) from error
        return folders

    def _day_files(self, day: date) -> list[Path]:
        partitions = self._partitions()
        path = self.path()
        if partitions:
            if day not in partitions:
                have = sorted(partitions)
                raise ProjectError(
                    f"{path}: no partition {self.log.partition}={day}; "
                    f"the log has {len(have)} days from {have[0]} to {have[-1]}"
                )
            path = partitions[day]
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise ProjectError(f"{path}: holds no *.parquet file")
        return files

    def _undivided(self) -> pl.LazyFrame:
        path = self.path()
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise ProjectError(f"{path}: holds no *.parquet file")
        lazy = _scan_files(files)
        schema = lazy.collect_schema()
        name = self.log.partition
        if name is not None and name in schema:
            day = pl.col(name)
            day = day.str.to_date(strict=False) if schema[name] == pl.String else day.cast(pl.Date)
            return _canonical(lazy.with_columns(day.alias("date")), self.log, files[0])
        local = pl.col("timestamp").dt.convert_time_zone(self.log.timezone).dt.date()
        lazy = _canonical(lazy.with_columns(pl.lit(None, pl.Date).alias("date")), self.log, path)
        return lazy.with_columns(local.alias("date"))


def _scan_files(files: list[Path]) -> pl.LazyFrame:
    """Scan files of one schema; all footers are read first, so that an error names the file."""
    first: tuple[Path, pl.Schema] | None = None
    for file in files:
        if file.stat().st_size == 0:
            raise ProjectError(f"{file}: empty file (0 bytes), not Parquet")
        try:
            schema = pl.Schema(pl.read_parquet_schema(file))
        except (pl.exceptions.PolarsError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ProjectError(f"{file}: not a whole Parquet file ({reason})") from error
        if first is None:
            first = (file, schema)
        elif set(schema) != set(first[1]):
            difference = sorted(set(schema) ^ set(first[1]))
            raise ProjectError(
                f"{file}: its columns differ from those of {first[0]} in {difference}"
            )
        else:
            for name, dtype in schema.items():
                if dtype != first[1][name]:
                    raise ProjectError(
                        f"{file}: column {name!r} is {dtype}, but {first[1][name]} in {first[0]}"
                    )
    return pl.scan_parquet(files, glob=False)


def _canonical(lazy: pl.LazyFrame, log: Log, place: Path) -> pl.LazyFrame:
    """Rename the mapped columns to the canonical ones; all others keep their names."""
    schema = lazy.collect_schema()
    mapped = {
        "user_id": ("log.user", log.user),
        "item_id": ("log.item", log.item),
        "timestamp": ("log.timestamp", log.timestamp),
    }
    for role in ("position", "propensity"):
        column = getattr(log, role)
        if column is not None:
            mapped[role] = (f"log.{role}", column)
    needed = [*mapped.values()]
    needed += [("log.context", c) for c in log.context]
    needed += [("log.required", c) for c in log.required]
    if log.random_exposure is not None:
        needed.append(("log.random_exposure", log.random_exposure))
    needed += [("log.ranges", c) for c in log.ranges]
    have = [c for c in schema if c != "date" or log.partition == "date"]
    for key, column in needed:
        if column not in schema:
            raise ProjectError(
                f"{place}: column {column!r} (named by {key}) is missing; it has: {', '.join(have)}"
            )
    for role in ("user_id", "item_id"):
        column = mapped[role][1]
        if not (schema[column].is_integer() or schema[column] == pl.String):
            raise ProjectError(
                f"{place}: column {column!r} ({mapped[role][0]}) is {schema[column]}; "
                "allowed: an integer or String"
            )
    for column in log.ranges:
        if not schema[column].is_numeric():
            raise ProjectError(
                f"{place}: column {column!r} (log.ranges) is {schema[column]}; allowed: a number"
            )
    renames = {column: role for role, (_, column) in mapped.items() if column != role}
    for role in mapped:
        if role in schema and role not in (m[1] for m in mapped.values()):
            raise ProjectError(
                f"{place}: has a column {role!r} besides {mapped[role][1]!r}, which "
                f"{mapped[role][0]} maps to that name; rename one of them"
            )
    lazy = lazy.with_columns(_utc_timestamp(log, schema[log.timestamp], place)).rename(renames)
    rest = [c for c in lazy.collect_schema().names() if c not in CANONICAL]
    present = [c for c in CANONICAL if c in lazy.collect_schema().names()]
    return lazy.select(*present, *rest)


def _utc_timestamp(log: Log, dtype: pl.DataType, place: Path) -> pl.Expr:
    """The log's timestamp in UTC, in microseconds. Raises ProjectError for a wrong type."""
    column = pl.col(log.timestamp)
    unit = log.timestamp_unit
    wrong = ProjectError(
        f"{place}: column {log.timestamp!r} (log.timestamp) is {dtype}, but log.timestamp_unit = "
        f"{unit!r}; allowed: a number with s, ms, us or ns, a Datetime with 'datetime', "
        "a String with 'iso'"
    )
    if unit == "datetime":
        if not isinstance(dtype, pl.Datetime):
            raise wrong
        zone = column if dtype.time_zone else column.dt.replace_time_zone(log.timezone)
        return zone.dt.convert_time_zone("UTC").cast(pl.Datetime("us", "UTC"))
    if unit == "iso":
        if dtype != pl.String:
            raise wrong
        return column.str.to_datetime(time_zone="UTC", time_unit="us", strict=False)
    if not dtype.is_numeric():
        raise wrong
    to_us = {"s": 1_000_000.0, "ms": 1_000.0, "us": 1.0, "ns": 1e-3}[unit]
    if dtype.is_integer():
        whole = pl.col(log.timestamp).cast(pl.Int64)
        micros = whole // 1000 if unit == "ns" else whole * int(to_us)
    else:
        finite = pl.when(column.is_finite()).then(column)
        micros = (finite * to_us).cast(pl.Int64, strict=False)
    return micros.cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias(log.timestamp)


def _scan_table(settings: Table, path: Path, key: str, where: str) -> pl.LazyFrame:
    if not path.is_file():
        raise ProjectError(f"{path}: not found ({where}.path)")
    lazy = _scan_files([path])
    schema = lazy.collect_schema()
    named = [(f"{where}.key", settings.key), *((f"{where}.columns", c) for c in settings.columns)]
    named += [(f"{where}.lists", c) for c in settings.lists]
    if settings.published:
        named.append((f"{where}.published", settings.published))
    for setting, column in named:
        if column not in schema:
            raise ProjectError(
                f"{path}: column {column!r} (named by {setting}) is missing; "
                f"it has: {', '.join(schema.names())}"
            )
    duplicates = lazy.select(pl.col(settings.key).is_duplicated().sum()).collect().item()
    if duplicates:
        raise ProjectError(
            f"{path}: {duplicates} rows share their key {settings.key!r} with another row; "
            "allowed: one row per key"
        )
    chosen = [pl.col(settings.key).alias(key), *(pl.col(c) for c in settings.columns)]
    for column, separator in settings.lists.items():
        chosen.append(pl.col(column).cast(pl.String).str.split(separator).alias(column))
    if settings.published:
        text = schema[settings.published] == pl.String
        day = pl.col(settings.published)
        day = day.str.to_date(strict=False) if text else day.cast(pl.Date)
        chosen.append(day.cast(pl.Int32).alias(f"{key}_published_day"))
    return lazy.select(chosen)


# Formats other than Parquet, and the module whose `open_source` reads each.
READERS = {"census-income": "mtl_ranker.studies.census_data"}


def open_source(project: Project, data: Path) -> Source:
    """The project's log below `data`. Raises ProjectError where there is no such folder."""
    if not data.is_dir():
        raise ProjectError(f"--data {data}: no such folder")
    if project.log.format in READERS:
        return import_module(READERS[project.log.format]).open_source(project.log, data)
    return ParquetSource(project.log, data)


def open_context(config: str, data: Path, workspace: Path) -> Context:
    """Read the project file, and find its log and its workspace.

    Raises ProjectError for a mistake in the project file and a missing folder of data.
    """
    project = load_project(config)
    return Context(project, open_source(project, data), Workspace(workspace))
