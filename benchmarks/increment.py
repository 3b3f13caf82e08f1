"""What one more night costs with 7, 28 and 84 days of history: ingest, aggregates and features.

The same feed, day sizes and windows. A rebuild of all days (ingest and aggregates) beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE, in_process
from benchmarks.scale import opened, simulate
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day


def rebuild(place: str, history: int) -> dict[str, Any]:
    """Ingest and aggregate the `history` days before the last."""
    context = opened(place)
    shutil.rmtree(context.workspace.root, ignore_errors=True)
    rows = 0
    for day in context.source.days()[-history - 1 : -1]:
        rows += ingest_day(context, day).good
        aggregate_day(context, day)
    return {"rows": rows}


def night(place: str) -> dict[str, Any]:
    """The last day on top of it."""
    context = opened(place)
    day = context.last_day()
    for dataset in context.workspace.root.rglob(f"date={day}"):
        shutil.rmtree(dataset)
    rows = ingest_day(context, day).good
    aggregate_day(context, day)
    build_examples(context, day)
    return {"rows": rows}


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--day-rows", type=int, default=200_000)
    options.add_argument("--history", type=int, nargs="+", default=[7, 28, 84])
    options.add_argument("--repeats", type=int, default=5, help="the fastest night counts")
    chosen = results.parse(options)
    place = Path(mkdtemp(prefix="increment-"))
    found: dict[str, Any] = {}
    days = max(chosen.history) + 1
    try:
        simulate(str(place), chosen.day_rows * days, days)
        for history in chosen.history:
            built = in_process(rebuild, {"place": str(place), "history": history})
            nights = [in_process(night, {"place": str(place)}) for _ in range(chosen.repeats)]
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
    results.write(chosen, found)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    least = min(each["night"]["seconds"] for each in figures.values())
    rows = [
        [
            history,
            f"{each['rebuild']['seconds']:.2f}",
            f"{each['rebuild']['seconds'] / int(history):.3f}",
            f"{each['night']['seconds']:.3f}",
            f"{each['night']['seconds'] / least - 1:+.0%}",
        ]
        for history, each in figures.items()
    ]
    headings = ("days before", "rebuild of them, s", "s a day", "next night, s", "over the least")
    return {"increment": markdown.table(headings, rows)}


def summary(figures: Mapping[str, Any]) -> str:
    nights = [f"{each['night']['seconds']:.2f} s after {n}" for n, each in figures.items()]
    return f"a night takes {', '.join(nights)} days"


if __name__ == "__main__":
    main()
