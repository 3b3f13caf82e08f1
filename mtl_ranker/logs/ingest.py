"""One day of the raw log into the workspace: events/date=D and quarantine/date=D."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import polars as pl

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.contract import check_events
from mtl_ranker.workspace import fingerprint


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
    project, source, workspace = context.project, context.source, context.workspace
    provenance = events_provenance(context, day)
    why = workspace.stale("events", day, provenance)
    if why is None:
        rows = workspace.scan("events", [day]).select(pl.len()).collect().item()
        return IngestReport(day, rows, rows, {}, None)
    place = f"{source.root / project.log.path} ({day})"
    checked = check_events(project, source.scan_day(day), day, place)
    if checked.rows == 0:
        raise ProjectError(f"{place}: no rows on this day; nothing was published")
    workspace.publish("quarantine", day, checked.bad, provenance)
    reasons = checked.reasons()
    if checked.bad_share > project.log.max_bad_share:
        table = "\n".join(f"    {count:>9,}  {reason}" for reason, count in reasons.items())
        raise ProjectError(
            f"{place}: {checked.bad.height:,} of {checked.rows:,} rows "
            f"({checked.bad_share:.1%}) break the contract; allowed: "
            f"log.max_bad_share = {project.log.max_bad_share:.1%}\n"
            f"         rows  reason\n{table}\n"
            f"  the rows are in {workspace.path('quarantine', day)}"
        )
    workspace.publish("events", day, checked.good, provenance)
    return IngestReport(day, checked.rows, checked.rows - checked.bad.height, reasons, why)


def events_provenance(context: Context, day: date) -> dict[str, str]:
    """Provenance of a day's events: its files, and the settings that define good rows."""
    project, source = context.project, context.source
    contract = project.log.model_dump_json(exclude={"users", "items"})
    labels = [(o.name, o.kind, o.label, o.where, o.transform, o.levels) for o in project.objectives]
    return {
        "source files": fingerprint(*source.state(day)),
        "setting log": fingerprint(contract),
        "setting objectives": fingerprint(labels),
        "setting training.sample_weight": fingerprint(project.training.sample_weight),
    }
