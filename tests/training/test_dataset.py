"""A dataset that another process reads again has the same rows."""

from __future__ import annotations

import pickle
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from polars.testing import assert_frame_equal

from mtl_ranker.context import without_log
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.training.batches import TENSORS
from mtl_ranker.training.dataset import (
    Continuing,
    Dataset,
    load_dataset,
    with_rows,
    without_rows,
)
from tests.conftest import FIRST
from tests.projects import write_project

LAST = FIRST + timedelta(days=5)


def context_of(root, **training):
    file = write_project(root, training=training, log={"list": ["user_id"]})
    context = open_context(str(file), root, root / "ws")
    build_split(context, LAST)
    return without_log(context.project, context.workspace)


def assert_same_rows(one: Dataset, other: Dataset) -> None:
    everything = [(one.train.sample(10**6), other.train.sample(10**6))]
    everything += [(one.examples[part], other.examples[part]) for part in one.examples]
    for rows, again in everything:
        for name in TENSORS:
            found, expected = getattr(again, name), getattr(rows, name)
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert one.frames.keys() == other.frames.keys()
    for part in one.frames:
        assert_frame_equal(one.frames[part], other.frames[part])


@pytest.mark.parametrize("shared", [True, False], ids=["a folder", "a store"])
@pytest.mark.parametrize("rows", [1_000_000, 30], ids=["in memory", "from files"])
@pytest.mark.parametrize("continued", [False, True], ids=["all days", "new days"])
def test_another_process_reads_the_same_rows(tiny, tmp_path, shared, rows, continued):
    """Of a store neither files nor encoded rows of the first process are there."""
    context = context_of(tiny, in_memory_rows=rows, replay=0.5)
    dataset = load_dataset(context, LAST)
    if continued:
        continuing = Continuing(dataset.encoder, FIRST + timedelta(days=2))
        dataset = load_dataset(context, LAST, continuing=continuing)
    described = without_rows(dataset)
    if not shared:
        described = replace(described, files={}, shards=None)
    sent = pickle.dumps(described)
    assert len(sent) < 20_000
    scratch = tmp_path / "scratch"
    again = with_rows(pickle.loads(sent), scratch)
    assert_same_rows(dataset, again)
    assert again.digest == dataset.digest
    assert (dataset.shards is None) == (rows > 30)
    assert scratch.exists() == (rows == 30 and not shared)


def test_a_host_without_the_workspace_is_told_so(tiny, tmp_path):
    dataset = without_rows(load_dataset(context_of(tiny), LAST))
    workspace = replace(dataset.workspace, root=tmp_path / "elsewhere")
    dataset = replace(dataset, reading=replace(dataset.reading, workspace=workspace))
    with pytest.raises(ProjectError, match=r"elsewhere: no examples of 2026-03-03 on this host"):
        with_rows(dataset, tmp_path / "scratch")
