"""Rows a second that ingest reads from a local folder, from S3, and from Delta and Iceberg tables.

One simulated feed is read in each way, each in a fresh process. S3 is moto's server on the same
machine: it costs requests and copies, not the latency of a network.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE, in_process
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.logs.sources import open_context
from tests.projects import SMALL, write_project
from tests.stores import (
    daily_frames,
    iceberg_catalog,
    s3_server,
    upload,
    write_delta,
    write_iceberg,
)

DAYS = 7
LOCAL = "local folder"


def ingest(project: str, data: str, workspace: str) -> dict[str, Any]:
    """Ingest every day of a log."""
    context = open_context(project, data, Path(workspace))
    return {"rows": sum(ingest_day(context, day).good for day in context.source.days())}


def measure(impressions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mtl-ranker-sources-") as place:
        root = Path(place)
        feed = simulate(Feed(impressions, DAYS, users=20_000, items=5_000), root / "feed")
        frames = daily_frames(feed / "log")
        write_delta(root / "delta", frames, ["date"])
        found = {}

        def read(how: str, data: Path | str, **log: Any) -> None:
            folder = root / how.replace(" ", "-")
            folder.mkdir()
            own = log | {"items": {"format": "parquet"}}  # not read by ingest
            project = write_project(folder, SMALL, log=own)
            settings = {"project": str(project), "data": str(data), "workspace": str(folder / "ws")}
            found[how] = in_process(ingest, settings, dict(os.environ))

        read("warm-up", feed)
        read(LOCAL, feed)
        read("Delta table", root, format="delta", path="delta")
        with iceberg_catalog(root / "iceberg-tables") as catalog:
            write_iceberg(catalog, "feed.log", frames, "date")
            read("Iceberg table", root, format="iceberg", path="feed.log")
        with s3_server():
            read("S3", upload(feed, "feed"))
            write_delta("s3://feed/tables/log", frames, ["date"])
            read("Delta table in S3", "s3://feed/tables", format="delta", path="log")
        del found["warm-up"]
        return {"days": DAYS, "rows": impressions, "sources": found}


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    local = figures["sources"][LOCAL]
    return [
        [
            how,
            f"{each['rows'] / each['seconds']:,.0f}",
            f"{local['seconds'] / each['seconds']:.2f}",
            f"{each['peak_mb']:,.0f} MB",
        ]
        for how, each in figures["sources"].items()
    ]


HEADINGS = ["log", "rows a second", "of local", "peak"]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Rate of ingest from each source, its ratio to local files, and memory."""
    return {"sources": markdown.table(HEADINGS, _rows(figures))}


def summary(figures: Mapping[str, Any]) -> str:
    named = [f"{row[0]} {row[2]}" for row in _rows(figures) if row[0] != LOCAL]
    return f"rows a second as a share of a local folder's: {', '.join(named)}"


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, default=2_000_000)
    chosen = results.parse(options)
    figures = measure(chosen.impressions)
    results.show(CONSOLE, HEADINGS, _rows(figures))
    results.write(chosen, figures)


if __name__ == "__main__":
    main()
