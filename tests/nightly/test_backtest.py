"""A backtest trains as `nightly` would on each night, and evaluates each day after its night."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from mtl_ranker.context import Context, without_log
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import ONE_SEED, Part, compare, model_quality
from mtl_ranker.evaluation.metrics import evaluate_all
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.days import split_days
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.lists import list_ids
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.backtest import (
    POLICIES,
    NightModel,
    Ranked,
    backtest,
    gains_over_kept,
)
from mtl_ranker.nightly.popularity import fit_base_rate
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, tiny_events, write_day, write_log
from tests.features.test_actions import LAST, one_each_day, write_world
from tests.projects import project, write_project


@pytest.fixture
def context(tiny) -> Context:
    """The tiny project with a log of nine days."""
    write_log(tiny, days=9)
    return open_context(str(tiny / "project.toml"), tiny, tiny / "ws")


@pytest.mark.slow
def test_kept_uses_the_first_nights_model_and_retrained_the_last_nights(context):
    first, last = FIRST + timedelta(days=6), FIRST + timedelta(days=8)
    result = backtest(context, first, last)
    assert result.days == [first, first + timedelta(days=1), last]
    nights = {(r.day, r.policy): r.night for r in result.replayed}
    for day in result.days:
        assert nights[day, "kept"] == first - timedelta(days=1)
        assert nights[day, "retrained"] == day - timedelta(days=1)
        assert nights[day, "champion"] < day
    first_day = [r.metrics for r in result.replayed if r.day == first]
    assert first_day[0] == first_day[1]
    assert len(result.replayed) == len(POLICIES) * 3
    assert set(result.gains) == {(p, o) for p in POLICIES[1:] for o in ("click", "long")}


def test_a_day_is_ranked_as_by_a_single_night(context, tmp_path):
    """The retrained policy's metrics are those of a training that ends on the night before."""
    day = FIRST + timedelta(days=7)
    result = backtest(context, day, day)
    by_hand = replace(context, workspace=Workspace(tmp_path / "by_hand"))
    night = day - timedelta(days=1)
    days = context.source.days()
    for each in days[:8]:
        ingest_day(by_hand, each)
        aggregate_day(by_hand, each)
    split = split_days(context.project, days[:7], night)
    for each in [*split.train, *split.validate, *split.test, day]:
        build_examples(by_hand, each)
    winner = train_suite(without_log(context.project, by_hand.workspace), night).winner
    frame = by_hand.workspace.scan("examples", [day]).collect()
    names = [task.name for task in winner.artifact.tasks]
    labels = frame.select([f"label_{n}" for n in names]).cast(float).fill_null(float("nan"))
    expected = evaluate_all(
        list(winner.artifact.tasks),
        labels.to_numpy(),
        winner.artifact.predict(frame).select(names).to_numpy(),
        list_ids(frame, context.project.log.list_keys),
    )
    retrained = next(r for r in result.replayed if r.policy == "retrained")
    for name in names:
        assert retrained.metrics[name] == pytest.approx(expected[name], nan_ok=True)


def test_a_span_without_a_night_before_it_is_an_error(context):
    with pytest.raises(ProjectError, match=r"--from 2026-03-02: the night before needs 2026-03-01"):
        backtest(context, FIRST, FIRST + timedelta(days=2))
    with pytest.raises(ProjectError, match=r"split\.(train|validate)_days.*empty"):
        backtest(context, FIRST + timedelta(days=2), FIRST + timedelta(days=3))
    late = FIRST + timedelta(days=50)
    with pytest.raises(ProjectError, match="no day of the log; days found: 2026-03-02 to"):
        backtest(context, late, late)


def test_the_first_champion_is_item_popularity_where_no_model_is_better(tiny):
    """Clicks depend on the item alone; one epoch does not learn that."""
    write_project(tiny, training={"epochs": 1})
    for n in range(7):
        day = FIRST + timedelta(days=n)
        clicks = (pl.col("i") < 6).cast(pl.Int64)
        write_day(tiny, day, tiny_events(day, rows=120, shift=n).with_columns(click=clicks))
    context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
    day = FIRST + timedelta(days=6)
    result = backtest(context, day, day)
    assert result.promotions[day].startswith("not promoted: it is not better than item popularity")
    used = {r.policy: r.model for r in result.replayed}
    assert used["kept"] == used["champion"] == "item_popularity"
    assert used["retrained"] != "item_popularity"


def test_an_objective_without_labels_has_no_gain_and_no_curve(tiny):
    """`long` has labels of the first night's days only."""
    write_log(tiny, days=8)
    for n in (6, 7):
        day = FIRST + timedelta(days=n)
        write_day(tiny, day, tiny_events(day, shift=n).with_columns(click=pl.lit(0)))
    context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
    result = backtest(context, FIRST + timedelta(days=6), FIRST + timedelta(days=7))
    for policy in POLICIES[1:]:
        gain = result.gains[policy, "long"]
        assert math.isnan(gain.interval.value)
        assert gain.verdict == 0
        assert "0 labels" in gain.note or "positives" in gain.note
    assert all(math.isnan(value) for value in result.curve("kept", "long", "auc"))


class Replay:
    """Two days of 300 and 100 rows; `good` orders each user's list, `bad` at random."""

    def __init__(self):
        one = {"name": "click", "group": "engagement", "label": "click"}
        self.project = project(objectives=[one])
        rng = np.random.default_rng(0)
        self.user = np.r_[np.arange(300) // 6, np.arange(100) // 2]
        lists = np.r_[self.user[:300], 1_000 + self.user[300:]]
        self.clusters = Clusters.of(self.user, lists)
        label = (np.arange(400) % 2 == 0).astype(float)
        self.labels = [label[:300, None], label[300:, None]]
        good, bad = label + rng.normal(size=400), rng.random(400)
        self.good, self.bad = ([p[:300, None], p[300:, None]] for p in (good, bad))
        rows = pl.DataFrame({"item_id": [1, 2], "label_click": [0, 1]})
        self.artifact = fit_base_rate(self.project, rows.lazy(), None)

    def model(self, night, seeds, fixed=False):
        metrics = [{"click": {"gauc": value}} for value in seeds]
        artifact = replace(self.artifact, fixed=fixed, seed_metrics=metrics)
        return NightModel(FIRST + timedelta(days=night), "mmoe seed 0", artifact)

    def gains(self, kept, champion, retrained):
        """Of models on the two days; `kept` and `champion` predict `bad`, `retrained` `good`."""
        ranked = {
            policy: [Ranked(m, p) for m, p in zip(models, predictions, strict=True)]
            for policy, models, predictions in (
                ("kept", kept, self.bad),
                ("champion", champion, self.bad),
                ("retrained", retrained, self.good),
            )
        }
        return gains_over_kept(self.project, self.labels, self.clusters, ranked)

    def by_hand(self, trainings):
        rows = LabelledRows.of("binary", np.concatenate(self.labels)[:, 0], self.clusters)
        assert rows.measure == "gauc"
        both = (
            model_quality(rows, [np.concatenate(p)[:, 0]], fixed=True)
            for p in (self.good, self.bad)
        )
        return replace(compare(*both), trainings=trainings).interval()


def ends(interval):
    return interval.value, interval.low, interval.high


def test_a_gain_counts_each_nights_training_with_its_share_of_rows():
    """The second night's model ranks a quarter of the rows, which the first one's would have.

    The pooled variance of one training is (2 · 0.01² + 2 · 0.03²) / 3 with three degrees.
    """
    replay = Replay()
    one, two = replay.model(0, [0.70, 0.72]), replay.model(1, [0.70, 0.73, 0.76])
    found = replay.gains([one, one], [one, one], [one, two])
    spread = (2 * 0.01**2 + 2 * 0.03**2) / 3
    expected = replay.by_hand(Part(2 * 0.25**2 * spread, 3))
    retrained, champion = found["retrained", "click"], found["champion", "click"]
    assert ends(retrained.interval) == pytest.approx(ends(expected))
    assert (retrained.verdict, retrained.note) == (1, "")
    assert (champion.interval.low, champion.interval.high, champion.verdict) == (0.0, 0.0, 0)


def test_a_gain_over_popularity_has_the_spread_of_one_side():
    replay = Replay()
    fixed = replay.model(0, [], fixed=True)
    two = replay.model(1, [0.70, 0.72])
    found = replay.gains([fixed, fixed], [fixed, fixed], [two, two])
    expected = replay.by_hand(Part(2e-4, 1))
    assert ends(found["retrained", "click"].interval) == pytest.approx(ends(expected))


def test_nights_of_one_seed_have_no_verdict_unless_the_model_is_the_same():
    replay = Replay()
    one, two = replay.model(0, [0.70]), replay.model(1, [])
    found = replay.gains([one, one], [one, one], [one, two])
    assert found["retrained", "click"].note == ONE_SEED
    assert found["retrained", "click"].verdict == 0
    assert found["retrained", "click"].interval.low > 0
    same = replay.gains([one, one], [one, one], [one, one])
    assert (same["retrained", "click"].note, same["retrained", "click"].verdict) == ("", 1)


def test_nights_continue_from_the_champion_of_the_night_before(tiny):
    """Whatever is promoted; the first night is a full training."""
    write_log(tiny, days=9)
    promotion = {"tolerance": 1.0, "max_calibration_ratio": 100.0, "max_calibration_shift": 100.0}
    write_project(
        tiny,
        promotion={**promotion, "require_significance": False},
        training={"start": "champion", "epochs": 1},
    )
    context, said = open_context(str(tiny / "project.toml"), tiny, tiny / "ws"), []
    first = FIRST + timedelta(days=6)
    result = backtest(context, first, first + timedelta(days=1), said.append)
    assert [f"continued from that of {first - timedelta(days=1)}" in line for line in said] == [
        False,
        True,
    ]
    models = [r.model for r in result.replayed if r.policy == "retrained"]
    assert models[0] == models[1]


def test_a_day_whose_labels_are_not_final_is_refused(tmp_path):
    context = write_world(tmp_path, one_each_day([]), [], [])  # windows of 48 hours
    with pytest.raises(ProjectError, match=f"--to {LAST}: its labels are final on .* earlier day"):
        backtest(context, LAST, LAST)
