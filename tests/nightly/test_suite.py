"""A night's training: seeds, early stopping, refit, trees, and objectives without labels."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mtl_ranker.config import load_project
from mtl_ranker.context import Context, without_log
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.criterion import Criterion
from mtl_ranker.evaluation.drift import health
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import compare, model_quality
from mtl_ranker.features.columns import numeric_features
from mtl_ranker.features.days import needed_days, split_days
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.logs.sources import open_context
from mtl_ranker.models.objectives import losses
from mtl_ranker.nightly import suite as suite_module
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.contenders import Callbacks, Contender, train_model
from mtl_ranker.nightly.refitting import harm_of_refit
from mtl_ranker.nightly.results import predicted_rows
from mtl_ranker.nightly.suite import train_all, train_suite
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.calibration import fit_calibration
from mtl_ranker.reports.tables import comparison_rows
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.dataset import load_dataset
from mtl_ranker.training.loop import Design, Execution, Rows, train_ranker
from mtl_ranker.training.network import predict_logits
from tests import projects
from tests.builds import build_once
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import SMALL, TINY, WITHOUT, changed, edit_project, write_project

LAST = FIRST + timedelta(days=5)


def prepared(root) -> Context:
    """The folder's project with every day built; without the log, which training does not read."""
    context = open_context(str(root / "project.toml"), root, root / "ws")
    build_once(root, lambda: build_split(context, LAST))
    return without_log(context.project, context.workspace)


def with_project_of(root, context: Context) -> Context:
    """The same workspace with the folder's project file as it is now."""
    return replace(context, project=load_project(str(root / "project.toml")))


def test_split_counts_back_from_the_day_and_skips_the_warm_up(tiny):
    project = load_project(str(tiny / "project.toml"))
    days = [FIRST + timedelta(days=n) for n in range(6)]
    split = split_days(project, days, LAST)
    assert (split.train, split.validate, split.test) == (days[1:4], [days[4]], [days[5]])
    with pytest.raises(ProjectError, match=r"split\.train_days.*1 warm-up days.*empty"):
        split_days(project, days[3:], LAST)
    with pytest.raises(ProjectError, match=r"split\.validate_days.*empty"):
        split_days(project, [*days[:4], days[5]], LAST)


@settings(max_examples=60, deadline=None)
@given(
    present=st.sets(st.integers(0, 24), min_size=4),
    window=st.integers(1, 5),
    warmup=st.integers(0, 6),
)
def test_the_warm_up_is_the_logs_whatever_window_is_read(present, window, warmup):
    """The days that a night reads have the same split as the whole log."""
    project = projects.project(
        features={"windows": [window]}, split={"warmup_days": warmup, "train_days": 4}
    )
    days = [FIRST + timedelta(days=n) for n in sorted(present)]

    def split(available):
        try:
            return split_days(project, available, days[-1])
        except ProjectError as error:
            return str(error).split(":")[0]

    assert split(needed_days(project, days, days[-1])) == split(days)


def test_a_checkpoint_of_another_split_of_the_same_days_is_not_resumed(tiny):
    """Its weights have been trained on what is validation in the other split."""
    write_project(
        tiny, training={"checkpoint_seconds": 1e-9}, split={"train_days": 3, "validate_days": 1}
    )
    context = prepared(tiny)
    trained = []

    def train(context):
        dataset = load_dataset(context, LAST)

        def on_epoch(name, seed, epoch):
            if name == "mmoe":
                trained.append(epoch.number)

        train_all(context.project, dataset, Callbacks(on_epoch))
        return dataset

    one = train(context)
    assert trained == [1, 2]
    train(context)
    assert trained == [1, 2]  # its own checkpoint is resumed at the end
    edit_project(tiny, split={"train_days": 2, "validate_days": 2})
    other = train(with_project_of(tiny, context))
    assert other.digest == one.digest
    assert trained == [1, 2, 1, 2]


def test_drift_of_streamed_rows_and_of_a_refit_winner(tiny, monkeypatch):
    """Days keep their own numbers of rows; scores are those of one model on all days."""
    scores = []

    def watched(project, frames, given=None, *more):
        scores.append(given)
        return health(project, frames, given, *more)

    monkeypatch.setattr(suite_module, "health", watched)
    monkeypatch.setattr(suite_module, "harm_of_refit", lambda *given: [])
    write_project(tiny, training={"in_memory_rows": 30, "refit": True})
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    assert suite.winner.refitted
    assert [day.rows for day in suite.drift.days] == [40] * 5
    assert not any("of a training day" in warning for warning in suite.drift.warnings)
    for part in ("train", "validate", "test"):
        rows = context.workspace.scan("examples", getattr(suite.days, part)).collect()
        served = suite.winner.artifact.predict(rows)["click"].to_numpy()
        np.testing.assert_allclose(scores[-1][part][:, 0], served, rtol=1e-5)


def test_the_winner_is_chosen_on_validation_never_on_test(tiny):
    """With the test days' clicks turned round, what was best there is worst; the winner stays."""
    changes = {
        "objectives": [{"name": "click", "group": "engagement", "label": "click"}],
        "models": {"other": {"preset": "shared_bottom"}},
        "training": {"seeds": [0, 1, 2], "learning_rate": 0.02},
    }
    write_project(tiny, **changes)
    suites = []
    for turned in (False, True):
        if turned:
            frame = tiny_events(LAST, shift=5).with_columns(click=1 - pl.col("click"))
            write_day(tiny, LAST, frame)
        suites.append(train_suite(prepared(tiny), LAST))
    best, other = suites
    assert best.winner.label == other.winner.label
    runs = {run.label: run for run in best.runs}
    turned_runs = {run.label: run for run in other.runs}
    test = {label: run.metrics["click"]["auc"] for label, run in runs.items()}
    for label, run in turned_runs.items():
        assert run.validate_quality == pytest.approx(runs[label].validate_quality)
        assert run.metrics["click"]["auc"] == pytest.approx(1 - test[label])
    # Neither choice below can be made on test days, as no order is its own reverse.
    of_model = {
        name: [value for label, value in test.items() if label.startswith(name)]
        for name in ("mmoe", "other")
    }
    assert np.mean(of_model["mmoe"]) != pytest.approx(np.mean(of_model["other"]))
    assert len(set(of_model[best.winner.name])) == 3


def test_same_seed_same_weights_other_seed_other_weights(tiny):
    context = prepared(tiny)
    one = train_suite(context, LAST).winner.trained.model.state_dict()
    two = train_suite(context, LAST).winner.trained.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    write_project(tiny, training={"seeds": [5]})
    other = train_suite(with_project_of(tiny, context), LAST)
    weights = other.winner.trained.model.state_dict()
    first = "layers.0.banks.0.weights.0"
    assert not torch.equal(one[first], weights[first])


def test_best_epoch_is_restored(tiny):
    write_project(tiny, training={"epochs": 30, "patience": 3, "learning_rate": 0.1})
    context = prepared(tiny)
    trained = train_suite(context, LAST).winner.trained
    monitored = [epoch.monitored for epoch in trained.epochs]
    assert trained.best_epoch == 1 + monitored.index(min(monitored))
    assert len(trained.epochs) < 30


def test_single_task_restores_each_objectives_own_best_epoch(tiny):
    write_project(
        tiny,
        models={"mmoe": {"preset": "single_task", "experts": WITHOUT}},
        training={"epochs": 12, "patience": 12, "learning_rate": 0.05},
    )
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    run = next(run for run in suite.runs if run.name == "mmoe")
    trained = run.trained
    validate_loss = np.array([epoch.validate_loss for epoch in trained.epochs])
    assert trained.best_epochs == (validate_loss.argmin(0) + 1).tolist()
    assert len(set(trained.best_epochs)) == 2
    rows = context.workspace.scan("examples", suite.days.validate).collect()
    labels = [f"label_{task.name}" for task in suite.tasks]
    validate = encode_examples(run.artifact.encoder, rows, labels)
    logits = predict_logits(trained.model, validate)
    restored = losses(logits, validate.labels, suite.tasks)
    np.testing.assert_allclose(restored, validate_loss.min(0), rtol=1e-5)


@pytest.mark.slow
def test_parallel_trainings_give_the_same_table_as_sequential_ones(tiny):
    write_project(tiny, training={"seeds": [0, 1], "threads": 1, "jobs": 1})
    context = prepared(tiny)
    one = train_suite(context, LAST)
    edit_project(tiny, training={"jobs": 2})
    calls = []
    callbacks = Callbacks(lambda *epoch: calls.append(epoch))
    two = train_suite(with_project_of(tiny, context), LAST, callbacks)
    assert comparison_rows(two) == comparison_rows(one)
    assert two.winner.label == one.winner.label
    assert np.array_equal(two.winner.test_prediction, one.winner.test_prediction)
    assert sorted((n, s, e.number) for n, s, e in calls) == [
        *(("linear", 0, number) for number in (1, 2)),
        *(("mmoe", seed, number) for seed in (0, 1) for number in (1, 2)),
    ]


@pytest.mark.slow
def test_an_error_in_a_training_process_fails_the_suite(tiny):
    write_project(tiny, training={"seeds": [0, 1], "jobs": 2, "learning_rate": 1e30})
    context = prepared(tiny)
    with pytest.raises(FloatingPointError, match="loss is not finite in epoch"):
        train_suite(context, LAST)


def test_refit_trains_the_winner_on_validation_days_too_for_its_best_epochs(tiny):
    settings = {"epochs": 9, "patience": 2, "learning_rate": 0.03, "refit": True}
    write_project(tiny, training=settings)
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    *runs, refit = suite.runs
    assert refit is suite.winner
    first = next(run for run in runs if refit.name == f"{run.name}, refit")
    assert refit.seed == first.seed
    assert refit.trained.best_epochs == first.trained.best_epochs
    assert len(refit.trained.epochs) == first.trained.best_epoch
    assert refit.validate_quality == first.validate_quality
    # Expected: the same training on the rows of both parts, stopped after as many epochs.
    days = [*suite.days.train, *suite.days.validate]
    rows = context.workspace.scan("examples", days).collect()
    labels = [f"label_{task.name}" for task in suite.tasks]
    encoder = refit.artifact.encoder
    expected = train_ranker(
        Design(refit.spec, encoder, suite.tasks),
        Rows(encode_examples(encoder, rows, labels)),
        context.project.training,
        0,
        Execution(until=first.trained.best_epochs),
    ).model.state_dict()
    weights = refit.trained.model.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_the_winner_keeps_its_seeds_metrics_and_no_verdict_rests_on_a_last_epoch(tiny):
    models = {
        "mmoe": {"preset": "mmoe", "experts": 2, "expert_hidden": [8]},
        "single_task": {"preset": "single_task", "expert_hidden": [8]},
    }
    write_project(tiny, models=models, training={"seeds": [0, 1], "learning_rate": 1e-4})
    suite = train_suite(prepared(tiny), LAST)
    [winner] = [run for run in suite.runs if run is suite.winner]
    own = [run.metrics for run in suite.runs if run.name == winner.name]
    reloaded = RankerArtifact.load(winner.artifact.save(tiny / "saved"))
    assert json.dumps(reloaded.seed_metrics) == json.dumps(own)
    assert len(own) == 2
    # With a tiny learning rate every epoch is better than the one before.
    assert {run.trained.best_epoch for run in suite.runs} == {2}
    click, long = suite.gains
    assert click.verdict == long.verdict == "undecided"
    assert "the best epoch of mmoe is its last (2); raise training.epochs" in str(click)
    assert "mmoe on long, 7 negatives of 7 users; it takes 10 of 10 (AUC -0." in str(long)


def test_with_one_seed_the_winner_is_trained_with_another_for_the_spread(tiny):
    write_project(tiny, training={"spread_seeds": 1, "learning_rate": 0.02})
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    winner = suite.winner
    dataset = load_dataset(context, LAST)
    other = train_model(context.project, dataset, Contender(winner.name, winner.spec, 1))
    assert list(winner.artifact.seed_metrics) == [winner.metrics, other.metrics]
    assert winner.metrics != other.metrics
    assert {run.seed for run in suite.runs} == {0}


@pytest.mark.parametrize(("value", "message"), [(0, "never occurs"), (1, "always occurs")])
def test_objective_without_both_labels_is_an_error(tiny, value, message):
    for n in range(6):
        day = FIRST + timedelta(days=n)
        write_day(tiny, day, tiny_events(day).with_columns(click=pl.lit(value, pl.Int64)))
    context = prepared(tiny)
    with pytest.raises(ProjectError, match=rf"objectives\[0\] \(click\), train days.*{message}"):
        train_suite(context, LAST)


def test_objective_without_any_label_is_an_error(tiny):
    write_project(tiny, objectives=changed(TINY["objectives"], 1, where="click = 9"))
    context = prepared(tiny)
    with pytest.raises(ProjectError, match=r"objectives\[1\] \(long\).*no row has this label"):
        train_suite(context, LAST)


KINDS = [
    *TINY["objectives"],
    {
        "name": "finish",
        "group": "satisfaction",
        "label": "case when click = 1 and play > 10 then 1 else 0 end",
        "conditional_on": "click",
    },
    {"name": "seconds", "group": "engagement", "kind": "watch_time", "label": "play"},
    {
        "name": "stars",
        "group": "satisfaction",
        "kind": "ordinal",
        "levels": 3,
        "label": "case when play > 15 then 2 when play > 7 then 1 else 0 end",
        "where": "click = 1",
    },
]


def test_every_kind_of_objective_in_one_training(tiny):
    training = {"sample_weight": "1.0 + click", "negative_keep": 0.5}
    write_project(tiny, objectives=KINDS, training=training)
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    names = [task.name for task in suite.tasks]
    predicted = dict(zip(names, suite.winner.test_prediction.T, strict=True))
    assert (predicted["finish"] <= predicted["click"]).all()
    assert (predicted["seconds"] > 0).all()
    assert ((predicted["stars"] > 0) & (predicted["stars"] < 2)).all()
    metrics = suite.winner.metrics
    assert set(metrics["finish"]) >= {"auc", "gauc", "ece"}
    assert set(metrics["seconds"]) == set(metrics["stars"]) == {"r2", "rmse", "calibration"}
    artifact = suite.winner.artifact
    reloaded = RankerArtifact.load(artifact.save(tiny / "saved"))
    frame = suite.held_out.frame
    assert artifact.predict(frame).equals(reloaded.predict(frame))
    assert {row["objective"] for row in comparison_rows(suite)} == set(names)


def test_chained_objective_with_a_positive_but_no_parent_is_an_error(tiny):
    label = "case when play > 10 then 1 else 0 end"
    write_project(tiny, objectives=changed(KINDS, 2, label=label))
    context = prepared(tiny)
    with pytest.raises(
        ProjectError, match=r"objectives\[2\] \(finish\).*conditional_on = 'click'.*allowed"
    ):
        train_suite(context, LAST)


def test_trees_are_kept_if_they_improve_validation_quality(tiny):
    write_project(tiny, training={"trees": 12, "refit": True})
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    runs = {run.name: run for run in suite.runs}
    with_trees = next(run for name, run in runs.items() if name.endswith(", trees"))
    alone = runs["trees alone"]
    network = runs[with_trees.name.removesuffix(", trees")]
    assert with_trees.artifact.trees is not None
    assert max(with_trees.artifact.trees.trees) <= 12
    rows = load_dataset(context, LAST).validation
    reference = predicted_rows(rows, runs["linear"].validate_prediction)
    criterion = Criterion.fit(suite.tasks, reference)
    best = max(
        (network, with_trees, alone), key=lambda run: criterion.order([run.validate_prediction])
    )
    assert suite.winner.name == f"{best.name}, refit"
    assert (suite.winner.artifact.trees is not None) == (best is not network)
    assert {gain.model for gain in suite.gains} <= set(context.project.models)
    assert with_trees.name in {model for model, _ in suite.intervals}

    # Expected: the average of the log-odds of the network and of the trees.
    frame = suite.held_out.frame
    labels = [f"label_{task.name}" for task in suite.tasks]
    encoded = encode_examples(with_trees.artifact.encoder, frame, labels)
    probability = predict_logits(network.trained.model, encoded).sigmoid().mean(0).double()
    numbers = torch.cat([encoded.numeric, encoded.categorical.float()], 1)
    forest = with_trees.artifact.trees(numbers).double()
    binary = [t for t, task in enumerate(suite.tasks) if task.kind == "binary"]
    z = (probability.logit() + forest) / 2
    predicted = with_trees.artifact.uncalibrated(frame).to_numpy()
    np.testing.assert_allclose(predicted[:, binary], z.sigmoid().numpy()[:, binary], atol=1e-6)
    predicted = alone.artifact.uncalibrated(frame).to_numpy()
    np.testing.assert_allclose(predicted[:, binary], forest.sigmoid()[:, binary], atol=1e-6)

    for run in (with_trees, alone):
        reloaded = RankerArtifact.load(run.artifact.save(tiny / run.name))
        assert reloaded.predict(frame).equals(run.artifact.predict(frame))


def test_numbers_have_no_trees_and_the_notes_say_so(tiny):
    objectives = [
        TINY["objectives"][0],
        {"name": "play", "group": "satisfaction", "kind": "regression", "label": "play"},
    ]
    write_project(tiny, objectives=objectives, training={"trees": 5})
    suite = train_suite(prepared(tiny), LAST)
    runs = {run.name: run for run in suite.runs}
    with_trees = next(run for name, run in runs.items() if name.endswith(", trees"))
    network = runs[with_trees.name.removesuffix(", trees")]
    for run in (with_trees, runs["trees alone"]):
        np.testing.assert_array_equal(run.test_prediction[:, 1], network.test_prediction[:, 1])
        assert not np.array_equal(run.test_prediction[:, 0], network.test_prediction[:, 0])
    [note] = [note for note in suite.notes if "boosted trees are of binary objectives" in note]
    assert note.endswith("play is the network's")


def refit_and_before(suite):
    """The refit run, which is the last, after the one that it was made from."""
    *runs, again = suite.runs
    return next(run for run in runs if again.name == f"{run.name}, refit"), again


def test_a_refit_that_does_harm_on_the_test_days_does_not_replace_the_model(tiny):
    """The labels of the validation day are the wrong way round, and it has the most rows."""
    for n in range(6):
        day = FIRST + timedelta(days=n)
        home = pl.col("tab") == "home"
        right = home if n != 4 else ~home
        noise = pl.int_range(pl.len()) % 10 == 0
        events = tiny_events(day, 1_200 if n == 4 else 200, n)
        write_day(tiny, day, events.with_columns(click=(right ^ noise).cast(pl.Int64)))
    # Rates of a user or item by tab would have learned the wrong way round as well.
    features = {"entities": [["user_id"]]}
    training = {"refit": True, "batch_size": 64, "learning_rate": 0.02}
    write_project(tiny, features=features, training=training)
    suite = train_suite(prepared(tiny), LAST)
    first, again = refit_and_before(suite)
    assert first.metrics["click"]["auc"] > 0.7 > 0.5 > again.metrics["click"]["auc"]
    assert suite.winner is first
    (note,) = [note for note in suite.notes if "does not replace" in note]
    assert note.startswith(f"{first.name}, refit seed 0 does not replace {first.name} seed 0")
    assert "click: list GAUC -0." in note


def test_a_refit_is_judged_on_the_objectives_with_labels_on_the_test_days(tiny):
    write_day(tiny, LAST, tiny_events(LAST).with_columns(play=pl.lit(0.0)))
    write_project(tiny, training={"refit": True})
    suite = train_suite(prepared(tiny), LAST)
    assert any("all" in problem and "labels are 0" in problem for problem in suite.unlabelled)
    assert suite.runs[-1].name.endswith(", refit")


def test_what_a_refit_makes_worse_is_named(tiny):
    write_project(tiny, training={"refit": True})
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    labels = suite.held_out.labels
    good = np.where(np.isnan(labels), 0.5, 0.45 + 0.1 * labels).astype(np.float32)

    def harm(before, after):
        runs = (replace(suite.runs[0], test_prediction=p) for p in (before, after))
        return harm_of_refit(context.project, suite.tasks, suite.held_out, *runs)

    assert harm(good, good) == []
    assert harm(1 - good, good) == []
    assert "click: list GAUC -1.0000" in harm(good, 1 - good)[0]
    low = good / 20
    loss, *ratio = harm(good, low)
    assert loss.startswith("click: log loss +")
    assert ratio
    assert all("promotion.max_calibration_ratio" in x for x in ratio)
    assert harm(low, low) == []


def test_a_refit_must_show_that_it_does_no_harm(tiny):
    """Noise that is not significantly worse on forty rows could be: the bound says how much."""
    write_project(tiny, training={"refit": True})
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    held_out, run = suite.held_out, suite.runs[0]
    rng = np.random.default_rng(0)
    known = np.nan_to_num(held_out.labels, nan=0.5)
    one, other = (
        (0.4 + 0.1 * known + 0.2 * rng.random(known.shape)).astype(np.float32) for _ in range(2)
    )

    def harm(margin, rows=held_out):
        rule = context.project.promotion.model_copy(update={"refit_margin": margin})
        settings = context.project.model_copy(update={"promotion": rule})
        runs = (replace(run, test_prediction=p) for p in (one, other))
        return harm_of_refit(settings, suite.tasks, rows, *runs)

    (message,) = harm(0.001)
    found = re.search(r"a loss of (\d\.\d+) cannot be excluded \(one-sided 95 % bound", message)
    bound = float(found[1])
    assert bound > 0.001
    assert harm(bound + 0.001) == []
    assert len(harm(bound - 0.001)) == 1
    # By hand: of click alone, as `long` has labels of too few users.
    clusters = Clusters.of(held_out.user, held_out.lists)
    rows = LabelledRows.of("binary", held_out.labels[:, 0], clusters)
    after, before = (model_quality(rows, [p[:, 0]], fixed=True) for p in (other, one))
    difference = compare(after, before)
    quantile = stats.t.ppf(0.95, rows.support_of(after.measure).users - 1)
    assert bound == pytest.approx(quantile * difference.standard_error - difference.value, abs=1e-4)
    unlabelled = replace(held_out, labels=np.full_like(held_out.labels, np.nan))
    (nothing,) = harm(10.0, unlabelled)
    assert nothing.startswith("no objective has enough labels to judge it (click (0 positives")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_refit_model_has_the_configured_share_of_the_winners_maps(tiny, share):
    calibration = {"refit_share": share, "refit_days": 0, "min_positives": 5}
    write_project(tiny, training={"refit": True}, calibration=calibration)
    first, again = refit_and_before(train_suite(prepared(tiny), LAST))
    maps = first.artifact.calibration.everywhere["click"], again.artifact.calibration.everywhere
    assert maps[0].x == maps[1]["click"].x == [0.0, 1.0]
    moved = [x + share * (y - x) for x, y in zip(maps[0].x, maps[0].y, strict=True)]
    assert maps[1]["click"].y == pytest.approx(moved)


def test_a_cross_fitted_calibration_is_of_models_that_did_not_see_the_day(tiny):
    calibration = {"refit_days": 2, "min_positives": 5}
    write_project(tiny, training={"refit": True}, calibration=calibration)
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    first, again = refit_and_before(suite)
    # By hand: the winner predicts the validation day, a training without it the day before.
    days = [*suite.days.train, *suite.days.validate]
    labels = [f"label_{task.name}" for task in suite.tasks]
    rows = context.workspace.scan("examples", days).collect()
    others, last = rows.filter(pl.col("date") != days[-2]), rows.filter(pl.col("date") == days[-2])
    encoder = Encoder.fit(context.project.features, numeric_features(context.project), others)
    model = train_ranker(
        Design(first.spec, encoder, suite.tasks),
        Rows(encode_examples(encoder, others, labels)),
        context.project.training,
        0,
        Execution(until=first.trained.best_epochs),
    ).model
    by_hand = RankerArtifact(context.project, encoder, suite.tasks, model)
    validate = rows.filter(pl.col("date") == days[-1])
    predicted = [by_hand.uncalibrated(last), first.artifact.uncalibrated(validate)]
    expected = fit_calibration(
        suite.tasks,
        pl.concat([last, validate]).select(labels).cast(pl.Float64).fill_null(np.nan).to_numpy(),
        pl.concat(predicted).to_numpy(),
        context.project.calibration,
    )
    found = again.artifact.calibration.everywhere
    assert set(found) == set(expected.everywhere) >= {"click"}
    for name, fitted in found.items():
        assert fitted.y == pytest.approx(expected.everywhere[name].y, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_a_stationary_feed_has_no_features_that_changed(tmp_path):
    """Tastes do not move; new items and users come every day, as in every feed."""
    feed = simulate(Feed(impressions=12_000, days=9, users=300, items=120), tmp_path)
    models = {"mmoe": {"preset": "mmoe", "experts": 2, "expert_hidden": [8]}}
    write_project(feed, SMALL, models=models, training={"epochs": 1, "refit": False, "trees": 0})
    context = open_context(str(feed / "project.toml"), feed, feed / "ws")
    last = context.last_day()
    build_split(context, last)
    drift = train_suite(without_log(context.project, context.workspace), last).drift
    held_out = [day for day in drift.days if day.part != "train"]
    assert len(held_out) == 2
    assert all("score click" in day.psi and len(day.psi) > 3 for day in held_out)
    assert [w for w in drift.warnings if "the distribution of" in w] == []
