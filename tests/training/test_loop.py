"""What a training monitors, weighs and decays, seen from its result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from mtl_ranker.models.objectives import Task
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.training.balancing import BALANCERS, Fixed
from mtl_ranker.training.batches import Examples, encode_examples, without_ids
from mtl_ranker.training.loop import Design, Rows, Trained, train_ranker
from mtl_ranker.training.network import build_ranker, predict
from tests.training import rows as small

FRAME = small.frame(500)
ENCODER = small.encoder(FRAME)
ROWS = encode_examples(ENCODER, FRAME, small.LABELS)
HELD_OUT = encode_examples(ENCODER, small.frame(300, seed=9), small.LABELS)


def train(rows: Examples = ROWS, tasks=small.TASKS, model=None, **settings) -> Trained:
    design = Design(small.spec(**(model or {})), ENCODER, tasks)
    return train_ranker(design, Rows(rows, HELD_OUT), small.settings(**settings), 0)


def untrained() -> Ranker:
    """The weights with which every training of seed 0 starts."""
    torch.manual_seed(0)
    return build_ranker(small.spec(), ENCODER, small.TASKS, ROWS.positions)


def embedding_of(model: Ranker, colour: int) -> torch.Tensor:
    """Of a value of the categorical field; 0 is the unknown value."""
    return model.embedding.table.weight[int(model.embedding.offset[0]) + colour].detach()


def test_only_matrices_decay():
    """An embedding whose id never occurs stays as it began, and matrices shrink."""
    without = ROWS.categorical[:, 0] != 3
    rows = small_part(ROWS, without)
    assert int(without.sum()) < len(ROWS)
    plain = train(rows, weight_decay=0.0, unknown_rate=0.0).model
    decayed = train(rows, weight_decay=0.9, unknown_rate=0.0).model
    torch.testing.assert_close(embedding_of(decayed, 3), embedding_of(untrained(), 3))
    norms = [model.layers[0].banks[0].weights[0].norm() for model in (plain, decayed)]
    assert norms[1] < 0.95 * norms[0]
    decaying = {id(p) for p in plain.matrices()}
    names = {name for name, p in plain.named_parameters() if id(p) in decaying}
    assert names == {
        "layers.0.banks.0.weights.0",
        "layers.0.gates.weight",
        "towers.weights.0",
        "towers.weights.1",
    }


def small_part(rows: Examples, chosen: torch.Tensor) -> Examples:
    return Examples(*(t[chosen] for t in rows.inputs), rows.labels[chosen])


def test_the_unknown_embedding_is_trained_on_dropped_ids():
    assert set(ROWS.categorical[:, 0].tolist()) == {1, 2, 3, 4, 5}  # no row has the unknown value
    start = embedding_of(untrained(), 0)
    torch.testing.assert_close(embedding_of(train(unknown_rate=0.0).model, 0), start)
    assert (embedding_of(train(unknown_rate=0.05).model, 0) - start).abs().max() > 0.01


def test_ids_are_dropped_at_their_rate_and_nothing_else_changes():
    rows = Examples(torch.ones(5_000, 4).long(), *ROWS.inputs[1:], ROWS.labels)
    dropped = without_ids(rows, 0.1, seed=3)
    share = (dropped.categorical == 0).double().mean(0)
    assert (share - 0.1).abs().max() < 0.02
    assert not torch.equal(dropped.categorical[:, 0], dropped.categorical[:, 1])
    assert replace(dropped, categorical=rows.categorical) == rows
    assert without_ids(rows, 0.0, seed=3) is rows


def test_a_batch_without_an_objectives_labels_does_not_count_in_its_train_loss(monkeypatch):
    """Likes in one of eight batches: the epoch's loss is that batch's, and a balancer sees it."""
    seen = []

    class Watching(Fixed):
        def end_epoch(self, losses: torch.Tensor) -> None:
            seen.append(losses.tolist())

    monkeypatch.setitem(BALANCERS, "dwa", Watching)
    labels = ROWS.labels.clone()
    labels[:, 2] = float("nan")
    labels[17, 2], labels[18, 2] = 1.0, 0.0
    rare = replace(ROWS, labels=labels)
    settings = {"epochs": 1, "learning_rate": 1e-9, "balancing": "dwa"}
    loss = train(rare, model={"dropout": 0.0}, batch_size=64, **settings).epochs[0].train_loss
    # At the training mean of a half, every batch with a like or its absence has about log 2.
    assert loss[2] == pytest.approx(np.log(2), abs=0.05)
    assert seen == [loss]


def test_losses_of_constants_are_of_the_weighted_rows(monkeypatch):
    """What `normalised` divides by: the weighted entropy at the weighted mean."""
    given = []

    class Watching(Fixed):
        def __init__(self, model: Ranker, weights: torch.Tensor, base: torch.Tensor) -> None:
            super().__init__(model, weights, base)
            given.append(base)

    monkeypatch.setitem(BALANCERS, "normalised", Watching)
    click = ROWS.labels[:, 0].numpy()
    weight = torch.where(ROWS.labels[:, 0] > 0.5, 1.0, 5.0)  # as thinned negatives weigh
    train(replace(ROWS, weight=weight), epochs=1, balancing="normalised")
    mean = np.average(click, weights=weight)
    expected = log_loss(click, np.full(len(click), mean), sample_weight=weight.numpy())
    assert float(given[0][0]) == pytest.approx(expected, rel=1e-4)
    seconds = ROWS.labels[:, 1].numpy()
    known = ~np.isnan(seconds)
    assert float(given[0][1]) == pytest.approx(seconds[known].var(), rel=1e-4)


def test_pairs_of_rows_that_weigh_nothing_are_no_pairs():
    """All but one list's rows have weight 0: the pairwise loss is that list's."""
    lists = torch.arange(len(ROWS)) // 50
    one = torch.where(lists == 3, 1.0, 0.0)
    settings = {"tasks": small.with_list_loss("pairs", 0.5), "epochs": 1, "batch_size": 500}
    whole = train(replace(ROWS, lists=lists, weight=one), **settings)
    labels = ROWS.labels.clone()
    labels[lists != 3] = float("nan")
    alone = train(replace(ROWS, lists=lists, weight=one, labels=labels), **settings)
    assert whole.epochs[0].train_loss == pytest.approx(alone.epochs[0].train_loss, rel=1e-4)


def test_early_stopping_watches_the_loss_of_the_served_ensemble():
    trained = train(model={"members": 4}, epochs=3, learning_rate=0.05)
    best = trained.epochs[trained.best_epoch - 1]
    served = predict(trained.model, HELD_OUT, small.TASKS)
    label = HELD_OUT.labels.numpy()
    for t in (0, 2):
        known = ~np.isnan(label[:, t])
        expected = log_loss(label[known, t], served[known, t])
        assert best.validate_loss[t] == pytest.approx(expected, rel=1e-5)


def test_single_task_shares_nothing_with_the_objective_it_is_conditional_on():
    """Other likes change the model of likes, and no weight of the model of clicks."""
    pairs = {"list_loss": "pairs", "list_weight": 0.1}
    like = Task("like", "binary", conditional_on="click", **pairs)
    tasks = [Task("click", "binary", **pairs), like]
    click = ROWS.labels[:, 0]
    single_task = make("m", {"preset": "single_task", "expert_hidden": [8], "dropout": 0.0}, 2)
    found = []
    for like in (click * (torch.arange(len(click)) % 2), click * (ROWS.numeric[:, 1] > 0.5)):
        design = Design(single_task, ENCODER, tasks)
        rows = replace(ROWS, labels=torch.stack([click, like.float()], 1), lists=ROWS.numeric[:, 1])
        held_out = replace(HELD_OUT, labels=HELD_OUT.labels[:, [0, 0]])
        settings = small.settings(epochs=1)
        trained = train_ranker(design, Rows(rows, held_out), settings, 0)
        found.append(predict(trained.model, HELD_OUT, tasks))
        assert trained.epochs[0].gradient_cosine[0][1] == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_array_equal(found[0][:, 0], found[1][:, 0])
    assert np.abs(found[0][:, 1] - found[1][:, 1]).max() > 1e-3
