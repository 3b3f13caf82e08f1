"""What the columns of a log and its tables may be: labels, context, features.

Guesses from names, types and samples. A column of the log that is neither a label nor known before
the impression by its name has no role, as a feature must not contain the outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from mtl_ranker.config import IDENTIFIER
from mtl_ranker.logs.discover import (
    KEY,
    Events,
    TableFound,
    named,
    separator_of,
    words,
)

ENGAGEMENT = named(
    "click clicks clicked clk ctr play plays played watch watched view viewed views open opened "
    "read dwell stay enter install installed download downloaded cart carted carts atc visit "
    "listen listened finish finished complete completed completion scroll tap tapped"
)
SATISFACTION = named(
    "like likes liked fav favorite favourite favorited favourited follow follows followed comment "
    "comments commented share shared shares forward forwarded rating ratings rated star stars "
    "survey satisfied satisfaction save saved bookmark bookmarked subscribe subscribed purchase "
    "purchases purchased buy bought order ordered orders conversion converted convert revenue gmv "
    "answer answers reply replied review reviewed thumbs upvote label target reward"
)
NEGATIVE = named(
    "hate dislike disliked dislikes report reported block blocked hide hidden skip skipped return "
    "returned returns refund refunded unfollow unlike downvote complaint unsubscribe "
    "unsubscribed cancel cancelled canceled uninstall uninstalled mute muted"
)
OUTCOME = ENGAGEMENT | SATISFACTION | NEGATIVE
BEFORE = named(
    "surface tab device platform os browser channel placement section page screen network locale "
    "language hour weekday country city region price discount currency query source medium "
    "referrer campaign layout app version slot_type is_weekend daypart"
)
POSITION = named("position pos rank slot place")
REQUEST = named("request req impression search query list slate page session")
DAY_WORDS = named(
    "published publish upload uploaded created release released added listed launch launched "
    "available since"
)
FEW = 12  # values of a number up to which it is a category
MANY = 2_000  # values of a category at most
LEAST = 10  # rows with and without an action, for an objective
LEAST_MEAN = 1e-12  # of a number for which a weight is proposed


@dataclass(frozen=True)
class Label:
    """A column, or action, of which an objective or a signal is made.

    Attributes:
        kind: as of an objective.
        group: "engagement", "satisfaction", or "" for what is bad.
        count: rows of the sample in which it is above 0.
        mean: of the values above 0.
    """

    name: str
    column: str
    kind: str
    group: str
    count: int
    mean: float = 1.0

    @property
    def expression(self) -> str:
        """The column in SQL."""
        try:
            plain = pl.sql_expr(self.column).meta.root_names() == [self.column]
        except pl.exceptions.PolarsError:
            plain = False
        return self.column if plain else '"' + self.column.replace('"', '""') + '"'


@dataclass(frozen=True)
class LogColumns:
    """The roles of a log's columns.

    Attributes:
        unknown: columns without a role.
    """

    labels: list[Label] = field(default_factory=list)
    context: list[str] = field(default_factory=list)
    position: str | None = None
    request: str | None = None
    random: str | None = None
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TableColumns:
    """The features that a table offers.

    Attributes:
        lists: text column → separator.
        native: lists that are no text.
        vectors: lists of floats, all of one length.
        derived: numbers whose names are those of actions.
    """

    categoricals: list[str] = field(default_factory=list)
    numerics: list[str] = field(default_factory=list)
    lists: dict[str, str] = field(default_factory=dict)
    native: list[str] = field(default_factory=list)
    published: str | None = None
    derived: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        return [*self.categoricals, *self.numerics, *self.native, *self.vectors]


def group_of(name: str) -> str:
    """The group of the objective that a name suggests, "" for a bad outcome."""
    parts = set(words(name))
    if parts & NEGATIVE:
        return ""
    return "satisfaction" if parts & SATISFACTION else "engagement"


def log_columns(log: Events, identity: str | None) -> LogColumns:
    """The roles of the log's columns beside user, item and time.

    Args:
        identity: the column of an id of impressions, if any.
    """
    sample = log.data.sample
    request = _request_id(log)
    labels: list[Label] = []
    context: list[str] = []
    unknown: list[str] = []
    position = random = None
    for name in sample.columns:
        if name in log.columns or name in (identity, request, "date"):
            continue
        column, parts = sample[name], set(words(name))
        flag = _is_flag(column)
        if parts & {"rand", "random", "randomised", "randomized", "explore", "exploration"}:
            if flag and random is None:
                random = name
            else:
                unknown.append(name)
        elif parts & {"propensity", "prob", "probability"} or (log.shown and parts & OUTCOME):
            unknown.append(name)
        elif parts & OUTCOME and (flag or _is_number(column)) and not parts & KEY:
            labels.append(_label(name, column, flag))
        elif parts & POSITION and position is None and _is_position(column) and not log.shown:
            position = name
        elif parts & BEFORE and _is_context(column):
            context.append(name)
        else:
            unknown.append(name)
    if log.clicked is not None or log.mark is not None:
        clicks = sample[log.clicked].drop_nulls() if log.clicked else sample[log.shown]
        labels.insert(0, Label("click", "clicked", "binary", "engagement", len(clicks)))
    return LogColumns(labels, context, position, request, random, unknown)


def _is_flag(column: pl.Series) -> bool:
    values = column.drop_nulls().unique()
    if column.dtype == pl.Boolean:
        return True
    return (
        column.dtype.is_numeric()
        and len(values) > 0
        and bool(((values == 0) | (values == 1)).all())
    )


def _is_number(column: pl.Series) -> bool:
    low = column.min() if column.dtype.is_numeric() else None
    return isinstance(low, int | float) and low >= 0


def _is_position(column: pl.Series) -> bool:
    high = column.max() if column.dtype.is_integer() else None
    return isinstance(high, int) and high <= 10_000 and _is_number(column)


def _is_context(column: pl.Series) -> bool:
    if column.dtype.is_float():
        return True
    kind = column.dtype.is_integer() or column.dtype in (pl.String, pl.Boolean)
    return kind and column.n_unique() <= MANY


def _label(name: str, column: pl.Series, flag: bool) -> Label:
    plain = "_".join(words(name))
    plain = plain if IDENTIFIER.match(plain) else f"label_{plain}"
    numbers = column.cast(pl.Float64)
    above = numbers.filter((numbers > 0) & numbers.is_finite())
    positive = len(above)
    if flag:
        other = column.len() - column.null_count() - positive
        return Label(plain, name, "binary", group_of(name), min(positive, other))
    mean = above.mean()
    mean = mean if isinstance(mean, float) and LEAST_MEAN < mean < 1 / LEAST_MEAN else 1.0
    return Label(plain, name, "regression", group_of(name), positive, mean)


def _request_id(log: Events) -> str | None:
    """A column whose values are each of one user, and of several rows (or of any request)."""
    sample = log.data.sample
    for name, dtype in sample.schema.items():
        called = set(words(name)) & REQUEST and set(words(name)) & KEY
        if name in log.columns or not called or not (dtype.is_integer() or dtype == pl.String):
            continue
        known = sample.select(name, log.user).drop_nulls()
        pairs, ids = known.unique().height, known[name].n_unique()
        repeated = known.height > 1.2 * ids
        if known.height and pairs == ids and (repeated or log.shown):
            return name
    return None


def table_columns(table: TableFound | None, taken: Sequence[str], items: bool) -> TableColumns:
    """The features of a table, by type and number of values.

    Args:
        taken: names that other columns have.
        items: whether it may be the time of an item's publication.
    """
    found = TableColumns()
    if table is None:
        return found
    rows = table.data.newest().head(200_000).collect()
    published = None
    for name, dtype in rows.schema.items():
        column, parts = rows[name], set(words(name))
        if name == table.key or name in table.valid:
            continue
        if name in taken or name in ("user_id", "item_id") or column.null_count() == len(column):
            found.unused.append(name)
            continue
        if items and published is None and parts & DAY_WORDS and _is_day(column):
            published = name
        elif parts & OUTCOME and dtype.is_numeric() and not parts & KEY:
            found.derived.append(name)
        elif _is_vector(column):
            found.vectors.append(name)
        elif isinstance(dtype, pl.List):
            inner = dtype.inner
            fits = inner == pl.String or inner.is_integer()
            (found.native if fits else found.unused).append(name)
        elif dtype == pl.String and (separator := separator_of(column)) is not None:
            found.lists[name] = separator
        else:
            _place(found, name, column)
    return TableColumns(
        found.categoricals, found.numerics, found.lists, found.native, published,
        found.derived, found.unused, found.vectors,
    )  # fmt: skip


def _is_vector(column: pl.Series) -> bool:
    """Whether values are floats, several and as many in each row."""
    inner = column.dtype.inner if isinstance(column.dtype, pl.List | pl.Array) else None
    if inner is None or not inner.is_float():
        return False
    lengths = column.drop_nulls().cast(pl.List(inner)).list.len().unique()
    return len(lengths) == 1 and lengths[0] > 1


def _place(found: TableColumns, name: str, column: pl.Series) -> None:
    """Put a column with one value a row among categories, numbers or what is not used."""
    dtype, values = column.dtype, column.drop_nulls().n_unique()
    repeated = values <= max(FEW, len(column) // 3)
    category = dtype in (pl.Boolean, pl.String) or isinstance(dtype, pl.Categorical | pl.Enum)
    category |= dtype.is_integer() and (values <= FEW or bool(set(words(name)) & KEY))
    if values < 2:
        found.unused.append(name)
    elif category and repeated:
        found.categoricals.append(name)
    elif dtype.is_numeric() and not category and dtype not in (pl.Int128, pl.UInt64):
        found.numerics.append(name)
    else:
        found.unused.append(name)


def _is_day(column: pl.Series) -> bool:
    if column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime):
        return True
    values = column.drop_nulls()
    if column.dtype == pl.String and len(values):
        return bool(values.str.contains(r"^\d{4}-\d{2}-\d{2}$").all())
    return False
