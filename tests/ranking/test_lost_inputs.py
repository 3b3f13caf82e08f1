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
from mtl_ranker.nightly.build import model_examples
from mtl_ranker.ranking.artifact import RegisteredRanker
from mtl_ranker.ranking.scoring import rankings_provenance, score_day
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import TINY, WITHOUT, edit_project
from tests.ranking.test_scoring import random_ranker, write_tables

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


@pytest.mark.parametrize("gone", ["the last day", "all days", "the folder", "after the join"])
def test_a_saved_model_reads_no_rows_of_an_action_that_is_not_named_any_more(
    root, ranker, gone, caplog
):
    """After the end of the stream they are missing, as if its last folders held no row."""
    ingest_day(opened(root), LAST)
    empty = pl.read_parquet(stream(root)).clear()
    whole = stream(root).read_bytes()
    empty.write_parquet(stream(root))
    expected = ranking(root, ranker)
    stream(root).write_bytes(whole)
    actions = root / "ws" / "actions"
    if gone == "after the join":
        expected = ranking(root, ranker)
    else:
        shutil.rmtree(actions / "like" / f"date={LAST}")
    shutil.rmtree(stream(root).parent)
    if gone in ("all days", "the folder"):
        for folder in (root / "likes").iterdir():
            shutil.rmtree(folder)
    if gone == "the folder":
        (root / "likes").rmdir()
    edit_project(root, log={"actions": WITHOUT}, objectives=TINY["objectives"][:1])
    assert ranking(root, ranker).equals(expected)
    examples = model_examples(opened(root), ranker.artifact, [LAST])
    assert (examples["label_like"].sum() > 0) == (gone == "after the join")
    end = "" if gone in ("all days", "the folder") else f" after {BEFORE}"
    assert f"like (log.actions): not in the project file; no rows{end}\n" in caplog.text
    stays = [] if gone != "after the join" else [LAST]
    assert [d for d in opened(root).workspace.days("actions/like") if d == LAST] == stays


def test_a_stream_that_the_project_file_names_is_waited_for(root, ranker):
    """Nothing of a past action stands in the way of the action that is named again."""
    ingest_day(opened(root), LAST)
    text = (root / "project.toml").read_text("utf-8")
    shutil.move(stream(root).parent, root / "later")
    edit_project(root, log={"actions": WITHOUT}, objectives=TINY["objectives"][:1])
    ranking(root, ranker)
    (root / "project.toml").write_text(text, "utf-8")
    with pytest.raises(ProjectError, match=f"no actions of {LAST} "):
        join_actions(opened(root), LAST)
    shutil.move(root / "later", stream(root).parent)
    [report] = join_actions(opened(root), LAST)
    assert report.joined > 0


COLUMNS = {"columns": ["price", "category"], "lists": {"tags": ","}, "published": "released"}


def test_a_column_of_a_table_that_is_not_named_any_more_is_null_once_it_is_lost(tmp_path):
    """As if the table had the column without a value."""
    write_tables(tmp_path)
    items = {"path": "items.parquet", "key": "i", **COLUMNS}
    home = {"path": "users.parquet", "key": "u", "columns": ["home"]}
    context, artifact = random_ranker(
        tmp_path,
        log={"items": items, "users": home},
        features={
            "entities": [["item_id"], ["category"], ["user_id", "category"]],
            "categoricals": [{"column": "category"}, {"column": "home"}],
            "lists": [{"column": "tags"}],
            "numerics": ["price"],
            "histories": [{"signal": "click", "columns": ["category", "tags"], "length": 3}],
        },
        scoring={"candidates": "candidates.parquet"},
    )
    pairs = pl.DataFrame({"u": range(11)}).join(pl.DataFrame({"i": range(13)}), how="cross")
    pairs.with_columns(tab=pl.lit("home")).write_parquet(tmp_path / "candidates.parquet")
    saved = RegisteredRanker(artifact, "1")
    before = pl.read_parquet(score_day(context, saved, LAST).path)
    table = tmp_path / "items.parquet"
    lost = ["price", "category", "tags", "released"]
    rows = pl.read_parquet(table)
    rows.with_columns(pl.lit(None, rows.schema[c]).alias(c) for c in lost).write_parquet(table)
    edit_project(
        tmp_path,
        log={"items": {"columns": WITHOUT, "lists": WITHOUT, "published": WITHOUT}},
        features={
            "entities": [["item_id"]],
            "categoricals": [{"column": "home"}],
            "lists": WITHOUT,
            "numerics": WITHOUT,
            "histories": WITHOUT,
        },
    )
    expected = pl.read_parquet(score_day(opened(tmp_path), saved, LAST).path)
    assert not expected.equals(before)
    rows.drop(lost).write_parquet(table)
    found = pl.read_parquet(score_day(opened(tmp_path), saved, LAST).path)
    assert found.equals(expected)
    users = tmp_path / "users.parquet"
    pl.read_parquet(users).drop("home").write_parquet(users)
    with pytest.raises(ProjectError, match=r"column 'home' .* is missing"):
        score_day(opened(tmp_path), saved, LAST)
