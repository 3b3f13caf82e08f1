"""Nights that continue from the champion: what they train, from where, and on which rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch

from mtl_ranker.config import load_project
from mtl_ranker.context import Context, without_log
from mtl_ranker.features.columns import EVENT
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.contenders import Callbacks
from mtl_ranker.nightly.plan import (
    Origin,
    PastNight,
    TrainingPlan,
    plan_training,
)
from mtl_ranker.nightly.suite import train_all, train_suite
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.reports.page import training_report
from mtl_ranker.training.dataset import load_dataset, replay_of
from mtl_ranker.training.specs import contender_specs
from mtl_ranker.workspace import Workspace, fingerprint
from tests.conftest import FIRST, write_log
from tests.projects import edit_project, write_project

DAYS = [FIRST + timedelta(days=n) for n in range(9)]
CHAMPION = {"start": "champion", "full_every": 5, "replay": 0.5}
FULL = PastNight(DAYS[4], True, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine days of the tiny log: test days from the sixth on have a whole split."""
    root = tmp_path_factory.mktemp("incremental")
    write_project(root, training={**CHAMPION, "refit": True})
    write_log(root, days=9)
    context = open_context(str(root / "project.toml"), root, root / "ws")
    for day in DAYS[5:]:
        build_split(context, day)
    return root


def context_of(root, **changes) -> Context:
    """The folder's workspace with its project file, changed."""
    changed = root / "changed"
    changed.mkdir(exist_ok=True)
    (changed / "project.toml").write_bytes((root / "project.toml").read_bytes())
    if changes:
        edit_project(changed, **changes)
    return without_log(load_project(str(changed / "project.toml")), Workspace(root / "ws"))


def champion(artifact: RankerArtifact) -> Origin:
    return Origin("7", artifact.fixed, artifact.start)


@pytest.fixture(scope="module")
def first(folder):
    """The full training of the sixth day, which a first night makes."""
    context = context_of(folder)
    plan = plan_training(context, DAYS[5], None, [])
    assert plan.full
    assert "there is no earlier one" in plan.reason
    return train_suite(context, DAYS[5], plan=plan)


@pytest.fixture(scope="module")
def second(folder, first):
    context = context_of(folder)
    plan = plan_training(context, DAYS[6], champion(first.winner.artifact), [FULL])
    return train_suite(context, DAYS[6], plan=plan)


def test_a_continued_night_trains_the_champions_model_on_the_new_day(folder, second):
    """Split of the seventh day: days 4 to 6 train, but day 3 ended the first training."""
    assert second.days.train == DAYS[2:5]
    assert 40 + 10 < second.train_rows < 40 + 30  # a day, and about half as many rows before it
    assert [run.name for run in second.runs] == ["mmoe", "mmoe, refit"]
    assert {len(run.trained.epochs) for run in second.runs} == {1}
    page = training_report(context_of(folder).project, second)
    said = "mmoe continues from version 7, which was trained up to 2026-03-05, on 2026-03-06"
    assert said in second.notes
    assert said in page
    assert f" rows of {DAYS[4]} and a replay of earlier days, from version 7" in page


def test_it_starts_before_the_champions_refit(folder, first, second):
    """The champion's own weights know the validation day; the start's do not."""
    start = second.plan.start
    assert first.winner.refitted
    assert first.winner.artifact.last_day == DAYS[4]
    assert start.after == start.artifact.last_day == DAYS[3]
    (before,) = [run for run in first.runs if run.name == "mmoe"]
    for name, weight in start.artifact.model.state_dict().items():
        assert torch.equal(weight, before.trained.model.state_dict()[name])
    assert second.winner.artifact.start.last_day == DAYS[4]


def test_the_start_of_the_night_after_is_the_champion_and_not_the_last_training(
    folder, first, second
):
    """A night that was rolled back or not promoted leaves nothing: two days are new to the next."""
    context, history = context_of(folder), [FULL, PastNight(DAYS[6], False, {"mmoe": 0.0})]
    kept, poisoned = (
        plan_training(context, DAYS[7], champion(suite.winner.artifact), history)
        for suite in (first, second)
    )
    assert kept.start.new_days(replace(first.days, train=DAYS[3:6])) == DAYS[4:6]
    assert poisoned.start.new_days(replace(first.days, train=DAYS[3:6])) == DAYS[5:6]
    suite = train_suite(context, DAYS[7], plan=kept)
    assert suite.train_rows == 80 + 40  # all forty older rows, half as many as new ones
    start, again = first.winner.artifact.start, suite.runs[0].start
    assert again.weights_digest == start.weights_digest


def test_a_saved_ranker_serves_as_before_and_can_be_continued(tmp_path, first, folder, caplog):
    """What only a training reads is left out of what is loaded to rank."""
    winner = first.winner.artifact
    saved = winner.save(tmp_path / "ranker")
    served, start = RankerArtifact.load(saved), RankerArtifact.load_start(saved)
    assert (served.moments, served.before_refit) == ({}, None)
    assert start.weights_digest == winner.start.weights_digest
    moments = next(saved.rglob("moments.safetensors"))
    moments.write_bytes(moments.read_bytes()[:1_000])
    assert RankerArtifact.load_start(saved) is None
    assert any("moments.safetensors of the model is damaged" in each for each in caplog.messages)
    assert start.last_day == DAYS[3]
    frame = first.held_out.frame
    np.testing.assert_array_equal(served.predict(frame), winner.predict(frame))
    before = RankerArtifact.load(winner.before_refit.save(tmp_path / "before"))
    np.testing.assert_array_equal(before.predict(frame), start.predict(frame))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"models": {"mmoe": {"experts": 3}}}, "no [models.*] has the architecture of version 7"),
        ({"features": {"windows": [1, 2]}}, "the features differ from those of version 7"),
        ({"features": {"bins": 5}}, "the features differ from those of version 7"),
        ({"features": {"block_rows": 50}}, None),
        ({"training": {"batch_size": 64}}, None),
        (
            {"training": {"immature": "positives"}},
            "[[log.actions]] or training.immature differ from those of version 7",
        ),
    ],
)
def test_a_changed_project_trains_from_scratch_and_says_why(folder, first, changes, reason):
    context = context_of(folder, **changes)
    plan = plan_training(context, DAYS[6], champion(first.winner.artifact), [FULL])
    assert plan.full == (reason is not None)
    assert reason is None or plan.reason == f"every model is trained from scratch: {reason}"


def test_other_objectives_a_baseline_or_an_old_ranker_cannot_be_continued(folder, first):
    context = context_of(folder)
    start = first.winner.artifact.start
    objectives = [
        context.project.objectives[0].model_copy(update={"label": "1 - click"}),
        context.project.objectives[1],
    ]
    other = context.project.model_copy(update={"objectives": objectives})
    for given, reason in (
        (None, "there is no champion of an earlier night"),
        (Origin("3", True, None), "version 3 is a baseline without a training"),
        (Origin("3", False, None), "was stored without what a training continues from"),
        (Origin("3", False, replace(start, project=other)), "[[objectives]] differ"),
        (Origin("3", False, replace(start, last_day=DAYS[4])), "no training day is new"),
        (Origin("3", False, replace(start, last_day=DAYS[1])), "before the training days"),
    ):
        plan = plan_training(context, DAYS[6], given, [FULL])
        assert plan.full
        assert reason in plan.reason


@pytest.mark.parametrize(("days", "full"), [(1, False), (4, False), (5, True), (9, True)])
def test_a_full_training_is_due_after_full_every_days(folder, first, days, full):
    """Counted from the last full training, whatever was continued since."""
    context = context_of(folder)
    history = [
        PastNight(DAYS[6] - timedelta(days=days), True, {}),
        PastNight(DAYS[5], False, {}),
        PastNight(DAYS[6], True, {}),  # the night itself, run again with other settings
        PastNight(DAYS[7], True, {}),  # later than the night
    ]
    plan = plan_training(context, DAYS[6], champion(first.winner.artifact), history)
    assert plan.full == full


def test_models_that_were_never_near_the_winner_are_left_out_until_a_full_training(folder):
    models = {"other": {"preset": "shared_bottom"}, "third": {"preset": "omoe"}}
    training = {"start": "scratch", "contenders": "close", "close_nights": 2, "refit": False}
    context = context_of(folder, models=models, training=training)

    def night(number: int, full: bool = False, **behind: float) -> PastNight:
        return PastNight(DAYS[number], full, behind)

    def left_out(*history: PastNight) -> list[str]:
        return list(plan_training(context, DAYS[6], None, history).left_out)

    near, far = {"mmoe": 0.0, "third": 0.9}, {"mmoe": 0.0, "third": 1.1}
    assert left_out(night(3, True, **far, other=3.0), night(5, **near, other=2.0)) == ["other"]
    assert left_out(night(3, True, **far, other=1.0), night(5, **near, other=2.0)) == []
    assert left_out(night(3, True, **far, other=3.0)) == []  # one night alone says too little
    # A night that does not train a model says nothing about it.
    alone = night(5, mmoe=0.0)
    of_three = [night(3, **far, other=3.0), night(4, True, **far, other=2.0), alone]
    assert left_out(*of_three) == ["other", "third"]
    assert left_out(night(0, True, **far, other=3.0), night(1, **far, other=3.0)) == []  # due
    # Not nights that were won by a model, or trained a model, that the project has no more.
    gone = {"gone": 0.0, "mmoe": 3.0, "third": 3.0, "other": 3.0}
    assert left_out(night(4, True, **gone), night(5, **gone)) == []
    now = {name: fingerprint(spec) for name, spec in contender_specs(context.project).items()}

    def with_specs(**other: str) -> list[PastNight]:
        return [replace(each, specs=now | other) for each in of_three]

    assert left_out(*with_specs()) == ["other", "third"]
    assert left_out(*with_specs(third="another")) == ["other"]
    assert left_out(*with_specs(mmoe="another")) == []
    plan = plan_training(
        context, DAYS[6], None, [night(4, True, other=3.0), night(5, True, other=2.0)]
    )
    suite = train_suite(context, DAYS[6], plan=plan)
    assert {run.name for run in suite.runs} == {"linear", "mmoe", "third"}
    assert any(note.startswith("not trained: other; in the last 2 nights") for note in suite.notes)
    assert suite.behind.keys() == {"linear", "mmoe", "third"}
    assert min(suite.behind.values()) == 0.0


def test_the_replay_is_drawn_anew_each_night_and_streamed_rows_are_the_same(folder, first):
    """Half a row for each new one, of older training days; in files as in memory."""
    context = context_of(folder)
    plan = plan_training(context, DAYS[6], champion(first.winner.artifact), [FULL])
    streaming = context_of(folder, training={"in_memory_rows": 30})
    whole = load_dataset(context, DAYS[6], continuing=plan.start.continuing)
    streamed = load_dataset(streaming, DAYS[6], continuing=plan.start.continuing)
    assert whole.shards is None
    assert len(streamed.train) == len(whole.train)
    read = streamed.train.sample(1_000)
    assert torch.equal(read.labels.nan_to_num(-1), whole.train.labels.nan_to_num(-1))
    assert torch.equal(read.categorical, whole.train.categorical)
    events = context.workspace.scan("examples", DAYS[2:5])
    replayed = [
        set(replay_of(events, 20, seed).select("date", EVENT).collect().iter_rows())
        for seed in (0, 0, 1)
    ]
    assert replayed[0] == replayed[1] != replayed[2]
    none = context_of(folder, training={"replay": 0.0})
    assert len(load_dataset(none, DAYS[6], continuing=plan.start.continuing).train) == 40


def test_a_continued_night_keeps_the_champions_trees(folder):
    """They are averaged with the continued network, and not fitted on a single day."""
    context = context_of(folder, training={"trees": 5, "refit": True})
    full = train_suite(context, DAYS[5])
    before = next(run for run in full.runs if run.name == "mmoe, trees")
    start = replace(before.artifact, before_refit=None)
    plan = plan_training(context, DAYS[6], Origin("7", False, start), [FULL])
    suite = train_suite(context, DAYS[6], plan=plan)
    beside = next(run for run in suite.runs if run.name == "mmoe, trees")
    for name, tensor in start.trees.state_dict().items():
        assert torch.equal(beside.artifact.trees.state_dict()[name], tensor)


def test_the_default_is_every_model_from_scratch(folder, first):
    context = context_of(folder, training={"start": "scratch"})
    plan = plan_training(context, DAYS[6], champion(first.winner.artifact), [FULL])
    assert plan == TrainingPlan()
    suite = train_suite(context, DAYS[6], plan=plan)
    assert suite.winner.artifact.start is None


def test_checkpoints_of_other_starts_are_not_resumed(folder, first):
    """A training from scratch, and two that continue from other champions, have other keys."""
    context = context_of(folder, training={"checkpoint_seconds": 1e-9})
    start = first.winner.artifact.start
    model = copy.deepcopy(start.model)
    with torch.no_grad():
        model.towers.biases[0].add_(1.0)
    trained = []

    def train(artifact: RankerArtifact | None) -> None:
        given = None if artifact is None else Origin("7", False, artifact)
        plan = plan_training(context, DAYS[6], given, [FULL])
        continuing = None if plan.start is None else plan.start.continuing
        dataset = load_dataset(context, DAYS[6], continuing=continuing)

        def on_epoch(name, seed, epoch):
            if name == "mmoe":
                trained.append(epoch.number)

        train_all(context.project, dataset, Callbacks(on_epoch), plan=plan)

    for artifact, epochs in (
        (start, [1]),
        (start, []),
        (replace(start, model=model), [1]),
        (None, [1, 2]),
        (start, [1]),
    ):
        trained.clear()
        train(artifact)
        assert trained == epochs
