"""An explanation's score is the published one."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import polars as pl
import pytest
import torch

from mtl_ranker.errors import ProjectError
from mtl_ranker.models.presets import make
from mtl_ranker.models.trees import Forest
from mtl_ranker.ranking.artifact import RegisteredRanker
from mtl_ranker.ranking.explain import Pair, explain
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.training.batches import encoded_tensors
from mtl_ranker.training.network import build_ranker
from tests.conftest import FIRST
from tests.ranking.test_scoring import random_ranker

TOMORROW = FIRST + timedelta(days=6)


@pytest.fixture
def ranked(tmp_path):
    context, artifact = random_ranker(tmp_path)
    ranker = RegisteredRanker(artifact, "3")
    ranking = pl.read_parquet(score_day(context, ranker, TOMORROW).path)
    return context, ranker, ranking


def test_without_context_it_is_that_of_the_published_ranking(ranked):
    context, ranker, ranking = ranked
    row = ranking.filter(pl.col("tab") == "search").row(5, named=True)
    pair = Pair(str(row["user_id"]), str(row["item_id"]))
    found = explain(context, ranker, pair, TOMORROW)
    assert found.score == pytest.approx(row["score"], rel=1e-5)
    assert (found.context, found.published) == ({"tab": "search"}, True)
    assert (found.rank, found.ranked_by) == (row["rank"], "3")
    other = explain(context, ranker, Pair(pair.user, pair.item, {"tab": "home"}), TOMORROW)
    assert (other.context, other.published) == ({"tab": "home"}, False)
    assert abs(other.score - found.score) > 1e-3


def test_of_a_pair_that_is_not_ranked_the_context_is_missing(ranked):
    context, ranker, ranking = ranked
    user = str(ranking["user_id"][0])
    found = explain(context, ranker, Pair(user, "999"), TOMORROW)
    assert (found.listed, found.unknown_context) == (True, [])
    stranger = explain(context, ranker, Pair("777", "999", {"tab": "hom"}), TOMORROW)
    assert (stranger.listed, stranger.unknown_context) == (False, ["tab"])
    assert (found.context, found.published, found.ranked_by) == ({"tab": None}, False, None)


def test_experts_of_trees_alone_have_no_share_in_the_score(ranked):
    """Unless an objective has no trees: it keeps the network."""
    context, ranker, _ = ranked
    pair, artifact = Pair("1", "2", {"tab": "home"}), ranker.artifact
    assert all(explain(context, ranker, pair, TOMORROW).experts.values())
    alone = RegisteredRanker(replace(artifact, tree_share=1.0), "3")
    found = explain(context, alone, pair, TOMORROW)
    assert set(map(tuple, found.experts.values())) == {()}
    first, *others = found.experts
    trees = Forest(artifact.trees.features, [0, *artifact.trees.trees[1:]], 1)
    part = RegisteredRanker(replace(artifact, tree_share=1.0, trees=trees), "3")
    found = explain(context, part, pair, TOMORROW)
    assert found.experts[first]
    assert not any(found.experts[name] for name in others)


def test_effects_are_those_of_features_left_out_one_by_one_the_largest_first(ranked):
    context, ranker, _ = ranked
    found = explain(context, ranker, Pair("1", "2", {"tab": "home"}), TOMORROW)
    row = pl.DataFrame([found.features], schema_overrides={"tab": pl.String})
    predict = ranker.artifact.predict
    scores = {
        name: predict(row.with_columns(pl.lit(None, row.schema[name]).alias(name)))["score"][0]
        for name, value in found.features.items()
        if value is not None
    }
    assert found.effects == pytest.approx({n: found.score - s for n, s in scores.items()}, abs=1e-5)
    sizes = [abs(effect) for effect in found.effects.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1e-3


def test_experts_are_those_that_the_towers_read(ranked):
    """Of two layers the last one: with own and shared experts, three of four for each objective."""
    context, ranker, _ = ranked
    artifact = ranker.artifact
    settings = {"preset": "ple", "own_experts": 1, "shared_experts": 2, "layers": 2}
    torch.manual_seed(0)
    model = build_ranker(make("m", settings, 2), artifact.encoder, artifact.tasks).eval()
    layered = RegisteredRanker(replace(artifact, model=model), "3")
    found = explain(context, layered, Pair("1", "2", {"tab": "home"}), TOMORROW)
    rows = pl.DataFrame([found.features], schema_overrides={"tab": pl.String})
    _, last = model.expert_weights(*encoded_tensors(artifact.encoder.transform(rows)))
    for t, weights in enumerate(found.experts.values()):
        assert weights == pytest.approx(last[0, t].tolist(), abs=1e-6)
        assert len(weights) == 4
        assert sum(w > 0 for w in weights) == 3


def test_a_conditional_objective_enters_times_the_probability_of_its_condition(ranked):
    """Of the tiny project: watched for long, where clicked."""
    context, ranker, _ = ranked
    found = explain(context, ranker, Pair("1", "2", {"tab": "home"}), TOMORROW)
    assert found.multiplied == {"click": [], "long": ["click"]}
    p, q = found.predictions["click"], found.predictions["long"]
    assert found.values == pytest.approx({"click": p, "long": p * q})
    weights = ranker.artifact.project.blend_weights
    assert found.score == pytest.approx(weights["click"] * p + weights["long"] * p * q)
    assert found.score == pytest.approx(sum(found.contributions.values()))


def test_booleans_are_given_as_true_and_false(tmp_path):
    context, artifact = random_ranker(tmp_path)
    day = FIRST + timedelta(days=5)
    flags = context.workspace.scan("events", [day]).with_columns(pl.col("tab") == "home")
    context.workspace.publish("events", day, flags, {})
    ranker = RegisteredRanker(artifact, "3")
    with pytest.raises(ProjectError, match="tab 'maybe': is no Boolean, the log's own type"):
        explain(context, ranker, Pair("1", "2", {"tab": "maybe"}), TOMORROW)
