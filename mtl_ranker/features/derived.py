"""Features computed from a row's own columns: SQL expressions, and ages of dates.

The same text is read for impressions and for candidates. Each value depends on its own row alone,
so the order and number of the rows do not matter.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from datetime import date

import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.features.columns import (
    columns_of_derived,
    derived_features,
    generated_columns,
    table_sides,
)

TRIED = 3  # rows on which an expression is tried
CLOCK = re.compile(
    r"(?i)\b(?:current_(?:date|time|timestamp)|local(?:time|timestamp)|now\s*\(\s*\)|today\s*\(\s*\))"
)
GIVEN = " as given"  # suffix of a column that an expression reads as a number


def with_computed(
    project: Project, rows: pl.LazyFrame, day: date, only: Collection[str] | None = None
) -> pl.LazyFrame:
    """Rows with derived features (Float32), and with ages instead of dates among the numerics.

    A derived feature is null where its value is NaN or infinite, as after a division by 0. It reads
    numbers as Float64, of `features.numerics` those that the model reads (Float32), and dates as
    ages. An age is in days from the date, in the log's time zone, to `day`.

    Args:
        day: D, as of which rows are.
        only: the derived features; None for those of which the rows have every column.
    """
    schema, numerics = rows.collect_schema(), project.features.numerics
    derived, read = derived_features(project), columns_of_derived(project)
    if only is None:
        only = [name for name, columns in read.items() if set(columns) <= set(schema)]
    if only:
        used = dict.fromkeys(c for name in only for c in read[name])
        numbers = [c for c in used if _as_number(project, c, schema[c], day) is not None]
        rows = rows.with_columns(pl.col(c).alias(f"{c}{GIVEN}") for c in numbers)
        rows = (
            _as_read(project, rows, day, numbers)
            .with_columns(_finite(derived[name]).alias(name) for name in only)
            .with_columns(pl.col(f"{c}{GIVEN}").alias(c) for c in numbers)
            .drop(f"{c}{GIVEN}" for c in numbers)
        )
    dates = [c for c in numerics if _is_date(schema.get(c))]
    return rows.with_columns(_age(project, c, schema[c], day).cast(pl.Float32) for c in dates)


def _as_read(
    project: Project, rows: pl.LazyFrame, day: date, columns: Collection[str]
) -> pl.LazyFrame:
    """Rows with these columns as expressions read them, numbers and ages as Float64."""
    schema, numbers = rows.collect_schema(), {}
    for column in columns:
        number = _as_number(project, column, schema[column], day)
        if number is not None:
            narrow = number.cast(pl.Float32) if column in project.features.numerics else number
            numbers[column] = narrow.cast(pl.Float64)
    return rows.with_columns(number.alias(c) for c, number in numbers.items())


def check_derived(project: Project, schema: pl.Schema) -> None:
    """Raise ProjectError unless each derived feature can be computed for each row alone.

    Args:
        schema: of impressions or candidates, with the columns of the tables.
    """
    features, allowed = project.features, [*project.log.context, *table_sides(project)]
    derived = derived_features(project)
    without = project.model_copy(update={"features": features.model_copy(update={"derived": {}})})
    generated = generated_columns(without)
    for name, columns in columns_of_derived(project).items():
        place = f"features.derived.{name}"
        if not columns:
            raise ProjectError(
                f"{place}: {features.derived[name]!r} reads no column; allowed: {_listed(allowed)}"
            )
        if name in generated:
            raise ProjectError(
                f"{place}: is the name of a generated column (features.entities, windows and "
                "signals make them); allowed: any other name"
            )
        if clock := CLOCK.search(re.sub(r"'[^']*'", "", features.derived[name])):
            raise ProjectError(
                f"{place}: {features.derived[name]!r} reads the clock ({clock[0]}), so a feature "
                "would change with the time of the run; allowed: columns and constants"
            )
        for column in columns:
            if column not in allowed or column not in schema:
                near = difflib.get_close_matches(column, allowed, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ProjectError(
                    f"{place}: {column!r} is no column of log.context, log.users or "
                    f"log.items{hint}; allowed: {_listed(allowed)}"
                )
        tried = pl.DataFrame({c: _values(schema[c]).alias(c) for c in columns}).lazy()
        day = date(2026, 11, 26)
        try:
            with_computed(project, tried, day, [name]).select(name).collect()
            others = [
                part
                for part in _parts(derived[name])
                if part.meta.root_names() and not _of_one_row(project, tried, day, part)
            ]
        except pl.exceptions.PolarsError as error:
            types = ", ".join(f"{c} {schema[c]}" for c in columns)
            raise ProjectError(
                f"{place}: {features.derived[name]!r} cannot be computed with {types}: "
                f"{first_line(error)}; allowed: a number or a Boolean"
            ) from error
        if others:
            raise ProjectError(
                f"{place}: {features.derived[name]!r} depends on other rows; allowed: functions of "
                "one row, without aggregates and windows"
            )


def _parts(expression: pl.Expr) -> Iterator[pl.Expr]:
    """The expression and all that it is made of."""
    yield expression
    for part in expression.meta.pop():
        yield from _parts(part)


def _of_one_row(project: Project, rows: pl.LazyFrame, day: date, part: pl.Expr) -> bool:
    """Whether an expression gives several rows what it gives each of them alone.

    A part is tried by itself, as a condition may keep its value out of the whole.
    """
    read = _as_read(project, rows, day, part.meta.root_names())
    alone = pl.concat(read.slice(n, 1).select(part.alias("value")) for n in range(TRIED))
    return read.select(part.alias("value")).collect().equals(alone.collect())


def _finite(value: pl.Expr) -> pl.Expr:
    number = value.cast(pl.Float64).cast(pl.Float32)
    return pl.when(number.is_finite()).then(number)


def _is_date(dtype: pl.DataType | None) -> bool:
    return dtype == pl.Date or isinstance(dtype, pl.Datetime)


def _as_number(project: Project, column: str, dtype: pl.DataType, day: date) -> pl.Expr | None:
    """A number or the age of a date; None for all else, which expressions read as it is."""
    if _is_date(dtype):
        return _age(project, column, dtype, day)
    return pl.col(column) if dtype.is_numeric() else None


def _age(project: Project, column: str, dtype: pl.DataType, day: date) -> pl.Expr:
    """Days from a date to `day`."""
    value = pl.col(column)
    if isinstance(dtype, pl.Datetime):
        zoned = dtype.time_zone is not None
        local = value.dt.convert_time_zone(project.log.timezone) if zoned else value
        value = local.dt.date()  # a cast would give the date in UTC
    return (pl.lit(day) - value).dt.total_days().alias(column)


def _values(dtype: pl.DataType) -> pl.Series:
    """Some different values of a type, to try an expression on."""
    if isinstance(dtype, pl.List | pl.Array):
        inner = dtype.inner() if isinstance(dtype.inner, type) else dtype.inner
        return pl.Series([_values(inner).to_list()[: n + 1] for n in range(TRIED)]).cast(
            pl.List(inner)
        )
    if dtype == pl.String:
        return pl.Series(["a", "b", "c"])
    if dtype == pl.Boolean:
        return pl.Series([True, False, True])
    return pl.Series([2, 3, 5]).cast(dtype, strict=False)


def _listed(columns: Collection[str]) -> str:
    return ", ".join(dict.fromkeys(columns)) or "none"
