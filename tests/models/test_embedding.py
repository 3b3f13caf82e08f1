"""One table of embeddings: separate or shared fields, and sparse gradients."""

from __future__ import annotations

import pytest
import torch

from mtl_ranker.models.embedding import ContentProjection, FeatureEmbedding, PiecewiseLinear
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import Design, Rows, train_ranker
from mtl_ranker.training.network import build_ranker
from tests.training import rows as small

NOTHING = torch.zeros(2, 0)


def test_fields_that_share_read_the_same_rows_and_others_do_not() -> None:
    embedding = FeatureEmbedding(
        [4, 3, 4], [(4, 1)], PiecewiseLinear([], []), 2, share=["item", None, "item", "item"]
    )
    assert embedding.table.weight.shape == (7, 2)
    rows = torch.tensor([[1, 1, 3], [2, 2, 2]])
    vectors = embedding(rows, torch.tensor([[1], [0]]), NOTHING).learned.view(2, 4, 2)
    table = embedding.table.weight
    expected = [
        [table[1], table[4 + 1], table[3], table[1]],
        [table[2], table[4 + 2], table[2], torch.zeros(2)],
    ]
    torch.testing.assert_close(vectors, torch.stack([torch.stack(row) for row in expected]))


def test_sparse_gradients_are_the_dense_ones() -> None:
    torch.manual_seed(0)
    embedding = FeatureEmbedding([50, 9], [(20, 3)], PiecewiseLinear([], []), 4)
    rows, bags = torch.randint(0, 9, (8, 2)), torch.randint(0, 20, (8, 3))
    weight = torch.randn(8, 12)
    gradients = []
    for sparse in (False, True):
        embedding.zero_grad()
        embedding.sparse = sparse
        (embedding(rows, bags, torch.zeros(8, 0)).learned * weight).sum().backward()
        gradients.append(embedding.table.weight.grad)
    assert not gradients[0].is_sparse
    assert gradients[1].is_sparse
    assert len(gradients[1].coalesce().indices()[0]) < 50
    torch.testing.assert_close(gradients[1].to_dense(), gradients[0])


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty", "dwa", "gradnorm", "pcgrad"])
def test_training_is_the_dense_one_where_every_batch_has_every_row(balancing: str) -> None:
    frame = small.frame(512)
    encoder = small.encoder(frame)
    rows = encode_examples(encoder, frame, small.LABELS)
    models = []
    for sparse_rows in (1_000, 1):
        settings = small.settings(
            batch_size=256,
            weight_decay=0.0,
            unknown_rate=0.0,
            sparse_rows=sparse_rows,
            balancing=balancing,
        )
        models.append(
            train_ranker(
                Design(small.spec(), encoder, small.TASKS), Rows(rows, rows), settings, 0
            ).model
        )
    dense, sparse = models
    assert sparse.embedding.sparse == (balancing != "pcgrad")
    # SparseAdam adds its epsilon before the bias correction; rows move by some 0.05 here.
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_rows_that_no_batch_has_stay_as_they_began() -> None:
    frame = small.frame(512)
    encoder = small.encoder(frame)
    rows = encode_examples(encoder, frame, small.LABELS)
    settings = small.settings(sparse_rows=1, weight_decay=0.5, unknown_rate=0.0)
    model = train_ranker(
        Design(small.spec(), encoder, small.TASKS), Rows(rows, rows), settings, 0
    ).model
    torch.manual_seed(0)
    fresh = build_ranker(small.spec(), encoder, small.TASKS, rows.positions)
    moved = (model.embedding.table.weight != fresh.embedding.table.weight).any(1)
    used = torch.zeros(len(moved), dtype=torch.bool)
    used[(rows.categorical + model.embedding.offset).flatten()] = True
    filled = rows.bags > 0
    used[(rows.bags + model.embedding.bag_offset)[filled]] = True
    assert not used.all()
    assert (moved <= used).all()
    assert moved.any()


def test_a_vector_is_projected_and_a_missing_one_has_a_trained_one() -> None:
    content = ContentProjection([1.0, -1.0], 2.0, 3)
    with torch.no_grad():
        content.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]]))
        content.absent.copy_(torch.tensor([0.1, 0.2, 0.3]))
    embedding = FeatureEmbedding(
        [4], [], PiecewiseLinear([[0.0, 10.0]], [False]), 3, names=["id", "n", "c"],
        contents=[content],
    )  # fmt: skip
    numeric = torch.tensor([[5.0, 5.0, 3.0], [10.0, torch.nan, torch.nan]])
    found = embedding(torch.tensor([[1], [2]]), torch.zeros(2, 0).long(), numeric)
    # (5 - 1) / 2 = 2 and (3 + 1) / 2 = 2.
    expected = torch.tensor([[2.0, 2.0, 2.0], [0.1, 0.2, 0.3]])
    torch.testing.assert_close(found.learned[:, 3:], expected)
    torch.testing.assert_close(found.fixed, torch.tensor([[0.5], [1.0]]))
    assert embedding.columns_of(["c"]).tolist() == 3 * [False] + 3 * [True] + [False]
    found.learned.sum().backward()
    assert content.absent.grad.tolist() == [1.0, 1.0, 1.0]
    assert content.weight.grad.isfinite().all()
