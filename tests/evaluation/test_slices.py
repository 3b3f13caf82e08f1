"""Slices against metrics of rows filtered by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from mtl_ranker.evaluation.slices import divide, slice_metrics, worst
from mtl_ranker.models.objectives import Task


def test_rows_fall_into_thirds_cold_ones_apart_and_ages_into_bands():
    frame = pl.DataFrame(
        {
            "tab": [1, 1, 2, 2, 2, None],
            "user_daily_impressions_3d": [None, 1.0, 2.0, 3.0, 4.0, 5.0],
            "item_age_days": [0.0, 1.0, 5.0, 8.0, 400.0, None],
        }
    )
    parts = divide(frame, ["tab"], {"user": "user_daily_impressions_3d"})
    assert parts["tab"].to_list() == ["1", "1", "2", "2", "2", None]
    assert parts["user activity"].to_list() == [
        "cold (not seen in the window)",
        "low third",
        "low third",
        "middle third",
        "middle third",
        "high third",
    ]
    assert parts["item age"].to_list() == [
        "up to 1 day",
        "up to 1 day",
        "2 to 7 days",
        "8 to 30 days",
        "over 30 days",
        "unknown",
    ]


def test_a_slice_has_the_metrics_of_its_rows_and_the_worst_is_named():
    rng = np.random.default_rng(0)
    n = 6_000
    p = rng.random(n)
    label = (rng.random(n) < p).astype(np.float32)
    blind = np.arange(n) % 3 == 0
    p[blind] = rng.random(blind.sum())  # on these rows the prediction knows nothing
    tab = pl.Series(np.where(blind, "blind", "seen"))
    found = slice_metrics(
        [Task("click", "binary")], label[:, None], p[:, None], np.arange(n) % 500, {"tab": tab}
    )
    by_value = {s.value: s for s in found}
    assert by_value["blind"].quality.value == pytest.approx(roc_auc_score(label[blind], p[blind]))
    assert by_value["seen"].rows == (~blind).sum()
    assert by_value["blind"].gap < -0.1
    assert [s.value for s in worst(found)] == ["blind"]
    assert "click is worst where tab is blind" in str(worst(found)[0])


def test_a_slice_with_too_few_positives_is_left_out_and_never_the_worst():
    label = np.r_[np.ones(9), np.zeros(500), np.ones(200), np.zeros(200)].astype(np.float32)
    tab = pl.Series(["small"] * 509 + ["large"] * 400)
    found = slice_metrics(
        [Task("click", "binary")],
        label[:, None],
        np.random.default_rng(0).random((909, 1)),
        np.arange(909),
        {"tab": tab},
    )
    assert {s.value for s in found} == {"large"}
