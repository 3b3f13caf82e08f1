"""Batches have every row once; thinned negatives keep totals and calibration."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_ranker.config import Features
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.training.batches import Examples, encode_examples, random_order, thin_negatives


def examples(rows: int, share: float = 0.1) -> Examples:
    generator = torch.Generator().manual_seed(rows)
    row = torch.arange(rows).unsqueeze(1)
    labels = (torch.rand(rows, 2, generator=generator) < share).float()
    return Examples(row, row[:, :0], row.float()[:, :0], labels)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 60), size=st.integers(1, 70))
def test_every_row_once(rows, size):
    batches = list(examples(rows).batches(size, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat([b.categorical for b in batches]).flatten().tolist()) == [*range(rows)]
    assert all(len(b) <= size for b in batches)


def test_thinning_keeps_positives_and_the_weight_of_negatives():
    full = examples(20_000)
    thin = thin_negatives(full, [0, 1], keep=0.25, seed=3)
    positive = full.labels.sum(1) > 0
    kept_positive = thin.labels.sum(1) > 0
    assert int(kept_positive.sum()) == int(positive.sum())
    assert thin.weight[kept_positive].eq(1).all()
    assert thin.weight[~kept_positive].eq(4).all()
    assert abs(len(thin) - float(positive.sum() + 0.25 * (~positive).sum())) < 300
    for t in range(2):
        rate = (thin.labels[:, t] * thin.weight).sum() / thin.weight.sum()
        assert abs(float(rate) - float(full.labels[:, t].mean())) < 0.003


def test_thinning_multiplies_a_sample_weight():
    full = examples(400, share=0.0)
    full = Examples(
        full.categorical, full.bags, full.numeric, full.labels, None, torch.full((400,), 3.0)
    )
    assert thin_negatives(full, [0], keep=0.5, seed=0).weight.unique().tolist() == [6.0]


def test_position_and_weight_are_read_and_missing_ones_filled():
    frame = pl.DataFrame(
        {
            "age": [1.0, 2.0, 3.0],
            "position": [4, None, 0],
            "sample_weight": [2.0, None, 0.5],
            "label_click": [1.0, None, 0.0],
        }
    )
    encoder = Encoder.fit(Features(numerics=["age"]), ["age"], frame)
    encoded = encode_examples(encoder, frame, ["label_click"])
    assert encoded.position.tolist() == [4, -1, 0]
    assert encoded.weight.tolist() == [2.0, 1.0, 0.5]
    assert encoded.labels[:, 0].isnan().tolist() == [False, True, False]


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 3))
def test_lists_come_in_random_order_each_with_all_of_its_rows(lists: list[int], seed: int) -> None:
    rows = replace(examples(len(lists)), lists=torch.tensor(lists, dtype=torch.long))
    order = random_order(rows, torch.Generator().manual_seed(seed), together=True)
    assert sorted(order.tolist()) == list(range(len(lists)))
    ordered = rows.lists[order].tolist()
    starts = [u for n, u in enumerate(ordered) if n == 0 or ordered[n - 1] != u]
    assert len(starts) == len(set(lists))


def test_a_rows_list_is_the_same_number_in_every_frame() -> None:
    encoder = Encoder.fit(Features(), [], pl.DataFrame({"user_id": [1]}))
    frames = [pl.DataFrame({"user_id": ids, "tab": "a"}) for ids in ([7, 8, 7], [8], [7])]
    one, two, three = (
        encode_examples(encoder, frame, [], ["user_id", "tab"]).lists.tolist() for frame in frames
    )
    assert one == [three[0], two[0], three[0]]
    assert two != three
    assert encode_examples(encoder, frames[0], []).lists is None
