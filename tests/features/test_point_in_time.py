"""Point-in-time features: equal to a brute-force loop and blind to day D and later."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import polars.testing
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_ranker.commands.check import check_project
from mtl_ranker.config import load_project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features import examples as building
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.point_in_time import join_features
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_source
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, midnight, write_day
from tests.projects import TINY, changed, write_project

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
    project = load_project(str(root / "project.toml"))
    source, workspace = open_source(project, root), Workspace(root / "ws")
    for n, events in enumerate(days):
        day = FIRST + timedelta(days=n)
        write_day(root, day, frame_of(day, events))
        ingest_day(Context(project, source, workspace), day)
        aggregate_day(Context(project, source, workspace), day)
    last = FIRST + timedelta(days=len(days) - 1)
    build_examples(Context(project, source, workspace), last)
    return workspace.scan("examples", [last]).collect()


def oracle(days: list, keys: dict, window: int, of) -> tuple[int, int, float]:
    """Impressions, present labels and their sum in the window before the last day: plain loops."""
    impressions, count, total = 0, 0, 0.0
    for events in days[:-1][-window:]:
        for u, i, tab, click, play in events:
            row = {"user_id": u, "item_id": i, "tab": tab}
            if any(row[key] != value for key, value in keys.items()):
                continue
            impressions += 1
            label = of(click, play)
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
            seen, _, _ = oracle(days, chosen, 3, LABELS["click"])
            for window in (1, 3):
                for signal, of in LABELS.items():
                    impressions, count, total = oracle(days, chosen, window, of)
                    _, all_count, all_total = oracle(days, {}, window, of)
                    found = row[f"{name}_{signal}_rate_{window}d"]
                    if seen == 0:
                        assert found is None
                    elif all_count == 0:
                        assert found is None or found != found
                    elif rates == "relative" and all_total == 0:
                        assert found is None
                    else:
                        expected = (total + 20 * all_total / all_count) / (count + 20)
                        if rates == "relative":
                            expected /= all_total / all_count
                        assert found == pytest.approx(expected, rel=1e-5)
                    shown = row[f"{name}_daily_impressions_{window}d"]
                    logged = max(1, min(window, len(days) - 1))
                    if seen:
                        assert shown == pytest.approx(impressions / logged, rel=1e-6)
                    else:
                        assert shown is None


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(days=DAYS, length=st.sampled_from([1, 3, 30]))
def test_histories_are_the_last_clicks_of_earlier_days(tmp_path_factory, days, length):
    """Brute force: walk back through the days before the last one, three of them at most."""
    remembered = {"signal": "click", "columns": ["item_id", "tab"], "length": length}
    examples = build(tmp_path_factory.mktemp("history"), days, histories=[remembered])
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
    """Rewrite what happened on day D: for the same user, item and context nothing may change."""
    one = build(tmp_path_factory.mktemp("one"), days)
    changed = [(u, i, tab, 1 - click, 20 - play) for u, i, tab, click, play in days[-1]]
    two = build(tmp_path_factory.mktemp("two"), [*days[:-1], changed + other])
    features = [c for c in one.columns if c.endswith("d") or c.endswith("since")]
    features = [c for c in features if c not in ("user_id", "item_id")]
    key = ["user_id", "item_id", "tab"]
    before = one.select(*key, *features).unique()
    after = two.select(*key, *features).unique().join(before.select(key), on=key, how="semi")
    assert before.sort(key).equals(after.sort(key))


def test_same_sql_gives_candidates_the_features_of_impressions(tiny):
    project = load_project(str(tiny / "project.toml"))
    source, workspace = open_source(project, tiny), Workspace(tiny / "ws")
    days = source.days()
    for day in days:
        ingest_day(Context(project, source, workspace), day)
        aggregate_day(Context(project, source, workspace), day)
    build_examples(Context(project, source, workspace), days[-1])
    examples = workspace.scan("examples", days[-1:]).collect()
    candidates = examples.select("user_id", "item_id", "tab").lazy()
    joined = join_features(Context(project, source, workspace), candidates, days[-1]).collect()
    features = [c for c in joined.columns if c not in ("user_id", "item_id", "tab")]
    key = ["user_id", "item_id", "tab"]
    assert len(features) == 3 * (2 * 3 + 1)
    pl.testing.assert_frame_equal(
        joined.select(*key, *features).unique().sort(key),
        examples.select(*key, *features).unique().sort(key),
    )


def test_examples_are_rebuilt_only_when_their_history_changes(tiny):
    project = load_project(str(tiny / "project.toml"))
    source, workspace = open_source(project, tiny), Workspace(tiny / "ws")
    days = source.days()
    for day in days:
        ingest_day(Context(project, source, workspace), day)
        assert aggregate_day(Context(project, source, workspace), day)
        assert not aggregate_day(Context(project, source, workspace), day)
    assert build_examples(Context(project, source, workspace), days[-1])
    assert not build_examples(Context(project, source, workspace), days[-1])
    write_day(tiny, days[-2], frame_of(days[-2], [(1, 1, "home", 1, 5)]))
    ingest_day(Context(project, source, workspace), days[-2])
    aggregate_day(Context(project, source, workspace), days[-2])
    assert build_examples(Context(project, source, workspace), days[-1])


def test_a_day_in_blocks_of_users_has_the_same_examples(tiny):
    project = load_project(str(tiny / "project.toml"))
    source = open_source(project, tiny)
    found = []
    for rows in (1_000_000, 7):
        features = project.features.model_copy(update={"block_rows": rows})
        own, workspace = (
            project.model_copy(update={"features": features}),
            Workspace(tiny / str(rows)),
        )
        for day in source.days():
            ingest_day(Context(own, source, workspace), day)
            aggregate_day(Context(own, source, workspace), day)
        build_examples(Context(own, source, workspace), source.days()[-1])
        assert build_examples(Context(own, source, workspace), source.days()[-1]) is None
        found.append(workspace.scan("examples", source.days()[-1:]).collect())
    whole, blocks = found
    keys = ["timestamp", "user_id", "item_id"]
    assert whole["user_id"].n_unique() > 3
    assert not whole.equals(blocks)
    polars.testing.assert_frame_equal(blocks.sort(keys), whole)
    starts = blocks.select((pl.col("timestamp").diff() < 0).sum()).item()
    assert starts >= 2


def test_a_killed_day_goes_on_after_its_finished_blocks(tiny, monkeypatch):
    features = load_project(str(tiny / "project.toml")).features
    features = features.model_copy(update={"block_rows": 7})
    project = load_project(str(tiny / "project.toml")).model_copy(update={"features": features})
    source, workspace = open_source(project, tiny), Workspace(tiny / "ws")
    for day in source.days():
        ingest_day(Context(project, source, workspace), day)
        aggregate_day(Context(project, source, workspace), day)
    last = source.days()[-1]
    plan = building.plan_examples(Context(project, source, workspace), last)
    assert plan is not None
    first, *others = plan.parts
    building.build_examples_part(Context(project, source, workspace), last, first)
    file = first.file
    state = file.stat().st_mtime_ns
    built: list[Path] = []
    original = building.examples_of_block

    def counted(*arguments):
        built.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(building, "examples_of_block", counted)
    again = building.plan_examples(Context(project, source, workspace), last)
    assert again == plan
    assert file.stat().st_mtime_ns == state
    assert build_examples(Context(project, source, workspace), last) == "not built yet"
    assert built == [part.block for part in others]
    assert not file.exists()
    assert workspace.scan("examples", [last]).collect().height == 40


CATEGORICALS = TINY["features"]["categoricals"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"features": {"categoricals": changed(CATEGORICALS, 0, column="play")}},
            r"categoricals \(play\).*log.context",
        ),
        ({"features": {"numerics": ["play"]}}, r"numerics \(play\)"),
        (
            {"features": {"entities": [["user_id"], ["item_id"], ["user_id", "click"]]}},
            r"entities \(click\)",
        ),
        ({"log": {"context": ["tab", "click"]}}, r"log.context: click is the label"),
    ],
)
def test_what_the_impression_left_behind_is_no_feature_of_it(tiny, change, words):
    write_project(tiny, **change)
    project = load_project(str(tiny / "project.toml"))
    source, workspace = open_source(project, tiny), Workspace(tiny / "ws")
    day = source.days()[0]
    ingest_day(Context(project, source, workspace), day)
    with pytest.raises(ProjectError, match=words):
        build_examples(Context(project, source, workspace), day)
    with pytest.raises(ProjectError, match=words):
        list(check_project(str(tiny / "project.toml"), tiny))
