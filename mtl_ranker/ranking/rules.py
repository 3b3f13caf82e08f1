"""A day's lists: the best candidates by score, under `[scoring.rules]`, with exploration.

Rules are the project file's, for every model. They apply after the blend, in this order: drop
what the user was shown, what is blocked and what is not allowed; fill the list rank by rank under
the other rules (`lists`); explore (`exploration`). What each step changes of the blended score is
summed over all users.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from mtl_ranker.config import Exploration, ListTable, Project, Scoring
from mtl_ranker.context import Context, Place
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.columns import EXPLORATION_COLUMNS
from mtl_ranker.features.tables import new_columns, read_as, survives, tables_as_of
from mtl_ranker.logs.blocks import users_between
from mtl_ranker.logs.places import content_of
from mtl_ranker.logs.sources import parquet_schema, scan_files
from mtl_ranker.ranking import exploration, lists
from mtl_ranker.ranking.candidates import prepared_candidates
from mtl_ranker.ranking.lists import (
    NO_VALUE,
    Candidates,
    Closeness,
    Limit,
    ListRules,
    Quota,
    Repetition,
    choose,
    rows_needed,
    unit_vectors,
)
from mtl_ranker.workspace import fingerprint

PAIR = ["user_id", "item_id"]
ORDER = ["user_id", "score", "item_id"]  # of rows, users ascending and each one's best first
DESCENDING = [False, True, False]
PUBLISHED = "item_id_published_day"  # of the item table, in days since 1970
PROPENSITY, SEED = EXPLORATION_COLUMNS
# Columns of scored rows: their number, whether no step drops them, and whether they count as fresh
# and may be in a list.
ROW, KEPT, FRESH, NEAR = "row", "is kept", "is fresh", "is near"
CODE = "code of "  # before the name of a column of values
LISTS, VECTORS = "lists.json", "vectors.npy"


@dataclass(frozen=True)
class ListScore:
    """Σ d·s and Σ d over ranked rows, with score s and the discount d = 1 / log2(1 + rank)."""

    total: float = 0.0
    discounts: float = 0.0
    rows: int = 0

    def __add__(self, other: ListScore) -> ListScore:
        return ListScore(
            self.total + other.total, self.discounts + other.discounts, self.rows + other.rows
        )

    @property
    def mean(self) -> float:
        """Mean blended score, discounted by rank; NaN without rows."""
        return self.total / self.discounts if self.discounts else float("nan")


@dataclass(frozen=True)
class Effect:
    """What one step changed of the lists, given the steps before it.

    Attributes:
        step: `seen_days`, `block[0]`, …, or `exploration`.
        dropped: candidates that it took away.
        lists: that it could change: all, or the explored ones.
    """

    step: str
    dropped: int
    lists: int
    before: ListScore
    after: ListScore

    def __add__(self, other: Effect) -> Effect:
        return Effect(
            self.step,
            self.dropped + other.dropped,
            self.lists + other.lists,
            self.before + other.before,
            self.after + other.after,
        )

    @property
    def change(self) -> float:
        """Relative change of the mean blended score."""
        before = self.before.mean
        return (self.after.mean - before) / abs(before) if before else float("nan")

    def __str__(self) -> str:
        dropped = f"{self.dropped:,} candidates dropped, " if self.dropped else ""
        return (
            f"{self.step}: {dropped}blended score {self.before.mean:.4f} to {self.after.mean:.4f} "
            f"({self.change:+.2%}) in {self.lists:,} lists, "
            f"{self.before.rows:,} to {self.after.rows:,} rows"
        )


def summed(effects: Iterable[Sequence[Effect]]) -> list[Effect]:
    """The effects of several blocks of users, step by step."""
    result: dict[str, Effect] = {}
    for block in effects:
        for effect in block:
            step = effect.step
            result[step] = result[step] + effect if step in result else effect
    return list(result.values())


def effects_to_json(effects: Sequence[Effect]) -> str:
    return json.dumps([asdict(effect) for effect in effects])


def effects_from_json(text: str) -> list[Effect]:
    return [
        Effect(**{**e, "before": ListScore(**e["before"]), "after": ListScore(**e["after"])})
        for e in json.loads(text)
    ]


def check_rules(context: Context) -> None:
    """Raise ProjectError for a table of `[scoring.rules]` that cannot be read as configured.

    Columns are checked against the tables of users and items, and the keys of block and allow lists
    in their files.
    """
    rules = context.project.scoring.rules
    for setting, table in rules.tables:
        _read_list(context, setting, table)
    if rules.columns or rules.fresh is not None:
        for rows in tables_as_of(context.source, context.last_day()).values():
            _check_types(context.project, rows)


def rules_provenance(context: Context, day: date) -> dict[str, str]:
    """What a day's lists depend on beside settings and scores; empty without such rules."""
    rules = context.project.scoring.rules
    made = {}
    if rules.seen_days:
        days = _seen_days(context, day)
        marks = [context.workspace.published_fingerprint("events", each) for each in days]
        made["events of the days in scoring.rules.seen_days"] = fingerprint(*days, *marks)
    for setting, table in rules.tables:
        content = content_of(_list_path(context, setting, table), context.workspace)
        made[f"table of scoring.rules.{setting}"] = content
    log, own = context.project.log, context.project.log.joined_columns
    keys = {key for _, table in rules.tables for key in table.key}
    if own & ({*rules.columns.values()} | keys) or (
        rules.fresh is not None and log.items is not None
    ):
        states = context.source.tables_state(day)
        made["tables that scoring.rules read"] = fingerprint(*states)
    return made


def _seen_days(context: Context, day: date) -> list[date]:
    first = day - timedelta(days=context.project.scoring.rules.seen_days)
    return [each for each in context.workspace.days("events") if first <= each < day]


def _list_path(context: Context, setting: str, table: ListTable) -> Place:
    path = context.source.root / table.path
    if not path.is_file():
        raise ProjectError(f"{path}: not found (scoring.rules.{setting}.path)")
    return path


def _read_list(context: Context, setting: str, table: ListTable) -> pl.DataFrame:
    """The distinct keys of a block or allow list, in canonical names."""
    path = _list_path(context, setting, table)
    log, schema = context.project.log, parquet_schema(path)
    columns = {}
    for key in table.key:
        name = {log.user: "user_id", log.item: "item_id"}.get(key, key)
        own = {"user_id": log.user, "item_id": log.item}.get(name, name)
        found = next((column for column in (key, name, own) if column in schema), None)
        if found is None:
            raise ProjectError(
                f"{path}: column {key!r} (scoring.rules.{setting}.key) is missing; "
                f"it has: {', '.join(schema)}"
            )
        columns[name] = pl.col(found)
    rows = scan_files([path]).select(column.alias(name) for name, column in columns.items())
    return rows.drop_nulls().unique().collect()


@dataclass(frozen=True)
class DayLists:
    """What is needed to make a day's lists out of scored candidates.

    Attributes:
        project: whose settings of `[scoring]` apply.
        drops: step → rows that drop (or, of an allow list, keep) the candidates they match.
        columns: frames with the columns that the rules read, each with its key.
        vectors: [M, D], of length 1 or 0, of `scoring.rules.mmr` on a column of vectors, which has
            the row of its vector in `columns`.
    """

    project: Project
    day: date
    drops: dict[str, pl.DataFrame]
    columns: list[tuple[list[str], pl.DataFrame]]
    vectors: np.ndarray | None = None

    @classmethod
    def build(cls, context: Context, day: date, given: Collection[str] = ()) -> DayLists | None:
        """Of all users; None where lists are the best candidates by score.

        Args:
            context: of the project, not of the model.
            given: columns that the scored rows have, which are not read here.

        Raises ProjectError as `check_rules` does.
        """
        common = cls.of_all_users(context, day, given)
        return None if common is None else common.with_users(context, given=given)

    @classmethod
    def of_all_users(
        cls, context: Context, day: date, given: Collection[str] = ()
    ) -> DayLists | None:
        """What is the same whichever users are ranked, as `build`; `with_users` adds the rest."""
        project, rules = context.project, context.project.scoring.rules
        if not rules.names and project.scoring.exploration is None:
            return None
        drops = {setting: _read_list(context, setting, table) for setting, table in rules.tables}
        wanted = _wanted(project, drops, given) - set(project.log.context)
        return cls.of(project, day, drops, list(_columns_of_tables(context, day, wanted)))

    def with_users(
        self,
        context: Context,
        users: Callable[[pl.LazyFrame], pl.LazyFrame] = lambda rows: rows,
        given: Collection[str] = (),
    ) -> DayLists:
        """With what users were shown, and with the context of their candidates.

        Args:
            context, given: as of `build`.
            users: keeps the rows of the users to be ranked.
        """
        drops = dict(self.drops)
        days = _seen_days(context, self.day) if self.project.scoring.rules.seen_days else []
        if days:
            seen = users(context.workspace.scan("events", days).select(PAIR))
            drops = {"seen_days": seen.unique().collect(engine="streaming"), **drops}
        wanted = _wanted(self.project, drops, given)
        own = [column for column in self.project.log.context if column in wanted]
        if not own:
            return replace(self, drops=drops)
        rows = users(prepared_candidates(context, self.day, checked=True)).select(*PAIR, *own)
        pairs = rows.collect(engine="streaming").unique(PAIR, keep="first", maintain_order=True)
        theirs = DayLists.of(self.project, self.day, drops, [(PAIR, pairs)])
        vectors = self.vectors if theirs.vectors is None else theirs.vectors
        return replace(self, drops=drops, columns=[*theirs.columns, *self.columns], vectors=vectors)

    @classmethod
    def of(
        cls,
        project: Project,
        day: date,
        drops: dict[str, pl.DataFrame],
        columns: list[tuple[list[str], pl.DataFrame]],
    ) -> DayLists:
        """Of frames with the columns that the rules read, vectors among them.

        Raises ProjectError for columns as `check_rules` does.
        """
        frames, vectors = _vectors(project, columns)
        read = {key for frame in drops.values() for key in frame.columns}
        coded = {*project.scoring.rules.columns.values()}
        if vectors is not None and project.scoring.rules.mmr is not None:
            coded.remove(project.scoring.rules.mmr.column)
        for number, (key, frame) in enumerate(frames):
            own = [column for column in frame.columns if column in coded]
            frame = frame.with_columns(_dense(frame, c).alias(CODE + c) for c in own)
            frames[number] = key, frame.drop(c for c in own if c not in read)
        return cls(project, day, drops, frames, vectors)

    def save(self, folder: Path) -> None:
        """Write what `load` reads into a new folder."""
        folder.mkdir(parents=True)
        frames = [*self.drops.values(), *(frame for _, frame in self.columns)]
        for number, frame in enumerate(frames):
            frame.write_parquet(folder / f"{number}.parquet")
        if self.vectors is not None:
            np.save(folder / VECTORS, self.vectors)
        content = {
            "day": str(self.day),
            "project": self.project.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "drops": list(self.drops),
            "keys": [key for key, _ in self.columns],
        }
        (folder / LISTS).write_text(json.dumps(content, indent=1), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> DayLists:
        content = json.loads((folder / LISTS).read_text("utf-8"))
        steps, keys = content["drops"], content["keys"]
        count = len(steps) + len(keys)
        frames = [pl.read_parquet(folder / f"{number}.parquet") for number in range(count)]
        project = Project.model_validate(content["project"])
        drops = dict(zip(steps, frames, strict=False))
        columns = list(zip(keys, frames[len(steps) :], strict=True))
        vectors = np.load(folder / VECTORS) if (folder / VECTORS).is_file() else None
        return cls(project, date.fromisoformat(content["day"]), drops, columns, vectors)

    @property
    def explores(self) -> bool:
        """Whether lists of some users are randomised, and the ranking has propensities."""
        return self.project.scoring.exploration is not None

    def ranked(self, scored: pl.DataFrame) -> tuple[pl.DataFrame, list[Effect]]:
        """The lists of whole users, with rank and, with exploration, propensity and seed.

        Args:
            scored: each pair of a user and an item once, with score.
        """
        used = {*PAIR, "score", *self.project.scoring.rules.columns.values(), PUBLISHED}
        used |= {key for frame in self.drops.values() for key in frame.columns}
        rows = self._with_columns(scored.select(c for c in scored.columns if c in used))
        masks = self._masks(rows)
        kept = masks[-1] if masks else np.ones(rows.height, bool)
        fresh = self._is_fresh(rows)
        rows = rows.with_row_index(ROW).with_columns(pl.Series(KEPT, kept), fresh.alias(FRESH))
        users = rows["user_id"].unique().sort()
        whole = self._explored(users)
        while True:
            near = rows.with_columns(self._near(whole).alias(NEAR))
            block = _Block.of(near, masks)
            rules = list(self._list_rules(block))
            chosen, certain, effects = self._chosen(block, rules)
            if certain.all():
                break
            whole = pl.concat([whole, block.users.filter(pl.Series(~certain))])
        effects = [*self._dropped(block, rows, masks), *effects]
        if not self.explores:
            row, rank = chosen
            return self._finished(scored[block.rows[ROW][row]], rank), effects
        explorer = _Explorer(self.project.scoring, self.day, block.candidates, block.rows)
        last = rules[-1][1] if rules else ListRules()
        (row, rank), propensity, effect = explorer.explored(chosen, last)
        ranking = self._finished(scored[block.rows[ROW][row]], rank).with_columns(
            pl.Series(PROPENSITY, propensity),
            pl.when(pl.Series(explorer.explores[block.candidates.user[row]]))
            .then(pl.lit(explorer.settings.seed, pl.Int64))
            .alias(SEED),
        )
        return ranking, [*effects, effect]

    def _explored(self, users: pl.Series) -> pl.Series:
        """The users whose lists are randomised."""
        exploring = self.project.scoring.exploration
        if exploring is None:
            return users.clear()
        return users.filter(pl.Series(explored_users(exploring, self.day, users)))

    def _near(self, whole: pl.Series) -> pl.Expr:
        """Whether rows may be in a list: those of the best scores, or of the best fresh ones.

        A user with few candidates has all, as those in `whole`. Rows that are dropped are among
        them, by their score, to tell what dropping them changes.
        """
        top, rule = self.project.scoring.top_k, self.project.scoring.rules.fresh
        count = lists.POOL * top
        kept, fresh, score = pl.col(KEPT), pl.col(FRESH), pl.col("score")

        def best(which: pl.Expr, count: int) -> pl.Expr:
            least = pl.when(which).then(score).top_k(count).min().over("user_id")
            return (score >= least).fill_null(False)

        near = best(kept, count) | (kept.sum().over("user_id") <= count)
        if rule is not None:
            needed = lists.POOL * rows_needed(rule.count, rule.within, top)
            near |= fresh & best(kept & fresh, needed)
        return near | pl.col("user_id").is_in(whole.implode())

    def _is_fresh(self, rows: pl.DataFrame) -> pl.Series:
        """Whether rows count for the quota of fresh items."""
        rule = self.project.scoring.rules.fresh
        if rule is None:
            return pl.repeat(False, rows.height, eager=True)
        today = (self.day - date(1970, 1, 1)).days
        return rows[PUBLISHED].is_between(today - rule.days, today).fill_null(False)

    def _with_columns(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows with the columns that the rules read."""
        for key, frame in self.columns:
            new = new_columns(frame.lazy(), key, rows.schema).collect()
            rows = rows.join(new, on=key, how="left", maintain_order="left")
        return rows

    def _masks(self, rows: pl.DataFrame) -> list[np.ndarray]:
        """Which rows [N] are left after each step that drops some."""
        masks: list[np.ndarray] = []
        for step, frame in self.drops.items():
            matches = _matches(rows, _as_ids(step, frame, rows.schema))
            left = matches if step.startswith("allow") else ~matches
            masks.append(left & masks[-1] if masks else left)
        return masks

    def _dropped(
        self, block: _Block, rows: pl.DataFrame, masks: Sequence[np.ndarray]
    ) -> Iterator[Effect]:
        """The effect of each step that drops some rows."""
        top, users = self.project.scoring.top_k, rows["user_id"].n_unique()
        left = rows.height
        before = block.best(np.ones(rows.height, bool), top) if masks else ListScore()
        for step, mask in zip(self.drops, masks, strict=True):
            after, count = block.best(mask, top), int(mask.sum())
            yield Effect(step, left - count, users, before, after)
            before, left = after, count

    def _list_rules(self, block: _Block) -> Iterator[tuple[str, ListRules]]:
        """The rules on the whole list, each step with those before it."""
        rows, candidates = block.rows, block.candidates
        settings, rules = self.project.scoring.rules, ListRules()
        for n, limit in enumerate(settings.at_most):
            code = _value_codes(rows, limit.column, candidates)
            limits = [*rules.limits, Limit(code, limit.count, limit.within)]
            rules = replace(rules, limits=limits)
            yield f"at_most[{n}]", rules
        if settings.fresh is not None:
            flag = rows[FRESH].to_numpy()
            quota = Quota(flag, settings.fresh.count, settings.fresh.within)
            rules = replace(rules, quota=quota)
            yield "fresh", rules
        if settings.mmr is not None:
            column, weight = settings.mmr.column, settings.mmr.weight
            diversity: Repetition | Closeness
            if self.vectors is None:
                diversity = Repetition(_value_codes(rows, column, candidates), weight)
            else:
                row = rows[column].fill_null(NO_VALUE).to_numpy()
                diversity = Closeness(row, self.vectors, weight)
            yield "mmr", replace(rules, diversity=diversity)

    def _chosen(
        self, block: _Block, steps: Sequence[tuple[str, ListRules]]
    ) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, list[Effect]]:
        """Rows and ranks of the lists without exploration, and each rule's effect.

        Between them, which users' lists [U] are certain, of each step.
        """
        candidates, top, score = (
            block.candidates,
            self.project.scoring.top_k,
            block.candidates.score,
        )
        place = np.arange(len(score)) - candidates.starts[candidates.user]
        chosen = np.flatnonzero(place < top), place[place < top] + 1
        certain = np.ones(len(candidates.spread), bool)
        effects, before = [], _score(score[chosen[0]], chosen[1])
        for step, rules in steps:
            row, rank, own = choose(candidates, score, rules, top)
            chosen = row, rank
            certain &= own
            after = _score(score[row], rank)
            effects.append(Effect(step, 0, len(certain), before, after))
            before = after
        return chosen, certain, effects

    def _finished(self, rows: pl.DataFrame, rank: np.ndarray) -> pl.DataFrame:
        return rows.with_columns(pl.Series("rank", rank.astype(np.int32)))


@dataclass(frozen=True)
class _Block:
    """Rows that may be in lists, sorted by user, each one's best first.

    Attributes:
        every: N rows, those that are dropped included.
        rows, candidates: those that are not dropped.
        users: [U], of the candidates.
    """

    every: pl.DataFrame
    rows: pl.DataFrame
    candidates: Candidates
    users: pl.Series

    @classmethod
    def of(cls, rows: pl.DataFrame, masks: Sequence[np.ndarray]) -> _Block:
        """Of all rows of some users, with KEPT, FRESH and NEAR.

        Args:
            masks: whether some rows may not be kept, if not empty.
        """
        near, score = pl.col(NEAR), pl.col("score")
        every = rows.filter(near).sort(ORDER, descending=DESCENDING)
        kept = every.filter(KEPT) if masks else every
        facts = (
            rows.lazy()
            .filter(KEPT)
            .group_by("user_id")
            .agg(
                score.cast(pl.Float64).std(ddof=0).alias("spread"),
                score.cast(pl.Float64).mean().alias("mean"),
                score.filter(~near).max().cast(pl.Float64).fill_null(-np.inf).alias("outside"),
                score.filter(~near & pl.col(FRESH))
                .max()
                .cast(pl.Float64)
                .fill_null(-np.inf)
                .alias("flagged"),
            )
            .sort("user_id")
            .collect()
        )
        spread, mean = facts["spread"].to_numpy(), facts["mean"].to_numpy()
        # Scores that are equal up to rounding have no spread.
        spread = np.where(spread > 1e-12 * np.maximum(np.abs(mean), 1e-300), spread, 1.0)
        candidates = Candidates(
            _codes_of(kept["user_id"]),
            kept["score"].to_numpy().astype(np.float64),
            spread,
            facts["outside"].to_numpy(),
            facts["flagged"].to_numpy(),
        )
        return cls(every, kept, candidates, facts["user_id"])

    def best(self, mask: np.ndarray, top_k: int) -> ListScore:
        """The score of each user's best rows among some of all rows, given by a mask."""
        left = self.every.filter(pl.Series(mask[self.every[ROW]]))
        user = _codes_of(left["user_id"])
        starts = np.flatnonzero(np.diff(user, prepend=-1))
        place = np.arange(len(user)) - starts[user]
        best = place < top_k
        return _score(left["score"].to_numpy()[best].astype(np.float64), place[best] + 1)


def explored_users(settings: Exploration, day: date, users: pl.Series) -> np.ndarray:
    """Which users' lists [U] are randomised on a day."""
    keys = exploration.with_ids(exploration.day_key(settings.seed, day), users)
    return exploration.uniform(keys, exploration.EXPLORED) < settings.share


class _Explorer:
    """Draws the lists of the users that explore on a day."""

    def __init__(
        self, scoring: Scoring, day: date, candidates: Candidates, rows: pl.DataFrame
    ) -> None:
        assert scoring.exploration is not None
        self.settings, self.top_k, self.candidates = scoring.exploration, scoring.top_k, candidates
        users = rows["user_id"].gather(candidates.starts)
        keys = exploration.with_ids(exploration.day_key(self.settings.seed, day), users)
        self.explores = explored_users(self.settings, day, users)  # [U]
        self.rows = np.flatnonzero(self.explores[candidates.user])  # of users that explore
        items = rows["item_id"].gather(self.rows)
        self.keys = exploration.with_ids(keys[candidates.user[self.rows]], items)

    @cached_property
    def scale(self) -> np.ndarray:
        """Temperature in the unit of the scores, of each explored row."""
        return self.settings.temperature * self.candidates.spread[self.candidates.user[self.rows]]

    def explored(
        self, chosen: tuple[np.ndarray, np.ndarray], rules: ListRules
    ) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, Effect]:
        """Rows, ranks and propensities of all lists, where some users explore; and its cost.

        Args:
            chosen: rows and ranks of the lists without exploration.
            rules: on the whole list.
        """
        score = self.candidates.score
        row, rank = chosen
        explores = self.explores[self.candidates.user[row]]
        before = _score(score[row[explores]], rank[explores])
        _, own = self.candidates.of_users(self.explores)
        user = own.user
        noisy = own.score + self.scale * exploration.gumbel(self.keys, exploration.ITEMS)
        drawn, place, _ = choose(own, noisy, rules.of_rows(self.rows), self.top_k)
        noise = exploration.gumbel(self.keys[drawn], exploration.ORDER)
        logit = own.score[drawn] / self.scale[drawn]
        order = np.lexsort((-(logit + noise), user[drawn]))
        drawn, logit = drawn[order], logit[order]  # `place` is 1, 2, … within each list already
        propensity = self._propensity(user[drawn], place, logit)
        after = _score(own.score[drawn], place)
        every_row = np.r_[row[~explores], self.rows[drawn]]
        every_rank = np.r_[rank[~explores], place]
        every = np.r_[np.ones(int((~explores).sum())), propensity]
        sorting = np.lexsort((every_rank, self.candidates.user[every_row]))
        effect = Effect("exploration", 0, int(self.explores.sum()), before, after)
        return (every_row[sorting], every_rank[sorting]), every[sorting], effect

    @staticmethod
    def _propensity(user: np.ndarray, rank: np.ndarray, logit: np.ndarray) -> np.ndarray:
        """P(item at its rank | items of the list) of rows of lists, sorted by user and rank."""
        if not len(user):
            return np.zeros(0)
        _, number = np.unique(user, return_inverse=True)
        table = np.full((number.max() + 1, rank.max()), -np.inf)
        table[number, rank - 1] = logit
        return exploration.item_at_position(table)[number, rank - 1]


def _wanted(
    project: Project, drops: Mapping[str, pl.DataFrame], given: Collection[str]
) -> set[str]:
    """The columns that rules read and scored rows lack."""
    rules = project.scoring.rules
    wanted = set(rules.columns.values()) | {
        key for frame in drops.values() for key in frame.columns
    }
    wanted |= {PUBLISHED} if rules.fresh is not None else set()
    return wanted - {*PAIR, *given}


def _columns_of_tables(
    context: Context, day: date, wanted: set[str]
) -> Iterator[tuple[list[str], pl.DataFrame]]:
    """Frames with the wanted columns of users and items, each with its key."""
    for key, table in tables_as_of(context.source, day).items() if wanted else ():
        columns = [c for c in table.collect_schema() if c in wanted]
        if columns:
            yield [key], table.select(key, *columns).collect()


def _check_types(project: Project, table: pl.LazyFrame) -> None:
    """Raise ProjectError for a column of a table that its rule cannot compare."""
    schema = table.collect_schema()
    for setting, column in project.scoring.rules.columns.items():
        if not schema.get(column, pl.Null()).is_nested():
            continue
        inner = getattr(schema[column], "inner", None)
        if not setting.startswith("mmr") or inner is None or not inner.is_numeric():
            raise ProjectError(
                f"scoring.rules.{setting}: {column!r} is {schema[column]}; allowed: single values"
                + (", or lists of numbers" if setting.startswith("mmr") else "")
            )
        lengths = table.select(pl.col(column).cast(pl.List(inner)).list.len()).drop_nulls()
        found = lengths.unique().sort(column).collect()[column].to_list()
        if len(found) > 1 or 0 in found:
            raise ProjectError(
                f"scoring.rules.{setting}: vectors in {column!r} have "
                f"{', '.join(map(str, found[:5]))} numbers; allowed: one length of at least 1"
            )


def _vectors(
    project: Project, columns: list[tuple[list[str], pl.DataFrame]]
) -> tuple[list[tuple[list[str], pl.DataFrame]], np.ndarray | None]:
    """The frames with row numbers in place of the vectors of MMR, and the vectors.

    Raises ProjectError for vectors as `check_rules` does, and for a number that is not finite.
    """
    mmr = project.scoring.rules.mmr
    frames, vectors = [], None
    for key, frame in columns:
        _check_types(project, frame.lazy())
        if mmr is not None and mmr.column in frame and frame[mmr.column].dtype.is_nested():
            given = frame[mmr.column].cast(pl.List(pl.Float32))
            known = given.is_not_null()
            numbers = given.filter(known).explode(empty_as_null=False).to_numpy()
            if not np.isfinite(numbers).all():
                raise ProjectError(
                    f"scoring.rules.mmr.column: vectors in {mmr.column!r} hold "
                    f"{numbers[~np.isfinite(numbers)][0]}; allowed: finite numbers"
                )
            vectors = unit_vectors(numbers.reshape(int(known.sum()), -1))
            row = pl.when(known).then(known.cum_sum().cast(pl.Int64) - 1)
            frame = frame.with_columns(row.alias(mmr.column))
        frames.append((key, frame))
    return frames, vectors


def _as_ids(step: str, frame: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    """The rows of a block or allow list in the types of the candidates' columns."""
    for column, given in frame.schema.items():
        dtype = schema[column]
        if given == dtype:
            continue
        lost = frame.filter(~survives(column, given, dtype))
        if lost.height and not (given.is_integer() and dtype.is_integer()):
            raise ProjectError(
                f"scoring.rules.{step}: column {column!r} is {given} and holds "
                f"{lost[column].head(3).to_list()}, but it is {dtype} of the candidates"
            )
        frame = frame.with_columns(read_as(column, given, dtype)).drop_nulls()
    return frame


def _matches(rows: pl.DataFrame, frame: pl.DataFrame) -> np.ndarray:
    """Which rows [N] match a row of a frame, in all of the frame's columns."""
    key = frame.columns
    if len(key) == 1:
        found = rows[key[0]].is_in(frame[key[0]].implode())
    else:
        if "user_id" in key:  # of the other users' rows nothing is needed
            user = rows["user_id"]
            frame = frame.filter(users_between(user.min(), user.max()))
        frame = frame.with_columns(pl.lit(True).alias("matches"))
        found = rows.select(key).join(frame, on=key, how="left", maintain_order="left")["matches"]
    return found.fill_null(False).to_numpy()


def _codes_of(user: pl.Series) -> np.ndarray:
    """Numbers [N] from 0 of users in whole groups."""
    return user.rle_id().to_numpy().astype(np.int64)


def _value_codes(rows: pl.DataFrame, column: str, candidates: Candidates) -> np.ndarray:
    """Codes [N] of each user's values of a column; NO_VALUE where it is missing."""
    coded = CODE + column in rows
    code = rows[CODE + column] if coded else _dense(rows, column)
    number = code.fill_null(NO_VALUE).to_numpy()
    own = candidates.user * (number.max(initial=0) + 1) + number
    return np.where(number == NO_VALUE, NO_VALUE, own)


def _dense(frame: pl.DataFrame, column: str) -> pl.Series:
    """The values of a column as numbers from 0; null where they are missing."""
    return frame[column].rank("dense").cast(pl.Int64) - 1


def _score(score: np.ndarray, rank: np.ndarray) -> ListScore:
    discount = 1.0 / np.log2(1.0 + rank)
    return ListScore(float((discount * score).sum()), float(discount.sum()), len(rank))
