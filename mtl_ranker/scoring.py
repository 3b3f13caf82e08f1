"""Candidates in, ranked Parquet out: features as of day D, predictions, one score, a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import torch

from mtl_ranker.artifact import PairItems, RankerArtifact
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.blocks import Block, joined, user_blocks
from mtl_ranker.features.queries import (
    AsOf,
    Parts,
    feature_columns,
    feature_parts,
    history_fingerprint,
)
from mtl_ranker.kernels import fast_matmul
from mtl_ranker.logs.sources import Source
from mtl_ranker.training.concurrent import cores
from mtl_ranker.workspace import Workspace, file_state, fingerprint

ITEM_ROW = "row of the item"
WINDOWS_FOR = 16  # blocks on each core, whose users' windows are held at a time


@dataclass(frozen=True)
class Ranked:
    path: Path
    candidates: int
    users: int
    rows: int


def prepared_candidates(
    project: Project, source: Source, workspace: Workspace, day: date, checked: bool = False
) -> pl.LazyFrame:
    """The candidate set of day D with the log's types, and with every context column.

    Raises ProjectError as `load_candidates` does, and for a value that has no such form; not for
    rows that were `checked` before.
    """
    candidates = load_candidates(project, source, workspace, day, checked)
    candidates = _cast_keys(candidates, workspace, day, project.log.context, checked)
    for column in project.log.context:
        if column not in candidates.collect_schema():
            candidates = candidates.with_columns(
                pl.lit(None, _context_type(workspace, column)).alias(column)
            )
    return candidates


def load_candidates(
    project: Project, source: Source, workspace: Workspace, day: date, checked: bool = False
) -> pl.LazyFrame:
    """The candidate set of day D: given (folder of date=D or one file), or made from the log.

    Raises ProjectError when a given set is missing, unreadable or lacks a column, a user or an
    item; with `checked` the rows are not looked at.
    """
    given = project.scoring.candidates
    if given is None:
        return generate_candidates(project, workspace, day)
    path = source.root / given
    files = candidate_files(project, source, day)
    if not files:
        path = path / f"date={day}" if path.is_dir() else path
        raise ProjectError(f"{path}: no candidate set for {day} (scoring.candidates = {given!r})")
    path = files[0] if len(files) == 1 else files[0].parent
    try:
        lazy = pl.scan_parquet(files, glob=False)
        columns = lazy.collect_schema().names()
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ProjectError(f"{path}: not a whole Parquet file ({reason})") from error
    renames = {project.log.user: "user_id", project.log.item: "item_id"}
    lazy = lazy.rename({c: r for c, r in renames.items() if c in columns and c != r})
    columns = lazy.collect_schema().names()
    for key, own in (("user_id", project.log.user), ("item_id", project.log.item)):
        if key not in columns:
            raise ProjectError(
                f"{path}: column {own!r} (the {key.removesuffix('_id')}) is missing; "
                f"it has: {', '.join(columns)}"
            )
    if checked:
        return lazy
    empty = (
        lazy.select(pl.col("user_id").null_count() + pl.col("item_id").null_count())
        .collect()
        .item()
    )
    if empty:
        raise ProjectError(f"{path}: {empty} rows lack a user or an item; allowed: none")
    return lazy


def candidate_files(project: Project, source: Source, day: date) -> list[Path]:
    """The files of day D's given candidate set; empty when none is given or there."""
    if project.scoring.candidates is None:
        return []
    path = source.root / project.scoring.candidates
    if path.is_dir():
        path = path / f"date={day}"
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    return [file for file in files if file.is_file()]


def candidate_days(project: Project, source: Source) -> list[date]:
    """Days for which a candidate set was put into the folder of candidates, ascending."""
    if project.scoring.candidates is None:
        raise ProjectError("scoring.candidates: not set, so no new candidate sets can be found")
    folder = source.root / project.scoring.candidates
    if not folder.is_dir():
        raise ProjectError(f"{folder}: no folder of date=YYYY-MM-DD (scoring.candidates)")
    found = []
    for place in folder.glob("date=*"):
        try:
            found.append(date.fromisoformat(place.name.removeprefix("date=")))
        except ValueError as error:
            raise ProjectError(f"{place}: expected date=YYYY-MM-DD") from error
    return sorted(day for day in found if candidate_files(project, source, day))


def rankings_made_from(
    project: Project,
    source: Source,
    workspace: Workspace,
    artifact: RankerArtifact,
    version: str,
    day: date,
) -> dict[str, str]:
    """What decides the ranking of a day."""
    chosen = fingerprint(project.digest("scoring"), artifact.project.digest("scoring"))
    states = [file_state(file) for file in candidate_files(project, source, day)]
    return {
        "model version": version,
        "setting scoring and stored blend": chosen,
        "candidate set": fingerprint(*states),
        "aggregates of earlier days": history_fingerprint(project, workspace, day),
    }


def generate_candidates(project: Project, workspace: Workspace, day: date) -> pl.LazyFrame:
    """Active users of the last day before D × the items shown most on the last three days.

    Context columns take each user's most frequent value of that day.
    """
    before = [d for d in workspace.days("events") if d < day]
    if not before:
        raise ProjectError(f"no events before {day} are published, so no candidates can be made")
    last = workspace.scan("events", before[-1:])
    recent = workspace.scan("events", [d for d in before if day - d <= timedelta(days=3)] or before)
    context = [pl.col(c).mode().sort().first() for c in project.log.context]
    users = last.group_by("user_id").agg(pl.len().alias("seen"), *context)
    users = users.sort(["seen", "user_id"], descending=[True, False]).drop("seen")
    if project.scoring.generated_users is not None:
        users = users.head(project.scoring.generated_users)
    items = recent.group_by("item_id").agg(pl.len().alias("shown"))
    items = items.sort(["shown", "item_id"], descending=[True, False]).drop("shown")
    return users.join(items.head(project.scoring.generated_items), how="cross")


@dataclass(frozen=True)
class RankingPlan:
    """How a day's candidates are ranked: a part after the other, here or on several machines.

    Attributes:
        made: what decides the ranking.
        parts: blocks of whole users that are ranked side by side, and where each part lies until
            all are ranked.
    """

    day: date
    version: str
    made: dict[str, str]
    parts: list[tuple[list[Block], Path]]

    @property
    def candidates(self) -> int:
        return sum(block.rows for blocks, _ in self.parts for block in blocks)


def plan_scoring(
    project: Project,
    source: Source,
    workspace: Workspace,
    artifact: RankerArtifact,
    version: str,
    day: date,
) -> RankingPlan:
    """Raises ProjectError for candidates that cannot be read, and for none."""
    candidates = prepared_candidates(project, source, workspace, day)
    blocks = user_blocks(candidates, project.scoring.block_rows)
    if not blocks:
        raise ProjectError(f"the candidate set of {day} holds no rows")
    made = rankings_made_from(project, source, workspace, artifact, version, day)
    size = WINDOWS_FOR * min(len(blocks), cores())
    parts = [blocks[begin : begin + size] for begin in range(0, len(blocks), size)]
    key = {**made, "project": project.digest(), "blocks": fingerprint(*blocks)}
    files = workspace.parts("rankings", day, key, len(parts))
    return RankingPlan(day, version, made, list(zip(parts, files, strict=True)))


def score_day(
    project: Project,
    source: Source,
    workspace: Workspace,
    artifact: RankerArtifact,
    version: str,
    day: date,
    on_block: Callable[[int, int], None] | None = None,
) -> Ranked:
    """Score and rank day D's candidates, keep each user's top k, publish rankings/date=D.

    Unknown users and items are scored with what is known, never dropped. A pair that occurs twice
    in the candidates is ranked once. Candidates are taken in blocks of whole users, so memory
    depends on `scoring.block_rows` and on the largest user's set, not on the number of candidates.
    A killed run's finished parts are not ranked again.

    `on_block` is told how many of how many candidates are done.
    """
    plan = plan_scoring(project, source, workspace, artifact, version, day)
    done = 0

    def tell(rows: int) -> None:
        nonlocal done
        done += rows
        if on_block is not None:
            on_block(done, plan.candidates)

    for blocks, file in plan.parts:
        rank_part(project, source, workspace, artifact, version, day, blocks, file, tell)
    return publish_ranking(workspace, plan)


def rank_part(
    project: Project,
    source: Source,
    workspace: Workspace,
    artifact: RankerArtifact,
    version: str,
    day: date,
    blocks: list[Block],
    file: Path,
    on_block: Callable[[int], None] = lambda rows: None,
) -> None:
    """Rank one part of a plan into its file, unless an earlier attempt has."""
    if file.is_file():
        on_block(sum(block.rows for block in blocks))
        return
    everyone = prepared_candidates(project, source, workspace, day, checked=True)
    # Read once: a candidate file need not lie in the order of users.
    own = [c for c in everyone.collect_schema() if c in columns_read(project)]
    candidates = joined(blocks).of(everyone).select(own).collect(engine="streaming")
    as_of = AsOf.build(project, source, workspace, candidates.lazy(), day)
    columns = as_of.join(candidates.lazy()).collect_schema()
    absent = [c for c in feature_columns(project) if c not in columns]
    if absent:
        raise ProjectError(f"candidates of {day} lack the feature columns {', '.join(absent)}")
    workers = min(len(blocks), cores())
    threads, before = max(1, cores() // workers), torch.get_num_threads()
    shared: CandidateItems | None = None
    keys = feature_parts(project, as_of.tables, candidates.columns).item_keys
    if candidates.select(keys).n_unique() <= project.scoring.block_rows // 4:
        candidates, shared = with_items(project, artifact, as_of, candidates)

    def rank(block: Block) -> pl.DataFrame:
        torch.set_num_threads(threads)
        rows, items = block.of(candidates.lazy()).collect(), shared
        if items is None:
            rows, items = with_items(project, artifact, as_of, rows)
        return rank_block(project, artifact, as_of, rows, items)

    found = []
    try:
        with ThreadPoolExecutor(workers) as pool, fast_matmul():
            # Several blocks at a time: each step of one leaves most of a machine idle.
            for block, ranked in zip(blocks, pool.map(rank, blocks), strict=True):
                found.append(ranked)
                on_block(block.rows)
    finally:
        torch.set_num_threads(before)
    with workspace.aside(file) as temporary:
        named = pl.concat(found).with_columns(pl.lit(version).alias("model_version"))
        named.write_parquet(temporary)


def publish_ranking(workspace: Workspace, plan: RankingPlan) -> Ranked:
    """All parts as rankings/date=D."""
    path = workspace.publish_parts(
        "rankings", plan.day, [file for _, file in plan.parts], plan.made
    )
    rows = pl.scan_parquet(path)
    users, count = (
        rows.select(pl.col("user_id").n_unique(), pl.len().alias("rows")).collect().row(0)
    )
    return Ranked(path, plan.candidates, users, count)


def columns_read(project: Project) -> set[str]:
    """What of a candidate set counts, if it is there."""
    entity_keys = {key for entity in project.features.entities for key in entity}
    return {"user_id", "item_id", *project.log.context, *feature_columns(project), *entity_keys}


@dataclass(frozen=True)
class CandidateItems:
    """Items of candidates with their features as of the day, ready to be paired with users.

    Attributes:
        parts: which features are a user's, an item's, a pair's.
        features: a row an item.
    """

    parts: Parts
    features: pl.DataFrame
    ready: PairItems


def with_items(
    project: Project, artifact: RankerArtifact, as_of: AsOf, candidates: pl.DataFrame
) -> tuple[pl.DataFrame, CandidateItems]:
    """Candidates with the row of each one's item (`ITEM_ROW`), and the items."""
    parts = feature_parts(project, as_of.tables, candidates.columns)
    rows, features = _side(as_of, candidates, parts, "item")
    ready = artifact.items_of_pairs(features, parts.features)
    return candidates.with_columns(rows.alias(ITEM_ROW)), CandidateItems(parts, features, ready)


def _side(
    as_of: AsOf, candidates: pl.DataFrame, parts: Parts, which: str
) -> tuple[pl.Series, pl.DataFrame]:
    """Each candidate's row among the distinct users (or items), and their features."""
    keys = parts.user_keys if which == "user" else parts.item_keys
    one = candidates.select(keys).unique(maintain_order=True).with_row_index("row")
    rows = candidates.select(keys).join(
        one, on=keys, how="left", nulls_equal=True, maintain_order="left"
    )
    tables = [name for name, of in parts.entities.items() if of == which]
    return rows["row"], as_of.join(one.lazy(), tables).collect(engine="streaming").sort("row")


def rank_block(
    project: Project,
    artifact: RankerArtifact,
    as_of: AsOf,
    candidates: pl.DataFrame,
    items: CandidateItems,
) -> pl.DataFrame:
    """Features, predictions, score and rank of some users' candidates; each user's top k.

    The candidates, with no other columns than `columns_read`, and their items: of `with_items`.
    """
    context, parts, top = project.log.context, items.parts, project.scoring.top_k
    pairs = candidates.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    user_row, users = _side(as_of, pairs, parts, "user")
    tables = [name for name, of in parts.entities.items() if of == "pair"]
    if tables:
        # Keys that come from a user's or item's table are taken from the sides, once joined.
        known = {}
        for key in parts.pair_keys:
            if key in pairs.columns:
                known[key] = pairs[key]
            elif key in users.columns:
                known[key] = users[key].gather(user_row)
            else:
                known[key] = items.features[key].gather(pairs[ITEM_ROW])
        rows = pl.DataFrame(known).with_row_index("row").lazy()
        features = [c for e in as_of.entities if e.name in tables for c in e.features]
        joined = as_of.join_windows(rows, tables).select("row", *features)
        of_pair = joined.collect(engine="streaming").sort("row").drop("row")
    else:
        of_pair = pl.DataFrame()
    by = artifact.calibration.by
    surface = pairs.select(by) if by is not None and by in pairs.columns else pl.DataFrame()
    predicted = artifact.predict_pairs(
        users,
        items.ready,
        pl.concat([of_pair, surface], how="horizontal"),
        user_row.to_numpy(),
        pairs[ITEM_ROW].to_numpy(),
    )
    return (
        pl.concat([pairs.select("user_id", "item_id", *context), predicted], how="horizontal")
        # Few are left to sort: a user's k best, and whatever scores as the last of them does.
        .filter(pl.col("score") >= pl.col("score").top_k(top).min().over("user_id"))
        .sort(["user_id", "score", "item_id"], descending=[False, True, False])
        .with_columns((pl.int_range(pl.len(), dtype=pl.Int32).over("user_id") + 1).alias("rank"))
        .filter(pl.col("rank") <= top)
    )


def _cast_keys(
    candidates: pl.LazyFrame,
    workspace: Workspace,
    day: date,
    context: Sequence[str] = (),
    checked: bool = False,
) -> pl.LazyFrame:
    """User, item and context in the log's own types.

    Raises ProjectError for a value that has no such form, unless `checked`.
    """
    schema, found = _event_schema(workspace), candidates.collect_schema()
    for key in ("user_id", "item_id", *(c for c in context if c in found)):
        if schema[key] == found[key]:
            continue
        cast = pl.col(key).cast(schema[key], strict=False)
        if checked:
            candidates = candidates.with_columns(cast)
            continue
        lost = candidates.filter(pl.col(key).is_not_null() & cast.is_null()).select(key)
        odd = lost.head(3).collect()[key].to_list()
        if odd:
            raise ProjectError(
                f"candidates of {day}: column {key!r} is {found[key]} and holds {odd}, "
                f"but it is {schema[key]} in the log"
            )
        candidates = candidates.with_columns(cast)
    return candidates


def _context_type(workspace: Workspace, column: str) -> pl.DataType:
    return _event_schema(workspace)[column]


def _event_schema(workspace: Workspace) -> pl.Schema:
    return workspace.scan("events", workspace.days("events")[-1:]).collect_schema()
