"""Examples that do not fit into memory: encoded once to Parquet files, and streamed from them.

A file consists of blocks of rows (its row groups). An epoch reads the blocks in random order, a few
at a time as a pool, and shuffles the rows of each pool. So the rows of a batch come from all over
the log, and memory depends on the size of the pool only. The next pool is read while one trains.
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


@dataclass(frozen=True, kw_only=True)
class ShardedExamples:
    """Encoded examples in Parquet files; iterates like `Examples`.

    Attributes:
        blocks: (number of the file, row group, rows) of each block.
        widths: number of columns of each tensor of `Examples`.
        positions: the highest position plus 1; 0 without positions.
        change: applied to a block's labels when it is read.
        thin: then applied to the block, with a seed from `seed` and the block's number.
        kept: number of rows after thinning; None without.
        tables: of the rows' vectors (`Examples.tables`), in memory.
    """

    files: list[Path]
    blocks: list[tuple[int, int, int]]
    widths: dict[str, int]
    positions: int
    change: Callable[[Tensor], Tensor] | None = None
    thin: Callable[..., Examples] | None = None
    seed: int = 0
    kept: int | None = None
    tables: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self.blocks) if self.kept is None else self.kept

    def with_labels(self, change: Callable[[Tensor], Tensor]) -> ShardedExamples:
        """The same rows with labels that are transformed when read."""
        return replace(self, change=change)

    def thinned(self, thin: Callable[..., Examples], seed: int) -> ShardedExamples:
        """The rows with each block thinned when read, always to the same rows.

        All blocks are read once, to count their rows.
        """
        thinned = replace(self, thin=thin, seed=seed)
        blocks = range(len(self.blocks))
        kept = sum(len(thinned._processed(block, _read(self, block))) for block in blocks)
        return replace(thinned, kept=kept)

    def sample(self, rows: int, inputs: bool = True) -> Examples:
        """About `rows` evenly spaced rows, of evenly spaced blocks; all if there are fewer.

        Args:
            inputs: if False, only labels, positions, weights and lists are read.
        """
        count = max(SAMPLED_BLOCKS, -(-rows // BLOCK_ROWS)) if inputs else len(self.blocks)
        every = max(1, len(self.blocks) // count)
        chosen = range(0, len(self.blocks), every)
        step = max(1, sum(self.blocks[b][2] for b in chosen) // max(rows, 1))
        blocks = (self._processed(b, _read(self, b, inputs)) for b in chosen)
        return joined([_every(rows, step) for rows in blocks])

    def _processed(self, block: int, rows: Examples) -> Examples:
        """The rows of a block with labels transformed, and thinned."""
        if self.change is not None:
            rows = rows.with_labels(self.change)
        if self.thin is not None:
            rows = self.thin(rows, seed=self.seed * 1_000_003 + block)
        return rows

    def batches(
        self, size: int, generator: torch.Generator, together: bool = False
    ) -> Iterator[Examples]:
        """Batches of `size` rows, each row once; only the last batch is smaller.

        Args:
            together: keep the rows of a list that are in the same pool together.
        """
        order = torch.randperm(len(self.blocks), generator=generator).tolist()
        pools = [order[at : at + POOL_BLOCKS] for at in range(0, len(order), POOL_BLOCKS)]
        remainder: list[Examples] = []  # rows that did not fill a batch
        with ThreadPoolExecutor(1) as reader:
            future = reader.submit(_read_all, self, pools[0]) if pools else None
            for number in range(len(pools)):
                assert future is not None
                # Not in the reader's thread: torch would start a team of OpenMP threads for it,
                # whose active waiting slows this thread's team to half.
                blocks = [
                    self._processed(block, rows)
                    for block, rows in zip(pools[number], future.result(), strict=True)
                ]
                pool = joined([*remainder, *blocks])
                last = number + 1 == len(pools)
                future = None if last else reader.submit(_read_all, self, pools[number + 1])
                rows = random_order(pool, generator, together)
                count = len(pool) if last else len(pool) - len(pool) % size
                yield from batches_of(pool, rows[:count], size)
                remainder = [take(pool, rows[count:])] if count < len(pool) else []
                del pool, blocks


def _read(examples: ShardedExamples, block: int, inputs: bool = True) -> Examples:
    """One stored block. The file is closed, since an open one keeps its data in memory."""
    number, group, rows = examples.blocks[block]
    names = [n for n in examples.widths if inputs or n in WITHOUT_INPUTS]
    with pq.ParquetFile(examples.files[number], pre_buffer=False) as file:
        table = file.read_row_group(group, columns=names, use_threads=False)
    tensors: dict[str, Tensor] = {}
    for name, width in examples.widths.items():
        stored = np.int32 if name in INDICES else np.float32
        matrix = np.zeros((rows, 0), stored)
        if name in names and width:
            # One binary value per row: decoding is a copy of the buffer.
            content = table.column(name).combine_chunks().buffers()[1]
            matrix = np.frombuffer(content, stored, rows * width).reshape(rows, width)
        tensor = torch.from_numpy(matrix.astype(np.int64 if name in INDICES else np.float32))
        tensors[name] = tensor.squeeze(1) if name in SINGLE else tensor
    return Examples(**tensors, tables=examples.tables)


def _read_all(examples: ShardedExamples, blocks: Sequence[int]) -> list[Examples]:
    return [_read(examples, block) for block in blocks]


INDICES = ("categorical", "bags", "position", "lists", "vectors")
SINGLE = ("position", "weight", "lists")
WITHOUT_INPUTS = ("labels", *SINGLE)


def write_shards(
    encoder: Encoder,
    sources: Sequence[Path],
    labels: Sequence[str],
    folder: Path,
    list_keys: Sequence[str] = (),
    change: Callable[[Examples, pl.DataFrame], Examples] | None = None,
) -> ShardedExamples:
    """Encode example partitions to files of `folder`, a bounded number of rows at a time.

    Args:
        sources: files of the partitions.
        labels: names of the label columns.
        list_keys: see `encode_examples`.
        change: applied to encoded rows before they are written, with the same rows, raw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    positions = 0
    files = []
    for number, content in enumerate(encoder.contents):
        np.save(folder / f"vectors_{number}.npy", encoder.tables[content.column].vectors)
    for number, source in enumerate(sources):
        scan = pl.scan_parquet(source, glob=False)
        rows = scan.select(pl.len()).collect().item()
        files.append(folder / f"{number:05d}.parquet")
        writer = None
        for start in range(0, rows, READ_ROWS):
            frame = scan.slice(start, READ_ROWS).collect()
            encoded = encode_examples(encoder, frame, labels, list_keys)
            if change is not None:
                encoded = change(encoded, frame)
            positions = max(positions, encoded.positions)
            table = _table(encoded)
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
    """The examples that `write_shards` has written."""
    files = sorted(folder.glob("*.parquet"))
    positions = int((folder / POSITIONS).read_text("utf-8"))
    blocks, widths = [], {}
    for number, file in enumerate(files):
        meta = pq.read_metadata(file)
        widths = json.loads(meta.metadata[META])
        blocks += [(number, g, meta.row_group(g).num_rows) for g in range(meta.num_row_groups)]
    blocks = [block for block in blocks if block[2]]
    tables = [np.load(folder / f"vectors_{n}.npy") for n in range(widths.get("vectors", 0))]
    return ShardedExamples(
        files=files,
        blocks=blocks,
        widths=widths,
        positions=positions,
        tables=tuple(torch.from_numpy(table) for table in tables),
    )


def _table(rows: Examples) -> pa.Table:
    """A binary column per tensor, with the bytes of each row's int32 or float32 numbers."""
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
