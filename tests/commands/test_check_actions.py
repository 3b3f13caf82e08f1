"""`mtl-ranker check` of a project with streams of actions."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.actions import join_actions
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import TINY, changed, edit_project, write_project

CLICK: dict[str, Any] = {"name": "click", "path": "clicks", "window": "1h"}
DAYS = 7


def streams(root: Path, first: int = 0, twice: bool = False) -> Path:
    """The tiny log with its clicks as a stream, in the same partitions."""
    for n in range(DAYS):
        day = FIRST + timedelta(days=n)
        frame = tiny_events(day, shift=n)
        write_day(root, day, frame.drop("click"))
        clicks = frame.filter(pl.col("click") == 1).select("u", "i", "ts")
        again = clicks.with_columns(pl.col("ts") + 1)
        if n >= first:
            folder = root / "clicks" / f"date={day}"
            folder.mkdir(parents=True)
            (pl.concat([clicks, again]) if twice else clicks).write_parquet(folder / "0.parquet")
    write_project(root, TINY, log={"actions": [CLICK]})
    return root


def checked(root: Path) -> str:
    return "\n".join(check_project(str(root / "project.toml"), root))


def test_streams_labels_and_their_wait_are_said(tmp_path):
    found = checked(streams(tmp_path))
    assert f"ok  actions of click: 7 days, {FIRST}..{FIRST + timedelta(days=6)}" in found
    assert "ok  split: 3 train, 1 validate, 1 test" in found
    assert "labels are final 1 day later; until then, training.immature = 'wait'" in found
    assert "ok  click: 80 of 80 actions belong to the sampled impressions" in found
    assert "warning: click begins" not in found


@pytest.mark.slow
def test_labels_that_an_action_may_lower_are_named(tmp_path):
    root = streams(tmp_path)
    edit_project(root, training={"immature": "positives"})
    assert "a further action may change" not in checked(root)
    edit_project(root, objectives=changed(TINY["objectives"], 0, label="1 - click"))
    assert "a further action may change a 1, or a number, of click; so" in checked(root)


def test_an_objective_without_a_final_label_in_the_training_days_is_refused(tmp_path):
    """Training days 2 to 4 of a night after day 6: the first row of day 2 is final in 5 days."""
    root = streams(tmp_path)
    edit_project(
        root,
        log={"actions": [CLICK | {"window": "5d"}], "day_tolerance_hours": 0},
        training={"immature": "positives"},
    )
    message = (
        f"objectives[0] (click): none of the training days {FIRST + timedelta(days=2)}.."
        f"{FIRST + timedelta(days=4)} has final labels at the end of {FIRST + timedelta(days=6)}: "
        f'click has window = "5d", so those of {FIRST + timedelta(days=2)} are final on '
        f"{FIRST + timedelta(days=7)}"
    )
    with pytest.raises(ProjectError, match=re.escape(message)):
        checked(root)
    edit_project(root, log={"actions": [CLICK | {"window": "119h"}], "day_tolerance_hours": 0})
    assert "ok  split: 3 train, 1 validate, 1 test" in checked(root)


def test_a_stream_that_begins_later_and_values_that_no_label_has(tmp_path):
    root = streams(tmp_path, first=2, twice=True)
    edit_project(root, log={"actions": [CLICK | {"reduce": "sum"}]})
    found = checked(root)
    assert f"warning: click begins on {FIRST + timedelta(days=2)}, the log on {FIRST}" in found
    day = FIRST + timedelta(days=5)
    assert f"warning: {day}: label of click neither 0 nor 1 in 16 rows, which lose this" in found


@pytest.mark.slow
def test_folders_by_the_day_of_arrival_are_refused_as_by_a_night_and_pass_with_arrived(tmp_path):
    """Of a day's two clicks one happened on the day before."""
    root = streams(tmp_path)
    hour = 3_600_000
    for n in range(DAYS):
        file = root / "clicks" / f"date={FIRST + timedelta(days=n)}" / "0.parquet"
        clicks = pl.read_parquet(file).with_columns(got=pl.col("ts") + hour)
        early = clicks.head(6).with_columns(pl.col("ts") - 24 * hour)
        pl.concat([clicks, early]).write_parquet(file)
    edit_project(root, log={"actions": [CLICK | {"window": "2d"}]})
    context = open_context(str(root / "project.toml"), root, root / "ws")
    ingest_day(context, FIRST)
    with pytest.raises(ProjectError) as night:
        join_actions(context, FIRST)
    with pytest.raises(ProjectError) as found:
        checked(root)
    assert str(found.value) == str(night.value)
    assert "break the contract; allowed: log.max_bad_share = 5.0%" in str(found.value)
    assert "6  timestamp outside the day" in str(found.value)
    assert "name the column of that time: log.actions[0].arrived" in str(found.value)
    edit_project(root, log={"actions": [CLICK | {"window": "2d", "arrived": "got"}]})
    assert "timestamp outside the day" not in checked(root)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"actions": [CLICK | {"path": "none"}]}, r"none: not found; log.actions\[0\].path"),
        ({"actions": [CLICK | {"item": "video"}]}, r"'video' \(named by log.actions\[0\].item\)"),
        ({"actions": [CLICK | {"name": "other"}]}, r"'click' = 'click' needs column 'click'"),
    ],
)
def test_mistakes_in_actions_are_found(tmp_path, log, message):
    root = streams(tmp_path)
    edit_project(root, log=log)
    with pytest.raises(ProjectError, match=message):
        checked(root)
