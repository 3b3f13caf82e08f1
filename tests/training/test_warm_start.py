"""A continued training: weights and moments by name and value, and the arms of its start."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
import torch

from mtl_ranker.models.presets import make
from mtl_ranker.training.balancing import BALANCERS
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.loop import Design, Execution, Rows, Trained, train_ranker
from mtl_ranker.training.network import build_ranker, predict
from mtl_ranker.training.state import BestWeights, Checkpoint
from mtl_ranker.training.warm_start import (
    MOMENTS,
    RANDOM,
    TABLE,
    WarmStart,
    moments_of,
    restore_moments,
    table_rows,
)
from tests.training import rows as small

EARLIER = small.frame(400).filter(pl.col("colour") < 3)
LATER = small.frame(300, seed=1)  # two colours and two tags more
NOTHING = 1e-12  # a learning rate that changes no float32 weight


def trained(encoder, frame, start=None, execution=Execution(), **more) -> Trained:
    rows, held_out = (encode_examples(encoder, f, small.LABELS) for f in (frame, small.frame(200)))
    spec = small.spec(**more.pop("spec", {}))
    given = {"start": "champion", "unknown_rate": 0.0, "position_dropout": 0.0} | more
    return train_ranker(
        Design(spec, encoder, small.TASKS, start),
        Rows(rows, held_out),
        small.settings(**given),
        0,
        execution,
    )


def start_of(encoder, one: Trained) -> WarmStart:
    return WarmStart(
        encoder=encoder,
        weights=one.model.state_dict(),
        positions=one.model.positions,
        moments=one.moments,
    )


@pytest.fixture(scope="module")
def first():
    encoder = small.encoder(EARLIER)
    return encoder, trained(encoder, EARLIER)


def test_rows_of_the_table_follow_their_values():
    """Colours 0, 1, 2 and tags t0, t1; then colours 0 to 4 and tags t0 to t3."""
    encoder = small.encoder(EARLIER)
    later = encoder.extended(small.FEATURES, LATER)
    #                                       unknown, 0, 1, 2, 3, 4; unknown, t0, t1, t2, t3
    assert table_rows(encoder, later).tolist() == [0, 1, 2, 3, 0, 0, 4, 5, 6, RANDOM, RANDOM]


def test_predictions_start_as_they_were_also_of_new_values(first):
    encoder, one = first
    later = encoder.extended(small.FEATURES, LATER)
    again = trained(later, LATER, start_of(encoder, one), epochs=1, learning_rate=NOTHING)
    known_tags = LATER.with_columns(pl.col("tags").list.head(2))
    before, after = (
        predict(model, encode_examples(e, known_tags, small.LABELS), small.TASKS)
        for e, model in ((encoder, one.model), (later, again.model))
    )
    assert after == pytest.approx(before, abs=1e-6)
    assert again.model.embedding.table.num_embeddings > one.model.embedding.table.num_embeddings


@pytest.mark.parametrize("sparse_rows", [1, 200_000])
def test_the_optimiser_state_is_kept_or_dropped(sparse_rows):
    """With the optimiser's state steps count on, and the weights differ from those without."""
    encoder = small.encoder(EARLIER)
    still = {"sparse_rows": sparse_rows, "spec": {"dropout": 0.0}, "epochs": 1}
    one = trained(encoder, EARLIER, **still)
    kept = trained(encoder, EARLIER, start_of(encoder, one), **still)
    dropped = trained(encoder, EARLIER, start_of(encoder, one), keep_optimiser=False, **still)
    steps = -(-len(EARLIER) // 64)
    name = "layers.0.gates.weight"
    assert float(one.moments[f"{name}/step"]) == steps
    assert float(kept.moments[f"{name}/step"]) == 2 * steps
    assert float(dropped.moments[f"{name}/step"]) == steps
    assert float(kept.moments["embedding.table.weight/step"]) == 2 * steps
    assert not torch.equal(kept.model.state_dict()[name], dropped.model.state_dict()[name])


def test_moments_of_new_values_start_at_zero_and_others_are_kept(first):
    encoder, one = first
    later = encoder.extended(small.FEATURES, LATER)
    known = LATER.filter(pl.col("colour") < 3)  # no batch has the new values
    again = trained(later, known, start_of(encoder, one), epochs=1, learning_rate=NOTHING)
    table = again.moments["embedding.table.weight/exp_avg_sq"]
    assert not table[[4, 5, 9, 10]].any()
    assert (table[[1, 2, 3]] > 0).any(1).all()


def test_moments_follow_their_values_and_unknown_values_keep_theirs(first):
    """Row r of the earlier table has r + 1 in each moment; new values have zeros."""
    encoder, one = first
    later = encoder.extended(small.FEATURES, LATER)
    model = build_ranker(small.spec(), later, small.TASKS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    count, width = one.model.embedding.table.weight.shape
    moment = torch.arange(1.0, count + 1).unsqueeze(1).expand(count, width)
    moments = dict(one.moments) | {f"{TABLE}/{key}": moment for key in MOMENTS}
    start = replace(start_of(encoder, one), moments=moments)
    restore_moments(model, [optimiser], start, later)
    restored = moments_of(model, [optimiser])
    # unknown, 0, 1, 2, new, new; unknown, t0, t1, new, new
    for key in MOMENTS:
        assert restored[f"{TABLE}/{key}"][:, 0].tolist() == [1, 2, 3, 4, 0, 0, 5, 6, 7, 0, 0]


def test_shrink_and_perturb_moves_matrices_and_embeddings_alone(first):
    """θ ← 0.5 θ + 0.1 θ₀, with θ₀ of a training that starts at random with the same seed."""
    encoder, one = first
    still = {"epochs": 1, "learning_rate": NOTHING, "weight_decay": 0.0}
    fresh = trained(encoder, EARLIER, **still).model.state_dict()
    mixed = trained(encoder, EARLIER, start_of(encoder, one), shrink=0.5, perturb=0.1, **still)
    weights, earlier = mixed.model.state_dict(), one.model.state_dict()
    for name in ("embedding.table.weight", "layers.0.gates.weight", "towers.weights.1"):
        expected = 0.5 * earlier[name] + 0.1 * fresh[name]
        torch.testing.assert_close(weights[name], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(weights["towers.biases.1"], earlier["towers.biases.1"])


def test_the_moments_of_an_unshared_model_are_of_each_objectives_best_epoch():
    """Objective t has its part of the moments at its own best epoch, as of the weights."""
    encoder, rows = small.encoder(EARLIER), encode_examples(small.encoder(EARLIER), EARLIER, [])
    alone = {"preset": "single_task", "expert_hidden": [8]}
    model = build_ranker(make("m", alone, len(small.TASKS)), encoder, small.TASKS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    best = BestWeights(model, len(small.TASKS), patience=9)
    best.optimisers = [optimiser]
    table, tower = [], []
    # The second objective is best in the first epoch, the others in the second one.
    for epoch, values in enumerate([[1.0, 0.5, 1.0], [0.9, 0.7, 0.9]], 1):
        optimiser.zero_grad()
        model(*rows.inputs).square().mean().backward()
        optimiser.step()
        moments = moments_of(model, [optimiser])
        table.append(moments["embedding.table.weight/exp_avg"])
        tower.append(moments["towers.biases.0/exp_avg"])
        best.keep(epoch, values)
    kept = best.restore()
    D = table[0].shape[1] // 3  # an embedding holds the objectives' side by side
    expected = torch.cat([table[1][:, :D], table[0][:, D : 2 * D], table[1][:, 2 * D :]], 1)
    assert torch.equal(kept["embedding.table.weight/exp_avg"], expected)
    expected = torch.stack([tower[1][0], tower[0][1], tower[1][2]])
    assert torch.equal(kept["towers.biases.0/exp_avg"], expected)
    assert float(kept["embedding.table.weight/step"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("balancing", sorted(BALANCERS))
def test_a_killed_continuation_is_resumed(tmp_path, first, balancing):
    """Not from its start again: the same weights and moments as without the kill."""
    encoder, one = first
    later = encoder.extended(small.FEATURES, LATER)
    start = start_of(encoder, one)

    class Killed(BaseException):
        pass

    class Dying(Checkpoint):
        saves = 0

        def due(self) -> bool:
            return True

        def save(self, state) -> None:
            super().save(state)
            self.saves += 1
            if self.saves == 7:
                raise Killed

    whole = trained(later, LATER, start, balancing=balancing)
    execution = Execution(checkpoint=Dying(tmp_path / "a.pt", "key"))
    with pytest.raises(Killed):
        trained(later, LATER, start, execution, balancing=balancing)
    execution = Execution(checkpoint=Checkpoint(tmp_path / "a.pt", "key"))
    again = trained(later, LATER, start, execution, balancing=balancing)
    for of in (lambda t: t.model.state_dict(), lambda t: t.moments):
        assert of(whole).keys() == of(again).keys()
        assert all(torch.equal(of(whole)[name], of(again)[name]) for name in of(whole))
