"""Aggregates and labels of actions: equal to a brute-force loop, and nothing known too early."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mtl_ranker.context import Context
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.arrivals import arrivals
from mtl_ranker.features.audit import audit_day
from mtl_ranker.features.days import split_days
from mtl_ranker.features.examples import build_examples, plan_examples
from mtl_ranker.logs.actions import final_day
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, midnight, write_day
from tests.projects import WITHOUT, edit_project, write_project

HOUR = 3_600_000
DAYS = 5
LAST = FIRST + timedelta(days=DAYS - 1)


class Shown(NamedTuple):
    """An impression: user, item and surface, hours after the start of the first day."""

    user: int
    item: int
    tab: str
    hour: int


class Acted(NamedTuple):
    """An action; it arrives `late` hours after it happens."""

    user: int
    item: int
    hour: int
    late: int
    seconds: int


SHOWN = st.builds(
    Shown,
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(["home", "search"]),
    st.integers(0, 24 * DAYS - 1),
)
ACTED = st.builds(
    Acted,
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 24 * DAYS - 1),
    st.integers(0, 40),
    st.integers(1, 9),
)
WINDOW = 48  # hours
PHASES = [Phase.explicit, Phase.generate]  # an example takes too long for shrinking
LIKE = {"name": "like", "path": "likes", "window": "48h", "arrived": "got", "organic": True}
WATCH = {"name": "watch", "path": "watched", "window": "48h", "value": "s", "reduce": "sum"}


def write_actions(
    root: Path, path: str, actions: Sequence[Acted], by_arrival: bool = False
) -> None:
    """Daily partitions by the day on which an action happens, or arrives, also of empty days."""
    for n in range(DAYS):
        own = [a for a in actions if (a.hour + a.late * by_arrival) // 24 == n]
        frame = pl.DataFrame(
            {
                "u": [a.user for a in own],
                "i": [a.item for a in own],
                "ts": [midnight(FIRST) + a.hour * HOUR for a in own],
                "got": [midnight(FIRST) + (a.hour + a.late) * HOUR for a in own],
                "s": [float(a.seconds) for a in own],
            },
            schema={"u": pl.Int64, "i": pl.Int64, "ts": pl.Int64, "got": pl.Int64, "s": pl.Float64},
        )
        folder = root / path / f"date={FIRST + timedelta(days=n)}"
        folder.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(folder / "part-0.parquet")


def write_world(
    root: Path,
    shown: Sequence[Shown],
    likes: Sequence[Acted],
    watched: Sequence[Acted],
    by_arrival: bool = False,
) -> Context:
    """The likes' folders may be by the day of arrival."""
    write_project(
        root,
        log={"ranges": WITHOUT, "actions": [LIKE, WATCH], "max_bad_share": 1.0},
        objectives=[
            {"name": "like", "group": "satisfaction", "label": '"like"'},
            {
                "name": "long",
                "group": "engagement",
                "label": "case when watch > 5 then 1 else 0 end",
            },
        ],
        split={"warmup_days": 0},
        features={
            "signals": {"watched": "watch"},
            "windows": [1, 3],
            "histories": [{"signal": "like", "columns": ["item_id"], "length": 3}],
        },
    )
    for n in range(DAYS):
        own = [s for s in shown if s.hour // 24 == n]
        frame = pl.DataFrame(
            {
                "u": [s.user for s in own],
                "i": [s.item for s in own],
                "ts": [midnight(FIRST) + s.hour * HOUR for s in own],
                "tab": [s.tab for s in own],
            }
        )
        write_day(root, FIRST + timedelta(days=n), frame)
    write_actions(root, "likes", likes, by_arrival)
    write_actions(root, "watched", watched)
    return open_context(str(root / "project.toml"), root, root / "ws")


def build(context: Context) -> pl.DataFrame:
    for n in range(DAYS):
        ingest_day(context, FIRST + timedelta(days=n))
        aggregate_day(context, FIRST + timedelta(days=n))
    build_examples(context, LAST)
    return context.workspace.scan("examples", [LAST]).collect()


def one_each_day(shown: Sequence[Shown]) -> list[Shown]:
    """Impressions without repetitions, at least one on each day."""
    given = [Shown(0, 0, "home", 24 * n + 1) for n in range(DAYS)]
    unique = {(s.user, s.item, s.hour): s for s in [*shown, *given]}
    return sorted(unique.values(), key=lambda s: s.hour)


def distinct(actions: Sequence[Acted], *key: str) -> list[Acted]:
    """Of actions that are the same, the first to arrive."""
    ordered = sorted(actions, key=lambda a: -a.late)
    return list({tuple(getattr(a, name) for name in key): a for a in ordered}.values())


def belongs_to(shown: Sequence[Shown], action: Acted, late: int) -> Shown | None:
    """Brute force: the nearest impression that is not after the action, if in the window."""
    earlier = [s for s in shown if s[:2] == action[:2] and s.hour <= action.hour]
    nearest = max(earlier, key=lambda s: s.hour, default=None)
    if nearest is None or action.hour + late - nearest.hour > WINDOW:
        return None
    return nearest


class Oracle:
    """The state of every impression as known at the start of a day: plain loops."""

    def __init__(self, shown: Sequence[Shown], likes: Sequence[Acted], watched: Sequence[Acted]):
        self.shown = shown
        likes = distinct(likes, "user", "item", "hour")
        watched = distinct(watched, "user", "item", "hour", "seconds")
        self.likes = [(a, belongs_to(shown, a, a.late)) for a in likes]
        self.watched = [(a, belongs_to(shown, a, 0)) for a in watched]

    def state(self, shown: Shown, day: int) -> dict[str, float]:
        """Signals of an impression from actions that are known before a day."""
        liked = [a for a, s in self.likes if s == shown and (a.hour + a.late) // 24 < day]
        seconds = [a.seconds for a, s in self.watched if s == shown and a.hour // 24 < day]
        total = float(sum(seconds))
        return {"like": float(bool(liked)), "long": float(total > 5), "watched": total}

    def sums(self, day: int, window: int, keys: dict[str, Any]) -> tuple[int, dict[str, float]]:
        """Impressions in the window before a day, and what signals grew by in the window."""
        start, count, grown = day - window, 0, {"like": 0.0, "long": 0.0, "watched": 0.0}
        for shown in self.shown:
            row = {"user_id": shown.user, "item_id": shown.item, "tab": shown.tab}
            if any(row[key] != value for key, value in keys.items()):
                continue
            if shown.hour // 24 >= day:
                continue
            count += start <= shown.hour // 24
            after, before = self.state(shown, day), self.state(shown, start)
            for name in grown:
                grown[name] += after[name] - before[name]
        if "tab" not in keys:
            for action, shown in self.likes:
                row = {"user_id": action.user, "item_id": action.item}
                own = all(row[key] == value for key, value in keys.items())
                if shown is None and own and start <= (action.hour + action.late) // 24 < day:
                    grown["like"] += 1.0
        return count, grown

    def liked(self, user: int, day: int) -> list[int]:
        """Items of a user's latest likes that are known in the three days before a day."""
        known: dict[Any, tuple[int, int]] = {}  # impression or action → day known, hour
        for number, (action, shown) in enumerate(self.likes):
            at = (action.hour + action.late) // 24
            of = (shown, action.item) if shown else (number, action.item)
            entry = (at, shown.hour if shown else action.hour)
            if action.user == user:
                known[of] = min(known.get(of, entry), entry)
        recent = [(at, hour, -of[1]) for of, (at, hour) in known.items() if day - 3 <= at < day]
        return [-item for _, _, item in sorted(recent, reverse=True)[:3]]


@pytest.mark.slow
@settings(max_examples=25, phases=PHASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shown=st.lists(SHOWN, max_size=12),
    likes=st.lists(ACTED, max_size=12),
    watched=st.lists(ACTED, max_size=12),
    by_arrival=st.booleans(),
)
def test_features_and_labels_equal_brute_force(tmp_path_factory, shown, likes, watched, by_arrival):
    shown = one_each_day(shown)
    if by_arrival:  # copies in two folders count twice
        likes = distinct(likes, "user", "item", "hour")
    root = tmp_path_factory.mktemp("oracle")
    context = write_world(root, shown, likes, watched, by_arrival)
    examples = build(context)
    assert audit_day(context, LAST, 100).differences == []
    oracle, day = Oracle(shown, likes, watched), DAYS - 1
    entities = {"user": ["user_id"], "item": ["item_id"], "user_x_tab": ["user_id", "tab"]}
    for row in examples.to_dicts():
        hour = (row["timestamp"].timestamp() * 1000 - midnight(FIRST)) / HOUR
        own = Shown(row["user_id"], row["item_id"], row["tab"], round(hour))
        state = oracle.state(own, DAYS)
        assert (row["label_like"], row["label_long"]) == (state["like"], state["long"])
        assert (row["history_like_item_id"] or []) == oracle.liked(own.user, day)
        for name, columns in entities.items():
            for window in (1, 3):
                keys = {key: row[key] for key in columns}
                count, grown = oracle.sums(day, window, keys)
                total, overall = oracle.sums(day, window, {})
                impressions = row[f"{name}_daily_impressions_{window}d"]
                if impressions is None:  # nothing of the key in the longest window
                    assert (count, set(grown.values())) == (0, {0.0})
                    continue
                assert impressions == pytest.approx(count / window)
                for signal, value in grown.items():
                    expected = (value + 20 * overall[signal] / total) / (count + 20)
                    assert row[f"{name}_{signal}_rate_{window}d"] == pytest.approx(
                        expected, rel=1e-5, abs=1e-7
                    )


@pytest.mark.slow
@settings(max_examples=15, phases=PHASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shown=st.lists(SHOWN, max_size=10),
    likes=st.lists(ACTED, max_size=8),
    later=st.lists(ACTED, min_size=1, max_size=6),
)
def test_no_action_after_the_as_of_moment_changes_a_feature(tmp_path_factory, shown, likes, later):
    """Add likes that arrive, and watching that happens, on the day of the row or after it."""
    shown, start = one_each_day(shown), 24 * (DAYS - 1)
    arriving = [a._replace(late=max(a.late, start - a.hour)) for a in later]
    happening = [a._replace(hour=start + a.hour % 24) for a in later]
    roots = [tmp_path_factory.mktemp(name) for name in ("before", "after")]
    before = build(write_world(roots[0], shown, likes, []))
    after = build(write_world(roots[1], shown, [*arriving, *likes], happening))
    labels = ["label_like", "label_long"]
    assert before.drop(labels).equals(after.drop(labels))


def test_a_like_of_wednesday_is_invisible_to_features_of_wednesday(tmp_path):
    """Shown on day 0; liked on day 2, known to features of day 3 as one like of that day."""
    shown = one_each_day(
        [Shown(1, 1, "home", 3)] + [Shown(1, 1, "home", 24 * n + 5) for n in (2, 3)]
    )
    context = write_world(tmp_path, shown, [Acted(1, 1, 50, 0, 1)], [])
    build(context)
    rates = {}
    for n in (2, 3):
        build_examples(context, FIRST + timedelta(days=n))
        rows = context.workspace.scan("examples", [FIRST + timedelta(days=n)]).collect()
        rates[n] = rows.filter(pl.col("user_id") == 1)["user_like_rate_1d"].to_list()
    # Of day 2: one impression of user 1 and one of user 0 on day 2, and a like by user 1.
    assert rates == {2: [0.0], 3: [pytest.approx((1 + 20 / 2) / (1 + 20))]}
    labels = context.workspace.scan("examples", [FIRST + timedelta(days=2)]).collect()
    assert labels["label_like"].sum() == 0  # at hour 50, before the impression at hour 53


def test_an_audit_reports_what_was_not_known_yet(tmp_path):
    """A like that arrives a day later than when the features were built with it."""
    shown = one_each_day([Shown(1, 1, "home", 24 * n + 3) for n in range(DAYS)])
    like = Acted(1, 1, 75, 1, 1)
    context = write_world(tmp_path, shown, [like], [])
    build(context)
    assert audit_day(context, LAST, 10).differences == []
    write_actions(tmp_path, "likes", [like._replace(late=22)])
    found = audit_day(context, LAST, 10)
    assert (found.rows, len({d.user_id for d in found.differences})) == (2, 2)
    wrong = next(
        d for d in found.differences if d.feature == "item_like_rate_1d" and d.item_id == 1
    )
    assert (wrong.published, wrong.recomputed) == (pytest.approx((1 + 20 / 2) / 21), 0.0)


def test_labels_are_refreshed_without_their_features(tmp_path):
    """A like of day 0 arrives on day 1, when the examples of day 0 have been built."""
    shown = one_each_day([Shown(1, 1, "home", 3)])
    context = write_world(tmp_path, shown, [Acted(1, 1, 4, 30, 1)], [])
    for n in range(2):
        ingest_day(context, FIRST + timedelta(days=n))
        aggregate_day(context, FIRST + timedelta(days=n))
    first, second = FIRST, FIRST + timedelta(days=1)
    build_examples(context, first, first)
    before = context.workspace.scan("examples", [first]).collect()
    plan = plan_examples(context, first, second)
    assert plan is not None
    assert (plan.only_labels, plan.why) == (True, "changed: actions of the labels")
    build_examples(context, first, second)
    after = context.workspace.scan("examples", [first]).collect()
    labels = {day: frame["label_like"].to_list() for day, frame in ((0, before), (1, after))}
    assert labels == {0: [0.0, 0.0], 1: [0.0, 1.0]}
    assert after.drop("label_like").equals(before.drop("label_like"))
    assert build_examples(context, first, second) is None


def test_a_feature_that_is_named_like_a_label_stays_when_labels_are_refreshed(tmp_path):
    shown = one_each_day([Shown(1, 1, "home", 3)])
    write_world(tmp_path, shown, [Acted(1, 1, 4, 30, 1)], [])
    colours = pl.DataFrame({"i": [0, 1, 2], "label_colour": ["r", "g", "b"]})
    colours.write_parquet(tmp_path / "items.parquet")
    items = {"path": "items.parquet", "key": "i", "columns": ["label_colour"]}
    edit_project(
        tmp_path,
        log={"items": items},
        features={"categoricals": [{"column": c} for c in ("item_id", "label_colour")]},
    )
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    for n in range(2):
        ingest_day(context, FIRST + timedelta(days=n))
        aggregate_day(context, FIRST + timedelta(days=n))
    build_examples(context, FIRST, FIRST)
    before = context.workspace.scan("examples", [FIRST]).collect()
    plan = plan_examples(context, FIRST, FIRST + timedelta(days=1))
    assert plan is not None
    assert plan.only_labels
    build_examples(context, FIRST, FIRST + timedelta(days=1))
    after = context.workspace.scan("examples", [FIRST]).collect()
    assert after.drop("label_like").equals(before.drop("label_like"))
    assert set(after["label_colour"].to_list()) <= {"r", "g", "b"}


def test_immature_labels_wait_or_are_missing_while_negative(tmp_path):
    shown = one_each_day([Shown(1, 1, "home", 24 * n + 3) for n in range(DAYS)])
    likes = [Acted(1, 1, 24 * n + 4, 0, 1) for n in range(DAYS)]
    context = write_world(tmp_path, shown, likes, [])
    build(context)
    days = context.workspace.days("events")
    assert split_days(context.project, days, LAST).test == [LAST - timedelta(days=2)]
    edit_project(tmp_path, training={"immature": "positives"})
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    assert split_days(context.project, days, LAST).test == [LAST]
    labels = {}
    for n in (2, 3):  # windows of 48 hours end on days 4 and 5
        build_examples(context, FIRST + timedelta(days=n), LAST)
        rows = context.workspace.scan("examples", [FIRST + timedelta(days=n)]).collect()
        labels[n] = rows["label_like"].to_list()
    assert labels == {2: [0.0, 1.0], 3: [None, 1.0]}


def test_labels_are_known_on_their_final_day_also_of_rows_after_the_end_of_theirs(tmp_path):
    shown = one_each_day([Shown(1, 1, "home", 3)])
    write_world(tmp_path, shown, [], [])
    edit_project(tmp_path, log={"day_tolerance_hours": 12}, training={"immature": "positives"})
    file = tmp_path / "log" / f"date={FIRST}" / "part-0.parquet"
    late = pl.read_parquet(file).tail(1).with_columns(ts=midnight(FIRST) + 25 * HOUR)
    pl.concat([pl.read_parquet(file), late.cast(pl.read_parquet_schema(file))]).write_parquet(file)
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    final = final_day(context.project, context.project.log.actions, FIRST)
    assert final == FIRST + timedelta(days=3)  # 48 hours, and 12 for the row and the action each
    build(context)
    missing = {}
    for night in (final - timedelta(days=1), final):
        build_examples(context, FIRST, night)
        rows = context.workspace.scan("examples", [FIRST]).collect()
        missing[night] = rows["label_like"].null_count()
    assert list(missing.values()) == [1, 0]


def test_soft_labels_are_final_and_what_is_observed_stands_beside_them(tmp_path):
    shown = one_each_day([Shown(1, 1, "home", 24 * n + 3) for n in range(DAYS)])
    likes = [Acted(1, 1, 24 * n + 4, 0, 1) for n in range(DAYS)]
    context = write_world(tmp_path, shown, likes, [])
    build(context)  # with "wait", whose examples have no such column
    edit_project(tmp_path, training={"immature": "soft"})
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    found = {}
    for n in (2, 3):  # windows of 48 hours end on days 4 and 5
        build_examples(context, FIRST + timedelta(days=n), LAST)
        rows = context.workspace.scan("examples", [FIRST + timedelta(days=n)]).collect()
        found[n] = rows["label_like"].to_list(), rows["open_label_like"].to_list()
    assert found == {2: ([0.0, 1.0], [None, None]), 3: ([None, None], [0.0, 1.0])}


def test_the_share_of_positives_that_have_arrived_by_age(tmp_path):
    shown = one_each_day([Shown(1, item, "home", 3) for item in range(4)])
    hours = {0: 4, 1: 30, 2: 31, 3: 50}  # on the day, two a day later, one two days later
    likes = [Acted(1, item, hour, 0, 1) for item, hour in hours.items()]
    context = write_world(tmp_path, shown, likes, [])
    build(context)
    like, long = arrivals(context, FIRST + timedelta(days=2))
    assert (like.objective, list(like.days), like.positives) == ("like", [FIRST], 4)
    assert (like.rows, like.rate) == (5, 0.8)
    assert like.shares == [0.25, 0.75, 1.0]
    assert (long.objective, long.positives) == ("long", 0)


def test_an_action_of_days_without_impressions_is_not_lost(tmp_path):
    """The like of the second day becomes known with the next impressions, a week later."""
    days = [0, *range(8, 12)]
    write_project(
        tmp_path,
        log={"ranges": WITHOUT, "actions": [{"name": "like", "path": "likes", "window": "1d"}]},
        objectives=[{"name": "like", "group": "satisfaction", "label": '"like"'}],
        features={"windows": [1, 14]},
    )
    for n in days:
        shown = {"u": [0], "i": [0], "ts": [midnight(FIRST) + (24 * n + 20) * HOUR], "tab": ["a"]}
        write_day(tmp_path, FIRST + timedelta(days=n), pl.DataFrame(shown))
    for n in range(12):
        folder = tmp_path / f"likes/date={FIRST + timedelta(days=n)}"
        folder.mkdir(parents=True)
        liked = {"u": [0], "i": [0], "ts": [midnight(FIRST) + 28 * HOUR]}
        rows = pl.DataFrame(liked)
        (rows if n == 1 else rows.clear()).write_parquet(folder / "part-0.parquet")
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    for n in days:
        ingest_day(context, FIRST + timedelta(days=n))
        aggregate_day(context, FIRST + timedelta(days=n))
    last = FIRST + timedelta(days=9)
    for day in (FIRST, last):
        build_examples(context, day)
    assert context.workspace.scan("examples", [FIRST]).collect()["label_like"].to_list() == [1.0]
    assert audit_day(context, last, 10).differences == []
