"""Rankings in blocks and parts against every pair predicted row by row; resumed rankings."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch

from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.encoders import fit_encoder
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.point_in_time import feature_sides, join_features
from mtl_ranker.features.tables import tables_as_of
from mtl_ranker.features.vectors import load_vectors
from mtl_ranker.logs.blocks import user_blocks
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.popularity import fit_popularity, smoothed_means
from mtl_ranker.ranking import scoring
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import load_candidates
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.boosting import fit_forest
from mtl_ranker.training.network import build_ranker, tasks_of
from tests.builds import build_once
from tests.conftest import FIRST, write_log
from tests.projects import TINY, merged, write_project

ENTITIES = [["user_id"], ["item_id"], ["tab"], ["item_id", "tab"], ["user_id", "item_id"]]
HISTORY = {"histories": [{"signal": "click", "columns": ["item_id", "tab"], "length": 6}]}
PAIRED = merged(TINY, features={"entities": ENTITIES})
TABLES = {
    "users": {
        "path": "users.parquet",
        "key": "u",
        "columns": ["home"],
        "lists": {"favourites": ","},
    },
    "items": {
        "path": "items.parquet",
        "key": "i",
        "columns": ["category"],
        "lists": {"tags": ","},
    },
}
MATCHED = {
    "categoricals": [{"column": "home"}, {"column": "category"}],
    "lists": [
        {"column": "favourites", "max_length": 3},
        {"column": "tags", "max_length": 3},
    ],
}
NUMBERS = {
    "users": {"path": "users.parquet", "key": "u", "columns": ["budget", "joined"]},
    "items": {"path": "items.parquet", "key": "i", "columns": ["price", "category", "released"]},
}
VECTORS = {
    "users": {"path": "users.parquet", "key": "u", "columns": ["interest"]},
    "items": {"path": "items.parquet", "key": "i", "columns": ["content"]},
}
EMBEDDED = {"embeddings": ["content", "interest"]}
DERIVED = {
    "numerics": ["budget", "joined", "released"],
    "derived": {
        "affordable": "price / budget",
        "waited": "joined - released",
        "saved": "case when tab = 'home' then budget else joined end",
        "shown": "case when tab = 'home' then price else 0 end",
        "third": "case when tab = 'home' and category = 'a' then budget * price end",
    },
}


def write_tables(folder) -> None:
    """Users and items whose columns all hold the values a to e, or lists of them, or nothing.

    Budgets, prices and days too.
    """
    values = [None, "a", "b", "c", "d", "e"]
    lists = [None, "a", "b,a", "c,d,e", "d", "e,b", "a,d"]
    users, items = range(60), range(40)
    pl.DataFrame(
        {
            "u": users,
            "home": [values[u % 6] for u in users],
            "favourites": [lists[u % 7] for u in users],
            "budget": [u % 5 for u in users],
            "joined": [None if u % 9 == 0 else FIRST - timedelta(days=u) for u in users],
            "interest": [None if u % 4 == 0 else [u / 9, u % 3, 1.0] for u in users],
        }
    ).write_parquet(folder / "users.parquet")
    pl.DataFrame(
        {
            "i": items,
            "category": [values[i % 6] for i in items],
            "tags": [lists[i % 7] for i in items],
            "price": [i / 7 for i in items],
            "released": [datetime(2026, 1, 1) + timedelta(hours=7 * i) for i in items],
            "content": [None if i % 5 == 0 else [i / 7, i % 2] for i in items],
        }
    ).write_parquet(folder / "items.parquet")


def random_ranker(folder, **changes) -> tuple[Context, RankerArtifact]:
    """PAIRED, changed, with a few days of examples and a model of random weights."""
    write_project(folder, PAIRED, **changes)
    write_log(folder)
    context = open_context(str(folder / "project.toml"), folder, folder / "ws")

    def build() -> None:
        for day in context.source.days():
            ingest_day(context, day)
            aggregate_day(context, day)
            build_examples(context, day)

    build_once(folder, build)
    project, frame = context.project, all_examples(context)
    embeddings = project.features.embeddings
    tables = load_vectors(context.workspace, embeddings, [frame.lazy()])
    encoder = fit_encoder(project, frame, tables=tables)
    tasks = tasks_of(project)
    torch.manual_seed(0)
    spec = make("m", {"preset": "mmoe", "members": 2}, len(tasks), project.features.groups)
    model = build_ranker(spec, encoder, tasks).eval()
    for parameter in model.parameters():  # large, so that every feature changes the score
        torch.nn.init.normal_(parameter, std=0.3)
    rows = encode_examples(encoder, frame, [LABEL + task.name for task in tasks])
    trees = fit_forest(tasks, rows, [6] * len(tasks), 0)
    return context, RankerArtifact(project, encoder, tasks, model, trees=trees)


def all_examples(context: Context) -> pl.DataFrame:
    workspace = context.workspace
    return workspace.scan("examples", workspace.days("examples")).collect()


def write_candidates(context: Context, day, frame: pl.DataFrame) -> None:
    folder = context.source.root / "candidates" / f"date={day}"
    folder.mkdir(parents=True)
    frame.write_parquet(folder / "a.parquet")


def ranking_of_all_pairs(context, artifact, day, top_k):
    """Every pair joined to every feature and predicted row by row."""
    candidates = load_candidates(context, day)
    candidates = candidates.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    rows = join_features(context, candidates, day).collect()
    predicted = artifact.predict_examples(context.workspace, rows)
    ranked = pl.concat([rows.select("user_id", "item_id", "tab"), predicted], how="horizontal")
    ranked = ranked.sort(["user_id", "score", "item_id"], descending=[False, True, False])
    return ranked.group_by("user_id", maintain_order=True).head(top_k)


@pytest.mark.parametrize(
    ("features", "log"),
    [({}, {}), (HISTORY, {}), (MATCHED, TABLES), (DERIVED, NUMBERS), (EMBEDDED, VECTORS)],
    ids=["", "histories", "matches", "derived", "vectors"],
)
@pytest.mark.parametrize(
    ("block_rows", "blocks_per_core"),
    [pytest.param(1, 1, marks=pytest.mark.slow), (40, 16), (131_072, 1)],
)
def test_ranking_in_blocks_is_the_ranking_of_all_pairs_at_once(
    tmp_path, monkeypatch, block_rows, blocks_per_core, features, log
):
    write_tables(tmp_path)
    monkeypatch.setattr(scoring, "BLOCKS_PER_CORE", blocks_per_core)
    settings = {"candidates": "candidates", "top_k": 4, "block_rows": block_rows}
    context, artifact = random_ranker(tmp_path, features=features, log=log, scoring=settings)
    assert len(artifact.encoder.matches) == (4 if log is TABLES else 0)
    day = FIRST + timedelta(days=7)
    rng = np.random.default_rng(0)
    size = 150
    rows = pl.DataFrame(
        {
            "u": rng.integers(0, 20, size),  # some of them not in the log
            "i": rng.integers(0, 40, size),
            "tab": rng.choice(["home", "search", "unknown"], size),
        }
    )
    rows = rows.with_columns(pl.when(pl.col("u") != 5).then("tab").alias("tab"))
    write_candidates(context, day, rows)
    assert rows.select("u", "i").is_duplicated().any()
    ranked = score_day(context, RegisteredRanker(artifact, "7"), day)
    assert ranked.candidates == size
    assert ranked.repeated == rows.n_unique() - rows.select("u", "i").n_unique() > 0
    ranking = pl.read_parquet(ranked.path)
    expected = ranking_of_all_pairs(context, artifact, day, 4)
    assert ranking["user_id"].n_unique() == ranked.users == rows["u"].n_unique()
    assert ranked.rows == ranking.height == expected.height
    assert (
        ranking["rank"].to_list()
        == expected.select(pl.int_range(1, pl.len() + 1).over("user_id")).to_series().to_list()
    )
    columns = [*(task.name for task in artifact.tasks), "score"]
    np.testing.assert_allclose(
        ranking[columns].to_numpy(), expected[columns].to_numpy(), rtol=1e-4, atol=1e-6
    )
    same = ranking.select("user_id", "item_id").equals(expected.select("user_id", "item_id"))
    assert same or np.isclose(ranking["score"].diff().drop_nulls().abs().min(), 0, atol=1e-6)
    assert ranking["model_version"].unique().to_list() == ["7"]
    assert not list((tmp_path / "ws" / ".staging").iterdir())


def test_item_popularity_ranks_also_where_the_item_is_no_feature(tmp_path):
    features = {"categoricals": [{"column": "tab"}]}
    scoring_settings = {"generated_items": 9, "top_k": 9}
    context, _ = random_ranker(tmp_path, features=features, scoring=scoring_settings)
    days = context.workspace.days("examples")
    rows = context.workspace.scan("examples", days)
    artifact = fit_popularity(context.project, rows, None)
    ranked = score_day(context, RegisteredRanker(artifact, "1"), days[-1] + timedelta(days=1))
    ranking = pl.read_parquet(ranked.path)
    means = smoothed_means(artifact.tasks, rows)
    joined = ranking.join(means, on="item_id", how="left", suffix="_mean")
    for task in artifact.tasks:
        expected = joined[f"{task.name}_mean"].to_list()
        assert joined[task.name].to_list() == pytest.approx(expected, abs=1e-5)
    orders = ranking.group_by("user_id").agg("item_id")["item_id"].unique()
    assert len(orders) == 1


@pytest.mark.slow
def test_an_interrupted_ranking_is_resumed_after_its_finished_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCKS_PER_CORE", 1)
    settings = {"candidates": "candidates", "block_rows": 20}
    context, artifact = random_ranker(tmp_path, scoring=settings)
    day = FIRST + timedelta(days=7)
    rng = np.random.default_rng(1)
    rows = {"u": rng.integers(0, 60, 300), "i": rng.integers(0, 40, 300), "tab": ["home"] * 300}
    write_candidates(context, day, pl.DataFrame(rows))
    whole = pl.read_parquet(score_day(context, RegisteredRanker(artifact, "7"), day).path)

    ranked: list[int] = []
    original = scoring.rank_block

    def counted(artifact, as_of, candidates, items):
        ranked.append(candidates.height)
        if sum(ranked) > 200:
            raise OSError("the disk is full")
        return original(artifact, as_of, candidates, items)

    monkeypatch.setattr(scoring, "rank_block", counted)
    with pytest.raises(OSError, match="the disk is full"):
        score_day(context, RegisteredRanker(artifact, "8"), day)
    parts = list((tmp_path / "ws/.parts/rankings").glob("*/*/*.parquet"))
    finished = sum(pl.scan_parquet(parts).select(pl.len()).collect().to_series())
    assert pl.read_parquet(context.workspace.path("rankings", day)).equals(whole)
    assert finished > 0
    before, ranked[:] = sum(ranked), [-10_000]
    progress: list[tuple[int, int]] = []
    resumed = score_day(
        context, RegisteredRanker(artifact, "8"), day, lambda *rows: progress.append(rows)
    )
    ranked_again = sum(ranked) + 10_000
    assert 300 - before <= ranked_again < 300
    assert progress[-1] == (300, 300)
    ranking = pl.read_parquet(resumed.path)
    assert ranking.drop("model_version").equals(whole.drop("model_version"))
    assert ranking["model_version"].unique().to_list() == ["8"]
    assert not list((tmp_path / "ws/.parts/rankings").iterdir())

    # Parts of another model version are not reused.
    ranked[:] = [0]
    with pytest.raises(OSError, match="the disk is full"):
        score_day(context, RegisteredRanker(artifact, "9"), day)
    ranked[:] = [-10_000]
    score_day(context, RegisteredRanker(artifact, "10"), day)
    assert sum(ranked) == 300 - 10_000


def test_a_reloaded_artifact_with_histories_predicts_the_same(tmp_path):
    context, artifact = random_ranker(tmp_path, features=HISTORY)
    frame = all_examples(context)
    assert artifact.encoder.histories == [[[1, 2], [0, 3]]]
    reloaded = RankerArtifact.load(artifact.save(tmp_path / "saved"))
    predicted = artifact.predict(frame)
    assert reloaded.predict(frame).equals(predicted)
    without_history = frame.with_columns(
        pl.lit(None, frame[c].dtype).alias(c) for c in frame.columns if c.startswith("history_")
    )
    has_history = frame["history_click_item_id"].is_not_null().to_numpy()
    changed = (artifact.predict(without_history)["click"] != predicted["click"]).to_numpy()
    assert has_history.any()
    assert not has_history.all()
    np.testing.assert_array_equal(changed, has_history)


@pytest.mark.parametrize("ids", [(1, 2, 3, 4), ("1", "item_id", "user_id", "z")])
def test_blocks_hold_whole_users(ids):
    """Of numbers and of texts, also of texts that are names of columns."""
    one, two, three, four = ids
    users = [three] * 5 + [one] * 2 + [two] * 3 + [four]
    rows = pl.LazyFrame({"user_id": users, "item_id": range(11)})
    blocks = user_blocks(rows, 4)
    found = [(b.first, b.last, b.rows) for b in blocks]
    assert found == [(one, one, 2), (two, two, 3), (three, four, 6)]
    for block in blocks:
        assert block.of(rows).collect().height == block.rows
    whole = pl.concat([b.of(rows) for b in blocks]).collect()
    assert sorted(whole["item_id"]) == list(range(11))


def test_features_belong_to_users_items_or_pairs(tmp_path):
    context, _ = random_ranker(tmp_path)
    tables = tables_as_of(context.source, context.last_day())
    sides = feature_sides(context.project, tables, ["user_id", "item_id", "tab"])
    assert sides.entities == {
        "entity_user": "user",
        "entity_item": "item",
        "entity_tab": "user",
        "entity_item_x_tab": "item",
        "entity_user_x_item": "pair",
    }
    assert sides.user_keys == ["user_id", "tab"]
    assert sides.item_keys == ["item_id", "tab"]
    assert sides.pair_keys == ["item_id", "user_id"]
    assert sides.features["tab"] == "user"


def test_a_column_of_the_candidates_overrides_the_item_table_also_as_a_key(tmp_path):
    """The genre is a key of entities here and no feature by itself."""
    entities = [["user_id"], ["item_id"], ["tab"], ["genre"], ["user_id", "genre"]]
    items = pl.DataFrame({"i": range(60), "genre": [n % 3 for n in range(60)]})
    items.write_parquet(tmp_path / "items.parquet")
    context, artifact = random_ranker(
        tmp_path,
        log={"items": {"path": "items.parquet", "key": "i", "columns": ["genre"]}},
        features={"entities": [*entities, ["user_id", "item_id"]]},
        scoring={"candidates": "candidates", "top_k": 9},
    )
    day = FIRST + timedelta(days=7)
    rows = pl.DataFrame({"u": [1, 1, 2, 2], "i": [3, 4, 3, 4], "tab": ["home"] * 4})
    write_candidates(context, day, rows.with_columns(genre=pl.Series([2, 0, 1, 1])))
    ranked = score_day(context, RegisteredRanker(artifact, "7"), day)
    expected = ranking_of_all_pairs(context, artifact, day, 9)
    keys = ["user_id", "item_id"]
    np.testing.assert_allclose(
        pl.read_parquet(ranked.path).sort(keys)["score"].to_numpy(),
        expected.sort(keys)["score"].to_numpy(),
        rtol=1e-4,
    )
