"""Rows with vectors: in memory and from files, trained, resumed, and without them for trees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from mtl_ranker.features.encoders import Encoder
from mtl_ranker.features.vectors import VectorTable
from mtl_ranker.models.presets import PRESETS, make
from mtl_ranker.training import shards
from mtl_ranker.training.batches import (
    TENSORS,
    encode_examples,
    joined,
    part_of,
    take,
    without_ids,
)
from mtl_ranker.training.boosting import fit_forest
from mtl_ranker.training.loop import Design, Execution, Rows, train_ranker
from mtl_ranker.training.network import predict
from mtl_ranker.training.shards import write_shards
from mtl_ranker.training.state import Checkpoint
from tests.training import rows as small
from tests.training.test_state import Dying, Killed, same

SIZE = 3
VECTORS = np.random.default_rng(5).normal(size=(20, SIZE)).astype(np.float32)
MISSING = np.full((1, SIZE), np.nan, np.float32)
TABLE = VectorTable(np.arange(20) * 7 - 50, np.concatenate([MISSING, VECTORS]))


def frame(rows: int, seed: int = 0) -> pl.DataFrame:
    """`small.frame` with keys of vectors, of which the first number decides the click."""
    rng = np.random.default_rng(seed + 100)
    number = rng.integers(0, 20, rows)
    keys = pl.Series("content", TABLE.keys[number]).set(pl.Series(rng.random(rows) < 0.1), None)
    click = pl.Series(small.LABELS[0], (VECTORS[number, 0] > 0).astype(np.float32))
    return small.frame(rows, seed).with_columns(keys, click)


def encoder_of(rows: pl.DataFrame) -> Encoder:
    return small.encoder(rows).with_contents(["content"], {"content": TABLE}, rows.lazy())


def trained(rows, encoder, checkpoint=None, **settings):
    held_out = encode_examples(encoder, frame(200, 9), small.LABELS)
    design, execution = Design(small.spec(), encoder, small.TASKS), Execution(checkpoint=checkpoint)
    return train_ranker(design, Rows(rows, held_out), small.settings(**settings), 0, execution)


def test_a_killed_training_ends_as_an_uninterrupted_one(tmp_path):
    rows = frame(400)
    encoder = encoder_of(rows)
    encoded = encode_examples(encoder, rows, small.LABELS)
    dying = Dying(tmp_path / "a.pt", "key")
    dying.after = 8  # in the second epoch
    with pytest.raises(Killed):
        trained(encoded, encoder, dying)
    torch.manual_seed(123)
    resumed = trained(encoded, encoder, Checkpoint(tmp_path / "a.pt", "key"))
    same(resumed, trained(encoded, encoder))


def test_a_row_reads_its_vector_beside_its_numbers():
    rows = frame(50)
    encoded = encode_examples(encoder_of(rows), rows, small.LABELS)
    assert encoded.numeric.shape == (50, 2)
    found = encoded.inputs[2][:, 2:].numpy()
    for key, vector in zip(rows["content"], found, strict=True):
        if key is None:
            assert np.isnan(vector).all()
        else:
            np.testing.assert_array_equal(vector, VECTORS[(key + 50) // 7])
    chosen = torch.tensor([40, 3, 3])
    for some in (
        take(encoded, chosen),
        joined([part_of(encoded, slice(n, n + 1)) for n in chosen]),
    ):
        np.testing.assert_array_equal(some.inputs[2][:, 2:].numpy(), found[chosen])
        assert some.tables[0].shape == (21, SIZE)  # the table is not copied for each row


def test_files_hold_the_rows_and_the_table_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_ROWS", 40)
    rows = frame(300)
    encoder = encoder_of(rows)
    files = small.partitions(rows, tmp_path, [200, 1, 99])
    streamed = write_shards(encoder, files, small.LABELS, tmp_path / "encoded")
    whole, expected = streamed.sample(300), encode_examples(encoder, rows, small.LABELS)
    for name in TENSORS:
        pair = getattr(whole, name), getattr(expected, name)
        torch.testing.assert_close(*pair, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(whole.inputs[2], expected.inputs[2], equal_nan=True)
    batch = next(iter(streamed.batches(64, torch.Generator().manual_seed(0))))
    assert batch.inputs[2].shape == (64, 2 + SIZE)
    assert np.load(tmp_path / "encoded" / "vectors_0.npy").shape == (21, SIZE)


def test_a_share_of_the_vectors_is_missing_in_training():
    rows = frame(4_000)
    encoded = encode_examples(encoder_of(rows), rows, small.LABELS)
    dropped = without_ids(encoded, 0.25, 1)
    was, now = encoded.vectors > 0, dropped.vectors > 0
    assert not (now & ~was).any()
    assert float((was & ~now).sum() / was.sum()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped.vectors[now], encoded.vectors[now])


@pytest.mark.parametrize("streamed", [False, True])
def test_a_training_learns_from_vectors(tmp_path, streamed):
    rows = frame(1_500)
    encoder = encoder_of(rows)
    train = encode_examples(encoder, rows, small.LABELS)
    if streamed:
        files = small.partitions(rows, tmp_path, [700, 800])
        train = write_shards(encoder, files, small.LABELS, tmp_path / "encoded")
    model = trained(train, encoder, epochs=4).model
    unseen = frame(400, 3)
    clicks = predict(model, encode_examples(encoder, unseen, small.LABELS), small.TASKS)[:, 0]
    positive = unseen[small.LABELS[0]].to_numpy() > 0
    has = unseen["content"].is_not_null().to_numpy()
    assert clicks[has & positive].mean() > 0.8 > 0.2 > clicks[has & ~positive].mean()
    assert model.embedding.contents[0].absent.abs().max() > 0


def test_trees_read_no_vectors():
    rows = frame(600)
    encoder = encoder_of(rows)
    encoded = encode_examples(encoder, rows, small.LABELS)
    plain = encode_examples(small.encoder(rows), rows, small.LABELS)
    forests = [fit_forest(small.TASKS, each, [5, 0, 0], 0) for each in (encoded, plain)]
    assert forests[0].features == forests[1].features == 3
    for name, tensor in forests[0].state_dict().items():
        torch.testing.assert_close(tensor, forests[1].state_dict()[name], equal_nan=True)


def test_another_vector_changes_the_predictions_of_its_rows_only():
    rows = frame(300)
    encoder = encoder_of(rows)
    model = trained(encode_examples(encoder, rows, small.LABELS), encoder, epochs=1).model
    vectors = TABLE.vectors.copy()
    vectors[5] += 3.0
    other = replace(encoder, tables={"content": VectorTable(TABLE.keys, vectors)})
    before, after = (
        predict(model, encode_examples(each, rows, small.LABELS), small.TASKS)
        for each in (encoder, other)
    )
    changed = (before != after).any(1)
    np.testing.assert_array_equal(
        changed, (rows["content"] == TABLE.keys[4]).fill_null(False).to_numpy()
    )
    assert changed.any()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_reads_vectors(preset):
    rows = frame(64)
    encoder = encoder_of(rows)
    design = Design(make(preset, {}, len(small.TASKS)), encoder, small.TASKS)
    examples = encode_examples(encoder, rows, small.LABELS)
    model = train_ranker(design, Rows(examples, examples), small.settings(epochs=1), 0).model
    assert np.isfinite(predict(model, examples, small.TASKS)).all()
