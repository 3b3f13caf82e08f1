"""Target attention: against a plain loop, its invariances, and pairs against whole rows."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_ranker.models.attention import TargetAttention
from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.pairs import ITEM, PAIR, USER, ItemSide, PairInput, Sides

COLUMNS, WIDTH, LENGTH = 2, 4, 5


def make_attention(
    heads: int = 1,
) -> tuple[TargetAttention, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    attention = TargetAttention(COLUMNS, WIDTH, LENGTH, heads)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter).requires_grad_(False)
    target, history = torch.randn(6, COLUMNS, WIDTH), torch.randn(6, LENGTH, COLUMNS, WIDTH)
    filled = torch.rand(6, LENGTH) < 0.6
    filled[0], filled[1] = True, False
    return attention, target, history, filled


def test_equals_the_formula_in_loops():
    attention, target, history, filled = make_attention()
    outputs = attention(target, history, filled)
    assert outputs.shape == (6, 2 * COLUMNS * WIDTH)
    for row in range(6):
        t = target[row].flatten().double()
        score = {}
        for k in range(LENGTH):
            if filled[row, k]:
                h = history[row, k].flatten().double()
                score[k] = float(t @ attention.mix[0].double() @ h) / math.sqrt(COLUMNS * WIDTH)
                score[k] += float(attention.recency[0, k])
        total = sum(math.exp(s) for s in score.values())
        v = torch.zeros(COLUMNS * WIDTH, dtype=torch.float64)
        for k, s in score.items():
            v += math.exp(s) / total * history[row, k].flatten().double()
        expected = torch.cat([v, t * v]).float()
        torch.testing.assert_close(outputs[row], expected, rtol=1e-4, atol=1e-5)
    assert not outputs[1].any()


def test_empty_slots_have_no_effect_and_order_only_by_recency():
    attention, target, history, filled = make_attention()
    other = torch.where(filled[:, :, None, None], history, torch.randn_like(history))
    torch.testing.assert_close(attention(target, other, filled), attention(target, history, filled))
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = history[:, order], filled[:, order]
    assert not torch.allclose(attention(target, *shuffled), attention(target, history, filled))
    torch.nn.init.zeros_(attention.recency)
    torch.testing.assert_close(attention(target, *shuffled), attention(target, history, filled))


def test_heads_share_nothing():
    """Each objective of an `unshared` model has a part of every embedding, and of every output."""
    attention, target, history, filled = make_attention(heads=2)
    before = attention(target, history, filled).view(6, 2 * COLUMNS, 2, WIDTH // 2)
    for tensor in (target, history):
        tensor[..., WIDTH // 2 :] += 1.0
    after = attention(target, history, filled).view(6, 2 * COLUMNS, 2, WIDTH // 2)
    torch.testing.assert_close(after[:, :, 0], before[:, :, 0])
    assert not torch.allclose(after[0, :, 1], before[0, :, 1])


@pytest.mark.parametrize("heads", [1, 2])
def test_pairs_attend_as_whole_rows_do(heads):
    """With a categorical, a list, and a column that belongs to the user (the surface)."""
    torch.manual_seed(0)
    share = ["item", "surface", "tag", "item", "surface", "tag"]
    embedding = FeatureEmbedding(
        [9, 3],
        [(6, 2), (9, 4), (3, 4), (6, 4)],
        PiecewiseLinear([[0.0, 1.0, 2.0]] * 2, [True, False]),
        4,
        ["item", "surface", "tag", "h_item", "h_surface", "h_tag", "age", "rate"],
        share,
        [[(0, 3), (1, 4), (2, 5)]],
        heads,
    )
    assert embedding.table.weight.shape == (18, 4)
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter)
    part = [ITEM, USER, ITEM, USER, USER, USER, USER, PAIR]
    users, items, pairs = 5, 7, 40
    user, item = torch.randint(0, users, (pairs,)), torch.randint(0, items, (pairs,))

    def rows(count: int) -> list[torch.Tensor]:
        fields = [torch.randint(0, size, (count, 1)) for size in (9, 3)]
        bags = [torch.randint(0, size, (count, n)) for size, n in ((6, 2), (9, 4), (3, 4), (6, 4))]
        return [torch.cat(fields, 1), torch.cat(bags, 1), torch.rand(count, 2) * 2]

    user_rows, item_rows = rows(users), rows(items)
    user_rows[1][0, 2:] = 0  # a user without history
    pair_numbers = torch.rand(pairs, 1) * 2
    whole = [
        torch.stack([item_rows[0][item, 0], user_rows[0][user, 1]], 1),
        torch.cat([item_rows[1][item, :2], user_rows[1][user, 2:]], 1),
        torch.cat([user_rows[2][user, :1], pair_numbers], 1),
    ]
    expected = embedding(*whole).row()
    sides = Sides(ItemSide(embedding, tuple(item_rows), part), tuple(user_rows))
    pair_input = PairInput(sides, user, item, pair_numbers)
    torch.testing.assert_close(pair_input.row(), expected)
    weight = torch.randn(3, embedding.outputs)
    torch.testing.assert_close(
        pair_input.project(weight, reader=weight), weight @ expected.t(), rtol=1e-4, atol=1e-4
    )
