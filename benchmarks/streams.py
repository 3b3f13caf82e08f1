"""KuaiRand-Pure as impressions and a stream for each action: are its examples those of the log?

The log of joined rows is split into impressions and nine actions, once with impression ids and once
without. All three are ingested and their examples compared. With ids every value must be equal.
Without ids a label may only differ where it is ambiguous: where another impression of the same user
and item lies between an impression and its action, or at the same time. Such a label changes the
rates of other rows, so the log is compared once more with all ambiguous rows left out.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import polars as pl
import tomli_w
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE
from mtl_ranker.config import read_project_text
from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import EVENT, LABEL
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context

FLAGS = (
    "is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate",
    "is_profile_enter",
)  # fmt: skip
VALUES = ("play_time_ms",)
TABLES = ("user_features.parquet", "video_features_basic.parquet")
VARIANTS = ("with ids", "without ids", "without ids, no ambiguous row")
KEY = ["user_id", "video_id", "time_ms"]
ZONE = "Asia/Shanghai"


def log_days(data: Path) -> list[date]:
    folders = sorted((data / "log").glob("date=*"))
    return [date.fromisoformat(folder.name.removeprefix("date=")) for folder in folders]


def split(data: Path, target: Path, ids: bool, delay_ms: int = 0) -> None:
    """Write a log of joined rows as impressions and a stream for each action.

    Args:
        data: the folder of the joined log and its tables.
        ids: whether impressions and actions have an id.
        delay_ms: from each impression to its actions.
    """
    actions: list[pl.DataFrame] = []
    for day in log_days(data):
        frame = pl.read_parquet(data / "log" / f"date={day}", hive_partitioning=False)
        number = pl.int_range(pl.len()).cast(pl.String)
        frame = frame.with_columns((pl.lit(f"{day} ") + number).alias("impression"))
        shown = frame.drop(*FLAGS, *VALUES, *([] if ids else ["impression"]))
        folder = target / "impressions" / f"date={day}"
        folder.mkdir(parents=True)
        shown.write_parquet(folder / "part-0.parquet")
        actions.append(frame.select(*KEY, "impression", *FLAGS, *VALUES))
    rows = pl.concat(actions, how="vertical_relaxed")
    rows = rows.with_columns(pl.col("time_ms") + delay_ms)
    own_day = pl.from_epoch("time_ms", "ms").dt.replace_time_zone("UTC")
    rows = rows.with_columns(own_day.dt.convert_time_zone(ZONE).dt.date().alias("own day"))
    for name in (*FLAGS, *VALUES):
        columns = [*KEY, *(["impression"] if ids else []), *([name] if name in VALUES else [])]
        happened = rows.filter(pl.col(name) != 0)
        for day in sorted({*log_days(data), *rows["own day"].unique()}):
            folder = target / name / f"date={day}"
            folder.mkdir(parents=True)
            own = happened.filter(pl.col("own day") == day).select(columns)
            own.write_parquet(folder / "part-0.parquet")
    for table in TABLES:
        shutil.copyfile(data / table, target / table)
    (target / "project.toml").write_text(tomli_w.dumps(project_of_streams(ids)), "utf-8")


def project_of_streams(ids: bool) -> dict[str, Any]:
    """The preset of KuaiRand with the columns of actions as streams."""
    project = tomllib.loads(read_project_text("kuairand")[0])
    log = project["log"]
    log["path"], log["required"] = "impressions", ["tab"]
    log["ranges"] = {k: v for k, v in log["ranges"].items() if k not in (*FLAGS, *VALUES)}
    with_id = {"impression": "impression"} if ids else {}
    if ids:
        log["impression"] = "impression"
    log["actions"] = [{"name": name, "path": name, "window": "1h", **with_id} for name in FLAGS] + [
        {"name": name, "path": name, "window": "1h", "value": name, "reduce": "sum", **with_id}
        for name in VALUES
    ]
    return project


def examples_of(context: Context, days: list[date]) -> pl.DataFrame:
    """Ingest, aggregate and build all days; the examples in the order of the events."""
    for day in days:
        ingest_day(context, day)
    for day in days:
        aggregate_day(context, day)
    for day in days:
        build_examples(context, day)
    return context.workspace.scan("examples", days).collect().sort("date", EVENT)


def ambiguous(data: Path, delay_ms: int) -> pl.DataFrame:
    """Impressions whose actions a join without ids may give to another one, and those others.

    Returns user_id, video_id and `time_ms` of impressions of one user and item that are no further
    apart than the delay and do not have the same actions.
    """
    columns = [*KEY, *FLAGS, *VALUES]
    days = [pl.read_parquet(data / "log" / f"date={d}", columns=columns) for d in log_days(data)]
    rows = pl.concat(days, how="vertical_relaxed").unique().sort(KEY)
    pair = ["user_id", "video_id"]
    following = pl.col("time_ms").shift(-1).over(pair) - pl.col("time_ms")
    before = pl.col("time_ms") - pl.col("time_ms").shift(1).over(pair)
    close = (following <= delay_ms) | (before <= delay_ms)
    return rows.filter(close.fill_null(False)).select(KEY).unique()


def without(data: Path, target: Path, rows: pl.DataFrame) -> None:
    """Write the joined log without some rows."""
    for day in log_days(data):
        frame = pl.read_parquet(data / "log" / f"date={day}", hive_partitioning=False)
        folder = target / "log" / f"date={day}"
        folder.mkdir(parents=True)
        types: dict[Any, Any] = dict(frame.select(KEY).schema)
        kept = frame.join(rows.cast(types), on=KEY, how="anti")
        kept.write_parquet(folder / "part-0.parquet")
    for table in TABLES:
        shutil.copyfile(data / table, target / table)


def compare(joined: pl.DataFrame, streams: pl.DataFrame) -> dict[str, Any]:
    """Rows, and how many differ in a label, in a feature, and in anything at all."""
    if joined.height != streams.height:
        raise SystemExit(f"{joined.height:,} examples of the log, {streams.height:,} of streams")
    columns = [c for c in joined.columns if c != "timestamp"]
    differs = {c: joined[c].ne_missing(streams[c]) for c in columns}
    labels = [c for c in columns if c.startswith(LABEL)]
    of_labels = pl.any_horizontal(*(differs[c] for c in labels))
    of_features = pl.any_horizontal(*(differs[c] for c in columns if c not in labels))
    counts = pl.select(of_labels.sum().alias("labels"), of_features.sum().alias("features"))
    return {"rows": joined.height, "equal": joined.equals(streams), **counts.row(0, named=True)}


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of KuaiRand-Pure")
    options.add_argument("--delay-ms", type=int, default=0, help="from impression to action")
    chosen = results.parse(options)
    found = measure(chosen.data, chosen.delay_ms)
    table = Table(title=f"examples of streams against those of the log, {found['days']} days")
    for heading in ("streams", "rows", "labels differ", "of these ambiguous", "features differ"):
        table.add_column(heading, justify="right")
    for name in VARIANTS:
        each = found[name]
        counts = (each["rows"], each["labels"], each["ambiguous"], each["features"])
        table.add_row(name, *(f"{count:,}" for count in counts))
    CONSOLE.print(table)
    results.write(chosen, found)


def measure(data: Path, delay_ms: int) -> dict[str, Any]:
    """Figures of the log against its streams, with ids and without."""
    days, place = log_days(data), Path(mkdtemp(prefix="streams-"))
    found: dict[str, Any] = {"days": len(days), "delay_ms": delay_ms}
    try:
        joined = examples_of(open_context("kuairand", data, place / "joined"), days)
        unclear = ambiguous(data, delay_ms)
        found["ambiguous"] = unclear.height
        for name, ids in ((VARIANTS[0], True), (VARIANTS[1], False)):
            streams = _streams(data, place / name.replace(" ", "-"), ids, delay_ms)
            found[name] = compare(joined, streams) | {
                "ambiguous": _ambiguous_differences(joined, streams, unclear)
            }
        clear = place / "clear"
        without(data, clear, unclear)
        joined = examples_of(open_context("kuairand", clear, place / "joined clear"), days)
        streams = _streams(clear, place / "clear streams", False, delay_ms)
        found[VARIANTS[2]] = compare(joined, streams) | {"ambiguous": 0}
    finally:
        shutil.rmtree(place)
    return found


def _streams(data: Path, target: Path, ids: bool, delay_ms: int) -> pl.DataFrame:
    """Examples of the streams that a log is split into."""
    split(data, target, ids, delay_ms)
    context = open_context(str(target / "project.toml"), target, target / "workspace")
    return examples_of(context, log_days(data))


def _ambiguous_differences(
    joined: pl.DataFrame, streams: pl.DataFrame, unclear: pl.DataFrame
) -> int:
    """Rows with another label that are ambiguous."""
    labels = [c for c in joined.columns if c.startswith(LABEL)]
    differs = pl.any_horizontal(*(joined[c].ne_missing(streams[c]) for c in labels))
    rows = joined.select(
        "user_id",
        pl.col("item_id").alias("video_id"),
        pl.col("timestamp").dt.epoch("ms").alias("time_ms"),
        differs.alias("differs"),
    ).filter("differs")
    types: dict[Any, Any] = {c: rows.schema[c] for c in unclear.columns}
    return rows.join(unclear.cast(types), on=unclear.columns, how="semi").height


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    counts = ("rows", "labels", "ambiguous", "features")
    rows = [[name, *(f"{figures[name][count]:,}" for count in counts)] for name in VARIANTS]
    headings = ("streams", "examples", "labels differ", "of these ambiguous", "features differ")
    return {"streams": markdown.table(headings, rows)}


def summary(figures: Mapping[str, Any]) -> str:
    with_ids, no_ids, clear = (figures[name] for name in VARIANTS)
    same = "equal" if with_ids["equal"] else "not equal"
    return (
        f"{with_ids['rows']:,} examples are {same} with ids; without, {no_ids['labels']:,} labels "
        f"differ ({no_ids['ambiguous']:,} ambiguous), {clear['labels']:,} where no row is ambiguous"
    )


if __name__ == "__main__":
    main()
