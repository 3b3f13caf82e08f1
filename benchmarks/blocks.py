"""Bytes that each worker reads when a large day's features are built in blocks of users.

Events and aggregates of the same simulated days are stored twice: in the order of time, and by
ascending user as large days are. Each block of the last day is built in a process of its own, whose
reads the kernel counts. Linux only.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.table import Table

from benchmarks import markdown, results, scale
from benchmarks.measured import CONSOLE, in_process
from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import aggregate_day, history_days
from mtl_ranker.features.columns import EVENT
from mtl_ranker.features.examples import (
    build_examples_part,
    examples_dataset,
    finish_examples,
    plan_examples,
)
from mtl_ranker.features.view import aggregate_dataset
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.workspace import Workspace

ORDERS = ("by time", "by user")


def opened(place: str, order: str, size: int) -> Context:
    """The feed with a workspace for each order, and blocks of `size` rows."""
    context = scale.opened(place)
    features = context.project.features.model_copy(update={"block_rows": size})
    project = context.project.model_copy(update={"features": features})
    return replace(context, project=project, workspace=Workspace(Path(place) / order))


def history(place: str, order: str, size: int) -> dict[str, Any]:
    """Ingest and aggregate all days. `size` is above their rows for the order of time."""
    context = opened(place, order, size)
    days, rows = context.source.days(), 0
    for day in days:
        rows += ingest_day(context, day).good
        aggregate_day(context, day)
    workspace, before = context.workspace, history_days(context, days[-1])
    found = {"rows": rows, "by_user": size_of(workspace.root / "events" / f"date={days[-1]}")}
    found["others"] = sum(size_of(file) for file in context.source.root.glob("*.parquet"))
    for keys in [[], *context.project.features.entities]:
        places = [workspace.place(aggregate_dataset(context, keys), day) for day in before]
        size = sum(size_of(workspace.root / place) for place in places)
        found["by_user" if "user_id" in keys else "others"] += size
    return found


def plan(place: str, order: str, size: int) -> dict[str, Any]:
    context, began = opened(place, order, size), read_bytes()
    planned = plan_examples(context, context.last_day())
    assert planned is not None
    return {"blocks": len(planned.parts), "read": read_bytes() - began}


def block(place: str, order: str, size: int, number: int) -> dict[str, Any]:
    """Build one block of the last day."""
    context = opened(place, order, size)
    day = context.last_day()
    planned = plan_examples(context, day)
    assert planned is not None
    began = read_bytes()
    build_examples_part(context, day, planned.parts[number])
    return {"read": read_bytes() - began, "rows": planned.parts[number].block.rows}


def publish(place: str, order: str, size: int) -> dict[str, Any]:
    context = opened(place, order, size)
    planned = plan_examples(context, context.last_day())
    assert planned is not None
    began = read_bytes()
    finish_examples(context, planned)
    keys = ["user_id", "timestamp", "item_id"]
    rows = context.workspace.scan(examples_dataset(context), [planned.day]).sort(keys)
    hashed = rows.drop(EVENT).collect().hash_rows().sum()
    return {"read": read_bytes() - began, "hash": hashed}


def read_bytes() -> int:
    """Bytes that this process has read so far, also those of the page cache."""
    return int(Path("/proc/self/io").read_text("ascii").split()[1])


def size_of(place: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--day-rows", type=int, default=2_000_000)
    options.add_argument("--days", type=int, default=8)
    options.add_argument("--blocks", type=int, default=8)
    chosen = results.parse(options)
    place = mkdtemp(prefix="blocks-")
    found: dict[str, Any] = {"day_rows": chosen.day_rows, "days": chosen.days}
    size = -(-chosen.day_rows // chosen.blocks)
    try:
        feed = {"impressions": chosen.day_rows * chosen.days, "days": chosen.days}
        in_process(scale.simulate, {"place": place} | feed)
        for order in ORDERS:
            common = {"place": place, "order": order, "size": size}
            own_size = size if order == "by user" else 10 * chosen.day_rows
            each: dict[str, Any] = {}
            each["history"] = in_process(history, common | {"size": own_size})
            each["plan"] = in_process(plan, common)
            numbers = range(each["plan"]["blocks"])
            each["blocks"] = [in_process(block, common | {"number": n}) for n in numbers]
            each["publish"] = in_process(publish, common)
            found[order] = each
    finally:
        shutil.rmtree(place)
    first, second = (found[order]["publish"]["hash"] for order in ORDERS)
    if first != second:
        raise SystemExit("the examples of the two orders differ")
    table = Table(title=f"{chosen.days} days of {chosen.day_rows:,} impressions")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in _rows(found):
        table.add_row(*row)
    CONSOLE.print(table)
    results.write(chosen, found)


HEADINGS = (
    "stored",
    "ingest and aggregates, s",
    "peak MB",
    "of users, MB",
    "others, MB",
    "blocks",
    "read by a block, MB",
    "of users, times read",
    "a block, s",
)


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for order in ORDERS:
        each = figures[order]
        made, blocks = each["history"], each["blocks"]
        read = [b["read"] for b in blocks]
        own = sum(read) - len(read) * made["others"]
        rows.append(
            [
                order,
                f"{made['seconds']:.1f}",
                f"{made['peak_mb']:,.0f}",
                f"{made['by_user'] / 1e6:,.1f}",
                f"{made['others'] / 1e6:,.1f}",
                str(len(blocks)),
                f"{min(read) / 1e6:,.1f} to {max(read) / 1e6:,.1f}",
                f"{own / made['by_user']:.2f}",
                f"{sum(b['seconds'] for b in blocks) / len(blocks):.2f}",
            ]
        )
    return rows


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    return {"blocks": markdown.table(HEADINGS, _rows(figures))}


def summary(figures: Mapping[str, Any]) -> str:
    times = {row[0]: row[7] for row in _rows(figures)}
    count = len(figures["by user"]["blocks"])
    return (
        f"{count} blocks of a day read what is of users {times['by user']} times, "
        f"{times['by time']} times where it is stored by time"
    )


if __name__ == "__main__":
    main()
