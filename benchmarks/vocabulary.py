"""Training with large vocabularies: the dense optimiser against the one of a batch's rows alone.

Random ids in one field of so many values beside the columns of a small row: what is measured is the
cost of a step, not what it learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
import torch
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE, in_process
from mtl_ranker.config import Categorical, Features, Training
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.presets import make
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import Design, Execution, Rows, train_ranker

WIDTH = 16
NEVER = 1 << 62


def train(values: int, rows: int, batch: int, sparse: bool) -> dict[str, Any]:
    """One epoch of the MMoE that the preset `mmoe` is without further settings."""
    torch.manual_seed(0)
    ids = torch.randint(0, values, (rows,)).numpy()
    numbers = torch.randn(rows, 8).numpy()
    label = (torch.rand(rows) < 0.3).float().numpy()
    columns = {"id": ids, "label_a": label, "label_b": label[::-1].copy()}
    columns |= {f"n{i}": numbers[:, i] for i in range(8)}
    frame = pl.DataFrame(columns)
    names = [f"n{i}" for i in range(8)]
    features = Features(categoricals=[Categorical(column="id", hash_buckets=values)])
    encoder = Encoder.fit(features, names, frame)
    examples = encode_examples(encoder, frame, ["label_a", "label_b"])
    tasks = [Task("a", "binary"), Task("b", "binary")]
    spec = make("mmoe", {"preset": "mmoe", "embedding_dim": WIDTH}, len(tasks))
    settings = Training(batch_size=batch, epochs=1, sparse_rows=1 if sparse else NEVER)
    trained = train_ranker(
        Design(spec, encoder, tasks), Rows(examples), settings, 0, Execution(until=[1, 1])
    )
    return {"rows": rows, "train_seconds": trained.epochs[0].seconds}


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument(
        "--values", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000]
    )
    options.add_argument("--rows", type=int, default=200_000)
    options.add_argument("--batch", type=int, default=2048)
    chosen = results.parse(options)
    table = Table(title=f"{chosen.rows:,} rows, batches of {chosen.batch:,}, width {WIDTH}")
    for heading in ("values", "dense rows/s", "peak MB", "sparse rows/s", "peak MB", "sparse is"):
        table.add_column(heading, justify="right")
    found: dict[str, Any] = {}
    for values in chosen.values:
        each = {}
        for name, sparse in (("dense", False), ("sparse", True)):
            settings = {"values": values, "rows": chosen.rows, "batch": chosen.batch}
            each[name] = in_process(train, settings | {"sparse": sparse})
            each[name]["rate"] = chosen.rows / each[name]["train_seconds"]
        ratio = each["sparse"]["rate"] / each["dense"]["rate"]
        found[str(values)] = each | {"ratio": ratio}
        cells = [f"{v:,.0f}" for e in each.values() for v in (e["rate"], e["peak_mb"])]
        table.add_row(f"{values:,}", *cells, f"{ratio:.2f}x")
    CONSOLE.print(table)
    results.write(chosen, found)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [
            f"{int(values):,}",
            *(f"{each[k]['rate']:,.0f} ({each[k]['peak_mb']:,.0f})" for k in ("dense", "sparse")),
            f"{markdown.times(each['ratio'])} times",
        ]
        for values, each in figures.items()
    ]
    headings = (
        "values",
        "dense optimiser, rows/s (peak MB)",
        "a batch's rows alone, rows/s (peak MB)",
        "",
    )
    return {"vocabulary": markdown.table(headings, rows)}


def summary(figures: Mapping[str, Any]) -> str:
    ratios = [f"{each['ratio']:.2f} with {int(v):,}" for v, each in figures.items()]
    return f"sparse over dense rate: {', '.join(ratios)} values"


if __name__ == "__main__":
    main()
