"""Examples as tensors, and shuffled mini-batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mtl_ranker.features.columns import SAMPLE_WEIGHT
from mtl_ranker.features.encoders import Encoded, Encoder

GATHERED_BATCHES = 32


@dataclass(frozen=True)
class Examples:
    """N rows: categorical [N, C], bags [N, slots], numeric [N, F], labels [N, T]; NaN = missing.

    Optionally the position [N] (whole, -1 = unknown), the sample weight [N], and the user [N], a
    number that tells a row's user from others.
    """

    categorical: Tensor
    bags: Tensor
    numeric: Tensor
    labels: Tensor
    position: Tensor | None = None
    weight: Tensor | None = None
    user: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.categorical, self.bags, self.numeric

    @property
    def positions(self) -> int:
        """One more than the highest position, 0 without."""
        if self.position is None or not len(self):
            return 0
        return int(self.position.max()) + 1

    def with_labels(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """The same rows with changed labels."""
        return replace(self, labels=change(self.labels))

    def thinned(self, thin: Callable[[Examples, int], Examples], seed: int) -> Examples:
        """`thin_negatives` with its settings filled in, by a seed."""
        return thin(self, seed=seed)  # type: ignore[call-arg]

    def sample(self, rows: int, inputs: bool = True) -> Examples:
        """At most so many rows, evenly from all (with their inputs, which are here anyway)."""
        step = -(-len(self) // max(rows, 1))
        return self if step <= 1 else take(self, torch.arange(0, len(self), step))

    def batches(
        self, size: int, generator: torch.Generator, users: bool = False
    ) -> Iterator[Examples]:
        """Every row once, in random order, or users in random order with their rows together;
        `size` at a time (the last batch may be smaller).
        """
        return batches_of(self, random_order(self, generator, users), size)


TENSORS = [field.name for field in fields(Examples)]


def encode_examples(encoder: Encoder, frame: pl.DataFrame, labels: list[str]) -> Examples:
    """Rows and their label columns as tensors; a null label becomes NaN."""
    inputs = encoded_tensors(encoder.transform(frame))
    position = weight = None
    if "position" in frame.columns:
        whole = frame["position"].cast(pl.Int64, strict=False).fill_null(-1).clip(lower_bound=-1)
        position = torch.from_numpy(whole.to_numpy().copy())
    if SAMPLE_WEIGHT in frame.columns:
        known = frame[SAMPLE_WEIGHT].cast(pl.Float32).fill_null(1.0)
        weight = torch.from_numpy(known.to_numpy().copy())
    user = None
    if "user_id" in frame.columns:
        number = frame["user_id"].hash(0).to_numpy() >> np.uint64(33)
        user = torch.from_numpy(number.astype(np.int64))
    labelled = torch.from_numpy(label_matrix(frame, labels))
    return Examples(*inputs, labelled, position, weight, user)


def label_matrix(frame: pl.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Label columns as numbers [N, T]; a null label becomes NaN."""
    wide = frame.select(pl.col(c).cast(pl.Float32).fill_null(np.nan) for c in columns)
    return wide.to_numpy(writable=True)


def encoded_tensors(encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.from_numpy(encoded.categorical),
        torch.from_numpy(encoded.bags),
        torch.from_numpy(encoded.numeric),
    )


def take(examples: Examples, rows: Tensor) -> Examples:
    """Some rows, in the order given: rows [M] whole numbers."""
    return _each(examples, lambda tensor: tensor.index_select(0, rows))


def part_of(examples: Examples, rows: slice) -> Examples:
    """Some rows in a row, without a copy."""
    return _each(examples, lambda tensor: tensor[rows])


def joined(parts: Sequence[Examples]) -> Examples:
    """Some examples after each other."""
    made: dict[str, Any] = {}
    for name in TENSORS:
        tensors = [getattr(part, name) for part in parts]
        made[name] = None if tensors[0] is None else torch.cat(tensors)
    return Examples(**made)


def _each(examples: Examples, change: Callable[[Tensor], Tensor]) -> Examples:
    made: dict[str, Any] = {}
    for name in TENSORS:
        tensor = getattr(examples, name)
        made[name] = None if tensor is None else change(tensor)
    return Examples(**made)


def random_order(examples: Examples, generator: torch.Generator, users: bool = False) -> Tensor:
    """A permutation of the rows [N]; with `users` one of the users, each with its own rows."""
    if not users or examples.user is None:
        return torch.randperm(len(examples), generator=generator)
    known, user = torch.unique(examples.user, return_inverse=True)
    place = torch.randperm(len(known), generator=generator)
    return place[user].argsort(stable=True)


def batches_of(examples: Examples, order: Tensor, size: int) -> Iterator[Examples]:
    """Rows in this order, `size` at a time.

    They are gathered for several batches at once, which are then slices without a copy.
    """
    for rows in order.split(size * GATHERED_BATCHES):
        gathered = take(examples, rows)
        for start in range(0, len(rows), size):
            yield part_of(gathered, slice(start, start + size))


def thin_negatives(examples: Examples, binary: list[int], keep: float, seed: int) -> Examples:
    """Keep every row with a positive binary label, and a share `keep` of the others.

    A kept negative weighs 1 / keep, so that losses, and with them calibration, stay what they are
    on all rows in expectation; no correction of predictions is needed for any objective.
    """
    labels = examples.labels[:, binary]
    positive = (torch.nan_to_num(labels) > 0.5).any(1)
    chance = torch.rand(len(examples), generator=torch.Generator().manual_seed(seed))
    rows = (positive | (chance < keep)).nonzero().squeeze(1)
    weight = examples.weight if examples.weight is not None else torch.ones(len(examples))
    weight = torch.where(positive, weight, weight / keep)
    return take(replace(examples, weight=weight), rows)
