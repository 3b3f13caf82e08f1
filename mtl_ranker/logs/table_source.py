"""A log that is one Delta or Iceberg table, with the day in a column or in the timestamp.

What a day's rows are read from are the table's data files that may hold it, so a commit to one day
leaves the others up to date.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

import polars as pl

from mtl_ranker.config import Log
from mtl_ranker.context import Place
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.sources import ParquetSource, id_columns, widened
from mtl_ranker.logs.table_formats import DataFile, TableVersion, data_files
from mtl_ranker.workspace import FileSize, Workspace, fingerprint

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
LARGEST_TIME = (2**63 - 1) // 1_000_000  # seconds since 1970 that fit in microseconds


def open_source(log: Log, data: Place, workspace: Workspace | None = None) -> TableSource:
    """The reader of `format = "delta"` and `"iceberg"` (`logs/sources.py`)."""
    return TableSource(log, data, workspace)


@dataclass(frozen=True)
class TableSource(ParquetSource):
    """A log, or a stream of actions, in a Delta or Iceberg table.

    Rows without a day, such as those without a valid time, belong to every day, as in an undivided
    log of files.
    """

    @property
    def undivided(self) -> bool:
        return True

    def days(self) -> list[date]:
        table = self._table()
        spans = self._spans(table)
        found = {a for file, (a, b) in spans if a is not None and a == b and not file.deleted}
        whole = all(a is not None and a == b and not file.deleted for file, (a, b) in spans)
        return sorted(found if whole else self._read_days(table))

    def has_day(self, day: date) -> bool:
        return day in self.days()

    def sizes(self, day: date) -> list[FileSize]:
        return [FileSize(f.name, f.size, f.modified) for f in self._files(day)]

    def state(self, day: date) -> list[str]:
        return [f"{f.name}:{f.size}" for f in self._files(day)]

    def scan_day(self, day: date, used: Collection[str] | None = None) -> pl.LazyFrame:
        table = self._table()
        if day not in self.days():
            raise self._missing(day)
        rows, read = table.scan(), self._read(used)
        columns = [c for c in rows.collect_schema().names() if read is None or c in read]
        near = rows.filter(self._near(table, day)).select(columns)
        rows = widened(near, id_columns(self.log))
        rows = self.dated(rows, table.place)
        return rows.filter(pl.col("date").is_null() | (pl.col("date") == day))

    def columns(self, day: date) -> list[str]:
        return self._table().scan().collect_schema().names()

    def _table(self) -> TableVersion:
        return self._open(self.log)

    def _day_column(self, table: TableVersion) -> tuple[str, pl.DataType]:
        """The column of a row's day, and its type. Raises ProjectError for a wrong type."""
        schema, name = table.scan().collect_schema(), self.log.partition
        if name is not None and name in schema:
            return name, schema[name]
        if self.log.timestamp not in schema:
            raise ProjectError(
                f"{table.place}: column {self.log.timestamp!r} (named by {self.setting}.timestamp) "
                f"is missing; it has: {', '.join(schema)}"
            )
        return self.log.timestamp, schema[self.log.timestamp]

    def _spans(
        self, table: TableVersion
    ) -> list[tuple[DataFile, tuple[date, date] | tuple[None, None]]]:
        """Each data file with its first and last day; None where they are not known."""
        column, dtype = self._day_column(table)
        files = data_files(table, column)
        ends = []
        for values in ([f.low for f in files], [f.high for f in files]):
            frame = pl.DataFrame({column: _series(values, dtype)})
            ends.append(frame.select(self._day_of(column, dtype, table.place))[column].to_list())
        spans: list[tuple[DataFile, tuple[date, date] | tuple[None, None]]] = []
        for file, first, last in zip(files, *ends, strict=True):
            # The order of texts need not be that of their days.
            known = first is not None and last is not None
            known &= dtype != pl.String or file.low == file.high
            spans.append((file, (first, last) if known else (None, None)))
        return spans

    def _files(self, day: date) -> list[DataFile]:
        """The data files that may hold rows of a day. Raises ProjectError for a day without any."""
        if day not in self.days():
            raise self._missing(day)
        return [
            file
            for file, (first, last) in self._spans(self._table())
            if file.nulls or first is None or last is None or first <= day <= last
        ]

    def _missing(self, day: date) -> ProjectError:
        have = self.days()
        span = f"days from {have[0]} to {have[-1]}" if have else "no day"
        return ProjectError(f"{self._table().place}: no rows of {day}; the table has {span}")

    def _read_days(self, table: TableVersion) -> list[date]:
        """The days of all rows, from their column."""

        def read() -> list[str]:
            day = self._day_of(*self._day_column(table), table.place)
            self.check_days(table.scan(), table.place)
            days = table.scan().select(day.alias("date").drop_nulls().unique())
            return [day.isoformat() for day in days.collect(engine="streaming")["date"]]

        if self.workspace is None:
            found = read()
        else:
            stamp = fingerprint(table.id, table.version, self.own_settings())
            found = self.workspace.cached(f"days of {table.place}", stamp, read)
        return [date.fromisoformat(day) for day in found]

    def _near(self, table: TableVersion, day: date) -> pl.Expr:
        """A condition on the table's own column by which files of other days are not read.

        It holds for every row of the day, and for rows without a day.
        """
        column, dtype = self._day_column(table)
        value = pl.col(column)
        if column == self.log.partition:
            if dtype == pl.Date:
                return value.is_null() | (value == day)
            spans = self._spans(table)
            if dtype == pl.String and all(f.low == f.high for f, _ in spans):
                of_day = {f.low for f, (first, _) in spans if first == day}
                unread = {f.low for f, (first, _) in spans if first is None and f.low is not None}
                return value.is_null() | value.is_in(sorted(of_day | unread))
            return pl.lit(True)
        zone = ZoneInfo(self.log.timezone)
        start, end = (
            datetime(each.year, each.month, each.day, tzinfo=zone)
            for each in (day, day + timedelta(days=1))
        )
        if isinstance(dtype, pl.Datetime):
            # Bounds of files are compared only with values of the column's own zone.
            own = None if dtype.time_zone is None else ZoneInfo(dtype.time_zone)
            start, end = (
                each.replace(tzinfo=None) if own is None else each.astimezone(own)
                for each in (start, end)
            )
            return value.is_null() | ((value >= start) & (value < end))
        if dtype.is_numeric() and self.log.timestamp_unit in PER_SECOND:
            scale = PER_SECOND[self.log.timestamp_unit]
            limit = min(LARGEST_TIME * scale, 2**63 - 1)
            inside = (value >= int(start.timestamp()) * scale) & (
                value < int(end.timestamp()) * scale
            )
            invalid = value.is_null() | (value > limit) | (value < -limit)
            return inside | (invalid | value.is_nan() if dtype.is_float() else invalid)
        return pl.lit(True)


def _series(values: list[object], dtype: pl.DataType) -> pl.Series:
    """Bounds of a column in its type; those that it does not hold are missing."""
    if isinstance(dtype, pl.Datetime):
        naive = pl.Series(values, dtype=pl.Datetime("us"), strict=False)
        if dtype.time_zone is None:
            return naive
        return naive.dt.replace_time_zone("UTC").dt.convert_time_zone(dtype.time_zone)
    return pl.Series(values, dtype=dtype, strict=False)
