"""A compiled training is the same training."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from mtl_ranker import kernels
from mtl_ranker.errors import ProjectError
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import predict_logits, train_ranker
from tests.training import rows as made


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_training_ends_where_the_plain_one_does():
    frame = made.frame(500)
    encoder = made.encoder(frame)
    rows = encode_examples(encoder, frame, made.LABELS)
    found = []
    for compile_it in (False, True):
        settings = made.settings(compile=compile_it, position_dropout=0.0)
        spec = made.spec(dropout=0.0)
        run = train_ranker(spec, encoder, made.TASKS, rows, rows, settings, 0)
        found.append((run, predict_logits(run.model, rows)))
    (plain, one), (compiled, two) = found
    np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=1e-3, atol=1e-3)
    losses = [[e.monitored for e in run.epochs] for run in (plain, compiled)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_without_a_compiler_it_is_said(monkeypatch):
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    with pytest.raises(ProjectError, match=r"training\.compile: no C\+\+ compiler found \(g\+\+"):
        kernels.compiled(lambda: None)
