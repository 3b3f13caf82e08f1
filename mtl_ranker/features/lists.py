"""The list of each impression: what was served, and is ranked and judged, together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl


def list_ids(frame: pl.DataFrame, keys: Sequence[str]) -> np.ndarray:
    """A number for each of N rows, equal for the rows of one list: [N], uint64.

    Hashes of 64 bits, the same in every frame of one process: two of a million lists have the same
    one with a probability of 3e-8.

    Args:
        keys: `Log.list_keys`. A row without a value of one of them is a list of its own.
    """
    incomplete = pl.any_horizontal(pl.col(key).is_null() for key in keys)
    alone = pl.when(incomplete).then(pl.int_range(pl.len()))
    return frame.select(*keys, alone.alias("alone")).hash_rows(seed=0).to_numpy()
