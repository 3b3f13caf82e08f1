"""`mtl-ranker init`: a first project file from what a folder holds, with questions as comments."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl

from mtl_ranker.config import CANONICAL, IDENTIFIER, Project, parse_project
from mtl_ranker.context import Source
from mtl_ranker.errors import ProjectError, counted
from mtl_ranker.features.days import last_final_day
from mtl_ranker.logs.discover import (
    Events,
    Found,
    Hints,
    StreamFound,
    TableFound,
    discover,
    later_times,
    named,
    without_zone,
    words,
)
from mtl_ranker.logs.roles import (
    LEAST,
    Label,
    LogColumns,
    TableColumns,
    group_of,
    log_columns,
    table_columns,
)
from mtl_ranker.logs.sources import open_source

WINDOWS = ("30m", "1h", "3h", "6h", "12h", "1d", "2d", "3d", "7d", "14d")
HOURS = (0.5, 1, 3, 6, 12, 24, 48, 72, 168, 336)
SURFACES = {"surface", "tab", "page", "placement", "section", "channel", "screen"}
MAKERS = named("author creator brand category topic publisher channel artist genre shop")
WIDTH = 100
OBJECTIVES = 2  # of each group
# Headings of the two parts of a project file, as in the presets.
DESCRIBE = (
    "# ==================== Describe your log ====================",
    "# Columns, tables, objectives, and what the ranking is for. Adapt this part to your data.",
)
TUNING = (
    "# ==================== Tuning; usually leave ====================",
    "# Without these settings the defaults apply.",
)
LIKELY_DUPLICATES = 0.03  # share of a day's rows, from which `max_bad_share` is raised


def write_project_file(data: Path, out: Path, hints: Hints | None = None) -> Iterator[str]:
    """Write a project file for a folder; yields what was found, and what is unsure.

    Raises ProjectError where the file exists, for a folder without a log, and for a log without
    labels. Nothing is written then.
    """
    if out.exists():
        raise ProjectError(f"--out {out}: exists; allowed: a file that does not exist")
    found = discover(data, hints)
    draft = Draft.of(found, data)
    text = draft.text()
    try:
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
            file.write(text)
    except OSError as error:
        raise ProjectError(f"--out {out}: cannot be written ({error.strerror})") from error
    yield from _found_lines(draft)
    unsure = [*draft.unsure, *found.notes]
    yield from (f"unsure  {line}" for line in unsure)
    yield f"wrote   {out}; next: mtl-ranker check --config {out} --data {data}"


def _found_lines(draft: Draft) -> Iterator[str]:
    found, log = draft.found, draft.found.log
    days = f"{counted(len(draft.days), 'day')}, {draft.days[0]} to {draft.days[-1]}"
    what = f"requests with {log.shown!r}" if log.shown else f"item {log.item!r}"
    yield f"found   log {log.data.path}: {days}; user {log.user!r}, {what}, time {_time(log)}"
    for name, stream in draft.streams.items():
        yield (
            f"found   actions {name} in {stream.events.data.path}: {stream.joined:.0%} have an "
            f"earlier impression, 99 % within {_span(stream.hours)}"
        )
    for which, table in (("users", found.users), ("items", found.items)):
        if table is not None:
            yield f"found   {which} {table.data.path} by {table.key!r}"
    if found.candidates is not None:
        yield f"found   candidates {found.candidates}"
    yield f"found   objectives {', '.join(label.name for label in draft.objectives)}"


def _time(log: Events) -> str:
    return f"{log.time.column!r} ({log.time.unit})"


@dataclass(frozen=True)
class Draft:
    """The contents of a project file.

    Attributes:
        streams: name of an action → its stream.
        signals: labels that are no objectives.
        extra: lines of `[log]` and further tables that the log's values ask for.
        unsure: questions.
    """

    found: Found
    name: str
    days: list[date]
    streams: dict[str, StreamFound]
    log: LogColumns
    objectives: list[Label]
    signals: list[Label]
    users: TableColumns
    items: TableColumns
    bad_share: float
    split: tuple[int, int] | None
    unsure: list[str]

    @classmethod
    def of(cls, found: Found, data: Path) -> Draft:
        """Choose objectives and features, and fit the split to the days.

        Raises ProjectError for a log without a label.
        """
        identity = next((s.impression for s in found.streams if s.impression), None)
        columns = log_columns(found.log, identity)
        names = found.log.data.sample.columns
        streams = _names(found, names)
        acted = [
            Label(name, name, "binary", group_of(name), stream.count)
            for name, stream in streams.items()
        ]
        labels = [*columns.labels, *acted]
        objectives = [
            label for group in ("engagement", "satisfaction") for label in _best(labels, group)
        ]
        bad = [label for label in _best(labels, "") if label.kind == "binary"]
        if not objectives:
            raise ProjectError(
                f"{data / found.log.data.path}: no column or stream of actions looks like a label "
                f"with at least {LEAST} rows of 1 and of 0; columns: {', '.join(names)}; allowed: "
                "names such as click, like, purchase, rating"
            )
        users = table_columns(found.users, names, items=False)
        items = table_columns(found.items, [*names, *users.columns, *users.lists], items=True)
        objectives += bad
        chosen = {label.name for label in objectives}
        draft = cls(
            found=found,
            name=_identifier(data.resolve().name),
            days=[],
            streams=streams,
            log=columns,
            objectives=objectives,
            signals=[label for label in labels if label.name not in chosen],
            users=users,
            items=items,
            bad_share=0.0,
            split=None,
            unsure=[],
        )
        return draft._fitted(data)

    def _fitted(self, data: Path) -> Draft:
        """With days, split and share of bad rows as the log has them."""
        project = parse_project(self.text(), "the first project file")
        source = open_source(project, data)
        days = source.days()
        final = [day for day in days if day <= last_final_day(project, days[-1])] if days else []
        count, split = len(final), None
        if 3 <= count < 11:
            warmup = 2 if count >= 6 else 1 if count >= 4 else 0
            split = (warmup, count - 2 - warmup)
        share = max((_duplicates(source, day) for day in days[-14:]), default=0.0)
        unsure = list(_questions(self, project))
        if count < 3:
            unsure.append(
                f"the log has {counted(count, 'day')} with final labels; a night needs at least 3, "
                "to train, validate and test"
            )
        fitted = {"days": days, "split": split, "bad_share": share, "unsure": unsure}
        return Draft(**(vars(self) | fitted))

    def text(self) -> str:
        """The project file."""
        parts = [
            f"# A first project file for {self.found.log.data.path} and the tables beside it.",
            "# Lines with a question mark are guesses to check: docs/your-log.md",
            f"name = {_toml(self.name)}  # ? of the experiment and the registered model",
            "",
            *DESCRIBE,
            "",
            *_log_lines(self),
            *(line for name, stream in self.streams.items() for line in self._action(name, stream)),
            *_table_lines("users", self.found.users, self.users),
            *_table_lines("items", self.found.items, self.items),
            *(line for label in self.objectives for line in _objective(label)),
            *_feature_lines(self),
        ]
        parts += self._scoring()
        parts += ["", *TUNING]
        if self.split is not None:
            warmup, train = self.split
            parts += ["", "[split]", f"warmup_days = {warmup}", f"train_days = {train}"]
        parts += [
            "",
            "[training]",
            "trees = 100  # boosted trees, alone and averaged with the winner: two contenders",
        ]
        return "\n".join(parts) + "\n"

    def _scoring(self) -> list[str]:
        """The candidates, and weights where objectives have different units.

        A number counts as much as a positive of a binary objective where it has its mean.
        """
        lines = []
        if self.found.candidates is not None:
            lines.append(f"candidates = {_toml(self.found.candidates)}")
        if any(label.kind != "binary" for label in self.objectives):
            each = ", ".join(f"{o.name} = {_weight(o)}" for o in self.objectives)
            lines += [
                "# ? what one of each is worth; a number: 1 / its mean above 0: docs/blending.md",
                f"weights = {{ {each} }}",
            ]
        return ["", "[scoring]", *lines] if lines else []

    def _action(self, name: str, stream: StreamFound) -> list[str]:
        log, events = self.found.log, stream.events
        lines = [
            "",
            "[[log.actions]]",
            f"name = {_toml(name)}",
            f"path = {_toml(events.data.path)}",
        ]
        own = {"user": events.user, "item": events.item, "timestamp": events.time.column}
        logs = {"user": log.user, "item": _item(log), "timestamp": log.time.column}
        lines += [f"{key} = {_toml(own[key])}" for key in own if own[key] != logs[key]]
        if events.time.unit != log.time.unit:
            lines.append(f"timestamp_unit = {_toml(events.time.unit)}")
        if stream.impression is not None:
            lines.append(f"impression = {_toml(stream.impression)}")
        window = next((w for w, h in zip(WINDOWS, HOURS, strict=True) if stream.hours <= h), "14d")
        lines.append(f"window = {_toml(window)}  # ? 99 % come within {_span(stream.hours)}")
        if stream.arrived is not None:
            lines.append(f"arrived = {_toml(stream.arrived)}  # ? from when on it was known")
        sample, times, unused = events.data.sample, later_times(events), []
        for column in sample.columns:
            if column in {*events.columns, stream.impression, stream.arrived}:
                continue
            if column in times:
                lines.append(f"# ? a further time, not used: {column}")
            elif sample[column].dtype.is_numeric():
                lines.append(
                    f"# value = {_toml(column)}  # ? a number: for an objective of its own, repeat "
                    'this section with another name, this line and reduce = "sum", or "last"'
                )
            else:
                unused.append(column)
        return [*lines, *([f"# ? not used: {', '.join(unused)}"] if unused else [])]


def _span(hours: float) -> str:
    """A length of time in its largest unit of which there is at least one."""
    for unit, length in (("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= length:
            return f"{hours / length:.3g} {unit}"
    return f"{3600 * hours:.3g} seconds"


def _weight(label: Label) -> str:
    """A weight in plain decimals, of one or two digits."""
    return "1.0" if label.kind == "binary" else f"{Decimal(f'{1 / label.mean:.2g}'):f}"


def _names(found: Found, columns: Sequence[str]) -> dict[str, StreamFound]:
    """The name of each action, from its path: `likes` is like."""
    names: dict[str, StreamFound] = {}
    for stream in found.streams:
        name = _singular(_identifier(stream.events.data.name))
        while name in {*columns, *CANONICAL, *names}:
            name = f"{name}_action"
        names[name] = stream
    return names


def _singular(name: str) -> str:
    """A name without the ending of an English plural.

    >>> [_singular(name) for name in ("likes", "watches", "replies", "purchases", "express")]
    ['like', 'watch', 'reply', 'purchase', 'express']
    """
    if name.endswith("ies"):
        return f"{name[:-3]}y"
    if name.endswith(("ches", "shes", "xes", "sses")):
        return name[:-2]
    return name if name.endswith("ss") else name.removesuffix("s")


def _identifier(text: str) -> str:
    plain = re.sub(r"\W+", "_", text).strip("_")
    return plain if IDENTIFIER.match(plain) else f"feed_{plain}".strip("_")


def _best(labels: Sequence[Label], group: str) -> list[Label]:
    """The labels of a group with most actions, binary ones first, in their order."""
    fitting = [label for label in labels if label.group == group and label.count >= LEAST]
    ranked = sorted(fitting, key=lambda label: (label.kind != "binary", -label.count))
    return [label for label in fitting if label in ranked[:OBJECTIVES]]


def _duplicates(source: Source, day: date) -> float:
    """Share of a day's rows that repeat user, item and time."""
    rows = source.scan_day(day, []).select(
        pl.len().alias("rows"),
        pl.struct("user_id", "item_id", "timestamp").n_unique().alias("kept"),
    )
    count, kept = rows.collect(engine="streaming").row(0)
    return 1 - kept / count if count else 0.0


def _questions(draft: Draft, project: Project) -> Iterator[str]:
    """What the owner of the log should look at."""
    log, columns = draft.found.log, draft.log
    if log.time.hours:
        yield (
            f"times lie in their days at UTC{log.time.hours:+d}, written as timezone = "
            f"{project.log.timezone!r}; name the log's own zone"
        )
    elif without_zone(log):
        yield (
            f"times of {log.time.column!r} have no zone, and are read in timezone = "
            f"{project.log.timezone!r}; name the zone of their clock"
        )
    for name, stream in draft.streams.items():
        if stream.arrived is not None:
            yield (
                f"actions {name}: {stream.arrived!r} is taken for the time of arrival, as it is "
                f"never before {stream.events.time.column!r}"
            )
    if log.time.tolerance:
        yield f"times lie up to {log.time.tolerance} hours outside the day of their folder"
    if columns.context:
        yield f"context, taken to be known before the impression: {', '.join(columns.context)}"
    if columns.unknown:
        yield f"columns of the log without a role: {', '.join(columns.unknown)}"
    for labels, use in (
        (draft.objectives, "objectives with good = false"),
        (draft.signals, "history only"),
    ):
        bad = [label.name for label in labels if label.group == ""]
        if bad:
            yield f"taken for undesired outcomes, used as {use}: {', '.join(bad)}"
    for table, found in (("users", draft.users), ("items", draft.items)):
        if found.derived:
            yield (
                f"columns of the {table} table that may be derived from the log, and would "
                f"contain later events: {', '.join(found.derived)}"
            )
        if found.unused:
            yield f"columns of the {table} table that are not used: {', '.join(found.unused)}"


def _item(log: Events) -> str:
    """The name of the item: of a request one that no column has."""
    if log.item:
        return log.item
    names = ("item_id", "shown_item", "shown_item_id")
    return next(name for name in names if name not in log.data.sample.columns)


def _log_lines(draft: Draft) -> Iterator[str]:
    found, columns, log = draft.found, draft.log, draft.found.log
    yield "[log]"
    yield f"path = {_toml(log.data.path)}"
    yield f"user = {_toml(log.user)}"
    if not log.shown or _item(log) != "item_id":
        yield f"item = {_toml(_item(log))}"
    yield f"timestamp = {_toml(log.time.column)}"
    yield f"timestamp_unit = {_toml(log.time.unit)}"
    if log.time.hours:
        zone = f"Etc/GMT{-log.time.hours:+d}"
        yield f'timezone = "{zone}"  # ? UTC{log.time.hours:+d}; name a place such as Asia/Shanghai'
    elif without_zone(log):
        yield 'timezone = "UTC"  # ? times have no zone: name that of their clock, as Europe/Paris'
    if log.data.partition not in (None, "date"):
        yield f"partition = {_toml(log.data.partition)}"
    if log.time.tolerance:
        yield f"day_tolerance_hours = {log.time.tolerance}"
    identity = next((s.impression for s in found.streams if s.impression), None)
    if identity is not None:
        yield f"impression = {_toml(identity)}"
    surface = next((c for c in columns.context if set(words(c)) & SURFACES), None)
    request = columns.request
    if request is None and identity is not None and log.shown:
        request = identity
    if request is not None:
        yield f"request = {_toml(request)}  # ? what was shown together"
    elif surface is not None and not log.shown:
        yield f"list = {_toml(['user_id', surface])}  # ? of a day: what is ranked together"
    if columns.position is not None:
        yield f"position = {_toml(columns.position)}"
    if columns.random is not None:
        yield f"random_exposure = {_toml(columns.random)}  # ? 1 where an item was drawn at random"
    if columns.context:
        yield f"context = {_toml(columns.context)}  # ? known before the impression"
    if draft.bad_share > LIKELY_DUPLICATES:
        allowed = min(1.0, round(2 * draft.bad_share + 0.005, 2))
        yield (
            f"max_bad_share = {allowed}  # ? up to {draft.bad_share:.1%} of a day's rows repeat "
            "another"
        )
    if columns.unknown:
        yield "# ? without a role: add what is known before the impression to context"
        yield f"# {', '.join(columns.unknown)}"
    if log.shown:
        lists = {"items": log.shown, "clicked": log.clicked, "mark": log.mark}
        lists["separator"] = log.separator if log.separator != " " else None
        yield ""
        yield "[log.requests]"
        yield from (f"{key} = {_toml(value)}" for key, value in lists.items() if value is not None)


def _table_lines(which: str, table: TableFound | None, columns: TableColumns) -> Iterator[str]:
    if table is None:
        return
    yield ""
    yield f"[log.{which}]"
    yield f"path = {_toml(table.data.path)}"
    yield f"key = {_toml(table.key)}"
    if table.data.partition is not None:
        yield (
            f"partition = {_toml(table.data.partition)}  # a row has the values of the latest "
            "snapshot before its day"
        )
    for setting, column in zip(("valid_from", "valid_to"), table.valid, strict=True):
        if column is not None:
            yield f"{setting} = {_toml(column)}"
    yield from _array("columns", [_toml(name) for name in columns.columns])
    if columns.lists:
        pairs = ", ".join(f"{_toml(name)} = {_toml(by)}" for name, by in columns.lists.items())
        yield f"lists = {{ {pairs} }}"
    if columns.published is not None:
        yield f"published = {_toml(columns.published)}"
    if columns.derived:
        yield f"# ? not used, as they may contain later information: {', '.join(columns.derived)}"


def _objective(label: Label) -> Iterator[str]:
    yield ""
    yield "[[objectives]]"
    yield f"name = {_toml(label.name)}"
    yield f"group = {_toml(label.group or 'satisfaction')}  # ? engagement or satisfaction"
    if not label.group:
        yield "good = false  # ? by its name it is bad: the less of it the better"
    if label.kind != "binary":
        yield f"kind = {_toml(label.kind)}"
        yield 'transform = "log1p"'
    yield f"label = {_toml(label.expression)}"


def _feature_lines(draft: Draft) -> Iterator[str]:
    users, items, context = draft.users, draft.items, draft.log.context
    schema = draft.found.log.data.sample.schema
    categories = [c for c in context if not schema[c].is_float()]
    numbers = [c for c in context if schema[c].is_float()]
    entities = [["user_id"], ["item_id"]]
    maker = next((c for c in items.categoricals if set(words(c)) & MAKERS), None)
    entities += [[maker], ["user_id", maker]] if maker is not None else []
    yield ""
    yield "[features]"
    yield f"entities = {_toml(entities)}"
    columns = [*categories, *users.categoricals, *items.categoricals]
    tables = [f"{{ column = {_toml(column)} }}" for column in columns]
    yield from _array("categoricals", [*tables, '{ column = "item_id", min_count = 20 }'])
    numerics = [*numbers, *users.numerics, *items.numerics]
    if numerics:
        yield from _array("numerics", [_toml(name) for name in numerics])
    lists = [*users.lists, *users.native, *items.lists, *items.native]
    if lists:
        yield from _array("lists", [f"{{ column = {_toml(c)}, min_count = 5 }}" for c in lists])
    vectors = [*users.vectors, *items.vectors]
    if vectors:
        yield from _array("embeddings", [_toml(name) for name in vectors])
    if draft.signals:
        yield ""
        yield "[features.signals]  # of earlier impressions only; ? some may be objectives"
        yield from (f"{label.name} = {_toml(label.expression)}" for label in draft.signals)


def _array(key: str, values: Sequence[str]) -> Iterator[str]:
    """An array in TOML, in lines of at most `WIDTH` characters where the values allow it."""
    whole = f"{key} = [{', '.join(values)}]"
    if len(whole) <= WIDTH:
        yield whole
        return
    yield f"{key} = ["
    line = " "
    for value in values:
        if len(line) > 1 and len(line) + len(value) + 2 > WIDTH:
            yield line
            line = " "
        line += f" {value},"
    yield line
    yield "]"


def _toml(value: Any) -> str:
    """A text, or a list of texts, as TOML."""
    return json.dumps(value, ensure_ascii=False)
