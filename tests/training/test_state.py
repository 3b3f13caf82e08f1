"""A killed training is resumed and ends with the same weights, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from mtl_ranker.training import shards
from mtl_ranker.training.balancing import BALANCERS
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import Design, Execution, Rows, Trained, train_ranker
from mtl_ranker.training.shards import write_shards
from mtl_ranker.training.state import Checkpoint, StoredCheckpoint
from tests.stores import s3_server
from tests.training import rows as small

STEPS = 3 * 8  # epochs x batches of 64 of 500 rows


class Killed(BaseException):
    """Not an Exception, so that no handler catches it."""


class Dying(Checkpoint):
    """Saves after every batch, and raises Killed after some of them."""

    after = 0

    def due(self) -> bool:
        return True

    def save(self, state) -> None:
        super().save(state)
        self.after -= 1
        if self.after == 0:
            raise Killed


def train(rows, encoder, checkpoint: Checkpoint | None, **more) -> Trained:
    held_out = encode_examples(encoder, small.frame(200, seed=9), small.LABELS)
    return train_ranker(
        Design(small.spec(**more.pop("spec", {})), encoder, more.pop("tasks", small.TASKS)),
        Rows(rows, held_out),
        small.settings(**more),
        0,
        Execution(checkpoint=checkpoint),
    )


def encoded():
    """Rows of a training, and their encoder."""
    frame = small.frame(500)
    encoder = small.encoder(frame)
    return encode_examples(encoder, frame, small.LABELS), encoder


def kill(path: Path, key: str, rows, encoder, after: int, **more) -> None:
    """Train until some batches are saved."""
    dying = Dying(path, key)
    dying.after = after
    with pytest.raises(Killed):
        train(rows, encoder, dying, **more)


def resumes(
    folder: Path, rows, encoder, after: int, whole: Trained | None = None, **more
) -> Trained:
    """Check that a training killed after some batches ends as an uninterrupted one; return that.

    Args:
        whole: the uninterrupted one, if there is one of these rows and settings already.
    """
    whole = whole or train(rows, encoder, None, **more)
    kill(folder / "a.pt", "key", rows, encoder, after, **more)
    torch.manual_seed(123)  # another random state than at the kill
    same(train(rows, encoder, Checkpoint(folder / "a.pt", "key"), **more), whole)
    return whole


def same(one: Trained, other: Trained) -> None:
    weights, other_weights = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert [e.train_loss for e in one.epochs] == [e.train_loss for e in other.epochs]
    assert [e.monitored for e in one.epochs] == [e.monitored for e in other.epochs]
    assert one.best_epochs == other.best_epochs


@pytest.fixture(scope="module", params=sorted(BALANCERS))
def uninterrupted(request):
    """A way of balancing, rows with their encoder, and a training that was not killed."""
    rows, encoder = encoded()
    return request.param, rows, encoder, train(rows, encoder, None, balancing=request.param)


@pytest.mark.parametrize("after", [1, 8, 9, 20])
def test_a_killed_training_ends_with_the_same_weights(tmp_path, after, uninterrupted):
    balancing, rows, encoder, whole = uninterrupted
    resumes(tmp_path, rows, encoder, after, whole, balancing=balancing)


def test_also_from_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_ROWS", 40)
    monkeypatch.setattr(shards, "POOL_BLOCKS", 3)
    frame = small.frame(500)
    encoder = small.encoder(frame)
    files = small.partitions(frame, tmp_path, [200, 300])
    rows = write_shards(encoder, files, small.LABELS, tmp_path / "encoded")
    whole = train(rows, encoder, None)
    dying = Dying(tmp_path / "a.pt", "key")
    dying.after = 11
    with pytest.raises(Killed):
        train(rows, encoder, dying)
    same(train(rows, encoder, Checkpoint(tmp_path / "a.pt", "key")), whole)


def test_also_with_a_pairwise_loss(tmp_path):
    frame = small.frame(500).with_columns(user_id=pl.col("row") % 37)
    encoder = small.encoder(frame)
    rows = encode_examples(encoder, frame, small.LABELS, ["user_id"])
    tasks = small.with_list_loss("pairs", 0.5)
    plain, whole = train(rows, encoder, None), resumes(tmp_path, rows, encoder, 11, tasks=tasks)
    assert [e.train_loss for e in plain.epochs] != [e.train_loss for e in whole.epochs]


def test_also_with_sparse_embeddings(tmp_path):
    rows, encoder = encoded()
    assert resumes(tmp_path, rows, encoder, 11, sparse_rows=1).model.embedding.sparse


def test_a_checkpoint_of_another_training_is_ignored(tmp_path):
    rows, encoder = encoded()
    kill(tmp_path / "a.pt", "of other rows", rows, encoder, after=3)
    other = Checkpoint(tmp_path / "a.pt", "of these rows")
    assert other.load() is None
    same(train(rows, encoder, other), train(rows, encoder, None))


@pytest.mark.parametrize("kept", [0, 10, 3_000])
def test_a_checkpoint_that_is_not_whole_is_ignored_with_a_warning(tmp_path, caplog, kept):
    rows, encoder = encoded()
    kill(tmp_path / "a.pt", "key", rows, encoder, after=3)
    os.truncate(tmp_path / "a.pt", kept)
    again = Checkpoint(tmp_path / "a.pt", "key")
    assert again.load() is None
    assert caplog.messages[0].startswith(f"{tmp_path}/a.pt: not a checkpoint (")
    same(train(rows, encoder, again), train(rows, encoder, None))


def test_a_finished_training_is_not_trained_again(tmp_path):
    rows, encoder = encoded()
    first = train(rows, encoder, Checkpoint(tmp_path / "a.pt", "key", seconds=0.0))
    epochs = []
    second = train_ranker(
        Design(small.spec(), encoder, small.TASKS),
        Rows(rows, encode_examples(encoder, small.frame(200, seed=9), small.LABELS)),
        small.settings(),
        0,
        Execution(on_epoch=epochs.append, checkpoint=Checkpoint(tmp_path / "a.pt", "key")),
    )
    assert epochs == []
    same(second, first)


@pytest.mark.slow
def test_a_checkpoint_in_a_store_is_resumed_on_another_host(tmp_path):
    """Each host has a copy of its own; a newer one is in the store."""
    rows, encoder = encoded()
    with s3_server():
        here, there = (
            StoredCheckpoint(tmp_path / host / "a.pt", "key", 0.0, address="s3://feed/ws/a.pt")
            for host in ("here", "there")
        )
        assert there.load() is None
        whole = train(rows, encoder, here)
        found = there.load()
        assert found is not None
        assert found["step"] == STEPS
        there.save({**found, "step": 1})
        newer = here.load()
        assert newer is not None
        assert newer["step"] == 1
        epochs = train(rows, encoder, there).epochs
    assert [e.train_loss for e in epochs] == [e.train_loss for e in whole.epochs]


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.training.test_state import *

class Fatal(Checkpoint):
    saves = 0
    def due(self): return True
    def save(self, state):
        super().save(state)
        self.saves += 1
        if self.saves == 13 and sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
frame = small.frame(500)
encoder = small.encoder(frame)
rows = encode_examples(encoder, frame, small.LABELS)
done = train(rows, encoder, Fatal(Path(sys.argv[1]) / "a.pt", "key"))
torch.save(done.model.state_dict(), Path(sys.argv[1]) / "weights.pt")
"""


@pytest.mark.slow
def test_a_training_killed_by_sigkill_is_resumed_by_another_process(tmp_path):
    def run(folder: Path, how: str) -> int:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", CHILD, str(folder), how]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode

    assert run(tmp_path / "whole", "live") == 0
    assert run(tmp_path / "killed", "die") == -signal.SIGKILL
    assert run(tmp_path / "killed", "live") == 0
    one, two = (torch.load(tmp_path / n / "weights.pt") for n in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
