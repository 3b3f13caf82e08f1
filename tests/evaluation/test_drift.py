"""PSI against hand-worked values and its properties; held-out days against training days."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_ranker.evaluation.drift import Sample, effective_keys, excess_psi, health, psi
from mtl_ranker.features.columns import numeric_features
from tests import projects
from tests.conftest import FIRST


def test_psi_of_two_bins_by_hand():
    reference = np.array([0.0] * 50 + [1.0] * 50)
    now = np.array([0.0] * 20 + [1.0] * 80)
    # The one inner edge is 0: bins "up to 0" and "above"; no missing values but half a row each.
    a = np.array([20, 80, 0.5]) / 100.5
    b = np.array([50, 50, 0.5]) / 100.5
    expected = float(((a - b) * np.log(a / b)).sum())
    assert psi(Sample(reference), Sample(now)) == pytest.approx(expected)


@given(st.lists(st.floats(-5, 5), min_size=20, max_size=60), st.floats(0.1, 9))
def test_psi_is_zero_for_itself_never_negative_and_invariant_under_monotone_maps(values, factor):
    x = np.array(values)
    y = np.roll(x, 1)[: len(x) // 2]
    assert psi(Sample(x), Sample(x)) == pytest.approx(0.0, abs=1e-9)
    assert psi(Sample(x), Sample(y)) >= 0
    x, y = np.round(x, 3), np.round(y, 3)
    scaled = psi(Sample(x * 8), Sample(y * 8))
    assert scaled == pytest.approx(psi(Sample(x), Sample(y)))


def test_missing_values_are_a_bin_of_their_own():
    x = np.linspace(0, 1, 200)
    holes = np.where(np.arange(200) % 2 == 0, np.nan, x)
    assert psi(Sample(x), Sample(holes)) > 0.25 > 0.1 > psi(Sample(x), Sample(x[::2]))


def test_psi_without_a_change_is_chi_squared_and_its_excess_is_zero():
    """Of ten bins: mean 9 of PSI / (1/n + 1/m); small samples stay below the quantile too."""
    rng = np.random.default_rng(0)
    for n, m in ((4_000, 1_000), (400, 90)):
        pairs = [(Sample(rng.random(n)), Sample(rng.random(m))) for _ in range(300)]
        if m == 1_000:
            scaled = [psi(a, b) / (1 / n + 1 / m) for a, b in pairs]
            assert np.mean(scaled) == pytest.approx(9, abs=0.7)
        assert np.mean([excess_psi(a, b) > 0 for a, b in pairs]) <= 0.01


def test_a_shift_is_still_found_and_its_excess_nears_the_psi_with_more_values():
    rng = np.random.default_rng(1)
    few, many = (
        (Sample(rng.normal(size=n)), Sample(rng.normal(1.0, 1.0, size=n))) for n in (300, 100_000)
    )
    assert excess_psi(*few) > 0.25
    assert excess_psi(*many) == pytest.approx(psi(*many), abs=0.01)


@pytest.mark.parametrize("keys", [3, 12, 40])
def test_rates_of_few_keys_have_no_excess_however_many_rows_they_have(keys):
    """Each key has a new rate every day, from the same distribution; PSI of rows would be large."""
    rng = np.random.default_rng(keys)
    loud = found = 0
    for _ in range(60):
        training = np.repeat(rng.random(keys * 7), 500)
        today = np.repeat(rng.random(keys), 500)
        loud += psi(Sample(training), Sample(today)) > 0.25
        found += excess_psi(Sample(training, keys), Sample(today, keys)) > 0
    assert loud >= (40 if keys < 40 else 5)
    assert found == 0


def test_the_number_of_keys_is_kishs_by_hand():
    assert effective_keys(pl.DataFrame({"tab": ["a"] * 3 + ["b"]})) == pytest.approx(16 / 10)
    pairs = pl.DataFrame({"user_id": [1, 1, 2], "tab": ["a", "b", "a"]})
    assert effective_keys(pairs) == pytest.approx(3)


def examples(day, rows: int, tab_null: bool = False, click: float = 0.3) -> pl.DataFrame:
    n = np.arange(rows)
    base = {
        "user_id": n % 50,
        "item_id": n % 40,
        "date": [day] * rows,
        "tab": [None if tab_null else "home"] * rows,
        "label_click": (n % 10 < 10 * click).astype(np.float32),
        "label_long": pl.Series([None] * rows, dtype=pl.Float32),
    }
    frame = pl.DataFrame(base, schema_overrides={"tab": pl.String})
    project = projects.project()
    return frame.with_columns(
        pl.Series(n / rows + 0.0).cast(pl.Float32).alias(c) for c in numeric_features(project)
    )


def test_a_warning_names_what_changed_and_the_threshold():
    project = projects.project(drift={"fail_nulls": 0.5})
    train = pl.concat([examples(FIRST + timedelta(days=d), 100) for d in range(3)])
    quiet = health(project, {"train": train, "test": examples(FIRST + timedelta(days=4), 100)})
    assert (quiet.warnings, quiet.failures) == ([], [])
    assert [d.rows for d in quiet.days] == [100] * 4
    assert quiet.days[-1].new_users == 0.0
    shifted = examples(FIRST + timedelta(days=4), 30, tab_null=True, click=0.9)
    shifted = shifted.with_columns(pl.col("user_id") + 1_000, pl.col("user_click_rate_1d") + 5.0)
    loud = health(project, {"train": train, "test": shifted})
    messages = "\n".join(loud.warnings)
    assert "30 rows, -70% of a training day" in messages
    assert "label click 0.9000, +200% of training" in messages
    assert "2026-03-06: the distribution of user_click_rate_1d" in messages
    assert loud.failures == [
        "2026-03-06: tab is missing in 100.0%, in training 0.0%; "
        "allowed: at most 0.5 (drift.fail_nulls)"
    ]
    assert loud.days[-1].new_users == 1.0
    assert loud.summary.startswith("2026-03-06: 30 rows")
    assert loud.summary.endswith(f"; {len(loud.warnings) - 1} more in the report's data health")
    assert "\n" not in loud.summary
    assert quiet.summary is None


def test_a_fall_of_a_label_and_of_missing_values_in_training_is_reported():
    project = projects.project()
    train = pl.concat([examples(FIRST + timedelta(days=d), 100, tab_null=True) for d in range(3)])
    less = examples(FIRST + timedelta(days=4), 100, tab_null=True, click=0.1)
    found = health(project, {"train": train, "test": less}).warnings
    assert any("label click 0.1000, -67% of training" in warning for warning in found)
    assert not any("is missing" in warning for warning in found)


def test_a_sample_of_training_rows_is_not_its_days_volume():
    """One in four rows in memory: the days' own numbers of rows are compared."""
    project = projects.project()
    days = [FIRST + timedelta(days=d) for d in range(3)]
    sample = pl.concat([examples(day, 25) for day in days])
    frames = {"train": sample, "test": examples(FIRST + timedelta(days=4), 100)}
    assert "+300% of a training day" in health(project, frames).warnings[0]
    known = health(project, frames, day_rows=dict.fromkeys(days, 100))
    assert known.warnings == []
    assert [d.rows for d in known.days] == [100] * 4


def test_keys_without_events_count_as_one_in_a_rate():
    """Nine users in ten have the rate of all events, which is another one every day."""
    project = projects.project()
    rng = np.random.default_rng(0)

    def day(number: int, level: float) -> pl.DataFrame:
        rate = np.where(np.arange(200) < 180, level, rng.random(200))
        frame = examples(FIRST + timedelta(days=number), 200)
        frame = frame.with_columns(pl.Series("user_id", np.arange(200)))
        return frame.with_columns(
            pl.Series("user_click_rate_3d", rate, dtype=pl.Float32),
            pl.Series("user_daily_impressions_1d", rate, dtype=pl.Float32),
        )

    train = pl.concat([day(n, level) for n, level in enumerate((0.30, 0.31, 0.32))])
    psi = health(project, {"train": train, "test": day(4, 0.315)}).days[-1].psi
    assert psi["user_click_rate_3d"] == 0
    assert psi["user_daily_impressions_1d"] > 1


def test_what_grows_by_itself_has_no_psi():
    """Counts and rates over windows longer than the log before training, and items' age."""
    items = {"path": "items.parquet", "key": "i", "published": "published"}
    project = projects.project(log={"items": items})
    train = examples(FIRST, 200).with_columns(pl.lit(1.0).alias("item_age_days"))
    test = train.with_columns(pl.lit(FIRST + timedelta(days=1)).alias("date"))
    young = health(project, {"train": train, "test": test}, history_days=2).days[-1].psi
    old = health(project, {"train": train, "test": test}, history_days=3).days[-1].psi
    assert "item_age_days" not in old
    assert "user_daily_impressions_1d" in young
    assert "user_click_rate_1d" in young
    assert set(old) - set(young) == {
        f"{prefix}_{name}"
        for prefix in ("user", "item", "user_x_tab")
        for name in ("daily_impressions_3d", "days_since", "click_rate_3d", "long_rate_3d")
    }
