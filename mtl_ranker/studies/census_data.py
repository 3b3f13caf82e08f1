"""UCI's Census-Income files."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import IO, cast

import polars as pl

from mtl_ranker.config import Log
from mtl_ranker.context import Place
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.sources import ParquetSource
from mtl_ranker.workspace import FileSize, Workspace, file_content

# fmt: off
CENSUS_COLUMNS = [
    "age", "class_of_worker", "industry_code", "occupation_code",
    "education", "wage_per_hour", "enrolled", "marital_status",
    "major_industry", "major_occupation", "race", "hispanic_origin",
    "sex", "union_member", "unemployment_reason", "employment_stat",
    "capital_gains", "capital_losses", "dividends", "tax_filer",
    "previous_region", "previous_state", "household_stat", "household_summary",
    "instance_weight", "migration_msa", "migration_region", "migration_within",
    "lived_here", "migration_sunbelt", "employer_persons", "parents_present",
    "father_birth", "mother_birth", "own_birth", "citizenship",
    "own_business", "veteran_questionnaire", "veteran_benefits", "weeks_worked",
    "year", "income",
]

# fmt: on
CENSUS_NUMBERS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "dividends",
    "instance_weight",
    "employer_persons",
    "weeks_worked",
)

CENSUS_EPOCH = date(1970, 1, 1)


def find_files(data: Path) -> tuple[Path, Path | None]:
    """UCI's `census-income.data` and, if there, `census-income.test`, plain or gzip.

    Raises ProjectError when the first is missing.
    """

    def one(name: str) -> Path | None:
        found = [data / name, data / f"{name}.gz"]
        return next((path for path in found if path.is_file()), None)

    train = one("census-income.data")
    if train is None:
        raise ProjectError(f"--data {data}: neither census-income.data nor census-income.data.gz")
    return train, one("census-income.test")


def open_census(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, "rt", encoding="utf-8", errors="replace"))
    return open(path, encoding="utf-8", errors="replace")


def read_census(path: Path) -> pl.DataFrame:
    """UCI's `census-income.data` or `.test`, plain or gzip, in 42 named columns plus the two tasks.

    Raises ProjectError naming the line that does not have 42 fields or no known label.
    """
    rows = list(_census_rows(path))
    frame = pl.DataFrame(rows, schema=dict.fromkeys(CENSUS_COLUMNS, pl.String), orient="row")
    numbers = [pl.col(c).cast(pl.Float64, strict=False) for c in CENSUS_NUMBERS]
    frame = frame.with_columns(numbers)
    return frame.with_columns(
        (pl.col("income") == "50000+").cast(pl.Int8).alias("income_50k"),
        (pl.col("marital_status") == "Never married").cast(pl.Int8).alias("never_married"),
    )


def _census_rows(path: Path) -> Iterator[list[str]]:
    labels = ("- 50000", "50000+")
    try:
        with open_census(path) as file:
            for number, fields in enumerate(csv.reader(file, skipinitialspace=True), 1):
                if not fields:
                    continue
                if len(fields) != len(CENSUS_COLUMNS):
                    raise ProjectError(
                        f"{path}: line {number} has {len(fields)} comma-separated fields; "
                        f"UCI's Census-Income format has {len(CENSUS_COLUMNS)}"
                    )
                fields = [field.strip() for field in fields]
                fields[-1] = fields[-1].removesuffix(".").strip()
                if fields[-1] not in labels:
                    raise ProjectError(
                        f"{path}: line {number} ends in {fields[-1]!r}; allowed: {labels}"
                    )
                yield fields
    except (OSError, EOFError) as error:
        raise ProjectError(f"{path}: cannot be read: {error}") from error


@dataclass(frozen=True)
class CensusSource(ParquetSource):
    """Census-Income as a log of three pseudo-days, for `[log] format = "census-income"`."""

    def path(self) -> Path:
        """The log's file. Raises ProjectError where there is none, and for one in a store."""
        found = super().path()
        if not isinstance(found, Path):
            raise ProjectError(f"{found}: format = 'census-income' reads local files only")
        return found

    def days(self) -> list[date]:
        return [CENSUS_EPOCH + timedelta(days=n) for n in range(3)]

    def sizes(self, day: date) -> list[FileSize]:
        return [FileSize.of(self.path())]

    def state(self, day: date) -> list[str]:
        return [file_content(self.path(), self.workspace)]

    def scan_day(self, day: date, used: Collection[str] | None = None) -> pl.LazyFrame:
        rows = scan_census(self.path()).filter(pl.col("date") == day)
        have = rows.collect_schema().names()
        for column in self.log.context:
            if column not in have:
                raise ProjectError(
                    f"{self.path()}: column {column!r} (named by log.context) is missing; "
                    f"it has: {', '.join(have)}"
                )
        return rows

    def columns(self, day: date) -> list[str]:
        return CENSUS_COLUMNS


def open_source(log: Log, data: Place, workspace: Workspace | None = None) -> CensusSource:
    """The reader of `format = "census-income"` (`logs/sources.py`)."""
    return CensusSource(log, data, workspace)


def scan_census(path: Path) -> pl.LazyFrame:
    """The rows as events: each its own user, dealt to three pseudo-days by a fixed hash."""
    frame = read_census(path).drop("marital_status", "income", "instance_weight")
    row = pl.int_range(pl.len(), dtype=pl.Int64)
    # Knuth's multiplicative hash; independent of the polars version, unlike Expr.hash.
    share = (row * 2654435761) % 2**32 / 2**32
    fold = pl.when(share < 0.70).then(0).when(share < 0.85).then(1).otherwise(2)
    return (
        frame.lazy()
        .with_columns(row.alias("user_id"), pl.lit(0).alias("item_id"), fold.alias("fold"))
        .with_columns((pl.lit(CENSUS_EPOCH) + pl.duration(days="fold")).alias("date"))
        .with_columns(pl.col("date").cast(pl.Datetime("us", "UTC")).alias("timestamp"))
        .drop("fold")
    )
