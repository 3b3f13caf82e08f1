"""What one more night costs with 7, 28 and 84 days of history: ingest, aggregates and features.

The same feed, day sizes and windows. A rebuild of all days (ingest and aggregates) beside it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from measured import CONSOLE, in_process, stage_of
from rich.table import Table
from scale import opened, simulate

from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.workspace import write_json


def rebuild(place: str, history: int) -> dict[str, Any]:
    """Ingest and aggregate the `history` days before the last."""
    project, source, workspace = opened(place)
    shutil.rmtree(workspace.root, ignore_errors=True)
    rows = 0
    for day in source.days()[-history - 1 : -1]:
        rows += ingest_day(Context(project, source, workspace), day).good
        aggregate_day(Context(project, source, workspace), day)
    return {"rows": rows}


def night(place: str) -> dict[str, Any]:
    """The last day on top of it."""
    project, source, workspace = opened(place)
    day = source.days()[-1]
    for dataset in workspace.root.rglob(f"date={day}"):
        shutil.rmtree(dataset)
    rows = ingest_day(Context(project, source, workspace), day).good
    aggregate_day(Context(project, source, workspace), day)
    build_examples(Context(project, source, workspace), day)
    return {"rows": rows}


STAGES = {f.__name__: f for f in (rebuild, night)}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--day-rows", type=int, default=200_000)
    options.add_argument("--history", type=int, nargs="+", default=[7, 28, 84])
    options.add_argument("--repeats", type=int, default=5, help="the fastest night counts")
    options.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = options.parse_args()
    place = Path(mkdtemp(prefix="increment-"))
    found: dict[str, Any] = {}
    days = max(chosen.history) + 1
    try:
        simulate(str(place), chosen.day_rows * days, days)
        for history in chosen.history:
            built = in_process(__file__, "rebuild", {"place": str(place), "history": history})
            nights = [
                in_process(__file__, "night", {"place": str(place)}) for _ in range(chosen.repeats)
            ]
            best = min(nights, key=lambda each: each["seconds"])
            found[str(history)] = {"rebuild": built, "night": best}
    finally:
        shutil.rmtree(place)
    table = Table(title=f"about {chosen.day_rows:,} impressions a day")
    for heading in ("days before", "rebuild s", "s a day", "night s", "over the least", "peak MB"):
        table.add_column(heading, justify="right")
    least = min(each["night"]["seconds"] for each in found.values())
    for history, each in found.items():
        spent, again = each["night"]["seconds"], each["rebuild"]["seconds"]
        table.add_row(
            history,
            f"{again:.2f}",
            f"{again / int(history):.3f}",
            f"{spent:.3f}",
            f"{spent / least - 1:+.0%}",
            f"{each['night']['peak_mb']:,.0f}",
        )
    CONSOLE.print(table)
    write_json(chosen.json, found)


if __name__ == "__main__":
    if not stage_of(STAGES):
        main()
