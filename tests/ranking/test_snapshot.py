"""A ranking from a snapshot of the features, without log and workspace, against `score_day`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import timedelta

import mlflow
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.sources import open_source
from mtl_ranker.ranking.artifact import RegisteredRanker
from mtl_ranker.ranking.candidates import load_candidates
from mtl_ranker.ranking.rules import PROPENSITY, SEED
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.ranking.snapshot import load_snapshot, rank, save_snapshot
from mtl_ranker.tracking.pyfunc import export_ranking
from tests.conftest import FIRST
from tests.ranking.test_scoring import HISTORY, random_ranker, write_candidates

DAY = FIRST + timedelta(days=6)
ITEMS = {
    "items": {
        "path": "items",
        "key": "i",
        "columns": ["size", "made"],
        "published": "day",
        "partition": "date",
    }
}
FEATURES = {
    "numerics": ["size", "made"],
    "derived": {"shown_size": "case when tab = 'home' then size / made else 0 end"},
    **HISTORY,
}


def candidate_set() -> pl.DataFrame:
    """Users × items in an order of no meaning, with unknown ones and a missing context."""
    users = pl.DataFrame({"u": [3, 99, *range(11)]}).unique(maintain_order=True)
    items = pl.DataFrame({"i": [12, 77, *range(12)]}).unique(maintain_order=True)
    tab = pl.Series("tab", ["home", "search", None, "elsewhere"])
    pairs = users.join(items, how="cross").with_row_index("n")
    return pairs.with_columns(tab.gather(pairs["n"] % 4)).drop("n")


@pytest.fixture
def ranked(tmp_path, request):
    """A published ranking, its ranker, and its candidates."""
    for day, size in ((FIRST, 2.0), (DAY - timedelta(days=1), 1.0), (DAY, 9.0)):
        folder = tmp_path / "items" / f"date={day}"
        folder.mkdir(parents=True)
        sizes, made = [size * k for k in range(13)], [FIRST - timedelta(days=k) for k in range(13)]
        items = pl.DataFrame({"i": range(13), "size": sizes, "made": made, "day": [FIRST] * 13})
        items.write_parquet(folder / "items.parquet")
    context, artifact = random_ranker(
        tmp_path,
        log=ITEMS,
        features=FEATURES,
        scoring={"candidates": "candidates", "top_k": 4, "block_rows": request.param},
    )
    write_candidates(context, DAY, candidate_set())
    ranker = RegisteredRanker(artifact, "7")
    return context, ranker, pl.read_parquet(score_day(context, ranker, DAY).path)


@pytest.mark.slow
@pytest.mark.parametrize("ranked", [30, 131_072], indirect=True)
def test_a_snapshot_ranks_as_the_pipeline_bit_for_bit(ranked, tmp_path):
    context, ranker, published = ranked
    save_snapshot(context, ranker, DAY, tmp_path / "snapshot")
    candidates = load_candidates(context, DAY).collect()
    shutil.rmtree(tmp_path / "ws")
    shutil.rmtree(tmp_path / "log")
    shutil.rmtree(tmp_path / "items")
    snapshot = load_snapshot(tmp_path / "snapshot")
    sizes = snapshot.as_of.tables["item_id"].collect()["size"].to_list()
    assert sizes == [float(k) for k in range(13)]  # of the day before
    found = rank(ranker.artifact, snapshot, candidates)
    assert_frame_equal(found, published, check_exact=True)
    assert found["user_id"].n_unique() == 12
    nobody = rank(ranker.artifact, snapshot, candidates.clear())
    assert_frame_equal(nobody, published.clear())


RULES = {
    "seen_days": 1,
    "block": [{"path": "blocked.parquet", "key": ["i"]}],
    "at_most": [{"column": "size", "count": 1, "within": 4}],
    "fresh": {"count": 1, "within": 4, "days": 2},
    "mmr": {"column": "content", "weight": 0.7},
}


def with_lists(folder, context, **rules):
    """The project with rules that drop and reorder, and with lists that are explored."""
    pl.DataFrame({"i": [2, 5]}).write_parquet(folder / "blocked.parquet")
    days = [FIRST + timedelta(days=4) if k % 3 else FIRST for k in range(13)]
    sizes = [float(k // 2) for k in range(13)]
    vectors = np.random.default_rng(0).normal(size=(13, 2)).tolist()
    made = [DAY - timedelta(days=k) for k in range(13)]
    columns = {"i": range(13), "size": sizes, "made": made, "day": days, "content": vectors}
    items = pl.DataFrame(columns)
    items.write_parquet(folder / "items.parquet")
    changed = context.project.model_dump(mode="json", by_alias=True, exclude_unset=True)
    lists = {"rules": RULES | rules, "exploration": {"temperature": 1.0, "share": 0.5}}
    changed["scoring"] |= lists
    changed["log"]["items"].pop("partition")
    changed["log"]["items"]["path"] = "items.parquet"
    changed["log"]["items"]["columns"].append("content")
    project = Project.model_validate(changed)
    source = open_source(project, folder, context.workspace)
    return replace(context, project=project, source=source)


@pytest.mark.slow
@pytest.mark.parametrize("ranked", [30], indirect=True)
def test_a_snapshot_makes_lists_under_rules_as_the_pipeline(ranked, tmp_path):
    """Also what the rules read is in the snapshot: seen pairs, lists, columns, the day."""
    plain, ranker, without = ranked
    context = with_lists(tmp_path, plain)
    day = score_day(context, ranker, DAY)
    published = pl.read_parquet(day.path)
    assert [effect.step for effect in day.effects] == [
        *("seen_days", "block[0]", "at_most[0]", "fresh", "mmr", "exploration")
    ]
    assert published.columns == [*without.columns[:-1], PROPENSITY, SEED, "model_version"]
    export_ranking(context, ranker, DAY, tmp_path / "exported")
    candidates = load_candidates(context, DAY).collect()
    for gone in ("ws", "log"):
        shutil.rmtree(tmp_path / gone)
    for gone in ("blocked", "items"):
        (tmp_path / f"{gone}.parquet").unlink()
    (folder,) = (tmp_path / "exported").rglob("snapshot.json")
    snapshot = load_snapshot(folder.parent)
    assert_frame_equal(rank(ranker.artifact, snapshot, candidates), published, check_exact=True)
    nobody = rank(ranker.artifact, snapshot, candidates.clear())
    assert_frame_equal(nobody, published.clear())
    served = mlflow.pyfunc.load_model(str(tmp_path / "exported"))
    outputs = served.metadata.get_output_schema().input_names()
    assert outputs == published.columns


@pytest.mark.slow
@pytest.mark.parametrize("ranked", [30], indirect=True)
def test_a_rule_on_a_column_that_the_models_candidates_lack_is_refused(ranked, tmp_path):
    context, ranker, _ = ranked
    log = context.project.log
    wider = log.model_copy(update={"context": [*log.context, "shelf"]})
    context = replace(context, project=context.project.model_copy(update={"log": wider}))
    ruled = with_lists(tmp_path, context, at_most=[{"column": "shelf", "count": 1, "within": 4}])
    message = r"at_most\[0\].column: 'shelf' is a context column that version 7 does not have"
    with pytest.raises(ProjectError, match=message):
        save_snapshot(ruled, ranker, DAY, tmp_path / "snapshot")


@pytest.mark.parametrize("ranked", [131_072], indirect=True)
def test_the_exported_model_ranks_users_items_and_context(ranked, tmp_path):
    context, ranker, published = ranked
    export_ranking(context, ranker, DAY, tmp_path / "exported")
    served = mlflow.pyfunc.load_model(str(tmp_path / "exported"))
    given = candidate_set().rename({"u": "user_id", "i": "item_id"}).to_pandas()
    found = pl.from_pandas(served.predict(given), schema_overrides=published.schema)
    assert_frame_equal(found, published, check_exact=True)
    schema = served.metadata.get_input_schema()
    assert schema.required_input_names() == ["user_id", "item_id"]
    assert schema.optional_input_names() == ["tab"]
    outputs = served.metadata.get_output_schema().input_names()
    assert outputs == published.columns
    without = served.predict(given.drop(columns="tab"))
    everywhere_null = served.predict(given.assign(tab=None))
    assert without["score"].tolist() == everywhere_null["score"].tolist()
    given.loc[0, "user_id"] = None
    with pytest.raises(ProjectError, match="column 'user_id' has 1 missing values"):
        served.predict(given)
