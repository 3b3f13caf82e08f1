"""Rows streamed from files: each once per epoch, shuffled, equivalent to rows in memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import polars as pl
import pytest
import torch

from mtl_ranker.config import load_project
from mtl_ranker.context import without_log
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.nightly.contenders import Callbacks
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.training import shards
from mtl_ranker.training.batches import TENSORS, encode_examples, thin_negatives
from mtl_ranker.training.loop import Design, Rows, train_ranker
from mtl_ranker.training.shards import write_shards
from tests.nightly.test_suite import LAST, prepared
from tests.projects import edit_project, write_project
from tests.training import rows as small


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_ROWS", 40)
    monkeypatch.setattr(shards, "POOL_BLOCKS", 3)
    monkeypatch.setattr(shards, "READ_ROWS", 120)


def sharded(tmp_path, rows: int = 701):
    frame = small.frame(rows)
    encoder = small.encoder(frame)
    files = small.partitions(frame, tmp_path, [300, 1, rows - 301])
    return frame, encoder, write_shards(encoder, files, small.LABELS, tmp_path / "encoded")


def rates(batches) -> torch.Tensor:
    """The `rate` of every row, which is different for each."""
    return torch.cat([batch.numeric[:, 1] for batch in batches])


def test_files_hold_what_encoding_in_memory_gives(tmp_path, small_blocks):
    frame, encoder, streamed = sharded(tmp_path)
    whole = streamed.sample(len(streamed))
    expected = encode_examples(encoder, frame, small.LABELS)
    assert len(streamed) == len(expected) == 701
    assert streamed.positions == expected.positions == 4
    for name in TENSORS:
        torch.testing.assert_close(
            getattr(whole, name), getattr(expected, name), equal_nan=True, rtol=0, atol=0
        )


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_an_epoch_sees_every_row_once_in_another_order_each_time(tmp_path, small_blocks, size):
    frame, _, streamed = sharded(tmp_path)
    generator = torch.Generator().manual_seed(0)
    first, second = (list(streamed.batches(size, generator)) for _ in range(2))
    for batches in (first, second):
        assert {len(b) for b in batches[:-1]} <= {size}
        assert sum(len(b) for b in batches) == 701
        assert sorted(rates(batches).tolist()) == sorted(frame["rate"].cast(pl.Float32).to_list())
    assert not torch.equal(rates(first), rates(second))
    again = list(streamed.batches(size, torch.Generator().manual_seed(0)))
    assert torch.equal(rates(first), rates(again))


def test_a_batch_has_rows_from_all_over_the_log(tmp_path, small_blocks):
    """The three blocks of a pool come from all over the log, so a batch spans much of it."""
    frame, _, streamed = sharded(tmp_path, 2_001)
    rate = frame["rate"].cast(pl.Float32).to_list()
    number = dict(zip(rate, frame["row"].to_list(), strict=True))
    spans = []
    for batch in list(streamed.batches(64, torch.Generator().manual_seed(1)))[:-1]:
        rows = [number[rate] for rate in batch.numeric[:, 1].tolist()]
        spans.append(max(rows) - min(rows))
    assert np.mean(spans) > 700


def test_training_from_files_learns_what_training_in_memory_does(tmp_path, small_blocks):
    frame, encoder, streamed = sharded(tmp_path)
    held_out = encode_examples(encoder, small.frame(500, seed=9), small.LABELS)
    losses = {}
    for name, rows in (
        ("files", streamed),
        ("memory", encode_examples(encoder, frame, small.LABELS)),
    ):
        run = train_ranker(
            Design(small.spec(dropout=0.0), encoder, small.TASKS),
            Rows(rows, held_out),
            small.settings(),
            0,
        )
        losses[name] = [epoch.monitored for epoch in run.epochs]
    # The same start, another order of rows.
    np.testing.assert_allclose(losses["files"], losses["memory"], rtol=0.05)
    assert losses["files"][-1] < losses["files"][0]


def test_thinning_a_stream_keeps_positives_and_counts_right(tmp_path, small_blocks):
    _, _, streamed = sharded(tmp_path)
    thin = streamed.thinned(partial(thin_negatives, binary=[0], keep=0.25), 3)
    kept = thin.sample(len(streamed))
    assert len(thin) == len(kept) < len(streamed)
    whole = streamed.sample(len(streamed))
    assert int(kept.labels[:, 0].sum()) == int(whole.labels[:, 0].sum())
    batches = list(thin.batches(50, torch.Generator().manual_seed(0)))
    assert sorted(rates(batches).tolist()) == sorted(rates([kept]).tolist())


def test_vocabularies_and_gaps_of_a_stream_are_those_of_the_frame(tmp_path):
    frame = small.frame(5_000)
    whole = Encoder.fit(small.FEATURES, small.NUMERICS, frame)
    fitted = Encoder.fit(small.FEATURES, small.NUMERICS, frame.lazy(), 1_000)
    assert fitted.categoricals == whole.categoricals
    assert fitted.lists == whole.lists
    assert fitted.missing == whole.missing
    for mine, all_rows in zip(fitted.edges, whole.edges, strict=True):
        np.testing.assert_allclose(mine[1:-1], all_rows[1:-1], atol=0.15)


def test_a_suite_with_more_rows_than_fit_into_memory_streams_them(tiny):
    write_project(tiny, training={"refit": True})
    context = prepared(tiny)
    project, workspace = context.project, context.workspace
    whole = train_suite(without_log(project, workspace), LAST)
    edit_project(tiny, training={"in_memory_rows": 9})
    trained = []
    project = load_project(str(tiny / "project.toml"))
    suite = train_suite(
        without_log(project, workspace),
        LAST,
        Callbacks(lambda name, seed, epoch: trained.append(name)),
    )
    assert suite.train_rows == whole.train_rows > 9
    assert [run.label for run in suite.runs] == [run.label for run in whole.runs]
    assert "mmoe, refit" in trained
    for streamed, in_memory in zip(suite.runs, whole.runs, strict=True):
        # The sample of all rows has all rows.
        assert streamed.artifact.encoder == in_memory.artifact.encoder
        np.testing.assert_allclose(streamed.test_prediction, in_memory.test_prediction, atol=0.2)
    assert not (workspace.root / "encoded").exists()
