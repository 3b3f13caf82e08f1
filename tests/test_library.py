"""`import mtl_ranker as mr`: training on one's own rows."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

import mtl_ranker as mr


def frame(rows: int = 1_500) -> pl.DataFrame:
    """Rows whose labels depend on a number and on a category."""
    random = np.random.default_rng(0)
    x, kind = random.normal(size=rows), random.integers(0, 3, rows)
    return pl.DataFrame(
        {
            "x": x,
            "kind": [["a", "b", "c"][k] for k in kind],
            "user": random.integers(0, 30, rows),
            "click": (x + random.normal(size=rows) > 0).astype(int),
            "level": np.clip(kind + (x > 1), 0, 3),
            "seconds": np.where(kind == 1, np.nan, 2.0 + x + kind),
        }
    )


def data(**changes) -> mr.Data:
    rows = frame()
    objectives = {"click": "binary", "level": "ordinal", "seconds": "regression"}
    options = {"train": rows[:1_000], "validate": rows[1_000:], "objectives": objectives}
    return mr.Data(**options | {"categoricals": ["kind"], "numerics": ["x"]} | changes)


def test_a_model_learns_every_kind_and_is_reproducible():
    settings = {"preset": "mmoe", "experts": 3, "expert_hidden": [16]}
    training, rows = mr.Training(epochs=6, batch_size=128, learning_rate=0.01), frame()[1_000:]
    torch.manual_seed(5)
    expected_random = torch.rand(1)
    torch.manual_seed(5)
    model = mr.train(data(user="user"), settings, training, seed=3)
    assert torch.rand(1) == expected_random  # the caller's random numbers are left alone
    metrics = model.evaluate(rows)
    assert metrics["click"]["auc"] > 0.75
    assert metrics["level"]["r2"] > 0.6
    assert metrics["seconds"]["r2"] > 0.6
    again = mr.train(data(user="user"), settings, training, seed=3)
    assert again.predict(rows).equals(model.predict(rows))
    gates = model.gates(rows)
    assert gates.columns == ["objective", "expert 1", "expert 2", "expert 3"]
    np.testing.assert_allclose(gates.drop("objective").sum_horizontal(), 1.0, rtol=1e-5)


def test_without_validation_rows_every_epoch_is_trained():
    model = mr.train(data(validate=None), "shared_bottom", mr.Training(epochs=3, patience=1))
    assert len(model.epochs) == 3
    assert model.best_epochs == [3, 3, 3]


def test_tensors_are_rows_with_named_columns():
    numeric, categorical = torch.randn(100, 2), torch.arange(100).reshape(-1, 1) % 4
    labels = {"a": torch.ones(100), "b": torch.rand(100)}
    made = mr.Data.of_tensors(numeric, labels, {"b": "regression"}, categorical, 0.1)
    assert (made.numerics, made.categoricals) == (["n1", "n2"], ["c1"])
    assert (made.train.height, made.validate.height) == (90, 10)
    assert made.objectives == {"a": "binary", "b": "regression"}
    np.testing.assert_array_equal(made.train["n2"].to_numpy(), numeric[:90, 1])
    assert made.validate["c1"].to_list() == [2, 3, 0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objectives": {"click": "rank"}}, r"objectives\['click'\]: 'rank'; allowed: binary, reg"),
        ({"numerics": ["x", "z"]}, "data.train: columns are missing: z"),
        ({"categoricals": [], "numerics": []}, "one feature column or more"),
        ({"user": "who"}, "columns are missing: who"),
    ],
)
def test_a_mistake_in_the_data_is_named(changes, words):
    with pytest.raises(mr.ProjectError, match=words):
        data(**changes)


def test_a_mistake_in_the_model_or_the_labels_is_named():
    with pytest.raises(mr.ProjectError, match=r"model.expert: unknown key .did you mean experts"):
        mr.train(data(), {"preset": "mmoe", "expert": 3})
    nothing = frame().with_columns(click=pl.lit(None, pl.Int64))
    with pytest.raises(mr.ProjectError, match="no labels of click"):
        mr.train(data(train=nothing))


@pytest.mark.slow
def test_every_exported_name_is_there_and_none_is_imported_before_its_use():
    code = "import sys, mtl_ranker as mr; print('torch' in sys.modules); "
    code += "print([n for n in mr.__all__ if getattr(mr, n) is None]); mr.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["False", "[]"]
    assert "module 'mtl_ranker' has no attribute 'nothing'" in done.stderr


def test_a_list_loss_needs_a_user():
    with pytest.raises(mr.ProjectError, match=r"data.user: not set, but the losses of click"):
        mr.train(data(), training=mr.Training(epochs=1, pairwise=1.0))
    with pytest.raises(mr.ProjectError, match=r"objectives\['y'\]: 'bin'; allowed: binary, "):
        data(objectives={"y": mr.Task("y", "bin")})


def test_labels_are_distilled_in_nights_only():
    with pytest.raises(mr.ProjectError, match=r"training\.distill: 0\.5; allowed: 0 outside of"):
        mr.train(data(), training=mr.Training(epochs=1, distill=0.5))


def test_pairs_of_a_users_rows_change_the_training():
    plain, ranked, again = (
        mr.train(data(user="user"), training=mr.Training(epochs=1, pairwise=weight)).predict(
            frame()
        )
        for weight in (0.0, 5.0, 0.0)
    )
    assert plain.equals(again)
    assert not plain.equals(ranked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numerics": ["x", "kind"]}, "data.train: 'kind' is String; allowed: numbers, Booleans"),
        ({"objectives": {"x": "binary"}, "numerics": ["seconds"]}, r"'x' \(binary\): .*0 to 1"),
        ({"objectives": {"seconds": "ordinal"}}, r"'seconds' \(ordinal\): .*whole numbers from 0"),
        ({"objectives": {"x": "regression"}}, "data: x: both a label and a feature"),
        ({"train": frame().clear()}, "data.train: no rows"),
        ({"validate": frame().clear()}, "data.validate: no rows"),
        ({"train": frame().lazy()}, "data.train: polars.LazyFrame; allowed: a polars DataFrame"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(changes, message):
    with pytest.raises(mr.ProjectError, match=message):
        data(**changes)
