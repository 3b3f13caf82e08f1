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
from mtl_ranker.features.lists import list_ids

GATHERED_BATCHES = 32


@dataclass(frozen=True)
class Examples:
    """N encoded rows as tensors.

    Attributes:
        categorical: [N, C], indices; 0 = unknown.
        bags: [N, slots of all lists], indices; 0 = empty.
        numeric: [N, F], NaN = missing.
        labels: [N, T], NaN = missing.
        position: [N] integers, -1 = unknown.
        weight: [N], sample weights.
        lists: [N] integers, equal for rows of the same list.
        vectors: [N, E], rows in the tables of E columns of vectors; 0 = missing.
        tables: of each of these columns, [V + 1, D] with NaN in row 0; those of all rows, of which
            a part of the rows has the same ones.
    """

    categorical: Tensor
    bags: Tensor
    numeric: Tensor
    labels: Tensor
    position: Tensor | None = None
    weight: Tensor | None = None
    lists: Tensor | None = None
    vectors: Tensor | None = None
    tables: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of a network, with the vectors beside the numerics: a copy for each row."""
        if self.vectors is None:
            return self.categorical, self.bags, self.numeric
        rows = self.vectors.unbind(1)
        looked_up = [t.index_select(0, r) for t, r in zip(self.tables, rows, strict=True)]
        return self.categorical, self.bags, torch.cat([self.numeric, *looked_up], 1)

    @property
    def positions(self) -> int:
        """The highest position plus 1; 0 without positions."""
        if self.position is None or not len(self):
            return 0
        return int(self.position.max()) + 1

    @property
    def tensors(self) -> list[Tensor]:
        """Those that the rows have, without `tables`."""
        found = [getattr(self, name) for name in TENSORS]
        return [tensor for tensor in found if tensor is not None]

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.tensors, *self.tables))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """The rows with a function applied to every tensor but `tables`."""
        return _map(self, change)

    def to(self, device: torch.device, non_blocking: bool = False) -> Examples:
        """The rows on a device; see `torch.Tensor.to`."""
        tables = tuple(table.to(device) for table in self.tables)
        moved = _map(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, tables=tables)

    def pinned(self) -> Examples:
        """The rows in pinned memory, from which copies to a CUDA device are asynchronous."""
        return _map(self, lambda tensor: tensor.pin_memory())

    def with_labels(self, change: Callable[[Tensor], Tensor]) -> Examples:
        """The same rows with transformed labels."""
        return replace(self, labels=change(self.labels))

    def thinned(self, thin: Callable[[Examples, int], Examples], seed: int) -> Examples:
        """Apply `thin`, which is `thin_negatives` with its other settings, with a seed."""
        return thin(self, seed=seed)  # type: ignore[call-arg]

    def sample(self, rows: int, inputs: bool = True) -> Examples:
        """At most `rows` evenly spaced rows; `inputs` is for the interface of ShardedExamples."""
        step = -(-len(self) // max(rows, 1))
        return (
            self if step <= 1 else take(self, torch.arange(0, len(self), step, device=self.device))
        )

    def batches(
        self, size: int, generator: torch.Generator, together: bool = False
    ) -> Iterator[Examples]:
        """Batches of `size` rows, in random order; the last one may be smaller.

        Args:
            together: keep the rows of each list together, with lists in random order.
        """
        return batches_of(self, random_order(self, generator, together), size)


TENSORS = [field.name for field in fields(Examples) if field.name != "tables"]  # of N rows each


def encode_examples(
    encoder: Encoder, frame: pl.DataFrame, labels: Sequence[str], list_keys: Sequence[str] = ()
) -> Examples:
    """Rows and their label columns as tensors; a null label becomes NaN.

    Args:
        list_keys: `Log.list_keys`; without, the rows have no lists.
    """
    rows = encoded_rows(encoder.transform(frame))
    position = weight = None
    if "position" in frame.columns:
        integers = frame["position"].cast(pl.Int64, strict=False).fill_null(-1)
        position = torch.from_numpy(integers.clip(lower_bound=-1).to_numpy().copy())
    if SAMPLE_WEIGHT in frame.columns:
        filled = frame[SAMPLE_WEIGHT].cast(pl.Float32).fill_null(1.0)
        weight = torch.from_numpy(filled.to_numpy().copy())
    lists = None
    if list_keys:
        # 31 bits, as shards store int32: lists of one batch have the same number by chance only.
        hashes = list_ids(frame, list_keys) >> np.uint64(33)
        lists = torch.from_numpy(hashes.astype(np.int64))
    matrix = torch.from_numpy(label_matrix(frame, labels))
    return replace(rows, labels=matrix, position=position, weight=weight, lists=lists)


def encoded_rows(encoded: Encoded) -> Examples:
    """Encoded rows without labels."""
    rows = Examples(
        torch.from_numpy(encoded.categorical),
        torch.from_numpy(encoded.bags),
        torch.from_numpy(encoded.numeric),
        labels=torch.zeros(len(encoded.categorical), 0),
    )
    if not encoded.tables:
        return rows
    tables = tuple(torch.from_numpy(table) for table in encoded.tables)
    return replace(rows, vectors=torch.from_numpy(encoded.vectors), tables=tables)


def label_matrix(frame: pl.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Label columns as float32 [N, T]; a null label becomes NaN."""
    wide = frame.select(pl.col(c).cast(pl.Float32).fill_null(np.nan) for c in columns)
    return wide.to_numpy(writable=True)


def encoded_tensors(encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of a network (`Examples.inputs`)."""
    return encoded_rows(encoded).inputs


def take(examples: Examples, rows: Tensor) -> Examples:
    """Rows by index [M], in the given order."""
    return _map(examples, lambda tensor: tensor.index_select(0, rows))


def part_of(examples: Examples, rows: slice) -> Examples:
    """Consecutive rows, without a copy."""
    return _map(examples, lambda tensor: tensor[rows])


def joined(parts: Sequence[Examples]) -> Examples:
    """Examples of the same tables, concatenated in order."""
    tensors: dict[str, Any] = {}
    for name in TENSORS:
        of_parts = [getattr(part, name) for part in parts]
        tensors[name] = None if of_parts[0] is None else torch.cat(of_parts)
    return Examples(**tensors, tables=parts[0].tables)


def _map(examples: Examples, change: Callable[[Tensor], Tensor]) -> Examples:
    """Apply a function to every tensor but `tables`."""
    tensors: dict[str, Any] = {}
    for name in TENSORS:
        tensor = getattr(examples, name)
        tensors[name] = None if tensor is None else change(tensor)
    return Examples(**tensors, tables=examples.tables)


def random_order(examples: Examples, generator: torch.Generator, together: bool = False) -> Tensor:
    """A random permutation of the rows [N]; with `together`, of the lists, each in one piece."""
    if not together or examples.lists is None:
        return torch.randperm(len(examples), generator=generator, device=generator.device)
    present, number = torch.unique(examples.lists, return_inverse=True)
    rank = torch.randperm(len(present), generator=generator, device=generator.device)
    return rank[number].argsort(stable=True)


def batches_of(examples: Examples, order: Tensor, size: int) -> Iterator[Examples]:
    """Batches of `size` rows in this order [N].

    Rows are gathered for several batches at once, which are then slices without a copy.
    """
    for rows in order.split(size * GATHERED_BATCHES):
        gathered = take(examples, rows)
        for start in range(0, len(rows), size):
            yield part_of(gathered, slice(start, start + size))


def without_ids(examples: Examples, rate: float, seed: int | None) -> Examples:
    """The rows with a random share `rate` of their categorical values replaced by 0, unknown.

    The embedding of the unknown value, which unseen ids get, is so trained on the rows of all ids,
    and that of a missing vector on the rows of all vectors.

    Args:
        seed: of the choice; None to draw from the global generator of the rows' device.
    """
    if rate == 0:
        return examples
    device = examples.categorical.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    changed = {}
    for name in ("categorical", "vectors"):
        index = getattr(examples, name)
        if index is not None and index.shape[1]:
            dropped = torch.rand(index.shape, generator=generator, device=device) < rate
            changed[name] = index.masked_fill(dropped, 0)
    return replace(examples, **changed)


def thin_negatives(examples: Examples, binary: list[int], keep: float, seed: int) -> Examples:
    """Keep every row with a positive binary label, and a random share `keep` of the others.

    A kept negative has weight 1 / keep, so that the expected losses, and so the calibration, are
    those of all rows; predictions need no correction.

    Args:
        binary: numbers of the binary objectives.
    """
    labels = examples.labels[:, binary]
    positive = (torch.nan_to_num(labels) > 0.5).any(1)
    uniform = torch.rand(len(examples), generator=torch.Generator().manual_seed(seed))
    rows = (positive | (uniform < keep)).nonzero().squeeze(1)
    weight = examples.weight if examples.weight is not None else torch.ones(len(examples))
    weight = torch.where(positive, weight, weight / keep)
    return take(replace(examples, weight=weight), rows)
