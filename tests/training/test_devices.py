"""A training step on another device than the CPU: no tensor of it is made on the CPU.

The device is torch's `meta`, which computes shapes only. An operation of a meta tensor with one of
the CPU fails, as with one of a GPU.
"""

from __future__ import annotations

import pytest
import torch

from mtl_ranker.errors import ProjectError
from mtl_ranker.models.objectives import Task, ensemble_losses, losses
from mtl_ranker.models.presets import make
from mtl_ranker.training.balancing import BALANCERS
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.device import check_devices
from mtl_ranker.training.network import build_ranker
from tests.projects import project
from tests.training import rows as small

TASKS = [
    Task("click", "binary"),
    Task("like", "binary", conditional_on="click"),
    Task("seconds", "regression"),
    Task("watch", "watch_time"),
    Task("stars", "ordinal", levels=4),
]
# Not sparse_mmoe, whose experts are given the rows that use them: shapes that depend on values.
PRESETS = [
    "linear",
    "single_task",
    "shared_bottom",
    "omoe",
    "mmoe",
    "cgc",
    "ple",
    "adatt",
    "cross_stitch",
    "l2_constrained",
    "tensor_factorisation",
]


@pytest.fixture(scope="module")
def encoded():
    frame = small.frame(60)
    encoder = small.encoder(frame)
    rows = encode_examples(encoder, frame, small.LABELS[:1])
    rows = rows.with_labels(lambda labels: labels.expand(-1, len(TASKS)))
    return encoder, rows.to(torch.device("meta"))


def model_of(encoder, preset: str, **more):
    spec = make("m", {"preset": preset, **more}, len(TASKS))
    return build_ranker(spec, encoder, TASKS, positions=4, position_dropout=0.5).to("meta")


def step(model, rows, balancing: str = "fixed") -> None:
    """Losses of a batch and their gradients, as in training/loop.py."""
    model.train()
    weights, base = torch.ones(2, len(TASKS), device="meta")
    balancer = BALANCERS[balancing](model, weights, base)
    trace = model.trace(*rows.inputs, rows.position)
    loss = losses(trace.logits, rows.labels, TASKS, rows.weight, model.cutpoints)
    balancer.backward(loss, model.penalty(trace))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert {g.device.type for g in gradients} == {"meta"}
    balancer.end_epoch(loss.detach())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_of_every_model(encoded, preset):
    encoder, rows = encoded
    step(model_of(encoder, preset), rows)


@pytest.mark.parametrize("balancing", ["normalised", "uncertainty", "dwa"])
def test_a_step_of_methods_of_balancing(encoded, balancing):
    encoder, rows = encoded
    step(model_of(encoder, "mmoe"), rows, balancing)


def test_members_and_a_penalty(encoded):
    """Members have a dimension of their own, uneven use of experts a penalty."""
    encoder, rows = encoded
    step(model_of(encoder, "mmoe", members=2, balance=0.1), rows)


def test_the_losses_of_the_mean_prediction(encoded):
    _, rows = encoded
    tasks = [task for task in TASKS if task.kind != "ordinal"]  # which counts the labelled rows
    labels = rows.labels[:, : len(tasks)]
    logits = torch.empty(2, len(labels), len(tasks), device="meta")
    assert ensemble_losses(logits, labels, tasks).device.type == "meta"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("section", ["training", "scoring"])
def test_a_night_names_a_device_that_is_not_here(section):
    check_devices(project())
    with pytest.raises(ProjectError, match=f"{section}.device = 'cuda': torch finds no such"):
        check_devices(project(**{section: {"device": "cuda"}}))
