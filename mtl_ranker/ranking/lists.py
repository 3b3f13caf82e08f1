"""Ranked lists under rules, chosen rank by rank for all users at once.

A list is filled from rank 1. At each rank every user gets the candidate of the highest utility
among those that the rules allow there:

- at most m of one value in any k consecutive ranks: a candidate is not allowed while m of the k - 1
  ranks before have its value. If nothing is allowed, the list ends;
- at least m fresh items in the ranks 1 to k, k + 1 to 2k, …: once as many ranks are left in the
  window as fresh items are missing, only fresh items are allowed, if there are any;
- maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): the utility of a candidate is
  (1 - w) u / s - w max_j sim(i, j) over the higher ranks j, with s the standard deviation of the
  scores of the user's candidates. The similarity of two items is [they have the same value], or the
  cosine of their vectors where it is positive; 0 without a value.

Equal utilities are in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

POOL = 4  # lists are first filled from this many times as many of a user's best rows as needed
PAIRS = 1 << 25  # cosines of all pairs of a user's rows in memory; beyond, of a list's rows only
NO_VALUE = -1  # code of a missing value, which no rule counts


@dataclass(frozen=True)
class Candidates:
    """N candidates of U users, sorted by user; others of these users may be left out.

    Attributes:
        user: [N], 0 to U - 1, ascending; each occurs.
        score: [N].
        spread: [U], standard deviation of the scores of all of a user's candidates; 1 without any.
        outside: [U], best score of a user's candidates that are left out; -inf without any.
        flagged: [U], the same of those with the quota's flag.
    """

    user: np.ndarray
    score: np.ndarray
    spread: np.ndarray
    outside: np.ndarray
    flagged: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """First row of each user: [U]."""
        return np.flatnonzero(np.diff(self.user, prepend=-1))

    def of_users(self, chosen: np.ndarray) -> tuple[np.ndarray, Candidates]:
        """Rows of the chosen users [U], and their candidates."""
        rows = np.flatnonzero(chosen[self.user])
        user = (np.cumsum(chosen) - 1)[self.user[rows]]
        facts = (self.spread[chosen], self.outside[chosen], self.flagged[chosen])
        return rows, Candidates(user, self.score[rows], *facts)


@dataclass(frozen=True)
class Limit:
    """At most `count` rows with one code in `within` consecutive ranks.

    Attributes:
        code: [N], of the user and the value, from 0; NO_VALUE for none.
    """

    code: np.ndarray
    count: int
    within: int


@dataclass(frozen=True)
class Quota:
    """At least `count` rows with the flag in each window of `within` ranks.

    Attributes:
        flag: [N] booleans.
    """

    flag: np.ndarray
    count: int
    within: int

    def needed(self, top_k: int) -> int:
        """Rows with the flag that lists of `top_k` ranks need at least."""
        return rows_needed(self.count, self.within, top_k)


@dataclass(frozen=True)
class Repetition:
    """Similarity 1 to rows with the same code.

    Attributes:
        code: as of `Limit`.
        weight: w of the module's formula.
    """

    code: np.ndarray
    weight: float

    def of_rows(self, rows: np.ndarray) -> Repetition:
        return replace(self, code=self.code[rows])

    def similarity(self, user: np.ndarray) -> Generator[np.ndarray, np.ndarray, None]:
        """See `Closeness.similarity`."""
        repeated = np.zeros(_codes(self.code), bool)
        row = np.zeros(0, np.int64)
        while True:
            repeated[_known(self.code[row])] = True
            row = yield (self.code != NO_VALUE) & repeated[self.code]


@dataclass(frozen=True)
class Closeness:
    """Similarity of vectors: their cosine where it is positive.

    Attributes:
        code: row [N] of `vectors`; NO_VALUE for none.
        vectors: [M, D], of length 1 or 0.
        weight: w of the module's formula.
    """

    code: np.ndarray
    vectors: np.ndarray
    weight: float

    def of_rows(self, rows: np.ndarray) -> Closeness:
        return replace(self, code=self.code[rows])

    def similarity(self, user: np.ndarray) -> Generator[np.ndarray, np.ndarray, None]:
        """A generator of the largest similarity [N] of each row to its user's list so far.

        It is sent the rows that are added to lists, one at most of each user.

        Args:
            user: [N], ascending from 0; each occurs.
        """
        own = self.vectors[self.code].astype(np.float64)
        own[self.code == NO_VALUE] = 0
        starts = np.flatnonzero(np.diff(user, prepend=-1))
        place = np.arange(len(user)) - np.repeat(starts, np.diff(starts, append=len(user)))
        users, size = len(starts), int(place.max(initial=-1)) + 1
        nearest = np.zeros(len(user), np.float32)
        cell = user * size + place
        if users * size * size <= PAIRS:
            padded = np.zeros((users * size, own.shape[1]))
            padded[cell] = own
            padded = padded.reshape(users, size, own.shape[1])
            pairs = (padded @ padded.transpose(0, 2, 1)).astype(np.float32)
            pairs = pairs.reshape(users * size, size)
        while True:
            row = yield nearest
            # Lists that have ended keep 0.
            if users * size * size <= PAIRS:
                cosine = np.zeros((users, size), np.float32)
                cosine[user[row]] = pairs[cell[row]]
                cosine = cosine.ravel().take(cell)
            else:
                shown = np.zeros((users, own.shape[1]))
                shown[user[row]] = own[row]
                cosine = np.vecdot(own, shown[user]).astype(np.float32)
            np.maximum(nearest, cosine, out=nearest)


@dataclass(frozen=True)
class ListRules:
    """The rules on a whole list; without any, the list is in the order of the utility."""

    limits: Sequence[Limit] = ()
    quota: Quota | None = None
    diversity: Repetition | Closeness | None = None

    def of_rows(self, rows: np.ndarray) -> ListRules:
        """The same rules for some of the rows, given by index."""
        return ListRules(
            [replace(limit, code=limit.code[rows]) for limit in self.limits],
            None if self.quota is None else replace(self.quota, flag=self.quota.flag[rows]),
            None if self.diversity is None else self.diversity.of_rows(rows),
        )

    def compact(self) -> ListRules:
        """The same rules with codes of values from 0 without gaps."""
        diversity = self.diversity
        if isinstance(diversity, Repetition):
            diversity = replace(diversity, code=_compact(diversity.code))
        limits = [replace(limit, code=_compact(limit.code)) for limit in self.limits]
        return replace(self, limits=limits, diversity=diversity)


def rows_needed(count: int, within: int, top_k: int) -> int:
    """Flagged rows in lists of `top_k` ranks with `count` in each window of `within` ranks."""
    windows, rest = divmod(top_k, within)
    return windows * count + min(count, rest)


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Vectors [M, D] divided by their length; those of length 0 as they are."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def choose(
    candidates: Candidates, utility: np.ndarray, rules: ListRules, top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of each user's list and their ranks from 1, sorted by user and rank.

    Lists are filled from each user's best rows. Those of users for whom another row might have been
    better are filled again from all rows.

    Args:
        utility: [N], by which rows are chosen: the score, or the score with noise.
        top_k: length of the lists at most.

    Returns rows, ranks, and which users' lists [U] are certain: no candidate that is left out could
    be in them.
    """
    relevance = utility.astype(np.float64)
    if rules.diversity is not None:
        factor = (1 - rules.diversity.weight) / candidates.spread
        relevance = factor[candidates.user] * relevance
        scaled = {"outside": factor * candidates.outside, "flagged": factor * candidates.flagged}
        candidates = replace(candidates, **scaled)
    near = _best_rows(candidates, relevance, rules, top_k)
    row, rank, certain = _fill(candidates, relevance, (rules, near), top_k)
    if not certain.all() and not near.all():
        again, own = candidates.of_users(~certain)
        everything = (rules.of_rows(again), np.ones(len(again), bool))
        more, place, now = _fill(own, relevance[again], everything, top_k)
        kept = certain[candidates.user[row]]
        row, rank = np.r_[row[kept], again[more]], np.r_[rank[kept], place]
        certain[~certain] = now
    order = np.lexsort((rank, candidates.user[row]))
    return row[order], rank[order], certain


def _best_rows(
    candidates: Candidates, relevance: np.ndarray, rules: ListRules, top_k: int
) -> np.ndarray:
    """Which rows [N] are among the best of their user, or of their user's flagged rows."""
    user = candidates.user
    if np.bincount(user).max(initial=0) <= POOL * top_k:
        return np.ones(len(user), bool)

    def best(rows: np.ndarray, count: int) -> np.ndarray:
        own, value = user[rows], relevance[rows]
        if ((np.diff(value) > 0) & (np.diff(own) == 0)).any():
            order = np.lexsort((-value, own))  # stable: equal values stay in the order of rows
            rows, own = rows[order], own[order]
        first = np.flatnonzero(np.diff(own, prepend=-1))
        place = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
        return rows[place < count]

    near = np.zeros(len(user), bool)
    near[best(np.arange(len(user)), POOL * top_k)] = True
    if rules.quota is not None:
        flagged = np.flatnonzero(rules.quota.flag)
        near[best(flagged, POOL * rules.quota.needed(top_k))] = True
    return near


def _fill(
    candidates: Candidates,
    relevance: np.ndarray,
    given: tuple[ListRules, np.ndarray],
    top_k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and ranks of lists that are filled from some rows, and which users' are certain [U].

    A list is certain if no other row could have been chosen: at each rank the chosen one is better
    than the best of the other rows would be if it were allowed and like no row of the list.

    Args:
        candidates: with `outside` and `flagged` in the unit of the relevance.
        relevance: [N], of all rows.
        given: the rules, and booleans [N] of the rows that lists are filled from.
    """
    (rules, near), user, users = given, candidates.user, len(candidates.outside)
    outside = candidates.outside.copy()  # the best relevance of another row
    flagged = candidates.flagged.copy()  # and of another row with the quota's flag
    np.maximum.at(outside, user[~near], relevance[~near])
    if rules.quota is not None:
        rest = rules.quota.flag & ~near
        np.maximum.at(flagged, user[rest], relevance[rest])
    place = np.flatnonzero(near)
    user, relevance, rules = user[place], relevance[place], rules.of_rows(place).compact()
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    certain, alive = np.ones(users, bool), np.ones(len(user), bool)
    shown = [np.zeros(_codes(limit.code), np.int32) for limit in rules.limits]
    likeness = None if rules.diversity is None else rules.diversity.similarity(user)
    similarity = np.zeros(0) if likeness is None else next(likeness)
    missing = np.zeros(users, np.int64)  # flagged rows that the window still needs
    chosen: list[np.ndarray] = []
    for step in range(top_k if len(user) else 0):
        allowed = alive.copy()
        for limit, count in zip(rules.limits, shown, strict=True):
            if step >= limit.within:
                np.subtract.at(count, _known(limit.code[chosen[step - limit.within]]), 1)
            allowed &= (limit.code == NO_VALUE) | (count < limit.count)[limit.code]
        bound = np.zeros(users, bool)
        if rules.quota is not None:
            end = min(top_k, step - step % rules.quota.within + rules.quota.within)
            if step % rules.quota.within == 0:
                missing[:] = min(rules.quota.count, end - step)
            bound = (missing >= end - step) & (missing > 0)
            fresh = allowed & rules.quota.flag
            has_fresh = np.logical_or.reduceat(fresh, starts)
            certain &= ~bound | has_fresh | (flagged == -np.inf)
            bound &= has_fresh
            allowed = np.where(bound[user], fresh, allowed)
        value = relevance
        if rules.diversity is not None:
            value = relevance - rules.diversity.weight * similarity
        value = np.where(allowed, value, -np.inf)
        best = np.maximum.reduceat(value, starts)
        other = np.where(bound, flagged, outside)
        certain &= (best > other) | (other == -np.inf)
        hits = np.flatnonzero(allowed & (value == best[user]))
        row = hits[np.diff(user[hits], prepend=-1) > 0]
        if len(row) < users:  # a list that has ended has no later rank
            goes_on = np.zeros(users, bool)
            goes_on[user[row]] = True
            alive &= goes_on[user]
        if not len(row):
            break
        alive[row] = False
        for limit, count in zip(rules.limits, shown, strict=True):
            np.add.at(count, _known(limit.code[row]), 1)
        if rules.quota is not None:
            missing[user[row]] -= rules.quota.flag[row]
        if likeness is not None:
            similarity = likeness.send(row)
        chosen.append(row)
    ranks = np.repeat(np.arange(1, len(chosen) + 1), [len(step) for step in chosen])
    rows = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    return place[rows], ranks, certain


def _compact(code: np.ndarray) -> np.ndarray:
    known = code != NO_VALUE
    result = np.full(len(code), NO_VALUE)
    result[known] = np.unique(code[known], return_inverse=True)[1]
    return result


def _codes(code: np.ndarray) -> int:
    return int(code.max(initial=0)) + 1


def _known(code: np.ndarray) -> np.ndarray:
    return code[code != NO_VALUE]
