"""Rankings as a Delta table, for other engines: one commit replaces one day (`scoring.publish`).

The table is partitioned by `date` and has the columns of `rankings/date=D`. A reader finds the
previous ranking of a day or the new one, never half of one, as the commit is one object that is put
only if no other run has put it.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import polars as pl

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.logs.places import place_at
from mtl_ranker.stores.objects import is_address, needs_extra, store_options

DAY, MADE = "mtl_ranker.day", "mtl_ranker.made_from"  # in the metadata of a commit


def publish_to_table(context: Context, day: date) -> int | None:
    """Write the published ranking of day D to the table; the table's version.

    Returns None without `scoring.publish`, and if the table has this ranking already. Raises
    ProjectError if the store refuses the commit, or another run commits the day at the same time:
    the table is then as it was, or as the other run left it.
    """
    place = context.project.scoring.publish
    if place is None or not awaits_publishing(context, day):
        return None
    from deltalake import CommitProperties, DeltaTable, Schema, write_deltalake
    from deltalake.exceptions import DeltaError

    frame = context.workspace.scan("rankings", [day]).collect(engine="streaming")
    dtypes = pl.Schema({name: _signed(dtype) for name, dtype in frame.schema.items()})
    rows = frame.cast(dtypes).with_columns(pl.lit(day).alias("date"))
    made = context.workspace.published_fingerprint("rankings", day) or ""
    table, options = _table(place)
    try:
        if table is None:  # of two runs that create it, both use the one that was first
            schema = Schema.from_arrow(rows.to_arrow().schema)
            DeltaTable.create(
                _uri(place), schema, "ignore", partition_by=["date"], storage_options=options
            )
            table = DeltaTable(_uri(place), storage_options=options)
        write_deltalake(
            table,
            rows.to_arrow(),
            mode="overwrite",
            predicate=f"date = '{day}'",
            schema_mode="merge",
            partition_by=["date"],
            commit_properties=CommitProperties(custom_metadata={DAY: str(day), MADE: made}),
        )
        return DeltaTable(_uri(place), storage_options=options).version()
    except (DeltaError, OSError) as error:
        raise ProjectError(
            f"{place}: the ranking of {day} is not published (scoring.publish): {first_line(error)}"
        ) from error


def awaits_publishing(context: Context, day: date) -> bool:
    """Whether `scoring.publish` is set and its table lacks the published ranking of day D."""
    place = context.project.scoring.publish
    made = context.workspace.published_fingerprint("rankings", day)
    if place is None or made is None:
        return False
    table, _ = _table(place)
    commits = table.history() if table is not None else []  # the latest first
    last: dict[str, Any] = next((commit for commit in commits if commit.get(DAY) == str(day)), {})
    return last.get(MADE) != made


def _table(place: str) -> tuple[Any, dict[str, str] | None]:
    """The table, or None where there is none, and the options of its store."""
    needs_extra(f"scoring.publish = {place!r}", "deltalake")
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    options = store_options(place) if is_address(place) else None
    try:
        return DeltaTable(_uri(place), storage_options=options), options
    except TableNotFoundError:
        return None, options
    except (DeltaError, OSError) as error:
        raise ProjectError(
            f"{place}: the table cannot be read (scoring.publish): {first_line(error)}"
        ) from error


def _uri(place: str) -> str:
    return str(place_at(place)) if is_address(place) else str(Path(place).resolve())


def _signed(dtype: pl.DataType) -> pl.DataType:
    """The type in a Delta table, which has no unsigned numbers and no categories."""
    if dtype.is_unsigned_integer():
        return pl.Int64()
    return pl.String() if isinstance(dtype, pl.Categorical | pl.Enum) else dtype
