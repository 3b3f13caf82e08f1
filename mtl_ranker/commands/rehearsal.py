"""A night on a sample of the log, in a temporary folder: what `mtl-ranker check` tries."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from mtl_ranker.config import Log, Project
from mtl_ranker.context import Context, Place, Source
from mtl_ranker.errors import ProjectError, counted
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.days import needed_days
from mtl_ranker.features.encoders import fit_encoder
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.vectors import load_vectors
from mtl_ranker.features.view import examples_dataset, view_sql
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import shown_layout
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import (
    candidate_days,
    describe_candidates,
    describe_generated,
    prepared_candidates,
)
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.tracking.pyfunc import store_and_load
from mtl_ranker.training.network import build_ranker, tasks_of
from mtl_ranker.training.specs import model_specs
from mtl_ranker.workspace import FileSize, Workspace

SAMPLE_ROWS = 20_000  # of each day
RANKED = 10  # users and items of candidates that are generated, and 10 * 10 given ones


@dataclass(frozen=True)
class Sample:
    """The first rows of each day of a log.

    Files are told apart by size and time, so that large ones are not read in full.
    """

    source: Source
    rows: int = SAMPLE_ROWS

    @property
    def root(self) -> Place:
        return self.source.root

    def days(self) -> list[date]:
        return self.source.days()

    def has_day(self, day: date) -> bool:
        return self.source.has_day(day)

    def pinned(self) -> Source:
        return Sample(self.source.pinned(), self.rows)

    def versions(self) -> dict[str, str]:
        return self.source.versions()

    def with_log(self, log: Log, past_columns: Collection[str] = ()) -> Source:
        return Sample(self.source.with_log(log, past_columns), self.rows)

    def actions(self, name: str) -> Source:
        """All actions: only few of them belong to the first rows of a day."""
        return self.source.actions(name)

    @property
    def undivided(self) -> bool:
        return self.source.undivided

    def sizes(self, day: date) -> list[FileSize]:
        return self.source.sizes(day)

    def state(self, day: date) -> list[str]:
        return [str(size) for size in self.sizes(day)]

    def tables_state(self, day: date) -> list[str]:
        given = {w: self.source.table(w, day) for w in ("users", "items")}
        return [which for which, table in given.items() if table is not None]

    def scan_day(self, day: date, used: Collection[str] | None = None) -> pl.LazyFrame:
        return self.source.scan_day(day, used).head(self.rows)

    def columns(self, day: date) -> list[str]:
        return self.source.columns(day)

    def table(self, which: str, day: date) -> pl.LazyFrame | None:
        return self.source.table(which, day)

    def snapshots(self, which: str) -> list[date]:
        return self.source.snapshots(which)


def sampled_context(project: Project, source: Source, folder: Path) -> Context:
    """The context of a rehearsal in a folder: a sample of the log, of which any row may be bad."""
    tolerant = project.log.model_copy(update={"max_bad_share": 1.0})
    return Context(project.model_copy(update={"log": tolerant}), Sample(source), Workspace(folder))


def rehearse(project: Project, source: Source, folder: Path) -> Iterator[str]:
    """Build, store and rank on a sample; yields a line for each step that works.

    Events and aggregates of every day that a training on the log's last day reads, examples of that
    day, an encoder, each model with random weights, its storage by MLflow, and a hundred ranked
    candidates. Raises ProjectError at the first step that fails.

    Args:
        folder: an empty one.
    """
    context = sampled_context(project, source, folder)
    sampled = context.project
    day = source.days()[-1]
    days = needed_days(project, source.days(), day)
    for each in days:
        _ingest(context, each, project.log.max_bad_share)
        aggregate_day(context, each)
    build_examples(context, day)
    examples = context.workspace.scan(examples_dataset(context), [day]).collect()
    yield f"ok  events and aggregates of {counted(len(days), 'day')}, examples of {day}: " + (
        f"{examples.height:,} rows, at most {SAMPLE_ROWS:,} of a day"
    )
    embeddings = project.features.embeddings
    tables = load_vectors(context.workspace, embeddings, [examples.lazy()])
    encoder = fit_encoder(project, examples, tables=tables)
    encoder.transform(examples)
    tasks, specs = tasks_of(project), model_specs(project)
    try:
        models = {name: build_ranker(spec, encoder, tasks) for name, spec in specs.items()}
    except ValueError as error:
        raise ProjectError(str(error)) from error
    model = next(iter(models.values()))
    artifact = RankerArtifact(sampled, encoder, tasks, model, sql=view_sql(context))
    rows = examples.head(5).select(artifact.columns)
    store_and_load(artifact, pl.concat([rows, rows.clear(1)]), folder / "mlflow")
    yield f"ok  encoder, {counted(len(models), 'model')}, and the signature that MLflow stores"
    yield from _rank(context, artifact, day + timedelta(days=1))


def _ingest(context: Context, day: date, max_bad_share: float) -> None:
    report = ingest_day(context, day)
    bad = report.rows - report.good
    if bad > max_bad_share * report.rows:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in report.reasons.items())
        raise ProjectError(
            f"{context.log_path} ({day}): {bad:,} of {report.rows:,} rows break the contract "
            f"({reasons}); allowed: log.max_bad_share = {max_bad_share:.1%}"
        )


def _rank(context: Context, artifact: RankerArtifact, day: date) -> Iterator[str]:
    """Rank a hundred candidates of day D, or of the newest given set."""
    project, scoring = context.project, context.project.scoring
    if scoring.candidates is None:
        few: dict[str, Any] = {"generated_users": RANKED, "generated_items": RANKED}
        found, *warnings = describe_generated(context, day)
        yield from warnings
    else:
        path = context.source.root / scoring.candidates
        if not path.exists():
            raise ProjectError(
                f"{path}: not found (scoring.candidates = {scoring.candidates!r}); allowed: a "
                f"Parquet file, or a folder of {shown_layout(project.log)}"
            )
        wanted = day
        if path.is_dir():
            given = candidate_days(context)
            if not given:
                raise ProjectError(
                    f"{path}: no folder {shown_layout(project.log)} with a Parquet file"
                )
            day = day if day in given else given[-1]
        if day != wanted:
            yield f"warning: {path} has no set for {wanted}, which a night on the last day ranks"
        found = describe_candidates(context, day)
        sample = context.workspace.root / "candidates.parquet"
        prepared_candidates(context, day).head(RANKED * RANKED).sink_parquet(sample)
        few = {"candidates": str(sample.resolve())}
    project = project.model_copy(update={"scoring": scoring.model_copy(update=few)})
    own = replace(context, project=project)
    ranked = score_day(own, RegisteredRanker(replace(artifact, project=project), "check"), day)
    yield f"ok  {ranked.rows:,} candidates of {ranked.users:,} users ranked; set: {found}"
