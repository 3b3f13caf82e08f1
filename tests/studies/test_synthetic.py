"""Synthetic tasks: made by the paper's steps, and learned as the paper says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_ranker.studies.synthetic import (
    MODELS,
    Starts,
    Tasks,
    build_model,
    equal_units,
    held_out,
    parameter_count,
    run_starts,
)
from mtl_ranker.studies.trainability import contrasts, distributions, mean_loss, spreads


@settings(max_examples=30, deadline=None)
@given(p=st.floats(-1.0, 1.0), scale=st.floats(0.1, 5.0), seed=st.integers(0, 10_000))
def test_cosine_of_the_weights_is_the_correlation(p, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    w = Tasks(p, scale=scale).weights(generator).double()
    np.testing.assert_allclose(w.norm(dim=1), [scale, scale], rtol=1e-5)
    np.testing.assert_allclose(float(w[0] @ w[1]) / scale**2, p, atol=1e-5)


def test_labels_follow_the_equation():
    tasks = Tasks(0.5, dimension=4, sines=2, noise=0.0)
    x, y = next(tasks.chunks(7, 5))
    generator = torch.Generator().manual_seed(7)
    w = tasks.weights(generator)
    beta = torch.rand(2, generator=generator) * 2 * np.pi
    for step in range(3):
        for row in range(5):
            for task in range(2):
                z = float(w[task] @ x[step, row])
                expected = z + sum(np.sin((i + 1) * z + float(beta[i])) for i in range(2))
                assert float(y[step, row, task]) == pytest.approx(expected, abs=1e-4)


def test_label_correlation_grows_with_the_correlation():
    found = []
    for p in (0.0, 0.5, 0.9, 1.0):
        _, y = held_out(Tasks(p), range(10), 2_000)
        found.append(np.mean([np.corrcoef(rows.T)[0, 1] for rows in y.numpy()]))
    assert found == sorted(found)
    assert abs(found[0]) < 0.1
    assert found[-1] > 0.99


def test_held_out_rows_are_of_the_same_tasks_and_were_never_trained_on():
    tasks = Tasks(0.5, dimension=6)
    x, _ = next(tasks.chunks(3, 50))
    fresh, _ = held_out(tasks, [3], 1_000)
    seen = {tuple(row) for row in x.flatten(0, 1).tolist()}
    assert not seen & {tuple(row) for row in fresh[0].tolist()}


def test_models_are_of_equal_size():
    units = equal_units()
    sizes = [parameter_count(build_model(preset, units[preset])) for preset in MODELS]
    assert units["mmoe"] == 16
    assert max(sizes) < 1.01 * min(sizes)


@pytest.mark.slow
def test_with_low_correlation_mmoe_beats_shared_bottom():
    """The paper's figure 4 at a small size: the difference is significant."""
    found = run_starts([0.5], Starts(30, steps=1_500), models=("shared_bottom", "mmoe"))
    [contrast] = contrasts(found)
    assert contrast.gain.low > 0
    assert contrast.better < 0.01


@pytest.mark.slow
def test_spread_and_contrast_by_hand():
    found = run_starts([0.5, 1.0], Starts(6, steps=20, batch=8, test_rows=100, together=4))
    assert found.losses["mmoe", 0.5].shape == (6, 2)
    rows = {(s.model, s.correlation): s for s in spreads(found)}
    loss = found.losses["omoe", 1.0].mean(1)
    assert rows["omoe", 1.0].mean.value == pytest.approx(loss.mean())
    assert rows["omoe", 1.0].deviation == pytest.approx(loss.std(ddof=1))
    gains = {(c.model, c.correlation): c for c in contrasts(found)}
    base, own = (found.losses[m, 0.5].mean(1) for m in ("shared_bottom", "mmoe"))
    assert gains["mmoe", 0.5].gain.value == pytest.approx((base - own).mean() / base.mean())
    assert len(gains) == 4
    for figure in (mean_loss(found, list(rows.values())), distributions(found)):
        assert figure.axes
