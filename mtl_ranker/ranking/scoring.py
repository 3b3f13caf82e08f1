"""Candidates in, ranked Parquet out: features as of day D, predictions, one score, a rank."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import polars as pl
import torch

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_history, history_fingerprint
from mtl_ranker.features.blocks import Block, joined, user_blocks
from mtl_ranker.features.columns import feature_columns
from mtl_ranker.features.point_in_time import AsOf, FeatureSides, feature_sides
from mtl_ranker.models.matmul import cores, fast_matmul
from mtl_ranker.ranking.artifact import PairItems, RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import candidate_files, columns_read, prepared_candidates
from mtl_ranker.workspace import Workspace, file_state, fingerprint

ITEM_ROW = "row of the item"

WINDOWS_FOR = 16  # blocks on each core, whose users' windows are held at a time


@dataclass(frozen=True)
class Ranked:
    path: Path
    candidates: int
    users: int
    rows: int


def rankings_provenance(context: Context, ranker: RegisteredRanker, day: date) -> dict[str, str]:
    """What decides the ranking of a day."""
    own = ranker.artifact.project.digest("scoring")
    context = ranker.context(context)
    states = [file_state(file) for file in candidate_files(context, day)]
    return {
        "model version": ranker.version,
        "setting scoring and stored blend": fingerprint(context.project.digest("scoring"), own),
        "candidate set": fingerprint(*states),
        "aggregates of earlier days": history_fingerprint(context, day),
    }


@dataclass(frozen=True)
class RankingPart:
    """Blocks of whole users that are ranked side by side, and the file of their ranking."""

    blocks: list[Block]
    file: Path

    @property
    def candidates(self) -> int:
        return sum(block.rows for block in self.blocks)


@dataclass(frozen=True)
class RankingPlan:
    """How a day's candidates are ranked: one part after the other, here or on several machines.

    Attributes:
        made: what decides the ranking.
        parts: their files lie aside until all are ranked.
    """

    day: date
    version: str
    made: dict[str, str]
    parts: list[RankingPart]

    @property
    def candidates(self) -> int:
        return sum(part.candidates for part in self.parts)


def plan_scoring(context: Context, ranker: RegisteredRanker, day: date) -> RankingPlan:
    """Divide a day's candidates into parts.

    Raises ProjectError for candidates that cannot be read, and for an empty set.
    """
    context = ranker.context(context)
    project = context.project
    aggregate_history(context, day)
    candidates = prepared_candidates(context, day)
    blocks = user_blocks(candidates, project.scoring.block_rows)
    if not blocks:
        raise ProjectError(f"the candidate set of {day} holds no rows")
    made = rankings_provenance(context, ranker, day)
    size = WINDOWS_FOR * min(len(blocks), cores())
    grouped = [blocks[begin : begin + size] for begin in range(0, len(blocks), size)]
    key = {**made, "project": project.digest(), "blocks": fingerprint(*blocks)}
    files = context.workspace.parts("rankings", day, key, len(grouped))
    parts = [RankingPart(*part) for part in zip(grouped, files, strict=True)]
    return RankingPlan(day, ranker.version, made, parts)


def score_day(
    context: Context,
    ranker: RegisteredRanker,
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
    plan = plan_scoring(context, ranker, day)
    done = 0

    def tell(rows: int) -> None:
        nonlocal done
        done += rows
        if on_block is not None:
            on_block(done, plan.candidates)

    for part in plan.parts:
        rank_part(context, ranker, day, part, tell)
    return publish_ranking(context.workspace, plan)


def rank_part(
    context: Context,
    ranker: RegisteredRanker,
    day: date,
    part: RankingPart,
    on_block: Callable[[int], None] = lambda rows: None,
) -> None:
    """Rank one part of a plan into its file, unless an earlier attempt has."""
    if part.file.is_file():
        on_block(part.candidates)
        return
    context = ranker.context(context)
    project, artifact, blocks = context.project, ranker.artifact, part.blocks
    everyone = prepared_candidates(context, day, checked=True)
    # Read once: a candidate file need not lie in the order of users.
    own = [c for c in everyone.collect_schema() if c in columns_read(project)]
    candidates = joined(blocks).of(everyone).select(own).collect(engine="streaming")
    as_of = AsOf.build(context, candidates.lazy(), day)
    columns = as_of.join(candidates.lazy()).collect_schema()
    absent = [c for c in feature_columns(project) if c not in columns]
    if absent:
        raise ProjectError(f"candidates of {day} lack the feature columns {', '.join(absent)}")
    workers = min(len(blocks), cores())
    threads, before = max(1, cores() // workers), torch.get_num_threads()
    shared: CandidateItems | None = None
    keys = feature_sides(project, as_of.tables, candidates.columns).item_keys
    if candidates.select(keys).n_unique() <= project.scoring.block_rows // 4:
        candidates, shared = with_items(artifact, as_of, candidates)

    def rank(block: Block) -> pl.DataFrame:
        torch.set_num_threads(threads)
        rows, items = block.of(candidates.lazy()).collect(), shared
        if items is None:
            rows, items = with_items(artifact, as_of, rows)
        return rank_block(artifact, as_of, rows, items)

    rankings = []
    try:
        with ThreadPoolExecutor(workers) as pool, fast_matmul():
            # Several blocks at a time: each step of one leaves most of a machine idle.
            for block, ranking in zip(blocks, pool.map(rank, blocks), strict=True):
                rankings.append(ranking)
                on_block(block.rows)
    finally:
        torch.set_num_threads(before)
    with context.workspace.staged(part.file) as temporary:
        version = pl.lit(ranker.version).alias("model_version")
        pl.concat(rankings).with_columns(version).write_parquet(temporary)


def publish_ranking(workspace: Workspace, plan: RankingPlan) -> Ranked:
    """All parts as rankings/date=D."""
    path = workspace.publish_parts(
        "rankings", plan.day, [part.file for part in plan.parts], plan.made
    )
    rows = pl.scan_parquet(path)
    users, count = (
        rows.select(pl.col("user_id").n_unique(), pl.len().alias("rows")).collect().row(0)
    )
    return Ranked(path, plan.candidates, users, count)


@dataclass(frozen=True)
class CandidateItems:
    """Items of candidates with their features as of the day, ready to be paired with users.

    Attributes:
        sides: which features are a user's, an item's, a pair's.
        features: a row an item.
    """

    sides: FeatureSides
    features: pl.DataFrame
    ready: PairItems


def with_items(
    artifact: RankerArtifact, as_of: AsOf, candidates: pl.DataFrame
) -> tuple[pl.DataFrame, CandidateItems]:
    """Candidates with the row of each one's item (`ITEM_ROW`), and the items."""
    sides = feature_sides(as_of.project, as_of.tables, candidates.columns)
    rows, features = _side(as_of, candidates, sides, "item")
    ready = artifact.items_of_pairs(features, sides.features)
    return candidates.with_columns(rows.alias(ITEM_ROW)), CandidateItems(sides, features, ready)


def _side(
    as_of: AsOf, candidates: pl.DataFrame, sides: FeatureSides, which: str
) -> tuple[pl.Series, pl.DataFrame]:
    """Each candidate's row among the distinct users (or items), and their features."""
    keys = sides.user_keys if which == "user" else sides.item_keys
    one = candidates.select(keys).unique(maintain_order=True).with_row_index("row")
    rows = candidates.select(keys).join(
        one, on=keys, how="left", nulls_equal=True, maintain_order="left"
    )
    tables = [name for name, of in sides.entities.items() if of == which]
    return rows["row"], as_of.join(one.lazy(), tables).collect(engine="streaming").sort("row")


def rank_block(
    artifact: RankerArtifact, as_of: AsOf, candidates: pl.DataFrame, items: CandidateItems
) -> pl.DataFrame:
    """Features, predictions, score and rank of some users' candidates; each user's top k.

    The candidates, with no other columns than `columns_read`, and their items: of `with_items`.
    """
    sides, top = items.sides, as_of.project.scoring.top_k
    pairs = candidates.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    user_row, users = _side(as_of, pairs, sides, "user")
    tables = [name for name, of in sides.entities.items() if of == "pair"]
    if tables:
        # Keys that come from a user's or item's table are taken from the sides, once joined.
        known = {}
        for key in sides.pair_keys:
            if key in pairs.columns:
                known[key] = pairs[key]
            elif key in users.columns:
                known[key] = users[key].gather(user_row)
            else:
                known[key] = items.features[key].gather(pairs[ITEM_ROW])
        rows = pl.DataFrame(known).with_row_index("row").lazy()
        features = [c for e in as_of.entities if e.name in tables for c in e.features]
        windows = as_of.join_windows(rows, tables).select("row", *features)
        of_pair = windows.collect(engine="streaming").sort("row").drop("row")
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
        pl.concat(
            [pairs.select("user_id", "item_id", *as_of.project.log.context), predicted],
            how="horizontal",
        )
        # Few are left to sort: a user's k best, and whatever scores as the last of them does.
        .filter(pl.col("score") >= pl.col("score").top_k(top).min().over("user_id"))
        .sort(["user_id", "score", "item_id"], descending=[False, True, False])
        .with_columns((pl.int_range(pl.len(), dtype=pl.Int32).over("user_id") + 1).alias("rank"))
        .filter(pl.col("rank") <= top)
    )
