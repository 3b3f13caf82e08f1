"""`mtl-ranker check`: verify a project file against its data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from mtl_ranker.config import load_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import (
    LABEL,
    check_feature_columns,
    check_known_beforehand,
    numeric_features,
)
from mtl_ranker.features.days import span, split_days
from mtl_ranker.logs.contract import check_events, check_expressions, derived_columns
from mtl_ranker.logs.sources import open_source
from mtl_ranker.training.dataset import check_labels
from mtl_ranker.training.specs import model_specs


def check_project(config: str, data: Path) -> Iterator[str]:
    """Yield a line for each check that passes. Raises ProjectError at the first that fails."""
    project = load_project(config)
    model_specs(project)
    yield f"ok  {config}: {len(project.objectives)} objectives, {len(project.models)} models"
    source = open_source(project, data)
    available = source.days()
    if not available:
        raise ProjectError(f"{data / project.log.path}: the log holds no day")
    yield f"ok  log: {len(available)} days, {available[0]} to {available[-1]}"
    days = split_days(project, available, available[-1])
    counts = f"{len(days.train)} train, {len(days.validate)} validate, {len(days.test)} test"
    yield f"ok  split: {counts}"
    last = available[-1]
    source_name = f"{data / project.log.path} ({last})"
    checked = check_events(project, source.scan_day(last), last, source_name)
    if checked.rows == 0:
        raise ProjectError(f"{source_name}: no rows on this day")
    if checked.bad_share > project.log.max_bad_share:
        raise ProjectError(
            f"{source_name}: {checked.bad_share:.1%} of the rows break the contract "
            f"({checked.reasons()}); allowed: log.max_bad_share = {project.log.max_bad_share:.1%}"
        )
    yield f"ok  contract on {last}: {checked.rows:,} rows, {checked.bad.height:,} quarantined"
    for reason, count in checked.reasons().items():
        yield f"    {count:>9,}  {reason}"
    schema = dict(checked.good.collect_schema())
    check_known_beforehand(project, schema)
    for which in ("users", "items"):
        table = source.table(which)
        if table is not None:
            schema |= {k: v for k, v in table.collect_schema().items() if k not in schema}
            yield f"ok  {which} table: {table.select(pl.len()).collect().item():,} rows"
    for keys in project.features.entities:
        for key in keys:
            if key not in schema:
                raise ProjectError(
                    f"features.entities: no column {key!r}; allowed: {', '.join(schema)}"
                )
    computed = set(numeric_features(project)) - set(project.features.numerics)
    check_feature_columns(project, pl.Schema(schema | dict.fromkeys(computed, pl.Float32())))
    yield f"ok  features: {len(numeric_features(project))} numeric"
    for day in days.train:
        scanned = source.scan_day(day)
        check_expressions(
            project,
            scanned.collect_schema(),
            f"{data / project.log.path} ({day})",
            source.columns(day),
        )
    labels = {o.name for o in project.objectives}
    expressions = [
        e.alias(LABEL + name) for name, e in derived_columns(project).items() if name in labels
    ]
    labelled = [source.scan_day(day).select(expressions) for day in days.train]
    check_labels(project, pl.concat(labelled), f"train days {span(days.train)}", "train")
    yield "ok  every objective occurs in the training days"
