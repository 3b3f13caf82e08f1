"""The features as of a day as files, with which a ranker ranks without log and workspace.

A snapshot holds the table of each entity and history (`AsOf`), the user and item tables, the SQL
that joins them, and what the project's rules and exploration read on the day. `rank` gives the same
bits as `score_day` for the same candidates in the same order, on a machine with as many cores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import polars as pl

from mtl_ranker.config import Project, Rules
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_history, history_days
from mtl_ranker.features.point_in_time import AsOf, Entity
from mtl_ranker.features.tables import scan_events
from mtl_ranker.logs.blocks import joined, user_blocks
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import published_types
from mtl_ranker.ranking.inputs import KEY, UNKNOWN, InputColumn
from mtl_ranker.ranking.rules import DayLists
from mtl_ranker.ranking.scoring import BlockRanker, grouped, rank_blocks, with_version

CONTENT = "snapshot.json"
EXAMPLE = "candidates.parquet"  # a few known pairs, which also have the types
SQL = "sql.json"
LISTS = "lists"  # folder of the rules; absent without any, and in snapshots of earlier versions


@dataclass(frozen=True)
class Snapshot:
    """Features as of a day, and the model that they are of.

    Attributes:
        version: of the model in the registry.
        example: a few candidates in their columns and types.
        lists: the rules and the exploration of the day, if the project has any.
    """

    as_of: AsOf
    version: str
    example: pl.DataFrame
    lists: DayLists | None = None

    @property
    def columns(self) -> list[InputColumn]:
        """The columns of candidates: user and item, and the context, which may be absent."""
        ids = ("user_id", "item_id")
        return [
            InputColumn(name, dtype, name in ids, KEY if name in ids else UNKNOWN)
            for name, dtype in self.example.schema.items()
        ]


def save_snapshot(context: Context, ranker: RegisteredRanker, day: date, folder: Path) -> Path:
    """Write the features of all users and items as of day D into an empty folder; returns it.

    Raises ProjectError if no events before D are published, and for a rule on a context column that
    the model's candidates do not have.
    """
    own = ranker.context(context)
    given = own.project.log.context
    foreign = {c for c in context.project.log.context if c not in given}
    rules = context.project.scoring.rules
    for setting, columns in rules.read.items():
        if lacking := sorted(foreign & set(columns)):
            raise ProjectError(
                f"scoring.rules.{setting}: {lacking[0]!r} is a context column that version "
                f"{ranker.version} does not have, so that a snapshot's candidates lack it; "
                f"allowed: {', '.join(given) or 'none'}, and columns of the user and item tables"
            )
    lists = DayLists.build(context, day, given=given)
    aggregate_history(own, day)
    types = published_types(own)
    rows = scan_events(own, history_days(own, day))
    keys = ["user_id", "item_id", *own.project.log.context]
    present = rows.collect_schema()
    known = [
        pl.col(key).cast(types[key]) if key in present else pl.lit(None, types[key]).alias(key)
        for key in keys
    ]
    rows = rows.select(known)
    as_of = AsOf.build(own, rows, day)
    folder.mkdir(parents=True)
    for number, entity in enumerate(as_of.entities):
        entity.table.write_parquet(folder / f"entity_{number}.parquet")
    for key, table in as_of.tables.items():
        table.collect().write_parquet(folder / f"table_{key}.parquet")
    rows.head(3).collect().write_parquet(folder / EXAMPLE)
    if lists is not None:
        lists.save(folder / LISTS)
    project = as_of.project
    if lists is not None:  # which have the rules, that may read columns the model does not know
        plain = project.scoring.model_copy(update={"rules": Rules(), "exploration": None})
        project = project.model_copy(update={"scoring": plain})
    content = {
        "day": str(day),
        "version": ranker.version,
        "project": project.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "entities": [{"name": e.name, "keys": e.keys} for e in as_of.entities],
        "tables": list(as_of.tables),
    }
    (folder / CONTENT).write_text(json.dumps(content, indent=1), "utf-8")
    (folder / SQL).write_text(json.dumps(as_of.sql, indent=1), "utf-8")
    return folder


def load_snapshot(folder: Path) -> Snapshot:
    """The snapshot that `save_snapshot` wrote."""
    content = json.loads((folder / CONTENT).read_text("utf-8"))
    entities = []
    for number, entity in enumerate(content["entities"]):
        table = pl.read_parquet(folder / f"entity_{number}.parquet")
        features = [name for name in table.columns if name not in entity["keys"]]
        entities.append(Entity(entity["name"], entity["keys"], features, table))
    tables = {k: pl.read_parquet(folder / f"table_{k}.parquet").lazy() for k in content["tables"]}
    sql = json.loads((folder / SQL).read_text("utf-8"))
    project = Project.model_validate(content["project"])
    day = date.fromisoformat(content["day"])
    as_of = AsOf(project, day, tables, entities, sql)
    lists = DayLists.load(folder / LISTS) if (folder / LISTS).is_dir() else None
    return Snapshot(as_of, content["version"], pl.read_parquet(folder / EXAMPLE), lists)


def rank(ranker: RankerArtifact, snapshot: Snapshot, candidates: pl.DataFrame) -> pl.DataFrame:
    """Each user's top k of N candidates, as `score_day` publishes them.

    Args:
        candidates: in the columns and types of the snapshot.
    """
    as_of = snapshot.as_of
    if candidates.is_empty():  # a ranking without rows has the same columns
        return rank(ranker, snapshot, snapshot.example).clear()
    rankings: list[pl.DataFrame] = []
    how = BlockRanker(ranker, as_of, snapshot.lists)
    for part in grouped(user_blocks(candidates.lazy(), as_of.project.scoring.block_rows)):
        own = joined(part).of(candidates.lazy()).collect()
        rankings += [rows for rows, _ in rank_blocks(how, own, part)]
    return with_version(rankings, snapshot.version)
