"""`mtl-ranker prune` removes vectors that no examples name, in a folder and in a store."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest

from mtl_ranker.commands.prune import prune
from mtl_ranker.context import Context
from mtl_ranker.features.vectors import VECTORS, load_vectors, named_vectors, prune_vectors
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.workspace import Workspace, open_workspace
from tests.projects import edit_project
from tests.stores import BUCKET, s3_server


@pytest.fixture(params=["folder", "store"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Where the workspace is."""
    if request.param == "folder":
        yield str(tmp_path / "ws")
        return
    with s3_server():
        monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / "cache"))
        yield f"s3://{BUCKET}/ws"


def built(tiny: Path, place: str, changed: dict[int, list[float]]) -> Context:
    """The examples of a night; item n has the vector [n, -1], but for the changed ones."""
    vectors = [changed.get(n, [float(n), -1.0]) for n in range(13)]
    pl.DataFrame({"i": range(13), "content": vectors}).write_parquet(tiny / "items.parquet")
    context = open_context(str(tiny / "project.toml"), tiny, place)
    build_split(context, context.last_day())
    return context


def stored(place: str) -> list[list[float]]:
    """The vectors of all files, as another process finds them."""
    workspace = open_workspace(place)
    files = workspace.files(list(workspace.places(VECTORS)))
    return sorted(pl.concat([pl.read_parquet(file) for file in files])["vector"].to_list())


def looked_up(workspace: Workspace) -> pl.DataFrame:
    rows = workspace.scan("examples", workspace.days("examples")).select("item_id", "content")
    table = load_vectors(workspace, ["content"], [rows])["content"]
    keys = rows.unique().sort("item_id").collect()
    return keys.with_columns(vector=pl.Series(table.vectors[table.rows(keys["content"])].tolist()))


def test_vectors_that_no_examples_name_are_removed(tiny: Path, place: str):
    table = {"path": "items.parquet", "key": "i", "columns": ["content"]}
    edit_project(tiny, log={"items": table}, features={"embeddings": ["content"]})
    built(tiny, place, {3: [0.5, 0.5]})
    context = built(tiny, place, {5: [7.0, 7.0]})
    workspace, before = context.workspace, looked_up(context.workspace)
    every = stored(place)
    assert {(0.5, 0.5), (7.0, 7.0), (5.0, -1.0), (3.0, -1.0)} < set(map(tuple, every))
    unused = [[0.5, 0.5], [5.0, -1.0]]
    line = f"2 of {len(every)} vectors in {workspace.where(VECTORS)}, which no examples name"
    assert next(prune(context, dry_run=True)) == f"would remove {line}"
    assert stored(place) == every
    assert next(prune(context, dry_run=False)) == f"removed {line}"
    assert stored(place) == [vector for vector in every if vector not in unused]
    assert looked_up(open_workspace(place)).equals(before)
    assert list(prune(context, dry_run=False)) == ["0 views are in use by 0 model versions"]


def test_vectors_of_other_views_and_of_unfinished_examples_are_needed(tmp_path: Path):
    workspace, day = Workspace(tmp_path), date(2026, 3, 2)
    vectors = pl.DataFrame({"key": [1, 2, 3, 4], "vector": [[float(n)] for n in range(4)]})
    for number, part in enumerate((vectors[:2], vectors[1:])):
        with workspace.published(f"{VECTORS}/{number}.parquet") as file:
            part.write_parquet(file)
    workspace.publish("views/a/examples", day, pl.DataFrame({"content": [1, None]}), {})
    (part_of_day,) = workspace.parts("examples", day + timedelta(days=1), {}, 1)
    with workspace.published(part_of_day) as file:
        pl.DataFrame({"content": [4], "tab": ["x"]}).write_parquet(file)
    datasets = ["examples", "views/a/examples"]
    needed = named_vectors(workspace, datasets)
    assert sorted(needed) == [1, 4]
    assert prune_vectors(workspace, needed, dry_run=False) == (2, 2)
    assert stored(str(tmp_path)) == [[0.0], [3.0]]
    assert prune_vectors(workspace, named_vectors(workspace, []), dry_run=False) == (2, 0)
    assert not workspace.places(VECTORS)
