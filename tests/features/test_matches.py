"""Match features: which columns are compared, and what the comparison says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_ranker.config import Categorical, Features, ListColumn
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.features.matches import Match, with_matches

SIDES = {"home": "user", "liked": "user", "city": "item", "tags": "item"}
ROWS = pl.DataFrame(
    {
        "home": ["a", "b", "c", None, "zz"],
        "liked": [["a", "b"], ["c"], [], None, ["b", "a"]],
        "city": ["a", "c", "c", "b", None],
        "tags": [["b", "a", "a"], ["b"], ["a"], ["c"], ["c", None]],
    }
)
FEATURES = Features(
    categoricals=[Categorical(column="home"), Categorical(column="city")],
    lists=[ListColumn(column="liked", max_length=2), ListColumn(column="tags", max_length=1)],
)


def test_by_hand():
    encoder = Encoder.fit(FEATURES, [], ROWS, sides=SIDES)
    names = ["match_home_city", "match_home_tags", "match_liked_city", "match_liked_tags"]
    assert encoder.numerics == names
    assert encoder.columns == ["home", "city", "liked", "tags"]
    none = float("nan")
    expected = [
        [1, 0, 1, none, none],
        [1, 1, 0, none, 0],
        [1, 1, 0, none, none],
        [2, 0, 0, none, 0],
    ]
    np.testing.assert_array_equal(encoder.transform(ROWS).numeric.T, expected)
    assert encoder.missing == [True] * 4


def test_only_columns_of_both_sides_with_common_values_are_compared():
    def names(rows: pl.DataFrame, features: Features = FEATURES, **sides: str) -> list[str]:
        return Encoder.fit(features, [], rows, sides=sides or SIDES).numerics

    assert names(ROWS, home="user", city="user", liked="user", tags="user") == []
    assert Encoder.fit(FEATURES, [], ROWS).numerics == []
    few = ROWS.with_columns(city=pl.Series(["a", "x", "y", "z", "a"]))  # one value in common
    assert names(few, home="user", city="item") == []
    two = ROWS.with_columns(city=pl.Series(["a", "b", "x", "y", "z"]))  # two of four
    assert names(two, home="user", city="item") == ["match_home_city"]
    less = ROWS.with_columns(
        home=pl.Series(["a", "b", "c", "d", "e"]), city=pl.Series(["a", "b", "x", "y", "z"])
    )  # two of five
    assert names(less, home="user", city="item") == []
    numbers = ROWS.with_columns(home=pl.Series([1, 2, 3, 4, 5]), city=pl.Series([1, 2, 3, 4, 5]))
    assert names(numbers, home="user", city="item") == []
    shared = Features(
        categoricals=[
            Categorical(column="home", share="place"),
            Categorical(column="city", share="place"),
        ]
    )
    assert names(numbers, shared, home="user", city="item") == ["match_home_city"]
    assert names(less, shared, home="user", city="item") == ["match_home_city"]
    declared = shared.model_copy(update={"matches": "share"})
    assert names(numbers, declared, home="user", city="item") == ["match_home_city"]
    assert names(two, FEATURES.model_copy(update={"matches": "share"})) == []
    for features in (FEATURES, shared):
        assert names(two, features.model_copy(update={"matches": "none"})) == []


@pytest.mark.parametrize(
    ("home", "city"),
    [
        ([1], ["a"]),
        (["a"], [1]),
        ([["a"]], [1]),
        ([[1]], [["a"]]),
    ],
)
def test_text_is_not_compared_with_numbers(home, city):
    frame = pl.DataFrame({"home": home, "city": city})
    match = Match("home", "city", isinstance(home[0], list), isinstance(city[0], list))
    with pytest.raises(
        ProjectError,
        match=r"match_home_city \(features.matches\): column 'home' of the user is \S+, "
        r"but 'city' of the item is \S+; allowed: text in both, or numbers in both",
    ):
        with_matches(frame, [match])
    missing = with_matches(frame.with_columns(city=pl.lit(None)), [replace(match, item_list=False)])
    assert missing["match_home_city"].to_list() == [None]


def test_shared_columns_without_a_value_take_the_type_of_the_others():
    features = Features(
        categoricals=[
            Categorical(column="home", share="place"),
            Categorical(column="city", share="place"),
        ]
    )
    rows = pl.DataFrame({"home": [None, None], "city": ["a", "b"]})
    encoder = Encoder.fit(features, [], rows, sides=SIDES)
    assert [v.values for v in encoder.categoricals] == [["a", "b"]] * 2


values = st.one_of(st.none(), st.sampled_from("abc"))
lists = st.one_of(st.none(), st.lists(st.sampled_from("abc"), max_size=4))


@given(st.lists(st.tuples(values, lists, values, lists), min_size=1, max_size=8))
def test_equals_a_naive_loop(rows):
    schema = {"home": pl.String, "liked": pl.List(pl.String)}
    schema |= {"city": pl.String, "tags": pl.List(pl.String)}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    matches = [
        Match("home", "city", False, False),
        Match("home", "tags", False, True),
        Match("liked", "city", True, False),
        Match("liked", "tags", True, True),
    ]
    found = with_matches(frame, matches).select(match.name for match in matches).rows()
    for (home, liked, city, tags), values in zip(rows, found, strict=True):
        pairs = [(home, city), (home, tags), (liked, city), (liked, tags)]
        for (user, item), value in zip(pairs, values, strict=True):
            if user is None or item is None:
                assert value is None
            else:
                both = set(user) & set(item)
                assert value == len(both)


def test_a_saved_encoder_compares_as_before(tmp_path):
    encoder = Encoder.fit(FEATURES, [], ROWS, sides=SIDES)
    encoder.save(tmp_path / "encoder.json")
    again = Encoder.load(tmp_path / "encoder.json")
    assert again == encoder
    np.testing.assert_array_equal(encoder.transform(ROWS).numeric, again.transform(ROWS).numeric)


def test_values_of_another_number_type_are_compared_and_nulls_are_no_common_value():
    rows = pl.DataFrame({"liked": [[1, 2], [3]], "kind": [1.0, None], "seen": [[None, 2], [None]]})
    matches = [Match("liked", "kind", True, False), Match("liked", "seen", True, True)]
    found = with_matches(rows, matches).select(match.name for match in matches)
    assert found.rows() == [(1.0, 1.0), (None, 0.0)]
    nulls = pl.DataFrame({"liked": [[None, 1]], "seen": [[None, 2]]})
    assert with_matches(nulls, matches[1:])["match_liked_seen"].to_list() == [0.0]
