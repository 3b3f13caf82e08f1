"""Match features: whether a user's value is an item's, where both come from one vocabulary.

Models without such a feature must learn the product of two embeddings to find that an item's
category is among a user's favourites, which takes many more rows than a number that compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import polars as pl

from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import value_type

if TYPE_CHECKING:
    from mtl_ranker.features.encoders import Vocabulary

Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)

MIN_COMMON = 2  # values that two columns of text must have in common to be compared


@dataclass(frozen=True)
class Match:
    """A column of the user and one of the item whose values come from one vocabulary.

    A match feature compares both on each row: 1 or 0 for two single values, or for a value and a
    list that may hold it; the number of common values for two lists; missing where either is.

    Attributes:
        user, item: the columns.
        user_list, item_list: whether each holds lists.
    """

    user: str
    item: str
    user_list: bool
    item_list: bool

    @property
    def name(self) -> str:
        return f"match_{self.user}_{self.item}"

    def feature(self, kinds: Mapping[str, pl.DataType]) -> pl.Expr:
        """The feature of rows with both columns, of these types."""
        user, item = pl.col(self.user), pl.col(self.item)
        if self.user_list and self.item_list:
            both = user.list.drop_nulls().list.set_intersection(item.list.drop_nulls())
            value = both.list.len()
        elif self.user_list or self.item_list:
            many, one = (user, item) if self.user_list else (item, user)
            kind = kinds[self.user if self.user_list else self.item]
            if isinstance(kind, pl.List):
                one = one.cast(kind.inner, strict=False)
            value = pl.when(one.is_not_null()).then(many.list.contains(one))
        else:
            value = user == item
        return value.cast(pl.Float32).alias(self.name)


def find_matches(
    categoricals: Sequence[Vocabulary],
    lists: Sequence[Vocabulary],
    sides: Mapping[str, str],
    declared: bool = False,
) -> list[Match]:
    """The pairs of a user's and an item's column that share a vocabulary.

    They do if they have the same `share`, or if both hold text and at least half of the known
    values of the column with fewer of them, and two at least, are known values of the other.

    Args:
        sides: column → "user" or "item".
        declared: only those with the same `share`.
    """
    found = []
    fields = [(v, False) for v in categoricals] + [(v, True) for v in lists]
    for user, user_list in fields:
        for item, item_list in fields:
            of_both = (sides.get(user.column), sides.get(item.column)) == ("user", "item")
            shared = user.share is not None and user.share == item.share
            if of_both and (shared or (not declared and _same_values(user, item))):
                found.append(Match(user.column, item.column, user_list, item_list))
    return found


def _same_values(one: Vocabulary, other: Vocabulary) -> bool:
    values = [{v for v in each.values if isinstance(v, str)} for each in (one, other)]
    common = len(values[0] & values[1])
    return common >= MIN_COMMON and common >= min(map(len, values)) / 2


def match_feature(match: Match, user: pl.Series, item: pl.Series) -> pl.Series:
    """A match feature of N rows, given as two columns."""
    both = pl.DataFrame([user.alias(match.user), item.alias(match.item)])
    return with_matches(both, [match])[match.name]


def with_matches(rows: Frame, matches: Sequence[Match]) -> Frame:
    """Rows with a column for each match feature.

    Text instead of lists becomes lists, as in `Encoder.transform`. A single value is compared in
    the type of the list's values; a caller's whole numbers may arrive as floats. Raises
    ProjectError for text that would be compared with other values.
    """
    if not matches:
        return rows
    columns = dict.fromkeys(c for m in matches for c in (m.user, m.item))
    kinds = rows.lazy().select(*columns).collect_schema()
    lists = {m.user for m in matches if m.user_list} | {m.item for m in matches if m.item_list}
    text = [pl.col(c).cast(pl.List(pl.String)) for c in lists if not isinstance(kinds[c], pl.List)]
    for match in matches:
        _check_types(match, kinds)
    return rows.with_columns(text).with_columns(match.feature(kinds) for match in matches)


def _check_types(match: Match, kinds: Mapping[str, pl.DataType]) -> None:
    """Raise ProjectError unless both columns hold text, or neither does."""
    types = [value_type(kinds[column]) for column in (match.user, match.item)]
    if pl.Null not in types and (types[0] == pl.String) != (types[1] == pl.String):
        raise ProjectError(
            f"{match.name} (features.matches): column {match.user!r} of the user is "
            f"{kinds[match.user]}, but {match.item!r} of the item is {kinds[match.item]}; allowed: "
            "text in both, or numbers in both"
        )
