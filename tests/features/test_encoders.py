"""The encoder: unknowns, missing values, hashing, and a round trip without pickle."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from mtl_ranker.config import Categorical, Features, ListColumn
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.encoders import Encoder, quantile_edges

FEATURES = Features(
    categoricals=[
        Categorical(column="city", min_count=2),
        Categorical(column="user_id", hash_buckets=16),
    ],
    lists=[ListColumn(column="tags", max_length=2)],
    bins=2,
)
TRAIN = pl.DataFrame(
    {
        "city": ["a", "a", "b", None, "c", "c"],
        "user_id": [1, 2, 3, 4, 5, 6],
        "tags": [["x"], ["y", "x"], [], None, ["x", "y", "z"], ["y"]],
        "n": [0.0, 1.0, 2.0, 3.0, 4.0, None],
    }
)


def test_vocabulary_unknown_missing_and_rare():
    encoder = Encoder.fit(FEATURES, ["n"], TRAIN)
    rows = TRAIN.head(2).with_columns(city=pl.Series(["c", "never seen"]))
    assert encoder.categoricals[0].values == ["a", "c"]
    assert encoder.transform(rows).categorical[:, 0].tolist() == [2, 0]
    assert encoder.transform(TRAIN).categorical[:, 0].tolist() == [1, 1, 0, 0, 2, 2]


def test_lists_are_padded_and_cut():
    encoded = Encoder.fit(FEATURES, ["n"], TRAIN).transform(TRAIN)
    assert encoded.bags.tolist() == [[1, 0], [2, 1], [0, 0], [0, 0], [1, 2], [2, 0]]


def test_numeric_edges_are_training_quantiles_and_missing_is_nan():
    encoder = Encoder.fit(FEATURES, ["n"], TRAIN)
    assert encoder.edges == [[0.0, 2.0, 4.0]]
    assert encoder.missing == [True]
    assert np.isnan(encoder.transform(TRAIN).numeric[5, 0])


def test_hashing_is_stable_and_in_range():
    encoded = Encoder.fit(FEATURES, ["n"], TRAIN).transform(TRAIN)
    codes = encoded.categorical[:, 1]
    assert codes.min() >= 1
    assert codes.max() <= 16
    wide = TRAIN.with_columns(pl.col("user_id").cast(pl.Int32))
    assert (Encoder.fit(FEATURES, ["n"], wide).transform(wide).categorical[:, 1] == codes).all()


def test_round_trip_through_json(tmp_path):
    encoder = Encoder.fit(FEATURES, ["n"], TRAIN)
    encoder.save(tmp_path / "encoder.json")
    loaded = Encoder.load(tmp_path / "encoder.json")
    assert loaded == encoder
    saved_rows, loaded_rows = encoder.transform(TRAIN), loaded.transform(TRAIN)
    for name in ("categorical", "bags", "numeric"):
        np.testing.assert_array_equal(getattr(saved_rows, name), getattr(loaded_rows, name))


def test_missing_column_and_infinite_values_are_named():
    encoder = Encoder.fit(FEATURES, ["n"], TRAIN)
    with pytest.raises(ProjectError, match="city"):
        encoder.transform(TRAIN.drop("city"))
    with pytest.raises(ProjectError, match=r"'n'.*infinite"):
        Encoder.fit(FEATURES, ["n"], TRAIN.with_columns(n=pl.lit(float("inf"))))


def test_a_value_that_fills_whole_bins_gets_one_edge_and_the_others_the_remaining_bins():
    """Nine of ten people have no capital gains; the gains of the tenth fill the other bins."""
    gains = np.r_[np.zeros(900), np.arange(1, 101)].astype(float)
    edges = quantile_edges(gains, 4)
    assert edges.tolist() == [0.0, 1.0, 34.0, 67.0, 100.0]
    assert quantile_edges(np.arange(101.0), 4).tolist() == [0.0, 25.0, 50.0, 75.0, 100.0]
    assert quantile_edges(np.ones(5), 4).tolist() == [1.0]


def test_a_long_tail_gets_further_edges_and_a_uniform_distribution_none():
    rng = np.random.default_rng(0)
    even = rng.random(10_000)
    np.testing.assert_array_equal(quantile_edges(even, 8, 4), quantile_edges(even, 8))
    heavy = np.exp(3 * rng.normal(size=10_000))
    plain, tailed = quantile_edges(heavy, 8), quantile_edges(heavy, 8, 4)
    more = sorted(set(tailed) - set(plain))
    assert len(more) == 4
    assert more[0] > plain[-2]
    # By hand: each further edge is the median of the values above the previous one.
    low = plain[-2]
    for edge in more:
        assert edge == np.quantile(heavy[heavy > low], 0.5, method="nearest")
        low = edge
    mirrored = quantile_edges(-heavy, 8, 4)
    assert len(set(mirrored) - set(quantile_edges(-heavy, 8))) == 4
    assert mirrored[2] < quantile_edges(-heavy, 8)[1]


def test_columns_that_share_have_one_vocabulary(tmp_path):
    features = Features(
        categoricals=[
            Categorical(column="author", min_count=2, share="author"),
            Categorical(column="last_author", min_count=3, share="author"),
        ],
        lists=[ListColumn(column="followed", min_count=2, max_length=2, share="author")],
    )
    rows = pl.DataFrame(
        {"author": ["a", "b"], "last_author": ["c", "a"], "followed": [["b", "c"], ["d"]]}
    )
    encoder = Encoder.fit(features, [], rows)
    assert {tuple(v.values) for v in (*encoder.categoricals, *encoder.lists)} == {("a", "b", "c")}
    encoded = encoder.transform(rows)
    assert encoded.categorical.tolist() == [[1, 3], [2, 1]]
    assert encoded.bags.tolist() == [[2, 3], [0, 0]]
    encoder.save(tmp_path / "encoder.json")
    assert Encoder.load(tmp_path / "encoder.json") == encoder


def test_columns_of_other_types_cannot_share():
    features = Features(
        categoricals=[
            Categorical(column="city", share="place"),
            Categorical(column="user_id", share="place"),
        ]
    )
    with pytest.raises(
        ProjectError, match=r"categoricals \(city\) is String, and both have share ="
    ):
        Encoder.fit(features, [], TRAIN)


def test_columns_hashed_differently_cannot_share():
    columns = [
        Categorical(column="a", share="s", hash_buckets=8),
        Categorical(column="b", share="s"),
    ]
    with pytest.raises(ValueError, match=r"share = 's': hash_buckets \[None, 8\]"):
        Features(categoricals=columns)


def test_an_extended_encoder_keeps_its_indices_and_appends_new_values():
    """Edges stay; a new value needs `min_count` of the new rows; shared columns grow together."""
    features = FEATURES.model_copy(
        update={
            "categoricals": [
                *FEATURES.categoricals,
                Categorical(column="author", share="author"),
                Categorical(column="last_author", share="author"),
            ]
        }
    )
    authors = pl.DataFrame({"author": list("mmnnmn"), "last_author": list("nnnnnn")})
    encoder = Encoder.fit(features, ["n"], TRAIN.with_columns(authors))
    further = pl.DataFrame(
        {
            "city": ["c", "b", "b", "0", "d", "d"],
            "user_id": [7] * 6,
            "tags": [["a"], [], None, ["y"], [], []],
            "author": ["m"] * 6,
            "last_author": ["a"] * 6,
            "n": [900.0] * 6,
        }
    )
    extended = encoder.extended(features, further)
    assert [v.values for v in extended.categoricals] == [
        ["a", "c", "b", "d"],  # "b" was too rare before, "0" is too rare
        [],
        ["m", "n", "a"],
        ["m", "n", "a"],
    ]
    assert extended.lists[0].values == ["x", "y", "z", "a"]
    assert (extended.edges, extended.missing) == (encoder.edges, encoder.missing)
    before, after = (e.transform(TRAIN.with_columns(authors)) for e in (encoder, extended))
    known = before.categorical > 0
    assert (after.categorical[known] == before.categorical[known]).all()
    assert extended.extended(features, further) == extended
