"""A search of settings that is recorded in MLflow and can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.examples import soft_objectives
from mtl_ranker.nightly.tuning import (
    Budget,
    Callbacks,
    Search,
    Study,
    Trial,
    as_toml,
    open_study,
    tune,
)
from mtl_ranker.tracking import connection, registry, runs
from mtl_ranker.training.dataset import load_dataset
from mtl_ranker.workspace import fingerprint


@dataclass(frozen=True)
class RecordedSearch:
    """The result of a search.

    Attributes:
        study: name of Optuna's study.
        toml: the best settings as lines of a project file.
        link: its page in MLflow.
    """

    search: Search
    study: str
    toml: str
    link: str


def run_search(
    context: Context,
    day: date,
    name: str,
    budget: Budget,
    callbacks: Callbacks = Callbacks(),
    on_start: Callable[[int], None] = lambda trials: None,
) -> RecordedSearch:
    """Search the settings of `[models.NAME]` on the split that ends with D.

    A second call with the same settings and data resumes the search. Raises ProjectError for an
    unknown model, and as `load_dataset` does.

    Args:
        on_start: called with the number of trials of earlier searches.
    """
    project, workspace = context.project, context.workspace
    if name not in project.models:
        raise ProjectError(
            f"--model {name}: no [models.{name}]; allowed: {', '.join(project.models)}"
        )
    connection.connect(workspace)
    prior = registry.night_plan(context, day).prior if soft_objectives(project) else None
    dataset = load_dataset(context, day, prior=prior)
    days = dataset.days
    fingerprints = [
        workspace.published_fingerprint("examples", d) for d in [*days.train, *days.validate]
    ]
    settings = project.digest("objectives", "features", "training")
    if dataset.soft is not None:
        fingerprints.append(dataset.soft.digest)
    digest = fingerprint(settings, project.log.list_keys, project.models[name], *fingerprints)[:12]
    study = Study(
        name,
        f"{project.name} {name} {day} {digest} in standard errors",
        f"sqlite:///{workspace.root.resolve() / 'optuna.db'}",
    )
    # The study stores its MLflow run before the first trial, so that a killed search is resumed.
    stored = open_study(project, study)
    parent = stored.user_attrs.get("mlflow_run")
    on_start(sum(t.state.is_finished() for t in stored.get_trials(deepcopy=False)))
    params = {
        "model": name,
        "train_days": runs.first_and_last(days.train),
        "validate_days": runs.first_and_last(days.validate),
    }
    with runs.tuning_run(context, name, params, parent) as (logged, log_trial):
        stored.set_user_attr("mlflow_run", logged.run_id)

        def record_trial(trial: Trial) -> None:
            log_trial(trial)
            callbacks.on_trial(trial)

        search = tune(project, dataset, study, budget, replace(callbacks, on_trial=record_trial))
        text = as_toml(project, name, search)
        runs.log_search(search, text)
    return RecordedSearch(search, study.name, text, logged.link)
