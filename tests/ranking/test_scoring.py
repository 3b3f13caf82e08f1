"""Candidate sets: keys in other types, columns missing, files missing."""

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
from mtl_ranker.features.blocks import user_blocks
from mtl_ranker.features.columns import LABEL, numeric_features
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.point_in_time import feature_sides, join_features
from mtl_ranker.features.tables import static_tables
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_source
from mtl_ranker.models.presets import make
from mtl_ranker.ranking import scoring
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import cast_keys, generate_candidates, load_candidates
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.boosting import fit_forest
from mtl_ranker.training.network import build_ranker, tasks_of
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, write_log
from tests.projects import TINY, merged, write_project

ENTITIES = [["user_id"], ["item_id"], ["tab"], ["item_id", "tab"], ["user_id", "item_id"]]
HISTORY = {"histories": [{"signal": "click", "columns": ["item_id", "tab"], "length": 6}]}
PAIRED = merged(TINY, features={"entities": ENTITIES})


def trained_on(folder, **changes):
    """PAIRED, changed, with a few days of examples and an untrained model of random weights."""
    write_project(folder, PAIRED, **changes)
    write_log(folder)
    project = load_project(str(folder / "project.toml"))
    source, workspace = open_source(project, folder), Workspace(folder / "ws")
    for day in source.days():
        ingest_day(Context(project, source, workspace), day)
        aggregate_day(Context(project, source, workspace), day)
        build_examples(Context(project, source, workspace), day)
    frame = workspace.scan("examples", workspace.days("examples")).collect()
    encoder = Encoder.fit(project.features, numeric_features(project), frame)
    tasks = tasks_of(project)
    torch.manual_seed(0)
    spec = make("m", {"preset": "mmoe", "members": 2}, len(tasks), project.features.groups)
    model = build_ranker(spec, encoder, tasks).eval()
    for parameter in model.parameters():  # far from their start, so that every feature matters
        torch.nn.init.normal_(parameter, std=0.3)
    rows = encode_examples(encoder, frame, [LABEL + task.name for task in tasks])
    trees = fit_forest(tasks, rows, [6] * len(tasks), 0)
    return project, source, workspace, RankerArtifact(project, encoder, tasks, model, trees=trees)


@pytest.fixture
def ingested(tmp_path):
    write_project(tmp_path, scoring={"candidates": "candidates"})
    write_log(tmp_path)
    project = load_project(str(tmp_path / "project.toml"))
    source, workspace = open_source(project, tmp_path), Workspace(tmp_path / "ws")
    for day in source.days():
        ingest_day(Context(project, source, workspace), day)
    return project, source, workspace


def give(source, day, frame: pl.DataFrame):
    folder = source.root / "candidates" / f"date={day}"
    folder.mkdir(parents=True)
    frame.write_parquet(folder / "a.parquet")


def test_given_candidates_take_the_logs_types(ingested):
    project, source, workspace = ingested
    give(source, FIRST, pl.DataFrame({"u": ["1", "2"], "i": [3.0, 4.0]}))
    rows = load_candidates(Context(project, source, workspace), FIRST)
    cast = cast_keys(rows, workspace, FIRST).collect()
    assert cast.rows() == [(1, 3), (2, 4)]
    assert cast.dtypes == [pl.Int64, pl.Int64]


def test_an_id_that_is_no_number_is_named(ingested):
    project, source, workspace = ingested
    give(source, FIRST, pl.DataFrame({"u": ["1", "anna"], "i": [3, 4]}))
    rows = load_candidates(Context(project, source, workspace), FIRST)
    with pytest.raises(ProjectError, match=r"'user_id' is String and holds \['anna'\].*Int64"):
        cast_keys(rows, workspace, FIRST)


def test_a_surface_in_another_type_takes_the_logs_or_is_named(ingested):
    project, source, workspace = ingested
    give(source, FIRST, pl.DataFrame({"u": [1], "i": [3], "tab": [1]}))
    rows = load_candidates(Context(project, source, workspace), FIRST)
    assert cast_keys(rows, workspace, FIRST, ["tab"]).collect()["tab"].to_list() == ["1"]


def test_missing_set_missing_column_and_missing_user_are_named(ingested):
    project, source, workspace = ingested
    with pytest.raises(ProjectError, match="no candidate set for 2026-03-02"):
        load_candidates(Context(project, source, workspace), FIRST)
    give(source, FIRST, pl.DataFrame({"u": [1], "item": [3]}))
    with pytest.raises(ProjectError, match=r"column 'i' \(the item\) is missing; it has: user_id"):
        load_candidates(Context(project, source, workspace), FIRST)
    give(source, FIRST + timedelta(days=1), pl.DataFrame({"u": [1, None], "i": [3, 3]}))
    with pytest.raises(ProjectError, match="1 rows lack a user or an item"):
        load_candidates(Context(project, source, workspace), FIRST + timedelta(days=1))


def test_generated_candidates_are_active_users_times_fresh_items_with_their_context(ingested):
    project, _, workspace = ingested
    day = FIRST + timedelta(days=6)
    made = generate_candidates(without_log(project, workspace), day).collect()
    last = workspace.scan("events", [day - timedelta(days=1)]).collect()
    assert set(made["user_id"]) == set(last["user_id"])
    active = last.group_by("user_id").len().sort(["len", "user_id"], descending=[True, False])
    assert made["user_id"].unique(maintain_order=True).equals(active["user_id"])
    assert made.group_by("user_id").len()["len"].unique().to_list() == [13]
    for user, own in last.group_by("user_id"):
        modes = own["tab"].mode().to_list()
        assert set(made.filter(pl.col("user_id") == user[0])["tab"]) <= set(modes)


def brute_force(project, source, workspace, artifact, day, top_k):
    """Every pair joined to every feature and predicted row by row."""
    candidates = load_candidates(Context(project, source, workspace), day)
    candidates = candidates.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    rows = join_features(Context(project, source, workspace), candidates, day).collect()
    found = pl.concat(
        [rows.select("user_id", "item_id", "tab"), artifact.predict(rows)], how="horizontal"
    )
    found = found.sort(["user_id", "score", "item_id"], descending=[False, True, False])
    return found.group_by("user_id", maintain_order=True).head(top_k)


@pytest.mark.parametrize("remembered", [{}, HISTORY], ids=["", "histories"])
@pytest.mark.parametrize("windows_for", [1, 16])
@pytest.mark.parametrize("block_rows", [1, 40, 131_072])
def test_ranking_in_blocks_is_the_ranking_of_all_pairs_at_once(
    tmp_path, monkeypatch, block_rows, windows_for, remembered
):
    monkeypatch.setattr(scoring, "WINDOWS_FOR", windows_for)
    scored = {"candidates": "candidates", "top_k": 4, "block_rows": block_rows}
    project, source, workspace, artifact = trained_on(tmp_path, features=remembered, scoring=scored)
    day = FIRST + timedelta(days=7)
    rng = np.random.default_rng(0)
    size = 300
    rows = pl.DataFrame(
        {
            "u": rng.integers(0, 60, size),  # some of them never seen in the log
            "i": rng.integers(0, 40, size),
            "tab": rng.choice(["home", "search", "never seen"], size),
        }
    )
    rows = rows.with_columns(pl.when(pl.col("u") != 5).then("tab").alias("tab"))
    give(source, day, rows)
    assert rows.select("u", "i").is_duplicated().any()
    ranked = score_day(Context(project, source, workspace), RegisteredRanker(artifact, "7"), day)
    assert ranked.candidates == size
    found = pl.read_parquet(ranked.path)
    expected = brute_force(project, source, workspace, artifact, day, 4)
    assert found["user_id"].n_unique() == ranked.users == rows["u"].n_unique()
    assert ranked.rows == found.height == expected.height
    assert (
        found["rank"].to_list()
        == expected.select(pl.int_range(1, pl.len() + 1).over("user_id")).to_series().to_list()
    )
    columns = [*(task.name for task in artifact.tasks), "score"]
    np.testing.assert_allclose(
        found[columns].to_numpy(), expected[columns].to_numpy(), rtol=1e-4, atol=1e-6
    )
    same = found.select("user_id", "item_id").equals(expected.select("user_id", "item_id"))
    assert same or np.isclose(found["score"].diff().drop_nulls().abs().min(), 0, atol=1e-6)
    assert found["model_version"].unique().to_list() == ["7"]
    assert not list((tmp_path / "ws" / ".staging").iterdir())


def test_a_killed_ranking_goes_on_after_its_finished_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "WINDOWS_FOR", 1)
    scored = {"candidates": "candidates", "block_rows": 20}
    project, source, workspace, artifact = trained_on(tmp_path, scoring=scored)
    day = FIRST + timedelta(days=7)
    rng = np.random.default_rng(1)
    rows = {"u": rng.integers(0, 60, 300), "i": rng.integers(0, 40, 300), "tab": ["home"] * 300}
    give(source, day, pl.DataFrame(rows))
    whole = pl.read_parquet(
        score_day(Context(project, source, workspace), RegisteredRanker(artifact, "7"), day).path
    )

    ranked: list[int] = []
    original = scoring.rank_block

    def counted(artifact, as_of, candidates, items):
        ranked.append(candidates.height)
        if sum(ranked) > 200:
            raise OSError("the disk is full")
        return original(artifact, as_of, candidates, items)

    monkeypatch.setattr(scoring, "rank_block", counted)
    with pytest.raises(OSError, match="the disk is full"):
        score_day(Context(project, source, workspace), RegisteredRanker(artifact, "8"), day)
    parts = list((tmp_path / "ws/.parts/rankings").glob("*/*/*.parquet"))
    finished = sum(pl.scan_parquet(parts).select(pl.len()).collect().to_series())
    assert pl.read_parquet(workspace.path("rankings", day)).equals(whole)
    assert finished > 0
    before, ranked[:] = sum(ranked), [-10_000]
    told: list[tuple[int, int]] = []
    done = score_day(
        Context(project, source, workspace),
        RegisteredRanker(artifact, "8"),
        day,
        lambda *rows: told.append(rows),
    )
    again = sum(ranked) + 10_000
    assert 300 - before <= again < 300
    assert told[-1] == (300, 300)
    found = pl.read_parquet(done.path)
    assert found.drop("model_version").equals(whole.drop("model_version"))
    assert found["model_version"].unique().to_list() == ["8"]
    assert not list((tmp_path / "ws/.parts/rankings").iterdir())

    # What was made from something else is not taken: another version begins anew.
    ranked[:] = [0]
    with pytest.raises(OSError, match="the disk is full"):
        score_day(Context(project, source, workspace), RegisteredRanker(artifact, "9"), day)
    ranked[:] = [-10_000]
    score_day(Context(project, source, workspace), RegisteredRanker(artifact, "10"), day)
    assert sum(ranked) == 300 - 10_000


def test_an_artifact_with_histories_predicts_the_same_after_it_was_saved(tmp_path):
    _, _, workspace, artifact = trained_on(tmp_path, features=HISTORY)
    frame = workspace.scan("examples", workspace.days("examples")).collect()
    assert artifact.encoder.histories == [[[1, 2], [0, 3]]]
    again = RankerArtifact.load(artifact.save(tmp_path / "saved"))
    found = artifact.predict(frame)
    assert again.predict(frame).equals(found)
    forgotten = frame.with_columns(
        pl.lit(None, frame[c].dtype).alias(c) for c in frame.columns if c.startswith("history_")
    )
    known = frame["history_click_item_id"].is_not_null().to_numpy()
    moved = (artifact.predict(forgotten)["click"] != found["click"]).to_numpy()
    assert known.any()
    assert not known.all()
    np.testing.assert_array_equal(moved, known)


def test_a_users_candidates_are_never_divided():
    rows = pl.LazyFrame({"user_id": [3] * 5 + [1] * 2 + [2] * 3 + [4], "item_id": range(11)})
    blocks = user_blocks(rows, 4)
    assert [(b.first, b.last, b.rows) for b in blocks] == [(1, 1, 2), (2, 2, 3), (3, 4, 6)]
    whole = pl.concat([b.of(rows) for b in blocks]).collect()
    assert sorted(whole["item_id"]) == list(range(11))


def test_what_a_feature_depends_on(tmp_path):
    project, source, *_ = trained_on(tmp_path)
    parts = feature_sides(project, static_tables(source), ["user_id", "item_id", "tab"])
    assert parts.entities == {
        "entity_user": "user",
        "entity_item": "item",
        "entity_tab": "user",
        "entity_item_x_tab": "item",
        "entity_user_x_item": "pair",
    }
    assert parts.user_keys == ["user_id", "tab"]
    assert parts.item_keys == ["item_id", "tab"]
    assert parts.pair_keys == ["item_id", "user_id"]
    assert parts.features["tab"] == "user"


def test_a_candidates_own_column_wins_over_the_items_table_also_as_a_key(tmp_path):
    """The rates of the genre that the candidate set names, which is no feature by itself."""
    entities = [["user_id"], ["item_id"], ["tab"], ["genre"], ["user_id", "genre"]]
    items = pl.DataFrame({"i": range(60), "genre": [n % 3 for n in range(60)]})
    items.write_parquet(tmp_path / "items.parquet")
    project, source, workspace, artifact = trained_on(
        tmp_path,
        log={"items": {"path": "items.parquet", "key": "i", "columns": ["genre"]}},
        features={"entities": [*entities, ["user_id", "item_id"]]},
        scoring={"candidates": "candidates", "top_k": 9},
    )
    day = FIRST + timedelta(days=7)
    rows = pl.DataFrame({"u": [1, 1, 2, 2], "i": [3, 4, 3, 4], "tab": ["home"] * 4})
    give(source, day, rows.with_columns(genre=pl.Series([2, 0, 1, 1])))
    ranked = score_day(Context(project, source, workspace), RegisteredRanker(artifact, "7"), day)
    expected = brute_force(project, source, workspace, artifact, day, 9)
    keys = ["user_id", "item_id"]
    np.testing.assert_allclose(
        pl.read_parquet(ranked.path).sort(keys)["score"].to_numpy(),
        expected.sort(keys)["score"].to_numpy(),
        rtol=1e-4,
    )
