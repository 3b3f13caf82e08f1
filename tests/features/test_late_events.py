"""Events whose timestamps lie before or after their partition's day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import polars as pl
import polars.testing
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, midnight, write_day
from tests.projects import write_project

HOUR = 3_600_000  # milliseconds
EVENT = st.tuples(
    st.integers(0, 2), st.integers(0, 2), st.integers(0, 1), st.integers(-6 * HOUR, 30 * HOUR - 1)
)
DAYS = st.lists(st.lists(EVENT, min_size=2, max_size=8), min_size=4, max_size=4)


def day_of(milliseconds: int) -> date:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).date()


def examples(root, days, clicked=lambda click, time: click) -> pl.DataFrame:
    """Examples of the last partition, with features only."""
    history = {"signal": "click", "columns": ["item_id"], "length": 3}
    root.mkdir(exist_ok=True)
    write_project(
        root,
        log={"day_tolerance_hours": 6, "max_bad_share": 1.0},
        features={"histories": [history]},
    )
    context = open_context(str(root / "project.toml"), root, root / "ws")
    for number, events in enumerate(days):
        day = FIRST + timedelta(days=number)
        times = [midnight(day) + offset for *_, offset in events]
        write_day(
            root,
            day,
            pl.DataFrame(
                {
                    "u": [u for u, *_ in events],
                    "i": [i for _, i, *_ in events],
                    "ts": times,
                    "tab": ["home"] * len(events),
                    "click": [clicked(e[2], t) for e, t in zip(events, times, strict=True)],
                    "play": [1.0] * len(events),
                }
            ),
        )
        ingest_day(context, day)
        aggregate_day(context, day)
    build_examples(context, day)
    rows = context.workspace.scan("examples", [day]).collect()
    return rows.drop([c for c in rows.columns if c.startswith("label_")])


@pytest.mark.slow
@settings(
    max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(days=DAYS)
def test_no_feature_depends_on_an_event_of_the_rows_own_date(tmp_path_factory, days):
    """The labels of all events from the row's midnight on are flipped: its features stay."""
    before = examples(tmp_path_factory.mktemp("before"), days)
    for own in sorted({t.date() for t in before["timestamp"]}):

        def flipped(click: int, time: int, own: date = own) -> int:
            return 1 - click if day_of(time) >= own else click

        after = examples(tmp_path_factory.mktemp("after"), days, flipped)
        mine = pl.col("timestamp").dt.date() == own
        polars.testing.assert_frame_equal(before.filter(mine), after.filter(mine))


def test_a_late_event_counts_from_the_day_after_its_timestamp(tmp_path):
    """A click at 03:00 of the third day, in the second day's partition, counts on the fourth."""
    quiet = [(0, 0, 0, HOUR), (0, 1, 0, 2 * HOUR)]
    late = [*quiet, (0, 2, 1, 27 * HOUR)]
    third = examples(tmp_path / "third", [quiet, late, [(0, 2, 0, HOUR)]])
    assert third["user_daily_impressions_1d"].to_list() == [2.0]
    assert third["history_click_item_id"].to_list() == [None]
    fourth = examples(tmp_path / "fourth", [quiet, late, quiet, [(0, 2, 0, HOUR)]])
    assert fourth["user_daily_impressions_1d"].to_list() == [3.0]
    assert fourth["history_click_item_id"].to_list() == [[2]]


def test_an_early_row_has_the_features_of_its_own_date(tmp_path):
    """An impression at 23:00 of the second day, in the third day's partition."""
    first, second = [(0, 0, 1, HOUR)], [(0, 0, 0, HOUR), (0, 1, 0, 2 * HOUR)]
    rows = examples(tmp_path, [first, second, [(0, 2, 0, -HOUR), (0, 2, 0, HOUR)]])
    assert rows["user_daily_impressions_1d"].to_list() == [1.0, 2.0]
