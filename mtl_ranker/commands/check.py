"""`mtl-ranker check`: verify a project file against its data."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.config import Project, Table, load_project
from mtl_ranker.context import Context, Source
from mtl_ranker.errors import ProjectError, counted
from mtl_ranker.features.columns import (
    LABEL,
    check_feature_columns,
    check_known_beforehand,
    check_names,
    entity_name,
    numeric_features,
)
from mtl_ranker.features.days import SplitDays, days_named, needed_days, span, split_days
from mtl_ranker.features.derived import check_derived
from mtl_ranker.features.examples import labelled_events
from mtl_ranker.features.tables import join_tables, tables_as_of
from mtl_ranker.logs.actions import check_bad_share, final_day, join_actions
from mtl_ranker.logs.contract import (
    Checked,
    check_events,
    check_expressions,
    derived_columns,
    label_actions,
    may_fall,
    unusable_labels,
    used_columns,
)
from mtl_ranker.logs.ingest import mark_repeated
from mtl_ranker.logs.sources import open_source
from mtl_ranker.ranking.blend import conditional, factors
from mtl_ranker.training.specs import model_specs
from mtl_ranker.workspace import Workspace

FEW_KEYS = 5  # an entity with fewer has the same rates on most rows
REVEALS = 0.95  # AUC of a context column alone, from which on it is taken to contain the label
LEAST_ROWS = 10  # of both classes, for that AUC
MOST_ROWS = 200_000  # of the day, for the same


def check_project(config: str, data: Path) -> Iterator[str]:
    """Yield a line for each check that passes, and for each warning.

    What the settings, the last day and the labels show comes first; then a night is tried on a
    sample of the log. Nothing is written outside a temporary folder. Raises ProjectError at the
    first check that fails.
    """
    project = load_project(config)
    model_specs(project)
    objectives = counted(len(project.objectives), "objective")
    yield f"ok  {config}: {objectives}, {counted(len(project.models), 'model')}"
    derived_columns(project)  # raises ProjectError for what is no SQL
    yield from _blend_lines(project)
    yield from _unweighted(project)
    yield from _against(project)
    source = open_source(project, data)
    available = source.days()
    if not available:
        raise ProjectError(f"{source.root / project.log.path}: the log holds no day")
    yield f"ok  log: {counted(len(available), 'day')}, {available[0]} to {available[-1]}"
    last = available[-1]
    days = split_days(project, needed_days(project, available, last), last)
    counts = f"{len(days.train)} train, {len(days.validate)} validate, {len(days.test)} test"
    yield f"ok  split: {counts}"
    checked = yield from _contract(project, source, last)
    yield from _begun(project, source, days)
    rows = join_tables(tables_as_of(source, last), checked.good)
    yield from _features(project, checked, rows.collect_schema())
    yield from _tables(project, source, days)
    yield from _rules(project, source)
    # After the cheap checks, as these import torch and MLflow.
    from mtl_ranker.commands.rehearsal import SAMPLE_ROWS, rehearse, sampled_context

    if not project.log.actions:
        yield from _labels(project, source, days)
    yield from _streams(project, source, available)
    with tempfile.TemporaryDirectory(prefix="mtl-ranker-check-") as folder:
        yield from rehearse(project, source, Path(folder))
        if project.log.actions:
            context = sampled_context(project, source, Path(folder))
            yield from _actions(context, days, project.log.max_bad_share)
            labelled = labelled_events(context, days.test[-1], last)
            yield from _revealing(project, labelled, SAMPLE_ROWS)
    yield from _few_keys(project, rows)
    if not project.log.actions:
        yield from _revealing(project, checked.good.with_columns(_labelled(project)), checked.rows)


def _contract(project: Project, source: Source, day: date) -> Generator[str, None, Checked]:
    """The rows of a day, after lines about those that are quarantined."""
    place = f"{source.root / project.log.path} ({day})"
    rows = mark_repeated(project, source, source.scan_day(day), day)
    checked = check_events(project, rows, day, place)
    if checked.rows == 0:
        raise ProjectError(f"{place}: no rows on this day")
    lines = [*checked.table(), *_advice(project, checked)]
    if checked.bad_share > project.log.max_bad_share:
        raise ProjectError(
            "\n".join(
                [
                    f"{place}: {checked.bad_share:.1%} of the rows break the contract; allowed: "
                    f"log.max_bad_share = {project.log.max_bad_share:.1%}",
                    *lines,
                ]
            )
        )
    yield f"ok  contract on {day}: {checked.rows:,} rows, {checked.bad.height:,} quarantined"
    yield from lines
    return checked


def _begun(project: Project, source: Source, days: SplitDays) -> Iterator[str]:
    """Columns that begin within the split's days."""
    have = {day: set(source.columns(day)) for day in days.all}
    for column in sorted(used_columns(project) & have[days.all[-1]]):
        with_it = [day for day in days.all if column in have[day]]
        if with_it[0] > days.all[0]:
            yield (
                f"    column {column!r} begins on {with_it[0]}; it is missing in the rows of "
                "earlier days"
            )


def _advice(project: Project, checked: Checked) -> Iterator[str]:
    """What to do about labels that are not allowed."""
    for index, objective in enumerate(project.objectives):
        broken = [r for r in checked.reasons() if r.startswith(f"label of {objective.name} ")]
        if not broken:
            continue
        place = f"objectives[{index}] ({objective.name})"
        text = (
            f"warning: {place}: a row with a label that is not allowed is quarantined whole, with "
            "its other labels; where only this label is unusable, exclude it with `where`"
        )
        if objective.kind == "ordinal":
            first, count = objective.lowest, objective.level_count
            text += (
                f". levels = {objective.levels} allows {first} to {first + count - 1}; for values "
                "from 1 to 5, write levels = [1, 2, 3, 4, 5]"
            )
        yield text


def _features(project: Project, checked: Checked, schema: pl.Schema) -> Iterator[str]:
    """Names and types of features and keys.

    Args:
        schema: of the last day's rows, with user and item table.
    """
    check_known_beforehand(project, checked.good.collect_schema().names())
    for keys in project.features.entities:
        for key in keys:
            if key not in schema:
                raise ProjectError(
                    f"features.entities: no column {key!r}; allowed: {', '.join(schema)}"
                )
    check_names(project, schema.names())
    check_derived(project, schema)
    computed = set(numeric_features(project)) - set(project.features.numerics)
    check_feature_columns(project, pl.Schema(schema | dict.fromkeys(computed, pl.Float32())))
    yield f"ok  features: {len(numeric_features(project))} numeric"


def _tables(project: Project, source: Source, days: SplitDays) -> Iterator[str]:
    """Rows of the user and item tables, and the days of their snapshots."""
    undated = []
    for which in ("users", "items"):
        settings: Table | None = getattr(project.log, which)
        if settings is None:
            continue
        table = source.table(which, days.all[-1] + timedelta(days=1))
        assert table is not None
        count, snapshots = table.select(pl.len()).collect().item(), source.snapshots(which)
        dates = f"; snapshots: {len(snapshots)}, {span(snapshots)}" if snapshots else ""
        yield f"ok  {which} table: {count:,} rows{dates}"
        if snapshots and days.all[0] <= snapshots[0]:
            yield (
                f"warning: log.{which}: the first snapshot is of {snapshots[0]}, so rows up to "
                "that day have no values of the table"
            )
        if not settings.dated:
            undated.append(f"log.{which}")
    if undated:
        yield (
            f"    {' and '.join(undated)}: without dates (partition or valid_from); the current "
            "values are joined to the rows of all past days"
        )


def _labels(project: Project, source: Source, days: SplitDays) -> Iterator[str]:
    """Labels of the split's days, and warnings of days without any, or with one class only."""
    from mtl_ranker.training.dataset import check_labels, missing_labels

    expressions = _labelled(project)
    by_part = {"train": days.train, "validate": days.validate, "test": days.test}
    for part, dates in by_part.items():
        frames = []
        for day in dates:
            scanned = source.scan_day(day)
            place = f"{source.root / project.log.path} ({day})"
            check_expressions(project, scanned.collect_schema(), place, source.columns(day))
            frames.append(scanned.select(expressions))
        check_labels(project, pl.concat(frames), f"{part} {days_named(dates)}", part)
        if part != "train":
            for day, frame in zip(dates, frames, strict=True):
                for problem in missing_labels(project, frame):
                    yield f"warning: {part} day {day}: {problem}"
    yield "ok  every objective occurs in the training days"


def _labelled(project: Project) -> list[pl.Expr]:
    """The label of each objective as a column."""
    labels = derived_columns(project)
    return [labels[o.name].alias(LABEL + o.name) for o in project.objectives]


def _streams(project: Project, source: Source, available: Sequence[date]) -> Iterator[str]:
    """Days and windows of the actions' streams, and when labels are final."""
    for action in project.log.actions:
        days = source.actions(action.name).days()
        if not days:
            raise ProjectError(f"{source.root / action.path}: the stream ({action.name}) is empty")
        count = counted(len(days), "day")
        yield f"ok  actions of {action.name}: {count}, {span([days[0], days[-1]])}"
        if days[0] > available[0]:
            yield (
                f"warning: {action.name} begins on {days[0]}, the log on {available[0]}; labels of "
                "the days between would be negative"
            )
    wait = final_day(project, label_actions(project), available[-1]) - available[-1]
    if wait.days:
        yield (
            f"    labels are final {counted(wait.days, 'day')} later; until then, "
            f"training.immature = {project.training.immature!r}"
        )
    if wait.days and project.training.immature != "wait":
        falling = [
            o.name
            for o in project.objectives
            if label_actions(project, [o]) and may_fall(project, o)
        ]
        if falling:
            yield (
                f"    a further action may change a 1, or a number, of {', '.join(falling)}; so "
                "these labels are missing until they are final"
            )


def _actions(context: Context, days: SplitDays, max_bad_share: float) -> Iterator[str]:
    """What joining did on the sample: bad actions by reason, and labels of the split's days.

    Which actions are bad does not depend on the sample, as streams are read in full. Raises
    ProjectError for a day of which a night would refuse the actions.

    Args:
        max_bad_share: of the project file; the context of the sample allows any.
    """
    from mtl_ranker.training.dataset import check_labels

    project, night = context.project, context.source.days()[-1]
    needed = needed_days(project, context.source.days(), night)
    reports = [report for day in needed for report in join_actions(context, day)]
    for action in project.log.actions:
        path = context.source.actions(action.name).root / action.path
        every = [report for report in reports if report.name == action.name]
        for r in every:
            check_bad_share(context, action, f"{path} ({r.day})", r.rows, r.bad, max_bad_share)
        own = [r for r in every if r.day in days.all]
        rows, joined = sum(r.rows for r in own), sum(r.joined for r in own)
        yield f"ok  {action.name}: {joined:,} of {rows:,} actions belong to the sampled impressions"
        reasons: Counter[str] = Counter()
        for report in own:
            reasons.update(report.bad)
        yield from (f"    {count:>9,}  {reason}" for reason, count in reasons.most_common())
    counts = unusable_labels(project)
    for day in days.all if counts else []:
        found = labelled_events(context, day, night).select(
            count.alias(reason) for reason, count in counts.items()
        )
        for reason, count in found.collect().row(0, named=True).items():
            if count:
                yield f"warning: {day}: {reason} in {count:,} rows, which lose this label"
    for part, dates in (("train", days.train), ("validate", days.validate), ("test", days.test)):
        labels = pl.concat([labelled_events(context, day, night) for day in dates])
        try:
            check_labels(project, labels, f"{part} {days_named(dates)}", part)
        except ProjectError as problem:
            yield f"warning: on a sample of the log: {problem}"


def _blend_lines(project: Project) -> Iterator[str]:
    """How the objectives with a condition enter the blend."""
    for name, multiplied in factors(project).items():
        if multiplied:
            first, *later = reversed(multiplied)
            given = [f"P({n} | {before})" for before, n in pairwise([first, *later])]
            product = " x ".join([f"P({first})", *given])
            yield f"    {name} enters the blend as {product} x E[{name} | {multiplied[0]}]"
    for name in conditional(project):
        where = next(o.where for o in project.objectives if o.name == name)
        yield (
            f"    {name} enters the blend as predicted given its condition, as where = {where!r} "
            "is not that another binary objective's label is 1"
        )


def _unweighted(project: Project) -> Iterator[str]:
    """Warnings of numbers without a weight beside binary objectives."""
    if project.scoring.maximise or all(o.kind != "binary" for o in project.objectives):
        return
    for objective in project.objectives:
        if objective.kind != "binary" and objective.name not in project.scoring.weights:
            yield (
                f"warning: scoring.weights: none for {objective.name}, a number; with 1 each "
                "unit of it counts as much as a certain positive of a binary objective "
                "(docs/blending.md)"
            )


def _against(project: Project) -> Iterator[str]:
    """The objectives that count against."""
    for name, weight in project.blend_weights.items():
        if name in project.bad:
            yield f"    {name} is bad: it enters the blend with weight {weight:g}"


def _rules(project: Project, source: Source) -> Iterator[str]:
    """The rules on lists, and that their tables can be read."""
    rules = project.scoring.rules
    if not rules.names:
        return
    from mtl_ranker.ranking.rules import check_rules

    with tempfile.TemporaryDirectory(prefix="mtl-ranker-check-") as folder:
        check_rules(Context(project, source, Workspace(Path(folder))))
    yield f"ok  scoring.rules: {', '.join(rules.names)}"


def _few_keys(project: Project, rows: pl.LazyFrame) -> Iterator[str]:
    """Warnings of entities with few keys on the last day."""
    for keys in project.features.entities:
        count = rows.select(keys).drop_nulls().unique().select(pl.len()).collect().item()
        if count < FEW_KEYS:
            yield (
                f"warning: features.entities: {entity_name(keys)} ({', '.join(keys)}) has {count} "
                "keys on the last day, so its rates hardly differ between rows; "
                "the columns as features.categoricals may be enough"
            )


def _revealing(project: Project, labelled: pl.LazyFrame, rows: int) -> Iterator[str]:
    """Warnings of context columns from which alone a label can be predicted.

    Args:
        labelled: rows of a day with labels.
        rows: their number, at most.
    """
    from mtl_ranker.evaluation.metrics import auc

    step = -(-rows // MOST_ROWS)
    frame = (
        labelled.select(*project.log.context, *(LABEL + o.name for o in project.objectives))
        .gather_every(step)
        .collect(engine="streaming")
    )
    for column in project.log.context:
        for index, objective in enumerate(project.objectives):
            known = frame.filter(pl.col(LABEL + objective.name).is_not_null())
            label = known[LABEL + objective.name].to_numpy()
            if objective.kind != "binary" and len(label):
                label = (label > np.median(label)).astype(np.float64)
            if min(label.sum(), len(label) - label.sum()) < LEAST_ROWS:
                continue
            found = {how: auc(label, score) for how, score in _scores(known[column], label)}
            how = max(found, key=lambda name: max(found[name], 1 - found[name]))
            value = max(found[how], 1 - found[how])
            if value >= REVEALS:
                yield (
                    f"warning: log.context: {how} of {column!r} predicts objectives[{index}] "
                    f"({objective.name}) with an AUC of {value:.3f}; a column that is only known "
                    "after the impression must not be context"
                )


def _scores(values: pl.Series, label: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Predictions of a label [N] from one column, each with its name.

    The mean label of a value is that of the other half of the rows, so that a column with a value
    per row does not predict itself.
    """
    yield "absence", values.is_null().to_numpy().astype(np.float64)
    if values.dtype.is_numeric():
        number = values.cast(pl.Float64).fill_null(np.nan).to_numpy()
        yield "the value", np.where(np.isnan(number), -np.inf, number)
    if not values.dtype.is_nested():
        rows = pl.DataFrame({"value": values, "label": label}).with_row_index("row")
        halves = [rows.filter(pl.col("row") % 2 == half) for half in (0, 1)]
        parts = []
        for own, other in (halves, halves[::-1]):
            mean = other.group_by("value").agg(pl.col("label").mean().alias("mean"))
            parts.append(own.join(mean, on="value", how="left", nulls_equal=True))
        scored = pl.concat(parts).sort("row")["mean"].fill_null(label.mean())
        yield "the value", scored.to_numpy()
