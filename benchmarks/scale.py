"""Every stage of a night on simulated logs of chosen size, with the peak of its memory.

Ingest and aggregates of all days; features, encoding and training of the split's days; the suite;
scoring from a candidate file to the ranked file. Each stage runs in a fresh process. Beside them
what the machine can do at all: copying memory, multiplying matrices, writing to the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE, in_process
from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import LABEL, entity_name, feature_columns
from mtl_ranker.features.days import split_days
from mtl_ranker.features.encoders import fit_encoder
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.tables import tables_as_of
from mtl_ranker.logs.contract import derived_columns
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.simulate import Feed
from mtl_ranker.logs.simulate import simulate as write_feed
from mtl_ranker.logs.sources import open_context
from mtl_ranker.models.presets import make
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import Design, Rows, train_ranker
from mtl_ranker.training.network import tasks_of
from mtl_ranker.workspace import Workspace

# The MMoE of benchmarks/training_speed.py.
SMALL = {"preset": "mmoe", "experts": 8, "expert_hidden": [16], "tower_hidden": [8]}
TRAIN_ROWS = 2_000_000  # at most, of what is timed


def opened(place: str) -> Context:
    """The simulated log and the workspace of a benchmark in the folder `place`."""
    return open_context("simulated", Path(place) / "feed", Path(place) / "work")


def simulate(place: str, impressions: int, days: int) -> dict[str, Any]:
    scale = max(1.0, impressions / 150_000)
    feed = Feed(impressions, days, users=round(4_000 * scale**0.7), items=round(3_000 * scale**0.5))
    write_feed(feed, Path(place) / "feed")
    return {"rows": impressions, "users": feed.users, "items": feed.items}


def ingest(place: str) -> dict[str, Any]:
    context = opened(place)
    rows = [ingest_day(context, day).good for day in context.source.days()]
    return {"rows": sum(rows)} | sizes(
        context.source.root / "log", context.workspace.root / "events"
    )


def aggregates(place: str) -> dict[str, Any]:
    context = opened(place)
    for day in context.source.days():
        aggregate_day(context, day)
    root = context.workspace.root
    return {"rows": rows_of(context.workspace)} | sizes(root / "events", root / "aggregates")


def by_hand(place: str) -> dict[str, Any]:
    """The same aggregates without this project: one streaming polars query a table."""
    context = opened(place)
    project, workspace = context.project, context.workspace
    target = Path(place) / "by-hand"
    tables = tables_as_of(context.source, context.last_day())
    signals = derived_columns(project)
    for day in context.source.days():
        events = workspace.scan("events", [day])
        for key, table in tables.items():
            events = events.join(table, on=key, how="left", suffix="_table")
        for keys in [[], *project.features.entities]:
            sums = [
                expression
                for name, signal in signals.items()
                for expression in (
                    signal.count().alias(f"{name}_count"),
                    signal.sum().alias(f"{name}_sum"),
                )
            ]
            sums.append(pl.len().alias("impressions"))
            daily = events.group_by(keys).agg(sums) if keys else events.select(sums)
            path = target / (entity_name(keys) or "all") / f"{day}.parquet"
            daily.sink_parquet(path, mkdir=True, engine="streaming")
    return {"rows": rows_of(workspace)}


def features(place: str) -> dict[str, Any]:
    context = opened(place)
    project, workspace = context.project, context.workspace
    days = split_days(project, workspace.days("events"), workspace.days("events")[-1]).all
    for day in days:
        build_examples(context, day)
    rows = workspace.scan("examples", days).select(pl.len()).collect().item()
    return {"rows": rows, "columns": len(feature_columns(project))} | sizes(
        workspace.root / "events", workspace.root / "examples", share=len(days)
    )


def some_rows(workspace: Workspace) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Training rows, TRAIN_ROWS at most, and rows of the last day."""
    days = workspace.days("examples")
    frame = workspace.scan("examples", days[:-1]).head(TRAIN_ROWS).collect(engine="streaming")
    return frame, workspace.scan("examples", days[-1:]).head(50_000).collect()


def encoding(place: str) -> dict[str, Any]:
    context = opened(place)
    project = context.project
    frame, _ = some_rows(context.workspace)
    began = time.perf_counter()
    encoder = fit_encoder(project, frame)
    fitted = time.perf_counter() - began
    encode_examples(encoder, frame, [LABEL + task.name for task in tasks_of(project)])
    spent = time.perf_counter() - began
    return {"rows": frame.height, "seconds": spent, "fit_seconds": fitted}


def training(place: str) -> dict[str, Any]:
    """One epoch of the small MMoE; saves it for the scoring stage."""
    context = opened(place)
    project = context.project
    frame, held_out = some_rows(context.workspace)
    tasks = tasks_of(project)
    labels = [LABEL + task.name for task in tasks]
    encoder = fit_encoder(project, frame)
    rows, validate = (encode_examples(encoder, f, labels) for f in (frame, held_out))
    settings = project.training.model_copy(update={"epochs": 1, "batch_size": 1024})
    spec = make("mmoe", SMALL, len(tasks))
    run = train_ranker(Design(spec, encoder, tasks), Rows(rows, validate), settings, 0)
    artifact = RankerArtifact(project, encoder, tasks, run.model)
    artifact.save(Path(place) / "model")
    inputs = run.model.embedding.outputs
    # A multiplication and an addition for every weight and row, forward, and twice that backward.
    flops = 6.0 * sum(p.numel() for n, p in run.model.named_parameters() if "table" not in n)
    return {"rows": frame.height, "seconds": run.seconds, "inputs": inputs, "flops": flops}


def candidates(place: str, count: int, per_user: int) -> dict[str, Any]:
    """A candidate file of `count` pairs: users of the log, each with items in random order."""
    context = opened(place)
    root = context.source.root
    day = context.workspace.days("events")[-1] + timedelta(days=1)
    users = pl.scan_parquet(root / "users.parquet").select("user").collect()["user"]
    items = pl.scan_parquet(root / "items.parquet").select("item").collect()["item"]
    rng = np.random.default_rng(0)
    target = Path(place) / "feed" / "candidates" / f"date={day}"
    target.mkdir(parents=True, exist_ok=True)
    some = min(per_user, len(items))
    chosen = rng.choice(len(users), -(-count // some))
    made = 0
    for number, start in enumerate(range(0, len(chosen), 20_000)):
        block = chosen[start : start + 20_000]
        first = rng.integers(0, len(items), len(block))
        item = (first[:, None] + np.arange(some) * 7) % len(items)
        frame = pl.DataFrame(
            {
                "user": users.gather(block.repeat(some)),
                "item": items.gather(item.ravel()),
                "surface": ["home"] * item.size,
            }
        )
        frame.write_parquet(target / f"part-{number}.parquet")
        made += frame.height
    return {"rows": made, "day": str(day)}


def scoring(place: str, day: str) -> dict[str, Any]:
    context = opened(place)
    context = replace(context, project=with_candidates(context.project))
    ranker = RegisteredRanker(RankerArtifact.load(Path(place) / "model"), "benchmark")
    began, cpu = time.perf_counter(), time.process_time()
    ranked = score_day(context, ranker, date.fromisoformat(day))
    spent, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"rows": ranked.candidates, "ranked": ranked.rows, "seconds": spent, "cpu_seconds": cpu}


def with_candidates(project: Project) -> Project:
    """The project that ranks the candidate files which `candidates` writes."""
    scored = project.scoring.model_copy(update={"candidates": "candidates"})
    return project.model_copy(update={"scoring": scored})


def limits(place: str) -> dict[str, Any]:
    """At best: GB/s of copying, GFLOP/s of float32 products, MB/s to disk."""
    block = np.ones(1 << 27, np.float32)
    target = np.empty_like(block)
    copies, products, writes = [], [], []
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    content = os.urandom(1 << 28)
    for _ in range(4):
        began = time.perf_counter()
        np.copyto(target, block)
        copies.append(2 * block.nbytes / (time.perf_counter() - began) / 1e9)
        began = time.perf_counter()
        torch.mm(a, b)
        products.append(2 * 2048**3 / (time.perf_counter() - began) / 1e9)
        began = time.perf_counter()
        with open(Path(place) / "block", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        writes.append(len(content) / (time.perf_counter() - began) / 1e6)
    (Path(place) / "block").unlink()
    return {
        "copy_gb_per_second": max(copies),
        "gflops": max(products),
        "disk_mb_per_second": max(writes),
        "threads": torch.get_num_threads(),
    }


def sizes(given: Path, made: Path, share: int | None = None) -> dict[str, float]:
    """Megabytes of Parquet read and written; of the last `share` days of what is given."""

    def megabytes(folder: Path, last: int | None = None) -> float:
        days = sorted({f.parent.name for f in folder.rglob("*.parquet")})[-last if last else 0 :]
        files = [f for f in folder.rglob("*.parquet") if f.parent.name in days]
        return sum(f.stat().st_size for f in files) / 1e6

    return {"mb_read": megabytes(given, share), "mb_written": megabytes(made)}


def rows_of(workspace: Workspace) -> int:
    days = workspace.days("events")
    return workspace.scan("events", days).select(pl.len()).collect().item()


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, nargs="+", default=[1_000_000])
    options.add_argument("--days", type=int, default=28)
    options.add_argument("--candidates", type=int, default=4_000_000)
    options.add_argument("--per-user", type=int, default=500, help="candidates of each user")
    chosen = results.parse(options)
    figures = {str(size): measure(size, chosen) for size in chosen.impressions}
    results.write(chosen, figures)


def measure(impressions: int, chosen: argparse.Namespace) -> dict[str, Any]:
    place = Path(mkdtemp(prefix="scale-"))
    given: dict[str, Any] = {"place": str(place)}
    found: dict[str, Any] = {}

    def run(stage: Callable[..., dict[str, Any]], **more: Any) -> None:
        CONSOLE.print(f"[dim]{impressions:,} impressions: {stage.__name__} …[/]")
        found[stage.__name__] = in_process(stage, given | more)

    try:
        run(limits)
        run(simulate, impressions=impressions, days=chosen.days)
        for stage in (ingest, aggregates, by_hand, features, encoding, training):
            run(stage)
        run(candidates, count=chosen.candidates, per_user=chosen.per_user)
        run(scoring, day=found["candidates"]["day"])
    finally:
        shutil.rmtree(place)
    show(impressions, chosen.days, found)
    return found


def show(impressions: int, days: int, found: dict[str, Any]) -> None:
    top = found["limits"]
    table = Table(title=f"{impressions:,} impressions in {days} days")
    for heading in ("stage", "rows", "seconds", "rows/s", "peak MB", "of which before", "limit"):
        table.add_column(heading, justify="left" if heading in ("stage", "limit") else "right")
    for stage, values in found.items():
        if stage == "limits":
            continue
        rate = values["rows"] / values["seconds"]
        table.add_row(
            stage,
            f"{values['rows']:,}",
            f"{values['seconds']:,.2f}",
            f"{rate:,.0f}",
            f"{values['peak_mb']:,.0f}",
            f"{values['before_mb']:,.0f}",
            limit_text(stage, values, rate, top),
        )
    CONSOLE.print(table)
    ratio = found["aggregates"]["seconds"] / found["by_hand"]["seconds"]
    CONSOLE.print(f"aggregates take {ratio:.2f} times a hand-written polars streaming query")
    CONSOLE.print(
        f"{top['threads']} threads; memory {top['copy_gb_per_second']:.1f} GB/s, products "
        f"{top['gflops']:.0f} GFLOP/s, disk {top['disk_mb_per_second']:.0f} MB/s"
    )


def limit_text(stage: str, values: dict[str, Any], rate: float, top: dict[str, Any]) -> str:
    if "flops" in values:
        share = values["flops"] * rate / 1e9 / top["gflops"]
        return f"arithmetic: {share:.0%} of {top['gflops']:.0f} GFLOP/s"
    if "mb_written" in values:
        return f"disk: {moved(values):.0f} MB/s, {moved(values) / top['disk_mb_per_second']:.0%}"
    return ""


def moved(values: Mapping[str, Any]) -> float:
    """Megabytes a second that a stage read and wrote."""
    return (values["mb_read"] + values["mb_written"]) / values["seconds"]


SHOWN = {
    "simulate": "simulate",
    "ingest": "ingest",
    "aggregates": "aggregates",
    "by_hand": "the same by hand in polars",
    "features": "features",
    "encoding": "encoding",
    "training": "training, one epoch",
    "scoring": "scoring, candidates",
}


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Rates of all stages by size of the log; what the machine can do; how much of that is used."""
    sizes = [f"{int(size) / 1e6:g} million" for size in figures]
    rows = [
        [
            title,
            *(
                f"{f[stage]['rows'] / f[stage]['seconds']:,.0f} ({f[stage]['peak_mb']:,.0f})"
                for f in figures.values()
            ),
        ]
        for stage, title in SHOWN.items()
    ]
    tops = [f["limits"] for f in figures.values()]
    gflops = markdown.span([top["gflops"] for top in tops])
    machine = (
        f"The machine copies memory at {max(top['copy_gb_per_second'] for top in tops):.0f} GB/s, "
        f"multiplies float32 matrices at {gflops} GFLOP/s and writes "
        f"{max(top['disk_mb_per_second'] for top in tops):,.0f} MB/s to disk."
    )

    def disk(*stages: str) -> str:
        rates = [moved(f[stage]) for stage in stages for f in figures.values()]
        shares = [
            100 * moved(f[stage]) / f["limits"]["disk_mb_per_second"]
            for stage in stages
            for f in figures.values()
        ]
        return f"{markdown.span(rates)} MB/s, {markdown.span(shares)} % of the disk's"

    used = [
        100
        * f["training"]["flops"]
        * f["training"]["rows"]
        / (f["training"]["seconds"] * 1e9 * f["limits"]["gflops"])
        for f in figures.values()
    ]
    limited = [
        ["ingest, aggregates", disk("ingest", "aggregates")],
        ["features", disk("features")],
        ["training", f"{markdown.span(used)} % of {gflops} GFLOP/s"],
    ]
    return {
        "scale": markdown.table(["stage, rows/s (peak MB)", *sizes], rows),
        "scale machine": machine,
        "scale limits": markdown.table(["stage", "used"], limited),
    }


def summary(figures: Mapping[str, Any]) -> str:
    size, found = list(figures.items())[-1]
    stages = ("ingest", "aggregates", "features", "training", "scoring")
    rates = [f"{s} {found[s]['rows'] / found[s]['seconds'] / 1e6:.2f}" for s in stages]
    return f"{int(size) / 1e6:g} million impressions, million rows/s: {', '.join(rates)}"


if __name__ == "__main__":
    main()
