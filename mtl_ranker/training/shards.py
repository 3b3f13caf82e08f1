"""Examples that do not fit into memory: encoded once into Parquet, streamed from there.

A file holds blocks of rows (its row groups). An epoch visits the blocks in random order, keeps a
pool of a few in memory, and shuffles the rows of each pool: rows that meet in a batch come from
anywhere in the log, and memory depends on the pool. The next pool is read while this one trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mtl_ranker.features.encoders import Encoder
from mtl_ranker.training.batches import Examples, encode_examples, part_of, take

BLOCK_ROWS = 32_768
POOL_BLOCKS = 8
READ_ROWS = 8 * BLOCK_ROWS
META = b"mtl_ranker.encoded"
POSITIONS = "positions"


@dataclass(frozen=True)
class ShardedExamples:
    """Encoded examples in Parquet files; iterates like `Examples`.

    Attributes:
        files: in a fixed order.
        blocks: (file, row group, rows) of each block.
        widths: how many columns there are of each tensor.
        positions: one more than the highest position, 0 without.
        change: applied to a block's labels when it is read.
    """

    files: list[Path]
    blocks: list[tuple[int, int, int]]
    widths: dict[str, int]
    positions: int
    change: Callable[[Tensor], Tensor] | None = None
    thin: Callable[..., Examples] | None = None
    seed: int = 0
    kept: int | None = None

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self.blocks) if self.kept is None else self.kept

    def with_labels(self, change: Callable[[Tensor], Tensor]) -> ShardedExamples:
        """The same rows, their labels changed as they are read."""
        return replace(self, change=change)

    def thinned(self, thin: Callable[..., Examples], seed: int) -> ShardedExamples:
        """Each block thinned when it is read, always the same rows of it; read once to count."""
        thinned = replace(self, thin=thin, seed=seed)
        with _Files(thinned) as files:
            kept = sum(len(files.read(block)) for block in range(len(self.blocks)))
        return replace(thinned, kept=kept)

    def sample(self, rows: int) -> Examples:
        """About so many rows, evenly from all blocks; all of them if there are no more."""
        step = max(1, len(self) // max(rows, 1))
        with _Files(self) as files:
            return joined([_every(files.read(b), step) for b in range(len(self.blocks))])

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Examples]:
        """Every row once, `size` at a time, only the last batch smaller."""
        order = torch.randperm(len(self.blocks), generator=generator).tolist()
        pools = [order[at : at + POOL_BLOCKS] for at in range(0, len(order), POOL_BLOCKS)]
        left: list[Examples] = []
        with _Files(self) as files, ThreadPoolExecutor(1) as reader:
            read = reader.submit(files.pool, pools[0]) if pools else None
            for number in range(len(pools)):
                assert read is not None
                pool = joined([*left, *read.result()])
                if number + 1 < len(pools):
                    read = reader.submit(files.pool, pools[number + 1])
                mixed = take(pool, torch.randperm(len(pool), generator=generator))
                whole = len(mixed) - len(mixed) % size if number + 1 < len(pools) else len(mixed)
                for start in range(0, whole, size):
                    yield part_of(mixed, slice(start, min(start + size, whole)))
                left = [take(mixed, torch.arange(whole, len(mixed)))] if whole < len(mixed) else []


class _Files:
    """Open files of an iteration; read from one thread at a time."""

    def __init__(self, examples: ShardedExamples) -> None:
        self.examples = examples
        self.open: dict[int, pq.ParquetFile] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.open.values():
            file.close()

    def pool(self, blocks: Sequence[int]) -> list[Examples]:
        return [self.read(block) for block in blocks]

    def read(self, block: int) -> Examples:
        number, group, rows = self.examples.blocks[block]
        if number not in self.open:
            self.open[number] = pq.ParquetFile(self.examples.files[number], memory_map=False)
        table = self.open[number].read_row_group(group, use_threads=False)
        columns = iter(table.columns)
        found: dict[str, Tensor] = {}
        for name, width in self.examples.widths.items():
            dtype = np.int64 if name in INDICES else np.float32
            matrix = np.empty((rows, width), dtype)
            for column in range(width):
                matrix[:, column] = next(columns).to_numpy()
            found[name] = torch.from_numpy(matrix)
        for name in ("position", "weight"):
            if name in found:
                found[name] = found[name].squeeze(1)
        if self.examples.change is not None:
            found["labels"] = self.examples.change(found["labels"])
        rows_read = Examples(**found)
        if self.examples.thin is not None:
            return self.examples.thin(rows_read, seed=self.examples.seed * 1_000_003 + block)
        return rows_read


INDICES = ("categorical", "bags", "position")


def write_shards(
    encoder: Encoder,
    sources: Sequence[Path],
    labels: list[str],
    folder: Path,
    on_rows: Callable[[int], None] | None = None,
) -> ShardedExamples:
    """Encode example partitions file by file, a bounded number of rows at a time.

    Args:
        on_rows: told how many rows are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, positions = 0, 0
    files = []
    for number, source in enumerate(sources):
        scan = pl.scan_parquet(source)
        rows = scan.select(pl.len()).collect().item()
        files.append(folder / f"{number:05d}.parquet")
        writer = None
        for start in range(0, rows, READ_ROWS):
            frame = scan.slice(start, READ_ROWS).collect()
            piece = encode_examples(encoder, frame, labels)
            if piece.position is not None and len(piece):
                positions = max(positions, int(piece.position.max()) + 1)
            table = _table(piece)
            if writer is None:
                writer = pq.ParquetWriter(files[-1], table.schema, compression="lz4")
            writer.write_table(table, row_group_size=BLOCK_ROWS)
            done += frame.height
            if on_rows is not None:
                on_rows(done)
        if writer is None:
            files.pop()
        else:
            writer.close()
    (folder / POSITIONS).write_text(str(positions), "utf-8")
    return open_shards(folder)


def open_shards(folder: Path) -> ShardedExamples:
    """What `write_shards` wrote."""
    files = sorted(folder.glob("*.parquet"))
    positions = int((folder / POSITIONS).read_text("utf-8"))
    blocks, widths = [], {}
    for number, file in enumerate(files):
        meta = pq.read_metadata(file)
        widths = json.loads(meta.metadata[META])
        blocks += [(number, g, meta.row_group(g).num_rows) for g in range(meta.num_row_groups)]
    return ShardedExamples(files, [b for b in blocks if b[2]], widths, positions)


def _table(rows: Examples) -> pa.Table:
    arrays: dict[str, Any] = {}
    widths = {}
    for name in ("categorical", "bags", "numeric", "labels", "position", "weight"):
        tensor = getattr(rows, name)
        if tensor is None:
            continue
        matrix = tensor.numpy() if tensor.dim() == 2 else tensor.unsqueeze(1).numpy()
        widths[name] = matrix.shape[1]
        narrow = matrix.astype(np.int32) if name in INDICES else matrix
        for column in range(matrix.shape[1]):
            arrays[f"{name}_{column}"] = np.ascontiguousarray(narrow[:, column])
    table = pa.table(arrays)
    return table.replace_schema_metadata({META: json.dumps(widths).encode()})


def joined(parts: Sequence[Examples]) -> Examples:
    """Some examples after each other."""

    def cat(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("categorical", "bags", "numeric", "labels", "position", "weight")
    return Examples(**{name: cat(name) for name in names})  # type: ignore[arg-type]


def _every(rows: Examples, step: int) -> Examples:
    return rows if step == 1 else take(rows, torch.arange(0, len(rows), step))
