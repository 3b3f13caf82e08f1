"""Replicas: each has the weights of a separate training."""

from __future__ import annotations

import pytest
import torch

from mtl_ranker.studies.synthetic import Tasks, build_model
from mtl_ranker.training.replicas import AdamSettings, train_replicas

STEPS, BATCH, RATE = 25, 16, 3e-3


def train_separately(preset: str, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The same seed trained separately, in a plain loop."""
    torch.manual_seed(seed)
    model = build_model(preset, 6, dimension=10)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    source, step = Tasks(0.5, dimension=10).chunks(seed, BATCH), 0
    while step < STEPS:
        for x, y in zip(*next(source), strict=True):
            if step == STEPS:
                break
            optimiser.zero_grad()
            loss = (model(x) - y).square().mean(0)
            loss.sum().backward()
            optimiser.step()
            step += 1
    return model, loss.detach()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["shared_bottom", "omoe", "mmoe"])
def test_a_replica_equals_a_separate_training_with_its_seed(preset):
    counts = []
    replicas = train_replicas(
        lambda: build_model(preset, 6, dimension=10),
        lambda seed: Tasks(0.5, dimension=10).chunks(seed, BATCH),
        seeds=[3, 11, 4],
        adam=AdamSettings(steps=STEPS, learning_rate=RATE),
        on_steps=counts.append,
    )
    assert sum(counts) == 3 * STEPS
    for r, seed in enumerate([3, 11, 4]):
        model, _ = train_separately(preset, seed)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                replicas.parameters[name][r], parameter, atol=1e-5, rtol=1e-4, msg=name
            )
    x = torch.randn(3, 7, 10)
    expected = torch.stack([train_separately(preset, s)[0](x[r]) for r, s in enumerate([3, 11, 4])])
    torch.testing.assert_close(replicas(x), expected, atol=1e-4, rtol=1e-3)
