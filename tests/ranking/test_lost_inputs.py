"""Streams of actions and tables of which a part is lost: what a saved model is ranked with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day, history_days
from mtl_ranker.features.view import aggregate_dataset
from mtl_ranker.logs.actions import join_actions
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking.artifact import RegisteredRanker
from mtl_ranker.ranking.scoring import rankings_provenance, score_day
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import TINY
from tests.ranking.test_scoring import random_ranker

DAYS = [FIRST + timedelta(days=n) for n in range(7)]
BEFORE, LAST = DAYS[5], DAYS[6]
NEXT = LAST + timedelta(days=1)
LIKE = {"name": "like", "path": "likes", "window": "1h", "value": "s", "reduce": "max"}


def write_actions(root: Path, day) -> None:
    liked = tiny_events(day, shift=(day - FIRST).days).filter(pl.col("click") == 1)
    folder = root / "likes" / f"date={day}"
    folder.mkdir(parents=True)
    rows = liked.select("u", "i", pl.col("ts") + 60_000, s=pl.col("play"))
    rows.write_parquet(folder / "part-0.parquet")


def opened(root: Path) -> Context:
    return open_context(str(root / "project.toml"), root, root / "ws")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a project with a stream, and its model; the last day is not read yet."""
    root = tmp_path_factory.mktemp("streams")
    label = 'case when "like" > 9 then 1 else 0 end'
    like = {"name": "like", "group": "satisfaction", "label": label}
    for day in DAYS[:-1]:
        write_actions(root, day)
    _, artifact = random_ranker(
        root,
        log={"actions": [LIKE]},
        objectives=[TINY["objectives"][0], like],
        scoring={"candidates": "candidates.parquet"},
    )
    write_day(root, LAST, tiny_events(LAST, shift=6))
    write_actions(root, LAST)
    pairs = pl.DataFrame({"u": range(11)}).join(pl.DataFrame({"i": range(13)}), how="cross")
    pairs.with_columns(tab=pl.lit("home")).write_parquet(root / "candidates.parquet")
    return root, RegisteredRanker(artifact, "1")


@pytest.fixture
def root(trained, tmp_path):
    """A copy of the folder that a test may change."""
    shutil.copytree(trained[0], tmp_path / "now")
    return tmp_path / "now"


@pytest.fixture
def ranker(trained) -> RegisteredRanker:
    return trained[1]


def ranking(root: Path, ranker: RegisteredRanker) -> pl.DataFrame:
    return pl.read_parquet(score_day(opened(root), ranker, NEXT).path)


def stream(root: Path) -> Path:
    return root / "likes" / f"date={LAST}" / "part-0.parquet"


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def damaged(file: Path) -> None:
    """The pages of a file whose footer is whole."""
    content = file.read_bytes()
    file.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])


def text_value(file: Path) -> None:
    pl.read_parquet(file).with_columns(pl.lit("many").alias("s")).write_parquet(file)


def missing(file: Path) -> None:
    shutil.rmtree(file.parent)


FAULTS = [cut_off, damaged, text_value, missing]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_last_day_whose_actions_cannot_be_read_is_not_needed(
    root, ranker, tmp_path, fault: Callable[[Path], None], caplog
):
    """As a last day of the log that cannot be read."""
    shutil.copytree(root, tmp_path / "before")
    without_the_day = ranking(tmp_path / "before", ranker)
    shutil.copytree(root, tmp_path / "undisturbed")
    ingest_day(opened(tmp_path / "undisturbed"), LAST)
    undisturbed = ranking(tmp_path / "undisturbed", ranker)
    assert not undisturbed.equals(without_the_day)

    ingest_day(opened(root), LAST)
    whole = stream(root).read_bytes()
    fault(stream(root))
    with pytest.raises((ProjectError, pl.exceptions.PolarsError)):
        join_actions(opened(root), LAST)
    assert ranking(root, ranker).equals(without_the_day)
    assert f"{LAST}: missing in the features, as actions are not joined: " in caplog.text
    context = opened(root)
    made = rankings_provenance(context, ranker, NEXT)
    assert context.workspace.stale("rankings", NEXT, made) is None

    stream(root).parent.mkdir(exist_ok=True)
    stream(root).write_bytes(whole)
    assert aggregate_day(context, LAST) == "not built yet"
    made = rankings_provenance(context, ranker, NEXT)
    why = context.workspace.stale("rankings", NEXT, made)
    assert why == "changed: aggregates of earlier days"
    assert ranking(root, ranker).equals(undisturbed)


def test_a_day_whose_actions_were_joined_before_keeps_its_aggregates(root, ranker, caplog):
    ingest_day(opened(root), LAST)
    undisturbed = ranking(root, ranker)
    cut_off(stream(root))
    assert ranking(root, ranker).equals(undisturbed)
    assert f"{LAST}: as published before in the features" in caplog.text


def test_a_day_of_which_some_aggregates_are_older_is_not_read(root, ranker):
    ingest_day(opened(root), LAST)
    context = opened(root)
    ranking(root, ranker)
    assert history_days(context, NEXT)[-1] == LAST
    workspace = context.workspace
    made = workspace.provenance("aggregates/all", LAST)
    rows = workspace.scan("aggregates/all", [LAST]).collect()
    workspace.publish("aggregates/all", LAST, rows, {**made, "actions": "others"})
    assert history_days(context, NEXT)[-1] == BEFORE
    workspace.publish("aggregates/all", LAST, rows, made)
    workspace.remove(workspace.place(aggregate_dataset(context, ["item_id"]), LAST))
    assert history_days(context, NEXT)[-1] == BEFORE
