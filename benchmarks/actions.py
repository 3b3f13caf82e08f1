"""Joining impressions with actions of three days, beside a hand-written polars join of both.

Both find the nearest earlier impression of an action's user and item within three days, and give
each impression the number of its actions. The pipeline reads published events one day at a time;
the hand-written join reads all files at once. Both write a column for each impression.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
import tomli_w
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE, in_process
from mtl_ranker.context import Context
from mtl_ranker.logs.actions import EVENT, join_actions, with_actions
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context

FIRST = date(2026, 3, 2)
DAYS = 3
DAY_MS = 86_400_000
WINDOW = "3d"
PROJECT = {
    "log": {
        "path": "impressions",
        "context": ["tab"],
        "actions": [{"name": "like", "path": "likes", "window": WINDOW, "reduce": "sum"}],
    },
    "objectives": [{"name": "liked", "group": "satisfaction", "label": '"like" > 0'}],
}


def simulate(place: str, impressions: int, actions: int) -> dict[str, Any]:
    """Write both streams: most actions follow an impression, by up to two days."""
    rng = np.random.default_rng(0)
    root, start = Path(place), (FIRST - date(1970, 1, 1)).days * DAY_MS
    users, items = max(10, impressions // 50), max(10, impressions // 400)
    shown = pl.DataFrame(
        {
            "user_id": rng.integers(0, users, impressions),
            "item_id": rng.integers(0, items, impressions),
            "timestamp": np.sort(rng.integers(0, DAYS * DAY_MS, impressions)) + start,
            "tab": rng.integers(0, 3, impressions).astype(np.int8),
        }
    )
    liked = shown[rng.integers(0, impressions, actions)].drop("tab")
    delay = rng.exponential(6 * 3_600_000, actions).astype(np.int64)
    stranger = rng.random(actions) < 0.1
    liked = liked.with_columns(
        pl.col("timestamp") + delay,
        item_id=pl.when(pl.Series(stranger)).then(items + 1).otherwise("item_id"),
    ).sort("timestamp")
    for name, rows in (("impressions", shown), ("likes", liked)):
        own_day = (pl.col("timestamp") - start) // DAY_MS
        for n in range(DAYS):
            folder = root / name / f"date={FIRST + timedelta(days=n)}"
            folder.mkdir(parents=True)
            rows.filter(own_day == n).write_parquet(folder / "part-0.parquet")
    (root / "project.toml").write_text(tomli_w.dumps(PROJECT), "utf-8")
    return {}


def opened(place: str) -> Context:
    return open_context(f"{place}/project.toml", Path(place), Path(place) / "workspace")


def ingest(place: str) -> dict[str, Any]:
    """The impressions, which are not part of what is compared."""
    context = opened(place)
    return {"rows": sum(ingest_day(context, day).good for day in context.source.days())}


def pipeline(place: str) -> dict[str, Any]:
    """Each day's actions to impressions, then each day's impressions with their actions."""
    context = opened(place)
    days = context.source.days()
    reports = [report for day in days for report in join_actions(context, day)]
    total = 0.0
    for day in days:
        rows = context.workspace.scan("events", [day]).with_row_index(EVENT)
        out = Path(place) / "pipeline" / f"{day}.parquet"
        labelled = with_actions(context, rows, day, pl.lit(True))
        labelled.select(EVENT, "like").sink_parquet(out, mkdir=True, engine="streaming")
        total += pl.scan_parquet(out).select(pl.col("like").sum()).collect().item()
    return {"joined": sum(r.joined for r in reports), "total": total}


def by_hand(place: str) -> dict[str, Any]:
    """What one would write in a notebook: everything at once."""
    root, pair = Path(place), ["user_id", "item_id"]
    files = sorted((root / "workspace" / "events").glob("date=*/*.parquet"))
    shown = pl.scan_parquet(files).select(*pair, "timestamp").with_row_index("row").collect()
    liked = pl.scan_parquet(sorted((root / "likes").glob("date=*/*.parquet"))).collect()
    liked = liked.unique(maintain_order=True)
    at = pl.from_epoch("timestamp", "ms").dt.cast_time_unit("us").dt.replace_time_zone("UTC")
    liked = liked.select(*pair, at)
    joined = liked.sort("timestamp").join_asof(
        shown.sort("timestamp"),
        on="timestamp",
        by=pair,
        strategy="backward",
        tolerance=WINDOW,
        check_sortedness=False,
    )
    counts = joined.drop_nulls("row").group_by("row").agg(pl.len().cast(pl.Float64).alias("like"))
    out = root / "by_hand.parquet"
    labelled = shown.select("row").join(counts, on="row", how="left", maintain_order="left")
    labelled.with_columns(pl.col("like").fill_null(0.0)).write_parquet(out)
    total = pl.scan_parquet(out).select(pl.col("like").sum()).collect().item()
    return {"joined": int(total), "total": total}


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, default=20_000_000)
    options.add_argument("--actions", type=int, default=5_000_000)
    options.add_argument("--repeats", type=int, default=2, help="the fastest run counts")
    chosen = results.parse(options)
    place = mkdtemp(prefix="actions-")
    found: dict[str, Any] = {"impressions": chosen.impressions, "actions": chosen.actions}
    try:
        sizes = {"impressions": chosen.impressions, "actions": chosen.actions}
        in_process(simulate, {"place": place} | sizes)
        found["ingest"] = in_process(ingest, {"place": place})
        for stage in (by_hand, pipeline):
            runs = []
            for _ in range(chosen.repeats):
                shutil.rmtree(Path(place) / "workspace" / "actions", ignore_errors=True)
                runs.append(in_process(stage, {"place": place}))
            found[stage.__name__] = min(runs, key=lambda run: run["seconds"])
    finally:
        shutil.rmtree(place)
    if found["pipeline"]["total"] != found["by_hand"]["total"]:
        raise SystemExit(f"the two joins differ: {found}")
    found["times"] = found["pipeline"]["seconds"] / found["by_hand"]["seconds"]
    table = Table(title=f"{chosen.impressions:,} impressions, {chosen.actions:,} actions")
    for heading in ("join", "seconds", "peak MB", "actions joined"):
        table.add_column(heading, justify="right")
    for row in _rows(found):
        table.add_row(*row)
    CONSOLE.print(table)
    results.write(chosen, found)


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{figures[stage]['seconds']:.1f}",
            f"{figures[stage]['peak_mb']:,.0f}",
            f"{figures[stage]['joined']:,}",
        ]
        for name, stage in (("by hand, at once", "by_hand"), ("pipeline, by day", "pipeline"))
    ]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    headings = ("join", "seconds", "peak MB", "actions joined")
    return {"actions": markdown.table(headings, _rows(figures))}


def summary(figures: Mapping[str, Any]) -> str:
    own = figures["pipeline"]
    return (
        f"{figures['impressions']:,} impressions with {figures['actions']:,} actions in "
        f"{own['seconds']:.1f} s and {own['peak_mb']:,.0f} MB, "
        f"{figures['times']:.2f} times a join by hand"
    )


if __name__ == "__main__":
    main()
