"""Search of a model's settings on the validation days by Optuna's TPE, with pruning.

The test days are never read. The first trial has the settings of the project file, the incumbent.
Trials whose gain exceeds its standard error, and which have no objective with significantly worse
log loss, may replace it; the best of them are compared with it on rolling validation days and
several seeds (`rolling.py`), and one replaces it only where it is significantly better there. A
search with a storage can be resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_ranker.config import Project, Training
from mtl_ranker.evaluation.criterion import Criterion
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.models.presets import make
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.nightly.results import predicted_rows
from mtl_ranker.nightly.rolling import Confirmed, Rolling, Settings, choose, confirm
from mtl_ranker.training.dataset import Dataset
from mtl_ranker.training.loop import Design, Epoch, Execution, Rows, sized, train_ranker
from mtl_ranker.training.network import predict

if TYPE_CHECKING:
    import optuna

# The settings of `[training]` that are searched.
TRAINING = ("batch_size", "learning_rate", "weight_decay")
SCALE = "standard errors"  # attribute of a study
BEATS = "beats the incumbent"  # attribute of a trial
CONFIRMED = "compared on rolling days"  # attribute of a study


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Attributes:
        training, model: settings of `[training]` and `[models.NAME]`.
        quality: by `Criterion` on the validation days, in standard errors; NaN if pruned. If an
            objective's log loss is significantly worse than the incumbent's, it is at most one
            below the incumbent's.
    """

    number: int
    training: dict[str, Any]
    model: dict[str, Any]
    quality: float
    pruned: bool
    epochs: list[Epoch] = field(default_factory=list)


@dataclass(frozen=True)
class Search:
    """The chosen settings of all trials of a study, also of earlier searches.

    Those of a trial that is significantly better than the incumbent on rolling validation days, or
    else the project file's.

    Attributes:
        training, model: settings of `[training]` and `[models.NAME]`.
        quality: by `Criterion` on the validation days, in standard errors.
        trials: all of them, pruned ones included.
        chosen: number of the trial that replaces the project file's settings; None to keep them.
        confirmed: the trials that were compared on rolling validation days.
    """

    training: dict[str, Any]
    model: dict[str, Any]
    quality: float
    trials: int
    pruned: int
    chosen: int | None = None
    confirmed: list[Confirmed] = field(default_factory=list)

    @property
    def decision(self) -> str:
        """What was chosen, in words."""
        if self.chosen is not None:
            return f"trial {self.chosen} is significantly better than the project file"
        return "no trial is significantly better than the project file, whose settings are kept"


@dataclass(frozen=True)
class Budget:
    """The limits of a search.

    Attributes:
        trials: trainings in all, including those of earlier searches of the same study.
        seconds: no trial starts after this time; None for no limit.
        finalists: the best trials, at most so many, are compared with the incumbent again.
        folds: validation days of that comparison.
        seeds: trainings of each settings and validation day in it.
    """

    trials: int
    seconds: float | None = None
    finalists: int = 2
    folds: int = 3
    seeds: int = 3

    @property
    def confirming(self) -> int:
        """The trainings of the comparison, at most."""
        return (self.finalists + 1) * self.folds * self.seeds


@dataclass(frozen=True)
class Callbacks:
    """Functions called with the progress of a search.

    Attributes:
        on_trial: called with each training of the search when it ends.
        on_finalists: called with the number of trials that are compared again.
        on_training: called after each training of that comparison.
    """

    on_trial: Callable[[Trial], None] = lambda trial: None
    on_finalists: Callable[[int], None] = lambda finalists: None
    on_training: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Study:
    """The model that is searched, and where Optuna stores its trials.

    Attributes:
        model: NAME of a `[models.NAME]`.
        name: of Optuna's study.
        storage: a database URL, from which a search can be resumed; None for memory.
    """

    model: str
    name: str = "tune"
    storage: str | None = None
    seed: int = 0


def tune(
    project: Project,
    dataset: Dataset,
    study: Study,
    budget: Budget,
    callbacks: Callbacks = Callbacks(),
) -> Search:
    """Search the settings of a model and of `[training]` by `Criterion` on the validation days.

    Its standard errors and its reference are those of the training with the project file's
    settings, which a resumed search repeats.
    """
    import optuna

    training = sized(project.training, len(dataset.train))
    project = project.model_copy(update={"training": training})
    configured = dict(project.models[study.model])

    def objective(trial: optuna.Trial) -> float:
        training, model = suggest(trial, project, configured)
        epochs: list[Epoch] = []

        def on_epoch(epoch: Epoch) -> None:
            epochs.append(epoch)
            trial.report(-epoch.monitored, epoch.number)  # the search maximises
            if trial.should_prune():
                raise optuna.TrialPruned

        spec = make(f"models.{study.model}", model, len(dataset.tasks), project.features.groups)
        settings = project.training.model_copy(update=training)
        try:
            prediction = _validated(dataset, spec, settings, study.seed, on_epoch)
        except optuna.TrialPruned:
            callbacks.on_trial(Trial(trial.number, training, model, float("nan"), True, epochs))
            raise
        criterion = incumbent(trial.study, prediction if trial.number == 0 else None)
        quality = criterion.value(prediction)
        if criterion.worse_loss([prediction]):
            quality = min(quality, criterion.value(criterion.reference) - 1.0)
        else:
            gain = criterion.gain(prediction)
            trial.set_user_attr(BEATS, bool(gain.value > gain.standard_error))
        callbacks.on_trial(Trial(trial.number, training, model, quality, False, epochs))
        return quality

    found: list[Criterion] = []

    def incumbent(stored: optuna.Study, prediction: np.ndarray | None) -> Criterion:
        """The criterion with the project file's settings as reference; trained for if needed."""
        if not found:
            if prediction is None:
                spec = make(
                    f"models.{study.model}",
                    configured,
                    len(dataset.tasks),
                    project.features.groups,
                )
                prediction = _validated(dataset, spec, project.training, study.seed)
            found.append(_criterion(dataset, stored, prediction))
        return found[0]

    stored = open_study(project, study)
    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    done = len(stored.get_trials(deepcopy=False, states=finished))
    if done < budget.trials:
        stored.optimize(objective, n_trials=budget.trials - done, timeout=budget.seconds)
    trials = stored.get_trials(deepcopy=False, states=finished)
    complete = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    beating = [t for t in complete if t.user_attrs.get(BEATS)]
    finalists = sorted(beating, key=lambda t: -float(t.value or 0.0))[: budget.finalists]

    def settings_of(params: Mapping[str, Any]) -> Settings:
        return Settings(*suggest(optuna.trial.FixedTrial(dict(params)), project, configured))

    own = complete[0]  # the project file's
    candidates = {t.number: settings_of(t.params) for t in [own, *finalists]}
    confirmed = _confirmed(project, dataset, stored, candidates, budget, callbacks)
    winner = choose(confirmed)
    [best] = [own] if winner is None else [t for t in finalists if t.number == winner.trial]
    settings = settings_of(best.params)
    return Search(
        training=dict(settings.training),
        model=dict(settings.model),
        quality=float(best.value or 0.0),
        trials=len(trials),
        pruned=len(trials) - len(complete),
        chosen=None if winner is None else winner.trial,
        confirmed=confirmed,
    )


def _confirmed(
    project: Project,
    dataset: Dataset,
    stored: optuna.Study,
    candidates: Mapping[int, Settings],
    budget: Budget,
    callbacks: Callbacks,
) -> list[Confirmed]:
    """The finalists compared with the incumbent; a finished comparison is read from the study."""
    if len(candidates) == 1:
        return []
    asked = [sorted(candidates), budget.folds, budget.seeds]
    known = stored.user_attrs.get(CONFIRMED)
    if known is not None and known["asked"] == asked:
        return [
            Confirmed(**each | {"gain": Interval(**each["gain"])}) for each in known["confirmed"]
        ]
    callbacks.on_finalists(len(candidates) - 1)
    found = confirm(
        project, dataset, candidates, Rolling(budget.folds, budget.seeds), callbacks.on_training
    )
    stored.set_user_attr(CONFIRMED, {"asked": asked, "confirmed": [asdict(c) for c in found]})
    return found


def _validated(
    dataset: Dataset,
    spec: RankerSpec,
    settings: Training,
    seed: int,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> np.ndarray:
    """Predictions [N, T] of one training on the validation days."""
    validate = dataset.examples["validate"]
    design = Design(spec, dataset.encoder, dataset.tasks)
    rows, execution = Rows(dataset.train, validate), Execution(on_epoch)
    trained = train_ranker(design, rows, settings, seed, execution)
    return predict(trained.model, validate, dataset.tasks)


def _criterion(dataset: Dataset, stored: optuna.Study, prediction: np.ndarray) -> Criterion:
    """The study's criterion; its standard errors are stored with it when it is first needed."""
    criterion = Criterion.fit(dataset.tasks, predicted_rows(dataset.validation, prediction))
    scale = stored.user_attrs.get(SCALE)
    if scale is None:
        stored.set_user_attr(SCALE, dict(criterion.scale))
        return criterion
    return replace(criterion, scale=scale)


def open_study(project: Project, study: Study) -> optuna.Study:
    """The Optuna study, whose first finished trial has the settings of the project file."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stored = optuna.create_study(
        study_name=study.name,
        storage=study.storage,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=study.seed, n_startup_trials=8, multivariate=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    )
    # A killed first trial neither finished nor waits.
    states = optuna.trial.TrialState
    kept = (states.COMPLETE, states.PRUNED, states.WAITING)
    if not stored.get_trials(deepcopy=False, states=kept):
        stored.enqueue_trial(default_trial(project, project.models[study.model]))
    return stored


def suggest(
    trial: Any, project: Project, configured: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of `[training]` and of the model from an Optuna trial (or a fixed one).

    Args:
        configured: the model's table in the project file.
    """
    now = default_trial(project, configured)
    training = {
        "batch_size": trial.suggest_categorical(
            "batch_size", sorted({256, 512, 1024, 2048, now["batch_size"]})
        ),
        "learning_rate": trial.suggest_float(
            "learning_rate", *_around(now["learning_rate"], 3e-4, 5e-3), log=True
        ),
        "weight_decay": trial.suggest_float(
            "weight_decay", *_around(now["weight_decay"], 1e-4, 0.3), log=True
        ),
    }
    model = dict(configured)
    low, high = _around(now["dropout"], 0.0, 0.5)
    model["dropout"] = trial.suggest_float("dropout", low, high)
    model["embedding_dim"] = trial.suggest_categorical(
        "embedding_dim", sorted({4, 8, 16, now["embedding_dim"]})
    )
    if "members" in now:
        model["members"] = trial.suggest_categorical("members", sorted({1, 4, now["members"]}))
    if "experts" in now:
        model["experts"] = trial.suggest_categorical("experts", sorted({2, 4, 8, now["experts"]}))
    model["expert_hidden"] = [
        trial.suggest_categorical("expert_units", sorted({32, 64, 128, now["expert_units"]}))
    ] * trial.suggest_int("expert_layers", *_around(now["expert_layers"], 1, 2))
    return training, model


def default_trial(project: Project, configured: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the project file, by the names that the search gives them."""
    preset = configured.get("preset", "")
    spec = make("models.x", dict(configured), len(project.objectives), project.features.groups)
    hidden = list(spec.layers[-1].hidden)
    now: dict[str, Any] = {key: getattr(project.training, key) for key in TRAINING}
    now |= {"dropout": spec.dropout, "embedding_dim": spec.embedding_dim}
    now |= {"expert_units": hidden[0], "expert_layers": len(hidden)}
    if not spec.unshared:
        now["members"] = spec.members
    if preset in ("omoe", "mmoe", "sparse_mmoe"):
        now["experts"] = spec.layers[-1].experts
    return now


def _around(now: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """The range from low to high, widened to include `now`."""
    return min(low, now), max(high, now)


def as_toml(project: Project, name: str, search: Search) -> str:
    """The best settings as lines of a project file."""

    def lines(settings: dict[str, Any]) -> str:
        return "\n".join(f"{key} = {_toml(value)}" for key, value in settings.items())

    return f"[models.{name}]\n{lines(search.model)}\n\n[training]\n{lines(search.training)}\n"


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if "." in f"{value:.6g}" or "e" in f"{value:.6g}" else f"{value:.1f}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)
