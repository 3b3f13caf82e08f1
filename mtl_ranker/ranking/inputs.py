"""The input columns of a saved ranker: types, which may be absent, and what a missing value means.

A caller's frame comes from pandas or JSON, where whole numbers with a missing value are floats,
dates are timestamps, and a column of missing values has no type. `prepared` casts it to the types
of the training examples, and raises where a value would change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from mtl_ranker.errors import ProjectError
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.features.tables import read_as, survives

UNKNOWN = "unknown, as a value that training has not seen"
EMPTY = "an empty list"
LEARNED = "missing, as in some rows of training"
NO_VECTOR = "no vector, in whose place training has learned one"
NOT_SEEN = "missing; training has seen no missing value, so predictions are less certain"
EVERYWHERE = "calibrated as all surfaces together"
KEY = "not allowed"


@dataclass(frozen=True)
class InputColumn:
    """An input column of a ranker.

    Attributes:
        required: it must be there; a column that is not required may be absent, which is the same
            as a missing value in each row.
        missing: what a missing value (null or NaN) in it means.
    """

    name: str
    dtype: pl.DataType
    required: bool
    missing: str

    @property
    def description(self) -> dict[str, str]:
        """For the model's metadata."""
        presence = "required" if self.required else "optional"
        return {"type": str(self.dtype), "presence": presence, "missing value": self.missing}


def feature_inputs(encoder: Encoder, by: str | None, types: pl.Schema) -> list[InputColumn]:
    """The columns that `RankerArtifact.predict` reads.

    Args:
        by: the surface of the calibration, or None.
        types: of the training examples; has every column of the encoder.
    """
    columns = {v.column: (True, UNKNOWN) for v in encoder.categoricals}
    columns |= {v.column: (False, EMPTY) for v in encoder.lists}
    for name, missing in zip(encoder.numerics, encoder.missing, strict=True):
        columns.setdefault(name, (False, LEARNED) if missing else (True, NOT_SEEN))
    columns |= {content.column: (False, NO_VECTOR) for content in encoder.contents}
    if by is not None:
        columns.setdefault(by, (False, EVERYWHERE))
    return [InputColumn(name, types[name], *columns[name]) for name in columns if name in types]


def frame_of(given: Any) -> pl.DataFrame:
    """A pandas frame as one of polars.

    Raises ProjectError that names the first column with values of several types.
    """
    try:
        return pl.from_pandas(given, nan_to_null=True)
    except (TypeError, ValueError):
        for name in given.columns:
            try:
                pl.from_pandas(given[[name]], nan_to_null=True)
            except (TypeError, ValueError) as error:
                kinds = sorted({type(value).__name__ for value in given[name]})
                raise ProjectError(
                    f"input: column {name!r} holds values of several types: {', '.join(kinds)}; "
                    "allowed: one type"
                ) from error
        raise


def prepared(frame: pl.DataFrame, columns: Sequence[InputColumn]) -> pl.DataFrame:
    """The columns of N rows in their types; NaN is null, and absent optional columns are null.

    Raises ProjectError that names each required column that is absent, and each column with values
    that its type cannot hold.
    """
    absent = [c.name for c in columns if c.required and c.name not in frame.columns]
    if absent:
        raise ProjectError(
            f"input: required columns are absent: {', '.join(absent)}; "
            f"it has: {', '.join(frame.columns)}"
        )
    return pl.DataFrame([_column(frame, column) for column in columns])


def _column(frame: pl.DataFrame, column: InputColumn) -> pl.Series:
    name, dtype = column.name, column.dtype
    if name not in frame.columns:
        return pl.Series(name, [None] * frame.height, dtype)
    series = frame[name]
    if series.dtype.is_float():
        series = series.fill_nan(None)
    if column.missing == KEY and series.null_count():
        raise ProjectError(f"input: column {name!r} has {series.null_count()} missing values")
    if series.dtype == dtype or dtype == pl.Null:
        return series
    try:
        cast = series.to_frame(name).select(read_as(name, series.dtype, dtype)).to_series()
    except pl.exceptions.InvalidOperationError as error:  # no cast between these types
        values = series.drop_nulls().head(3).to_list()
        raise ProjectError(
            f"input: column {name!r} is {series.dtype} and holds {values}; allowed: {dtype}"
        ) from error
    if dtype.is_float():
        kept = cast.is_not_null()
    else:
        kept = frame.select(survives(name, series.dtype, dtype)).to_series()
    lost = series.is_not_null() & ~kept
    if lost.any():
        values = series.filter(lost).head(3).to_list()
        raise ProjectError(
            f"input: column {name!r} is {series.dtype} and holds {values}; allowed: {dtype}"
        )
    return cast
