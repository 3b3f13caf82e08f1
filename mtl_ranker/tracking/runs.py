"""Trainings, searches and studies as MLflow runs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from getpass import getuser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import mlflow
import mlflow.pyfunc
import numpy as np
from matplotlib.figure import Figure
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import (
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_USER,
)
from mlflow.utils.validation import MAX_ENTITIES_PER_BATCH, MAX_METRICS_PER_BATCH

from mtl_ranker import __version__
from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.evaluation.metrics import Metrics, quality_metric
from mtl_ranker.nightly.plan import PastNight
from mtl_ranker.nightly.results import ModelRun, Suite
from mtl_ranker.nightly.tuning import Search, Trial
from mtl_ranker.reports.markdown import run_text, training_text
from mtl_ranker.reports.pictures import Picture, RunPictures
from mtl_ranker.tracking.connection import artifact_root, page_address
from mtl_ranker.tracking.lineage import log_datasets, split_datasets
from mtl_ranker.tracking.view import KIND_TAG, MODEL, TRAINING, share_view, view_query
from mtl_ranker.workspace import Workspace, fingerprint


@dataclass(frozen=True)
class Logged:
    """A training, search or study in MLflow.

    Attributes:
        run_id: of the parent run.
        child_runs: name → run id.
    """

    run_id: str
    experiment_id: str
    child_runs: dict[str, str]

    @property
    def link(self) -> str:
        """The experiment's page, in the view for machine learning (the default is for LLMs)."""
        page = f"{page_address()}/#/experiments/{self.experiment_id}/runs"
        return f"{page}?workflowType=machine_learning"

    @property
    def trainings_link(self) -> str:
        """The experiment's page with one row per training, best first (`view`)."""
        return f"{page_address()}/#/experiments/{self.experiment_id}/runs?{view_query()}"

    @property
    def run_link(self) -> str:
        """The page of the parent run."""
        page = f"{page_address()}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{page}?workflowType=machine_learning"

    @property
    def report_link(self) -> str:
        """The HTML report in the parent run, relative to MLflow's address."""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}/artifacts/report.html"

    @property
    def comparison_link(self) -> str:
        """The page that compares this training's runs."""
        runs = quote(json.dumps(list(self.child_runs.values())))
        experiments = quote(json.dumps([self.experiment_id]))
        query = f"runs={runs}&experiments={experiments}&workflowType=machine_learning"
        return f"{page_address()}/#/compare-runs?{query}"


def first_and_last(days: Sequence[date]) -> str:
    """`first..last`, also for one day, so that runs compare."""
    return f"{days[0]}..{days[-1]}"


INPUTS_TAG = "inputs"
VERSION_TAG = "registered_version"
NIGHT_TAG = "night"  # what later nights need of a training, as JSON


def attempts(
    project: Project, workspace: Workspace, inputs: str
) -> list[tuple[Logged, str | None]]:
    """Earlier logs of a training with the same inputs, each with its registered version.

    The version is None where logging or registering failed half way.
    """
    client = mlflow.MlflowClient()
    experiment = _experiment(project.name, workspace)
    found = []
    for parent in client.search_runs([experiment], f"tags.{INPUTS_TAG} = '{inputs}'"):
        of_parent = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}'"
        runs = client.search_runs([experiment], of_parent)
        children = {run.info.run_name: run.info.run_id for run in runs}
        logged = Logged(parent.info.run_id, experiment, children)
        found.append((logged, parent.data.tags.get(VERSION_TAG)))
    return found


def past_nights(project: Project, workspace: Workspace) -> list[PastNight]:
    """The trainings of the project's experiment, latest first; of a day the last one."""
    client = mlflow.MlflowClient()
    experiment = _experiment(project.name, workspace)
    logged = client.search_runs(
        [experiment], f"tags.{NIGHT_TAG} LIKE '{{%'", order_by=["start_time DESC"]
    )
    nights: dict[date, PastNight] = {}
    for run in logged:
        content = json.loads(run.data.tags[NIGHT_TAG])
        day = date.fromisoformat(content["day"])
        specs = content.get("specs", {})
        nights.setdefault(day, PastNight(day, content["full"], content["behind"], specs))
    return list(nights.values())


def log_suite(
    context: Context,
    suite: Suite,
    digest: str,
    report: str,
    inputs: str,
    pictures: RunPictures,
) -> Logged:
    """Log a training as a parent run with a child run per model × seed, with plots and tables.

    The parent run has the winner's test metrics, so that nights compare with each other. Metrics
    are named PART/OBJECTIVE/METRIC (`test/click/auc`), by which MLflow groups its charts; those of
    baselines follow in `test_NAME`. Runs have the start times of their trainings; `set_ends` sets
    the end times.

    Args:
        digest: of the examples.
        report: the HTML report (`reports/page.py`).
        inputs: hash of all that decides the training, for `attempts`.
        pictures: of the runs (`reports/pictures.py`).
    """
    project, workspace = context.project, context.workspace
    experiment_id = _experiment(project.name, workspace)
    span = {
        "train_days": first_and_last(suite.days.train),
        "validate_days": first_and_last(suite.days.validate),
        "test_days": first_and_last(suite.days.test),
    }
    tags = {"git_commit": _git_commit(), "dataset_digest": digest, "mtl_ranker": __version__}
    children: dict[str, str] = {}
    started = min(run.started for run in suite.runs)
    name, winner = f"training {suite.night}", suite.winner
    night = {
        "day": str(suite.days.test[-1]),
        "full": suite.plan.full,
        "behind": {model: round(value, 3) for model, value in suite.behind.items()},
        "specs": {
            run.name: fingerprint(run.spec) for run in suite.runs if run.name in suite.behind
        },
    }
    tags_of_parent = tags | {INPUTS_TAG: inputs, NIGHT_TAG: json.dumps(night)}
    share_view(experiment_id, _compared(suite))
    datasets = split_datasets(context, suite.days)
    with _run_started(experiment_id, name, tags_of_parent, started) as parent:
        logged = Logged(parent, experiment_id, children)
        log_datasets(datasets)
        mlflow.log_params({**span, "train_rows": suite.train_rows, "dataset_digest": digest})
        mlflow.log_params(_plan(suite))
        mlflow.log_metrics(_results(winner) | {"train/seconds": _seconds(suite)})
        mlflow.log_text(project.source_text, "project.toml")
        mlflow.log_text(report, "report.html")
        mlflow.log_dict(_sharing(suite), "sharing.json")
        mlflow.log_table(_comparison(suite), "comparison.json")
        details = {
            "slices": [asdict(part) for part in suite.slices],
            "off_policy": [asdict(estimate) for estimate in suite.off_policy],
            "drift_warnings": suite.drift.warnings,
            "suspicious": suite.suspicious,
            "days": [asdict(health) | {"day": str(health.day)} for health in suite.drift.days],
        }
        mlflow.log_dict(_plain_numbers(details), "slices.json")
        for name, metrics in suite.baselines.items():
            mlflow.log_metrics(_flat(f"test_{name}", metrics))
        mlflow.set_tags(
            {
                KIND_TAG: TRAINING,
                "winner": winner.name,
                "winner_seed": winner.seed,
                "refit": _flag(winner.refitted),
                "seeds": ", ".join(str(seed) for seed in project.training.seeds),
                MLFLOW_RUN_NOTE: training_text(suite, logged.report_link),
            }
        )
        for run in suite.runs:
            child_tags = tags | {MLFLOW_PARENT_RUN_ID: parent}
            with _run_started(experiment_id, run.label, child_tags, run.started) as child:
                children[run.label] = child
                log_datasets(datasets)
                _log_run(child, suite, run, span, pictures[run.label])
    return logged


def baseline_run(context: Context, model: str, name: str) -> str:
    """Log a run of the project's experiment for a ranker without a training; returns its id."""
    experiment_id = _experiment(context.project.name, context.workspace)
    tags = {"git_commit": _git_commit(), "mtl_ranker": __version__}
    with _run_started(experiment_id, name, tags, time.time()) as run_id:
        mlflow.log_param("model", model)
        mlflow.log_text(context.project.source_text, "project.toml")
    return run_id


def set_ends(suite: Suite, logged: Logged) -> None:
    """End each run of a suite at the time when its training ended."""
    client = mlflow.MlflowClient()
    for run in suite.runs:
        client.set_terminated(logged.child_runs[run.label], end_time=round(1_000 * run.ended))
    client.set_terminated(logged.run_id, end_time=round(1_000 * max(r.ended for r in suite.runs)))


@contextmanager
def _run_started(
    experiment_id: str, name: str, tags: Mapping[str, str], started: float
) -> Iterator[str]:
    """A new active run with start time `started`, in seconds since 1970; yields its id."""
    all_tags = {MLFLOW_USER: getuser(), MLFLOW_SOURCE_NAME: "mtl-ranker"} | dict(tags)
    milliseconds = round(1_000 * started)
    client = mlflow.MlflowClient()
    run_id = client.create_run(experiment_id, milliseconds, all_tags, name).info.run_id
    with mlflow.start_run(run_id=run_id, nested=True):
        yield run_id


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What is logged of a study.

    Attributes:
        params: of the whole study.
        runs: child run's name → metrics.
        figures: file name → figure.
        content: all results, stored as `study.json`.
    """

    name: str
    params: Mapping[str, Any]
    runs: Mapping[str, Mapping[str, float]]
    figures: Mapping[str, Figure]
    content: Mapping[str, Any]


def log_study(workspace: Workspace, study: StudyRecord) -> Logged:
    """Log a study to the experiment `study-NAME`: a parent run, and a child run per model."""
    experiment_id = _experiment(f"study-{study.name}", workspace)
    children = {}
    tags = {"git_commit": _git_commit(), "mtl_ranker": __version__}
    with mlflow.start_run(experiment_id=experiment_id, run_name=study.name, tags=tags) as parent:
        mlflow.log_params(dict(study.params))
        mlflow.log_dict(_plain_numbers(dict(study.content)), "study.json")
        for file, figure in study.figures.items():
            mlflow.log_figure(figure, f"plots/{file}")
        for child_name, metrics in study.runs.items():
            with mlflow.start_run(
                experiment_id=experiment_id, run_name=child_name, nested=True, tags=tags
            ) as child:
                children[child_name] = child.info.run_id
                mlflow.log_params(dict(study.params))
                mlflow.log_metrics({k: v for k, v in metrics.items() if not np.isnan(v)})
    return Logged(parent.info.run_id, experiment_id, children)


@contextmanager
def tuning_run(
    context: Context, name: str, params: Mapping[str, Any], run_id: str | None
) -> Iterator[tuple[Logged, Callable[[Trial], None]]]:
    """A parent run for a search, and a function that logs a trial as a nested run.

    Args:
        run_id: the parent run of the search to resume; None for a new one.
    """
    experiment_id = _experiment(context.project.name, context.workspace)
    tags = {"git_commit": _git_commit(), "mtl_ranker": __version__, "tuning": name}
    with mlflow.start_run(
        run_id=run_id, experiment_id=experiment_id, run_name=f"tune {name}", tags=tags
    ) as parent:
        if run_id is None:
            mlflow.log_params(dict(params))

        def log_trial(trial: Trial) -> None:
            state = "pruned" if trial.pruned else "complete"
            with mlflow.start_run(
                experiment_id=experiment_id,
                run_name=f"tune {name}, trial {trial.number}",
                nested=True,
                tags=tags | {"trial_state": state},
            ):
                mlflow.log_params({"trial": trial.number, **trial.training, **trial.model})
                for epoch in trial.epochs:
                    values = {"validate/normalised_loss": epoch.monitored}
                    mlflow.log_metrics(values, step=epoch.number)
                if not trial.pruned:
                    mlflow.log_metric("validate/quality", trial.quality)

        yield Logged(parent.info.run_id, experiment_id, {}), log_trial


def log_search(search: Search, toml: str) -> None:
    """Log the result of a search to the active parent run."""
    mlflow.log_metric("validate/quality", search.quality)
    mlflow.set_tags({"trials": search.trials, "pruned": search.pruned, "decision": search.decision})
    mlflow.log_text(toml, "best.toml")
    mlflow.log_dict({"confirmed": [asdict(each) for each in search.confirmed]}, "confirmed.json")


def _experiment(name: str, workspace: Workspace) -> str:
    """The id of an experiment, which is created if it is missing."""
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    # Without a kind, MLflow shows the dashboards for language models first.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    local = mlflow.get_tracking_uri().startswith("sqlite")
    location = artifact_root(workspace) if local else None
    return mlflow.create_experiment(name, artifact_location=location, tags=tags)


def _plan(suite: Suite) -> dict[str, str]:
    """What the night trained from where, and what it left out."""
    start = suite.plan.start
    params = {"left_out": ", ".join(suite.plan.left_out), "continued_from": "", "new_days": ""}
    if start is None:
        return params
    new = first_and_last(start.new_days(suite.days))
    return params | {"continued_from": f"version {start.version}", "new_days": new}


def _log_run(
    run_id: str,
    suite: Suite,
    run: ModelRun,
    span: dict[str, str],
    pictures: Mapping[str, Picture],
) -> None:
    """Log a run's parameters, metrics, tags, pictures and diagnosis; it is the active run."""
    names = [task.name for task in suite.tasks]
    spec = run.spec
    if run.refitted:
        days = [*suite.days.train, *suite.days.validate]
        span = {**span, "train_days": first_and_last(days), "validate_days": ""}
    params = {
        **span,
        "model": run.name,
        "seed": run.seed,
        "layers": len(spec.layers),
        "experts": spec.layers[-1].experts if spec.layers else 0,
        "expert_hidden": ", ".join(_sizes(layer.hidden) for layer in spec.layers),
        "gate": spec.layers[-1].gate if spec.layers else "none",
        "members": spec.members,
        "tower_hidden": _sizes(spec.tower_hidden),
        "embedding_dim": spec.embedding_dim,
        "dropout": spec.dropout,
        "parameters": run.trained.model.parameter_count(),
        **run.artifact.project.training.model_dump(exclude={"seeds"}),
        "batch_size": run.trained.settings.batch_size,
        "learning_rate": run.trained.settings.learning_rate,
        **_plan(suite),
    }
    # Results first, as MLflow's comparison opens on the first metric.
    metrics = [(0, _results(run))]
    for epoch in run.trained.epochs:
        values = {
            "validate/normalised_loss": epoch.monitored,
            "train/epoch_seconds": epoch.seconds,
        }
        for t, name in enumerate(names):
            values[f"train/{name}/loss"] = epoch.train_loss[t]
            values[f"validate/{name}/loss"] = epoch.validate_loss[t]
        metrics.append((epoch.number, _known(values)))
    durations = {
        "train/seconds": run.trained.seconds,
        "train/best_epoch": float(run.trained.best_epoch),
    }
    tags = {
        KIND_TAG: MODEL,
        "winner": _flag(run is suite.winner),
        "refit": _flag(run.refitted),
        MLFLOW_RUN_NOTE: run_text(run),
    }
    _log_batch(run_id, params, [*metrics, (0, durations)], tags)
    with TemporaryDirectory() as folder:
        for file, picture in pictures.items():
            Path(folder, file).write_bytes(picture.svg)
        mlflow.log_artifacts(folder, "plots")
    mlflow.log_dict(_plain_numbers(asdict(run.diagnosis)), "diagnosis.json")


def _log_batch(
    run_id: str,
    params: Mapping[str, Any],
    metrics: Sequence[tuple[int, Mapping[str, float]]],
    tags: Mapping[str, str],
) -> None:
    """Log everything in one request, and in further ones where the metrics are too many for it.

    Args:
        metrics: step, and values at it.
    """
    client, now = mlflow.MlflowClient(), round(1_000 * time.time())
    values = [Metric(k, v, now, step) for step, known in metrics for k, v in known.items()]
    # The limit of a request counts parameters and tags too.
    first = MAX_ENTITIES_PER_BATCH - len(params) - len(tags)
    client.log_batch(
        run_id,
        values[:first],
        [Param(key, str(value)) for key, value in params.items()],
        [RunTag(key, value) for key, value in tags.items()],
    )
    for start in range(first, len(values), MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, values[start : start + MAX_METRICS_PER_BATCH])


def _comparison(suite: Suite) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {
        "model": [],
        "seed": [],
        "objective": [],
        "metric": [],
        "value": [],
    }
    for run in suite.runs:
        for objective, metrics in run.metrics.items():
            for metric, value in metrics.items():
                for key, item in zip(
                    rows, (run.name, run.seed, objective, metric, value), strict=True
                ):
                    rows[key].append(item)
    return rows


def _sharing(suite: Suite) -> dict[str, Any]:
    names = [task.name for task in suite.tasks]
    return {
        "label_correlation": {
            "objectives": names,
            "pearson": _plain_numbers(suite.label_correlation),
        },
        "gains": [_plain_numbers(asdict(gain)) for gain in suite.gains],
    }


def _plain_numbers(value: Any) -> Any:
    """Arrays as lists and NaN as null, for JSON."""
    if isinstance(value, np.ndarray):
        return _plain_numbers(value.tolist())
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _results(run: ModelRun) -> dict[str, float]:
    """Metrics on the test days, and the quality on the validation days by which models compare."""
    return _flat("test", run.metrics) | _known({"validate/quality": run.validate_quality})


def _flat(part: str, metrics: Metrics) -> dict[str, float]:
    """`PART/OBJECTIVE/METRIC` → value, of those that are known."""
    return _known(
        {f"{part}/{o}/{m}": v for o, values in metrics.items() for m, v in values.items()}
    )


def _known(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not np.isnan(value)}


def _compared(suite: Suite) -> list[str]:
    """The metric of each objective by which models compare."""
    return [
        f"test/{task.name}/{suite.measures.get(task.name, quality_metric(task.kind))}"
        for task in suite.tasks
    ]


def _seconds(suite: Suite) -> float:
    """Of all trainings, one after the other."""
    return sum(run.trained.seconds for run in suite.runs)


def _sizes(layers: Sequence[int]) -> str:
    """Widths of a network's layers as text: MLflow has no list parameters."""
    return "-".join(str(width) for width in layers) or "none"


def _flag(value: bool) -> str:
    return str(value).lower()


def _git_commit() -> str:
    try:
        process = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return process.stdout.strip()
