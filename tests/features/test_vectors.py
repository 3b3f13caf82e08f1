"""Content embeddings: keys in examples, vectors by the day, and what is refused."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.audit import audit_day
from mtl_ranker.features.encoders import Content, Encoder, fit_encoder
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.vectors import VECTORS, VectorTable, load_vectors, read_vectors
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, write_log
from tests.projects import project, write_project

DAYS = 4
LAST = FIRST + timedelta(days=DAYS - 1)
TABLE = {"path": "items.parquet", "key": "i", "columns": ["content"]}
Vectors = dict[int, list[float] | None]


def items(vectors: Vectors, dtype: Any = None) -> pl.DataFrame:
    column = pl.Series("content", list(vectors.values()), dtype or pl.List(pl.Float64))
    return pl.DataFrame([pl.Series("i", list(vectors), pl.Int64), column])


def vectors_of(count: int = 13) -> Vectors:
    """Item n has [n, -n]; item 0 has none, and item 12 is not in the table."""
    return {n: [float(n), float(-n)] if n else None for n in range(count - 1)}


def write_table(root: Path, vectors: Vectors, day: date | None = None, dtype: Any = None) -> None:
    folder = root if day is None else root / "items" / f"date={day}"
    folder.mkdir(parents=True, exist_ok=True)
    items(vectors, dtype).write_parquet(folder / "items.parquet")


def opened(root: Path, **table: Any) -> Context:
    write_project(
        root,
        log={"items": TABLE | table},
        features={"embeddings": ["content"]},
    )
    return open_context(str(root / "project.toml"), root, root / "ws")


def built(context: Context, day: date = LAST) -> pl.DataFrame:
    for each in context.source.days():
        ingest_day(context, each)
        aggregate_day(context, each)
    build_examples(context, day)
    return context.workspace.scan("examples", [day]).collect()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_log(tmp_path, DAYS)
    return tmp_path


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Array(pl.Float32, 2)])
def test_a_row_names_its_items_vector(root, dtype):
    write_table(root, vectors_of(), dtype=dtype)
    context = opened(root)
    rows = built(context)
    table = load_vectors(context.workspace, ["content"], [rows.lazy()])["content"]
    looked_up = table.vectors[table.rows(rows["content"])]
    for item, vector in zip(rows["item_id"], looked_up.tolist(), strict=True):
        if item in (0, 12):
            assert np.isnan(vector).all()
        else:
            assert vector == [item, -item]
    stored = pl.concat(pl.read_parquet(f) for f in (root / "ws" / VECTORS).iterdir())
    assert stored.height == 11  # one of each item with a vector, not one of each impression


def test_vectors_that_are_stored_are_not_stored_again(root):
    write_table(root, vectors_of())
    context = opened(root)
    built(context, FIRST + timedelta(days=2))
    before = set((root / "ws" / VECTORS).iterdir())
    write_table(root, vectors_of() | {3: [0.5, 0.25]})
    rows = built(context)
    added = set((root / "ws" / VECTORS).iterdir()) - before
    assert [pl.read_parquet(file)["vector"].to_list() for file in added] == [[[0.5, 0.25]]]
    assert rows.filter(pl.col("item_id") == 3)["content"].n_unique() == 1


def test_a_changed_vector_rebuilds_the_days_with_its_item_and_changes_its_rows_only(root):
    write_table(root, vectors_of())
    context = opened(root)
    before = built(context)
    write_table(root, vectors_of() | {5: [7.0, 7.0]})
    after = built(context)
    differs = after["item_id"].filter(before["content"].ne_missing(after["content"]))
    assert set(differs) == {5}
    assert build_examples(context, LAST) is None


def test_a_row_has_the_vector_of_the_snapshot_before_its_day(root):
    write_table(root, vectors_of() | {5: [1.0, 2.0]}, LAST - timedelta(days=1))
    write_table(root, vectors_of() | {5: [3.0, 4.0]}, LAST)
    context = opened(root, path="items", partition="date")
    rows = built(context)
    table = load_vectors(context.workspace, ["content"], [rows.lazy()])["content"]
    of_five = table.vectors[table.rows(rows.filter(pl.col("item_id") == 5)["content"])]
    assert len(of_five)
    assert (of_five == [1.0, 2.0]).all()
    assert audit_day(context, LAST, 40).differences == []


def test_the_audit_finds_a_vector_of_a_later_snapshot(root):
    write_table(root, vectors_of(), LAST - timedelta(days=1))
    context = opened(root, path="items", partition="date")
    built(context)
    write_table(root, vectors_of() | {5: [3.0, 4.0]}, LAST - timedelta(days=1))
    found = {(d.item_id, d.feature) for d in audit_day(context, LAST, 40).differences}
    assert found == {(5, "content")}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({4: [1.0]}, ["items.parquet", "'content'", "item_id 4", "has 1 numbers", "allowed: 2"]),
        ({4: []}, ["item_id 4", "has 0 numbers", "allowed: 2"]),
        ({4: [1.0, float("inf")]}, ["item_id 4", "holds inf", "finite"]),
        ({4: [1.0, None]}, ["item_id 4", "holds nan", "finite"]),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_by_its_key(root, wrong, words):
    write_table(root, vectors_of() | wrong)
    with pytest.raises(ProjectError) as error:
        built(opened(root))
    for word in words:
        assert word in str(error.value)


def test_a_column_of_text_is_no_vector(root):
    items({1: None}).with_columns(content=pl.lit("a b")).write_parquet(root / "items.parquet")
    with pytest.raises(ProjectError, match="'content' is String; allowed: lists or arrays"):
        built(opened(root))


def test_vectors_of_another_length_on_another_day_are_refused(root):
    write_table(root, {5: [1.0, 2.0]}, FIRST)
    write_table(root, {5: [1.0, 2.0, 3.0]}, FIRST + timedelta(days=1))
    context = opened(root, path="items", partition="date")
    days = [FIRST + timedelta(days=1), FIRST + timedelta(days=2)]
    for day in days:
        built(context, day)
    rows = context.workspace.scan("examples", days)
    with pytest.raises(ProjectError, match="have 2, 3 numbers; allowed: one length"):
        load_vectors(context.workspace, ["content"], [rows])


def test_vectors_that_are_gone_are_missed(root):
    write_table(root, vectors_of())
    context = opened(root)
    rows = built(context)
    for file in (root / "ws" / VECTORS).iterdir():
        file.unlink()
    with pytest.raises(ProjectError, match="lacks 11 of 11 vectors"):
        load_vectors(context.workspace, ["content"], [rows.lazy()])


def test_vectors_are_of_a_table():
    with pytest.raises(ProjectError, match="'content' is no column of a table"):
        project(features={"embeddings": ["content"]})
    features = {"embeddings": ["content"], "numerics": ["content"]}
    with pytest.raises(ProjectError, match="'content' is another feature too"):
        project(log={"items": TABLE}, features=features)


def test_the_scale_is_that_of_distinct_vectors():
    # Mean (2, 0); the numbers minus it are ±1 and ±3, of a mean square of 5.
    content = Content.fit("content", np.array([[1.0, 3.0], [3.0, -3.0]], np.float32))
    assert content.mean == [2.0, 0.0]
    assert content.rms == pytest.approx(5**0.5)
    with pytest.raises(ProjectError, match="no training row has a vector"):
        Content.fit("content", np.zeros((0, 2), np.float32))


KEYED = pl.DataFrame({"tab": ["a", "b", "a", "b"], "content": [9, None, -4, 9]})
TABLES = {
    "content": VectorTable(np.array([-4, 9]), np.array([[np.nan] * 2, [1, 2], [3, 4]], np.float32))
}


def encoder() -> Encoder:
    settings = project(
        log={"items": TABLE},
        features={
            "embeddings": ["content"],
            "entities": [["user_id"]],
            "categoricals": [{"column": "tab"}],
            "windows": [1],
        },
    )
    names = [f"user_{n}" for n in ("daily_impressions_1d", "click_rate_1d", "long_rate_1d")]
    numerics = [pl.lit(1.0).alias(name) for name in (*names, "user_days_since")]
    return fit_encoder(settings, KEYED.with_columns(numerics), tables=TABLES)


def looked_up(encoded) -> list[list[float | None]]:
    (table,) = encoded.tables
    rows = table[encoded.vectors[:, 0]]
    return [[None if np.isnan(v) else float(v) for v in row] for row in rows]


def test_keys_and_vectors_are_encoded_to_the_same_numbers(tmp_path):
    own = encoder()
    rows = KEYED.with_columns(pl.lit(1.0).alias(name) for name in own.numerics)
    expected = [[3, 4], [None, None], [1, 2], [3, 4]]
    assert looked_up(own.transform(rows)) == expected
    with_lists = own.with_vectors(rows)
    assert with_lists["content"].to_list() == [[3, 4], None, [1, 2], [3, 4]]
    own.save(tmp_path / "encoder.json")
    loaded = Encoder.load(tmp_path / "encoder.json")
    assert loaded == own
    assert looked_up(loaded.transform(with_lists)) == expected
    with pytest.raises(ProjectError, match="names 3 vectors that were not read"):
        loaded.transform(rows)


def test_another_length_than_in_training_is_refused():
    own = encoder()
    rows = KEYED.with_columns(pl.lit(1.0).alias(name) for name in own.numerics)
    longer = rows.with_columns(content=pl.Series([[1.0, 2.0, 3.0]] * 4))
    with pytest.raises(ProjectError, match="has 3 numbers; allowed: 2"):
        own.transform(longer)


def test_a_value_of_the_log_is_no_vector(root):
    write_table(root, vectors_of())
    for file in root.glob("log/*/*.parquet"):
        rows = pl.read_parquet(file)
        rows.with_columns(content=pl.lit(1.0)).write_parquet(file)
    context = opened(root)
    rows = built(context)
    table = load_vectors(context.workspace, ["content"], [rows.lazy()])["content"]
    assert len(table.keys) == 11


def test_a_column_of_context_and_table_is_refused(root):
    write_table(root, vectors_of())
    for file in root.glob("log/*/*.parquet"):
        pl.read_parquet(file).with_columns(content=pl.lit(1.0)).write_parquet(file)
    write_project(
        root,
        log={"items": TABLE, "context": ["tab", "content"]},
        features={"embeddings": ["content"]},
    )
    with pytest.raises(ProjectError, match=r"embeddings \(content\): is a column of .* too"):
        built(open_context(str(root / "project.toml"), root, root / "ws"))


def test_read_vectors_keeps_the_order_and_finds_the_missing():
    column = pl.Series("v", [[1, 2], None, [3, 4]])
    known, vectors = read_vectors(column, pl.Series("id", [1, 2, 3]), "table")
    assert known.tolist() == [True, False, True]
    assert vectors.tolist() == [[1, 2], [3, 4]]


def test_without_embeddings_nothing_is_stored(root):
    write_table(root, vectors_of())
    write_project(root, log={"items": TABLE}, features={"categoricals": [{"column": "tab"}]})
    built(open_context(str(root / "project.toml"), root, root / "ws"))
    assert not (root / "ws" / VECTORS).exists()
