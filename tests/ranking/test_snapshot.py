"""A ranking from a snapshot of the features, without log and workspace, against `score_day`."""

from __future__ import annotations

import shutil
from datetime import timedelta

import mlflow
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mtl_ranker.errors import ProjectError
from mtl_ranker.ranking.artifact import RegisteredRanker
from mtl_ranker.ranking.candidates import load_candidates
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
