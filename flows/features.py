"""events → daily aggregates → examples, each day published once."""

from __future__ import annotations

from datetime import date

from prefect import flow, task

from flows.night import RETRY, Night, follow, open_night, say
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.queries import aggregate_day, build_examples, feature_columns
from mtl_ranker.training.suite import needed_days, split_days


@task(name="aggregate-day", task_run_name="aggregate {day}", **RETRY)
def aggregate_task(night: Night, day: date) -> str | None:
    return aggregate_day(night.project, night.source, night.workspace, day)


@task(name="build-examples", task_run_name="examples {day}", **RETRY)
def examples_task(night: Night, day: date) -> str | None:
    return build_examples(night.project, night.source, night.workspace, day)


@flow(name="features", flow_run_name="features {day}", validate_parameters=False)
def features(config: str, data: str, workspace: str, day: date) -> list[date]:
    """Aggregates of all needed days, examples of the days that training on D reads."""
    night = open_night(config, data, workspace)
    published = needed_days(night.project, night.workspace.days("events"), day)
    if day not in published:
        raise ProjectError(f"events of {day} are not published; run `mtl-ranker ingest` first")
    aggregated = [aggregate_task(night, d) for d in follow(published, "aggregating days")]
    days = split_days(night.project, published, day)
    rows = [*days.train, *days.validate, *days.test]
    built = [examples_task(night, d) for d in follow(rows, "building examples")]
    say(
        f"[bold]features[/]  {len([a for a in aggregated if a])} days aggregated, "
        f"{len([b for b in built if b])} days of examples "
        f"built, the rest up to date; {len(feature_columns(night.project))} features"
    )
    return rows
