"""Examples: built once, in blocks of users if need be, from features known beforehand."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import polars.testing
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features import examples as building
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import EVENT
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import tiny_events, write_day
from tests.projects import TINY, changed, edit_project, write_project


def tiny_context(root: Path, workspace: str = "ws") -> Context:
    return open_context(str(root / "project.toml"), root, root / workspace)


def build_days(context: Context) -> None:
    """Ingest and aggregate every day of the log."""
    for day in context.source.days():
        ingest_day(context, day)
        aggregate_day(context, day)


def test_examples_are_rebuilt_only_when_their_history_changes(tiny):
    context = tiny_context(tiny)
    days = context.source.days()
    for day in days:
        ingest_day(context, day)
        assert aggregate_day(context, day)
        assert not aggregate_day(context, day)
    assert build_examples(context, days[-1])
    assert not build_examples(context, days[-1])
    write_day(tiny, days[-2], tiny_events(days[-2], rows=1))
    ingest_day(context, days[-2])
    aggregate_day(context, days[-2])
    assert build_examples(context, days[-1])


@pytest.mark.parametrize("text", [False, True], ids=["numbers", "text"])
def test_a_day_in_blocks_of_users_has_the_same_examples(tiny, text):
    """Users with ids of either type."""
    if text:
        for file in (tiny / "log").glob("*/*.parquet"):
            frame = pl.read_parquet(file)
            frame.with_columns(u=pl.format("user {}", "u")).write_parquet(file)
    frames, keys = [], ["timestamp", "user_id", "item_id"]
    for rows in (1_000_000, 7):
        write_project(tiny, features={"block_rows": rows})
        context = tiny_context(tiny, str(rows))
        build_days(context)
        last = context.source.days()[-1]
        build_examples(context, last)
        assert build_examples(context, last) is None
        found = context.workspace.scan("examples", [last]).collect()
        events = context.workspace.scan("events", [last]).collect()
        polars.testing.assert_frame_equal(events.select(keys)[found[EVENT]], found.select(keys))
        frames.append(found.drop(EVENT))  # large days are stored in another order
    whole, blocks = frames
    assert whole["user_id"].n_unique() > 3
    assert not whole.equals(blocks)
    polars.testing.assert_frame_equal(blocks.sort(keys), whole)
    starts = blocks.select((pl.col("timestamp").diff() < 0).sum()).item()
    assert starts >= 2


def test_a_killed_day_is_resumed_after_its_finished_blocks(tiny, monkeypatch):
    edit_project(tiny, features={"block_rows": 7})
    context = tiny_context(tiny)
    build_days(context)
    last = context.source.days()[-1]
    plan = building.plan_examples(context, last)
    assert plan is not None
    first, *others = plan.parts
    building.build_examples_part(context, last, first)
    file = context.workspace.file(first.file)
    written = file.stat().st_mtime_ns
    built = []
    original = building.examples_of_block

    def counted(*arguments):
        built.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(building, "examples_of_block", counted)
    assert building.plan_examples(context, last) == plan
    assert file.stat().st_mtime_ns == written
    assert build_examples(context, last) == "not built yet"
    assert built == others
    assert not file.exists()
    assert context.workspace.scan("examples", [last]).collect().height == 40


CATEGORICALS = TINY["features"]["categoricals"]


@pytest.mark.parametrize(
    ("change", "message"),
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
def test_outcomes_of_an_impression_are_refused_as_its_features(tiny, change, message):
    write_project(tiny, **change)
    context = tiny_context(tiny)
    day = context.source.days()[0]
    ingest_day(context, day)
    with pytest.raises(ProjectError, match=message):
        build_examples(context, day)
    with pytest.raises(ProjectError, match=message):
        list(check_project(str(tiny / "project.toml"), tiny))
