"""Registered models: versions, the aliases challenger and champion, stored blends, freezes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from hashlib import blake2b
from pathlib import Path, PurePath

import mlflow
import mlflow.pyfunc
import polars as pl
from mlflow.entities import LifecycleStage, Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from safetensors import SafetensorError

from mtl_ranker import __version__
from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.features.days import last_final_day
from mtl_ranker.features.examples import soft_objectives
from mtl_ranker.logs.contract import used_columns
from mtl_ranker.logs.ingest import keep_columns
from mtl_ranker.nightly.history import Champion
from mtl_ranker.nightly.plan import (
    FROM_SCRATCH,
    Origin,
    TrainingPlan,
    plan_training,
    with_prior,
)
from mtl_ranker.nightly.popularity import name_of
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.results import Suite
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker, save_blend
from mtl_ranker.ranking.blend import BlendChoice, blend_choice
from mtl_ranker.reports.markdown import as_champion, shortened, training_text, with_decision
from mtl_ranker.reports.page import training_report
from mtl_ranker.reports.pictures import run_pictures
from mtl_ranker.tracking.pyfunc import model_arguments
from mtl_ranker.tracking.runs import (
    VERSION_TAG,
    Logged,
    attempts,
    baseline_run,
    log_suite,
    past_nights,
    set_ends,
)
from mtl_ranker.tracking.system import Sample, log_system
from mtl_ranker.workspace import fingerprint

BLEND_TAG = "blend"

RANKER = "artifacts/ranker"  # in a model's files

RESTORE = (
    "restore them, or make another version champion: `mtl-ranker rollback`, or "
    "`mtl-ranker promote --accept`"
)

LOGGED_MODEL = "models:/m-"  # begins the source of a version that was logged in a run

CHAMPIONS_TAG = "champions"

FROZEN_TAG = "frozen"

CHAMPION_TAG = "champion"  # of runs: whether their version is champion, or was

LONGEST = 5_000  # characters of a tag or description that every database of the registry holds

DIGEST_TAG = "digest"  # of a ranker without a training

ROLLED_BACK_TAG = "rolled_back"

REGISTRY = "registry"  # the lock of whoever changes aliases and tags of versions


def register(project: Project, suite: Suite, logged: Logged) -> ModelVersion:
    """Register the suite's winner with the alias `challenger`."""
    winner, day = suite.winner, suite.days.test[-1]
    run_id, rows = logged.child_runs[winner.label], suite.held_out.frame
    version = _new_version(project, run_id, winner.artifact, rows, (winner.name, day))
    client = mlflow.MlflowClient()
    text = training_text(suite, logged.report_link)
    client.update_model_version(project.name, version.version, shortened(text, LONGEST))
    client.set_registered_model_alias(project.name, "challenger", version.version)
    return version


def register_baseline(context: Context, day: date, artifact: RankerArtifact, reason: str) -> str:
    """Register a ranker without a training and make it champion; returns its version.

    A version of the same ranker that an interrupted promotion left behind is used again.
    """
    project, client = context.project, mlflow.MlflowClient()
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(artifact.save(Path(folder) / "ranker").iterdir())
        digest = fingerprint(*(blake2b(file.read_bytes()).hexdigest() for file in files))
    earlier = [
        version
        for version in client.search_model_versions(f"name = '{project.name}'")
        if version.tags.get(DIGEST_TAG) == digest
    ]
    if earlier:
        number = str(earlier[0].version)
    else:
        rows = context.workspace.scan("events", [day]).head(5).collect()
        name = name_of(artifact)
        run_id = baseline_run(context, name, f"{name} {day}")
        version = _new_version(project, run_id, artifact, rows, (name, day))
        client.set_model_version_tag(project.name, version.version, DIGEST_TAG, digest)
        number = str(version.version)
    _set_champions(project, [*champions(project), number])
    words = name_of(artifact).replace("_", " ").capitalize()
    client.update_model_version(project.name, number, f"{words}. {reason}."[:LONGEST])
    client.set_model_version_tag(project.name, number, "promotion", reason[:LONGEST])
    client.set_model_version_tag(project.name, number, "promoted", "true")
    return number


def _new_version(
    project: Project,
    run_id: str,
    artifact: RankerArtifact,
    rows: pl.DataFrame,
    tags: tuple[str, date],
) -> ModelVersion:
    """Log a ranker in a run and register it as a new version.

    Args:
        rows: of which the first are the input example.
        tags: name of the model, and last test day.
    """
    example = rows.head(5).select(artifact.columns)
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id):
        arguments = model_arguments(artifact, example, Path(folder))
        info = mlflow.pyfunc.log_model(name="ranker", **arguments)
    client = mlflow.MlflowClient()
    if registered_model(project) is None:
        client.create_registered_model(project.name)
    version = client.create_model_version(
        project.name, info.model_uri, run_id=run_id, model_id=info.model_id
    )
    for key, value in zip(("model", "test_day"), tags, strict=True):
        client.set_model_version_tag(project.name, version.version, key, str(value))
    return version


def record(
    context: Context, suite: Suite, system: Sequence[Sample] = ()
) -> tuple[Logged, ModelVersion, PurePath]:
    """Publish a training's report, log its runs and register its winner.

    A training of the same day with the same inputs is registered once: if there is one, it becomes
    the challenger again. Returns the logged runs, the model version and the path of the report.

    Args:
        system: samples of the machine while it trained (`system_measured`).
    """
    project, workspace = context.project, context.workspace
    client, day = mlflow.MlflowClient(), suite.days.test[-1]
    place = suite.report
    marks = [workspace.published_fingerprint("examples", d) for d in suite.days.all]
    plan = suite.plan
    planned = [] if plan.start is None else [plan.start.version]
    planned += [] if plan.prior is None else [plan.prior.digest]
    inputs = fingerprint(
        __version__, project.source_text, day, *marks, *planned, *sorted(plan.left_out)
    )
    for logged, number in attempts(project, workspace, inputs):
        if number is None:
            _delete_attempt(project, logged)
            continue
        client.set_registered_model_alias(project.name, "challenger", number)
        if not workspace.has(place):
            workspace.publish_file(place, training_report(project, suite))
        return logged, client.get_model_version(project.name, number), workspace.where(place)
    pictures = run_pictures(suite)
    page = training_report(project, suite, pictures)
    report = workspace.publish_file(place, page)
    logged = log_suite(context, suite, fingerprint(*marks), page, inputs, pictures)
    log_system(logged.run_id, system)
    version = register(project, suite, logged)
    if suite.kept_blend is not None:
        store_blend(project, version.version, suite.kept_blend.choice)
    keep_columns(workspace, used_columns(project))
    client.set_tag(logged.run_id, VERSION_TAG, version.version)
    set_ends(suite, logged)
    return logged, version, report


def night_plan(context: Context, day: date) -> TrainingPlan:
    """What the night of a day trains (nightly/plan.py), by the champion and the earlier nights."""
    project, settings = context.project, context.project.training
    before = last_final_day(project, day)
    plan = FROM_SCRATCH
    if settings.start == "champion" or settings.contenders != "all":
        champion = champion_before(project, before) if settings.start == "champion" else None
        plan = plan_training(context, day, champion, past_nights(project, context.workspace))
    if not soft_objectives(project):
        return plan
    version = champion_version_before(project, before)
    if version is None:
        why = "there is no champion of an earlier night"
        return replace(plan, prior_note=f"soft labels by the base rate of closed days: {why}")
    with artifact_folder(project, version) as folder:
        artifact = RankerArtifact.load(folder)
    return with_prior(plan, context, version, artifact)


def champion_before(project: Project, day: date) -> Origin | None:
    """What a night continues from: `champion_version_before`, if there is one."""
    version = champion_version_before(project, day)
    if version is None:
        return None
    with artifact_folder(project, version) as folder:
        start = RankerArtifact.load_start(folder)
        return Origin(version, start is None and RankerArtifact.load(folder).fixed, start)


def champion_version_before(project: Project, day: date) -> str | None:
    """The latest champion tested before this day that was not rolled back; None without one.

    So a night that runs again starts from the same model as the first time.
    """
    client = mlflow.MlflowClient()
    for version in reversed(champions(project)):
        tested = client.get_model_version(project.name, version).tags.get("test_day")
        if tested is not None and date.fromisoformat(tested) < day:
            return version
    return None


def _delete_attempt(project: Project, logged: Logged) -> None:
    """Delete the runs of a training that was not registered, and a version without an alias."""
    client = mlflow.MlflowClient()
    for version in client.search_model_versions(f"name = '{project.name}'"):
        if version.run_id in logged.child_runs.values() and not version.aliases:
            client.delete_model_version(project.name, version.version)
    for run_id in (*logged.child_runs.values(), logged.run_id):
        client.delete_run(run_id)


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
    """The model with an alias, and its version.

    It blends as stored with the version (`store_blend`), else as the project file says. Raises
    ProjectError if no version has the alias.
    """
    version = alias_version(project, alias)
    if version is None:
        raise ProjectError(
            f"models:/{project.name}@{alias}: no version has this alias; run `mtl-ranker nightly`, "
            "or `mtl-ranker promote`, which prints why a version is not promoted"
        )
    return load_version(project, version)


def champion(project: Project) -> Champion:
    """The champion with its name and last test day. Raises ProjectError without one."""
    loaded = load_artifact(project, "champion")
    tags = mlflow.MlflowClient().get_model_version(project.name, loaded.version).tags
    tested = tags.get("test_day")
    trained = None if tested is None else date.fromisoformat(tested)
    return Champion(loaded.artifact, loaded.version, tags.get("model", ""), trained)


def load_version(project: Project, version: str) -> RegisteredRanker:
    """The model of a version, with its blend as in `load_artifact`."""
    with artifact_folder(project, version) as folder:
        artifact = RankerArtifact.load(folder)
    chosen = stored_blend(project, version, artifact.project)
    if chosen is None:
        scoring, own = project.scoring, artifact.project
        given = [o.name for o in own.objectives if o.where and o.name in scoring.conditional]
        chosen = BlendChoice(scoring.blend, _weights(project, own), given)
    return RegisteredRanker(artifact.with_blend(chosen), version)


def _weights(project: Project, own: Project) -> dict[str, float]:
    """The project's weights of a model's objectives; its own for those that it does not have."""
    return {
        name: project.blend_weights.get(name, weight) for name, weight in own.blend_weights.items()
    }


def stored_blend(project: Project, version: str, own: Project) -> BlendChoice | None:
    """The blend stored by `mtl-ranker blend --store`, or None.

    Args:
        own: the model's project.
    """
    tags = mlflow.MlflowClient().get_model_version(project.name, version).tags
    return blend_choice(json.loads(tags[BLEND_TAG]), own) if BLEND_TAG in tags else None


def store_blend(project: Project, version: str, choice: BlendChoice) -> None:
    """Store a blend with a model version; it is used from the next scoring on.

    It becomes a tag of the version, and a file of its model, which `mlflow.pyfunc` reads.
    """
    client, content = mlflow.MlflowClient(), json.dumps(choice.content)
    source = client.get_model_version(project.name, version).source or ""
    if source.startswith(LOGGED_MODEL):
        with tempfile.TemporaryDirectory() as folder:
            ranker = Path(folder) / RANKER
            ranker.mkdir(parents=True)
            save_blend(ranker, choice)
            client.log_model_artifacts(source.removeprefix("models:/"), folder)
    client.set_model_version_tag(project.name, version, BLEND_TAG, content)


@contextmanager
def artifact_folder(project: Project, version: str) -> Iterator[Path]:
    """A local copy of a model version's ranker, removed afterwards.

    The code that MLflow keeps beside it is not downloaded. Raises ProjectError where MLflow has the
    version, but not its files.
    """
    uri = f"models:/{project.name}/{version}"
    files = mlflow.artifacts.list_artifacts(f"{uri}/{RANKER}")
    if not any(file.path.endswith("/project.toml") for file in files):
        raise ProjectError(f"{uri}: its files are not in MLflow's artifacts; {RESTORE}")
    with tempfile.TemporaryDirectory(prefix="mtl-ranker-") as copy:
        found = mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{RANKER}", dst_path=copy)
        try:
            yield Path(found)
        except SafetensorError as error:
            raise ProjectError(
                f"{uri}: files of its ranker are damaged ({first_line(error)}); {RESTORE}"
            ) from error
        except FileNotFoundError as error:
            if copy not in str(error):
                raise
            lost = Path(error.filename or str(error).rpartition(" ")[2].strip("'\"")).name
            raise ProjectError(
                f"{uri}: {lost} of its files is not in MLflow's artifacts; {RESTORE}"
            ) from error


def tested_later(project: Project, day: date, versions: Sequence[str]) -> str | None:
    """Why D cannot decide: a version's test day is later, and it may be trained on D; or None."""
    client = mlflow.MlflowClient()
    for version in versions:
        tested = client.get_model_version(project.name, version).tags.get("test_day")
        if tested is not None and day < date.fromisoformat(tested):
            return (
                f"version {version} was trained on days before {tested} and may have seen the "
                f"labels of {day}; a night whose last test day is {tested} or later compares"
            )
    return None


def record_decision(project: Project, version: str, decision: Decision) -> None:
    """Store the decision as tags of the version, and make it champion if it was promoted."""
    client = mlflow.MlflowClient()
    if decision.promoted:  # first: a version that is not champion must not have the tag
        _set_champions(project, [*champions(project), version])
        if rolled_back(project, version):  # accepted by hand
            client.delete_model_version_tag(project.name, version, ROLLED_BACK_TAG)
    _describe(project, version, decision)
    tags = {"promotion": decision.reason[:LONGEST], "promoted": str(decision.promoted).lower()}
    if decision.serving is not None:
        tags["megabytes"] = f"{decision.serving.megabytes:.1f}"
        tags["seconds_per_million"] = f"{decision.serving.seconds_per_million:.1f}"
    for key, value in tags.items():
        client.set_model_version_tag(project.name, version, key, value)


def _describe(project: Project, version: str, decision: Decision) -> None:
    """Add a decision to the descriptions of a version and of its training."""
    client = mlflow.MlflowClient()
    found = client.get_model_version(project.name, version)
    text = with_decision(found.description or "", decision, version)
    client.update_model_version(project.name, version, shortened(text, LONGEST))
    for run in _training(found.run_id)[1:]:
        text = with_decision(run.data.tags.get(MLFLOW_RUN_NOTE, ""), decision, version)
        client.set_tag(run.info.run_id, MLFLOW_RUN_NOTE, text)


def _training(run_id: str | None) -> list[Run]:
    """A run and its parent, without those that were deleted."""
    found: list[Run] = []
    while run_id is not None:
        try:
            run = mlflow.get_run(run_id)
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                break
            raise
        if run.info.lifecycle_stage == LifecycleStage.ACTIVE:
            found.append(run)
        run_id = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
    return found


def replace_report(project: Project, version: str, page: str) -> None:
    """Replace the HTML report in the MLflow run of the version's training."""
    client = mlflow.MlflowClient()
    run_id = client.get_model_version(project.name, version).run_id
    if run_id is None:
        return  # registered without a run
    run = client.get_run(run_id)
    client.log_text(run.data.tags["mlflow.parentRunId"], page, "report.html")


def champions(project: Project) -> list[str]:
    """Versions that were champion, oldest first; the last one is the current champion.

    The alias counts: where the stored list does not end with it, as its update had failed, later
    versions are left out, or the champion is added.
    """
    model = registered_model(project)
    if model is None or "champion" not in model.aliases:
        return []
    champion = str(model.aliases["champion"])
    versions = json.loads(model.tags.get(CHAMPIONS_TAG, "[]"))
    if champion not in versions:
        return [*versions, champion]
    return versions[: len(versions) - versions[::-1].index(champion)]


def versions_in_use(project: Project) -> list[str]:
    """Versions with an alias, and earlier champions."""
    model = registered_model(project)
    if model is None:
        return []
    return list(dict.fromkeys([*map(str, model.aliases.values()), *champions(project)]))


def roll_back(project: Project, dry_run: bool = False) -> tuple[str, str]:
    """Make the previous champion the champion; returns the current and the previous version.

    With `dry_run` nothing is changed. Raises ProjectError if there is no previous champion.
    """
    versions = champions(project)
    if len(versions) < 2:
        raise ProjectError(
            f"{project.name}: nothing to roll back to; {_other_versions(project, versions)}"
        )
    current, previous = versions[-1], versions[-2]
    if dry_run:
        return current, previous
    _set_champions(project, versions[:-1])
    client = mlflow.MlflowClient()
    client.set_model_version_tag(project.name, current, ROLLED_BACK_TAG, "true")
    return current, previous


def _other_versions(project: Project, champions: list[str]) -> str:
    """What the registered versions are, where there is no earlier champion."""
    if not champions:
        return "there is no champion"
    tags = {
        str(v.version): v.tags
        for v in mlflow.MlflowClient().search_model_versions(f"name = '{project.name}'")
    }
    others = sorted((v for v in tags if v not in champions), key=int)
    back = [v for v in others if ROLLED_BACK_TAG in tags[v]]
    never = [v for v in others if v not in back]
    text = f"version {champions[0]} is champion and "
    text += "has no champion before it" if others else "the only version"
    text += f"; rolled back: {', '.join(back)}" if back else ""
    return text + (f"; never champion: {', '.join(never)}" if never else "")


def rolled_back(project: Project, version: str) -> bool:
    """Whether the version was rolled back since it was champion last."""
    return ROLLED_BACK_TAG in mlflow.MlflowClient().get_model_version(project.name, version).tags


def freeze(project: Project, reason: str | None) -> str:
    """Freeze the champion with a reason, or end a freeze with None; returns its version.

    A frozen champion is not replaced by a challenger. Raises ProjectError without a champion.
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
    """The reason of the champion's freeze, or None."""
    model = registered_model(project)
    return None if model is None else model.tags.get(FROZEN_TAG)


def _set_champions(project: Project, versions: list[str]) -> None:
    client, before = mlflow.MlflowClient(), alias_version(project, "champion")
    client.set_registered_model_alias(project.name, "champion", versions[-1])
    client.set_registered_model_tag(project.name, CHAMPIONS_TAG, json.dumps(versions[-50:]))
    if len(versions) > 1:
        client.set_registered_model_alias(project.name, "previous_champion", versions[-2])
    elif alias_version(project, "previous_champion") is not None:
        client.delete_registered_model_alias(project.name, "previous_champion")
    for version, now in {before: False, versions[-1]: True}.items():
        if version is None:
            continue
        found = client.get_model_version(project.name, version)
        text = as_champion(found.description or "", version, now)
        client.update_model_version(project.name, version, shortened(text, LONGEST))
        for run in _training(found.run_id):
            client.set_tag(run.info.run_id, CHAMPION_TAG, str(now).lower())
            if MLFLOW_RUN_NOTE in run.data.tags:
                text = as_champion(run.data.tags[MLFLOW_RUN_NOTE], version, now)
                client.set_tag(run.info.run_id, MLFLOW_RUN_NOTE, text)
