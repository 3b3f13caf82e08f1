"""Slices against metrics of rows that are filtered in the test."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from mtl_ranker.evaluation.metrics import PredictedRows, gauc
from mtl_ranker.evaluation.slices import divide, slice_metrics, worst
from mtl_ranker.models.objectives import Task


def test_divide_forms_thirds_a_cold_slice_and_bands_of_age():
    frame = pl.DataFrame(
        {
            "tab": [1, 1, 2, 2, 2, None],
            "user_daily_impressions_3d": [None, 1.0, 2.0, 3.0, 4.0, 5.0],
            "item_age_days": [0.0, 1.0, 5.0, 8.0, 400.0, None],
        }
    )
    slices = divide(frame, ["tab"], {"user": "user_daily_impressions_3d"})
    assert slices["tab"].to_list() == ["1", "1", "2", "2", "2", None]
    assert slices["user activity"].to_list() == [
        "cold (not seen in the window)",
        "low third",
        "low third",
        "middle third",
        "middle third",
        "high third",
    ]
    assert slices["item age"].to_list() == [
        "up to 1 day",
        "up to 1 day",
        "2 to 7 days",
        "8 to 30 days",
        "over 30 days",
        "unknown",
    ]


def test_a_number_with_many_values_is_cut_into_quarters():
    number = [float(n) for n in range(1, 41)] + [None, float("nan")]
    frame = pl.DataFrame({"age": number, "tab": [1, 2] * 21})
    slices = divide(frame, ["age", "tab"], {})
    counts = slices["age"].value_counts().drop_nulls()
    assert dict(counts.iter_rows()) == {
        "up to 10": 10,
        "over 10 up to 20": 10,
        "over 20 up to 30": 10,
        "over 30": 10,
    }
    assert slices["age"].to_list()[-2:] == [None, None]
    assert set(slices["tab"]) == {"1", "2"}
    skewed = pl.DataFrame({"age": [0] * 90 + list(range(1, 20))})
    assert set(divide(skewed, ["age"], {})["age"]) == {"up to 0", "over 0"}


def test_a_slice_has_the_metrics_of_its_rows_and_the_worst_is_reported():
    rng = np.random.default_rng(0)
    n = 6_000
    probability = rng.random(n)
    label = (rng.random(n) < probability).astype(np.float32)
    noise = np.arange(n) % 3 == 0
    probability[noise] = rng.random(noise.sum())  # predictions without information
    tab = pl.Series(np.where(noise, "noise", "signal"))
    rows = PredictedRows(label[:, None], probability[:, None], np.arange(n) % 500, np.arange(n))
    metrics = slice_metrics([Task("click", "binary")], rows, {"tab": tab})
    by_value = {s.value: s for s in metrics}
    expected = roc_auc_score(label[noise], probability[noise])
    assert by_value["noise"].quality.value == pytest.approx(expected)
    assert by_value["signal"].rows == (~noise).sum()
    assert by_value["noise"].gap.high < -0.1
    assert [s.value for s in worst(metrics)] == ["noise"]
    assert "click is worst where tab is noise" in str(worst(metrics)[0])


def test_a_slice_is_judged_by_the_order_within_its_lists():
    """Levels per user are unknown to the model, the order within lists is known on one tab only."""
    rng = np.random.default_rng(0)
    user, n = np.arange(4_000) // 8, 4_000
    tab = np.where(np.arange(n) // 4 % 2 == 0, "known", "noise")  # two lists of each user
    taste, level = rng.normal(size=n), 2 * rng.normal(size=500)[user]
    label = (rng.random(n) < 1 / (1 + np.exp(-taste - level))).astype(np.float32)
    score = np.where(tab == "known", taste, rng.normal(size=n))
    lists = np.unique(np.stack([user, tab == "known"]), axis=1, return_inverse=True)[1]
    rows = PredictedRows(label[:, None], score[:, None], user, lists)
    found = {
        s.value: s for s in slice_metrics([Task("a", "binary")], rows, {"tab": pl.Series(tab)})
    }
    for name, each in found.items():
        chosen = tab == name
        assert each.measure == "gauc"
        assert each.quality.value == pytest.approx(
            gauc(label[chosen], score[chosen], lists[chosen])
        )
        assert each.auc == pytest.approx(roc_auc_score(label[chosen], score[chosen]))
    assert (found["known"].verdict, found["noise"].verdict) == (1, -1)
    assert "a is worst where tab is noise: list GAUC" in str(found["noise"])


def test_a_slice_with_too_few_positives_is_left_out_and_never_the_worst():
    label = np.r_[np.ones(9), np.zeros(500), np.ones(200), np.zeros(200)].astype(np.float32)
    tab = pl.Series(["small"] * 509 + ["large"] * 400)
    prediction = np.random.default_rng(0).random((909, 1))
    rows = PredictedRows(label[:, None], prediction, np.arange(909), np.arange(909))
    metrics = slice_metrics([Task("click", "binary")], rows, {"tab": tab})
    assert {s.value for s in metrics} == {"large"}


def test_without_any_history_every_row_is_cold():
    frame = pl.DataFrame({"n": [None, None]}, schema={"n": pl.Float32})
    slices = divide(frame, [], {"user": "n"})
    assert slices["user activity"].to_list() == ["cold (not seen in the window)"] * 2
