"""Point-in-time features: equal to a brute-force loop, and independent of day D's events."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import polars.testing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.point_in_time import join_features
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, midnight, write_day
from tests.projects import write_project

EVENT = st.tuples(
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(["home", "search"]),
    st.integers(0, 1),
    st.integers(0, 20),
)
DAYS = st.lists(st.lists(EVENT, min_size=1, max_size=8), min_size=5, max_size=5)


def frame_of(day, events) -> pl.DataFrame:
    rows = [
        {"u": u, "i": i, "ts": midnight(day) + n, "tab": tab, "click": click, "play": float(play)}
        for n, (u, i, tab, click, play) in enumerate(events)
    ]
    return pl.DataFrame(rows)


def build(root: Path, days: list, **features: Any) -> pl.DataFrame:
    """Examples of the last day, through the real ingest, aggregates and SQL."""
    write_project(root, features=features)
    context = open_context(str(root / "project.toml"), root, root / "ws")
    for n, events in enumerate(days):
        day = FIRST + timedelta(days=n)
        write_day(root, day, frame_of(day, events))
        ingest_day(context, day)
        aggregate_day(context, day)
    last = FIRST + timedelta(days=len(days) - 1)
    build_examples(context, last)
    return context.workspace.scan("examples", [last]).collect()


def oracle(days: list, keys: dict, window: int, label_of) -> tuple[int, int, float]:
    """Impressions, present labels and their sum in the window before the last day: plain loops."""
    impressions, count, total = 0, 0, 0.0
    for events in days[:-1][-window:]:
        for u, i, tab, click, play in events:
            row = {"user_id": u, "item_id": i, "tab": tab}
            if any(row[key] != value for key, value in keys.items()):
                continue
            impressions += 1
            label = label_of(click, play)
            if label is not None:
                count += 1
                total += label
    return impressions, count, total


LABELS = {
    "click": lambda click, play: float(click),
    "long": lambda click, play: float(play > 10) if click == 1 else None,
}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(days=DAYS, rates=st.sampled_from(["absolute", "relative"]))
def test_features_equal_brute_force(tmp_path_factory, days, rates):
    examples = build(tmp_path_factory.mktemp("oracle"), days, rates=rates)
    assert examples.height == len(days[-1])
    for row in examples.to_dicts():
        for name, keys in (
            ("user", ["user_id"]),
            ("item", ["item_id"]),
            ("user_x_tab", ["user_id", "tab"]),
        ):
            chosen = {key: row[key] for key in keys}
            recent, _, _ = oracle(days, chosen, 3, LABELS["click"])
            for window in (1, 3):
                for signal, label_of in LABELS.items():
                    impressions, count, total = oracle(days, chosen, window, label_of)
                    _, all_count, all_total = oracle(days, {}, window, label_of)
                    rate = row[f"{name}_{signal}_rate_{window}d"]
                    if recent == 0:
                        assert rate is None
                    elif all_count == 0:
                        assert rate is None or rate != rate
                    elif rates == "relative" and all_total == 0:
                        assert rate is None
                    else:
                        expected = (total + 20 * all_total / all_count) / (count + 20)
                        if rates == "relative":
                            expected /= all_total / all_count
                        assert rate == pytest.approx(expected, rel=1e-5)
                    shown = row[f"{name}_daily_impressions_{window}d"]
                    logged = max(1, min(window, len(days) - 1))
                    if recent:
                        assert shown == pytest.approx(impressions / logged, rel=1e-6)
                    else:
                        assert shown is None


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(days=DAYS, length=st.sampled_from([1, 3, 30]))
def test_histories_are_the_last_clicks_of_earlier_days(tmp_path_factory, days, length):
    """Brute force: walk back through the days before the last one, three of them at most."""
    history = {"signal": "click", "columns": ["item_id", "tab"], "length": length}
    examples = build(tmp_path_factory.mktemp("history"), days, histories=[history])
    assert examples["history_click_item_id"].dtype == pl.List(examples["item_id"].dtype)
    for row in examples.to_dicts():
        latest = [
            (i, tab)
            for events in reversed(days[:-1][-3:])
            for u, i, tab, click, _ in reversed(events)
            if u == row["user_id"] and click
        ][:length]
        items, tabs = (row[f"history_click_{c}"] or [] for c in ("item_id", "tab"))
        assert list(zip(items, tabs, strict=True)) == latest


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(days=DAYS, other=st.lists(EVENT, min_size=1, max_size=8))
def test_no_feature_of_a_day_changes_when_its_own_events_change(tmp_path_factory, days, other):
    """Change day D's events: features of the same user, item and context stay the same."""
    original = build(tmp_path_factory.mktemp("original"), days)
    opposite = [(u, i, tab, 1 - click, 20 - play) for u, i, tab, click, play in days[-1]]
    changed = build(tmp_path_factory.mktemp("changed"), [*days[:-1], opposite + other])
    features = [c for c in original.columns if c.endswith("d") or c.endswith("since")]
    features = [c for c in features if c not in ("user_id", "item_id")]
    key = ["user_id", "item_id", "tab"]
    before = original.select(*key, *features).unique()
    after = changed.select(*key, *features).unique().join(before.select(key), on=key, how="semi")
    assert before.sort(key).equals(after.sort(key))


def test_same_sql_gives_candidates_the_features_of_impressions(tiny):
    context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
    days = context.source.days()
    for day in days:
        ingest_day(context, day)
        aggregate_day(context, day)
    build_examples(context, days[-1])
    examples = context.workspace.scan("examples", days[-1:]).collect()
    candidates = examples.select("user_id", "item_id", "tab").lazy()
    joined = join_features(context, candidates, days[-1]).collect()
    features = [c for c in joined.columns if c not in ("user_id", "item_id", "tab")]
    key = ["user_id", "item_id", "tab"]
    assert len(features) == 3 * (2 * 3 + 1)
    pl.testing.assert_frame_equal(
        joined.select(*key, *features).unique().sort(key),
        examples.select(*key, *features).unique().sort(key),
    )
