"""`mtl-ranker prune` in a folder and in S3: what goes, and that nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from mtl_ranker.commands.prune import prune
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.stores import leases
from mtl_ranker.tracking import connection, registry
from mtl_ranker.workspace import Workspace
from tests.projects import edit_project
from tests.stores import BUCKET, s3_server

DAY = date(2026, 3, 7)
UNUSED = [
    "views/0123/aggregates/user_id/date=2026-03-01/part-0.parquet",
    "views/0123/examples/date=2026-03-02/part-0.parquet",
    ".parts/examples/date=2026-03-02/abc/000000.parquet",
    ".parts/views/0123/examples/date=2026-03-02/abc/000001.parquet",
]
USED = [".parts/rankings/date=2026-03-08/abc/000000.parquet", "reports/2026-03-07.html"]


@pytest.fixture(params=["in a folder", "in S3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / "cache"))
    if request.param == "in a folder":
        yield str(tmp_path / "ws")
    else:
        with s3_server():
            yield f"s3://{BUCKET}/ws"


@pytest.fixture
def context(tiny: Path, place: str) -> Context:
    """A model in use has other features than the project file, and examples of its own."""

    def opened() -> Context:
        return open_context(str(tiny / "project.toml"), tiny, place)

    edit_project(tiny, name="pruned")  # other tests of the process may have registered "tiny"
    first = opened()
    build_split(first, DAY)
    connection.connect(first.workspace)
    _, version, _ = registry.record(first, train_suite(first, DAY))
    edit_project(tiny, features={"windows": [2]})
    edited = opened()
    ranker = registry.load_version(edited.project, version.version)
    build_examples(edited, DAY)
    build_examples(ranker.context(edited), DAY)
    for published in UNUSED + USED:
        edited.workspace.publish_file(published, "x" * 1_000_000)
    return edited


def everything(workspace: Workspace) -> set[str]:
    workspace.refresh()
    folders = ("events", "quarantine", "aggregates", "examples", "views", ".parts", "reports")
    return {place for folder in folders for place in workspace.places(folder)}


@pytest.mark.slow
def test_what_no_model_needs_is_removed_and_nothing_else(context: Context, place: str):
    workspace = context.workspace
    before = everything(workspace)
    assert any(place.startswith("views/") for place in before - set(UNUSED))
    with workspace.lock("ranking of tomorrow", "rankings/2026-03-08"):
        planned = list(prune(context, dry_run=True))
        assert everything(workspace) == before
        done = list(prune(context, dry_run=False))
    assert done == [line.replace("would remove", "removed") for line in planned]
    assert done == [
        f"removed {place}/views/0123 (2.0 MB)",
        f"removed {place}/.parts/examples/date=2026-03-02 (1.0 MB)",
        f"removed {place}/.parts/views/0123/examples/date=2026-03-02 (1.0 MB)",
        "1 views are in use by 1 model versions",
    ]
    assert everything(workspace) == before - set(UNUSED)
    assert list(prune(context, dry_run=False)) == done[-1:]
    if workspace.store is None:
        return
    with (
        leases.leased(f"{place}/.leases/build.json", "night of another host"),
        pytest.raises(ProjectError, match="night of another host"),
    ):
        list(prune(context, dry_run=False))
