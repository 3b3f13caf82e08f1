"""Delta and Iceberg tables at one version: their rows, and which data files may hold a day.

Rows are read by polars, which supports deleted rows, partitions and added columns. A table is found
by deltalake, or by pyiceberg in the catalog of its own configuration (`.pyiceberg.yaml`,
`PYICEBERG_CATALOG__…`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Protocol

import polars as pl

from mtl_ranker.context import Place
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.stores.objects import ADDRESS, needs_extra, store_options
from mtl_ranker.workspace import fingerprint

MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True)
class DataFile:
    """A file of a table's version.

    Attributes:
        name: its path, with a hash of the rows that are deleted in it.
        size: in bytes.
        modified: seconds since 1970.
        low, high: bounds of a column's values; None where they are not known. Times are in UTC.
        nulls: whether the column may lack a value in a row.
        deleted: whether rows are deleted in it.
    """

    name: str
    size: int
    modified: float
    low: Any
    high: Any
    nulls: bool
    deleted: bool


class TableVersion(Protocol):
    """A table as of one commit.

    Attributes:
        place: its path or name, for messages.
        version: of a Delta table, or snapshot id of an Iceberg table.
        id: of the table; one that is written anew at the same place has another.
    """

    @property
    def place(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def id(self) -> str: ...

    def __hash__(self) -> int: ...

    def scan(self) -> pl.LazyFrame:
        """All rows."""

    def files(self, column: str) -> list[DataFile]:
        """The data files, with bounds of a column, in the order of their names."""


def open_table(format: str, root: Place, path: str, version: int | None = None) -> TableVersion:
    """A Delta or Iceberg table, at a version or as it is.

    Args:
        format: "delta" or "iceberg".
        root, path: of `--data` and below it, or the table's name in a catalog.

    Raises ProjectError where the package, the table or the version is missing.
    """
    place = str(root / path)
    if format == "delta":
        needs_extra(f"{place} (format = 'delta')", "deltalake")
        uri = place if ADDRESS.match(place) else str((root / path).resolve())
        if version is None:
            return _latest_delta(uri)
        return _delta_at(uri, version, _IDS.get(uri))
    needs_extra(f"{path} (format = 'iceberg')", "pyiceberg")
    return _iceberg(place if path.endswith(".metadata.json") else path, version)


@functools.lru_cache(maxsize=32)
def data_files(table: TableVersion, column: str) -> list[DataFile]:
    """`table.files(column)`, which is read once in a process."""
    return table.files(column)


@dataclass(frozen=True, eq=False)
class DeltaVersion:
    place: str
    version: int
    table: Any

    @property
    def id(self) -> str:
        return str(self.table.metadata().id)

    def scan(self) -> pl.LazyFrame:
        try:
            return pl.scan_delta(self.table, storage_options=None)
        except Exception as error:  # deltalake's errors have no common class
            raise _unreadable("Delta", self.place, error) from error

    def files(self, column: str) -> list[DataFile]:
        frame = pl.DataFrame(self.table.get_add_actions(flatten=True))
        deleted = self._deleted()
        partition = f"partition.{column}"
        low, high = (
            (partition, partition)
            if partition in frame.columns
            else (f"min.{column}", f"max.{column}")
        )
        found = []
        for row in frame.sort("path").iter_rows(named=True):
            least, most = row.get(low), row.get(high)
            if high != partition and isinstance(most, datetime):
                most += MILLISECOND  # maxima are cut off at milliseconds
            name = row["path"]
            nulls = int(least is None) if low == partition else row.get(f"null_count.{column}")
            mark = deleted.get(name)
            found.append(
                DataFile(
                    name=name if mark is None else f"{name} without {mark}",
                    size=row["size_bytes"],
                    modified=row["modification_time"] / 1000,
                    low=_in_utc(least),
                    high=_in_utc(most),
                    nulls=nulls != 0,
                    deleted=mark is not None,
                )
            )
        return found

    def _deleted(self) -> dict[str, str]:
        """Path of a file with deleted rows → hash of which they are."""
        if "deletionVectors" not in (self.table.protocol().reader_features or []):
            return {}
        vectors = pl.DataFrame(self.table.deletion_vectors())
        root = self.table.table_uri.removeprefix("file://").rstrip("/") + "/"
        return {
            path.removeprefix("file://").removeprefix(root): fingerprint(kept)
            for path, kept in vectors.select("filepath", "selection_vector").iter_rows()
        }


def _in_utc(value: Any) -> Any:
    """A moment with a time zone as one without, in UTC; other values as they are."""
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC).replace(tzinfo=None)
    return value


_IDS: dict[str, str] = {}  # address → id of the Delta table that was last found there


def _latest_delta(uri: str) -> TableVersion:
    table = _load_delta(uri, None)
    _IDS[uri] = str(table.metadata().id)
    return _delta_at(uri, table.version(), _IDS[uri])


@functools.lru_cache(maxsize=16)
def _delta_at(uri: str, version: int, id: str | None) -> TableVersion:
    """A version of one table does not change, so it is loaded once.

    Args:
        id: of the table that is there; None where its latest version was not looked for.
    """
    return DeltaVersion(uri, version, _load_delta(uri, version))


def _load_delta(uri: str, version: int | None) -> Any:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    options = store_options(uri) if ADDRESS.match(uri) else None
    try:
        return DeltaTable(uri, version=version, storage_options=options)
    except TableNotFoundError as error:
        raise ProjectError(f"{uri}: no Delta table") from error
    except (DeltaError, OSError, ValueError) as error:
        raise _unreadable("Delta", uri, error, version) from error


@dataclass(frozen=True, eq=False)
class IcebergVersion:
    place: str
    version: int
    table: Any

    @property
    def id(self) -> str:
        return str(self.table.metadata.table_uuid)

    def scan(self) -> pl.LazyFrame:
        return pl.scan_iceberg(self.table, snapshot_id=self.version)

    def files(self, column: str) -> list[DataFile]:
        scan = self.table.scan(snapshot_id=self.version)
        names = scan.projection().column_names
        field = scan.projection().find_field(column) if column in names else None
        snapshots = {s.snapshot_id: s.timestamp_ms / 1000 for s in self.table.snapshots()}
        modified = snapshots.get(self.version, 0.0)
        found = []
        for task in scan.plan_files():
            file = task.file
            deletes = sorted(delete.file_path for delete in task.delete_files)
            name = file.file_path + (f" without {fingerprint(*deletes)}" if deletes else "")
            low = high = None
            nulls: int | None = None
            if field is not None:
                low = _bound(field, file.lower_bounds)
                high = _bound(field, file.upper_bounds)
                nulls = (file.null_value_counts or {}).get(field.field_id)
            size = file.file_size_in_bytes
            found.append(DataFile(name, size, modified, low, high, nulls != 0, bool(deletes)))
        return sorted(found, key=lambda each: each.name)


def _bound(field: Any, bounds: Any) -> Any:
    """A bound of an Iceberg column as a value of its polars type; None where it is not known."""
    from pyiceberg.conversions import from_bytes
    from pyiceberg.types import DateType, TimestampType, TimestamptzType

    if not bounds or field.field_id not in bounds:
        return None
    value: Any = from_bytes(field.field_type, bounds[field.field_id])
    if isinstance(field.field_type, DateType):
        return date(1970, 1, 1) + timedelta(days=value)
    if isinstance(field.field_type, TimestampType | TimestamptzType):
        return datetime(1970, 1, 1) + timedelta(microseconds=value)
    return value


def _iceberg(name: str, version: int | None) -> TableVersion:
    from pyiceberg.utils.config import Config

    settings = Config()
    catalog = settings.get_default_catalog_name()
    endpoint = store_options("s3://").get("aws_endpoint_url")
    of_store = {} if endpoint is None else {"s3.endpoint": endpoint}
    own = settings.get_catalog_config(catalog) or {}
    properties = of_store | {key: str(value) for key, value in own.items()}
    place = (name, catalog, tuple(sorted(properties.items())))
    if version is None:
        snapshot = _load_iceberg(*place).current_snapshot()
        if snapshot is None:
            raise ProjectError(f"{name}: the Iceberg table has no snapshot; nothing was committed")
        version = snapshot.snapshot_id
    return _iceberg_at(place, version)


@functools.lru_cache(maxsize=16)
def _iceberg_at(place: tuple[str, str, tuple[tuple[str, str], ...]], version: int) -> TableVersion:
    """A snapshot does not change, so it is loaded once."""
    table = _load_iceberg(*place)
    if table.snapshot_by_id(version) is None:
        have = ", ".join(str(each.snapshot_id) for each in table.snapshots())
        raise ProjectError(
            f"{place[0]}: the Iceberg table has no snapshot {version}; it has: {have}"
        )
    return IcebergVersion(place[0], version, table)


def _load_iceberg(name: str, catalog: str, properties: tuple[tuple[str, str], ...]) -> Any:
    from pyiceberg.catalog import load_catalog
    from pyiceberg.exceptions import NoSuchTableError
    from pyiceberg.table import StaticTable

    try:
        if name.endswith(".metadata.json"):
            return StaticTable.from_metadata(name, dict(properties))
        return load_catalog(catalog, **dict(properties)).load_table(name)
    except NoSuchTableError as error:
        raise ProjectError(f"{name}: no such Iceberg table in catalog {catalog!r}") from error
    except Exception as error:  # of any catalog, with its database or server
        raise _unreadable("Iceberg", name, error) from error


def _unreadable(
    format: str, place: str, error: Exception, version: int | None = None
) -> ProjectError:
    at = "" if version is None else f" at version {version}"
    return ProjectError(f"{place}: the {format} table{at} cannot be read: {first_line(error)}")
