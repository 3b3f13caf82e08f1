"""Randomised lists with known propensities: Plackett-Luce rankings by Gumbel noise.

A score with Gumbel noise, sorted, is a Plackett-Luce ranking (Yellott 1977; Kool et al., ICML
2019): the next rank is item i of those left with probability w_i / Σ w, w = exp(score / τ).

A list is drawn twice. The first draw chooses the items: the top k of the candidates' scores with
noise, under the rules. The second draws the order of the chosen items, by new noise. So the
propensity of an item at its position, given the items of the list, is that of a Plackett-Luce
ranking of those items, whatever rules and candidates have decided which items they are.
"""

from __future__ import annotations

from datetime import date

import numpy as np
import polars as pl

EXPLORED, ITEMS, ORDER = 0, 1, 2  # what a random number is for
STEP = 0.3  # of the quadrature; its error falls as exp(-π² / STEP)
LEAST = 1e-12  # smaller probabilities are not computed
CELLS = 2_000_000  # lists × nodes × items in memory at a time


def item_at_position(logit: np.ndarray) -> np.ndarray:
    """P(item n has rank n) of Plackett-Luce rankings of L lists: [L, n].

    Items arrive at exponential times with rates w = exp(logit), so

        P(rank of i is t) = ∫ w_i exp(-w_i x) P(t - 1 of the others arrived before x) dx,

    where the number that arrived is a sum of independent Bernoulli variables. The integral over
    log x is a sum of equal steps.

    Args:
        logit: [L, n], in the order of the list; -inf after the end of a shorter list.

    Returns at least `LEAST`.
    """
    result = np.ones(logit.shape)
    best = logit.max(1, keepdims=True)
    logit = logit - best
    lowest = np.where(np.isfinite(logit), logit, np.inf).min(1)
    nodes = np.ceil((28.0 + np.log(logit.shape[1]) - lowest) / STEP).astype(np.int64)
    order = np.argsort(nodes, kind="stable")
    # Lists of similar numbers of nodes together, as many as fit.
    part = np.cumsum(nodes[order] * logit.shape[1]) // CELLS
    for lists in np.split(order, np.flatnonzero(np.diff(part)) + 1):
        result[lists] = _quadrature(logit[lists], int(nodes[lists].max()))
    return result


def _quadrature(logit: np.ndarray, nodes: int) -> np.ndarray:
    """`item_at_position` with one number of nodes; the best logit of a list is 0."""
    lists, items = logit.shape
    first = -24.0 - np.log(items)
    time = np.exp(first + STEP * np.arange(nodes))[None, :, None]  # [1, Q, 1]
    rate = np.exp(logit)[:, None, :]  # [L, 1, n]
    waiting = np.exp(-rate * time)  # [L, Q, n], P(not arrived)
    arrived = -np.expm1(-rate * time)
    # P(m arrived), m = 0 … n: [L, Q, n + 1].
    count = np.zeros((lists, nodes, items + 1))
    count[..., 0] = 1.0
    for i in range(items):
        a, b = arrived[..., i, None], waiting[..., i, None]
        count[..., 1:] = count[..., 1:] * b + count[..., :-1] * a
        count[..., :1] *= b
    # Without item i: division of the polynomial by (b + a z), in the direction that is stable.
    up, down = np.zeros((lists, nodes, items)), np.zeros((lists, nodes, items))
    rising, falling = np.zeros_like(up), np.zeros_like(up)
    upwards = waiting >= 0.5
    with np.errstate(all="ignore"):  # the branch that is not taken may overflow
        for m in range(items):
            rising = (count[..., m, None] - arrived * rising) / waiting
            up[..., m] = rising[..., m]
        for m in range(items - 1, -1, -1):
            falling = (count[..., m + 1, None] - waiting * falling) / arrived
            down[..., m] = falling[..., m]
        others = np.where(upwards, up, down)
    density = rate * time * waiting
    return np.clip((density * others).sum(1) * STEP, LEAST, 1.0)


def gumbel(keys: np.ndarray, draw: int) -> np.ndarray:
    """Standard Gumbel noise [N] of keys [N] for one of the draws; equal keys have equal noise."""
    return -np.log(-np.log(uniform(keys, draw)))


def uniform(keys: np.ndarray, draw: int) -> np.ndarray:
    """Uniform random numbers in (0, 1), a function of the key and the draw: [N]."""
    mixed = _mixed(keys ^ _mixed(np.full(1, draw, np.uint64)))
    return ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def day_key(seed: int, day: date) -> np.ndarray:
    """The key of a seed on a day: [1]."""
    ordinal = np.full(1, day.toordinal(), np.uint64)
    return _mixed(_mixed(np.full(1, seed, np.uint64)) ^ ordinal)


def with_ids(keys: np.ndarray, ids: pl.Series) -> np.ndarray:
    """Keys [N] (or [1]) combined with ids [N], whole numbers or text.

    They depend on the values only, not on their type's width, on other rows or on a version of a
    library.
    """
    if ids.dtype.is_integer():
        number = ids.to_numpy().astype(np.int64).view(np.uint64)
    else:
        number = _text_numbers(ids.cast(pl.String))
    return _mixed(_mixed(number) ^ keys)


def _text_numbers(ids: pl.Series) -> np.ndarray:
    """FNV-1a (64 bits) of the UTF-8 bytes of each text: [N]."""
    offsets = np.r_[0, ids.str.len_bytes().cum_sum().to_numpy()].astype(np.int64)
    data = np.frombuffer("".join(ids.to_list()).encode(), np.uint8)
    start, length = offsets[:-1], np.diff(offsets)
    value = np.full(len(ids), 0xCBF29CE484222325, np.uint64)
    for place in range(int(length.max(initial=0))):
        more = np.flatnonzero(length > place)
        byte = data[start[more] + place].astype(np.uint64)
        value[more] = (value[more] ^ byte) * np.uint64(0x100000001B3)
    return value


def _mixed(value: np.ndarray) -> np.ndarray:
    """SplitMix64's step (Steele et al., OOPSLA 2014) on each number: [N]."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
