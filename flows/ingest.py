"""The ingest flow: raw log → events/date=D and quarantine/date=D."""

from __future__ import annotations

from collections import Counter
from datetime import date

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from flows.night import RETRY, announce, with_progress
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.days import needed_days
from mtl_ranker.logs.ingest import IngestReport, ingest_day


@task(name="ingest-day", task_run_name="ingest {day}", **RETRY)
def ingest_task(context: Context, day: date) -> IngestReport:
    return ingest_day(context, day)


@flow(name="ingest", flow_run_name="ingest {day}", validate_parameters=False)
def ingest(context: Context, day: date) -> list[IngestReport]:
    """Ingest day D and the earlier days that a training on D needs, unless they are up to date.

    Raises ProjectError if the log has no rows for D.
    """
    available = context.source.days()
    if day not in available:
        have = f"{available[0]} to {available[-1]}" if available else "none"
        raise ProjectError(f"{context.log_path}: no rows for {day}; days found: {have}")
    days = needed_days(context.project, available, day)
    with context.workspace.lock(f"ingest {day}"):
        reports = [ingest_task(context, d) for d in with_progress(days, "reading days")]
    ingested = [r for r in reports if not r.skipped]
    bad = sum(r.rows - r.good for r in ingested)
    announce(
        "ingest",
        f"{len(ingested)} days read, {len(reports) - len(ingested)} up to date: "
        f"{sum(r.good for r in reports):,} events, {bad:,} rows quarantined",
    )
    reasons: Counter[str] = Counter()
    for report in ingested:
        reasons.update(report.reasons)
    for reason, count in reasons.most_common():
        announce("", f"{count:>8,}  {reason}")
    create_table_artifact(
        key="ingest",
        table=[
            {
                "day": str(r.day),
                "rows": r.rows,
                "good": r.good,
                "skipped": r.skipped,
                "reasons": "; ".join(f"{k}: {v}" for k, v in r.reasons.items()),
            }
            for r in reports
        ],
        description="Rows per day, and reasons of quarantined rows",
    )
    return reports
