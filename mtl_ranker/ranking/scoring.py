"""Rank a day's candidates: features as of day D, predictions, one score and a rank, as Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import PurePath

import polars as pl
import torch

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_history, history_fingerprint
from mtl_ranker.features.columns import feature_columns
from mtl_ranker.features.derived import with_computed
from mtl_ranker.features.matches import match_feature
from mtl_ranker.features.point_in_time import AsOf, FeatureSides, feature_sides
from mtl_ranker.logs.blocks import Block, joined, user_blocks
from mtl_ranker.logs.places import content_of
from mtl_ranker.models.matmul import cores, fast_matmul
from mtl_ranker.ranking.artifact import PairItems, RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import candidate_files, columns_read, prepared_candidates
from mtl_ranker.ranking.rules import (
    DESCENDING,
    ORDER,
    PAIR,
    DayLists,
    Effect,
    effects_from_json,
    effects_to_json,
    rules_provenance,
    summed,
)
from mtl_ranker.training.device import device_of
from mtl_ranker.workspace import Workspace, fingerprint

ITEM_ROW = "row of the item"
# Keys in the metadata of a part.
REPEATED, EFFECTS = "mtl_ranker.repeated", "mtl_ranker.effects"

BLOCKS_PER_CORE = 16  # of a part; the windows of a part's users are in memory at a time


@dataclass(frozen=True)
class Ranked:
    """A published ranking.

    Attributes:
        candidates: rows of the candidate set.
        rows: of the ranking.
        repeated: candidates with the user and item of an earlier row, but another context; they
            are not ranked.
        effects: what each rule and exploration changed of the blended score.
    """

    path: PurePath
    candidates: int
    users: int
    rows: int
    repeated: int
    effects: Sequence[Effect] = ()


def rankings_provenance(context: Context, ranker: RegisteredRanker, day: date) -> dict[str, str]:
    """What a day's ranking depends on, by name; it is rebuilt when one of them changes."""
    stored_blend = ranker.artifact.project.digest("scoring")
    rules = rules_provenance(context, day)
    context = ranker.context(context)
    states = [content_of(file, context.workspace) for file in candidate_files(context, day)]
    return {
        "model version": ranker.version,
        "setting scoring and stored blend": fingerprint(
            context.project.digest("scoring"), stored_blend
        ),
        "candidate set": fingerprint(*states),
        "user and item tables": fingerprint(*context.source.tables_state(day)),
        "aggregates of earlier days": history_fingerprint(context, day),
        **rules,
    }


@dataclass(frozen=True)
class RankingPart:
    """Blocks of whole users that are ranked in parallel, and the file of their ranking.

    Attributes:
        file: below the workspace's root.
    """

    blocks: list[Block]
    file: PurePath

    @property
    def candidates(self) -> int:
        return sum(block.rows for block in self.blocks)


@dataclass(frozen=True)
class RankingPlan:
    """A day's candidates in parts, which are ranked one after the other or on several machines.

    Attributes:
        made: the ranking's provenance (`rankings_provenance`).
        parts: their files are published together once all are ranked.
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

    Raises ProjectError for candidates that cannot be read and for an empty set.
    """
    context = ranker.context(context)
    project = context.project
    aggregate_history(context, day)
    candidates = prepared_candidates(context, day)
    blocks = user_blocks(candidates, project.scoring.block_rows)
    if not blocks:
        eligible = project.scoring.eligible
        of = f" with a true {eligible!r} (scoring.eligible)" if eligible else ""
        raise ProjectError(f"the candidate set of {day} holds no rows{of}")
    provenance = rankings_provenance(context, ranker, day)
    groups = grouped(blocks)
    key = {**provenance, "project": project.digest(), "blocks": fingerprint(*blocks)}
    files = context.workspace.parts("rankings", day, key, len(groups))
    parts = [RankingPart(*part) for part in zip(groups, files, strict=True)]
    return RankingPlan(day, ranker.version, provenance, parts)


def score_day(
    context: Context,
    ranker: RegisteredRanker,
    day: date,
    on_block: Callable[[int, int], None] | None = None,
) -> Ranked:
    """Score and rank day D's candidates, keep each user's top k, publish rankings/date=D.

    Unknown users and items are scored with missing features, never dropped. A pair that occurs
    twice in the candidates is ranked once. Candidates are read in blocks of whole users, so memory
    depends on `scoring.block_rows` and on the largest user's set, not on the number of candidates.
    Finished parts of an interrupted run are not ranked a second time.

    `on_block` is called with the number of candidates done and of all candidates.
    """
    context = context.pinned()
    with context.workspace.lock(f"score {day}", ranking_scope(day), wait=True):
        return _score_day(context, ranker, day, on_block)


def ranking_scope(day: date) -> str:
    """Name of the lock of a day's ranking."""
    return f"rankings/{day}"


def _score_day(
    context: Context,
    ranker: RegisteredRanker,
    day: date,
    on_block: Callable[[int, int], None] | None,
) -> Ranked:
    plan = plan_scoring(context, ranker, day)
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        if on_block is not None:
            on_block(done, plan.candidates)

    parts = PartRanker(context, ranker, day)
    for part in plan.parts:
        parts.rank(part, count)
    return publish_ranking(context.workspace, plan)


def rank_part(context: Context, ranker: RegisteredRanker, day: date, part: RankingPart) -> None:
    """Rank one part of a plan, as `PartRanker`."""
    PartRanker(context, ranker, day).rank(part)


@dataclass(frozen=True)
class PartRanker:
    """Ranks the parts of a plan of day D.

    Attributes:
        context: of the project, not of the model.
    """

    context: Context
    ranker: RegisteredRanker
    day: date

    @cached_property
    def _lists(self) -> DayLists | None:
        """The rules of the day, as far as all parts share them."""
        return DayLists.of_all_users(self.context, self.day)

    def rank(self, part: RankingPart, on_block: Callable[[int], None] = lambda rows: None) -> None:
        """Rank one part into its file, unless the file exists.

        `on_block` is called with the candidates of each finished block. Raises ProjectError for
        candidates without a feature column.
        """
        if self.context.workspace.has(part.file):
            on_block(part.candidates)
            return
        blocks, day, artifact = part.blocks, self.day, self.ranker.artifact
        users = joined(blocks)
        lists = self._lists
        if lists is not None:
            lists = lists.with_users(self.context, users.of)
        context = self.ranker.context(self.context)
        project = context.project
        all_candidates = prepared_candidates(context, day, checked=True)
        used = [c for c in all_candidates.collect_schema() if c in columns_read(project)]
        # One read for all blocks, as a candidate file need not be sorted by user.
        candidates = users.of(all_candidates).select(used).collect(engine="streaming")
        as_of = AsOf.build(context, candidates.lazy(), day)
        columns = as_of.join(candidates.lazy()).collect_schema()
        missing = [c for c in feature_columns(project) if c not in columns]
        if missing:
            raise ProjectError(f"candidates of {day} lack the feature columns {', '.join(missing)}")
        ranked = rank_blocks(BlockRanker(artifact, as_of, lists), candidates, blocks, on_block)
        repeated = candidates.select(used).n_unique() - candidates.select(PAIR).n_unique()
        with context.workspace.published(part.file) as temporary:
            ranking = with_version([rows for rows, _ in ranked], self.ranker.version)
            effects = summed(changed for _, changed in ranked)
            facts = {REPEATED: str(repeated), EFFECTS: effects_to_json(effects)}
            ranking.write_parquet(temporary, metadata=facts)


@dataclass(frozen=True)
class BlockRanker:
    """How a block of candidates is ranked.

    Attributes:
        lists: the rules and the exploration of the day, if the project has any.
    """

    artifact: RankerArtifact
    as_of: AsOf
    lists: DayLists | None = None

    def rank(
        self, candidates: pl.DataFrame, items: CandidateItems
    ) -> tuple[pl.DataFrame, list[Effect]]:
        """The ranking of whole users' candidates, and what the rules changed.

        Args:
            candidates: with columns of `columns_read` and `ITEM_ROW`.
            items: theirs; both are of `with_items`.
        """
        if self.lists is None:
            return rank_block(self.artifact, self.as_of, candidates, items), []
        return self.lists.ranked(score_block(self.artifact, self.as_of, candidates, items))


def rank_blocks(
    how: BlockRanker,
    candidates: pl.DataFrame,
    blocks: Sequence[Block],
    on_block: Callable[[int], None] = lambda rows: None,
) -> list[tuple[pl.DataFrame, list[Effect]]]:
    """The ranking of each block's candidates, and what the rules changed.

    `on_block` is called with the candidates of each finished block.

    Args:
        candidates: of all blocks, with columns of `columns_read`.
    """
    as_of = how.as_of
    artifact = how.artifact.on(device_of(as_of.project.scoring.device, "scoring.device"))
    how = replace(how, artifact=artifact)
    workers = min(len(blocks), cores())
    threads, threads_before = max(1, cores() // workers), torch.get_num_threads()
    # Few items are embedded once for all blocks, many for each block.
    shared: CandidateItems | None = None
    keys = feature_sides(as_of.project, as_of.tables, candidates.columns).item_keys
    if candidates.select(keys).n_unique() <= as_of.project.scoring.block_rows // 4:
        candidates, shared = with_items(artifact, as_of, candidates)

    def rank(block: Block) -> tuple[pl.DataFrame, list[Effect]]:
        torch.set_num_threads(threads)
        rows, items = block.of(candidates.lazy()).collect(), shared
        if items is None:
            rows, items = with_items(artifact, as_of, rows)
        return how.rank(rows, items)

    ranked = []
    try:
        with ThreadPoolExecutor(workers) as pool, fast_matmul(artifact.model.device):
            # Several blocks at a time, as one block does not use all cores.
            for block, result in zip(blocks, pool.map(rank, blocks), strict=True):
                ranked.append(result)
                on_block(block.rows)
    finally:
        torch.set_num_threads(threads_before)
    return ranked


def with_version(rankings: Sequence[pl.DataFrame], version: str) -> pl.DataFrame:
    """Rankings as one, with the version of their model."""
    return pl.concat(rankings).with_columns(pl.lit(version).alias("model_version"))


def grouped(blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks of each part of a ranking."""
    size = BLOCKS_PER_CORE * min(len(blocks), cores())
    return [list(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def publish_ranking(workspace: Workspace, plan: RankingPlan) -> Ranked:
    """Publish all parts of a plan as rankings/date=D."""
    files = [part.file for part in plan.parts]
    facts = [pl.read_parquet_metadata(file) for file in workspace.files(files)]
    repeated = sum(int(fact[REPEATED]) for fact in facts)
    effects = summed(effects_from_json(fact[EFFECTS]) for fact in facts)
    path = workspace.publish_parts("rankings", plan.day, files, plan.made)
    rows = workspace.scan("rankings", [plan.day])
    users, count = (
        rows.select(pl.col("user_id").n_unique(), pl.len().alias("rows")).collect().row(0)
    )
    return Ranked(path, plan.candidates, users, count, repeated, effects)


@dataclass(frozen=True)
class CandidateItems:
    """The items of candidates with their features as of the day.

    Attributes:
        sides: which features belong to users, to items and to pairs.
        features: a row per item.
        ready: the items, encoded and embedded.
    """

    sides: FeatureSides
    features: pl.DataFrame
    ready: PairItems


def with_items(
    artifact: RankerArtifact, as_of: AsOf, candidates: pl.DataFrame
) -> tuple[pl.DataFrame, CandidateItems]:
    """The candidates with column `ITEM_ROW`, the row of each one's item, and the items."""
    sides = feature_sides(as_of.project, as_of.tables, candidates.columns)
    rows, features = _side(as_of, candidates, sides, "item")
    ready = artifact.items_of_pairs(features, sides.features)
    return candidates.with_columns(rows.alias(ITEM_ROW)), CandidateItems(sides, features, ready)


def _side(
    as_of: AsOf, candidates: pl.DataFrame, sides: FeatureSides, which: str
) -> tuple[pl.Series, pl.DataFrame]:
    """Each candidate's row among the distinct users (or items), and their features."""
    keys = sides.user_keys if which == "user" else sides.item_keys
    entities = candidates.select(keys).unique(maintain_order=True).with_row_index("row")
    rows = candidates.select(keys).join(
        entities, on=keys, how="left", nulls_equal=True, maintain_order="left"
    )
    tables = [name for name, side in sides.entities.items() if side == which]
    return rows["row"], as_of.join(entities.lazy(), tables).collect(engine="streaming").sort("row")


def rank_block(
    artifact: RankerArtifact, as_of: AsOf, candidates: pl.DataFrame, items: CandidateItems
) -> pl.DataFrame:
    """Each user's top k candidates with predictions, score and rank.

    Args:
        candidates, items: as of `score_block`.
    """
    top = as_of.project.scoring.top_k
    return (
        score_block(artifact, as_of, candidates, items)
        # Before sorting, keeps a user's k best and whatever has the score of the last of them.
        .filter(pl.col("score") >= pl.col("score").top_k(top).min().over("user_id"))
        .sort(ORDER, descending=DESCENDING)
        .with_columns((pl.int_range(pl.len(), dtype=pl.Int32).over("user_id") + 1).alias("rank"))
        .filter(pl.col("rank") <= top)
    )


def score_block(
    artifact: RankerArtifact, as_of: AsOf, candidates: pl.DataFrame, items: CandidateItems
) -> pl.DataFrame:
    """Each pair of a user and an item once, with context columns, predictions and score.

    Args:
        candidates: of whole users, with columns of `columns_read` and `ITEM_ROW`.
        items: theirs; both are of `with_items`.
    """
    sides = items.sides
    pairs = candidates.unique(PAIR, keep="first", maintain_order=True)
    user_row, users = _side(as_of, pairs, sides, "user")
    tables = [name for name, side in sides.entities.items() if side == "pair"]

    def of_pairs(columns: Iterable[str]) -> pl.DataFrame:
        """Columns of the candidates, or of their users or items."""
        found = {}
        for name in columns:
            if name in pairs.columns:
                found[name] = pairs[name]
            elif name in users.columns:
                found[name] = users[name].gather(user_row)
            else:
                found[name] = items.features[name].gather(pairs[ITEM_ROW])
        return pl.DataFrame(found)

    if tables:
        rows = of_pairs(sides.pair_keys).with_row_index("row").lazy()
        features = [c for e in as_of.entities if e.name in tables for c in e.features]
        windows = as_of.join_windows(rows, tables).select("row", *features)
        pair_features = windows.collect(engine="streaming").sort("row").drop("row")
    else:
        pair_features = pl.DataFrame()
    matched = [
        match_feature(
            match,
            users[match.user].gather(user_row),
            items.features[match.item].gather(pairs[ITEM_ROW]),
        )
        for match in artifact.encoder.matches
    ]
    derived = pl.DataFrame()
    if sides.derived:
        read = of_pairs(dict.fromkeys(c for columns in sides.derived.values() for c in columns))
        computed = with_computed(as_of.project, read.lazy(), as_of.day, list(sides.derived))
        derived = computed.select(*sides.derived).collect()
    by = artifact.calibration.by
    surface = pairs.select(by) if by is not None and by in pairs.columns else pl.DataFrame()
    predicted = artifact.predict_pairs(
        users,
        items.ready,
        pl.concat([pair_features, pl.DataFrame(matched), derived, surface], how="horizontal"),
        user_row.to_numpy(),
        pairs[ITEM_ROW].to_numpy(),
    )
    return pl.concat(
        [pairs.select("user_id", "item_id", *as_of.project.log.context), predicted],
        how="horizontal",
    )
