"""Experiments and registered models. The only module that imports mlflow."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
import mlflow.pyfunc
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from mtl_ranker import __version__
from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.contract import used_columns
from mtl_ranker.logs.ingest import keep_columns
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.results import Suite
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.reports.page import training_report
from mtl_ranker.tracking.pyfunc import SERVED, signature_of
from mtl_ranker.tracking.runs import Logged, log_suite, set_ends
from mtl_ranker.workspace import fingerprint

BLEND_TAG = "blend"

CHAMPIONS_TAG = "champions"

FROZEN_TAG = "frozen"


def register(project: Project, suite: Suite, logged: Logged) -> ModelVersion:
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
            signature=signature_of(winner.artifact, example),
            input_example=example.to_pandas(),
            pip_requirements=[f"mtl_ranker=={__version__}"],
        )
    client = mlflow.MlflowClient()
    if registered_model(project) is None:
        client.create_registered_model(project.name)
    version = client.create_model_version(
        project.name, info.model_uri, run_id=logged.child_runs[winner.label], model_id=info.model_id
    )
    client.set_registered_model_alias(project.name, "challenger", version.version)
    for key, value in (("model", winner.name), ("test_day", str(suite.days.test[-1]))):
        client.set_model_version_tag(project.name, version.version, key, value)
    return version


def record(context: Context, suite: Suite) -> tuple[Logged, ModelVersion, Path]:
    """A training's report, runs and registered winner: where they lie."""
    project, workspace = context.project, context.workspace
    marks = (workspace.published_fingerprint("examples", day) for day in suite.days.all)
    page = training_report(project, suite)
    report = workspace.publish_file(f"reports/{suite.days.test[-1]}.html", page)
    logged = log_suite(context, suite, fingerprint(*marks), page)
    version = register(project, suite, logged)
    keep_columns(workspace, used_columns(project))
    set_ends(suite, logged)
    return logged, version, report


def alias_version(project: Project, alias: str) -> str | None:
    """The version that an alias points to, or None.

    Raises MlflowException when the registry does not answer; only "does not exist" means None.
    """
    model = registered_model(project)
    version = None if model is None else model.aliases.get(alias)
    return None if version is None else str(version)


def registered_model(project: Project) -> RegisteredModel | None:
    """The project's entry in the registry, or None before the first model."""
    try:
        return mlflow.MlflowClient().get_registered_model(project.name)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise


def load_artifact(project: Project, alias: str) -> RegisteredRanker:
    """The model behind `models:/NAME@alias` and its version. Raises ProjectError without one.

    It blends by the choice stored with this version (`store_blend`), else by the project file.
    """
    version = alias_version(project, alias)
    if version is None:
        raise ProjectError(
            f"models:/{project.name}@{alias}: no such model version; run `mtl-ranker train` and "
            "`mtl-ranker promote` first"
        )
    return load_version(project, version)


def load_version(project: Project, version: str) -> RegisteredRanker:
    """One model version, as `load_artifact`."""
    artifact = RankerArtifact.load(artifact_folder(project, version))
    chosen = stored_blend(project, version)
    how, weights = chosen or (project.scoring.blend, _weights(project, artifact.project))
    return RegisteredRanker(artifact.with_blend(how, weights), version)


def _weights(tonight: Project, own: Project) -> dict[str, float]:
    """Tonight's weights of a model's objectives; its own for those that tonight does not have."""
    return {
        name: tonight.blend_weights.get(name, weight) for name, weight in own.blend_weights.items()
    }


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
        _set_champions(project, [*champions(project), version])


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
    _set_champions(project, known[:-1])
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
    model = registered_model(project)
    return None if model is None else model.tags.get(FROZEN_TAG)


def _set_champions(project: Project, known: list[str]) -> None:
    client = mlflow.MlflowClient()
    client.set_registered_model_tag(project.name, CHAMPIONS_TAG, json.dumps(known[-50:]))
    client.set_registered_model_alias(project.name, "champion", known[-1])
    if len(known) > 1:
        client.set_registered_model_alias(project.name, "previous_champion", known[-2])
    elif alias_version(project, "previous_champion") is not None:
        client.delete_registered_model_alias(project.name, "previous_champion")
