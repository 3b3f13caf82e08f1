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
from mtl_ranker.training.batches import (
    TENSORS,
    Examples,
    batches_of,
    encode_examples,
    joined,
    random_order,
    take,
)

BLOCK_ROWS = 32_768
POOL_BLOCKS = 8
READ_ROWS = 8 * BLOCK_ROWS
SAMPLED_BLOCKS = 16
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
        thin, seed: then makes a block smaller, by this seed and the block's number.
        kept: rows that are left of all blocks, where they are thinned.
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
        blocks = range(len(self.blocks))
        kept = sum(len(thinned._seen(block, _read(self, block))) for block in blocks)
        return replace(thinned, kept=kept)

    def sample(self, rows: int, inputs: bool = True) -> Examples:
        """About so many rows, evenly from blocks all over the log; all if there are no more.

        Without `inputs` only labels and weights are read.
        """
        wanted = max(SAMPLED_BLOCKS, -(-rows // BLOCK_ROWS)) if inputs else len(self.blocks)
        every = max(1, len(self.blocks) // wanted)
        chosen = range(0, len(self.blocks), every)
        step = max(1, sum(self.blocks[b][2] for b in chosen) // max(rows, 1))
        blocks = (self._seen(b, _read(self, b, inputs)) for b in chosen)
        return joined([_every(rows, step) for rows in blocks])

    def _seen(self, block: int, rows: Examples) -> Examples:
        """A block as it is read, thinned and its labels changed."""
        if self.change is not None:
            rows = rows.with_labels(self.change)
        if self.thin is not None:
            rows = self.thin(rows, seed=self.seed * 1_000_003 + block)
        return rows

    def batches(
        self, size: int, generator: torch.Generator, users: bool = False
    ) -> Iterator[Examples]:
        """Every row once, `size` at a time, only the last batch smaller; with `users`, those rows
        of a user together that meet in a pool.
        """
        order = torch.randperm(len(self.blocks), generator=generator).tolist()
        pools = [order[at : at + POOL_BLOCKS] for at in range(0, len(order), POOL_BLOCKS)]
        left: list[Examples] = []
        with ThreadPoolExecutor(1) as reader:
            read = reader.submit(_read_all, self, pools[0]) if pools else None
            for number in range(len(pools)):
                assert read is not None
                # Only here, not in the reader: torch would give its thread a team of threads, which
                # wait actively for work that never comes and slow this thread's team to half.
                seen = [
                    self._seen(*each) for each in zip(pools[number], read.result(), strict=True)
                ]
                pool = joined([*left, *seen])
                last = number + 1 == len(pools)
                read = None if last else reader.submit(_read_all, self, pools[number + 1])
                rows = random_order(pool, generator, users)
                whole = len(pool) if last else len(pool) - len(pool) % size
                yield from batches_of(pool, rows[:whole], size)
                left = [take(pool, rows[whole:])] if whole < len(pool) else []
                del pool


def _read(examples: ShardedExamples, block: int, inputs: bool = True) -> Examples:
    """One block as it is stored. Its file is closed again: an open one keeps what it has read."""
    number, group, rows = examples.blocks[block]
    names = [n for n in examples.widths if inputs or n in KNOWN]
    with pq.ParquetFile(examples.files[number], pre_buffer=False) as file:
        table = file.read_row_group(group, columns=names, use_threads=False)
    found: dict[str, Tensor] = {}
    for name, width in examples.widths.items():
        stored = np.int32 if name in INDICES else np.float32
        matrix = np.zeros((rows, 0), stored)
        if name in names and width:
            # Bytes of whole rows: decoding them is a copy.
            content = table.column(name).combine_chunks().buffers()[1]
            matrix = np.frombuffer(content, stored, rows * width).reshape(rows, width)
        tensor = torch.from_numpy(matrix.astype(np.int64 if name in INDICES else np.float32))
        found[name] = tensor.squeeze(1) if name in SINGLE else tensor
    return Examples(**found)


def _read_all(examples: ShardedExamples, blocks: Sequence[int]) -> list[Examples]:
    return [_read(examples, block) for block in blocks]


INDICES = ("categorical", "bags", "position", "user")
SINGLE = ("position", "weight", "user")
KNOWN = ("labels", *SINGLE)


def write_shards(
    encoder: Encoder,
    sources: Sequence[Path],
    labels: list[str],
    folder: Path,
) -> ShardedExamples:
    """Encode example partitions file by file, a bounded number of rows at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    positions = 0
    files = []
    for number, source in enumerate(sources):
        scan = pl.scan_parquet(source)
        rows = scan.select(pl.len()).collect().item()
        files.append(folder / f"{number:05d}.parquet")
        writer = None
        for start in range(0, rows, READ_ROWS):
            frame = scan.slice(start, READ_ROWS).collect()
            piece = encode_examples(encoder, frame, labels)
            positions = max(positions, piece.positions)
            table = _table(piece)
            if writer is None:
                writer = pq.ParquetWriter(files[-1], table.schema, compression="lz4")
            writer.write_table(table, row_group_size=BLOCK_ROWS)
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
    """One column a tensor: the bytes of each row's int32 or float32 numbers."""
    arrays: dict[str, Any] = {}
    widths = {}
    for name in TENSORS:
        tensor = getattr(rows, name)
        if tensor is None:
            continue
        matrix = tensor.numpy() if tensor.dim() == 2 else tensor.unsqueeze(1).numpy()
        widths[name] = matrix.shape[1]
        if not widths[name]:
            continue
        stored = np.ascontiguousarray(matrix, np.int32 if name in INDICES else np.float32)
        kind = pa.binary(4 * widths[name])
        arrays[name] = pa.Array.from_buffers(kind, len(rows), [None, pa.py_buffer(stored)])
    table = pa.table(arrays)
    return table.replace_schema_metadata({META: json.dumps(widths).encode()})


def _every(rows: Examples, step: int) -> Examples:
    return rows if step == 1 else take(rows, torch.arange(0, len(rows), step))
