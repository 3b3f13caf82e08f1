"""The dataset of a training: the examples of one split, read and encoded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import EVENT, LABEL, OPEN
from mtl_ranker.features.days import SplitDays, days_named, needed_days, split_days
from mtl_ranker.features.encoders import Encoder, fit_encoder
from mtl_ranker.features.lists import list_ids
from mtl_ranker.features.sql import run_sql, sql_text
from mtl_ranker.features.vectors import VectorTable, load_vectors
from mtl_ranker.features.view import examples_dataset, view_sql
from mtl_ranker.models.objectives import Task
from mtl_ranker.training.batches import Examples, encode_examples
from mtl_ranker.training.distillation import Teacher, fit_teacher
from mtl_ranker.training.distributed import SINGLE_PROCESS, World
from mtl_ranker.training.network import tasks_of
from mtl_ranker.training.shards import ShardedExamples, open_shards, write_shards
from mtl_ranker.training.soft_labels import ENCODED, Prior, SoftLabels, soft_labels
from mtl_ranker.workspace import Workspace, fingerprint

SAMPLE_ROWS = 1_000_000  # in memory, of training rows that are streamed


@dataclass(frozen=True)
class LogFacts:
    """What a sample of the training rows does not show.

    Attributes:
        day_rows: rows of each training day.
        first_day: first day of the published events.
    """

    day_rows: dict[date, int]
    first_day: date


@dataclass(frozen=True)
class Continuing:
    """Which rows a continued training reads, and how they are encoded.

    Attributes:
        encoder: of the training that it continues; it is extended by the values of the new rows.
        after: that training's last day; later training days are new.
    """

    encoder: Encoder
    after: date

    def new_days(self, days: SplitDays) -> list[date]:
        """The training days that are new."""
        return [day for day in days.train if day > self.after]


@dataclass(frozen=True)
class HeldOut:
    """The test rows.

    Attributes:
        labels: [N, T], NaN = missing.
        frame: raw examples.
        keys: of a list (`Log.list_keys`).
    """

    labels: np.ndarray
    frame: pl.DataFrame
    keys: Sequence[str]

    @property
    def user(self) -> np.ndarray:
        """[N]."""
        return self.frame["user_id"].to_numpy()

    @cached_property
    def lists(self) -> np.ndarray:
        """The list of each row [N] (`list_ids`)."""
        return list_ids(self.frame, self.keys)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which rows of the workspace a dataset has, so that another process can read the same ones.

    Attributes:
        project: with the settings by which the rows are read.
        partitions: name of the published dataset of examples.
        every: with streamed training rows, one row in so many is also in memory; None where all
            are.
        soft: of labels that are not final; None without soft labels.
        after: last day of the training that is continued; None for one from scratch.
    """

    project: Project
    workspace: Workspace
    partitions: str
    days: SplitDays
    every: int | None
    soft: SoftLabels | None
    after: date | None

    @property
    def by_part(self) -> dict[str, list[date]]:
        """train, validate, test → days."""
        return {"train": self.days.train, "validate": self.days.validate, "test": self.days.test}

    @property
    def labels(self) -> list[str]:
        """Columns of the objectives' labels."""
        return [LABEL + objective.name for objective in self.project.objectives]

    def files(self, scratch: Path, world: World) -> dict[str, list[Path]]:
        """Part → files of its partitions (see `Dataset.files`).

        Args:
            scratch: folder for those with soft labels.
        """
        found = {
            part: [self.workspace.path(self.partitions, day) for day in days]
            for part, days in self.by_part.items()
        }
        if self.soft is not None and (self.every is not None or self.after is not None):
            for part in ("train", "validate"):
                found[part] = self.soft.files(self.workspace, scratch, found[part], world)
        return found

    def scan(self) -> dict[str, pl.LazyFrame]:
        """Part → its raw examples, of a streamed split all of them."""
        return {p: self.workspace.scan(self.partitions, days) for p, days in self.by_part.items()}

    def frames(self) -> dict[str, pl.DataFrame]:
        """Part → its raw examples in memory (see `Dataset.frames`)."""
        lazy = self.scan()
        if self.every is not None:
            lazy["train"] = lazy["train"].gather_every(self.every)
        return {part: rows.collect(engine="streaming") for part, rows in lazy.items()}

    def vectors(self) -> dict[str, VectorTable]:
        """Vectors that the examples name, by column."""
        columns = self.project.features.embeddings
        return load_vectors(self.workspace, columns, list(self.scan().values())) if columns else {}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The examples of one split, raw and encoded, by part: train, validate, test.

    With more training rows than `training.in_memory_rows`, all of them are streamed from files, and
    the part `train` has evenly spaced ones. Of a continued training `train` has raw examples of all
    training days, and as tensors the rows that are trained on (`continued_examples`).

    Attributes:
        frames: part → raw examples.
        examples: part → the same rows as tensors.
        shards: all training rows, if they are streamed.
        files: part → files of its partitions; those of training and validation days have the labels
            that a training reads, where rows are read from files.
        facts: of the log, for drift.
        reading: which rows these are.
        scratch: folder for temporary files.
        teacher: of the labels of `train`; None without `training.distill`.
        elsewhere: whether trainings run on another host than the night: their checkpoints are then
            in the workspace's store, if it has one.
        digest: hash of the provenance of the training and validation examples.
        sql: template name → text, by which the examples were built.
        unlabelled: objectives and held-out days without labels (see `missing_labels`).
        list_keys: `Log.list_keys`.

    With soft labels, the labels of `frames` are final, and in `examples` those of `train` are what
    is trained on. With a teacher, a network is trained on the labels of the property `train`, and
    trees on those of `examples`.
    """

    tasks: list[Task]
    encoder: Encoder
    frames: dict[str, pl.DataFrame]
    examples: dict[str, Examples]
    shards: ShardedExamples | None
    files: dict[str, list[Path]]
    facts: LogFacts
    reading: Reading
    scratch: Path
    digest: str
    sql: Mapping[str, str]
    unlabelled: list[str]
    list_keys: Sequence[str]
    teacher: Teacher | None = None
    elsewhere: bool = False

    @property
    def days(self) -> SplitDays:
        return self.reading.days

    @property
    def workspace(self) -> Workspace:
        return self.reading.workspace

    @property
    def soft(self) -> SoftLabels | None:
        return self.reading.soft

    def trained_on(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Raw examples with the labels that a training reads."""
        return frame if self.soft is None else self.soft.of(frame)

    @cached_property
    def train(self) -> Examples | ShardedExamples:
        """All training rows, with the labels that a network is trained on."""
        if self.shards is not None:
            return self.shards
        rows = self.examples["train"]
        return rows if self.teacher is None else self.teacher.taught(rows, self.frames["train"])

    @cached_property
    def held_out(self) -> HeldOut:
        labels = self.examples["test"].labels.numpy()
        return HeldOut(labels, self.frames["test"], self.list_keys)

    @cached_property
    def validation(self) -> HeldOut:
        """The validation rows, as the test rows are given."""
        labels = self.examples["validate"].labels.numpy()
        return HeldOut(labels, self.frames["validate"], self.list_keys)


def load_dataset(
    context: Context,
    day: date,
    world: World = SINGLE_PROCESS,
    continuing: Continuing | None = None,
    prior: Prior | None = None,
) -> Dataset:
    """Read the split that ends with `day`, and encode it with an encoder fitted on training days.

    With `continuing` its encoder is extended instead, and the training rows are those of the new
    days with a replay of older ones.

    With several ranks, the first one writes the files from which rows are streamed. `prior` is for
    soft labels (training/soft_labels.py). Raises
    ProjectError for an empty split, for examples that are not built, for an objective that
    never occurs, always occurs or has no label in the training days, and where no objective can be
    judged on the validation days.
    """
    project, workspace = context.project, context.workspace
    days = split_days(project, needed_days(project, workspace.days("events"), day), day)
    by_part = {"train": days.train, "validate": days.validate, "test": days.test}
    unbuilt = set(days.all) - set(workspace.days(examples_dataset(context)))
    if unbuilt:
        raise ProjectError(
            f"examples of {min(unbuilt)} are not built; "
            f"run `mtl-ranker features --date {day}` first"
        )
    dataset = examples_dataset(context)
    for part, dates in by_part.items():
        where = f"{part} {days_named(dates)}"
        check_labels(project, workspace.scan(dataset, dates), where, part)
    unlabelled = [
        f"{part} day {day}: {problem}"
        for part, dates in by_part.items()
        if part != "train"
        for day in dates
        for problem in missing_labels(project, workspace.scan(dataset, [day]))
    ]
    everything = workspace.scan(dataset, days.train)
    counts = everything.group_by("date").len().collect(engine="streaming")
    day_rows = dict(zip(counts["date"].to_list(), counts["len"].to_list(), strict=True))
    rows = sum(day_rows.values())
    streamed = rows > project.training.in_memory_rows
    reading = Reading(
        project=project,
        workspace=workspace,
        partitions=dataset,
        days=days,
        every=-(-rows // SAMPLE_ROWS) if streamed else None,
        soft=soft_labels(context, day, prior),
        after=None if continuing is None else continuing.after,
    )
    scratch = workspace.root / ENCODED
    files, frames, tables = reading.files(scratch, world), reading.frames(), reading.vectors()
    if continuing is not None:
        new = workspace.scan_files(files["train"]).filter(pl.col("date") > continuing.after)
        encoder = replace(continuing.encoder.extended(project.features, new), tables=tables)
    elif streamed:
        encoder = fit_encoder(project, everything, SAMPLE_ROWS, tables)
    else:
        encoder = fit_encoder(project, frames["train"], tables=tables)
    described = Dataset(
        tasks=tasks_of(project),
        encoder=encoder,
        frames=frames,
        examples={},
        shards=None,
        files=files,
        facts=LogFacts(day_rows, workspace.days("events")[0]),
        reading=reading,
        scratch=scratch,
        sql=view_sql(context),
        unlabelled=unlabelled,
        list_keys=project.log.list_keys,
        digest=fingerprint(
            *(workspace.published_fingerprint(dataset, d) for d in days.train + days.validate),
            *([] if reading.soft is None else [reading.soft.digest]),
        ),
    )
    return _encoded(described, world)


def without_rows(dataset: Dataset) -> Dataset:
    """What `with_rows` needs to read the same dataset in another process.

    Encoded files are read again where the workspace is a folder, which other hosts share.
    """
    shared, shards = dataset.workspace.store is None, dataset.shards
    return replace(
        dataset,
        encoder=replace(dataset.encoder, tables={}),
        frames={},
        examples={},
        files=dataset.files if shared else {},
        shards=replace(shards, tables=()) if shared and shards is not None else None,
    )


def with_rows(dataset: Dataset, scratch: Path) -> Dataset:
    """The dataset of `without_rows` with its rows, on another host.

    Raises ProjectError where the workspace lacks a day of the split.

    Args:
        scratch: folder for temporary files that no other process writes to.
    """
    reading = dataset.reading
    lacking = set(reading.days.all) - set(reading.workspace.days(reading.partitions))
    if lacking:
        raise ProjectError(
            f"{reading.workspace.where()}: no examples of {min(lacking)} on this host; allowed: a "
            "folder or an address that all hosts share"
        )
    described = replace(
        dataset,
        encoder=replace(dataset.encoder, tables=reading.vectors()),
        frames=reading.frames(),
        files=dataset.files or reading.files(scratch, SINGLE_PROCESS),
        scratch=scratch,
        elsewhere=True,
    )
    return _encoded(described, SINGLE_PROCESS)


def _encoded(dataset: Dataset, world: World) -> Dataset:
    """The dataset with the rows of all parts as tensors or shards, by its encoder."""
    reading, encoder, frames = dataset.reading, dataset.encoder, dataset.frames
    labels, keys, folder = reading.labels, dataset.list_keys, dataset.scratch / "train"
    share, teacher = reading.project.training.distill, dataset.teacher
    trained: Examples | ShardedExamples
    if dataset.shards is not None:
        trained = open_shards(dataset.shards.files[0].parent)
    elif reading.after is not None:
        rows = reading.workspace.scan_files(dataset.files["train"])
        new, older = (
            rows.filter(pl.col("date") > reading.after),
            rows.filter(pl.col("date") <= reading.after),
        )
        trained = continued_examples(reading.project, encoder, new, older, folder)
    elif reading.every is not None:
        if share and teacher is None:
            known = dataset.trained_on(frames["train"])
            known_rows = encode_examples(encoder, known, labels, keys)
            teacher = fit_teacher(dataset.tasks, known_rows, known, share)
        write = partial(
            write_shards,
            encoder,
            dataset.files["train"],
            labels,
            list_keys=keys,
            change=None if teacher is None else teacher.taught,
        )
        trained = written_once(write, folder, world)
    else:
        known = dataset.trained_on(frames["train"])
        trained = encode_examples(encoder, known, labels, keys)
        teacher = teacher or fit_teacher(dataset.tasks, trained, known, share)
    examples = {"train": trained} if isinstance(trained, Examples) else {}
    for part in frames.keys() - examples.keys():
        examples[part] = encode_examples(encoder, frames[part], labels, keys)
    shards = trained if isinstance(trained, ShardedExamples) else None
    return replace(dataset, examples=examples, shards=shards, teacher=teacher)


def continued_examples(
    project: Project, encoder: Encoder, new: pl.LazyFrame, older: pl.LazyFrame, folder: Path
) -> Examples | ShardedExamples:
    """The rows that a continued training reads: new ones and, at random, `training.replay` of older
    ones for each of them, at most all.

    Which ones are replayed depends on the last new day. More than `training.in_memory_rows` are
    streamed from files of the folder.
    """
    labels = [LABEL + objective.name for objective in project.objectives]
    keys = project.log.list_keys
    count, last = new.select(pl.len(), pl.col("date").max()).collect(engine="streaming").row(0)
    replayed = replay_of(older, round(project.training.replay * count), last.toordinal())
    rows = pl.concat([new, replayed], how="vertical_relaxed")
    if rows.select(pl.len()).collect(engine="streaming").item() <= project.training.in_memory_rows:
        return encode_examples(encoder, rows.collect(engine="streaming"), labels, keys)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".parquet")
    rows.sink_parquet(file)
    write = partial(write_shards, encoder, [file], labels, list_keys=keys)
    return written_once(write, folder, SINGLE_PROCESS)


def replay_of(older: pl.LazyFrame, wanted: int, seed: int) -> pl.LazyFrame:
    """About `wanted` of these rows, each with the same probability; all if there are no more."""
    known = older.select(pl.len()).collect(engine="streaming").item()
    uniform = pl.struct("date", EVENT).hash(seed) / 2.0**64
    return older.filter(uniform < wanted / max(known, 1))


def written_once(write: Callable[[Path], object], folder: Path, world: World) -> ShardedExamples:
    """Write encoded rows to a temporary folder; the first rank writes, all open it."""
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        write(folder)
    world.wait()
    return open_shards(folder)


def check_labels(project: Project, examples: pl.LazyFrame, place: str, part: str) -> None:
    """Raise ProjectError unless each objective has labels that can be learned.

    Each needs labels in the training days, binary ones of both classes; one objective must have two
    different labels in the validation days, by which models are chosen. In every part, none is
    positive where the objective that it is conditional on is negative.

    Args:
        place: for messages.
        part: train, validate or test.
    """
    columns = examples.collect_schema().names()
    observed = {
        o.name: pl.coalesce(p + o.name for p in (LABEL, OPEN) if p + o.name in columns)
        for o in project.objectives
    }
    if part == "train":  # what is observed of labels that are not final is trained on
        examples = examples.with_columns(each.alias(LABEL + n) for n, each in observed.items())
    row = _label_counts(project, examples)
    if row["example_count"] == 0:
        raise ProjectError(f"split.{part}_days: no rows on {place}")
    if part == "validate" and not any(_varies(row, o.name) for o in project.objectives):
        raise ProjectError(
            f"split.validate_days: no objective has two different labels on {place}, so no model "
            "can be chosen; allowed: at least one"
        )
    for index, objective in enumerate(project.objectives):
        count, total = row[f"{objective.name}_count"], row[f"{objective.name}_sum"] or 0.0
        where = f"objectives[{index}] ({objective.name}), {place}"
        if count == 0 and part == "train":
            raise ProjectError(
                f"{where}: no row has this label (label = {objective.label!r}, "
                f"where = {objective.where!r}); allowed: at least one"
            )
        if objective.conditional_on is not None:
            child, parent = observed[objective.name], observed[objective.conditional_on]
            contradicting = examples.filter((child == 1) & ~(parent == 1).fill_null(False))
            orphans = contradicting.select(pl.len()).collect(engine="streaming").item()
            if orphans:
                raise ProjectError(
                    f"{where}: conditional_on = {objective.conditional_on!r}, but {orphans:,} "
                    f"of {int(total):,} positive rows have {objective.conditional_on} = 0; "
                    "allowed: none"
                )
        if part == "train" and objective.kind == "binary" and total in (0.0, float(count)):
            problem = "never occurs (all 0)" if total == 0 else "always occurs (all 1)"
            raise ProjectError(
                f"{where}: the label {problem} in {count:,} rows; allowed: both 0 and 1"
            )


def missing_labels(project: Project, examples: pl.LazyFrame) -> list[str]:
    """Objectives that have no label on these rows, or one class only.

    They are left out of what is said about the quality on these rows.
    """
    row, problems = _label_counts(project, examples), []
    for index, objective in enumerate(project.objectives):
        if not _varies(row, objective.name):
            count, lowest = row[f"{objective.name}_count"], row[f"{objective.name}_min"]
            found = f"all {count:,} labels are {lowest:g}" if count else "no row has this label"
            problems.append(
                f"objectives[{index}] ({objective.name}): {found}; left out of the verdicts"
            )
    return problems


def _label_counts(project: Project, examples: pl.LazyFrame) -> dict[str, Any]:
    """For each objective the number, sum, minimum and maximum of its labels, and the rows."""
    names = [o.name for o in project.objectives]
    counts = run_sql(sql_text("checks/labels.sql"), {"examples": examples}, objectives=names)
    return counts.collect(engine="streaming").to_dicts()[0]


def _varies(row: Mapping[str, Any], name: str) -> bool:
    return row[f"{name}_count"] > 0 and row[f"{name}_min"] != row[f"{name}_max"]
