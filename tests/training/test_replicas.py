"""Replicas: each ends where it would have ended alone."""

from __future__ import annotations

import pytest
import torch

from mtl_ranker.studies.synthetic import Tasks, build_model
from mtl_ranker.training.replicas import train_replicas

STEPS, BATCH, RATE = 25, 16, 3e-3


def alone(preset: str, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The same seed trained by itself, in the plainest way."""
    torch.manual_seed(seed)
    model = build_model(preset, 6, dimension=10)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    source, done = Tasks(0.5, dimension=10).chunks(seed, BATCH), 0
    while done < STEPS:
        for x, y in zip(*next(source), strict=True):
            if done == STEPS:
                break
            optimiser.zero_grad()
            loss = (model(x) - y).square().mean(0)
            loss.sum().backward()
            optimiser.step()
            done += 1
    return model, loss.detach()


@pytest.mark.parametrize("preset", ["shared_bottom", "omoe", "mmoe"])
def test_a_replica_ends_as_the_same_seed_alone(preset):
    told = []
    replicas = train_replicas(
        lambda: build_model(preset, 6, dimension=10),
        lambda seed: Tasks(0.5, dimension=10).chunks(seed, BATCH),
        seeds=[3, 11, 4],
        steps=STEPS,
        learning_rate=RATE,
        on_steps=told.append,
    )
    assert sum(told) == 3 * STEPS
    for r, seed in enumerate([3, 11, 4]):
        model, _ = alone(preset, seed)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                replicas.parameters[name][r], parameter, atol=1e-5, rtol=1e-4, msg=name
            )
    x = torch.randn(3, 7, 10)
    expected = torch.stack([alone(preset, s)[0](x[r]) for r, s in enumerate([3, 11, 4])])
    torch.testing.assert_close(replicas(x), expected, atol=1e-4, rtol=1e-3)
