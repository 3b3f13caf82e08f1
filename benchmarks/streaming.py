"""Training on rows that do not fit into memory against training in memory, same model and rows.

A simulated log becomes examples, which are encoded again and again until there are `--rows` of
them on disk. The streaming process may not have more than `--limit-mb` of data: the operating
system enforces it (RLIMIT_DATA), and refuses to let the same process read all rows at once.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE, in_process
from benchmarks.scale import SMALL, aggregates, features, ingest, opened, simulate
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.encoders import Encoder, fit_encoder
from mtl_ranker.models.presets import make
from mtl_ranker.training.batches import Examples, encode_examples
from mtl_ranker.training.loop import Design, Rows, train_ranker
from mtl_ranker.training.network import tasks_of
from mtl_ranker.training.shards import ShardedExamples, open_shards, write_shards

IMPRESSIONS, DAYS = 1_500_000, 14
# Arrow's own allocator reserves a gigabyte of addresses at its first use, whatever it needs.
PLAIN = {"ARROW_DEFAULT_MEMORY_POOL": "system"}


def encode(place: str, rows: int) -> dict[str, Any]:
    """Files of encoded examples, repeated until there are so many."""
    simulate(place, IMPRESSIONS, DAYS)
    for stage in (ingest, aggregates, features):
        stage(place)
    context = opened(place)
    project, workspace = context.project, context.workspace
    days = workspace.days("examples")
    frame = workspace.scan("examples", days).collect(engine="streaming")
    encoder = fit_encoder(project, frame)
    encoder.save(Path(place) / "encoder.json")
    files = [workspace.path("examples", day) for day in days]
    times = -(-rows // frame.height)
    began = time.perf_counter()
    labels = [LABEL + task.name for task in tasks_of(project)]
    found = write_shards(encoder, files * times, labels, Path(place) / "encoded")
    size = sum(f.stat().st_size for f in found.files) / 1e6
    return {"rows": len(found), "seconds": time.perf_counter() - began, "mb": size}


def trained(place: str, rows: Examples | ShardedExamples) -> dict[str, Any]:
    context = opened(place)
    project, workspace = context.project, context.workspace
    tasks = tasks_of(project)
    encoder = Encoder.load(Path(place) / "encoder.json")
    held_out = workspace.scan("examples", workspace.days("examples")[-1:]).head(20_000).collect()
    validate = encode_examples(encoder, held_out, [LABEL + task.name for task in tasks])
    settings = project.training.model_copy(update={"epochs": 1, "batch_size": 1024})
    run = train_ranker(
        Design(make("mmoe", SMALL, len(tasks)), encoder, tasks), Rows(rows, validate), settings, 0
    )
    return {"rows": len(rows), "seconds": run.seconds, "monitored": run.epochs[-1].monitored}


def in_memory(place: str, rows: int) -> dict[str, Any]:
    found = open_shards(Path(place) / "encoded")
    some = found.blocks[: max(1, rows * len(found.blocks) // len(found))]
    part = ShardedExamples(
        files=found.files, blocks=some, widths=found.widths, positions=found.positions
    )
    return trained(place, part.sample(len(part)))


def limited(limit_mb: int) -> None:
    """From here on the operating system gives this process no more than so much data."""
    limit = limit_mb << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def streaming(place: str, limit_mb: int) -> dict[str, Any]:
    limited(limit_mb)
    return trained(place, open_shards(Path(place) / "encoded"))


def whole(place: str, limit_mb: int) -> dict[str, Any]:
    """What the limit does to a process that reads all rows at once."""
    limited(limit_mb)
    found = open_shards(Path(place) / "encoded")
    try:
        rows = len(found.sample(len(found)))
    except (MemoryError, RuntimeError) as error:
        return {"rows": 0, "refused": str(error).splitlines()[0][:100] or type(error).__name__}
    return {"rows": rows, "refused": ""}


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--rows", type=int, default=5_000_000)
    options.add_argument("--memory-rows", type=int, default=2_000_000, help="of the comparison")
    options.add_argument("--limit-mb", type=int, default=2_048)
    chosen = results.parse(options)
    place = Path(mkdtemp(prefix="streaming-"))
    found: dict[str, Any] = {"limit_mb": chosen.limit_mb}
    limit = {"limit_mb": chosen.limit_mb}
    stages = (
        (encode, {"rows": chosen.rows}),
        (in_memory, {"rows": chosen.memory_rows}),
        (streaming, limit),
        (whole, limit),
    )
    try:
        for stage, more in stages:
            CONSOLE.print(f"[dim]{stage.__name__} …[/]")
            found[stage.__name__] = in_process(stage, {"place": str(place)} | more, PLAIN)
    finally:
        shutil.rmtree(place)
    table = Table(title=f"training, {torch.get_num_threads()} threads, batch 1024")
    for heading in ("stage", "rows", "seconds", "rows/s", "peak MB"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name in ("encode", "in_memory", "streaming"):
        values = found[name]
        rate = values["rows"] / values["seconds"]
        found[name]["rows_per_second"] = rate
        cells = f"{values['rows']:,}", f"{values['seconds']:,.1f}", f"{rate:,.0f}"
        table.add_row(name, *cells, f"{values['peak_mb']:,.0f}")
    CONSOLE.print(table)
    ratio = found["streaming"]["rows_per_second"] / found["in_memory"]["rows_per_second"]
    found["streaming_over_memory"] = ratio
    CONSOLE.print(
        f"streaming under a limit of {chosen.limit_mb:,} MB runs at {ratio:.0%} of the rate in "
        f"memory; {found['encode']['mb']:,.0f} MB on disk"
    )
    refused = found["whole"]["refused"]
    CONSOLE.print(f"all rows at once under that limit: {refused or 'they fit'}")
    results.write(chosen, found)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    limit = f"{figures['limit_mb']:,} MB of data (RLIMIT_DATA)"
    names = {
        "encode": "encoding into Parquet",
        "in_memory": "training in memory",
        "streaming": f"training from files, at most {limit}",
    }
    rows = [
        [title, *(f"{figures[name][k]:,.0f}" for k in ("rows", "rows_per_second", "peak_mb"))]
        for name, title in names.items()
    ]
    refused = figures["whole"]["refused"]
    rows.append(
        ["reading all rows at once under that limit", "", f"`{refused}`" * bool(refused), ""]
    )
    return {"streaming": markdown.table(["", "rows", "rows/s", "peak MB"], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    found, ratio = figures["streaming"], figures["streaming_over_memory"]
    return (
        f"{found['rows'] / 1e6:.1f} million rows with {found['peak_mb']:,.0f} MB, at {ratio:.0%} "
        "of the rate in memory"
    )


if __name__ == "__main__":
    main()
