"""Which days a log has: by all of them, one by one, and as of one look."""

from __future__ import annotations

import pickle
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest

from mtl_ranker.config import Action
from mtl_ranker.context import Context
from mtl_ranker.logs.actions import stream_days, stream_days_between
from mtl_ranker.logs.sources import ParquetSource, open_context
from tests.conftest import FIRST, tiny_events
from tests.projects import TINY, write_project

SPAN = [FIRST + timedelta(days=n) for n in range(-2, 9)]


def write(root: Path, day: date, name: str = "part-0.parquet") -> Path:
    file = root / f"log/date={day}/{name}"
    file.parent.mkdir(parents=True, exist_ok=True)
    tiny_events(day).write_parquet(file)
    return file


def three_days() -> pl.DataFrame:
    return pl.concat(tiny_events(SPAN[n]) for n in (2, 3, 5))


def opened(root: Path, **log: object) -> Context:
    write_project(root, TINY, log=log)
    return open_context(str(root / "project.toml"), root, root / "ws")


def of_folders(root: Path) -> Context:
    """One day is missing in the middle, one has an empty folder, one a file that is not read."""
    for n in (0, 1, 3):
        write(root, SPAN[2 + n])
    (root / f"log/date={SPAN[4]}").mkdir()
    write(root, SPAN[6], "_temporary.parquet")
    return opened(root)


def of_ready_folders(root: Path) -> Context:
    """One day has a marker, one a marker and no file, one no marker."""
    for n in (0, 2):
        write(root, SPAN[2 + n])
    for n in (0, 1):
        marker = root / f"log/date={SPAN[2 + n]}/_SUCCESS"
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return opened(root, ready="_SUCCESS")


def of_one_file(root: Path) -> Context:
    (root / "log").mkdir()
    three_days().write_parquet(root / "log/all.parquet")
    return opened(root)


def of_delta(root: Path) -> Context:
    three_days().write_delta(root / "log")
    return opened(root, format="delta")


@pytest.mark.parametrize("make", [of_folders, of_ready_folders, of_one_file, of_delta])
def test_a_day_is_there_when_it_is_among_the_days(make, tmp_path):
    context = make(tmp_path)
    for source in (context.source, context.source.pinned()):
        assert [day for day in SPAN if source.has_day(day)] == source.days()
    assert 1 < len(context.source.days()) < len(SPAN)


@pytest.mark.parametrize("make", [of_folders, of_ready_folders, of_one_file])
def test_days_of_a_stream_between_two_are_those_of_all_its_days(make, tmp_path):
    context = make(tmp_path)
    action = Action(name="again", path="log")
    log = context.project.log.model_copy(update={"actions": [action]})
    project = context.project.model_copy(update={"log": log})
    context = replace(context, project=project, source=context.source.with_log(log))
    days = stream_days(context, action)
    for first in SPAN:
        for last in SPAN:
            inside = [day for day in days if first <= day <= last]
            assert stream_days_between(context, action, first, last) == inside


def test_a_pinned_source_keeps_what_it_found_until_it_is_pinned_again(tmp_path):
    source = of_folders(tmp_path).source
    pinned = source.pinned()
    before = pinned.days()
    late = write(tmp_path, SPAN[5 + 2])
    assert pinned.days() == before
    for fresh in (source, pinned.pinned(), pickle.loads(pickle.dumps(pinned))):
        assert fresh.days() == [*before, SPAN[7]]
        assert fresh.has_day(SPAN[7])
    late.unlink()
    assert source.days() == before


def test_streams_share_the_look_of_a_pinned_source(tmp_path):
    context = of_folders(tmp_path)
    log = context.project.log.model_copy(update={"actions": [Action(name="again", path="log")]})
    pinned = context.source.with_log(log).pinned()
    assert isinstance(pinned, ParquetSource)
    assert pinned.actions("again").days() == pinned.days()
    write(tmp_path, SPAN[7])
    assert SPAN[7] not in pinned.actions("again").days()
