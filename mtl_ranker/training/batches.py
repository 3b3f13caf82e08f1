"""Examples as tensors, and shuffled mini-batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mtl_ranker.features.encoders import Encoded, Encoder


@dataclass(frozen=True)
class Examples:
    """N rows: categorical [N, C], bags [N, slots], numeric [N, F], labels [N, T]; NaN = missing."""

    categorical: Tensor
    bags: Tensor
    numeric: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.categorical, self.bags, self.numeric


def encode_examples(encoder: Encoder, frame: pl.DataFrame, labels: list[str]) -> Examples:
    """Rows and their label columns as tensors; a null label becomes NaN."""
    wide = frame.select(pl.col(c).cast(pl.Float32).fill_null(np.nan) for c in labels).to_numpy()
    inputs = encoded_tensors(encoder.transform(frame))
    return Examples(*inputs, torch.from_numpy(np.ascontiguousarray(wide)))


def encoded_tensors(encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.from_numpy(encoded.categorical),
        torch.from_numpy(encoded.bags),
        torch.from_numpy(encoded.numeric),
    )


def shuffled_batches(
    examples: Examples, size: int, generator: torch.Generator
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Every row once, in random order, `size` at a time (the last batch may be smaller)."""
    order = torch.randperm(len(examples), generator=generator)
    for rows in order.split(size):
        inputs = tuple(tensor.index_select(0, rows) for tensor in examples.inputs)
        yield (inputs[0], inputs[1], inputs[2]), examples.labels.index_select(0, rows)
