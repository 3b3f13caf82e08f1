"""What a folder of Parquet files holds: a log, streams of actions, tables and candidates.

Guesses are from names, types and samples of values. They are a start for a project file, which its
owner reads and corrects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import polars as pl

from mtl_ranker.config import Log, TimestampUnit
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.sources import (
    day_folders,
    parquet_files,
    parquet_schema,
    scan_files,
    utc_timestamp,
)

SAMPLE_ROWS = 20_000
TIMES = 5_000_000  # that are looked at for the time zone
DEPTH = 4  # folders below the given one that are looked into


def named(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


USER = named(
    "user member customer visitor account client reader viewer buyer shopper person profile "
    "subscriber player listener consumer guest cust usr u uid"
)
ITEM = named(
    "item video article product news movie film song track ad post content doc document sku asin "
    "listing offer photo story book game app creative recipe job hotel pin note media episode clip "
    "goods place restaurant property tweet vid iid i"
)
KEY = named("id ids key uuid no number hash code")
TIME = named("time timestamp ts at date datetime ms sec seconds when created shown epoch unix")
ARRIVED = named("received arrived ingested processed loaded inserted landed synced")
NO_ARRIVAL = named("next previous last end ends ended until till expires expiry due scheduled")
LATER = ARRIVED | NO_ARRIVAL | {"updated"}
LONGEST_DELAY = 14 * 24  # hours, by which nearly all actions have arrived

BEGINS, ENDS = named("from since start starts begin begins"), named("to until till end ends")

LOG = named(
    "log logs impression impressions exposure exposures shown behaviors behaviours requests views"
)
ACTED = named("impression request imp event exposure view")  # of an id that an action has too

# Layouts of days' folders: how the name of a first folder reads, and the pattern below it.
SINGLE = [
    (re.compile(r"^([A-Za-z_]\w*)=\d{4}-\d{2}-\d{2}$"), "{}=%Y-%m-%d"),
    (re.compile(r"^([A-Za-z_]\w*)=\d{8}$"), "{}=%Y%m%d"),
    (re.compile(r"^()\d{4}-\d{2}-\d{2}$"), "%Y-%m-%d"),
    (re.compile(r"^()\d{8}$"), "%Y%m%d"),
]
NESTED = [
    (re.compile(r"^([A-Za-z_]\w*)=\d{4}/([A-Za-z_]\w*)=\d{1,2}/([A-Za-z_]\w*)=\d{1,2}$"),
     "{}=%Y/{}=%m/{}=%d"),
    (re.compile(r"^()()()\d{4}/\d{1,2}/\d{1,2}$"), "%Y/%m/%d"),
]  # fmt: skip

UNITS: dict[TimestampUnit, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
FIRST, LAST = 631_152_000, 4_102_444_800  # 1990 and 2100, in seconds since 1970
ZONES = (0, *range(-12, 0), *range(1, 15))  # hours east of Greenwich


def words(name: str) -> list[str]:
    """The words of a column's or file's name: `isClicked_at` is is, clicked, at."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return [word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word]


def names_id(name: str, of: frozenset[str]) -> float:
    """How much a name reads as the id of one of these things: from 0 to 3."""
    parts = words(name)
    if len(parts) == 1 and parts[0].endswith("id") and parts[0][:-2] in of:
        return 2.5
    base = [part for part in parts if part not in KEY]
    if not base or base[-1] not in of:
        return 0.0
    if len(base) == len(parts):
        return (2.0 if len(parts) == 1 else 1.5) if of.issuperset(base) else 0.0
    return 3.0 if len(base) == 1 else 1.0


@dataclass(frozen=True, eq=False)
class Dataset:
    """Files of one kind: days' folders, a folder of files, or a file.

    Attributes:
        path: below the folder that was searched.
        partition: the layout of its days, as of `log.partition`; None if it is undivided.
        days: day → files, ascending; empty if undivided.
        files: all of them.
        sample: first rows of the newest day, or of the first file.
        rows: number of rows of the newest day, or of all files if undivided.
    """

    path: str
    partition: str | None
    days: dict[date, list[Path]]
    files: list[Path]
    sample: pl.DataFrame
    rows: int

    @property
    def name(self) -> str:
        return Path(self.path).name.split(".")[0]

    def newest(self, days: int = 1) -> pl.LazyFrame:
        """Rows of the newest days, or all of an undivided dataset."""
        if not self.days:
            return scan_files(self.files, self.sample.columns)
        files = [file for day in list(self.days)[-days:] for file in self.days[day]]
        return pl.concat(
            (scan_files([file]) for file in files if set(self.sample.columns) == _names(file)),
            how="vertical_relaxed",
        )


def _names(file: Path) -> set[str]:
    return set(parquet_schema(file).names())


def datasets(root: Path) -> list[Dataset]:
    """The datasets below a folder, by path. Raises ProjectError for a file that is not Parquet."""
    return sorted(_search(root, root, 0), key=lambda found: found.path)


def _search(root: Path, folder: Path, depth: int) -> Iterator[Dataset]:
    partition = _layout(folder)
    if partition is not None:
        found = day_folders(folder, Log(partition=partition))
        days = {day: parquet_files(found[day]) for day in sorted(found)}
        yield from _dataset(root, folder, partition, {d: f for d, f in days.items() if f})
        return
    files = [f for f in sorted(folder.glob("*.parquet")) if not f.name.startswith(("_", "."))]
    kinds = {tuple(sorted(_names(file))) for file in files}
    if len(files) > 1 and len(kinds) == 1 and folder != root:
        yield from _dataset(root, folder, None, {}, files)
    else:
        for file in files:
            yield from _dataset(root, file, None, {}, [file])
    if depth < DEPTH:
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.name.startswith(("_", ".")):
                yield from _search(root, below, depth + 1)


def _layout(folder: Path) -> str | None:
    """The layout of the days' folders below a folder, if it has them."""
    names = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] not in "_."]
    for shape, pattern in SINGLE:
        match = shape.match(names[0]) if names else None
        if match is not None:
            return match[1] if pattern == "{}=%Y-%m-%d" else pattern.format(match[1])
    if not names or not re.search(r"\d{4}$", names[0]):
        return None
    for below in sorted(folder.glob(f"{names[0]}/*/*")):
        for shape, pattern in NESTED:
            match = shape.match(below.relative_to(folder).as_posix())
            if match is not None and below.is_dir():
                return pattern.format(*match.groups())
    return None


def _dataset(
    root: Path,
    path: Path,
    partition: str | None,
    days: dict[date, list[Path]],
    files: Sequence[Path] = (),
) -> Iterator[Dataset]:
    newest = list(days.values())[-1] if days else list(files)
    if not newest:
        return
    relative = path.relative_to(root).as_posix()
    sample = scan_files(newest[:1]).head(SAMPLE_ROWS).collect()
    every = [file for own in days.values() for file in own] or list(files)
    rows = sum(_rows(file) for file in newest)
    yield Dataset(relative, partition, days, every, sample, rows)


def _rows(file: Path) -> int:
    return pl.scan_parquet(file, glob=False).select(pl.len()).collect().item()


@dataclass(frozen=True)
class Time:
    """A column of times.

    Attributes:
        hours: hours east of Greenwich at which the times lie in the days of their folders.
        tolerance: hours by which they lie outside these days.
    """

    column: str
    unit: TimestampUnit
    hours: int = 0
    tolerance: int = 0


@dataclass(frozen=True)
class Lists:
    """The columns of a request's lists; `clicked` may be missing, and lists may be text."""

    shown: str
    clicked: str | None = None
    separator: str | None = None
    mark: str | None = None


@dataclass(frozen=True)
class Events:
    """A dataset of events: who, what and when.

    Attributes:
        item: of one row an impression or action; "" for a request.
        shown, clicked: lists of a request; `clicked` may be missing.
        separator, mark: of lists that are text.
    """

    data: Dataset
    user: str
    time: Time
    item: str = ""
    shown: str = ""
    clicked: str | None = None
    separator: str | None = None
    mark: str | None = None

    @property
    def columns(self) -> set[str]:
        """The columns that have a role."""
        own = {self.user, self.time.column, self.item, self.shown, self.clicked or ""}
        return own - {""}


def unit_of(column: pl.Series) -> TimestampUnit | None:
    """What a column of times counts, by its type and the range of its values; None if no time."""
    values = column.drop_nulls().head(2_000)
    if isinstance(column.dtype, pl.Datetime):
        return "datetime"
    if column.dtype == pl.String and len(values):
        read = values.str.contains(r"^\s*\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}")
        return "iso" if read.all() else None
    if not column.dtype.is_numeric() or not len(values):
        return None
    ends = (float(values.min()), float(values.max()))  # type: ignore[arg-type]
    for unit, factor in UNITS.items():
        if all(FIRST * factor <= end <= LAST * factor for end in ends):
            return unit
    return None


def time_of(data: Dataset) -> Time | None:
    """The time of a dataset's events: a name of time, and values in the days of the folders."""
    found: list[tuple[float, Time]] = []
    for name in data.sample.columns:
        unit = unit_of(data.sample[name])
        parts = set(words(name))
        if unit is None or (unit not in ("datetime", "iso") and not parts & TIME):
            continue
        share, time = _zone(data, Time(name, unit))
        bonus = 0.2 * bool(parts & TIME) - 0.5 * bool(parts & LATER)
        found.append((share + bonus, time))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _zone(data: Dataset, time: Time) -> tuple[float, Time]:
    """Share of times within their day, and the time zone in which it is the largest."""
    if not data.days:
        return 1.0, time
    parts, count = [], 0
    for day, files in reversed(data.days.items()):
        having = [f for f in files if time.column in parquet_schema(f)]
        if not having:
            continue  # a column that the log has from a later day on
        frames = [pl.read_parquet(f, columns=[time.column], glob=False) for f in having]
        start = pl.lit(day).cast(pl.Datetime("us"))
        moments = pl.concat(moments_of(frame, time) for frame in frames)
        parts.append(moments.to_frame("at").select((pl.col("at") - start).cast(pl.Int64)))
        count += len(moments)
        if count > TIMES:
            break
    if not parts:
        return 0.0, time
    hours = pl.concat(parts)["at"].drop_nulls() / 3_600_000_000
    if not len(hours):
        return 0.0, time
    shares = {z: float(((hours + z >= 0) & (hours + z < 24)).mean() or 0.0) for z in ZONES}
    best = max(ZONES, key=lambda zone: shares[zone] - 1e-9 * abs(zone))
    best = 0 if shares[0] >= min(0.999, shares[best]) else best
    local = hours + best
    outside = max(0.0, -_quantile(local, 0.0005), _quantile(local, 0.9995) - 24)
    tolerance = 0 if shares[best] == 1.0 else min(24, max(1, math.ceil(outside)))
    return shares[best], Time(time.column, time.unit, best, tolerance)


def _quantile(values: pl.Series, at: float) -> float:
    found = values.quantile(at)
    return 0.0 if found is None else float(found)


def moments_of(frame: pl.DataFrame, time: Time) -> pl.Series:
    """Times in UTC, in microseconds, without a zone; naive ones are taken as they are."""
    column = frame[time.column]
    if time.unit == "datetime":
        zone = getattr(column.dtype, "time_zone", None)
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if zone else column
        return column.cast(pl.Datetime("us"))
    if time.unit == "iso":
        log = Log(timestamp=time.column, timestamp_unit="iso")
        moment = utc_timestamp(log, pl.String(), time.column, "log.timestamp")
        return frame.select(moment).to_series().dt.replace_time_zone(None)
    micros = column.cast(pl.Float64) * (1e6 / UNITS[time.unit])
    return micros.cast(pl.Int64, strict=False).cast(pl.Datetime("us"))


def key_of(schema: pl.Schema, of: frozenset[str], without: Sequence[str] = ()) -> str | None:
    """The column that reads most as the id of one of these things."""
    fitting = {
        name: names_id(name, of)
        for name, dtype in schema.items()
        if (dtype.is_integer() or dtype == pl.String) and name not in without
    }
    best = max(fitting, key=lambda name: fitting[name], default=None)
    return best if best is not None and fitting[best] > 0 else None


def events_of(data: Dataset, user: str | None = None, item: str | None = None) -> Events | None:
    """The dataset's events, if it has user, item (or a list of items) and time.

    Args:
        user, item: their columns, where they are known.
    """
    schema = data.sample.schema
    user = user if user in schema else key_of(schema, USER)
    time = time_of(data)
    if user is None or time is None:
        return None
    lists = _request(data, (user, time.column))
    if lists is not None and (item is None or item not in schema):
        return Events(
            data,
            user,
            time,
            shown=lists.shown,
            clicked=lists.clicked,
            separator=lists.separator,
            mark=lists.mark,
        )
    item = item if item in schema else key_of(schema, ITEM, (user, time.column))
    return None if item is None else Events(data, user, time, item)


def _request(data: Dataset, without: Sequence[str]) -> Lists | None:
    """The lists of a request: one that holds all of another, of clicks, or a marked one."""
    lists: dict[str, tuple[pl.Series, str | None]] = {}
    for name, dtype in data.sample.schema.items():
        if name in without:
            continue
        column = data.sample[name]
        if dtype == pl.String and _marked(column):
            return Lists(name, separator=" ", mark="-")
        inner = dtype.inner if isinstance(dtype, pl.List) else None
        if inner is not None and (inner == pl.String or inner.is_integer()):
            lists[name] = (column, None)
        elif dtype == pl.String:
            separator = separator_of(column)
            if separator is not None:
                lists[name] = (column.str.split(separator), separator)
    for name, (clicks, by) in lists.items():
        if not {"click", "clicked", "clicks"} & set(words(name)):
            continue
        for other, (shown, separator) in lists.items():
            whole = shown.list.len().mean() or 0.0
            if other == name or shown.dtype != clicks.dtype or not isinstance(whole, float):
                continue
            frame = pl.DataFrame({"shown": shown, "clicks": clicks}).drop_nulls()
            rest = frame.select(pl.col("clicks").list.set_difference("shown").list.len() == 0)
            if frame.height and rest.to_series().mean() >= 0.95 and whole > 1:  # type: ignore[operator]
                return Lists(other, name, separator or by)
    return None


def _marked(column: pl.Series) -> bool:
    """Whether texts are as `N55689-1 N35729-0`."""
    values = column.drop_nulls().head(1_000)
    fits = values.str.contains(r"^\s*\S+-[01](\s+\S+-[01])*\s*$")
    return len(values) > 0 and bool(fits.all()) and bool(values.str.contains(r"\s").any())


def separator_of(column: pl.Series) -> str | None:
    """What separates the words of texts that are lists of short words; None for other texts."""
    values = column.drop_nulls().head(2_000)
    for separator in ("|", ";", ","):
        having = values.str.contains(re.escape(separator)).mean() if len(values) else 0.0
        parts = values.str.split(separator).explode()
        longest = parts.str.len_chars().max()
        short = isinstance(longest, int) and longest <= 30
        spoken = parts.str.contains(r"\S\s+\S+\s+\S").any()
        if isinstance(having, float) and having > 0.2 and short and not spoken:
            bracketed = values.str.contains(r"^[\[(]").any()
            return None if bracketed else separator
    return None


@dataclass(frozen=True)
class TableFound:
    """A table of users or items.

    One with days has a snapshot in each of their folders.

    Attributes:
        share: of the log's ids that it has.
        valid: columns of the dates or times between which a row is valid; None without both.
    """

    data: Dataset
    key: str
    share: float
    valid: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class StreamFound:
    """A stream of actions.

    Attributes:
        impression: the column of an id of impressions that the log has too.
        joined: share of its newest actions whose user and item the log has before them.
        hours: by which 99 % of these come after their impression, and are known.
        count: number of these.
        arrived: the column of the time from which on an action is known.
    """

    events: Events
    impression: str | None
    joined: float
    hours: float
    count: int
    arrived: str | None = None


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        notes: what was found and is not used, with the reason.
        candidates: their path.
    """

    log: Events
    streams: list[StreamFound]
    users: TableFound | None
    items: TableFound | None
    candidates: str | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hints:
    """Columns that the caller knows."""

    user: str | None = None
    item: str | None = None


def discover(root: Path, hints: Hints | None = None) -> Found:
    """Look at a folder. Raises ProjectError where no dataset has user, item and time."""
    hints = Hints() if hints is None else hints
    if not root.is_dir():
        raise ProjectError(f"--data {root}: no such folder")
    given, notes = datasets(root), _other_files(root)
    offered = [d for d in given if _is_candidates(d)]
    events = [
        found
        for data in given
        if data not in offered and (found := events_of(data, hints.user, hints.item)) is not None
    ]
    if not events:
        seen = "; ".join(f"{d.path} ({', '.join(d.sample.columns)})" for d in given)
        raise ProjectError(
            f"{root}: no Parquet files with a user, an item (or a list of items) and a time; "
            f"found: {'; '.join([seen or 'no Parquet file', *notes])}. --user and --item name "
            "columns"
        )
    log = max(events, key=_impressions)
    streams = []
    for other in events:
        if other is log:
            continue
        stream = _stream(log, other)
        if isinstance(stream, StreamFound):
            streams.append(stream)
        else:
            notes.append(f"{other.data.path}: {stream}")
    rest = [d for d in given if d not in offered and all(d is not e.data for e in events)]
    tables = {which: _table(log, rest, which) for which in ("users", "items")}
    used = [table.data for table in tables.values() if table is not None]
    notes += [f"{d.path}: {_why_not(d)}" for d in rest if all(d is not u for u in used)]
    candidates = [d for d in offered if d.partition in (None, "date", log.data.partition)]
    notes += [f"{d.path}: further candidates" for d in offered if d not in candidates[:1]]
    chosen = candidates[0].path if candidates else None
    return Found(log, streams, tables["users"], tables["items"], chosen, notes)


def _other_files(root: Path) -> list[str]:
    """Files of other formats, which are not read."""
    kinds = {"csv", "tsv", "json", "jsonl", "avro", "orc"}
    others = [f for f in sorted(root.glob("*")) if f.name.split(".")[-1].lower() in kinds]
    others += [f for f in sorted(root.glob("*/*")) if f.name.split(".")[-1].lower() in kinds]
    names = [f.relative_to(root).as_posix() for f in others if f.name != "feed.json"]
    text = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return [f"{text}: not Parquet, not read"] if names else []


def _is_candidates(data: Dataset) -> bool:
    schema = data.sample.schema
    called = any("candidate" in word for word in words(data.path))
    return called and key_of(schema, USER) is not None and key_of(schema, ITEM) is not None


def _impressions(events: Events) -> tuple[bool, float, int]:
    """How much a dataset looks like the log: by its name, its impressions and its columns."""
    data = events.data
    lists = data.sample[events.shown] if events.shown else None
    length = 1.0
    if lists is not None and isinstance(lists.dtype, pl.List):
        found = lists.list.len().mean()
        length = found if isinstance(found, float) else 1.0
    elif lists is not None:
        length = 5.0
    return bool(LOG & set(words(data.name))), length * data.rows, len(data.sample.columns)


def _why_not(data: Dataset) -> str:
    keyed = key_of(data.sample.schema, USER) or key_of(data.sample.schema, ITEM)
    if keyed is not None and data.days:
        return f"has {keyed!r} and a folder a day, and no time; not used"
    return f"not used ({', '.join(data.sample.columns[:8])})"


def _table(log: Events, rest: Sequence[Dataset], which: str) -> TableFound | None:
    """The dataset with one row for each of the log's users or items, and most of them.

    Of dated snapshots the newest one counts. Of rows with times in which they are valid, there may
    be several of a key.
    """
    of, column = {"users": (USER, log.user), "items": (ITEM, log.item)}[which]
    if column:
        ids = log.data.sample.select(pl.col(column).alias("id"))
    else:
        shown = log.data.sample[log.shown]
        if shown.dtype == pl.String:
            shown = shown.str.split(log.separator or " ")
        ids = pl.DataFrame({"id": shown.explode().cast(pl.String)})
        ids = ids.with_columns(
            pl.col("id").str.replace(r"-[01]$", "") if log.mark else pl.col("id")
        )
    ids = ids.drop_nulls().cast(pl.String).unique()
    found: list[TableFound] = []
    for data in rest:
        if not data.days and len(data.files) != 1:
            continue
        about = any(word in of or word.removesuffix("s") in of for word in words(data.name))
        for name, dtype in data.sample.schema.items():
            fits = name == column or names_id(name, of) > 0
            fits |= about and [w for w in words(name) if w not in KEY] == []
            if not fits or not (dtype.is_integer() or dtype == pl.String):
                continue
            valid = _valid_columns(data, name)
            own = [c for c in valid[:1] if c is not None]
            keys = data.newest().select(pl.col(name).cast(pl.String).alias("id"), *own).collect()
            if keys.is_duplicated().any() or keys["id"].null_count():
                continue
            share = ids.join(keys, on="id", how="semi").height / max(1, ids.height)
            if share > 0.1:
                found.append(TableFound(data, name, share + (name == column), valid))
    return max(found, key=lambda table: table.share, default=None)


def _valid_columns(data: Dataset, key: str) -> tuple[str | None, str | None]:
    """The dates or times between which a row of a table is valid, by their names."""
    if data.days:
        return None, None
    schema = data.sample.schema
    times = [c for c, t in schema.items() if c != key and isinstance(t, pl.Date | pl.Datetime)]
    first = next((c for c in times if set(words(c)) & BEGINS), None)
    end = next((c for c in times if c != first and set(words(c)) & ENDS), None)
    return (None, None) if None in (first, end) else (first, end)


def _stream(log: Events, other: Events) -> StreamFound | str:
    """A stream of the log's actions, or why it is none."""
    if not other.item:
        return "another log of requests; not used"
    if other.data.partition != log.data.partition and other.data.days:
        return f"days are in folders of another layout ({other.data.partition}); not used"
    shown = _keyed(log)
    done = _keyed(other)
    kinds = (shown.schema["user"], shown.schema["item"])
    if (done.schema["user"], done.schema["item"]) != kinds:
        return "ids of another type than the log's; not used"
    share, joined = _nearest(done, shown)
    if share < 0.05:
        return "its actions have no earlier impression of their user and item; not used"
    if joined.height >= 0.9 * shown.height and (joined["at"] == joined["shown"]).all():
        return "has a row for each impression; not used"
    arrived = arrival_of(other)
    if arrived is not None and _at_impression(joined) and not ARRIVED & set(words(arrived)):
        # The first time is that of the impression, so the later one is the action's.
        other = replace(other, time=replace(other.time, column=arrived))
        share, joined = _nearest(_keyed(other), shown)
        arrived = arrival_of(other)
    if arrived is None and set(words(other.time.column)) & (ARRIVED | TIME) <= ARRIVED:
        for earlier in _earlier_times(other):
            own_share, own = _nearest(_keyed(earlier), shown)
            if own_share >= 0.95 * share and not _at_impression(own):
                other, share, joined, arrived = earlier, own_share, own, other.time.column
                break
    if arrived is not None:
        share, joined = _nearest(_keyed(other, arrived), shown)
    lag = _hours(joined.select(pl.max_horizontal("at", "known") - pl.col("shown")).to_series())
    identity = _shared_id(log, other)
    hours = float(lag.quantile(0.99) or 0.0)
    return StreamFound(other, identity, share, hours, joined.height, arrived)


def _nearest(done: pl.DataFrame, shown: pl.DataFrame) -> tuple[float, pl.DataFrame]:
    """Actions with the time (`shown`) of their latest earlier impression, and their share."""
    near = done.sort("at").join_asof(
        shown.sort("at").select("user", "item", "at", pl.col("at").alias("shown")),
        on="at",
        by=["user", "item"],
        strategy="backward",
        check_sortedness=False,
    )
    joined = near.filter(pl.col("shown").is_not_null())
    return joined.height / max(1, near.height), joined


def _at_impression(joined: pl.DataFrame) -> bool:
    """Whether most actions have the time of their impression."""
    return int((joined["at"] == joined["shown"]).sum()) > 0.5 * joined.height


def _hours(durations: pl.Series) -> pl.Series:
    return durations.cast(pl.Int64) / 3_600_000_000


def later_times(events: Events) -> dict[str, pl.Series]:
    """Further columns of times in the unit of the events' own → hours after it in the sample."""
    sample, own = events.data.sample, moments_of(events.data.sample, events.time)
    found = {}
    for name in sample.columns:
        if name not in events.columns and unit_of(sample[name]) == events.time.unit:
            at = moments_of(sample, Time(name, events.time.unit))
            found[name] = _hours((at - own).drop_nulls())
    return found


def arrival_of(events: Events) -> str | None:
    """The column of the times of arrival: never before the action's time, and some after it.

    Of several it is one that is called so, and else the latest.
    """
    count = events.data.sample.height
    fitting = {
        name: (bool(ARRIVED & set(words(name))), float(delay.mean() or 0.0))  # type: ignore[arg-type]
        for name, delay in later_times(events).items()
        if not NO_ARRIVAL & set(words(name)) and _are_delays(delay, count)
    }
    return max(fitting, key=lambda name: fitting[name], default=None)


def _earlier_times(events: Events) -> Iterator[Events]:
    """The events with another column as their time, to which their own is a time of arrival."""
    count = events.data.sample.height
    for name, later in later_times(events).items():
        if _are_delays(-later, count):
            yield replace(events, time=replace(events.time, column=name))


def _are_delays(hours: pl.Series, count: int) -> bool:
    """Whether these are the delays of nearly all of the rows."""
    if len(hours) < max(1.0, 0.95 * count):
        return False
    ends = _quantile(hours, 0.01) >= 0 and _quantile(hours, 0.99) <= LONGEST_DELAY
    return ends and int((hours > 0).sum()) >= 0.01 * count


def _keyed(events: Events, arrived: str | None = None) -> pl.DataFrame:
    """User, item and time of the newest week, one row for each item of a request.

    Args:
        arrived: column of the times of arrival, which are the column `known`.
    """
    rows, known = events.data.newest(8), arrived or events.time.column
    wanted = [events.user, events.item or events.shown, events.time.column, known]
    frame = rows.select(list(dict.fromkeys(wanted))).tail(3_000_000).collect()
    at = moments_of(frame, events.time).alias("at")
    frame = frame.select(
        pl.col(wanted[0]).alias("user"),
        pl.col(wanted[1]).alias("item"),
        pl.Series(at),
        pl.Series(moments_of(frame, replace(events.time, column=known)).alias("known")),
    )
    if events.shown:
        if frame.schema["item"] == pl.String:
            frame = frame.with_columns(pl.col("item").str.split(events.separator or " "))
        frame = frame.explode("item")
        if events.mark:
            frame = frame.with_columns(pl.col("item").str.replace(r"-[01]$", ""))
    return frame.drop_nulls()


def _shared_id(log: Events, other: Events) -> str | None:
    """A column of the same name in both with an id of impressions.

    It is called so, or has a value for each row of the log, by which the actions find the
    impressions of their user and item.
    """
    shown, done = log.data.sample, other.data.sample
    for name, dtype in done.schema.items():
        if name in other.columns | log.columns or name not in shown.schema:
            continue
        if dtype != shown.schema[name] or not (dtype.is_integer() or dtype == pl.String):
            continue
        if ACTED & set(words(name)):
            ids = log.data.newest(8).select(pl.col(name).unique()).collect()
            if done.join(ids, on=name, how="semi").height > 0.2 * done.height:
                return name
        elif log.item and shown[name].is_unique().all() and not shown[name].null_count():
            keys = {"user": log.user, "item": log.item}
            rows = log.data.newest(8).select(name, **{k: pl.col(c) for k, c in keys.items()})
            pairs = done.select(name, pl.col(other.user).alias("user"), item=other.item)
            found = pairs.join(rows.collect(), on=[name, *keys], how="semi", nulls_equal=False)
            if done.height and found.height >= 0.9 * done.height:
                return name
    return None


def without_zone(events: Events) -> bool:
    """Whether the times are local ones: without a zone, or texts without an offset."""
    column = events.data.sample[events.time.column]
    if events.time.unit == "datetime":
        return getattr(column.dtype, "time_zone", None) is None
    if events.time.unit != "iso":
        return False
    return not column.drop_nulls().str.contains(r"(?i)(Z|[+-]\d{2}:?\d{2})\s*$").any()
