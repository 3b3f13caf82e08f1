"""Raw log → events/date=D and quarantine/date=D."""

from __future__ import annotations

from datetime import date

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from flows.night import RETRY, Night, follow, open_night, say
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.ingest import IngestReport, ingest_day
from mtl_ranker.training.suite import needed_days


@task(name="ingest-day", task_run_name="ingest {day}", **RETRY)
def ingest_task(night: Night, day: date) -> IngestReport:
    return ingest_day(night.project, night.source, night.workspace, day)


@flow(name="ingest", flow_run_name="ingest {day}", validate_parameters=False)
def ingest(config: str, data: str, workspace: str, day: date) -> list[IngestReport]:
    """Ingest day D and the earlier days that a training on D needs, if not yet published."""
    night = open_night(config, data, workspace)
    available = night.source.days()
    if day not in available:
        have = f"{available[0]} to {available[-1]}" if available else "none"
        raise ProjectError(
            f"{night.source.root / night.project.log.path}: no rows for {day}; days found: {have}"
        )
    days = needed_days(night.project, available, day)
    reports = [ingest_task(night, d) for d in follow(days, "reading days")]
    fresh = [r for r in reports if not r.skipped]
    bad = sum(r.rows - r.good for r in fresh)
    say(
        f"[bold]ingest[/]    {len(fresh)} days read, {len(reports) - len(fresh)} up to date: "
        f"{sum(r.good for r in reports):,} events, {bad:,} rows put aside"
    )
    reasons: dict[str, int] = {}
    for report in fresh:
        for reason, count in report.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        say(f"          {count:>8,}  {reason}")
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
        description="Rows per day, and why rows were put aside",
    )
    return reports
