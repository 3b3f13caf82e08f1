"""One night's training: every model × seed on the same rows and the same held-out days."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch

from mtl_ranker import __version__
from mtl_ranker.artifact import RankerArtifact
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.blend import blended
from mtl_ranker.evaluation.calibration import fit_calibration
from mtl_ranker.evaluation.diagnostics import Diagnosis, diagnose
from mtl_ranker.evaluation.drift import Drift, health
from mtl_ranker.evaluation.intervals import Interval, interval, quality_draws, user_draws
from mtl_ranker.evaluation.metrics import evaluate, quality_metric
from mtl_ranker.evaluation.offpolicy import Estimate, off_policy
from mtl_ranker.evaluation.sharing import (
    SharingGain,
    label_correlation,
    over_seeds,
    sharing_gains,
)
from mtl_ranker.evaluation.slices import Slice, divide, slice_metrics
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.features.queries import LABEL, numeric_features, run_sql
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import RankerSpec
from mtl_ranker.objectives import Task
from mtl_ranker.training.batches import Examples, encode_examples, take, thin_negatives
from mtl_ranker.training.boosting import fit_forest
from mtl_ranker.training.checkpoints import Checkpoint
from mtl_ranker.training.concurrent import cores, side_by_side
from mtl_ranker.training.distributed import ALONE, World
from mtl_ranker.training.loop import Epoch, Trained, train_ranker
from mtl_ranker.training.shards import ShardedExamples, open_shards, write_shards
from mtl_ranker.workspace import Workspace, fingerprint

DIAGNOSED_ROWS = 8_192
SAMPLE_ROWS = 1_000_000  # of training rows that do not fit into memory
ENCODED, CHECKPOINTS = "encoded", "checkpoints"
WORTH_A_PROCESS = 200_000  # rows x epochs of one training
Metrics = dict[str, dict[str, float]]  # objective -> metric -> value


@dataclass(frozen=True)
class Days:
    """The days of one training, each list ascending."""

    train: list[date]
    validate: list[date]
    test: list[date]


@dataclass(frozen=True)
class ModelRun:
    """One model × seed: its training, and what it predicts on the validation and test days [N, T].

    `raw_prediction` are the test days before calibration, which was fitted on the validation days.
    """

    name: str
    seed: int
    spec: RankerSpec
    trained: Trained
    validate_quality: float
    validate_prediction: np.ndarray
    raw_prediction: np.ndarray
    test_prediction: np.ndarray
    metrics: Metrics
    artifact: RankerArtifact
    diagnosis: Diagnosis

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.seed}"


@dataclass(frozen=True)
class HeldOut:
    """The test rows: labels [N, T] (NaN = missing) and the user of each row [N]."""

    labels: np.ndarray
    user: np.ndarray
    frame: pl.DataFrame


@dataclass(frozen=True)
class Suite:
    days: Days
    tasks: list[Task]
    runs: list[ModelRun]
    baselines: dict[str, Metrics]
    intervals: dict[tuple[str, str], Interval]  # (model, objective) -> mean seed's quality
    gains: list[SharingGain]  # against the model that shares nothing, if there is one
    label_correlation: np.ndarray  # [T, T] between labels of the training days
    slices: list[Slice]  # of the winner
    off_policy: list[Estimate]  # of the winner's blended ranking
    drift: Drift
    held_out: HeldOut
    train_rows: int
    winner: ModelRun


def tasks_of(project: Project) -> list[Task]:
    return [
        Task(o.name, o.kind, o.weight, o.transform, o.after, o.levels) for o in project.objectives
    ]


def model_specs(project: Project) -> dict[str, RankerSpec]:
    """Each `[models.*]` as a specification. Raises ProjectError naming the key."""
    try:
        return {
            name: make(f"models.{name}", settings, len(project.objectives), project.features.groups)
            for name, settings in project.models.items()
        }
    except ValueError as error:
        raise ProjectError(str(error)) from error


def split_days(project: Project, available: list[date], day: date) -> Days:
    """Test days end with `day`, validation before them, then training, after the warm-up.

    Raises ProjectError naming the part that would be empty.
    """
    split = project.split
    first = day - timedelta(days=split.test_days - 1)
    test = [d for d in available if first <= d <= day]
    second = first - timedelta(days=split.validate_days)
    validate = [d for d in available if second <= d < first]
    third = second - timedelta(days=split.train_days)
    warm = set(available[: split.warmup_days])
    train = [d for d in available if third <= d < second and d not in warm]
    for name, days, start, end in (
        ("test", test, first, day),
        ("validate", validate, second, first - timedelta(days=1)),
        ("train", train, third, second - timedelta(days=1)),
    ):
        if not days:
            have = f"{available[0]} to {available[-1]}" if available else "none"
            warmed = f" after {split.warmup_days} warm-up days" if name == "train" else ""
            raise ProjectError(
                f"split.{name}_days: no day of the log lies in {start}..{end}{warmed}, so the "
                f"{name} part is empty; days found: {have}"
            )
    return Days(train, validate, test)


def needed_days(project: Project, available: list[date], day: date) -> list[date]:
    """Days that a training on `day` reads: its split and the longest window before it."""
    split = project.split
    rows = split.test_days + split.validate_days + split.train_days
    earliest = day - timedelta(days=rows - 1 + project.features.windows[-1])
    return [d for d in available if earliest <= d <= day]


@dataclass(frozen=True)
class Prepared:
    """The examples of one split, raw and encoded, by part: train, validate, test.

    Of more training rows than `training.in_memory_rows`, these are an even sample, and all of them
    stream from files.

    Attributes:
        shards: the training rows, where they stream from files.
        files: part → its partitions.
        workspace: where files may be put.
        marks: a hash of what the examples were made from.
    """

    days: Days
    tasks: list[Task]
    encoder: Encoder
    frames: dict[str, pl.DataFrame]
    examples: dict[str, Examples]
    shards: ShardedExamples | None
    files: dict[str, list[Path]]
    workspace: Workspace
    marks: str

    @property
    def train(self) -> Examples | ShardedExamples:
        """All training rows."""
        return self.examples["train"] if self.shards is None else self.shards

    @property
    def held_out(self) -> HeldOut:
        frame = self.frames["test"]
        return HeldOut(self.examples["test"].labels.numpy(), frame["user_id"].to_numpy(), frame)


def prepare(project: Project, workspace: Workspace, day: date, world: World = ALONE) -> Prepared:
    """Read the split that ends with `day`, and encode it by what its training days know.

    Of several ranks the first writes what streams from files. Raises ProjectError for an empty
    split, and for an objective that never occurs, always occurs or has no label in the training
    days.
    """
    days = split_days(project, needed_days(project, workspace.days("events"), day), day)
    unbuilt = set(days.train + days.validate + days.test) - set(workspace.days("examples"))
    if unbuilt:
        raise ProjectError(
            f"examples of {min(unbuilt)} are not built; "
            f"run `mtl-ranker features --date {day}` first"
        )
    tasks = tasks_of(project)
    parts = {n: workspace.scan("examples", getattr(days, n)) for n in ("train", "validate", "test")}
    for name in ("train", "validate", "test"):
        check_labels(project, parts[name], f"{name} days {_span(getattr(days, name))}", name)
    rows = parts["train"].select(pl.len()).collect().item()
    files = {n: [workspace.path("examples", d) for d in getattr(days, n)] for n in parts}
    marks = fingerprint(
        *(workspace.published_fingerprint("examples", d) for d in days.train + days.validate)
    )
    labels = [LABEL + task.name for task in tasks]
    numerics = numeric_features(project)
    shards = None
    if rows > project.training.in_memory_rows:
        encoder = Encoder.fit(project.features, numerics, parts["train"], SAMPLE_ROWS)
        parts["train"] = parts["train"].gather_every(-(-rows // SAMPLE_ROWS))
        shards = _sharded(encoder, files["train"], labels, workspace, "train", world)
    frames = {name: lazy.collect(engine="streaming") for name, lazy in parts.items()}
    if shards is None:
        encoder = Encoder.fit(project.features, numerics, frames["train"])
    encoded = {name: encode_examples(encoder, frame, labels) for name, frame in frames.items()}
    return Prepared(days, tasks, encoder, frames, encoded, shards, files, workspace, marks)


def _sharded(
    encoder: Encoder,
    files: list[Path],
    labels: list[str],
    workspace: Workspace,
    name: str,
    world: World,
) -> ShardedExamples:
    """Encoded rows in a folder that is removed with the training's end."""
    folder = workspace.root / ENCODED / name
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        write_shards(encoder, files, labels, folder)
    world.wait()
    return open_shards(folder)


def train_suite(
    project: Project,
    workspace: Workspace,
    day: date,
    on_epoch: Callable[[str, int, Epoch], None] | None = None,
    world: World = ALONE,
    on_step: Callable[[str], None] = lambda words: None,
) -> Suite:
    """Train every model × seed and evaluate it; the winner is chosen on validation, never on test.

    With a `world` of several ranks every rank calls this, and each training is theirs together.
    `on_step` is told what begins that has no epochs.

    Raises ProjectError as `prepare` does, and for an unknown model setting.
    """
    specs = model_specs(project)
    parts = prepare(project, workspace, day, world)
    refuse_drift(health(project, parts.frames))
    runs = train_all(project, parts, specs, on_epoch, world)
    tasks, held_out, frame = parts.tasks, parts.held_out, parts.frames["train"]
    by_model = {n: [r for r in runs if r.name == n] for n in specs}
    mean = {n: float(np.mean([r.validate_quality for r in rs])) for n, rs in by_model.items()}
    best = max(mean, key=lambda n: mean[n])
    winner = max(by_model[best], key=lambda r: r.validate_quality)
    further = []
    if project.training.trees:
        on_step(f"boosted trees beside {winner.name}")
        joined = with_trees(project, parts, winner)
        runs.append(joined)
        further.append(joined)
        if joined.validate_quality > winner.validate_quality:
            winner = joined
    if project.training.refit:
        again = f"{winner.name}, refit"

        def tell(epoch: Epoch) -> None:
            if on_epoch is not None:
                on_epoch(again, winner.seed, epoch)

        winner = refit(project, parts, winner, tell, world, on_step)
        runs.append(winner)
        further.append(winner)
    by_model |= {run.name: [run] for run in further}
    on_step("comparing the models")
    apart = next((name for name, spec in specs.items() if spec.apart), None)
    intervals, gains = compare_models(project, tasks, by_model, held_out, apart)
    # Trees and more days are no comparison of sharing with the model that shares nothing.
    gains = [gain for gain in gains if gain.model in specs]
    names = [task.name for task in tasks]
    found, score = winner.test_prediction, blended_score(project, winner.test_prediction)
    scored = {
        "train": winner.artifact.predict(parts.frames["train"]).select(names).to_numpy(),
        "validate": winner.validate_prediction,
        "test": winner.test_prediction,
    }
    drift = health(project, parts.frames, scored)
    parted = divide(held_out.frame, project.log.context, exposure_columns(project))
    world.wait()
    for scratch in (ENCODED, CHECKPOINTS):
        shutil.rmtree(workspace.root / scratch, ignore_errors=True)
    return Suite(
        parts.days,
        tasks,
        runs,
        baselines(tasks, frame, held_out),
        intervals,
        gains,
        label_correlation(parts.examples["train"].labels.numpy()),
        slice_metrics(tasks, held_out.labels, found, held_out.user, parted),
        off_policy(project, held_out.frame, held_out.labels, score),
        drift,
        held_out,
        len(parts.train),
        winner,
    )


def train_all(
    project: Project,
    parts: Prepared,
    specs: Mapping[str, RankerSpec],
    on_epoch: Callable[[str, int, Epoch], None] | None = None,
    world: World = ALONE,
) -> list[ModelRun]:
    """Every model × seed, side by side where that pays (`training.jobs`, `training.threads`).

    With the same number of threads the results are the same, however many trainings run at a time.
    """
    jobs = [(name, seed) for name in specs for seed in project.training.seeds]
    available = cores()
    wanted = project.training.jobs or (available if _worthwhile(project, parts) else 1)
    wanted = wanted if world.size == 1 else 1
    processes = min(len(jobs), wanted)
    threads = project.training.threads or max(1, available // processes)
    tell = on_epoch or (lambda name, seed, epoch: None)
    torch.set_num_threads(threads)
    try:
        if processes > 1:
            given = (project, parts, dict(specs))
            return side_by_side(_train_job, given, jobs, processes, threads, tell)
        return [
            train_model(project, parts, name, specs[name], seed, partial(tell, name, seed), world)
            for name, seed in jobs
        ]
    finally:
        torch.set_num_threads(project.training.threads or available)


def _train_job(
    given: tuple[Project, Prepared, Mapping[str, RankerSpec]],
    job: tuple[str, int],
    report: Callable[[Epoch], None],
) -> ModelRun:
    project, parts, specs = given
    name, seed = job
    return train_model(project, parts, name, specs[name], seed, report)


def _worthwhile(project: Project, parts: Prepared) -> bool:
    """Starting a process takes seconds; a small training less than that."""
    return len(parts.train) * project.training.epochs >= WORTH_A_PROCESS


def refuse_drift(found: Drift) -> None:
    """Raises ProjectError when a day crosses a failing threshold of `[drift]`."""
    if found.failures:
        raise ProjectError(
            "the data drifted too far to train on:\n  " + "\n  ".join(found.failures)
        )


def train_model(
    project: Project,
    parts: Prepared,
    name: str,
    spec: RankerSpec,
    seed: int,
    on_epoch: Callable[[Epoch], None] | None = None,
    world: World = ALONE,
) -> ModelRun:
    """Train one model with one seed, and look at it on the held-out rows."""
    tasks = parts.tasks
    validate = parts.examples["validate"]
    trained = train_ranker(
        spec,
        parts.encoder,
        tasks,
        _thinned(project, tasks, parts.train, seed),
        validate,
        project.training,
        seed,
        on_epoch,
        checkpoint=_checkpoint(project, parts, name, spec, seed),
        world=world,
    )
    artifact = RankerArtifact(project, parts.encoder, tasks, trained.model)
    return _validated(project, parts, name, seed, trained, artifact)


def with_trees(project: Project, parts: Prepared, run: ModelRun) -> ModelRun:
    """A trained model's predictions averaged with those of boosted trees (training/boosting.py).

    The trees are fitted on the training rows in memory, a million of them at most, evenly from all;
    how many is decided on the validation rows.
    """
    trees = fit_forest(
        parts.tasks,
        _thinned(project, parts.tasks, parts.examples["train"], run.seed).sample(SAMPLE_ROWS),
        project.training.trees,
        run.seed,
        parts.examples["validate"],
    )
    artifact = replace(run.artifact, trees=trees)
    name = f"{run.name}, trees"
    return _validated(project, parts, name, run.seed, run.trained, artifact, run.diagnosis)


def _validated(
    project: Project,
    parts: Prepared,
    name: str,
    seed: int,
    trained: Trained,
    artifact: RankerArtifact,
    diagnosis: Diagnosis | None = None,
) -> ModelRun:
    """A run with its quality and its calibration on the validation days."""
    tasks, validate, frame = parts.tasks, parts.examples["validate"], parts.frames["validate"]
    raw = artifact.raw(validate.inputs)
    found = evaluate_all(tasks, validate.labels.numpy(), raw, frame["user_id"].to_numpy())
    by = project.calibration.by
    surface = None if by is None else frame[by]
    calibration = fit_calibration(
        tasks,
        validate.labels.numpy(),
        raw,
        project.calibration.method,
        by,
        surface,
        project.calibration.min_positives,
    )
    return _looked_at(
        parts,
        name,
        seed,
        trained,
        blended_quality(tasks, found),
        calibration.apply([task.name for task in tasks], raw, surface),
        replace(artifact, calibration=calibration),
        diagnosis,
    )


def refit(
    project: Project,
    parts: Prepared,
    run: ModelRun,
    on_epoch: Callable[[Epoch], None] | None = None,
    world: World = ALONE,
    on_step: Callable[[str], None] = lambda words: None,
) -> ModelRun:
    """The same model trained again on training and validation days together, as long as it was
    best: what serves tomorrow should know yesterday.

    The encoder is fitted on both, too. Calibration was fitted on predictions for days that the
    weights had not seen; they know those days now, so it moves predictions only half as far
    (`calibration.refit_share`). The validation quality by which the model was chosen stays.
    """
    tasks, training = parts.tasks, project.training
    labels, numerics = [LABEL + task.name for task in tasks], numeric_features(project)
    known: Examples | ShardedExamples
    if parts.shards is not None:
        files = [*parts.files["train"], *parts.files["validate"]]
        lazy = pl.scan_parquet(files, missing_columns="insert", glob=False)
        encoder = Encoder.fit(project.features, numerics, lazy, SAMPLE_ROWS)
        known = _sharded(encoder, files, labels, parts.workspace, "refit", world)
    else:
        frame = pl.concat([parts.frames["train"], parts.frames["validate"]], how="vertical_relaxed")
        encoder = Encoder.fit(project.features, numerics, frame)
        known = encode_examples(encoder, frame, labels)
    name = f"{run.name}, refit"
    thinned = _thinned(project, tasks, known, run.seed)
    trained = train_ranker(
        run.spec,
        encoder,
        tasks,
        thinned,
        None,
        training,
        run.seed,
        on_epoch,
        run.trained.best_epochs,
        _checkpoint(project, parts, name, run.spec, run.seed),
        world,
    )
    trees = run.artifact.trees
    if trees is not None:
        on_step(f"boosted trees beside {name}")
        few = thinned.sample(SAMPLE_ROWS)
        trees = fit_forest(tasks, few, project.training.trees, run.seed, trees=trees.trees)
    calibration = run.artifact.calibration.part(project.calibration.refit_share)
    artifact = RankerArtifact(project, encoder, tasks, trained.model, calibration, trees)
    again = replace(
        parts,
        encoder=encoder,
        examples={"test": encode_examples(encoder, parts.frames["test"], labels)},
    )
    return _looked_at(
        again,
        name,
        run.seed,
        trained,
        run.validate_quality,
        run.validate_prediction,
        artifact,
    )


def _looked_at(
    parts: Prepared,
    name: str,
    seed: int,
    trained: Trained,
    validate_quality: float,
    validate_prediction: np.ndarray,
    artifact: RankerArtifact,
    diagnosis: Diagnosis | None = None,
) -> ModelRun:
    """A trained model's run, with what it predicts on the test days, and a look into its network
    unless it was looked into before.
    """
    tasks, held_out, test = parts.tasks, parts.held_out, parts.examples["test"]
    by = artifact.calibration.by
    raw = artifact.raw(test.inputs)
    prediction = artifact.calibration.apply(
        [task.name for task in tasks], raw, held_out.frame[by] if by else None
    )
    if diagnosis is None:
        rows = take(test, torch.arange(min(DIAGNOSED_ROWS, len(test))))
        diagnosis = diagnose(trained.model, rows.inputs, rows.labels.numpy(), tasks)
    return ModelRun(
        name,
        seed,
        trained.model.spec,
        trained,
        validate_quality,
        validate_prediction,
        raw,
        prediction,
        evaluate_all(tasks, held_out.labels, prediction, held_out.user),
        artifact,
        diagnosis,
    )


def _thinned(
    project: Project, tasks: list[Task], rows: Examples | ShardedExamples, seed: int
) -> Examples | ShardedExamples:
    if project.training.negative_keep == 1.0:
        return rows
    binary = [t for t, task in enumerate(tasks) if task.kind == "binary"]
    return rows.thinned(
        partial(thin_negatives, binary=binary, keep=project.training.negative_keep), seed
    )


def _checkpoint(
    project: Project, parts: Prepared, name: str, spec: RankerSpec, seed: int
) -> Checkpoint:
    """Of one training of a suite; the next suite of the workspace starts without."""
    key = fingerprint(
        __version__, parts.marks, project.digest("features", "objectives", "training"), spec, name
    )
    place = parts.workspace.root / CHECKPOINTS / f"{fingerprint(name, seed)}.pt"
    return Checkpoint(place, key, project.training.checkpoint_seconds)


def blended_score(project: Project, prediction: np.ndarray) -> np.ndarray:
    """The project's own blend of predictions [N, T], up to a monotone map: [N]."""
    weights = list(project.blend_weights.values())
    return blended(project.scoring.blend, weights, prediction)


def exposure_columns(project: Project) -> dict[str, str]:
    """`user` and `item` → the feature of their impressions a day in the longest window."""
    longest = project.features.windows[-1]
    return {
        who: f"{who}_daily_impressions_{longest}d"
        for who in ("user", "item")
        if [f"{who}_id"] in project.features.entities
    }


def check_labels(project: Project, examples: pl.LazyFrame, place: str, part: str) -> None:
    """Each objective must occur, and not always. Raises ProjectError naming it."""
    names = [o.name for o in project.objectives]
    counts = run_sql("checks/labels.sql", {"examples": examples}, objectives=names)
    row = counts.collect(engine="streaming").to_dicts()[0]
    if row["example_count"] == 0:
        raise ProjectError(f"split.{part}_days: {place} hold no rows")
    for index, objective in enumerate(project.objectives):
        count, total = row[f"{objective.name}_count"], row[f"{objective.name}_sum"] or 0.0
        where = f"objectives[{index}] ({objective.name}), {place}"
        if count == 0:
            raise ProjectError(
                f"{where}: no row has this label (label = {objective.label!r}, "
                f"where = {objective.where!r}); allowed: at least one"
            )
        if objective.after is not None:
            child, parent = (pl.col(LABEL + n) for n in (objective.name, objective.after))
            odd = examples.filter((child == 1) & ~(parent == 1).fill_null(False))
            alone = odd.select(pl.len()).collect(engine="streaming").item()
            if alone:
                raise ProjectError(
                    f"{where}: after = {objective.after!r}, but {alone:,} of {int(total):,} "
                    f"positive rows have {objective.after} = 0; allowed: none"
                )
        if part == "train" and objective.kind == "binary" and total in (0.0, float(count)):
            found = "never occurs (all 0)" if total == 0 else "always occurs (all 1)"
            raise ProjectError(
                f"{where}: the label {found} in {count:,} rows; allowed: both 0 and 1"
            )


def evaluate_all(
    tasks: list[Task], labels: np.ndarray, prediction: np.ndarray, user: np.ndarray
) -> Metrics:
    return {
        task.name: evaluate(task.kind, labels[:, t], prediction[:, t], user)
        for t, task in enumerate(tasks)
    }


def blended_quality(tasks: list[Task], metrics: Metrics) -> float:
    """The objectives' weighted mean of AUC (binary) and R² (regression)."""
    values = [metrics[t.name][quality_metric(t.kind)] for t in tasks]
    weights = [t.weight for t in tasks]
    known = [(v, w) for v, w in zip(values, weights, strict=True) if not np.isnan(v)]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else float("nan")


def baselines(tasks: list[Task], train: pl.DataFrame, held_out: HeldOut) -> dict[str, Metrics]:
    """What one gets without a model: the training mean, and the item's smoothed training mean."""
    smoothing = 20.0
    constant, popularity = [], []
    for task in tasks:
        label = pl.col(LABEL + task.name)
        mean = float(train.select(label.mean()).item())
        per_item = train.group_by("item_id").agg(
            ((label.sum() + smoothing * mean) / (label.count() + smoothing)).alias("p")
        )
        joined = held_out.frame.select("item_id").join(
            per_item, on="item_id", how="left", maintain_order="left"
        )
        popularity.append(joined["p"].fill_null(mean).to_numpy())
        constant.append(np.full(len(held_out.user), mean))
    return {
        name: evaluate_all(tasks, held_out.labels, np.stack(columns, 1), held_out.user)
        for name, columns in (("base_rate", constant), ("item_popularity", popularity))
    }


def compare_models(
    project: Project,
    tasks: list[Task],
    by_model: Mapping[str, list[ModelRun]],
    held_out: HeldOut,
    reference: str | None,
) -> tuple[dict[tuple[str, str], Interval], list[SharingGain]]:
    """Each model's mean AUC (or R²) over seeds with its interval, and its gain over `reference`.

    Users, and among several seeds the trainings, are drawn anew; the same users for all models.
    """
    weights = user_draws(held_out.user, project.promotion.bootstrap)
    confidence = project.promotion.confidence
    values, draws = {}, {}
    for name, runs in by_model.items():
        for t, task in enumerate(tasks):
            label, measure = held_out.labels[:, t], quality_metric(task.kind)
            each = [quality_draws(task.kind, label, r.test_prediction[:, t], weights) for r in runs]
            draws[name, task.name] = over_seeds(np.stack(each))
            values[name, task.name] = float(np.mean([r.metrics[task.name][measure] for r in runs]))
    intervals = {key: interval(value, draws[key], confidence) for key, value in values.items()}
    measures = {task.name: quality_metric(task.kind) for task in tasks}
    gains = sharing_gains(values, draws, reference, measures, confidence) if reference else []
    return intervals, gains


def _span(days: list[date]) -> str:
    return str(days[0]) if len(days) == 1 else f"{days[0]}..{days[-1]}"
