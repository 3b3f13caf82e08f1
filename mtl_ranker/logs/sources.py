"""Read a log of Parquet files one day at a time, with its columns renamed to the canonical ones.

Files may be local, or objects of a store (`logs/places.py`). Scans are lazy; only Parquet footers,
the days of an undivided log and the keys of a table are read eagerly. Errors name the file and the
column.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from functools import lru_cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import polars as pl

from mtl_ranker.config import CANONICAL, GIVEN, TOO_LARGE, Log, Project, Table, load_project
from mtl_ranker.context import Context, Place, Source
from mtl_ranker.errors import ProjectError, counted, first_line
from mtl_ranker.logs.places import (
    content_of,
    listed,
    place_at,
    scan_places,
    schema_of,
    size_of,
    stamp_of,
)
from mtl_ranker.logs.requests import shown_items
from mtl_ranker.logs.table_formats import TableVersion, open_table
from mtl_ranker.workspace import FileSize, Workspace, fingerprint, open_workspace

TABLE_FORMATS = ("delta", "iceberg")
AnyPlace = TypeVar("AnyPlace", bound=Place)


@dataclass(frozen=True)
class LogFiles:
    """The folders and files of a log as of one look at them.

    Attributes:
        path: the log's file or folder.
        folders: day → its folder; empty for a log that is not divided into days.
        ready: name of the marker in the folder of a complete day (`log.ready`).
        found: of the days that were looked at (`files`).
    """

    path: Place
    folders: Mapping[date, Place]
    ready: str | None
    found: dict[date, list[Place] | None] = field(default_factory=dict, compare=False, repr=False)

    def files(self, day: date) -> list[Place] | None:
        """A day's files; None for a day that is not there.

        With `ready` a day is there when it has the marker, otherwise when it has a file.
        """
        if day not in self.found:
            folder, own = self.folders.get(day), None
            if folder is not None and (not self.ready or (folder / self.ready).exists()):
                files = parquet_files(folder)
                own = files if files or self.ready else None
            self.found[day] = own
        return self.found[day]

    @property
    def days(self) -> list[date]:
        """Days that are there, ascending."""
        return sorted(day for day in self.folders if self.files(day) is not None)


class Looks(dict[tuple[str, str | None, str | None], LogFiles]):
    """What was found where, by path, layout and marker; a copy for another process is empty."""

    def __reduce__(self) -> tuple[type[Looks], tuple[()]]:
        return Looks, ()


@dataclass(frozen=True)
class ParquetSource:
    """A log of Parquet files, in folders of days or undivided, with its user and item tables.

    Attributes:
        workspace: where hashes of the files are cached; None to compute them each time.
        setting: the section of the project file, for messages.
        pins: format and path of a Delta or Iceberg table → the version that is read.
        past_columns: of the user and item tables, as log.items.price; null where the files do not
            have them.
        looks: what was found by the looks of a pinned source; None to look each time.
    """

    log: Log
    root: Place
    workspace: Workspace | None = None
    setting: str = "log"
    pins: Mapping[tuple[str, str], int] = field(default_factory=dict)
    past_columns: frozenset[str] = frozenset()
    looks: Looks | None = field(default=None, compare=False, repr=False)

    def path(self) -> Place:
        """The log's file or folder. Raises ProjectError where there is none."""
        path = listed(self.root / self.log.path)
        if not path.exists():
            raise ProjectError(
                f"{path}: not found; {self.setting}.path = {self.log.path!r} must be a Parquet "
                f"file, a folder of them, or a folder of {shown_layout(self.log)} folders "
                "below --data"
            )
        return path

    def days(self) -> list[date]:
        """Days present in the log, ascending."""
        files = self._look()
        if files.folders:
            return files.days
        found = {day for days in self._days_of_files(files).values() for day in days}
        return sorted(day for day in found if day is not None)

    def has_day(self, day: date) -> bool:
        """Whether the log has a day; without a look at the others, where they have folders."""
        files = self._look()
        return files.files(day) is not None if files.folders else day in self.days()

    def with_log(self, log: Log, past_columns: Collection[str] = ()) -> Source:
        """The same files read by other settings."""
        return replace(self, log=log, past_columns=frozenset(past_columns))

    def actions(self, name: str) -> Source:
        """The stream of an action, whose rows have the canonical columns of user, item and time."""
        index = [action.name for action in self.log.actions].index(name)
        action = self.log.actions[index]
        log = Log(
            format=self._format(action) or "parquet",
            version=action.version,
            path=action.path,
            user=action.user or self.log.user,
            item=action.item or self.log.item,
            timestamp=action.timestamp or self.log.timestamp,
            timestamp_unit=action.timestamp_unit or self.log.timestamp_unit,
            timezone=self.log.timezone,
            partition=self.log.partition,
            ready=None if self._format(action) else self.log.ready,
            day_tolerance_hours=self.log.day_tolerance_hours,
        )
        stream = _reader(log, self.root, self.workspace)
        return replace(stream, setting=f"log.actions[{index}]", pins=self.pins, looks=self.looks)

    def pinned(self) -> Source:
        """The same log with its tables at their present versions, which later commits leave.

        Its folders and files are looked for once. A source that is read by other settings
        (`with_log`) keeps both.
        """
        pins = {
            (f"{self._format(settings)}", settings.path): self._open(settings).version
            for settings in self._tables().values()
            if settings.version is None
        }
        return replace(self, pins={**self.pins, **pins}, looks=Looks())

    def versions(self) -> dict[str, str]:
        """Setting (log, log.users) → version of the Delta or Iceberg table that it names."""
        return {name: f"{t.version} of {t.place}" for name, t in self._versions().items()}

    def _versions(self) -> dict[str, TableVersion]:
        return {name: self._open(settings) for name, settings in self._tables().items()}

    def _tables(self) -> dict[str, Any]:
        """Setting (log, log.users) → the settings of a Delta or Iceberg table."""
        log = self.log
        named: dict[str, Any] = {"log": log, "log.users": log.users, "log.items": log.items}
        named |= {f"log.actions.{action.name}": action for action in log.actions}
        return {
            name: settings
            for name, settings in named.items()
            if settings is not None and self._format(settings)
        }

    def _format(self, settings: Any) -> str | None:
        """The table format of the log, a table or a stream; None for files."""
        format = settings.format or self.log.format
        return format if format in TABLE_FORMATS else None

    def _open(self, settings: Any) -> TableVersion:
        format = self._format(settings)
        assert format is not None
        version = settings.version
        if version is None:
            version = self.pins.get((format, settings.path))
        return open_table(format, self.root, settings.path, version)

    @property
    def undivided(self) -> bool:
        """Whether there are no folders of days, so that a day without rows is no missing one."""
        return not self._look().folders

    def sizes(self, day: date) -> list[FileSize]:
        """Size and time of each file that the day's rows are read from."""
        return [size_of(f) for f in self._day_files(self._look(), day)]

    def state(self, day: date) -> list[str]:
        """Name and content's hash of each file that the day's rows are read from."""
        return [content_of(f, self.workspace) for f in self._day_files(self._look(), day)]

    def tables_state(self, day: date) -> list[str]:
        """The same for the user and item tables as of D, including how they are read."""
        states = []
        for which in ("users", "items"):
            settings: Table | None = getattr(self.log, which)
            if settings is not None:
                parts, _ = self._table_parts(which, day)
                contents = [part.content(self.workspace) for part in parts]
                states.append(" ".join([*contents, _reading(settings)]))
        return states

    def scan_day(self, day: date, used: Collection[str] | None = None) -> pl.LazyFrame:
        """One day's rows in canonical columns, unchecked. Raises ProjectError.

        A column that the log has only from a later day on is null, unless a row without it is bad.

        Args:
            used: columns beside the canonical ones; None for all.
        """
        of_log = self._look()
        files = self._day_files(of_log, day)
        if of_log.folders:
            added = self._begun_later(of_log, day)
            lazy = scan_files(files, self._read(used), added, id_columns(self.log))
            lazy = self._shown(lazy, files[0]).with_columns(pl.lit(day).alias("date"))
            return _canonical(lazy, self.log, files[0], self.setting)
        rows = self._undivided(files, self._read(used), self._added_in_files(of_log))
        return rows.filter(pl.col("date").is_null() | (pl.col("date") == day))

    def _begun_later(self, of_log: LogFiles, day: date) -> dict[str, pl.DataType]:
        """Columns that neither D nor the day before has, but the log's last day; with their type.

        What the day before has and D has not is missing on D.
        """
        # With `log.ready`, a complete day may have no file.
        folders = sorted(of_log.folders)
        before = [d for d in reversed(folders) if d <= day]
        around = [*islice(filter(of_log.files, before), 2)]
        last = next(filter(of_log.files, reversed(folders)))
        schemas = {d: _first_schema(of_log, d) for d in (*around, last)}
        own = {n for f in of_log.files(day) or () for n in parquet_schema(f)}
        earlier = own.union(*(schemas[d] for d in around))
        return self._optional(schemas[last], earlier)

    def _added_in_files(self, of_log: LogFiles) -> dict[str, pl.DataType]:
        """Columns that the files of an undivided log have from a day on, with their type."""
        days = {
            file: [day for day in own if day is not None]
            for file, own in self._days_of_files(of_log).items()
        }
        dated = sorted((own[-1], file) for file, own in days.items() if own)
        if not dated:
            return {}
        schemas = {file: parquet_schema(file) for _, file in dated}
        mixed = set()
        for name, absent in ((n, f) for n in schemas[dated[-1][1]] for _, f in dated):
            if name not in schemas[absent]:
                having = [days[file][0] for file in schemas if name in schemas[file]]
                first, last = days[absent][0], days[absent][-1]
                mixed |= {name} if min(having) <= first or min(having) < last else set()
        return self._optional(schemas[dated[-1][1]], mixed)

    def _optional(
        self, schema: Mapping[str, pl.DataType], without: Collection[str]
    ) -> dict[str, pl.DataType]:
        """The columns that need not have a value, with the type they are read as."""
        log = self.log
        needed = {log.user, log.item, log.timestamp, log.position, log.propensity, log.partition}
        needed |= {log.impression, log.random_exposure, *log.required, *log.unique}
        needed |= {*log.list_columns, *without}
        if log.requests is not None:
            needed |= {log.requests.items, log.requests.clicked, *log.requests.per_item}
        return {name: wide_type(t) for name, t in schema.items() if name not in needed}

    def _read(self, used: Collection[str] | None) -> set[str] | None:
        """The columns to read: the used ones, and those that the log's settings name."""
        if used is None:
            return None
        log = self.log
        mapped = [log.user, log.item, log.timestamp, log.position, log.propensity, log.partition]
        mapped += [log.impression, log.random_exposure]
        if log.requests is not None:
            mapped += [log.requests.items, log.requests.clicked, *log.requests.per_item]
        further = [*log.context, *log.required, *log.ranges, *log.unique, *log.list_columns]
        return {name for name in (*used, *mapped, *further) if name is not None}

    def columns(self, day: date) -> list[str]:
        """The columns of a day's first file, for messages."""
        return parquet_schema(self._day_files(self._look(), day)[0]).names()

    def table(self, which: str, day: date) -> pl.LazyFrame | None:
        """The users' or items' table keyed by `user_id` or `item_id`, or None.

        Raises ProjectError for a column that is missing, and for a key with several rows that are
        valid at one time.

        Args:
            day: D. Of dated snapshots, the latest one of a day before D is read; of rows with
                `valid_from`, those that are valid at the start of D.
        """
        settings: Table | None = getattr(self.log, which)
        if settings is None:
            return None
        parts, every = self._table_parts(which, day)
        if not parts:  # D is before the first snapshot
            return self._scan_table(which, settings, [], every).clear()
        rows = self._read_table(which, settings, parts, every)
        if settings.valid_from is None:
            return rows
        valid = _valid_at(settings, rows.collect_schema(), self.log, day)
        return rows.filter(valid).drop(c for c in (FROM, TO) if c in rows.collect_schema())

    def snapshots(self, which: str) -> list[date]:
        """Days of which there are snapshots of a table, ascending; empty for one without."""
        settings: Table | None = getattr(self.log, which)
        dated = settings is not None and settings.partition is not None
        return sorted(self._snapshots(which)) if dated else []

    def _snapshots(self, which: str) -> dict[date, list[Place]]:
        """Day → the files of a table's snapshot. Raises ProjectError where there is none."""
        settings: Table = getattr(self.log, which)
        log = Log(path=settings.path, partition=settings.partition, ready=self.log.ready)
        setting = f"log.{which}"
        of_table = ParquetSource(log, self.root, self.workspace, setting, looks=self.looks)._look()
        found = {day: files for day in of_table.days if (files := of_table.files(day))}
        if not found:
            raise ProjectError(
                f"{self.root / settings.path}: holds no snapshot; log.{which}.partition = "
                f"{settings.partition!r} needs folders {shown_layout(log)} with Parquet files"
            )
        return found

    def _table_parts(self, which: str, day: date) -> tuple[list[TablePart], list[TablePart]]:
        """The files of a table as of D, and those of all its snapshots, ascending.

        There is none as of D where D is before the first snapshot. A Delta or Iceberg table is one
        part.
        """
        settings: Table = getattr(self.log, which)
        if self._format(settings):
            whole: list[TablePart] = [
                VersionPart(f"{self._format(settings)}", self._open(settings))
            ]
            return whole, whole
        if settings.partition is None:
            path = self.root / settings.path
            if not path.is_file():
                hint = ""
                if path.is_dir():
                    hint = f"; a folder of dated snapshots needs log.{which}.partition"
                raise ProjectError(f"{path}: not found (log.{which}.path){hint}")
            return [FilePart(path)], [FilePart(path)]
        parts = {own: [*map(FilePart, files)] for own, files in self._snapshots(which).items()}
        every = [part for own in sorted(parts) for part in parts[own]]
        earlier = [own for own in parts if own < day]
        return [*parts[max(earlier)]] if earlier else [], [*every]

    def _read_table(
        self, which: str, settings: Table, parts: list[TablePart], every: list[TablePart]
    ) -> pl.LazyFrame:
        """A table's rows of all times in canonical columns, with its keys checked."""
        rows = self._scan_table(which, settings, parts, every)
        place = f"{parts[0]}" if settings.partition is None else parts[0].folder

        def problem() -> str | None:
            return _key_problem(settings, rows, which, place, self.log) or _published_problem(
                settings, parts, which, place, self.log
            )

        if self.workspace is None:
            found = problem()
        else:
            contents = [part.content(self.workspace) for part in parts]
            stamp = fingerprint(*contents, _reading(settings), self.log.timezone)
            found = self.workspace.cached(f"rows of {which} in {place}", stamp, problem)
        if found is not None:
            raise ProjectError(found)
        return rows

    def _scan_table(
        self, which: str, settings: Table, parts: list[TablePart], every: list[TablePart]
    ) -> pl.LazyFrame:
        return _scan_table(settings, parts, every, f"log.{which}", self.log, self.past_columns)

    def _look(self) -> LogFiles:
        """The log's files, by one listing of a store."""
        key = f"{self.root / self.log.path}", self.log.layout, self.log.ready
        if self.looks is not None and key in self.looks:
            return self.looks[key]
        path = self.path()
        found = LogFiles(path, day_folders(path, self.log), self.log.ready)
        if self.looks is not None:
            self.looks[key] = found
        return found

    def _day_files(self, of_log: LogFiles, day: date) -> list[Place]:
        """The files with a day's rows. Raises ProjectError for a day without any."""
        path = of_log.path
        if of_log.folders:
            files = of_log.files(day)
            if files is None:
                have = of_log.days
                days = (
                    f"{counted(len(have), 'day')} from {have[0]} to {have[-1]}"
                    if have
                    else "no day"
                )
                raise ProjectError(
                    f"{path}: no partition {day.strftime(self.log.layout or '')}; the log has "
                    f"{days}"
                )
            if not files:
                raise ProjectError(f"{of_log.folders[day]}: holds no *.parquet file")
            return files
        files_days = self._days_of_files(of_log)
        if not any(day in own for own in files_days.values()):
            have = sorted({day for own in files_days.values() for day in own if day is not None})
            span = f"days from {have[0]} to {have[-1]}" if have else "no day"
            raise ProjectError(f"{path}: no rows of {day}; the log has {span}")
        return [file for file, own in files_days.items() if day in own or None in own]

    def _days_of_files(self, of_log: LogFiles) -> dict[Place, list[date | None]]:
        """The days of each file of an undivided log; None for rows without a valid time."""
        files = parquet_files(of_log.path)
        if not files:
            raise ProjectError(f"{of_log.path}: holds no *.parquet file")
        return {file: self._days_of_file(file, of_log.path) for file in files}

    def _days_of_file(self, file: Place, path: Place) -> list[date | None]:
        def read() -> list[str | None]:
            schema, names = parquet_schema(file), (self.log.partition, self.log.timestamp)
            name = next((name for name in names if name is not None and name in schema), None)
            if name is None:  # raises an error that names the column
                own, rows = pl.col("date"), self._undivided([file], self._read([]))
            else:
                own = self._day_of(name, schema[name], path)
                rows = scan_files([file], {name})
            days = rows.select(own.unique().sort().alias("date")).collect()
            self.check_days(rows, path)
            return [day and day.isoformat() for day in days["date"]]

        if self.workspace is None:
            found = read()
        else:
            stamp = fingerprint(content_of(file, self.workspace), self.own_settings())
            found = self.workspace.cached(f"days of {file.resolve()}", stamp, read)
        return [None if day is None else date.fromisoformat(day) for day in found]

    def check_days(self, rows: pl.LazyFrame, place: Place | str) -> None:
        """Raise ProjectError for text in the column of the day that is no date."""
        schema, column = rows.collect_schema(), self.log.partition
        if column is None or schema.get(column) != pl.String:
            return
        lost = pl.col(column).is_not_null() & pl.col(column).str.to_date(strict=False).is_null()
        found = rows.filter(lost).select(pl.col(column).unique().sort().head(3)).collect()
        if found.height:
            raise ProjectError(
                f"{place}: column {column!r} ({self.setting}.partition) holds "
                f"{found[column].to_list()}; allowed: dates as YYYY-MM-DD"
            )

    def own_settings(self) -> str:
        """How the log's rows are read, as text: without its tables and streams."""
        return self.log.model_dump_json(exclude={"version", "users", "items", "actions"})

    def _day_of(self, column: str, dtype: pl.DataType, place: Place | str) -> pl.Expr:
        """The day of each row by `log.partition` or `log.timestamp`, one of which is the column."""
        if column == self.log.partition:
            if not _is_day(dtype):
                raise ProjectError(
                    f"{place}: column {column!r} ({self.setting}.partition) is {dtype}; "
                    "allowed: Date, Datetime or String"
                )
            if dtype == pl.String:
                return pl.col(column).str.to_date(strict=False)
            return _local_day(column, dtype, self.log)
        time = utc_timestamp(self.log, wide_type(dtype), f"{place}", f"{self.setting}.timestamp")
        return time.dt.convert_time_zone(self.log.timezone).dt.date()

    def _undivided(
        self,
        files: list[Place],
        used: Collection[str] | None = None,
        added: Mapping[str, pl.DataType] | None = None,
    ) -> pl.LazyFrame:
        return self.dated(scan_files(files, used, added, id_columns(self.log)), files[0])

    def _shown(self, rows: pl.LazyFrame, place: Place | str) -> pl.LazyFrame:
        """Rows of the log; of requests one for each item."""
        return rows if self.log.requests is None else shown_items(rows, self.log, f"{place}")

    def dated(self, rows: pl.LazyFrame, place: Place | str) -> pl.LazyFrame:
        """Rows of several days as impressions in canonical columns, each with its date.

        Args:
            rows: in the log's own columns.
            place: where they are, for messages.
        """
        lazy = self._shown(rows, place)
        schema = lazy.collect_schema()
        name = self.log.partition
        if name is not None and name in schema:
            lazy = lazy.with_columns(self._day_of(name, schema[name], place).alias("date"))
            return _canonical(lazy, self.log, place, self.setting)
        local = pl.col("timestamp").dt.convert_time_zone(self.log.timezone).dt.date()
        lazy = lazy.with_columns(pl.lit(None, pl.Date).alias("date"))
        lazy = _canonical(lazy, self.log, place, self.setting)
        return lazy.with_columns(local.alias("date"))


def _first_schema(of_log: LogFiles, day: date) -> pl.Schema:
    files = of_log.files(day)
    assert files
    return parquet_schema(files[0])


def _is_day(dtype: pl.DataType) -> bool:
    return dtype in (pl.Date, pl.String, pl.Null) or isinstance(dtype, pl.Datetime)


def _local_day(column: str, dtype: pl.DataType, log: Log) -> pl.Expr:
    """The date of a column of dates or times; of moments, that in the log's zone."""
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        return pl.col(column).dt.convert_time_zone(log.timezone).dt.date()
    return pl.col(column).cast(pl.Date)


def day_folders(path: AnyPlace, log: Log) -> dict[date, AnyPlace]:
    """Day → its folder below a path, in the layout of `log.partition`; empty without such folders.

    Raises ProjectError for a folder that names no day, and for two of one day.
    """
    layout = log.layout
    if layout is None or not path.is_dir():
        return {}
    folders: dict[date, AnyPlace] = {}
    for folder in sorted(path.glob(re.sub("(%[a-zA-Z])+", "*", layout.replace("%Y-%m-%d", "%Y")))):
        text = folder.relative_to(path).as_posix()
        if any(part.startswith(("_", ".")) for part in text.split("/")):
            continue  # markers and temporary folders, as in `parquet_files`
        try:
            plain = text.removeprefix(f"{log.partition}=")
            named = "%" not in (log.partition or "")
            day = date.fromisoformat(plain) if named else datetime.strptime(text, layout).date()
        except ValueError as error:
            raise ProjectError(
                f"{folder}: partition {text.rpartition('=')[2]!r} is not a day; expected "
                f"{shown_layout(log)}"
            ) from error
        if day in folders:
            raise ProjectError(f"{folder}: a second folder of {day}, beside {folders[day]}")
        folders[day] = folder
    return folders


def shown_layout(log: Log) -> str:
    """The layout of the days' folders for messages, such as date=YYYY-MM-DD."""
    text = log.layout or "date=%Y-%m-%d"
    for code, shown in (("%Y", "YYYY"), ("%m", "MM"), ("%d", "DD")):
        text = text.replace(code, shown)
    return text


def parquet_files(path: AnyPlace) -> list[AnyPlace]:
    """The Parquet files below a folder, or the file itself.

    Files and folders whose names start with `_` or `.` are left out: other engines write there
    what is not finished (`_temporary/`, `.spark-staging`).
    """
    if not path.is_dir():
        return [path]
    return [
        file
        for file in sorted(path.rglob("*.parquet"))
        if not any(part.startswith(("_", ".")) for part in file.relative_to(path).parts)
    ]


def scan_files(
    files: Sequence[Place],
    used: Collection[str] | None = None,
    added: Mapping[str, pl.DataType] | None = None,
    ids: Collection[str] = (),
) -> pl.LazyFrame:
    """Scan files with one type for each column.

    Files may differ in the width of numbers, and in columns that are not `used`. All footers are
    read first, so that an error names the file.

    Args:
        used: the columns; None for all.
        added: columns, with their type, that are null in a file without them.
        ids: columns that get another one with `TOO_LARGE` where a file has UInt64.
    """
    schemas = {file: parquet_schema(file) for file in files}
    added = {} if added is None else added
    names = dict.fromkeys([*(n for schema in schemas.values() for n in schema), *added])
    columns = [name for name in names if used is None or name in used]
    casts: dict[str, pl.DataType] = {}
    for name in columns:
        absent = [file for file in files if name not in schemas[file]]
        if absent and name not in added:
            present = next(file for file in files if name in schemas[file])
            raise ProjectError(f"{absent[0]}: column {name!r} is missing, but {present} has it")
        types = {file: schemas[file].get(name, pl.Null()) for file in files}
        common = _type_in_files(name, types)
        casts[name] = added[name] if common == pl.Null and name in added else common
    unsigned = [
        n for n in columns if n in ids and any(s.get(n) == pl.UInt64 for s in schemas.values())
    ]
    if len({tuple(schema.items()) for schema in schemas.values()}) == 1:
        return _one_type(scan_places(files), schemas[files[0]], casts, unsigned)
    return pl.concat(
        _one_type(scan_places([file]), schema, casts, unsigned) for file, schema in schemas.items()
    )


def _one_type(
    rows: pl.LazyFrame,
    schema: pl.Schema,
    casts: Mapping[str, pl.DataType],
    unsigned: Collection[str],
) -> pl.LazyFrame:
    """The columns of `casts` in their types, null where the rows have none; `_too_large`."""
    present = {name: dtype for name, dtype in casts.items() if name in schema}
    absent = [pl.lit(None, casts[name]).alias(name) for name in casts if name not in schema]
    flags = _too_large(schema, unsigned)
    rows = rows.select(list(present)).with_columns(*_casts(schema, present), *flags)
    if not absent:
        return rows
    return rows.with_columns(absent).select(*casts, *(f"{name}{TOO_LARGE}" for name in unsigned))


def _too_large(schema: pl.Schema, unsigned: Collection[str]) -> list[pl.Expr]:
    """Of each column, with `TOO_LARGE` after its name, which values no Int64 holds."""
    flags = {
        name: (pl.col(name) >= 2**63).fill_null(False)
        if schema.get(name) == pl.UInt64
        else pl.lit(False)
        for name in unsigned
    }
    return [flag.alias(f"{name}{TOO_LARGE}") for name, flag in flags.items()]


def _casts(schema: pl.Schema, casts: Mapping[str, pl.DataType]) -> list[pl.Expr]:
    # A number that does not fit (an unsigned one of 2**63 or more) becomes null.
    return [
        pl.col(name).cast(dtype, strict=False)
        for name, dtype in casts.items()
        if schema[name] != dtype
    ]


def widened(rows: pl.LazyFrame, ids: Collection[str] = ()) -> pl.LazyFrame:
    """Rows with the widest type of each column's kind, as `scan_files` has them."""
    schema = rows.collect_schema()
    flags = _too_large(schema, [name for name in ids if schema.get(name) == pl.UInt64])
    casts = _casts(schema, {n: wide_type(t) for n, t in schema.items()})
    return rows.with_columns(*casts, *flags)


def id_columns(log: Log) -> list[str]:
    """Columns of ids that rows are joined by."""
    return [name for name in (log.user, log.item, log.impression) if name is not None]


def parquet_schema(file: Place) -> pl.Schema:
    """The columns of a file, read once while the file is the same.

    Raises ProjectError for one that is not Parquet.
    """
    return _schema_at(str(file), stamp_of(file))


@lru_cache(maxsize=10_000)
def _schema_at(file: str, stamp: str) -> pl.Schema:
    """The columns of a file whose stamp is that of `stamp_of`."""
    place = place_at(file)
    try:
        return schema_of(place)
    except (pl.exceptions.PolarsError, OSError) as error:
        if size_of(place).size == 0:
            raise ProjectError(f"{file}: empty file (0 bytes), not Parquet") from error
        reason = first_line(error)
        raise ProjectError(f"{file}: not a whole Parquet file ({reason})") from error


def _type_in_files(name: str, types: Mapping[Any, pl.DataType]) -> pl.DataType:
    """The type that a column of several files takes. Raises ProjectError naming two files."""
    common = common_type(types.values())
    if common is not None:
        return common
    known = {file: dtype for file, dtype in types.items() if dtype != pl.Null}
    one = next(iter(known))
    other = next(file for file in known if common_type([known[one], known[file]]) is None)
    raise ProjectError(
        f"{other}: column {name!r} is {types[other]}, but {types[one]} in {one}; "
        "allowed: one type, or numbers of any width"
    )


def common_type(types: Iterable[pl.DataType]) -> pl.DataType | None:
    """The widest type of columns of one kind, or None for columns of two kinds.

    Whole numbers beside others become Float64. A column of nulls may take any type.
    """
    distinct = list(dict.fromkeys(wide_type(dtype) for dtype in types if dtype != pl.Null))
    if not distinct:
        return pl.Null()
    if len(distinct) == 1:
        return distinct[0]
    if all(isinstance(dtype, pl.List) for dtype in distinct):
        inner = common_type(_inner(dtype) for dtype in distinct)
        return None if inner is None else pl.List(inner)
    return pl.Float64() if all(dtype.is_numeric() for dtype in distinct) else None


def wide_type(dtype: pl.DataType) -> pl.DataType:
    """The widest type of a kind: Int64 for whole numbers, Float64 for others, String for text.

    Arrays become lists.
    """
    if dtype.is_integer():
        return pl.Int64()
    if dtype.is_numeric():
        return pl.Float64()
    if isinstance(dtype, pl.Categorical | pl.Enum):
        return pl.String()
    if isinstance(dtype, pl.List | pl.Array):
        return pl.List(wide_type(_inner(dtype)))
    return dtype


def _inner(dtype: Any) -> pl.DataType:
    """The type of a list's values."""
    return dtype.inner() if isinstance(dtype.inner, type) else dtype.inner


def _canonical(lazy: pl.LazyFrame, log: Log, place: Place | str, setting: str) -> pl.LazyFrame:
    """Rename the mapped columns to the canonical ones; all others keep their names.

    Args:
        setting: the section of the project file, for messages.
    """
    schema = lazy.collect_schema()
    mapped = {
        "user_id": (f"{setting}.user", log.user),
        "item_id": (f"{setting}.item", log.item),
        "timestamp": (f"{setting}.timestamp", log.timestamp),
    }
    for role in ("position", "propensity"):
        column = getattr(log, role)
        if column is not None:
            mapped[role] = (f"log.{role}", column)
    needed = [*mapped.values()]
    needed += [("log.context", c) for c in log.context]
    needed += [("log.required", c) for c in log.required]
    if log.impression is not None:
        needed.append(("log.impression", log.impression))
    if log.random_exposure is not None:
        needed.append(("log.random_exposure", log.random_exposure))
    needed += [("log.ranges", c) for c in log.ranges]
    needed += [("log.list" if log.request is None else "log.request", c) for c in log.list_columns]
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
    for role in ("user_id", "item_id"):
        column = f"{mapped[role][1]}{TOO_LARGE}"
        renames |= {column: f"{role}{TOO_LARGE}"} if column in schema else {}
    for role in mapped:
        if role in schema and role not in (m[1] for m in mapped.values()):
            raise ProjectError(
                f"{place}: has a column {role!r} besides {mapped[role][1]!r}, which "
                f"{mapped[role][0]} maps to that name; rename one of them"
            )
    given = pl.col(log.timestamp).is_not_null().alias(GIVEN)
    timestamp = utc_timestamp(log, schema[log.timestamp], f"{place}", f"{setting}.timestamp")
    lazy = lazy.with_columns(timestamp, given).rename(renames)
    rest = [c for c in lazy.collect_schema().names() if c not in CANONICAL]
    present = [c for c in CANONICAL if c in lazy.collect_schema().names()]
    return lazy.select(*present, *rest)


def utc_timestamp(log: Log, dtype: pl.DataType, place: str, setting: str) -> pl.Expr:
    """The log's timestamp in UTC, in microseconds. Raises ProjectError for a wrong type.

    Args:
        dtype: of the column `log.timestamp`.
        place, setting: the file, and the setting that names the column, for messages.
    """
    column = pl.col(log.timestamp)
    unit = log.timestamp_unit
    wrong = ProjectError(
        f"{place}: column {log.timestamp!r} ({setting}) is {dtype}, but "
        f"{setting.rpartition('.')[0]}.timestamp_unit = {unit!r}; "
        "allowed: a number with s, ms, us or ns, a Datetime with 'datetime', "
        "a String with 'iso'"
    )
    if unit == "datetime":
        if not isinstance(dtype, pl.Datetime):
            raise wrong
        zoned = column if dtype.time_zone else _in_zone(column, log)
        return zoned.dt.convert_time_zone("UTC").cast(pl.Datetime("us", "UTC"))
    if unit == "iso":
        if dtype != pl.String:
            raise wrong
        return _iso_moment(column, log).alias(log.timestamp)
    if not dtype.is_numeric():
        raise wrong
    to_us = {"s": 1_000_000.0, "ms": 1_000.0, "us": 1.0, "ns": 1e-3}[unit]
    if dtype.is_integer():
        whole = pl.col(log.timestamp).cast(pl.Int64, strict=False)
        fits = whole.abs() <= (2**63 - 1) // max(1, int(to_us))
        micros = whole // 1000 if unit == "ns" else pl.when(fits).then(whole * int(to_us))
    else:
        finite = pl.when(column.is_finite()).then(column)
        micros = (finite * to_us).cast(pl.Int64, strict=False)
    return micros.cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias(log.timestamp)


def _iso_moment(text: pl.Expr, log: Log) -> pl.Expr:
    """ISO texts in UTC, in microseconds; those without an offset are in the log's zone."""
    offset = text.str.contains(r"(?i)(Z|[+-]\d{2}:?\d{2})\s*$")
    zoned = pl.when(offset).then(text.str.replace(r"(?i)\s*Z\s*$", "+00:00"))
    absolute = zoned.str.to_datetime(time_zone="UTC", time_unit="us", strict=False)
    local = pl.when(~offset).then(text).str.to_datetime(time_unit="us", strict=False)
    in_utc = _in_zone(local, log).dt.convert_time_zone("UTC")
    return pl.when(offset).then(absolute).otherwise(in_utc)


def _in_zone(local: pl.Expr, log: Log) -> pl.Expr:
    """Local times in the log's zone; null in the hour that daylight saving time skips."""
    return local.dt.replace_time_zone(log.timezone, ambiguous="earliest", non_existent="null")


def _first_in_zone(local: pl.Expr, log: Log) -> pl.Expr:
    """Local times in the log's zone; one that a change of the clock skips is the first after it.

    Clocks change at full or half hours, by half an hour, an hour or a day.
    """
    half_hour = local.dt.truncate("30m")
    later = (half_hour.dt.offset_by("30m"), half_hour.dt.offset_by("1h"))
    whole_day = local.dt.truncate("1d").dt.offset_by("1d")
    return pl.coalesce(_in_zone(each, log) for each in (local, *later, whole_day))


@dataclass(frozen=True)
class FilePart:
    """A file of a user or item table."""

    file: Place

    def __str__(self) -> str:
        return str(self.file)

    @property
    def folder(self) -> str:
        return str(self.file.parent)

    def content(self, workspace: Workspace | None) -> str:
        """What changes when the rows do."""
        return content_of(self.file, workspace)

    def schema(self) -> pl.Schema:
        return parquet_schema(self.file)

    def rows(self) -> pl.LazyFrame:
        return scan_places([self.file])


@dataclass(frozen=True)
class VersionPart:
    """A Delta or Iceberg table as of one commit, as the only part of a user or item table."""

    format: str
    table: TableVersion

    def __str__(self) -> str:
        return self.table.place

    @property
    def folder(self) -> str:
        return self.table.place

    def content(self, workspace: Workspace | None) -> str:
        """What changes when the rows do."""
        return f"{self.format} {self.table.version} of {self.table.place}, {self.table.id}"

    def schema(self) -> pl.Schema:
        return self.table.scan().collect_schema()

    def rows(self) -> pl.LazyFrame:
        return self.table.scan()


TablePart = FilePart | VersionPart


def _reading(settings: Table) -> str:
    """How a table's rows are read, given which they are."""
    return settings.model_dump_json(exclude={"version", "format"})


FROM, TO = "valid from", "valid to"  # of a row of a table


def _scan_table(
    settings: Table,
    parts: list[TablePart],
    every: list[TablePart],
    where: str,
    log: Log,
    past: Collection[str] = (),
) -> pl.LazyFrame:
    """A table's rows in canonical columns, with `FROM` and `TO` where it has `valid_from`.

    A column has one type in all snapshots, and is null in those from before it was added. Raises
    ProjectError for one that is missing in all, or in these files although earlier ones have it.

    Args:
        parts: to be read; none for a frame without rows.
        every: of all snapshots, ascending.
        where: the section of the project file, for messages.
        past: columns, as log.items.price, that are null in files without them.
    """
    key = {"log.users": "user_id", "log.items": "item_id"}[where]
    named = [(f"{where}.key", settings.key), *((f"{where}.columns", c) for c in settings.columns)]
    named += [(f"{where}.lists", c) for c in settings.lists]
    for setting in ("published", "valid_from", "valid_to"):
        if getattr(settings, setting) is not None:
            named.append((f"{where}.{setting}", getattr(settings, setting)))
    schemas = {part: part.schema() for part in every}
    types: dict[str, pl.DataType] = {}
    for setting, column in named:
        having = [part for part in every if column in schemas[part]]
        lacking = [part for part in parts if column not in schemas[part]]
        dropped = bool(having and lacking) and every.index(having[0]) < every.index(lacking[0])
        needed = f"{where}.{column}" not in past
        if needed and (not having or dropped or (lacking and column == settings.key)):
            part = lacking[0] if lacking else every[-1]
            hint = f"; {having[0]} has it" if having else ""
            raise ProjectError(
                f"{part}: column {column!r} (named by {setting}) is missing; "
                f"it has: {', '.join(schemas[part].names())}{hint}"
            )
        types[column] = _type_in_files(column, {part: schemas[part][column] for part in having})
    frames = []
    for part in parts:
        absent = {c: pl.Null() for c in types if c not in schemas[part]}
        casts = _casts(pl.Schema({**schemas[part], **absent}), types)
        rows = part.rows().with_columns(pl.lit(None, pl.Null).alias(c) for c in absent)
        frames.append(rows.select(*types).with_columns(casts))
    lazy = pl.concat(frames) if frames else pl.LazyFrame(schema=types)
    schema = pl.Schema(types)
    chosen = [pl.col(settings.key).alias(key), *(pl.col(c) for c in settings.columns)]
    for column, separator in settings.lists.items():
        if schema[column].is_nested():
            raise ProjectError(
                f"{every[-1]}: column {column!r} ({where}.lists) is {schema[column]}; allowed: "
                f"text; a column of lists is named in {where}.columns"
            )
        chosen.append(pl.col(column).cast(pl.String).str.split(separator).alias(column))
    if settings.published:
        dtype = schema[settings.published]
        if not _is_day(dtype):
            raise ProjectError(
                f"{every[-1]}: column {settings.published!r} ({where}.published) is {dtype}; "
                "allowed: Date, Datetime, or a date or time as ISO text"
            )
        day = _published_day(settings.published, dtype, log)
        chosen.append(day.cast(pl.Int32).alias(f"{key}_published_day"))
    for setting, name in (("valid_from", FROM), ("valid_to", TO)):
        bound = getattr(settings, setting)
        if bound is not None:
            place = f"{parts[0]}: column {bound!r} ({where}.{setting})"
            chosen.append(_bound(bound, schema[bound], place, log).alias(name))
    return lazy.select(chosen)


def _published_day(column: str, dtype: pl.DataType, log: Log) -> pl.Expr:
    """The date of a column of dates, times or ISO texts, in the log's zone."""
    if dtype != pl.String:
        return _local_day(column, dtype, log)
    day = pl.col(column).str.to_date("%Y-%m-%d", strict=False)
    time = _iso_moment(pl.col(column), log).dt.convert_time_zone(log.timezone).dt.date()
    return pl.coalesce(day, time)


def _published_problem(
    settings: Table, parts: list[TablePart], which: str, place: str, log: Log
) -> str | None:
    """What is wrong with a table's texts of publication: some that are no date and no time."""
    column = settings.published
    if column is None:
        return None
    for part in parts:
        if part.schema().get(column) != pl.String:
            continue
        lost = _published_day(column, pl.String(), log).is_null()
        rows = part.rows().filter(lost & (pl.col(column).str.strip_chars() != ""))
        found = rows.select(column).head(3).collect()[column].to_list()
        if found:
            return (
                f"{place}: column {column!r} (log.{which}.published) holds {found}; "
                "allowed: dates as YYYY-MM-DD, or times as ISO text"
            )
    return None


def _bound(column: str, dtype: pl.DataType, place: str, log: Log) -> pl.Expr:
    """An end of the time in which a row is valid: a date, or a time in the log's zone.

    A local time that daylight saving time skips is the first one after it.
    """
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is None:
        return _first_in_zone(pl.col(column), log).cast(pl.Datetime("us", log.timezone))
    if isinstance(dtype, pl.Datetime):
        local = pl.col(column).dt.convert_time_zone(log.timezone)
        return local.cast(pl.Datetime("us", log.timezone))
    if dtype in (pl.Date, pl.Null):
        return pl.col(column).cast(pl.Date)
    raise ProjectError(f"{place} is {dtype}; allowed: Date or Datetime")


def _moment(bound: str, schema: pl.Schema, log: Log) -> pl.Expr:
    """`FROM` or `TO` as a moment in the log's zone; a date is its first moment."""
    if schema[bound] != pl.Date:
        return pl.col(bound)
    return _first_in_zone(pl.col(bound).cast(pl.Datetime("us")), log)


def _valid_at(settings: Table, schema: pl.Schema, log: Log, day: date) -> pl.Expr:
    """Whether a row of a table is valid at the start of D."""
    start = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(log.timezone))

    def at(name: str) -> pl.Expr:
        return pl.lit(day) if schema[name] == pl.Date else pl.lit(start)

    valid = pl.col(FROM).is_null() | (pl.col(FROM) <= at(FROM))
    if settings.valid_to is not None:
        valid &= pl.col(TO).is_null() | (pl.col(TO) > at(TO))
    return valid


BEGINS, ENDS = "begins", "ends"  # the moments of `FROM` and `TO`


def _key_problem(
    settings: Table, rows: pl.LazyFrame, which: str, place: str, log: Log
) -> str | None:
    """What is wrong with a table's keys: two rows of one key that are valid at one time."""
    key = {"users": "user_id", "items": "item_id"}[which]
    if settings.valid_from is None:
        named = rows.filter(pl.col(key).is_not_null())
        duplicates = named.select(pl.col(key).is_duplicated().sum()).collect().item()
        if not duplicates:
            return None
        return (
            f"{place}: {duplicates} rows share their key {settings.key!r} with another row; "
            "allowed: one row per key; for several, of different times, see "
            f"log.{which}.partition and log.{which}.valid_from"
        )
    schema = rows.collect_schema()
    ends = _moment(TO, schema, log) if settings.valid_to is not None else pl.lit(None, pl.Date)
    spans = rows.filter(pl.col(key).is_not_null()).select(
        key,
        FROM,
        pl.col(TO) if settings.valid_to is not None else ends.alias(TO),
        _moment(FROM, schema, log).alias(BEGINS),
        ends.cast(pl.Datetime("us", log.timezone)).alias(ENDS),
    )
    start = pl.col(BEGINS)
    spans = spans.filter(start.is_null() | start.ne_missing(pl.col(ENDS)))
    ordered = spans.sort(key, BEGINS, nulls_last=False).with_columns(
        pl.col(column).shift(1).alias(f"{column} before") for column in (key, FROM, TO, ENDS)
    )
    end_before = pl.col(f"{ENDS} before")
    overlap = (pl.col(f"{key} before") == pl.col(key)) & (
        end_before.is_null() | start.is_null() | (start < end_before)
    )
    wrong = ordered.filter(overlap | (start > pl.col(ENDS))).head(1).collect()
    if wrong.is_empty():
        return None
    row = wrong.row(0, named=True)
    shown = f"{row[FROM] or 'always'} to {row[TO] or 'open'}"
    if row[BEGINS] is not None and row[ENDS] is not None and row[BEGINS] > row[ENDS]:
        return (
            f"{place}: key {settings.key!r} = {row[key]!r} is valid from {shown}; allowed: an end "
            "that is not before the start"
        )
    before = f"{row[f'{FROM} before'] or 'always'} to {row[f'{TO} before'] or 'open'}"
    return (
        f"{place}: key {settings.key!r} = {row[key]!r} has two rows that are valid at one time: "
        f"{before}, and {shown}; allowed: "
        f"each row ends (log.{which}.valid_to) before or when the next one begins"
    )


# Formats other than Parquet, and the module whose `open_source` reads each.
READERS = {
    "census-income": "mtl_ranker.studies.census_data",
    "delta": "mtl_ranker.logs.table_source",
    "iceberg": "mtl_ranker.logs.table_source",
}


def open_source(project: Project, data: str | Path, workspace: Workspace | None = None) -> Source:
    """The project's log below `data`. Raises ProjectError where there is no such folder.

    Args:
        data: a folder or the address of one in an object store.
        workspace: where hashes of the log's files are cached.
    """
    root = place_at(data)
    if not root.is_dir():
        raise ProjectError(f"--data {root}: no such folder")
    return _reader(project.log, root, workspace)


def _reader(log: Log, root: Place, workspace: Workspace | None) -> ParquetSource:
    if log.format in READERS:
        return import_module(READERS[log.format]).open_source(log, root, workspace)
    return ParquetSource(log, root, workspace)


def open_context(config: str, data: str | Path, workspace: str | Path) -> Context:
    """Read the project file, and find its log and its workspace.

    Raises ProjectError for a mistake in the project file, a missing folder of data and a workspace
    at an address of an unknown kind.
    """
    project = load_project(config)
    folder = open_workspace(workspace)
    return Context(project, open_source(project, data, folder), folder)
