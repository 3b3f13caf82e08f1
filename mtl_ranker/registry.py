"""Experiments and registered models. The only module that imports mlflow."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
import mlflow.pyfunc
import numpy as np
import polars as pl
from matplotlib.figure import Figure
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

from mtl_ranker import __version__
from mtl_ranker.artifact import RankerArtifact
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation import plots
from mtl_ranker.evaluation.report import training_report
from mtl_ranker.promotion import Decision
from mtl_ranker.training.suite import ModelRun, Suite
from mtl_ranker.training.tuning import Search, Trial
from mtl_ranker.workspace import Workspace, fingerprint

BLEND_TAG = "blend"
CHAMPIONS_TAG = "champions"
FROZEN_TAG = "frozen"
SERVED = Path(__file__).with_name("served_model.py")


@dataclass(frozen=True)
class Logged:
    """Where a training lies in MLflow."""

    run_id: str
    experiment_id: str
    child_runs: dict[str, str]

    @property
    def link(self) -> str:
        """The experiment's page, in the view for models (MLflow opens on language models')."""
        page = f"{_address()}/#/experiments/{self.experiment_id}/runs"
        return f"{page}?workflowType=machine_learning"

    @property
    def comparison_link(self) -> str:
        """The page that compares this training's runs."""
        runs = quote(json.dumps(list(self.child_runs.values())))
        experiments = quote(json.dumps([self.experiment_id]))
        return f"{_address()}/#/compare-runs?runs={runs}&experiments={experiments}"


def connect(workspace: Workspace) -> str:
    """Use $MLFLOW_TRACKING_URI, or SQLite and local files in the workspace."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        create_database(workspace)
        uri = tracking_uri(workspace)
    mlflow.set_tracking_uri(uri)
    return uri


def tracking_uri(workspace: Workspace) -> str:
    return f"sqlite:///{workspace.root.resolve() / 'mlflow.db'}"


def create_database(workspace: Workspace) -> None:
    """MLflow's SQLite database, made aside and moved into place whole.

    A run killed while MLflow migrates a new database would leave one that nobody can open.
    """
    target = workspace.root / "mlflow.db"
    if target.is_file():
        return
    with tempfile.TemporaryDirectory() as folder, workspace.aside(target) as temporary:
        fresh = Path(folder) / "fresh.db"
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{fresh}").search_experiments(max_results=1)
        with closing(sqlite3.connect(fresh)) as database:
            database.execute("vacuum into ?", (str(temporary),))


def artifact_root(workspace: Workspace) -> str:
    return (workspace.root.resolve() / "mlartifacts").as_uri()


def log_suite(
    project: Project, workspace: Workspace, suite: Suite, digest: str, report: str
) -> Logged:
    """A parent run for the training and a child run per model × seed, with plots and tables.

    `report` is the training's HTML page (`evaluation/report.py`).
    """
    experiment_id = _experiment(project.name, workspace)
    span = {
        "train_days": f"{suite.days.train[0]}..{suite.days.train[-1]}",
        "validate_days": f"{suite.days.validate[0]}..{suite.days.validate[-1]}",
        "test_days": f"{suite.days.test[0]}..{suite.days.test[-1]}",
    }
    tags = {"git_commit": _git_commit(), "dataset_digest": digest, "mtl_ranker": __version__}
    children = {}
    with mlflow.start_run(
        experiment_id=experiment_id, run_name=f"training {suite.days.test[-1]}", tags=tags
    ) as parent:
        mlflow.log_params({**span, "train_rows": suite.train_rows, "dataset_digest": digest})
        mlflow.log_text(project.source_text, "project.toml")
        mlflow.log_text(report, "report.html")
        mlflow.log_dict(_sharing(suite), "sharing.json")
        mlflow.log_table(_comparison(suite), "comparison.json")
        looked_at = {
            "slices": [asdict(each) for each in suite.slices],
            "off_policy": [asdict(each) for each in suite.off_policy],
            "drift_warnings": suite.drift.warnings,
            "days": [asdict(each) | {"day": str(each.day)} for each in suite.drift.days],
        }
        mlflow.log_dict(_plain_numbers(looked_at), "slices.json")
        for name, metrics in suite.baselines.items():
            mlflow.log_metrics(
                {f"{name}_{k}": v for k, v in _flat(metrics).items() if not np.isnan(v)}
            )
        mlflow.set_tags({"winner": suite.winner.name, "winner_seed": suite.winner.seed})
        for run in suite.runs:
            with mlflow.start_run(
                experiment_id=experiment_id, run_name=run.label, nested=True, tags=tags
            ) as child:
                children[run.label] = child.info.run_id
                _log_run(project, suite, run, span)
    return Logged(parent.info.run_id, experiment_id, children)


def log_study(
    workspace: Workspace,
    name: str,
    params: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, float]],
    figures: Mapping[str, Figure],
    content: Mapping[str, Any],
) -> Logged:
    """A study as an experiment `study-NAME`: a parent run with pictures, a child run per model.

    Args:
        params: of the whole study.
        runs: child run's name → metrics.
        figures: file name → picture.
        content: all figures, stored as `study.json`.
    """
    experiment_id = _experiment(f"study-{name}", workspace)
    children = {}
    tags = {"git_commit": _git_commit(), "mtl_ranker": __version__}
    with mlflow.start_run(experiment_id=experiment_id, run_name=name, tags=tags) as parent:
        mlflow.log_params(dict(params))
        mlflow.log_dict(_plain_numbers(dict(content)), "study.json")
        for file, figure in figures.items():
            mlflow.log_figure(figure, f"plots/{file}")
        for child_name, metrics in runs.items():
            with mlflow.start_run(
                experiment_id=experiment_id, run_name=child_name, nested=True, tags=tags
            ) as child:
                children[child_name] = child.info.run_id
                mlflow.log_params(dict(params))
                mlflow.log_metrics({k: v for k, v in metrics.items() if not np.isnan(v)})
    return Logged(parent.info.run_id, experiment_id, children)


@contextmanager
def tuning_run(
    project: Project, name: str, workspace: Workspace, params: Mapping[str, Any], run_id: str | None
) -> Iterator[tuple[Logged, Callable[[Trial], None]]]:
    """A parent run for a search; the function it gives logs each trial as a nested run.

    `run_id` continues the parent of an interrupted search.
    """
    experiment_id = _experiment(project.name, workspace)
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
                    values = {"validate_normalised_loss": epoch.monitored}
                    mlflow.log_metrics(values, step=epoch.number)
                if not trial.pruned:
                    mlflow.log_metric("validate_quality", trial.quality)

        yield Logged(parent.info.run_id, experiment_id, {}), log_trial


def log_search(search: Search, toml: str) -> None:
    """What a search found, on the running parent run."""
    mlflow.log_metric("validate_quality", search.quality)
    mlflow.set_tags({"trials": search.trials, "pruned": search.pruned})
    mlflow.log_text(toml, "best.toml")


def register(project: Project, workspace: Workspace, suite: Suite, logged: Logged) -> ModelVersion:
    """Register the suite's winner; it takes the alias `challenger`."""
    winner = suite.winner
    example = suite.held_out.frame.head(5).select(winner.artifact.columns)
    with (
        tempfile.TemporaryDirectory() as folder,
        mlflow.start_run(run_id=logged.child_runs[winner.label]),
    ):
        saved = winner.artifact.save(Path(folder) / "ranker")
        info = mlflow.pyfunc.log_model(
            name="ranker",
            python_model=str(SERVED),
            artifacts={"ranker": str(saved)},
            signature=_signature(winner.artifact, example),
            input_example=example.to_pandas(),
            pip_requirements=[f"mtl_ranker=={__version__}"],
        )
    client = mlflow.MlflowClient()
    if not client.search_registered_models(f"name = '{project.name}'"):
        client.create_registered_model(project.name)
    version = client.create_model_version(
        project.name, info.model_uri, run_id=logged.child_runs[winner.label], model_id=info.model_id
    )
    client.set_registered_model_alias(project.name, "challenger", version.version)
    for key, value in (("model", winner.name), ("test_day", str(suite.days.test[-1]))):
        client.set_model_version_tag(project.name, version.version, key, value)
    return version


def record(
    project: Project, workspace: Workspace, suite: Suite
) -> tuple[Logged, ModelVersion, Path]:
    """A training's report, runs and registered winner: where they lie."""
    days = [*suite.days.train, *suite.days.validate, *suite.days.test]
    marks = (workspace.published_fingerprint("examples", day) for day in days)
    page = training_report(project, suite)
    report = workspace.publish_file(f"reports/{suite.days.test[-1]}.html", page)
    logged = log_suite(project, workspace, suite, fingerprint(*marks), page)
    return logged, register(project, workspace, suite, logged), report


def alias_version(project: Project, alias: str) -> str | None:
    """The version that an alias points to, or None."""
    try:
        found = mlflow.MlflowClient().get_model_version_by_alias(project.name, alias)
    except MlflowException:
        return None
    return str(found.version)  # MLflow gives an int here and a text elsewhere


def load_artifact(project: Project, alias: str) -> tuple[RankerArtifact, str]:
    """The model behind `models:/NAME@alias` and its version. Raises ProjectError without one.

    It blends by the choice stored with this version (`store_blend`), else by the project file.
    """
    version = alias_version(project, alias)
    if version is None:
        raise ProjectError(
            f"models:/{project.name}@{alias}: no such model version; run `mtl-ranker train` and "
            "`mtl-ranker promote` first"
        )
    return load_version(project, version), version


def load_version(project: Project, version: str) -> RankerArtifact:
    """One model version, as `load_artifact`."""
    artifact = RankerArtifact.load(artifact_folder(project, version))
    chosen = stored_blend(project, version)
    how, weights = chosen or (project.scoring.blend, project.scoring.weights)
    return artifact.with_blend(how, weights)


def stored_blend(project: Project, version: str) -> tuple[str, dict[str, float]] | None:
    """How this model version blends its objectives, if `mtl-ranker blend --store` chose it."""
    tags = mlflow.MlflowClient().get_model_version(project.name, version).tags
    if BLEND_TAG not in tags:
        return None
    content = json.loads(tags[BLEND_TAG])
    return content["blend"], content["weights"]


def store_blend(project: Project, version: str, how: str, weights: Mapping[str, float]) -> None:
    """Let this model version blend so from its next scoring on, without training."""
    content = json.dumps({"blend": how, "weights": dict(weights)})
    mlflow.MlflowClient().set_model_version_tag(project.name, version, BLEND_TAG, content)


def artifact_folder(project: Project, version: str) -> Path:
    """A model version's files on this machine, fetched if they lie elsewhere."""
    uri = f"models:/{project.name}/{version}"
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, tracking_uri=None))
    return folder / "artifacts" / "ranker"


def record_decision(project: Project, version: str, decision: Decision) -> None:
    """Set the champion alias when promoted; the sentence and the figures become tags either way."""
    client = mlflow.MlflowClient()
    tags = {"promotion": decision.reason[:500], "promoted": str(decision.promoted).lower()}
    if decision.serving is not None:
        tags["megabytes"] = f"{decision.serving.megabytes:.1f}"
        tags["seconds_per_million"] = f"{decision.serving.seconds_per_million:.1f}"
    for key, value in tags.items():
        client.set_model_version_tag(project.name, version, key, value)
    if decision.promoted:
        _crown(project, [*champions(project), version])


def replace_report(project: Project, version: str, page: str) -> None:
    """Log the training's HTML page anew, beside what the version's training logged."""
    client = mlflow.MlflowClient()
    run_id = client.get_model_version(project.name, version).run_id
    if run_id is None:
        return  # a version that was registered by hand
    run = client.get_run(run_id)
    client.log_text(run.data.tags["mlflow.parentRunId"], page, "report.html")


def champions(project: Project) -> list[str]:
    """Versions that were champion, oldest first; the last one is the champion now."""
    champion = alias_version(project, "champion")
    if champion is None:
        return []
    tags = mlflow.MlflowClient().get_registered_model(project.name).tags
    known = json.loads(tags.get(CHAMPIONS_TAG, "[]"))
    return known if known and known[-1] == champion else [*known, champion]


def roll_back(project: Project, dry_run: bool = False) -> tuple[str, str]:
    """Give `champion` back to the version that had it before: (from, to).

    With `dry_run` only says which. Raises ProjectError when there is none before.
    """
    known = champions(project)
    if len(known) < 2:
        have = f"version {known[0]} is the only one so far" if known else "there is no champion"
        raise ProjectError(f"{project.name}: nothing to roll back to; {have}")
    left, back = known[-1], known[-2]
    if dry_run:
        return left, back
    client = mlflow.MlflowClient()
    client.set_model_version_tag(project.name, left, "rolled_back", "true")
    _crown(project, known[:-1])
    return left, back


def freeze(project: Project, reason: str | None) -> str:
    """Keep the champion whatever a challenger shows (with a reason), or stop keeping it (None).

    Returns the champion's version. Raises ProjectError without a champion.
    """
    version = alias_version(project, "champion")
    if version is None:
        raise ProjectError(f"models:/{project.name}@champion: no such model version to freeze")
    client = mlflow.MlflowClient()
    if reason is None:
        if frozen(project) is not None:
            client.delete_registered_model_tag(project.name, FROZEN_TAG)
    else:
        client.set_registered_model_tag(project.name, FROZEN_TAG, reason[:500])
    return version


def frozen(project: Project) -> str | None:
    """Why the champion is frozen, or None."""
    try:
        return mlflow.MlflowClient().get_registered_model(project.name).tags.get(FROZEN_TAG)
    except MlflowException:
        return None


def _crown(project: Project, known: list[str]) -> None:
    client = mlflow.MlflowClient()
    client.set_registered_model_tag(project.name, CHAMPIONS_TAG, json.dumps(known[-50:]))
    client.set_registered_model_alias(project.name, "champion", known[-1])
    if len(known) > 1:
        client.set_registered_model_alias(project.name, "previous_champion", known[-2])
    elif alias_version(project, "previous_champion") is not None:
        client.delete_registered_model_alias(project.name, "previous_champion")


# Our schema comes from the logged signature; MLflow warns that type hints could give one as well,
# through filters of its own, so that only recording keeps it quiet.
with warnings.catch_warnings(record=True):

    class ServedRanker(PythonModel):
        """`mlflow.pyfunc` view of a ranker: a DataFrame of raw feature rows to predictions."""

        def load_context(self, context: Any) -> None:
            self.ranker = RankerArtifact.load(Path(context.artifacts["ranker"]))

        def predict(self, context, model_input, params=None):
            frame = pl.from_pandas(model_input, nan_to_null=True)
            return self.ranker.predict(frame).to_pandas()


def serve() -> None:
    set_model(ServedRanker())


def _address() -> str:
    uri = mlflow.get_tracking_uri()
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


def _experiment(name: str, workspace: Workspace) -> str:
    found = mlflow.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # Without a kind, the page opens on dashboards for language models.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    local = mlflow.get_tracking_uri().startswith("sqlite")
    place = artifact_root(workspace) if local else None
    return mlflow.create_experiment(name, artifact_location=place, tags=tags)


def _log_run(project: Project, suite: Suite, run: ModelRun, span: dict[str, str]) -> None:
    names = [task.name for task in suite.tasks]
    spec = run.spec
    mlflow.log_params(
        {
            **span,
            "model": run.name,
            "seed": run.seed,
            "layers": len(spec.layers),
            "experts": spec.layers[-1].experts,
            "expert_hidden": [list(layer.hidden) for layer in spec.layers],
            "gate": spec.layers[-1].gate,
            "members": spec.members,
            "tower_hidden": list(spec.tower_hidden),
            "embedding_width": spec.embedding_width,
            "dropout": spec.dropout,
            "parameters": run.trained.model.parameter_count(),
            **project.training.model_dump(exclude={"seeds"}),
        }
    )
    for epoch in run.trained.epochs:
        values = {"validate_normalised_loss": epoch.monitored, "epoch_seconds": epoch.seconds}
        for t, name in enumerate(names):
            values[f"train_loss_{name}"] = epoch.train_loss[t]
            values[f"validate_loss_{name}"] = epoch.validate_loss[t]
        known = {key: value for key, value in values.items() if not np.isnan(value)}
        mlflow.log_metrics(known, step=epoch.number)
    final = {k: v for k, v in _flat(run.metrics).items() if not np.isnan(v)}
    final |= {"validate_quality": run.validate_quality, "train_seconds": run.trained.seconds}
    mlflow.log_metrics(final | {"best_epoch": float(run.trained.best_epoch)})
    train = np.array([e.train_loss for e in run.trained.epochs])
    validate = np.array([e.validate_loss for e in run.trained.epochs])
    labels = suite.held_out.labels
    figures = {
        "learning_curves.png": plots.learning_curves(
            names, train, validate, run.trained.best_epochs, run.label
        ),
        "calibration.png": plots.calibration(
            names,
            labels,
            {"as trained": run.raw_prediction, "calibrated": run.test_prediction},
            f"{run.label}: calibration on the test days",
        ),
        "gates.png": plots.gate_heatmap(
            run.diagnosis.layers[-1].outputs,
            run.diagnosis.layers[-1].gate,
            f"{run.label}: gates on the test days",
        ),
    }
    if len(names) > 1:
        cosine = np.array([e.gradient_cosine for e in run.trained.epochs])
        figures["gradient_cosine.png"] = plots.gradient_cosines(names, cosine, run.label)
    for file, figure in figures.items():
        mlflow.log_figure(figure, f"plots/{file}")
    mlflow.log_dict(_plain_numbers(asdict(run.diagnosis)), "diagnosis.json")


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
        "gains": [{**asdict(gain), "verdict": gain.verdict} for gain in suite.gains],
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


def _flat(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{o}_{metric}": v for o, values in metrics.items() for metric, v in values.items()}


def _signature(artifact: RankerArtifact, example: pl.DataFrame) -> ModelSignature:
    columns: list[Any] = []
    for name, dtype in example.schema.items():
        kind: Any = _kind(dtype)
        if isinstance(dtype, pl.List):
            kind = Array(_kind(dtype.inner))
        columns.append(ColSpec(kind, name, required=False))
    outputs: list[Any] = [ColSpec(DataType.float, task.name) for task in artifact.tasks]
    return ModelSignature(Schema(columns), Schema([*outputs, ColSpec(DataType.double, "score")]))


def _kind(dtype: Any) -> DataType:
    if dtype == pl.String:
        return DataType.string
    if dtype.is_integer():
        return DataType.long
    return DataType.float if dtype == pl.Float32 else DataType.double


def _git_commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
