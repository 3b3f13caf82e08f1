"""A night's training: seeds, early stopping, refit, trees, and objectives without labels."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
import torch

from mtl_ranker.config import load_project
from mtl_ranker.context import Context, without_log
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import numeric_features
from mtl_ranker.features.days import split_days
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.logs.sources import open_context
from mtl_ranker.models.objectives import losses
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.contenders import Callbacks
from mtl_ranker.nightly.refitting import harm_of_refit
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.calibration import fit_calibration
from mtl_ranker.reports.tables import comparison_rows
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import Design, Execution, Rows, train_ranker
from mtl_ranker.training.network import predict_logits
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import TINY, WITHOUT, changed, edit_project, write_project

LAST = FIRST + timedelta(days=5)


def prepared(root) -> Context:
    """The folder's project with every day built; without the log, which training does not read."""
    context = open_context(str(root / "project.toml"), root, root / "ws")
    build_split(context, LAST)
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
    trained = suite.winner.trained
    validate_loss = np.array([epoch.validate_loss for epoch in trained.epochs])
    assert trained.best_epochs == (validate_loss.argmin(0) + 1).tolist()
    assert len(set(trained.best_epochs)) == 2
    rows = context.workspace.scan("examples", suite.days.validate).collect()
    labels = [f"label_{task.name}" for task in suite.tasks]
    validate = encode_examples(suite.winner.artifact.encoder, rows, labels)
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
        ("mmoe", seed, number) for seed in (0, 1) for number in (1, 2)
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
    first, refit = suite.runs
    assert refit is suite.winner
    assert (refit.name, refit.seed) == ("mmoe, refit", first.seed)
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
    network = runs[with_trees.name.removesuffix(", trees")]
    assert with_trees.artifact.trees is not None
    assert max(with_trees.artifact.trees.trees) <= 12
    kept = with_trees.validate_quality > network.validate_quality
    assert suite.winner.name == f"{(with_trees if kept else network).name}, refit"
    assert (suite.winner.artifact.trees is not None) == kept
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

    reloaded = RankerArtifact.load(with_trees.artifact.save(tiny / "saved"))
    assert reloaded.predict(frame).equals(with_trees.artifact.predict(frame))


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
    first, again = suite.runs
    assert first.metrics["click"]["auc"] > 0.7 > 0.5 > again.metrics["click"]["auc"]
    assert suite.winner is first
    (note,) = [note for note in suite.notes if "does not replace" in note]
    assert note.startswith("mmoe, refit seed 0 does not replace mmoe seed 0")
    assert "click: AUC -0." in note


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
    assert "click: AUC -1.0000" in harm(good, 1 - good)[0]
    low = good / 20
    assert harm(good, low)
    assert all("promotion.max_calibration_ratio" in x for x in harm(good, low))
    assert harm(low, low) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_refit_model_has_the_configured_share_of_the_winners_maps(tiny, share):
    calibration = {"refit_share": share, "refit_days": 0, "min_positives": 5}
    write_project(tiny, training={"refit": True}, calibration=calibration)
    first, again = train_suite(prepared(tiny), LAST).runs
    maps = first.artifact.calibration.everywhere["click"], again.artifact.calibration.everywhere
    assert maps[0].x == maps[1]["click"].x == [0.0, 1.0]
    moved = [x + share * (y - x) for x, y in zip(maps[0].x, maps[0].y, strict=True)]
    assert maps[1]["click"].y == pytest.approx(moved)


def test_a_cross_fitted_calibration_is_of_models_that_did_not_see_the_day(tiny):
    calibration = {"refit_days": 2, "min_positives": 5}
    write_project(tiny, training={"refit": True}, calibration=calibration)
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    first, again = suite.runs
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
