"""PSI against hand-worked values and its properties; held-out days against training days."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_ranker.evaluation.drift import health, psi
from mtl_ranker.features.columns import numeric_features
from tests import projects
from tests.conftest import FIRST


def test_psi_of_two_bins_by_hand():
    reference = np.array([0.0] * 50 + [1.0] * 50)
    now = np.array([0.0] * 20 + [1.0] * 80)
    # The one inner edge is 0: bins "up to 0" and "above"; no missing values but half a row each.
    a = np.array([20, 80, 0.5]) / 100.5
    b = np.array([50, 50, 0.5]) / 100.5
    assert psi(reference, now) == pytest.approx(float(((a - b) * np.log(a / b)).sum()))


@given(st.lists(st.floats(-5, 5), min_size=20, max_size=60), st.floats(0.1, 9))
def test_psi_is_zero_for_itself_never_negative_and_invariant_under_monotone_maps(values, factor):
    x = np.array(values)
    y = np.roll(x, 1)[: len(x) // 2]
    assert psi(x, x) == pytest.approx(0.0, abs=1e-9)
    assert psi(x, y) >= 0
    scaled = psi(np.round(x, 3) * 8, np.round(y, 3) * 8)
    assert scaled == pytest.approx(psi(np.round(x, 3), np.round(y, 3)))


def test_missing_values_are_a_bin_of_their_own():
    x = np.linspace(0, 1, 200)
    holes = np.where(np.arange(200) % 2 == 0, np.nan, x)
    assert psi(x, holes) > 0.25 > 0.1 > psi(x, x[::2])


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
    shifted = examples(FIRST + timedelta(days=4), 20, tab_null=True, click=0.9)
    shifted = shifted.with_columns(pl.col("user_id") + 1_000, pl.col("user_click_rate_1d") + 5.0)
    loud = health(project, {"train": train, "test": shifted})
    messages = "\n".join(loud.warnings)
    assert "20 rows, -80% of a training day" in messages
    assert "label click 0.9000, +200% of training" in messages
    assert "2026-03-06: the distribution of user_click_rate_1d" in messages
    assert loud.failures == [
        "2026-03-06: tab is missing in 100.0%, in training 0.0%; "
        "allowed: at most 0.5 (drift.fail_nulls)"
    ]
    assert loud.days[-1].new_users == 1.0
