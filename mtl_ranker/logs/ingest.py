"""One day of the raw log into the workspace: events/date=D and quarantine/date=D."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, timedelta

import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context, Source
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.blocks import publish_by_user
from mtl_ranker.logs.contract import check_events, in_both, used_columns, with_repeated
from mtl_ranker.logs.sources import common_type
from mtl_ranker.workspace import Workspace, fingerprint

LOG = logging.getLogger(__name__)
# In the provenance of days that are not stored in the order of the log. Actions and examples refer
# to an event by its place, so they are built again where the order changes.
ORDER = "order"


@dataclass(frozen=True)
class IngestReport:
    """What ingesting one day did.

    Attributes:
        good: rows that were published.
        reasons: reason → number of quarantined rows.
        why: why the day was built; None if it was up to date.
    """

    day: date
    rows: int
    good: int
    reasons: dict[str, int]
    why: str | None = "not built yet"

    @property
    def skipped(self) -> bool:
        return self.why is None


def ingest_day(context: Context, day: date) -> IngestReport:
    """Check one day and publish it; a day that is up to date is skipped.

    Raises ProjectError when the day is missing, has no rows, cannot be read, or when more than
    `log.max_bad_share` of it breaks the contract. In the last case the quarantine is written for
    inspection, and a previously published day is left unchanged.
    """
    context = context.pinned()
    project, source, workspace = context.project, context.source, context.workspace
    provenance = events_provenance(context, day)
    why = workspace.stale("events", day, provenance)
    if why is None:
        count = workspace.rows("events", day)
        return IngestReport(day, count, count, {}, None)
    place = f"{source.root / project.log.path} ({day})"
    rows = source.scan_day(day, used_columns(project) | kept_columns(workspace))
    rows = _in_known_types(context, rows, day, place)
    rows = mark_repeated(project, source, rows, day)
    checked = check_events(project, rows, day, place, source.columns(day))
    if checked.rows == 0:
        raise ProjectError(f"{place}: no rows on this day; nothing was published")
    workspace.publish("quarantine", day, checked.bad, provenance)
    reasons = checked.reasons()
    if checked.bad_share > project.log.max_bad_share:
        table = "\n".join(checked.table())
        raise ProjectError(
            f"{place}: {checked.bad.height:,} of {checked.rows:,} rows "
            f"({checked.bad_share:.1%}) break the contract; allowed: "
            f"log.max_bad_share = {project.log.max_bad_share:.1%}\n"
            f"         rows  reason: values\n{table}\n"
            f"  the rows are in {workspace.where(workspace.place('quarantine', day))}"
        )
    good = checked.rows - checked.bad.height
    provenance.pop(ORDER, None)
    if good > project.features.block_rows:
        provenance[ORDER] = "by user"
        publish_by_user(workspace, "events", day, checked.good, provenance, good)
    else:
        workspace.publish("events", day, checked.good, provenance)
    return IngestReport(day, checked.rows, good, reasons, why)


def mark_repeated(project: Project, source: Source, rows: pl.LazyFrame, day: date) -> pl.LazyFrame:
    """A day's rows, with a mark on those that the partition of the day before holds too.

    That can be with `log.day_tolerance_hours` only. Late rows land in the next partition, so one
    day is looked at, and of it the rows near midnight that do not break the contract there.
    """
    before, log = day - timedelta(days=1), project.log
    known = set(log.unique) <= set(rows.collect_schema())  # if not, `check_events` raises
    if not log.day_tolerance_hours or not known or not source.has_day(before):
        return rows
    earlier = source.scan_day(before, used_columns(project)).filter(in_both(log, day))
    place = f"{source.root / log.path} ({before})"
    good = check_events(project, earlier, before, place, source.columns(before)).good
    return with_repeated(log, rows, good, day)


def ingest_missing(context: Context, days: list[date]) -> None:
    """Ingest those of `days` that were never published although a later day was.

    A day that cannot be ingested is logged as a warning: a ranking without it is better than none.
    """
    published = context.workspace.days("events")
    for day in days:
        if day not in published and published and day < published[-1]:
            try:
                ingest_day(context, day)
            except (ProjectError, OSError) as error:
                LOG.warning("%s is missing in the features: %s", day, error)


def events_provenance(context: Context, day: date) -> dict[str, str]:
    """Provenance of a day's events: its files, and the settings that define good rows.

    The order of a published day is kept: `features.block_rows` decides on it when a day is built.
    """
    project, source = context.project, context.source
    # Which columns the events need is `columns`; what makes a list is not of a row.
    without = {"users", "items", "actions", "list_by", "request", "version"}
    without |= {"impression"} if project.log.impression is None else set()
    contract = project.log.model_dump_json(exclude=without)
    labels = [(o.name, o.kind, o.label, o.where, o.transform, o.levels) for o in project.objectives]
    late: dict[str, str] = {}
    if project.log.day_tolerance_hours:
        before = day - timedelta(days=1)
        state = source.state(before) if source.has_day(before) else []
        late["source files of the day before"] = fingerprint(*state)
    made = {
        "source files": fingerprint(*source.state(day)),
        **late,
        "setting log": fingerprint(contract),
        "setting objectives": fingerprint(labels),
        "setting training.sample_weight": fingerprint(project.training.sample_weight),
        "columns": _columns(context, day),
    }
    published = context.workspace.provenance("events", day) or {}
    made |= {ORDER: published[ORDER]} if ORDER in published else {}
    versions = {name: version for name, version in source.versions().items() if name == "log"}
    return context.workspace.with_versions("events", day, made, versions)


def _columns(context: Context, day: date) -> str:
    """The columns that the day's events must have, as text; those they have where these suffice."""
    needed = used_columns(context.project) | kept_columns(context.workspace)
    needed -= context.project.log.joined_columns - set(context.source.columns(day))
    published = context.workspace.provenance("events", day) or {}
    have = published.get("columns", "[]")
    return have if needed <= set(json.loads(have)) else json.dumps(sorted(needed))


def _in_known_types(context: Context, rows: pl.LazyFrame, day: date, place: str) -> pl.LazyFrame:
    """The rows with the widest type of each column's kind, which published days have.

    A column without any value takes the known type. Raises ProjectError for a type of another kind,
    naming both and the first day that has the other one.
    """
    workspace, schema = context.workspace, rows.collect_schema()
    others = [d for d in workspace.days("events") if d != day]
    known = workspace.scan("events", others[-1:]).collect_schema() if others else pl.Schema()
    for name, dtype in schema.items():
        before = known.get(name, dtype)
        common = common_type([dtype, before])
        if common is None:
            first = next(
                d
                for d in others
                if workspace.scan("events", [d]).collect_schema().get(name) == before
            )
            raise ProjectError(
                f"{place}: column {name!r} is {dtype}, but it is {before} in the events of {first} "
                "and later; allowed: one type on all days"
            )
        if common != dtype:
            rows = rows.with_columns(pl.col(name).cast(common))
    return rows


KEPT = "views/columns.json"


def kept_columns(workspace: Workspace) -> set[str]:
    """Columns of the log that registered models need, also those not in the project file."""
    path = workspace.file(KEPT)
    return set(json.loads(path.read_text("utf-8"))) if path.is_file() else set()


def keep_columns(workspace: Workspace, columns: Collection[str]) -> None:
    """Let the events of all later ingests have these columns, too."""
    kept = kept_columns(workspace)
    if not set(columns) <= kept:
        workspace.publish_file(KEPT, json.dumps(sorted(kept | set(columns))))
