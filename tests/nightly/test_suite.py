"""Training: seeds, early stopping, splits, and objectives that cannot be learned."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import polars as pl
import pytest
import torch

from mtl_ranker.config import load_project
from mtl_ranker.context import Context, without_log
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.days import split_days
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_source
from mtl_ranker.models.objectives import losses
from mtl_ranker.nightly.contenders import Callbacks
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.reports.tables import comparison_rows
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import Design, Execution, Rows, train_ranker
from mtl_ranker.training.network import predict_logits
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import TINY, WITHOUT, changed, edit_project, write_project

LAST = FIRST + timedelta(days=5)


def prepared(root):
    project = load_project(str(root / "project.toml"))
    source, workspace = open_source(project, root), Workspace(root / "ws")
    days = source.days()
    for day in days:
        ingest_day(Context(project, source, workspace), day)
        aggregate_day(Context(project, source, workspace), day)
    split = split_days(project, days, LAST)
    for day in [*split.train, *split.validate, *split.test]:
        build_examples(Context(project, source, workspace), day)
    return project, workspace


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
    project, workspace = prepared(tiny)
    one = train_suite(without_log(project, workspace), LAST).winner.trained.model.state_dict()
    two = train_suite(without_log(project, workspace), LAST).winner.trained.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    write_project(tiny, training={"seeds": [5]})
    other = train_suite(without_log(load_project(str(tiny / "project.toml")), workspace), LAST)
    weights = other.winner.trained.model.state_dict()
    first = "layers.0.banks.0.weights.0"
    assert not torch.equal(one[first], weights[first])


def test_best_epoch_is_restored(tiny):
    write_project(tiny, training={"epochs": 30, "patience": 3, "learning_rate": 0.1})
    project, workspace = prepared(tiny)
    trained = train_suite(without_log(project, workspace), LAST).winner.trained
    monitored = [epoch.monitored for epoch in trained.epochs]
    assert trained.best_epoch == 1 + monitored.index(min(monitored))
    assert len(trained.epochs) < 30


def test_single_task_restores_each_objectives_own_best_epoch(tiny):
    write_project(
        tiny,
        models={"mmoe": {"preset": "single_task", "experts": WITHOUT}},
        training={"epochs": 12, "patience": 12, "learning_rate": 0.05},
    )
    project, workspace = prepared(tiny)
    suite = train_suite(without_log(project, workspace), LAST)
    trained = suite.winner.trained
    each = np.array([epoch.validate_loss for epoch in trained.epochs])
    assert trained.best_epochs == (each.argmin(0) + 1).tolist()
    assert len(set(trained.best_epochs)) == 2
    rows = workspace.scan("examples", suite.days.validate).collect()
    labels = [f"label_{task.name}" for task in suite.tasks]
    validate = encode_examples(suite.winner.artifact.encoder, rows, labels)
    logits = predict_logits(trained.model, validate)
    restored = losses(logits, validate.labels, suite.tasks)
    np.testing.assert_allclose(restored, each.min(0), rtol=1e-5)


@pytest.mark.slow
def test_side_by_side_gives_the_same_table_as_one_after_the_other(tiny):
    write_project(tiny, training={"seeds": [0, 1], "threads": 1, "jobs": 1})
    project, workspace = prepared(tiny)
    one = train_suite(without_log(project, workspace), LAST)
    edit_project(tiny, training={"jobs": 2})
    told = []
    project = load_project(str(tiny / "project.toml"))
    two = train_suite(
        without_log(project, workspace), LAST, Callbacks(lambda *epoch: told.append(epoch))
    )
    assert comparison_rows(two) == comparison_rows(one)
    assert two.winner.label == one.winner.label
    assert np.array_equal(two.winner.test_prediction, one.winner.test_prediction)
    assert sorted((n, s, e.number) for n, s, e in told) == [
        ("mmoe", seed, number) for seed in (0, 1) for number in (1, 2)
    ]


@pytest.mark.slow
def test_a_failing_training_fails_the_suite_from_its_process(tiny):
    write_project(tiny, training={"seeds": [0, 1], "jobs": 2, "learning_rate": 1e30})
    project, workspace = prepared(tiny)
    with pytest.raises(FloatingPointError, match="loss is not finite in epoch"):
        train_suite(without_log(project, workspace), LAST)


def test_the_winner_is_trained_again_on_validation_days_as_long_as_it_was_best(tiny):
    settings = {"epochs": 9, "patience": 2, "learning_rate": 0.03, "refit": True}
    write_project(tiny, training=settings)
    project, workspace = prepared(tiny)
    suite = train_suite(without_log(project, workspace), LAST)
    first, again = suite.runs
    assert again is suite.winner
    assert (again.name, again.seed) == ("mmoe, refit", first.seed)
    assert again.trained.best_epochs == first.trained.best_epochs
    assert len(again.trained.epochs) == first.trained.best_epoch
    assert again.validate_quality == first.validate_quality
    # By hand: the same training on the rows of both parts, stopped after as many epochs.
    days = [*suite.days.train, *suite.days.validate]
    rows = workspace.scan("examples", days).collect()
    labels = [f"label_{task.name}" for task in suite.tasks]
    encoder = again.artifact.encoder
    both = encode_examples(encoder, rows, labels)
    same = train_ranker(
        Design(again.spec, encoder, suite.tasks),
        Rows(both),
        project.training,
        0,
        Execution(until=first.trained.best_epochs),
    ).model.state_dict()
    mine = again.trained.model.state_dict()
    assert all(torch.equal(mine[name], same[name]) for name in mine)


@pytest.mark.parametrize(("value", "words"), [(0, "never occurs"), (1, "always occurs")])
def test_objective_without_both_labels_is_named(tiny, value, words):
    for n in range(6):
        day = FIRST + timedelta(days=n)
        write_day(tiny, day, tiny_events(day).with_columns(click=pl.lit(value, pl.Int64)))
    project, workspace = prepared(tiny)
    with pytest.raises(ProjectError, match=rf"objectives\[0\] \(click\), train days.*{words}"):
        train_suite(without_log(project, workspace), LAST)


def test_objective_whose_label_is_nowhere_is_named(tiny):
    write_project(tiny, objectives=changed(TINY["objectives"], 1, where="click = 9"))
    project, workspace = prepared(tiny)
    with pytest.raises(ProjectError, match=r"objectives\[1\] \(long\).*no row has this label"):
        train_suite(without_log(project, workspace), LAST)


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
    project, workspace = prepared(tiny)
    suite = train_suite(without_log(project, workspace), LAST)
    names = [task.name for task in suite.tasks]
    predicted = dict(zip(names, suite.winner.test_prediction.T, strict=True))
    assert (predicted["finish"] <= predicted["click"]).all()
    assert (predicted["seconds"] > 0).all()
    assert ((predicted["stars"] > 0) & (predicted["stars"] < 2)).all()
    metrics = suite.winner.metrics
    assert set(metrics["finish"]) >= {"auc", "gauc", "ece"}
    assert set(metrics["seconds"]) == set(metrics["stars"]) == {"r2", "rmse", "calibration"}
    again = suite.winner.artifact
    reloaded = type(again).load(again.save(tiny / "saved"))
    frame = suite.held_out.frame
    assert again.predict(frame).equals(reloaded.predict(frame))
    assert {row["objective"] for row in comparison_rows(suite)} == set(names)


def test_chained_objective_without_its_parent_is_named(tiny):
    alone = "case when play > 10 then 1 else 0 end"
    write_project(tiny, objectives=changed(KINDS, 2, label=alone))
    project, workspace = prepared(tiny)
    with pytest.raises(
        ProjectError, match=r"objectives\[2\] \(finish\).*conditional_on = 'click'.*allowed"
    ):
        train_suite(without_log(project, workspace), LAST)


def test_trees_join_the_winner_and_are_kept_where_validation_gains(tiny):
    write_project(tiny, training={"trees": 12, "refit": True})
    project, workspace = prepared(tiny)
    suite = train_suite(without_log(project, workspace), LAST)
    runs = {run.name: run for run in suite.runs}
    joined = next(run for name, run in runs.items() if name.endswith(", trees"))
    alone = runs[joined.name.removesuffix(", trees")]
    assert joined.artifact.trees is not None
    assert max(joined.artifact.trees.trees) <= 12
    kept = joined.validate_quality > alone.validate_quality
    assert suite.winner.name == f"{(joined if kept else alone).name}, refit"
    assert (suite.winner.artifact.trees is not None) == kept
    assert {gain.model for gain in suite.gains} <= set(project.models)
    assert joined.name in {model for model, _ in suite.intervals}

    # The average of log-odds, worked out here from the network and from the trees by themselves.
    frame = suite.held_out.frame
    labels = [f"label_{task.name}" for task in suite.tasks]
    encoded = encode_examples(joined.artifact.encoder, frame, labels)
    network = predict_logits(alone.trained.model, encoded).sigmoid().mean(0).double()
    numbers = torch.cat([encoded.numeric, encoded.categorical.float()], 1)
    forest = joined.artifact.trees(numbers).double()
    binary = [t for t, task in enumerate(suite.tasks) if task.kind == "binary"]
    z = (network.logit() + forest) / 2
    found = joined.artifact.uncalibrated(frame).to_numpy()
    np.testing.assert_allclose(found[:, binary], z.sigmoid().numpy()[:, binary], atol=1e-6)

    again = RankerArtifact.load(joined.artifact.save(tiny / "saved"))
    assert again.predict(frame).equals(joined.artifact.predict(frame))
