"""Trainings and predictions on a CUDA device, against those of the CPU.

Skipped where there is none: `python -m pytest --noconftest tests/training/test_gpu.py` on a machine
that has one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mtl_ranker.config import load_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.models.objectives import Task
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training import device as devices
from mtl_ranker.training.batches import Examples, encode_examples
from mtl_ranker.training.device import GraphedStep, device_of, fits, streamed
from mtl_ranker.training.loop import Design, Execution, Rows, Trained, train_ranker
from mtl_ranker.training.network import predict
from mtl_ranker.training.state import Checkpoint
from tests.training import rows as small

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FRAME = small.frame(6_000)
ENCODER = small.encoder(FRAME)
TRAIN = encode_examples(ENCODER, FRAME, small.LABELS)
TEST_FRAME = small.frame(4_000, seed=9)
TEST = encode_examples(ENCODER, TEST_FRAME, small.LABELS)


def train(
    device: str, tasks=small.TASKS, execution: Execution | None = None, **settings
) -> Trained:
    model = settings.pop("model", {})
    design = Design(small.spec(**model), ENCODER, small.TASKS)
    chosen = small.settings(device=device, batch_size=256, **settings)
    return train_ranker(design, Rows(TRAIN, TEST), chosen, 0, execution or Execution())


def auc(trained: Trained) -> float:
    """Of clicks, whose odds depend on one number."""
    clicks = TEST.labels[:, 0].numpy()
    return float(roc_auc_score(clicks, predict(trained.model, TEST, small.TASKS)[:, 0]))


def tensors(trained: Trained) -> list[torch.Tensor]:
    return [*trained.model.state_dict().values(), *trained.moments.values()]


def test_a_device_that_is_not_there_is_named_with_what_is_allowed():
    if torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ProjectError, match=r"scoring.device = 'mps'.*allowed here: auto, cpu"):
        device_of("mps", "scoring.device")


def test_batches_on_the_cpu_are_passed_on():
    batches = list(TRAIN.batches(512, torch.Generator().manual_seed(1)))
    found = list(streamed(batches, torch.device("cpu")))
    assert [len(b) for b in found] == [len(b) for b in batches]
    torch.testing.assert_close(found[3].numeric, batches[3].numeric, equal_nan=True)


@gpu
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"balancing": "gradnorm"},
        {"balancing": "pcgrad"},
        {"balancing": "uncertainty"},
        {"sparse_rows": 1},
        {"model": {"preset": "sparse_mmoe", "top_k": 2}},
        {"model": {"members": 2, "balance": 0.01}},
        {"model": {"preset": "omoe"}},
        {"start": "champion"},
    ],
    ids=str,
)
def test_a_training_is_as_good_as_on_the_cpu(settings):
    """The order of rows and dropout differ; what is learned does not."""
    long = {"epochs": 10, "patience": 10}
    on_cpu, on_gpu = (train(d, **long, **settings) for d in ("cpu", "cuda"))
    assert abs(auc(on_cpu) - auc(on_gpu)) < 0.02
    assert abs(on_cpu.epochs[-1].monitored - on_gpu.epochs[-1].monitored) < 0.02
    assert {t.device.type for t in tensors(on_gpu)} == {"cpu"}
    assert bool(on_gpu.moments) == (settings.get("start") == "champion")


@gpu
@pytest.mark.parametrize("name", ["pairs", "rcr", "jrc", "combined_pair"])
def test_list_losses(name):
    lists = torch.arange(len(TRAIN)) // 4
    rows = replace(TRAIN, lists=lists)
    results = []
    for device in ("cpu", "cuda"):
        design = Design(small.spec(), ENCODER, small.with_list_loss(name, 0.3))
        chosen = small.settings(device=device, batch_size=256)
        results.append(train_ranker(design, Rows(rows, TEST), chosen, 0))
    assert abs(auc(results[0]) - auc(results[1])) < 0.02


@gpu
def test_chained_and_other_objectives():
    tasks = [
        Task("click", "binary"),
        Task("seconds", "watch_time"),
        Task("like", "binary", conditional_on="click"),
    ]
    labels = TRAIN.labels.nan_to_num(0.0).clamp(min=0.0)
    rows = replace(TRAIN, labels=labels)
    design = Design(small.spec(), ENCODER, tasks)
    losses = [
        train_ranker(
            design,
            Rows(rows),
            small.settings(device=d, batch_size=256),
            0,
            Execution(until=[3] * 3),
        )
        .epochs[-1]
        .train_loss
        for d in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)


@gpu
def test_rows_that_do_not_fit_are_copied_batch_by_batch(monkeypatch):
    monkeypatch.setattr(devices, "MOST_OF_MEMORY", 0.0)
    assert not fits(TRAIN, torch.device("cuda"))
    assert abs(auc(train("cuda")) - auc(train("cpu"))) < 0.01


@gpu
def test_copied_batches_are_the_rows():
    batches = list(TRAIN.batches(64, torch.Generator().manual_seed(1)))
    for copied, batch in zip(streamed(iter(batches), torch.device("cuda")), batches, strict=True):
        for found, expected in zip(copied.tensors, batch.tensors, strict=True):
            torch.testing.assert_close(found.cpu(), expected, equal_nan=True)


@gpu
def test_a_graph_takes_the_steps_of_the_function():
    """Weighted sums of batches, the last one smaller than the others."""
    rows = TRAIN.to(torch.device("cuda"))
    batches = list(rows.batches(256, torch.Generator("cuda").manual_seed(1)))
    assert len(batches[-1]) < 256
    sums = torch.zeros(2, device="cuda")

    def step(to: torch.Tensor, batch: Examples) -> None:
        to += (batch.labels[:, 0] * batch.weight).sum()

    graphed = GraphedStep(lambda batch: step(sums[0:1], batch), 256)
    for batch in batches:
        graphed(batch)
        step(sums[1:2], batch)
        torch.testing.assert_close(sums[0], sums[1])


@gpu
def test_a_killed_training_continues_from_its_checkpoint(tmp_path):
    whole = train("cuda", epochs=4, patience=4)
    checkpoint = Checkpoint(tmp_path / "c", "key", seconds=0.0)

    class Killed(Exception):
        pass

    def kill(epoch) -> None:
        if epoch.number == 2:
            raise Killed

    with pytest.raises(Killed):
        train("cuda", execution=Execution(kill, checkpoint=checkpoint), epochs=4, patience=4)
    resumed = train("cuda", execution=Execution(checkpoint=checkpoint), epochs=4, patience=4)
    assert len(resumed.epochs) == 4
    for found, expected in zip(resumed.epochs, whole.epochs, strict=True):
        np.testing.assert_allclose(found.train_loss, expected.train_loss, rtol=0.1)


@gpu
def test_predictions_of_rows_and_of_pairs_are_those_of_the_cpu():
    project = load_project("simulated")
    names = [objective.name for objective in project.objectives][: len(small.TASKS)]
    tasks = [replace(t, name=n) for t, n in zip(small.TASKS, names, strict=True)]
    model = train("cpu").model
    on_cpu = RankerArtifact(project, ENCODER, tasks, model)
    on_gpu = on_cpu.on(torch.device("cuda"))
    assert on_cpu.model.device.type == "cpu"
    np.testing.assert_allclose(on_gpu.raw(TEST), on_cpu.raw(TEST), rtol=1e-4, atol=1e-4)
    sides = {"colour": "item", "tags": "item", "age": "user", "rate": "pair"}
    users, items = TEST_FRAME[:50].select("age"), TEST_FRAME[50:90].select("colour", "tags")
    user, item = (n.ravel() for n in np.meshgrid(np.arange(50), np.arange(40), indexing="ij"))
    pairs = TEST_FRAME[: len(user)].select("rate")
    found = [
        each.predict_pairs(users, each.items_of_pairs(items, sides), pairs, user, item)
        for each in (on_cpu, on_gpu)
    ]
    np.testing.assert_allclose(found[1].to_numpy(), found[0].to_numpy(), rtol=1e-4, atol=1e-4)
