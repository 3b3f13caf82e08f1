"""Soft labels: Chapelle's probability, read by trainings only, of days whose actions may come."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_ranker.context import Context
from mtl_ranker.features.arrivals import Arrival
from mtl_ranker.features.columns import LABEL, OPEN
from mtl_ranker.logs.simulate import LIKE_DELAY, Feed, simulate
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.contenders import Contender, refit, train_model, with_trees
from mtl_ranker.nightly.plan import TrainingPlan, with_prior
from mtl_ranker.training.dataset import load_dataset, with_rows, without_rows
from mtl_ranker.training.distributed import SINGLE_PROCESS
from mtl_ranker.training.soft_labels import Prior, SoftLabels, positive_probability
from mtl_ranker.training.specs import model_specs
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST
from tests.projects import SMALL, write_project

NIGHT = date(2026, 3, 10)
ARRIVAL = Arrival("like", [NIGHT], positives=20, rows=100, shares=[0.25, 0.5, 1.0])
CLICK: dict[str, Any] = {
    "name": "click",
    "path": "clicks",
    "timestamp": "at_ms",
    "impression": "impression_id",
    "window": "10m",
}
LIKE = CLICK | {"name": "like", "path": "likes", "window": "3d"}
FEED = Feed(20_000, 7, FIRST, users=300, items=200, streams=True)
LAST = FIRST + timedelta(days=FEED.days - 1)


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_mean_label_is_the_probability_whatever_has_arrived(p, known):
    """Of p positives the share F is seen as 1; all others are seen as 0 and have the label w."""
    w = float(positive_probability(p, np.array([known]))[0])
    assert 0 <= w <= 1
    assert p * known + (1 - p * known) * w == pytest.approx(p, abs=2e-6)


def rows(days: list[int], label: list[float | None], seen: list[float | None]) -> pl.DataFrame:
    """Examples so many days before the night."""
    return pl.DataFrame(
        {
            "date": [NIGHT - timedelta(days=n) for n in days],
            LABEL + "like": pl.Series(label, dtype=pl.Float32),
            OPEN + "like": pl.Series(seen, dtype=pl.Float32),
            "p": [0.5] * len(days),
        }
    )


def labels_of(soft: SoftLabels, frame: pl.DataFrame) -> list[float | None]:
    return soft.of(frame)[LABEL + "like"].to_list()


def test_each_age_has_its_own_label_and_final_labels_stay():
    frame = rows([0, 1, 2, 9, 0, 5, 5], [None] * 5 + [0.0, 1.0], [0, 0, 0, 0, 1, None, None])
    soft = SoftLabels(NIGHT, ["like"], {"like": ARRIVAL})
    # p = 0.2; 0.2 · 0.75 / (1 − 0.05) = 0.15 / 0.95, 0.2 · 0.5 / (1 − 0.1) = 0.1 / 0.9
    expected = [0.15 / 0.95, 0.1 / 0.9, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert labels_of(soft, frame) == pytest.approx(expected, rel=1e-6)


def test_a_model_gives_p_of_the_objectives_that_it_knows():
    frame = rows([0, 1, 0], [None] * 3, [0, 0, 1])
    prior = Prior(lambda given: given.select(pl.col("p").alias("like")), ["like"], "of a model")
    soft = SoftLabels(NIGHT, ["like"], {"like": ARRIVAL}, prior)
    # p = 0.5; 0.5 · 0.75 / (1 − 0.125), 0.5 · 0.5 / (1 − 0.25)
    assert labels_of(soft, frame) == pytest.approx([0.375 / 0.875, 0.25 / 0.75, 1.0])
    other = replace(soft, prior=replace(prior, objectives=["click"]))
    assert labels_of(other, frame) == pytest.approx([0.15 / 0.95, 0.1 / 0.9, 1.0])
    assert len({each.digest for each in (soft, replace(soft, prior=None))}) == 2


def test_without_a_closed_day_a_negative_is_missing():
    frame = rows([0, 0], [None] * 2, [0, 1])
    assert labels_of(SoftLabels(NIGHT, ["like"], {}), frame) == [None, 1.0]


def test_files_are_those_of_open_days_with_other_labels(tmp_path):
    paths = []
    for n, seen in ((5, None), (1, 0.0)):
        paths.append(tmp_path / f"examples/date={NIGHT - timedelta(days=n)}/part-0.parquet")
        paths[-1].parent.mkdir(parents=True)
        rows([n], [None if seen == 0.0 else 0.0], [seen]).write_parquet(paths[-1])
    soft = SoftLabels(NIGHT, ["like"], {"like": ARRIVAL})
    workspace = Workspace(tmp_path / "ws")
    closed, opened = soft.files(workspace, tmp_path / "scratch", paths, SINGLE_PROCESS)
    assert closed == paths[0]
    assert pl.read_parquet(opened)[LABEL + "like"].to_list() == pytest.approx([0.1 / 0.9])


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> Context:
    """A feed with delayed likes, built for its last day with soft labels."""
    root = tmp_path_factory.mktemp("streams")
    simulate(FEED, root)
    log = {"path": "impressions", "impression": "impression_id", "actions": [CLICK, LIKE]}
    objectives = [SMALL["objectives"][0], SMALL["objectives"][1] | {"conditional_on": "click"}]
    training = {"immature": "soft", "refit": True, "trees": 3}
    write_project(root, SMALL, log=log, objectives=objectives, training=training)
    context = open_context(str(root / "project.toml"), root, root / "ws")
    build_split(context, LAST)
    return context


def opened(context: Context, root: Path) -> Context:
    return open_context(str(root / "project.toml"), context.source.root, context.workspace.root)


def test_trainings_read_estimates_and_judges_final_labels(streams):
    dataset = load_dataset(streams, LAST)
    assert dataset.days.test == [LAST]
    assert np.isnan(dataset.held_out.labels[:, 1]).all()  # a window of three days is open
    click = dataset.held_out.labels[:, 0]
    assert 0 < np.isnan(click).mean() < 0.15  # those of the last ten minutes
    assert [text for text in dataset.unlabelled if "(like)" in text]
    assert dataset.examples["validate"].labels[:, 1].isnan().all()
    read = dataset.examples["train"].labels[:, 1]
    assert ((read > 0) & (read < 1)).any()
    split = pl.concat(dataset.frames.values(), how="vertical_relaxed")
    estimated = dataset.trained_on(split)[LABEL + "like"].sum()
    truth = pl.concat(
        pl.read_parquet(streams.source.root / f"truth/date={day}/*.parquet")
        for day in dataset.days.all
    )
    seen = split.select(pl.coalesce(OPEN + "like", LABEL + "like").sum()).item()
    true = truth["like"].sum()
    spread = np.sqrt(true)
    assert seen < true - 3 * spread  # likes that have yet to come
    assert abs(estimated - true) < 3 * spread


def test_the_curve_is_that_of_the_delays(streams):
    soft = load_dataset(streams, LAST).soft
    assert soft is not None
    shares, hour = soft.curves["like"].shares, 19
    # Impressions are around 19 h, so that a day's end is 5 hours later.
    for age in (1, 2):
        assert shares[age] == pytest.approx(LIKE_DELAY.share(24 * age + 24 - hour), abs=0.06)
    assert shares[-1] == 1.0


def test_rows_from_files_have_the_same_labels(streams, tmp_path):
    whole = load_dataset(streams, LAST)
    settings = streams.project.training.model_copy(update={"in_memory_rows": 1_000})
    project = streams.project.model_copy(update={"training": settings})
    streamed = load_dataset(replace(streams, project=project), LAST)
    assert streamed.shards is not None
    elsewhere = replace(without_rows(streamed), files={}, shards=None)
    for each in (streamed, with_rows(elsewhere, tmp_path)):
        found = each.train.sample(10**9, inputs=False).labels[:, 1]
        assert found.nansum().item() == pytest.approx(
            whole.examples["train"].labels[:, 1].nansum().item(), rel=1e-5
        )


@pytest.mark.slow
def test_a_model_its_trees_and_its_start_learn_from_soft_labels(streams):
    """A champion that predicts more likes gives more of them, and another checkpoint."""
    project = streams.project
    dataset = load_dataset(streams, LAST)
    run = train_model(project, dataset, Contender("mmoe", model_specs(project)["mmoe"], 0))
    assert with_trees(project, dataset, run).artifact.trees is not None
    plan = with_prior(TrainingPlan(), streams, "7", run.artifact)
    assert plan.notes == ["soft labels by version 7"]
    again = load_dataset(streams, LAST, prior=plan.prior)
    assert again.digest != dataset.digest
    one, two = (each.examples["train"].labels[:, 1] for each in (dataset, again))
    assert one.nansum().item() == pytest.approx(two.nansum().item(), rel=0.2)
    assert not one.equal(two)
    trained_again = [refit(project, each, run).artifact.model for each in (dataset, again)]
    parameters = [m.towers.weights[0].detach() for m in trained_again]
    assert not torch.equal(*parameters)  # the only difference is in soft labels
    features = project.features.model_copy(update={"windows": [2]})
    other = replace(run.artifact, project=project.model_copy(update={"features": features}))
    plan = with_prior(TrainingPlan(), streams, "8", other)
    assert plan.prior is None
    assert plan.notes == [
        "soft labels by the base rate of closed days: version 8 has other features"
    ]
