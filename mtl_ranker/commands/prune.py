"""Remove features and vectors that no model in use needs (`mtl-ranker prune`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from mtl_ranker.context import Context
from mtl_ranker.features.vectors import VECTORS, named_vectors, prune_vectors
from mtl_ranker.features.view import EXAMPLES, VIEWS, views_of
from mtl_ranker.tracking import connection, registry
from mtl_ranker.workspace import PARTS


def prune(context: Context, dry_run: bool) -> Iterator[str]:
    """Remove what no model in use needs: aggregates and examples of feature views, and vectors.

    In use are the versions with an alias and those to which `rollback` can return. The features of
    the project file are never removed; what is removed is built again when a model needs it. Parts
    of examples that a killed run left are removed too; those of rankings are not, as a ranking has
    a lock of its own. Vectors of content embeddings are removed if no remaining examples name them.
    Yields a line for each folder, and one for vectors. Raises ProjectError while another run
    builds.
    """
    connection.connect(context.workspace)
    with context.workspace.lock("prune"):
        workspace, folders = context.workspace, Counter[str]()
        for place, size in workspace.places(VIEWS).items():
            name, *below = place.removeprefix(f"{VIEWS}/").split("/")
            folders.update({name: size} if below else {})
        versions = registry.versions_in_use(context.project) if folders else []
        artifacts = [registry.load_version(context.project, v).artifact for v in versions]
        needed = views_of(context, [(a.project, a.sql) for a in artifacts])
        unused = sorted(name for name in folders if name not in needed)
        gone = {f"{VIEWS}/{name}": folders[name] for name in unused}
        parts = workspace.unfinished().items()
        gone |= {f: size for f, size in parts if not f.startswith(f"{PARTS}/rankings/")}
        for folder, size in gone.items():
            done = "would remove" if dry_run else "removed"
            yield f"{done} {workspace.where(folder)} ({size / 1e6:,.1f} MB)"
            if not dry_run:
                workspace.remove(folder)
        yield from _vectors(context, folders.keys() - unused, dry_run)
        yield f"{len(folders) - len(unused)} views are in use by {len(versions)} model versions"


def _vectors(context: Context, views: Collection[str], dry_run: bool) -> Iterator[str]:
    """Remove the vectors that no examples outside views, and none of these views, name."""
    workspace = context.workspace
    if not workspace.places(VECTORS):
        return
    datasets = [EXAMPLES, *(f"{VIEWS}/{name}/{EXAMPLES}" for name in sorted(views))]
    removed, kept = prune_vectors(workspace, named_vectors(workspace, datasets), dry_run)
    if removed:
        done = "would remove" if dry_run else "removed"
        yield (
            f"{done} {removed:,} of {removed + kept:,} vectors in {workspace.where(VECTORS)}, "
            "which no examples name"
        )
