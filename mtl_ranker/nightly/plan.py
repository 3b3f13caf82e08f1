"""What a night trains: every model from scratch, or the champion's model continued on new days.

A continued training starts from the champion and never from the last training: a model that was not
promoted, or was rolled back, leaves no trace in the next night's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import partial

from mtl_ranker.config import Project, Training
from mtl_ranker.context import Context
from mtl_ranker.features.days import SplitDays, last_final_day, needed_days, span, split_days
from mtl_ranker.features.examples import soft_objectives
from mtl_ranker.features.view import model_context
from mtl_ranker.logs.contract import action_values
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.dataset import Continuing
from mtl_ranker.training.network import tasks_of
from mtl_ranker.training.soft_labels import Prior
from mtl_ranker.training.specs import contender_specs
from mtl_ranker.workspace import fingerprint

# A model within one standard error of the best is near it (Breiman et al., Classification and
# Regression Trees, 1984, section 3.4.3).
NEAR = 1.0


@dataclass(frozen=True)
class PastNight:
    """What a night trained.

    Attributes:
        day: its last test day.
        full: whether every model was trained from scratch.
        behind: model → standard errors behind the best on validation, of the models it trained.
        specs: model → `fingerprint` of its specification; none of nights that did not store it.
    """

    day: date
    full: bool
    behind: Mapping[str, float]
    specs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """A model that a night may continue from.

    Attributes:
        version: in the model registry, for messages.
        fixed: it is a ranker without a training.
        start: `RankerArtifact.start`.
    """

    version: str
    fixed: bool
    start: RankerArtifact | None


@dataclass(frozen=True)
class Start:
    """The champion's version and ranker that a night continues from, and that ranker's last day."""

    version: str
    artifact: RankerArtifact
    after: date

    @property
    def continuing(self) -> Continuing:
        return Continuing(self.artifact.encoder, self.after)

    def new_days(self, days: SplitDays) -> list[date]:
        """The training days after the champion's."""
        return self.continuing.new_days(days)


@dataclass(frozen=True)
class TrainingPlan:
    """What a night trains.

    Attributes:
        start: what the night continues from; None for trainings from scratch.
        reason: why it is so, in words; empty where nothing else is asked for.
        left_out: model of the project → why it is not trained.
        prior: what soft labels are estimated from; None without them, and without a champion.
        prior_note: which model that is, or why there is none; empty without soft labels.
    """

    start: Start | None = None
    reason: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    prior: Prior | None = None
    prior_note: str = ""

    @property
    def full(self) -> bool:
        """Whether every model is trained from scratch."""
        return self.start is None and not self.left_out

    @property
    def notes(self) -> list[str]:
        """The plan in sentences, for the report and the terminal."""
        notes = [text for text in (self.reason, self.prior_note) if text]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        return [*notes, *(f"not trained: {', '.join(n)}; {why}" for why, n in by_reason.items())]


FROM_SCRATCH = TrainingPlan()


def plan_training(
    context: Context, day: date, champion: Origin | None, history: Sequence[PastNight]
) -> TrainingPlan:
    """What the night of a day trains, by `training.start`, `contenders` and `full_every`.

    Args:
        champion: of the nights before this one; None without one.
        history: trainings of any nights; those before this one count.
    """
    project, settings = context.project, context.project.training
    if settings.start == "scratch" and settings.contenders == "all":
        return FROM_SCRATCH
    tested = last_final_day(project, day)
    earlier = sorted((n for n in history if n.day < tested), key=lambda n: n.day, reverse=True)
    due = _due(settings, earlier, tested)
    if due is not None:
        return TrainingPlan(reason=f"full training, every model from scratch: {due}")
    if settings.start == "champion":
        available = needed_days(project, context.workspace.days("events"), day)
        split = split_days(project, available, day)
        return _continued(context, split, champion)
    return TrainingPlan(left_out=_never_near(project, earlier))


def with_prior(
    plan: TrainingPlan, context: Context, version: str, champion: RankerArtifact
) -> TrainingPlan:
    """The plan with the champion as the estimate of soft labels, where it can be.

    It predicts objectives whose label it was trained on, from the features of this project.

    Args:
        version: the champion's, for the note and the digest.
    """
    own, project = champion.project, context.project
    known = {o.name: (o.label, o.where, o.kind) for o in own.objectives}
    same = [o.name for o in project.objectives if known.get(o.name) == (o.label, o.where, o.kind)]
    obstacle = None
    if not set(soft_objectives(project)) & set(same):
        obstacle = "has no objective with the same label"
    elif _actions(own)[0] != _actions(project)[0]:
        obstacle = "was trained with other [[log.actions]]"
    elif model_context(context, own, champion.sql).examples_in:
        obstacle = "has other features"
    if obstacle is not None:
        note = f"soft labels by the base rate of closed days: version {version} {obstacle}"
        return replace(plan, prior_note=note)
    # The version also identifies trees and calibration, which the weights do not.
    digest = fingerprint(version, champion.weights_digest)
    prior = Prior(partial(champion.predict_examples, context.workspace), same, digest)
    return replace(plan, prior=prior, prior_note=f"soft labels by version {version}")


def _due(settings: Training, earlier: Sequence[PastNight], day: date) -> str | None:
    """Why a full training is due, or None.

    Args:
        earlier: nights, latest first.
        day: the last test day.
    """
    last = next((night.day for night in earlier if night.full), None)
    if last is None:
        return "there is no earlier one"
    if day - last >= timedelta(days=settings.full_every):
        return f"the last one tested on {last} (training.full_every = {settings.full_every})"
    return None


def _continued(context: Context, split: SplitDays, champion: Origin | None) -> TrainingPlan:
    """The champion's model continued, or every model from scratch and why."""
    obstacle = _obstacle(context, split, champion)
    if obstacle is not None:
        return TrainingPlan(reason=f"every model is trained from scratch: {obstacle}")
    assert champion is not None  # without one there is an obstacle
    assert champion.start is not None
    assert champion.start.last_day is not None
    start = Start(champion.version, champion.start, champion.start.last_day)
    specs = contender_specs(context.project)
    name = next(n for n, spec in specs.items() if spec == champion.start.model.spec)
    return TrainingPlan(
        start,
        f"{name} continues from version {start.version}, which was trained up to {start.after}, on "
        f"{span(start.new_days(split))}",
        {other: "only full trainings train other models" for other in specs if other != name},
    )


def _obstacle(context: Context, split: SplitDays, champion: Origin | None) -> str | None:
    """Why the champion's training cannot be continued, or None."""
    project = context.project
    if champion is None:
        return "there is no champion of an earlier night"
    version = f"version {champion.version}"
    if champion.fixed:
        return f"{version} is a baseline without a training"
    start = champion.start
    if start is None or start.last_day is None:
        return f"{version} was stored without what a training continues from"
    if start.model.spec not in contender_specs(project).values():
        return f"no [models.*] has the architecture of {version}"
    if list(start.tasks) != tasks_of(project) or start.project.objectives != project.objectives:
        return f"[[objectives]] differ from those of {version}"
    if _actions(start.project) != _actions(project):
        return f"[[log.actions]] or training.immature differ from those of {version}"
    if model_context(context, start.project, start.sql).examples_in or _encoding(
        start.project
    ) != _encoding(project):
        return f"the features differ from those of {version}"
    if start.last_day >= split.train[-1]:
        return f"{version} was trained up to {start.last_day}, so that no training day is new"
    if start.last_day < split.train[0]:
        return f"{version} was trained up to {start.last_day}, before the training days"
    return None


def _actions(project: Project) -> tuple[object, str]:
    """What decides the labels and aggregates that actions make."""
    actions = [(action_values(action), action.organic) for action in project.log.actions]
    return actions, project.training.immature


def _encoding(project: Project) -> object:
    """What decides the encoder and the fields of the network."""
    return project.features.model_copy(update={"block_rows": 1})


def _never_near(project: Project, earlier: Sequence[PastNight]) -> dict[str, str]:
    """Models that were not within `NEAR` of the winner in any of the last nights that trained them.

    Nights whose winner, or the model itself, has another specification now do not count.

    Args:
        earlier: nights, latest first.
    """
    nights, left_out = project.training.close_nights, {}
    now = {name: fingerprint(spec) for name, spec in contender_specs(project).items()}

    def counts(night: PastNight, name: str) -> bool:
        """Whether the night trained this model and one that was better, as they are now."""
        best = min(night.behind, key=lambda model: night.behind[model])
        return all(m in now and night.specs.get(m, now[m]) == now[m] for m in (name, best))

    for name in project.models:
        trained = [n for n in earlier if name in n.behind and counts(n, name)]
        behind = [night.behind[name] for night in trained][:nights]
        if len(behind) == nights and min(behind) > NEAR:
            left_out[name] = (
                f"in the last {nights} nights that trained it, a model was always more than "
                f"{NEAR:g} standard error behind the winner on validation "
                "(training.contenders = 'close')"
            )
    return left_out
