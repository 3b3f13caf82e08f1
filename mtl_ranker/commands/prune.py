"""Remove features that no model in use needs (`mtl-ranker prune`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from mtl_ranker.context import Context
from mtl_ranker.features.view import VIEWS, views_of
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.tracking import connection, registry


def prune(context: Context, dry_run: bool) -> Iterator[str]:
    """Remove the aggregates and examples of feature views that no model in use has.

    In use are the versions with an alias and those to which `rollback` can return. The features of
    the project file are never removed; what is removed is built again when a model needs it. Yields
    a line for each folder.
    """
    connection.connect(context.workspace)
    with context.workspace.lock("prune"):
        folders = sorted(f for f in (context.workspace.root / VIEWS).glob("*") if f.is_dir())
        versions = registry.versions_in_use(context.project) if folders else []
        artifacts = [
            RankerArtifact.load(registry.artifact_folder(context.project, v)) for v in versions
        ]
        needed = views_of(context, [(a.project, a.sql) for a in artifacts])
        unused = [folder for folder in folders if folder.name not in needed]
        for folder in unused:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            yield f"{'would remove' if dry_run else 'removed'} {folder} ({size / 1e6:,.1f} MB)"
            if not dry_run:
                shutil.rmtree(folder)
        yield f"{len(folders) - len(unused)} views are in use by {len(versions)} model versions"
