"""The ingest flow: raw log → events/date=D and quarantine/date=D."""

from __future__ import annotations

from collections import Counter
from datetime import date

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from flows.night import RETRY, announce, with_progress
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError, counted
from mtl_ranker.features.days import needed_days
from mtl_ranker.logs.actions import ActionReport, join_actions
from mtl_ranker.logs.ingest import IngestReport, ingest_day


@task(name="ingest-day", task_run_name="ingest {day}", **RETRY)
def ingest_task(context: Context, day: date) -> IngestReport:
    return ingest_day(context, day)


@task(name="join-actions", task_run_name="join actions {day}", **RETRY)
def actions_task(context: Context, day: date) -> list[ActionReport]:
    return join_actions(context, day)


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
        joined = join_days(context, days)
    ingested = [r for r in reports if not r.skipped]
    bad = sum(r.rows - r.good for r in ingested)
    announce(
        "ingest",
        f"{counted(len(ingested), 'day')} read, {len(reports) - len(ingested)} up to date: "
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
    report_actions(joined)
    return reports


def join_days(context: Context, days: list[date]) -> list[ActionReport]:
    """Join the actions of days that are ingested; empty in a project without actions."""
    if not context.project.log.actions:
        return []
    with_reports = [actions_task(context, d) for d in with_progress(days, "joining actions")]
    return [report for reports in with_reports for report in reports]


def report_actions(reports: list[ActionReport]) -> None:
    """Print how many actions belong to no impression or are bad, by action and reason.

    The artifact has them by day.
    """
    made = [report for report in reports if report.why is not None]
    for name in dict.fromkeys(report.name for report in made):
        own = [report for report in made if report.name == name]
        rows, joined = sum(r.rows for r in own), sum(r.joined for r in own)
        announce(
            "actions",
            f"{name}: {counted(len(own), 'day')} joined, "
            f"{joined:,} of {rows:,} actions to impressions",
        )
        reasons: Counter[str] = Counter()
        for report in own:
            reasons.update(report.alone)
            reasons.update({f"{reason} (bad row)": n for reason, n in report.bad.items()})
        for reason, count in reasons.most_common():
            announce("", f"{count:>8,}  {reason}")
    if reports:
        create_table_artifact(
            key="actions",
            table=[
                {
                    "day": str(r.day),
                    "action": r.name,
                    "rows": r.rows,
                    "joined": r.joined,
                    "without impression": "; ".join(f"{k}: {v}" for k, v in r.alone.items()),
                    "bad": "; ".join(f"{k}: {v}" for k, v in r.bad.items()),
                }
                for r in reports
            ],
            description="Actions per day, those without an impression and bad ones by reason",
        )
