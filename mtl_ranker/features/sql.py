"""Render the SQL templates in `sql/` and run them with polars' SQLContext."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from functools import cache
from pathlib import Path

import jinja2
import polars as pl

PACKAGED_SQL = Path(__file__).resolve().parent.parent / "sql"

CHECKOUT_SQL = Path(__file__).resolve().parent.parent.parent / "sql"


@cache
def sql_text(name: str) -> str:
    """The text of `sql/<name>`, packaged or in a checkout."""
    folder = PACKAGED_SQL if PACKAGED_SQL.is_dir() else CHECKOUT_SQL
    return (folder / name).read_text("utf-8")


def run_sql(text: str, frames: Mapping[str, pl.LazyFrame], **variables: object) -> pl.LazyFrame:
    """Render a template of `sql/` with `variables` and run it over `frames`."""
    query = _template(text).render(**variables)
    return pl.SQLContext(frames=dict(frames)).execute(query, eager=False)


@cache
def _template(text: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text)


def day_number(day: date) -> int:
    """Days since 1970-01-01, the unit of every `day` column."""
    return (day - date(1970, 1, 1)).days


def date_of(number: int) -> date:
    """The day of a `day_number`."""
    return date(1970, 1, 1) + timedelta(days=number)
