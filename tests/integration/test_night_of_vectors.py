"""Nights with content embeddings: the whole chain, changed vectors, and the model elsewhere."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import mlflow
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mtl_ranker.context import Context
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import load_candidates
from mtl_ranker.ranking.explain import Pair, explain
from mtl_ranker.ranking.onnx_model import export_onnx
from mtl_ranker.ranking.program import export_program
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.ranking.snapshot import load_snapshot, rank, save_snapshot
from mtl_ranker.tracking.pyfunc import model_arguments
from tests.nights import run_night
from tests.projects import SMALL, write_project
from tests.ranking.test_scoring import (
    EMBEDDED,
    VECTORS,
    all_examples,
    random_ranker,
    write_candidates,
    write_tables,
)


@pytest.mark.slow
def test_a_night_with_vectors_and_trees_in_memory_and_from_files(feed, tmp_path):
    qualities = []
    for name, in_memory_rows in (("memory", 10_000_000), ("files", 100)):
        root = tmp_path / name
        root.mkdir()
        for part in ("log", "items.parquet", "users.parquet"):
            (root / part).symlink_to(feed / part)
        columns = [*SMALL["log"]["items"]["columns"], "content"]
        write_project(
            root,
            SMALL,
            log={"items": {"columns": columns}},
            features={"embeddings": ["content"]},
            training={"in_memory_rows": in_memory_rows, "trees": 5},
        )
        night = run_night(root)
        assert night.decision.serving is None or night.decision.serving.failed is None
        encoder = night.suite.winner.artifact.encoder
        assert [len(content.mean) for content in encoder.contents] == [16]
        assert night.ranked.rows > 0
        qualities.append(night.suite.winner.metrics["click"]["auc"])
    assert all(np.isfinite(qualities))


def ranker_with_vectors(folder: Path, **scoring) -> tuple[Context, RankerArtifact]:
    write_tables(folder)
    return random_ranker(folder, features=EMBEDDED, log=VECTORS, scoring=scoring)


def test_a_changed_vector_changes_the_scores_of_its_item_only(tmp_path):
    context, artifact = ranker_with_vectors(tmp_path, candidates="candidates", top_k=20)
    day = context.last_day() + timedelta(days=1)
    pairs = pl.DataFrame({"u": range(6)}).join(pl.DataFrame({"i": range(10, 20)}), how="cross")
    write_candidates(context, day, pairs.with_columns(tab=pl.lit("home")))
    before = pl.read_parquet(score_day(context, RegisteredRanker(artifact, "7"), day).path)
    items = pl.read_parquet(tmp_path / "items.parquet")
    moved = pl.when(pl.col("i") == 13).then(pl.lit([9.0, -9.0])).otherwise("content")
    items.with_columns(content=moved).write_parquet(tmp_path / "items.parquet")
    again = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    after = pl.read_parquet(score_day(again, RegisteredRanker(artifact, "7"), day).path)
    key = ["user_id", "item_id"]
    both = before.join(after, on=key, suffix=" after")
    assert both.height == 60
    changed = both.filter(pl.col("score") != pl.col("score after"))
    assert set(changed["item_id"]) == {13}
    assert changed.height == 6


def test_a_snapshot_has_the_vectors_of_its_day(tmp_path):
    context, artifact = ranker_with_vectors(tmp_path, candidates="candidates", top_k=5)
    day = context.last_day() + timedelta(days=1)
    pairs = pl.DataFrame({"u": range(60)}).join(pl.DataFrame({"i": range(40)}), how="cross")
    write_candidates(context, day, pairs.with_columns(tab=pl.lit("home")))
    ranker = RegisteredRanker(artifact, "7")
    published = pl.read_parquet(score_day(context, ranker, day).path)
    snapshot = load_snapshot(save_snapshot(context, ranker, day, tmp_path / "snapshot"))
    loaded = RankerArtifact.load(artifact.save(tmp_path / "saved"))
    candidates = load_candidates(context, day).collect()
    assert_frame_equal(rank(loaded, snapshot, candidates), published, check_row_order=False)


@pytest.mark.slow
def test_an_explanation_is_of_the_days_vector(tmp_path):
    context, artifact = ranker_with_vectors(tmp_path)
    day = context.last_day() + timedelta(days=1)
    found = explain(context, RegisteredRanker(artifact, "7"), Pair("3", "11"), day)
    assert found.features["content"] == pytest.approx([11 / 7, 1.0])
    assert found.effects["content"] != 0


@pytest.mark.slow
def test_a_stored_model_reads_lists_of_numbers(tmp_path):
    context, artifact = ranker_with_vectors(tmp_path)
    rows = all_examples(context).head(20)
    expected = artifact.predict(rows)
    own = tmp_path / "stored"
    example = rows.head(5).select(artifact.columns)
    mlflow.pyfunc.save_model(own / "model", **model_arguments(artifact, example, own))
    served = mlflow.pyfunc.load_model(str(own / "model"))
    given = artifact.encoder.with_vectors(rows.select(artifact.columns))
    found = pl.from_pandas(served.predict(given.to_pandas()))
    assert_frame_equal(found, expected)
    without = pl.from_pandas(served.predict(given.drop("content").to_pandas()))
    no_vector = given.with_columns(content=pl.lit(None))
    assert_frame_equal(without, artifact.predict(no_vector))
    assert not without.equals(found)


@pytest.mark.slow
def test_exported_programs_read_vectors(tmp_path):
    context, artifact = ranker_with_vectors(tmp_path)
    rows = artifact.encoder.with_vectors(all_examples(context).head(40))
    for name, export in (("program", export_program), ("onnx", export_onnx)):
        (tmp_path / name).mkdir()
        assert export(artifact, rows, tmp_path / name) < 1e-5
