"""The project file (TOML) as typed settings; an error names the key and the values allowed."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import tomllib
from datetime import date, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mtl_ranker.errors import ProjectError

Place = tuple[int | str, ...]  # of a key in the project file
IDENTIFIER = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
GIVEN = "timestamp given"  # whether the log has a timestamp, valid or not
TOO_LARGE = " is too large"  # after the name of an id of UInt64, whether no Int64 holds it
UNEVEN = " is of another length"  # after the name of a list, whether it is, of a request
STRAY = "clicked and not shown"  # whether a row is a click on no item of its request
CANONICAL = ("user_id", "item_id", "timestamp", "date", "position", "propensity")


def _identifier(value: str) -> str:
    if not IDENTIFIER.match(value):
        raise ValueError(f"{value!r} is not a plain name (letters, digits and _ only)")
    return value


Name = Annotated[str, Field(min_length=1)]
Device = Literal["auto", "cpu", "cuda", "mps"]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@functools.cache
def _time_zones() -> set[str]:
    """IANA's names; reading them takes milliseconds."""
    from zoneinfo import available_timezones

    return available_timezones()


class Range(Settings):
    """Closed interval a column's values must lie in; a missing end is open."""

    min: float | None = Field(None, description="smallest allowed value; default: none")
    max: float | None = Field(None, description="largest allowed value; default: none")


def _layout(value: str | None) -> str | None:
    """A name or pattern of folders of days, which must tell days apart."""
    if value is None or "%" not in value:
        return value
    finer = sorted(set(re.findall(r"%[HIMSfpXc]", value)))
    if finer:
        raise ValueError(
            f"{value!r} has {', '.join(finer)}; allowed: %Y, %m and %d. Folders below a day's, "
            "such as hour=07, are read without a pattern"
        )
    day = date(2026, 10, 31)
    try:
        read = datetime.strptime(day.strftime(value), value).date()
    except ValueError:
        read = None
    if read != day:
        raise ValueError(
            f"{value!r} does not tell days apart; allowed: a name such as 'date', or a pattern "
            "with %Y, %m and %d such as 'dt=%Y%m%d' or 'year=%Y/month=%m/day=%d'"
        )
    return value


TableFormat = Literal["parquet", "delta", "iceberg"]


class Versioned(Settings):
    """Rows that may be those of a Delta or Iceberg table.

    The path of a Delta table is its folder. Of an Iceberg table it is `namespace.table` in the
    catalog that pyiceberg's configuration names, or a metadata file (`….metadata.json`).
    """

    version: int | None = Field(
        None,
        ge=0,
        description="of a Delta table, or snapshot id of an Iceberg table; default: the latest",
    )

    @model_serializer(mode="wrap")
    def _as_set(self, handler: Any) -> dict[str, Any]:
        """Without a version or a format that is not set: digests of settings do not hold them."""
        content = handler(self)
        return {k: v for k, v in content.items() if v is not None or k not in ("version", "format")}


class Table(Versioned):
    """A table of users or items, joined to rows by its key: one row per key and day.

    Without `partition` and `valid_from`, rows of all days have the values that the table has
    today.
    """

    format: TableFormat | None = Field(None, description="default: the log's")
    path: str = Field(
        description="file or folder of Parquet, relative to the folder of the data, or a Delta or "
        "Iceberg table"
    )
    key: str = Field(description="column with the user's or item's id, one row per id and day")
    partition: str | None = Field(
        None,
        description="of the folders of dated snapshots, as of log.partition; a row of day D has "
        "the values of the latest snapshot of a day before D",
    )
    valid_from: Name | None = Field(
        None,
        description="column of the date or time from which on a row of the table is valid, null "
        "for always; a row of day D has the values that are valid at the start of D",
    )
    valid_to: Name | None = Field(
        None, description="column of the date or time at which that ends, null for never"
    )
    columns: list[str] = Field(
        [], description="columns that rows get; features name them as they name the log's"
    )
    lists: dict[str, str] = Field({}, description="text column -> separator; becomes a list column")
    published: str | None = Field(
        None, description="date column from which an age in days is computed"
    )

    _check_partition = field_validator("partition")(_layout)

    @model_validator(mode="after")
    def _one_kind_of_date(self) -> Table:
        joined = self.joined
        twice = [name for name in dict.fromkeys(joined) if joined.count(name) > 1]
        if twice:
            raise ValueError(
                f"columns and lists: {', '.join(twice)} twice; allowed: each column once"
            )
        if self.valid_to is not None and self.valid_from is None:
            raise ValueError(f"valid_to: {self.valid_to!r}; allowed: with valid_from")
        if self.partition is not None and self.valid_from is not None:
            raise ValueError(
                f"partition: {self.partition!r}, and valid_from = {self.valid_from!r}; allowed: "
                "one of them"
            )
        return self

    @property
    def dated(self) -> bool:
        """Whether the table has the values of past days."""
        return self.partition is not None or self.valid_from is not None

    @property
    def joined(self) -> list[str]:
        """The columns that are joined to rows, beside the key and an age."""
        return [*self.columns, *self.lists]


TimestampUnit = Literal["s", "ms", "us", "ns", "datetime", "iso"]
DURATION = re.compile(r"^([0-9]+(?:\.[0-9]+)?)([smhd])$")


class Action(Versioned):
    """A stream of one kind of action (likes, purchases, answers) beside the impressions.

    Its name is a column of the impression. An action belongs to the impression of its impression
    id, or else to the nearest impression of the same user and item that is not after it, and to
    none if it is known (happened and arrived) more than `window` after that.
    """

    name: Name = Field(description="name of the column that impressions get")
    format: TableFormat | None = Field(None, description="default: the log's")
    path: str = Field(description="files or folders of days, as of the log")
    user: Name | None = Field(None, description="default: the log's; item and timestamp, too")
    item: Name | None = Field(None, description="default: the log's")
    timestamp: Name | None = Field(None, description="default: the log's")
    timestamp_unit: TimestampUnit | None = Field(None, description="default: the log's")
    impression: Name | None = Field(None, description="column of the impression's id")
    window: str = Field("1d", description="a number with s, m, h or d")
    value: Name | None = Field(None, description="a number; without it an action counts 1")
    reduce: Literal["any", "sum", "max", "first", "last"] = Field(
        "any",
        description="one value of an impression's actions: any is 1 if a value is not 0. Without "
        "an action any and sum are 0, max, first and last of values are missing",
    )
    arrived: Name | None = Field(
        None,
        description="column of the time from which on an action is known; default: timestamp. "
        "Folders may then be by the day of arrival",
    )
    organic: bool = Field(
        False, description="actions without an impression count in aggregates and histories"
    )

    _check_name = field_validator("name")(_identifier)

    @field_validator("window")
    @classmethod
    def _window(cls, value: str) -> str:
        found = DURATION.match(value)
        if found is None or float(found[1]) == 0:
            raise ValueError(
                f"{value!r} is no duration; allowed: a number above 0 with s, m, h or d, "
                "such as '30m' or '3d'"
            )
        return value

    @property
    def span(self) -> timedelta:
        """The window as a duration."""
        found = DURATION.match(self.window)
        assert found is not None
        unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[found[2]]
        return timedelta(**{unit: float(found[1])})

    @property
    def missing(self) -> float | None:
        """The value of an impression without an action."""
        return None if self.value and self.reduce in ("max", "first", "last") else 0.0


class Requests(Settings):
    """A log of one row a request, with lists of its items; an impression is an item of a row.

    Lists are native ones (List or Array), or text with a separator.
    """

    items: Name = Field(description="column of the list of items, in the order shown")
    clicked: Name | None = Field(
        None,
        description="column of the list of items that were clicked; a missing list gives missing "
        "labels, an empty one labels of 0",
    )
    mark: str | None = Field(
        None,
        min_length=1,
        description="in place of `clicked`: text between an item and its label, such as '-' in "
        "'N55689-1 N35729-0'",
    )
    label: str = Field("clicked", description="column of the labels: 1 if clicked, 0 if not")
    separator: str = Field(" ", min_length=1, description="of the items of a text")
    per_item: list[Name] = Field(
        [],
        description="further lists with a value for each item, such as its price, or null; a "
        "request with a list of another length than the items is quarantined",
    )

    _check_label = field_validator("label")(_identifier)

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> Requests:
        if self.clicked is not None and self.mark is not None:
            raise ValueError("mark: not with clicked; allowed: one of them")
        lists = [name for name in (self.items, self.clicked, *self.per_item) if name is not None]
        if len(set(lists)) < len(lists):
            raise ValueError(f"columns of lists are {lists}; allowed: each once")
        return self

    @property
    def labelled(self) -> bool:
        """Whether the log has a column of the clicked items."""
        return self.clicked is not None or self.mark is not None


REQUEST = "request"  # the column of the number of a request that has no id in the log


class Log(Versioned):
    """Where the impression log is stored and what its columns mean."""

    format: Literal["parquet", "delta", "iceberg", "census-income"] = Field(
        "parquet", description="census-income: the files of the UCI data set, for the studies"
    )
    path: str = Field(
        "log",
        description="folder or file of the impressions, relative to the folder of the data, or a "
        "Delta or Iceberg table",
    )
    user: Name = Field("user_id", description="column with the user's id")
    item: Name = Field("item_id", description="column with the item's id")
    timestamp: Name = Field("timestamp", description="column with the time of the impression")
    timestamp_unit: TimestampUnit = Field(
        "ms",
        description="unit of a number, or datetime (a column of that type), or iso (text); times "
        "without a zone are read in `timezone`",
    )
    timezone: str = Field(
        "UTC",
        description="IANA name of the zone in which days begin, and in which times without a zone "
        "are read: naive datetimes, and texts without an offset",
    )
    partition: str | None = Field(
        "date",
        description="of the days' folders: a name, for NAME=YYYY-MM-DD, or a pattern with %Y, %m "
        "and %d such as dt=%Y%m%d or year=%Y/month=%m/day=%d; null for an undivided log",
    )
    ready: str | None = Field(
        None,
        description="file that marks a day's folder as complete, such as _SUCCESS; without one a "
        "day is complete when its files have stopped changing",
    )
    day_tolerance_hours: float = Field(
        0.0, ge=0, le=24, description="how far outside its partition's day a timestamp may lie"
    )
    position: str | None = Field(
        None,
        description="position in the shown list, from 0 or 1; the model learns its bias",
    )
    propensity: str | None = Field(
        None, description="probability in (0, 1]; off-policy estimates need a position too"
    )
    propensity_of: Literal["item", "examination"] = Field(
        "item",
        description="item: P(item at its position | context, items of the list) under the logging "
        "policy; examination: P(position examined), the same for all items",
    )
    random_exposure: str | None = Field(
        None, description="flag column, 1 where the item was chosen at random"
    )
    context: list[str] = Field(
        [], description="columns known before the impression, which candidates have too"
    )
    list_by: list[Name] = Field(
        ["user_id"],
        alias="list",
        description="columns that, with the day, define which impressions make one list; user_id "
        "is one of them",
    )
    request: Name | None = Field(
        None,
        description="column with an id of the served list, in place of `list`; an impression "
        "without one is a list of its own",
    )
    required: list[str] = Field([], description="further columns that may not be null")
    ranges: dict[str, Range] = Field(
        {}, description="column -> allowed values; a row outside is quarantined"
    )
    unique: list[str] = Field(
        ["user_id", "item_id", "timestamp"], description="two events equal here are duplicates"
    )
    max_bad_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="a day with a larger share of quarantined rows is not published",
    )
    impression: Name | None = Field(
        None, description="column of an id by which actions name their impression"
    )
    actions: list[Action] = Field([], description="streams whose names are columns of impressions")
    requests: Requests | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="a row is a request. Without a table of items, log.items and log.clicked may "
        "be its columns",
    )
    users: Table | None = Field(None, description="table of users")
    items: Table | None = Field(None, description="table of items")

    @model_validator(mode="before")
    @classmethod
    def _short_requests(cls, value: Any) -> Any:
        """`items` as a text is `requests.items`; a request is a list, with positions."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if isinstance(value.get("items"), str):
            if value.get("requests") is not None:
                raise ValueError(
                    f"items: {value['items']!r} beside requests; allowed: requests.items"
                )
            value["requests"] = {"items": value.pop("items")}
            if "clicked" in value:
                value["requests"]["clicked"] = value.pop("clicked")
        if isinstance(value.get("requests"), dict):
            value = {"request": REQUEST, "position": "position"} | value
        return value

    @model_validator(mode="after")
    def _check_requests(self) -> Log:
        if self.requests is None:
            return self
        lists = [self.requests.items, self.requests.clicked]
        for setting in ("user", "item", "timestamp", "position", "request", "impression"):
            if getattr(self, setting) is not None and getattr(self, setting) in lists:
                raise ValueError(
                    f"{setting}: {getattr(self, setting)!r} is a list of requests; allowed: "
                    "another column"
                )
        if self.requests.label in (self.user, self.item, self.timestamp, *CANONICAL):
            raise ValueError(
                f"requests.label: {self.requests.label!r} is the name of another column; allowed: "
                "any other name"
            )
        return self

    @model_validator(mode="after")
    def _one_list(self) -> Log:
        if "user_id" not in self.list_by or len(set(self.list_by)) < len(self.list_by):
            raise ValueError(
                f"list: {self.list_by}; allowed: user_id and further columns, each once"
            )
        if self.request is not None and "list_by" in self.model_fields_set:
            if self.requests is not None and self.request == REQUEST:
                raise ValueError(
                    "list: not with items that name lists, as a row of the log is a list then; "
                    "allowed: without list"
                )
            raise ValueError("request: not with list; allowed: one of them")
        named = {"date", "user_id", "item_id", "timestamp", self.user, self.item, self.timestamp}
        wrong = [column for column in self.list_columns if column in named]
        if wrong:
            raise ValueError(
                f"list or request: {', '.join(wrong)}; allowed: columns beside user, item, time "
                "and day"
            )
        return self

    @property
    def joined_columns(self) -> set[str]:
        """The columns of the user and item tables that are joined to rows."""
        return {name for table in (self.users, self.items) if table for name in table.joined}

    @property
    def list_columns(self) -> list[str]:
        """The log's columns that, with day and user, define the list of an impression."""
        if self.request is not None:
            return [self.request]
        return [column for column in self.list_by if column != "user_id"]

    @property
    def list_keys(self) -> list[str]:
        """The columns of examples whose values, together, are those of one list."""
        return ["date", "user_id", *self.list_columns]

    @field_validator("timezone")
    @classmethod
    def _timezone(cls, value: str) -> str:
        if value not in _time_zones():
            near = difflib.get_close_matches(value, _time_zones(), 3)
            raise ValueError(f"{value!r} is no IANA time zone{_hint(near)}")
        return value

    _check_partition = field_validator("partition")(_layout)

    @model_validator(mode="after")
    def _check_formats(self) -> Log:
        """Settings of folders are not for tables, nor those of tables for files."""
        if self.format in ("delta", "iceberg"):
            if self.partition is not None and "%" in self.partition:
                raise ValueError(
                    f"partition: {self.partition!r} with format = {self.format!r}; allowed: the "
                    "name of a column with the day, or null"
                )
            if self.ready is not None:
                raise ValueError(
                    f"ready: {self.ready!r} with format = {self.format!r}; allowed: none, as a "
                    "table has a day as soon as it is committed"
                )
        named: list[tuple[str, Log | Table | Action | None]] = [("", self)]
        named += [("users.", self.users), ("items.", self.items)]
        named += [(f"actions[{n}].", action) for n, action in enumerate(self.actions)]
        for place, rows in named:
            if rows is None:
                continue
            own = rows.format or self.format
            if rows.version is not None and own not in ("delta", "iceberg"):
                raise ValueError(
                    f"{place}version: {rows.version} with format = {own!r}; allowed: with "
                    "'delta' or 'iceberg'"
                )
            if (
                isinstance(rows, Table)
                and rows.partition is not None
                and own in ("delta", "iceberg")
            ):
                raise ValueError(
                    f"{place}partition: {rows.partition!r} with format = {own!r}; allowed: with "
                    "'parquet'. A Delta or Iceberg table has past values by valid_from"
                )
        return self

    @property
    def layout(self) -> str | None:
        """The pattern of the days' folders, as of `strftime`; None for an undivided log."""
        name = self.partition
        return name if name is None or "%" in name else f"{name}=%Y-%m-%d"

    @model_validator(mode="after")
    def _check_actions(self) -> Log:
        names = [action.name for action in self.actions]
        if self.actions and self.format not in get_args(TableFormat):
            raise ValueError(
                f"actions: found with format = {self.format!r}; allowed: "
                f"{', '.join(map(repr, get_args(TableFormat)))}"
            )
        own: dict[str, list[Any]] = {
            "the log": [*CANONICAL, self.user, self.item, self.timestamp, self.impression],
            "log.context": self.context,
            "log.required": self.required,
            "log.ranges": list(self.ranges),
            "log.unique": self.unique,
        }
        for index, action in enumerate(self.actions):
            place = f"actions[{index}]"
            if action.name in names[:index]:
                raise ValueError(f"{place}.name: {action.name!r} is named twice; allowed: once")
            for where, columns in own.items():
                if action.name in columns:
                    raise ValueError(
                        f"{place}.name: {action.name!r} is also a column of {where}; allowed: any "
                        "other name, as an action is only known after its impression"
                    )
            if action.impression is not None and self.impression is None:
                raise ValueError(
                    f"{place}.impression: {action.impression!r}, but the log has none; allowed: "
                    "with log.impression, the column of the same id"
                )
        return self


class Objective(Settings):
    """One task: what is predicted, on which rows, and how much it matters."""

    name: Name = Field(description="name of the prediction's column")
    group: Literal["engagement", "satisfaction"] = Field(
        description="engagement or satisfaction, between which blends trade off"
    )
    kind: Literal["binary", "regression", "watch_time", "ordinal"] = Field(
        "binary",
        description="of the label: 0 or 1, a number, seconds >= 0 (watch_time), or a level",
    )
    label: str = Field(min_length=1, description="a column or a SQL expression over the event")
    where: str | None = Field(None, description="SQL condition; elsewhere the label is missing")
    weight: float = Field(1.0, gt=0, description="weight of this objective's loss")
    transform: Literal["identity", "log1p"] = Field(
        "identity",
        description="of the label of a regression in training; predictions are in its unit",
    )
    conditional_on: str | None = Field(
        None, description="binary objective without which this one cannot happen"
    )
    levels: Annotated[int, Field(ge=0)] | list[int] = Field(
        0,
        description="of an ordinal label: their number, for 0, 1, …, levels - 1, or all of them, "
        "such as [1, 2, 3, 4, 5]; the label that is learned and predicted counts from 0",
    )
    good: bool = Field(
        True, description="false: the less the better, so its blend weight counts against"
    )
    list_loss: Literal["none", "pairs", "rcr", "jrc", "combined_pair"] | None = Field(
        None,
        description="loss on the order of a list's rows, of a binary objective; default: pairs, "
        "with the weight training.pairwise",
    )
    list_weight: float = Field(1.0, gt=0, description="weight of list_loss beside cross-entropy")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Objective:
        if self.transform != "identity" and self.kind != "regression":
            raise ValueError(f"transform = {self.transform!r} is for kind = 'regression' only")
        if isinstance(self.levels, list):
            first = self.levels[0] if self.levels else 0
            if self.levels != list(range(first, first + len(self.levels))):
                raise ValueError(
                    f"levels: {self.levels}; allowed: a number, or whole numbers one after the "
                    "other, such as [1, 2, 3, 4, 5]"
                )
        if (self.kind == "ordinal") != (self.level_count > 0) or self.level_count == 1:
            raise ValueError("levels: needed, and at least 2, for kind = 'ordinal' only")
        if self.conditional_on is not None and self.kind != "binary":
            raise ValueError(
                f"conditional_on: for kind = 'binary' only, found kind = {self.kind!r}"
            )
        if self.conditional_on is not None and self.where is not None:
            raise ValueError(
                "where: not with conditional_on, whose label is known on every impression"
            )
        if self.list_loss not in (None, "none") and self.kind != "binary":
            raise ValueError(f"list_loss: for kind = 'binary' only, found kind = {self.kind!r}")
        if "list_weight" in self.model_fields_set and self.list_loss in (None, "none"):
            raise ValueError("list_weight: only with list_loss, which is not set")
        return self

    _check_name = field_validator("name")(_identifier)

    @property
    def level_count(self) -> int:
        """Number of levels of an ordinal label; 0 for other kinds."""
        return len(self.levels) if isinstance(self.levels, list) else self.levels

    @property
    def lowest(self) -> int:
        """The value of the lowest level."""
        return self.levels[0] if isinstance(self.levels, list) and self.levels else 0


class Categorical(Settings):
    column: str = Field(description="column of the log, its context or a table")
    min_count: int = Field(1, ge=1, description="rarer values share the unknown bucket")
    hash_buckets: int | None = Field(None, ge=2, description="hash instead of a vocabulary")
    share: str | None = Field(None, description="columns with one name here share embeddings")


class ListColumn(Settings):
    column: str = Field(description="column of lists, of the log or a table")
    min_count: int = Field(1, ge=1, description="rarer values share the unknown bucket")
    share: str | None = Field(None, description="as of categoricals")
    max_length: int = Field(8, ge=1, description="first values of a list that are read")


class History(Settings):
    """Each user's latest impressions with a positive signal, a sequence for target attention."""

    signal: Name = Field(description="objective or signal; impressions where it is above 0 count")
    columns: list[Name] = Field(min_length=1, description="of those, also categoricals or lists")
    length: int = Field(20, ge=1, le=500, description="of the latest impressions")

    @property
    def name(self) -> str:
        return f"history_{self.signal}"

    def feature(self, column: str) -> str:
        """The feature column that holds the history of `column`."""
        return f"{self.name}_{column}"


class Features(Settings):
    windows: list[Annotated[int, Field(ge=1, le=365)]] = Field(
        [1, 7], description="lengths in days of the windows over which events are summed"
    )
    smoothing: float = Field(20.0, gt=0, description="pseudo-impressions at the global rate")
    rates: Literal["absolute", "relative"] = Field(
        "absolute",
        description="relative: divided by the rate of all events in the window, so that a rate "
        "does not depend on the overall level, which changes from day to day; for signals >= 0",
    )
    entities: list[list[str]] = Field(
        [["user_id"], ["item_id"]],
        description='keys, such as ["user_id"] or ["user_id", "topic"], whose events are summed',
    )
    signals: dict[str, str] = Field({}, description="further SQL sums to aggregate: name -> expr")
    categoricals: list[Categorical] = Field([], description="features with an embedding per value")
    numerics: list[str] = Field([], description="numbers, Booleans, and dates, as age in days")
    derived: dict[str, str] = Field(
        {},
        description="further numbers: name -> SQL expression over log.context and columns of the "
        "user and item tables, such as '1 - price_shown / price'; missing where it is not finite",
    )
    lists: list[ListColumn] = Field(
        [], description="features that are lists of values; a list's embedding is their mean"
    )
    embeddings: list[Name] = Field(
        [],
        description="columns of vectors (lists or arrays of numbers of one length, null without "
        "one) of the user and item tables, read through a learned projection",
    )
    histories: list[History] = Field(
        [], description="each user's latest positive impressions, as far back as the longest window"
    )
    matches: Literal["auto", "share", "none"] = Field(
        "auto",
        description="features that indicate whether a column of the user table holds the item's "
        "value; auto: for columns of text with common values, and for columns with the same share",
    )
    groups: dict[str, list[str]] = Field(
        {}, description="named patterns of features (user_*), for experts that read only those"
    )
    block_rows: int = Field(
        1_000_000,
        ge=1,
        description="rows of whole users of a day that are joined at a time; days with more rows "
        "are stored by user",
    )
    numeric_encoding: Literal["piecewise_linear", "standardise"] = Field(
        "piecewise_linear", description="piecewise linear in bins, or mean 0 and variance 1"
    )
    bins: int = Field(
        8,
        ge=2,
        le=256,
        description="of the piecewise-linear encoding, with about equal numbers of rows",
    )
    tail_edges: int = Field(4, ge=0, le=16, description="further edges at most in each long tail")

    @field_validator("windows")
    @classmethod
    def _windows(cls, value: list[int]) -> list[int]:
        if not value or sorted(set(value)) != value:
            raise ValueError(f"{value} must hold at least one window, ascending, none twice")
        return value

    @model_validator(mode="after")
    def _check_sharing(self) -> Features:
        buckets: dict[str, set[int | None]] = {}  # shared name -> hash_buckets of its columns
        columns = [(c.share, c.hash_buckets) for c in self.categoricals]
        for share, count in [*columns, *((c.share, None) for c in self.lists)]:
            if share is not None:
                buckets.setdefault(share, set()).add(count)
        for name, counts in buckets.items():
            if len(counts) > 1:
                values = sorted(counts, key=lambda b: b or 0)
                raise ValueError(
                    f"share = {name!r}: hash_buckets {values}; allowed: the same for all its "
                    "columns, and none where a list shares"
                )
        return self

    @model_validator(mode="after")
    def _check_histories(self) -> Features:
        known = [c.column for c in self.categoricals] + [c.column for c in self.lists]
        for index, history in enumerate(self.histories):
            for column in history.columns:
                if column not in known:
                    raise ValueError(
                        f"histories[{index}].columns: {column!r} is among neither categoricals nor "
                        f"lists, so no item can be compared with it; allowed: {', '.join(known)}"
                    )
        signals = [history.signal for history in self.histories]
        if len(set(signals)) < len(signals):
            raise ValueError(f"histories: signals {signals}; allowed: each once")
        return self

    @field_validator("embeddings")
    @classmethod
    def _embeddings(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value}; allowed: each column once")
        return value

    @field_validator("entities")
    @classmethod
    def _entities(cls, value: list[list[str]]) -> list[list[str]]:
        for keys in value:
            if not keys:
                raise ValueError("an entity needs at least one key column")
            for key in keys:
                _identifier(key)
        return value


class Split(Settings):
    """Days counted back from the training date D (the last one is the newest)."""

    warmup_days: int = Field(2, ge=0, description="first days of a log: features only, no rows")
    train_days: int = Field(7, ge=1, description="days of the training rows")
    validate_days: int = Field(
        1, ge=1, description="days on which models stop, are chosen and calibrated"
    )
    test_days: int = Field(
        1, ge=1, description="last days, on which the winner and the champion are compared"
    )


class Training(Settings):
    seeds: list[int] = Field([0], description="each model is trained once with each seed")
    spread_seeds: int = Field(
        1,
        ge=0,
        description="with one seed: further trainings of the winner's model with other seeds, "
        "whose spread keeps promotion from taking luck for a gain",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        description="rows of a step; default: the power of two nearest to a hundredth of the "
        "training rows, from 64 to 2,048",
    )
    epochs: int = Field(
        30,
        ge=1,
        description="at most; a training stops `patience` epochs after its best one. The learning "
        "rate falls linearly to 0 over all of them",
    )
    patience: int = Field(
        2, ge=1, description="epochs without a better validation loss after which a training stops"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="of AdamW at the start; default: in proportion to the square root of the "
        "batch size, from 0.0007 for 256 rows or less to 0.002 for 2,048",
    )
    weight_decay: float = Field(1e-4, ge=0, description="of matrices")
    unknown_rate: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="share of categorical values replaced by the unknown value in training, so "
        "that the embedding of unseen ids is trained",
    )
    device: Device = Field(
        "auto",
        description="of trainings. auto: a CUDA device where there is one, else the CPU. On a GPU "
        "trainings run one after the other",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1_024,
        description="of a training; default: cores / jobs, at most OMP_NUM_THREADS",
    )
    jobs: int | None = Field(
        None,
        ge=1,
        le=1_024,
        description="trainings in parallel; default: up to one per core where that is faster",
    )
    balancing: Literal["fixed", "normalised", "uncertainty", "dwa", "gradnorm", "pcgrad"] = Field(
        "fixed", description="how the losses of objectives are weighted; fixed: by their weight"
    )
    pairwise: float = Field(
        0.0,
        ge=0,
        description="weight of a loss on pairs of one list (log.list), for binary objectives "
        "without their own list_loss",
    )
    sample_weight: str | None = Field(None, description="column or SQL expression over the event")
    immature: Literal["wait", "positives", "soft"] = Field(
        "wait",
        description="days on which actions of a label may still become known. wait: they are in "
        "no part of the split; positives: labels that may still change are missing, which for a "
        "binary one that actions only raise are those that are 0; soft: such a 0 counts in "
        "training as positive with the probability that its action has yet to come, and held-out "
        "rows are judged on labels that are final",
    )
    audit_rows: int = Field(
        20,
        ge=0,
        description="rows of the last test day whose features each night recomputes from what was "
        "known before them; 0 for none",
    )
    negative_keep: float = Field(
        1.0, gt=0, le=1, description="share of all-negative training rows kept, weighing 1/share"
    )
    start: Literal["scratch", "champion"] = Field(
        "scratch",
        description="champion: between full trainings, the champion's model alone is continued on "
        "the training days since its own",
    )
    full_every: int = Field(
        7, ge=1, description="days from one full training, of every model from scratch, to the next"
    )
    replay: float = Field(
        1.0,
        ge=0,
        le=1,
        description="rows of older training days in a continued training, drawn at random, per row "
        "of its new days",
    )
    continued_epochs: int = Field(1, ge=1, description="epochs of a continued training at most")
    keep_optimiser: bool = Field(
        True, description="continue with the champion's optimiser state too, not from an empty one"
    )
    shrink: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of shrink-and-perturb, before a training is continued: the champion's "
        "matrices and embeddings times this, plus `perturb` times those of a random start",
    )
    perturb: float = Field(0.0, ge=0, le=1, description="see shrink")
    contenders: Literal["all", "close"] = Field(
        "all",
        description="close: models that were never near the winner in the last `close_nights` "
        "nights that trained them are trained in full trainings only",
    )
    close_nights: int = Field(3, ge=1, description="see contenders")
    refit: bool = Field(
        True, description="train the winner on the validation days too before it is registered"
    )
    trees: int = Field(
        0,
        ge=0,
        description="boosted trees per objective at most: two contenders more, the winner averaged "
        "with them and the trees alone; 0 for none",
    )
    distill: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the probability by boosted trees, fitted on rows of other users, in "
        "the labels of a network's training rows; for binary objectives, in trainings from scratch",
    )
    position_dropout: float = Field(
        0.1, ge=0, lt=1, description="probability that a row's position is hidden in training"
    )
    sparse_rows: int = Field(
        200_000,
        ge=1,
        description="a larger embedding table gets sparse updates: only the batch's rows",
    )
    in_memory_rows: int = Field(
        5_000_000, ge=1, description="more training rows are streamed from encoded Parquet"
    )
    ranks: int | None = Field(
        None,
        ge=1,
        description="with --cluster: processes that share each batch of a training whose rows are "
        "streamed; default: those for which there is room on the cluster, divided by the trainings "
        "that wait",
    )
    checkpoint_seconds: float = Field(
        60.0, gt=0, description="between checkpoints, from which a killed training is resumed"
    )

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: list[int]) -> list[int]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"{value} must hold at least one seed, none twice")
        return value


class Calibrating(Settings):
    """How predictions are calibrated on the validation days."""

    method: Literal["platt", "isotonic", "none"] = Field(
        "platt", description="of binary objectives: a line on log-odds, steps, or no calibration"
    )
    by: str | None = Field(None, description="context column; one calibration map per value")
    min_positives: int = Field(
        50,
        ge=2,
        description="least positives and negatives of a map, of numbers labels other than 0; "
        "values with fewer share one",
    )
    refit_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the correction by a map of probabilities applied to a refit model, "
        "which was trained on the validation days; without refit_days",
    )
    refit_days: int = Field(
        0,
        ge=0,
        description="latest days, each left out of one further training, whose predictions a refit "
        "model's maps are fitted on (cross-fitting); 0 for refit_share of the winner's maps",
    )


class Promotion(Settings):
    """What a challenger must show before it becomes champion."""

    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval and verdict")
    max_calibration_ratio: float = Field(
        1.5, gt=1, description="r: sum of predictions over sum of labels lies in [1 / r, r]"
    )
    max_calibration_shift: float = Field(
        0.5, gt=0, description="largest mean shift of a binary objective's log-odds"
    )
    require_significance: bool = Field(
        True,
        description="the blended quality's interval must lie above 0; else above -tolerance, and "
        "no objective's difference below it",
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        description="without require_significance, and for a first model: allowed loss of blended "
        "quality; without require_significance also of each objective's own measure",
    )
    refit_margin: float = Field(
        0.005,
        ge=0,
        description="loss of blended quality on the test days that must be excluded, one-sided, "
        "before a refit model replaces the one that it was made from",
    )
    require_spread: bool = Field(
        True,
        description="the spread of training seeds must be known, so that no model is promoted by "
        "the luck of its seed; it takes two training.seeds, or training.spread_seeds of 1 or more. "
        "Without it: the interval of one training covers users only",
    )
    max_seconds_per_million: float = Field(
        120.0, gt=0, description="time to score a million raw rows, measured in a fresh process"
    )
    max_megabytes: float = Field(500.0, gt=0, description="size of the artifact's folder")


class DriftRules(Settings):
    """Thresholds at which a held-out day's drift from the training days warns or fails."""

    warn_volume: float = Field(0.5, gt=0, description="relative change of a day's rows")
    fail_volume: float | None = Field(
        None, gt=0, description="above it the training is refused; default: never"
    )
    warn_label: float = Field(0.5, gt=0, description="relative change of a label's mean")
    fail_label: float | None = Field(
        None, gt=0, description="above it the training is refused; default: never"
    )
    warn_nulls: float = Field(0.2, gt=0, description="rise of a feature's share of missing values")
    fail_nulls: float | None = Field(
        None, gt=0, description="above it the training is refused; default: never"
    )
    warn_psi: float = Field(0.25, gt=0, description="population stability index")
    fail_psi: float | None = Field(
        None, gt=0, description="above it the training is refused; default: never"
    )


class OffPolicy(Settings):
    """When an off-policy estimate has enough support to be printed, and of which policy."""

    min_support: float = Field(200.0, gt=0, description="least effective sample size")
    keep: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of random exposures the policy shows: the best of each 1 / keep, "
        "rounded, at least 2",
    )


class ListTable(Settings):
    """A Parquet file whose rows name users, items, pairs or values of another column."""

    path: Name = Field(description="relative to the folder of the data")
    key: list[Name] = Field(
        min_length=1,
        description="columns of the file: user_id and item_id (or the log's names for them), "
        "context columns, and columns of the user and item tables",
    )


class AtMost(Settings):
    """At most `count` items with one value of a column in any `within` consecutive ranks."""

    column: Name = Field(description="context column, or column of the item table")
    count: int = Field(ge=1, description="most items with one value")
    within: int = Field(ge=2, description="ranks in a row")


class Fresh(Settings):
    """At least `count` of the ranks 1 to `within`, of the next `within`, … are fresh items."""

    count: int = Field(ge=1, description="least fresh items")
    within: int = Field(ge=1, description="ranks of a window")
    days: int = Field(ge=0, description="age up to which an item is fresh (log.items.published)")

    @model_validator(mode="after")
    def _check_count(self) -> Fresh:
        if self.count > self.within:
            raise ValueError(f"count = {self.count}; allowed: at most within = {self.within}")
        return self


class Diversity(Settings):
    """Maximal marginal relevance on a column: items like those that are shown rank lower."""

    column: Name = Field(
        description="of values, which are alike if they are equal, or of the item table's content "
        "embeddings, lists of numbers, whose similarity is the cosine"
    )
    weight: float = Field(gt=0, lt=1, description="of diversity; 1 - weight is the score's")


class Rules(Settings):
    """What a ranked list must fulfil, applied after the blend (docs/lists.md)."""

    seen_days: int = Field(
        0, ge=0, description="drop items that the user was shown in this many days before D"
    )
    block: list[ListTable] = Field([], description="drop candidates that match a row")
    allow: list[ListTable] = Field([], description="drop candidates that match no row")
    at_most: list[AtMost] = Field([], description="bounds on items with one value; each a table")
    fresh: Fresh | None = Field(None, description="least number of fresh items")
    mmr: Diversity | None = Field(None, description="a list of different values")

    @property
    def columns(self) -> dict[str, str]:
        """Setting → the column that it reads, of rules on the whole list."""
        named = {f"at_most[{n}].column": rule.column for n, rule in enumerate(self.at_most)}
        return named if self.mmr is None else named | {"mmr.column": self.mmr.column}

    @property
    def tables(self) -> list[tuple[str, ListTable]]:
        """The block and allow lists, each with its setting."""
        named = {"block": self.block, "allow": self.allow}
        return [(f"{how}[{n}]", table) for how, all in named.items() for n, table in enumerate(all)]

    @property
    def names(self) -> list[str]:
        """The rules that are set."""
        return [name for name, value in self if value]

    @property
    def read(self) -> dict[str, list[str]]:
        """Setting → the columns that it reads, of every rule."""
        keys = {f"{setting}.key": table.key for setting, table in self.tables}
        return keys | {setting: [column] for setting, column in self.columns.items()}


class Exploration(Settings):
    """Rankings by scores with Gumbel noise, for a share of the users (docs/lists.md)."""

    temperature: float = Field(
        ge=0.05,
        description="of the noise, in standard deviations of the scores of a user's candidates",
    )
    share: float = Field(0.05, gt=0, le=1, description="of the users, drawn anew every day")
    seed: int = Field(0, ge=0, lt=2**63, description="of the noise")


class Scoring(Settings):
    publish: str | None = Field(
        None,
        description="folder, relative to the current one, or address (s3://, gs://, az://) of a "
        "Delta table that each day's ranking is written to as well (docs/stores.md)",
    )
    candidates: str | None = Field(
        None,
        description="file, or folder of days in the log's layout, of user, item and context",
    )
    eligible: Name | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Boolean column of the item table; only items with a true value are candidates",
    )
    top_k: int = Field(20, ge=1, description="length of each user's ranked list")
    blend: Literal["weighted_sum", "weighted_product"] = Field(
        "weighted_sum", description="sum of weight x prediction, or product of prediction ^ weight"
    )
    weights: dict[str, float] = Field(
        {},
        description="objective -> weight; missing ones weigh 1. What is bad counts against: it has "
        "good = false, or a weight below 0",
    )
    conditional: list[Name] = Field(
        [],
        description="objectives with a condition `where` that enter the blend as predicted given "
        "it; others are multiplied by the probability of the condition, if it is an objective",
    )
    maximise: Literal["engagement", "satisfaction"] | None = Field(
        None,
        description="group of objectives for which each night chooses the winner's weights on the "
        "validation days; with `keep`",
    )
    keep: dict[Literal["engagement", "satisfaction"], Annotated[float, Field(gt=0, le=1)]] = Field(
        {},
        description="the other group -> least share of its NDCG@10 under `weights` that the chosen "
        "weights must have",
    )
    device: Device = Field("auto", description="of the network's predictions; see training.device")
    block_rows: int = Field(
        131_072, ge=1, description="rows of candidates, of whole users, scored at a time per core"
    )
    generated_items: int = Field(
        50,
        ge=1,
        description="most shown recent items, for each user, where no candidates are given",
    )
    generated_users: int | None = Field(
        None,
        ge=1,
        description="of those with most impressions on the last day; default: all",
    )
    rules: Rules = Field(Rules(), description="what lists must fulfil")
    exploration: Exploration | None = Field(
        None, description="randomised lists for a share of the users; default: none"
    )

    @model_serializer(mode="wrap")
    def _as_set(self, handler: Any) -> dict[str, Any]:
        """Without `publish`, by which no ranking changes: digests of settings do not hold it."""
        return {key: value for key, value in handler(self).items() if key != "publish"}

    @model_validator(mode="after")
    def _check_keep(self) -> Scoring:
        other = {"engagement": "satisfaction", "satisfaction": "engagement"}
        allowed = [other[self.maximise]] if self.maximise is not None else []
        if list(self.keep) != allowed:
            wanted = f"{{ {allowed[0]} = 0.99 }}" if allowed else "none without maximise"
            raise ValueError(f"keep: {dict(self.keep)}; allowed: {wanted}")
        return self

    @model_validator(mode="after")
    def _order_is_free(self) -> Scoring:
        """The propensity of an order is known where no rule restricts the order."""
        if self.exploration is None:
            return self
        windows = {f"at_most[{n}]": r.within for n, r in enumerate(self.rules.at_most)}
        if self.rules.fresh is not None:
            windows["fresh"] = self.rules.fresh.within
        for name, within in windows.items():
            if within < self.top_k:
                raise ValueError(
                    f"rules.{name}.within = {within} restricts the order of lists of top_k = "
                    f"{self.top_k}, so that with [scoring.exploration] the propensity of an item's "
                    "position is not known; allowed: within of at least top_k"
                )
        return self


class Project(Settings):
    """All settings of a project."""

    name: Name = Field(
        "project", description="name of the registered model and of the experiment in MLflow"
    )
    log: Log = Field(Log(), description="where the log is and what its columns mean")
    objectives: list[Objective] = Field(min_length=1, description="what is predicted")
    features: Features = Field(Features(), description="what predictions are made from")
    split: Split = Field(Split(), description="days of training, validation and test")
    models: dict[str, dict[str, Any]] = Field(
        default={
            "single_task": {"preset": "single_task"},
            "shared_bottom": {"preset": "shared_bottom"},
            "omoe": {"preset": "omoe"},
            "mmoe": {"preset": "mmoe"},
        },
        min_length=1,
        description="NAME -> preset and its sizes (docs/models.md)",
    )
    training: Training = Field(Training(), description="how models are trained")
    calibration: Calibrating = Field(Calibrating(), description="how predictions are calibrated")
    promotion: Promotion = Field(Promotion(), description="when a challenger becomes champion")
    off_policy: OffPolicy = Field(OffPolicy(), description="when an off-policy estimate is printed")
    drift: DriftRules = Field(DriftRules(), description="which changes of the data warn or fail")
    scoring: Scoring = Field(Scoring(), description="how candidates are ranked")

    _source_text: str = PrivateAttr("")
    _check_name = field_validator("name")(_identifier)

    @model_validator(mode="after")
    def _consistent(self) -> Project:
        names = [objective.name for objective in self.objectives]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"objectives: {twice} named twice")
        by_name = {objective.name: objective for objective in self.objectives}
        for index, objective in enumerate(self.objectives):
            chain, parent = [objective.name], objective.conditional_on
            while parent is not None:
                if parent not in by_name or by_name[parent].kind != "binary":
                    allowed = [o.name for o in self.objectives if o.kind == "binary"]
                    raise ValueError(
                        f"objectives[{index}].conditional_on: {parent!r} is no binary objective; "
                        f"allowed: {allowed}"
                    )
                if parent in chain:
                    raise ValueError(
                        f"objectives[{index}].conditional_on: {chain} depend on each other"
                    )
                chain.append(parent)
                parent = by_name[parent].conditional_on
        if self.training.negative_keep < 1 and all(o.kind != "binary" for o in self.objectives):
            raise ValueError("training.negative_keep: needs at least one binary objective")
        self._check_distillation()
        for name in self.scoring.weights:
            if name not in names:
                raise ValueError(f"scoring.weights: {name!r} is no objective; allowed: {names}")
        groups = {objective.group for objective in self.objectives}
        if self.scoring.maximise is not None and len(groups) < 2:
            raise ValueError(
                f"scoring.maximise: all objectives are of group {groups.pop()!r}; it needs both "
                "engagement and satisfaction"
            )
        for name in self.scoring.conditional:
            allowed = [o.name for o in self.objectives if o.where is not None]
            if name not in allowed:
                raise ValueError(
                    f"scoring.conditional: {name!r} is no objective with `where`; "
                    f"allowed: {allowed}"
                )
        self._check_rules()
        if self.calibration.by is not None and self.calibration.by not in self.log.context:
            raise ValueError(
                f"calibration.by: {self.calibration.by!r} is no context column; "
                f"allowed: log.context ({', '.join(self.log.context) or 'empty'})"
            )
        for signal in self.features.signals:
            _identifier(signal)
            if signal in names:
                raise ValueError(f"features.signals: {signal!r} is already an objective")
        for name in self.features.derived:
            _identifier(name)
            if name in self.features.numerics:
                raise ValueError(
                    f"features.derived: {name!r} is also in features.numerics; allowed: in one of "
                    "them, as derived features are numbers"
                )
        self._check_embeddings()
        for index, history in enumerate(self.features.histories):
            if history.signal not in {*names, *self.features.signals}:
                raise ValueError(
                    f"features.histories[{index}].signal: {history.signal!r} is no objective or "
                    f"signal; allowed: {', '.join([*names, *self.features.signals])}"
                )
        for name in self.models:
            _identifier(name)
        return self

    def _check_distillation(self) -> None:
        """Raise ValueError for settings that need true labels of training rows."""
        training = self.training
        if not training.distill:
            return
        for setting, value, allowed in (
            ("start", training.start, "scratch"),
            ("negative_keep", training.negative_keep, 1.0),
        ):
            if value != allowed:
                raise ValueError(
                    f"training.distill: {training.distill} with training.{setting} = {value!r}; "
                    f"allowed: with {setting} = {allowed!r}"
                )
        if all(o.kind != "binary" for o in self.objectives):
            raise ValueError("training.distill: needs at least one binary objective")

    def _check_embeddings(self) -> None:
        """Raise ValueError for vectors that no table has, or that are another feature too."""
        features, tables = self.features, (self.log.users, self.log.items)
        known = [column for table in tables if table is not None for column in table.columns]
        others = {c.column for c in features.categoricals} | {c.column for c in features.lists}
        for column in features.embeddings:
            if column not in known:
                raise ValueError(
                    f"features.embeddings: {column!r} is no column of a table; allowed: those in "
                    f"log.users.columns and log.items.columns ({', '.join(known) or 'none'})"
                )
            if column in others | {*features.numerics, *features.derived}:
                raise ValueError(
                    f"features.embeddings: {column!r} is another feature too; allowed: one of them"
                )

    def _check_rules(self) -> None:
        """Raise ValueError for a column of `[scoring]` that candidates do not have."""
        log, rules = self.log, self.scoring.rules
        if self.scoring.eligible is not None and log.items is None:
            raise ValueError(
                f"scoring.eligible: {self.scoring.eligible!r}; allowed: a column of the item "
                "table, log.items, which is not set"
            )
        tables = [table.columns for table in (log.users, log.items) if table is not None]
        known = list(dict.fromkeys([*log.context, *(c for columns in tables for c in columns)]))
        for setting, column in rules.columns.items():
            if column not in known:
                raise ValueError(
                    f"scoring.rules.{setting}: {column!r} is no column of the candidates; allowed: "
                    f"log.context and columns of log.users and log.items "
                    f"({', '.join(known) or 'none'})"
                )
        keys = ["user_id", "item_id", log.user, log.item, *known]
        for setting, table in rules.tables:
            for column in table.key:
                if column not in keys:
                    raise ValueError(
                        f"scoring.rules.{setting}.key: {column!r}; allowed: "
                        f"{', '.join(dict.fromkeys(keys))}"
                    )
        if rules.fresh is not None and (log.items is None or log.items.published is None):
            raise ValueError("scoring.rules.fresh: needs the items' days, log.items.published")

    def digest(self, *sections: str) -> str:
        """Short hash of the named sections (all of them when none is named)."""
        content = self.model_dump(mode="json")
        chosen = {key: content[key] for key in sections} if sections else content
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def source_text(self) -> str:
        """The TOML text this project was read from; stored in the model artifact."""
        return self._source_text

    @property
    def blend_weights(self) -> dict[str, float]:
        """Objective → weight in the blend, not above 0 for one with `good = false`."""
        given = {o.name: self.scoring.weights.get(o.name, 1.0) for o in self.objectives}
        return {o.name: given[o.name] if o.good else -abs(given[o.name]) for o in self.objectives}

    @property
    def bad(self) -> set[str]:
        """The objectives that count against a ranking."""
        weights = self.blend_weights
        return {o.name for o in self.objectives if not o.good or weights[o.name] < 0}


def preset_names() -> list[str]:
    folder = resources.files("mtl_ranker") / "presets"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith("toml"))


def load_project(preset_or_file: str) -> Project:
    """Read a project file, or a preset that ships with the package.

    Raises ProjectError naming the key, what was found and what is allowed.
    """
    return parse_project(*read_project_text(preset_or_file))


def read_project_text(preset_or_file: str) -> tuple[str, str]:
    """The TOML text and the name to use for it in messages."""
    if preset_or_file in preset_names():
        file = resources.files("mtl_ranker") / "presets" / f"{preset_or_file}.toml"
        return file.read_text("utf-8"), f"preset {preset_or_file}"
    path = Path(preset_or_file)
    if not path.is_file():
        raise ProjectError(
            f"--config {preset_or_file}: no such file, and no preset of that name; "
            f"presets: {', '.join(preset_names())}"
        )
    try:
        return path.read_text("utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise ProjectError(f"{path}: not UTF-8 text ({error})") from error


# Keys of earlier versions, as places in the file, and their names now; None for keys without use.
# `*` is any name or index.
RENAMED: dict[tuple[str, ...], str | None] = {
    ("objectives", "*", "after"): "conditional_on",
    ("models", "*", "embedding_width"): "embedding_dim",
    ("models", "*", "closeness"): "l2_weight",
    ("promotion", "better_beyond_doubt"): "require_significance",
    ("promotion", "max_calibration_error"): "max_calibration_shift",
    ("promotion", "bootstrap"): None,
}


def parse_project(text: str, source: str, rename: bool = False) -> Project:
    """Settings from a project file's text.

    Args:
        source: the file's name, for messages.
        rename: read keys of earlier versions by their new names, as in the project file of a saved
            model. Otherwise a renamed key is refused with its new name.

    Raises ProjectError naming each key that is wrong, what was found and what is allowed.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProjectError(f"{source}: not valid TOML: {error}") from error
    renamed = _renamed_keys(content)
    if renamed and not rename:
        lines = [
            f"  {_dotted(place)}: {f'renamed to {new}' if new else 'it has no use; remove it'}"
            for _, place, new in renamed
        ]
        raise ProjectError("\n".join([f"{source}:", *lines]))
    for table, place, new in renamed:
        value = table.pop(str(place[-1]))
        if new is not None:
            table[new] = value
    try:
        project = Project.model_validate(content)
        project._source_text = text
        return project
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ProjectError(f"{source}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _renamed_keys(content: dict[str, Any]) -> list[tuple[dict[str, Any], Place, str | None]]:
    """Keys of earlier versions: the table that holds each, its place, and its name now."""
    renamed: list[tuple[dict[str, Any], Place, str | None]] = []

    def search(value: Any, place: Place, rest: tuple[str, ...], new: str | None) -> None:
        key, *more = rest
        if key == "*":
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, inner in items:
                search(inner, (*place, name), tuple(more), new)
        elif isinstance(value, dict) and key in value:
            if more:
                search(value[key], (*place, key), tuple(more), new)
            else:
                renamed.append((value, (*place, key), new))

    for old, new in RENAMED.items():
        if isinstance(content.get(old[0]), dict | list):
            search(content, (), old, new)
    return renamed


def _explain(problem: Any) -> str:
    place = _dotted(problem["loc"])
    kind = problem["type"]
    if kind == "extra_forbidden":
        allowed = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), allowed, 1)
        return f"{place}: unknown key{_hint(near)}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{place}: missing; it is required"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error" and not place:
        return message
    if kind == "value_error":
        return f"{place}: {message}"
    value = problem["input"]
    return f"{place}: {message}; found {value!r} ({type(value).__name__})"


def _dotted(location: Place) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _fields_at(location: Place) -> list[str]:
    model: Any = Project
    for part in location:
        if isinstance(part, str) and isinstance(model, type) and issubclass(model, BaseModel):
            annotation = model.model_fields[part].annotation
            model = _inner_model(annotation)
    is_model = isinstance(model, type) and issubclass(model, BaseModel)
    return [f.alias or name for name, f in model.model_fields.items()] if is_model else []


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        model = _inner_model(inner)
        if model is not None:
            return model
    return None


def _hint(near: list[str]) -> str:
    return f" (did you mean {' or '.join(near)}?)" if near else ""
