"""What a workspace in S3 costs beside a local folder, and beside Delta tables.

Builds: events, aggregates and examples of a night on one simulated feed, each host in a fresh
process. Partitions: one dataset of small partitions, published as single files and as commits to a
Delta table, then looked at by another host, which asks each day for its provenance. S3 is moto's
server on the same machine: requests and bytes are those of any store, seconds lack the latency of
a network. Requests are counted in a second run, as the counting proxy takes time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE, in_process
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.workspace import open_workspace
from tests.projects import SMALL, write_project
from tests.stores import Answer, proxy, s3_server

DAYS = 8
FIRST = date(2026, 3, 1)
LOCAL = "local folder"


def build(project: str, data: str, workspace: str) -> dict[str, Any]:
    """Build what a night on the log's last day reads."""
    context = open_context(project, data, Path(workspace))
    with context.workspace.lock("build"):
        split = build_split(context, context.last_day())
    return {"days": len(split.all)}


def partition(day: int, rows: int) -> pl.DataFrame:
    rng = np.random.default_rng(day)
    return pl.DataFrame({f"sum_{c}": rng.random(rows, dtype=np.float32) for c in range(8)})


def publish_files(workspace: str, days: int, rows: int) -> dict[str, Any]:
    """One put for each partition."""
    store = open_workspace(workspace)
    for day in range(days):
        store.publish("sums", FIRST + timedelta(day), partition(day, rows), {"log": str(day)})
    return {}


def look_at_files(workspace: str, days: int) -> dict[str, Any]:
    """The provenance of each partition, by another host."""
    store = open_workspace(workspace)
    found = [store.provenance("sums", FIRST + timedelta(day)) for day in range(days)]
    assert found == [{"log": str(day)} for day in range(days)]
    return {}


def publish_commits(workspace: str, days: int, rows: int) -> dict[str, Any]:
    """One commit for each partition, which replaces its day."""
    from deltalake import CommitProperties, write_deltalake

    from mtl_ranker.stores.objects import store_options

    for day in range(days):
        own = (FIRST + timedelta(day)).isoformat()
        frame = partition(day, rows).with_columns(pl.lit(own).alias("date"))
        exists = day > 0
        write_deltalake(
            f"{workspace}/sums",
            frame.to_arrow(),
            mode="overwrite",
            predicate=f"date = '{own}'" if exists else None,
            partition_by=["date"],
            storage_options=store_options(workspace),
            commit_properties=CommitProperties(custom_metadata={"day": own, "log": str(day)}),
        )
    return {}


def look_at_commits(workspace: str, days: int) -> dict[str, Any]:
    """The provenance of each partition from the table's history, by another host."""
    from deltalake import DeltaTable

    from mtl_ranker.stores.objects import store_options

    table = DeltaTable(f"{workspace}/sums", storage_options=store_options(workspace))
    found = {each["day"]: each["log"] for each in table.history() if "day" in each}
    assert len(found) == days
    return {}


def counted(answers: list[Answer]) -> dict[str, Any]:
    """Number of requests, and their megabytes."""
    return {
        "requests": len(answers),
        "sent_mb": sum(each.request.sent for each in answers) / 1e6,
        "received_mb": sum(each.received for each in answers) / 1e6,
    }


def of_builds(root: Path, impressions: int) -> dict[str, dict[str, Any]]:
    """Of a local build, of one in a store, and of a second host that finds all built."""
    feed = simulate(Feed(impressions, DAYS, users=5_000, items=2_000), root / "feed")
    project = str(write_project(root, SMALL))

    def built(workspace: str, cache: str) -> dict[str, Any]:
        settings = {"project": project, "data": str(feed), "workspace": workspace}
        return in_process(build, settings, {"MTL_RANKER_CACHE": str(root / cache)})

    built(str(root / "warm-up"), "none")
    found = {LOCAL: built(str(root / "local"), "none")}
    found["local folder, all built"] = built(str(root / "local"), "none")
    hosts = {"S3": "a", "S3, a second host, all built": "b"}
    with s3_server() as endpoint:
        for how, cache in hosts.items():
            found[how] = built("s3://feed/timed", cache)
        with proxy(endpoint) as answers:
            for how, cache in hosts.items():
                shutil.rmtree(root / cache)
                before = len(answers)
                built("s3://feed/counted", cache)
                found[how] |= counted(answers[before:])
    return found


def of_partitions(root: Path, days: int, rows: int) -> dict[str, dict[str, Any]]:
    """Of single files and of a Delta table: publish all partitions, then look at them."""
    ways = {"single files": (publish_files, look_at_files)}
    ways["Delta table"] = (publish_commits, look_at_commits)
    found: dict[str, dict[str, Any]] = {}
    with s3_server() as endpoint, proxy(endpoint) as answers:
        for how, (publish, look) in ways.items():
            for place in ("timed", "counted"):
                address = f"s3://feed/{place}/{publish.__name__}"
                for what, stage, more in (
                    ("publish", publish, {"days": days, "rows": rows}),
                    ("look", look, {"days": days}),
                ):
                    settings = {"workspace": address, **more}
                    own = {"MTL_RANKER_CACHE": str(root / place / what)}
                    figures = found.setdefault(f"{how}: {what}", {})
                    if place == "timed":
                        direct = own | {"AWS_ENDPOINT_URL": endpoint}
                        figures |= in_process(stage, settings, os.environ | direct)
                    else:
                        before = len(answers)
                        in_process(stage, settings, own)
                        figures |= counted(answers[before:])
    return found


def measure(impressions: int, days: int, rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mtl-ranker-workspaces-") as place:
        began = time.perf_counter()
        builds = of_builds(Path(place), impressions)
        partitions = of_partitions(Path(place), days, rows)
        taken = time.perf_counter() - began
    return {
        "impressions": impressions,
        "partitions": {"days": days, "rows": rows, "ways": partitions},
        "builds": builds,
        "taken": taken,
    }


def _row(how: str, figures: Mapping[str, Any]) -> list[str]:
    in_store = "requests" in figures
    return [
        how,
        f"{figures['seconds']:.1f}",
        f"{figures['requests']:,}" if in_store else "",
        f"{figures['sent_mb']:.1f} MB" if in_store else "",
        f"{figures['received_mb']:.1f} MB" if in_store else "",
    ]


HEADINGS = ["workspace", "seconds", "requests", "sent", "received"]


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    every = figures["builds"] | figures["partitions"]["ways"]
    return [_row(how, each) for how, each in every.items()]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Seconds, requests and bytes of a build, and of single files beside a Delta table."""
    return {"workspaces": markdown.table(HEADINGS, _rows(figures))}


def summary(figures: Mapping[str, Any]) -> str:
    builds, ways = figures["builds"], figures["partitions"]["ways"]
    days = figures["partitions"]["days"]
    each = [f"{how.split(':')[0]} {ways[how]['requests'] / days:.1f}" for how in list(ways)[::2]]
    return (
        f"a build in S3 takes {builds['S3']['seconds'] / builds[LOCAL]['seconds']:.1f} times the "
        f"seconds of a local one, with {builds['S3']['requests']:,} requests; requests to publish "
        f"a partition: {', '.join(each)}"
    )


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, default=300_000)
    options.add_argument("--partitions", type=int, default=28)
    options.add_argument("--rows", type=int, default=20_000, help="of a partition")
    chosen = results.parse(options)
    figures = measure(chosen.impressions, chosen.partitions, chosen.rows)
    results.show(CONSOLE, HEADINGS, _rows(figures))
    results.write(chosen, figures)


if __name__ == "__main__":
    main()
