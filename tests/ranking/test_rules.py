"""Lists under rules against a loop over each user's candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.config import Project, parse_project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking import scoring
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.rules import PUBLISHED, DayLists, check_rules, rules_provenance
from mtl_ranker.ranking.scoring import score_day
from tests.conftest import FIRST, tiny_events, write_day, write_log
from tests.projects import TINY, edit_project, merged, project, project_text, write_project
from tests.ranking.test_scoring import PAIRED, random_ranker, write_candidates
from tests.stores import proxy, s3_server, upload

DAY = date(2026, 3, 9)
ITEMS = {
    "path": "items.parquet",
    "key": "i",
    "columns": ["creator", "topic", "content"],
    "published": "published",
}
WITH_ITEMS = merged(TINY, log={"items": ITEMS})


def items(rng: np.random.Generator, count: int) -> pl.DataFrame:
    """Items with few creators and topics, some missing, published on and around the day."""
    today = (DAY - date(1970, 1, 1)).days
    creator = pl.Series(rng.integers(0, 5, count)).cast(pl.String)
    vectors = rng.normal(size=(count, 3)) + 0.5
    vectors[::7] = 0
    content = pl.Series([None if k % 9 == 4 else list(v) for k, v in enumerate(vectors)])
    return pl.DataFrame(
        {
            "item_id": np.arange(count),
            "content": content,
            "creator": creator.set(pl.Series(rng.random(count) < 0.1), None),
            "topic": rng.integers(0, 3, count),
            PUBLISHED: today - rng.integers(-1, 12, count),
        }
    )


def scored(rng: np.random.Generator, users: int, count: int) -> pl.DataFrame:
    """Candidates of users with sets of all sizes; scores with many ties."""
    pairs = pl.DataFrame({"user_id": np.arange(users)}).join(
        pl.DataFrame({"item_id": np.arange(count)}), how="cross"
    )
    pairs = pairs.with_columns(score=pl.Series(rng.integers(0, 30, pairs.height) / 7.0))
    kept = rng.random(pairs.height) < rng.random(users).repeat(count)
    return pairs.filter(pl.Series(kept)).sample(fraction=1.0, shuffle=True, seed=1)


def list_by_hand(rows: list[dict[str, Any]], settings: Project, top_k: int) -> list[int]:
    """One user's list, rank by rank, as docs/lists.md says. Rows have every column."""
    rules = settings.scoring.rules
    rows = sorted(rows, key=lambda row: (-row["score"], row["item_id"]))
    spread = float(np.std([row["score"] for row in rows])) or 1.0
    today = (DAY - date(1970, 1, 1)).days
    chosen: list[dict[str, Any]] = []

    def is_fresh(row: dict[str, Any]) -> bool:
        assert rules.fresh is not None
        return 0 <= today - row[PUBLISHED] <= rules.fresh.days

    while len(chosen) < top_k:
        allowed = [row for row in rows if row not in chosen]
        for limit in rules.at_most:
            last = chosen[max(0, len(chosen) - limit.within + 1) :]
            shown = Counter(row[limit.column] for row in last)
            allowed = [
                row
                for row in allowed
                if row[limit.column] is None or shown[row[limit.column]] < limit.count
            ]
        if rules.fresh is not None:
            first = len(chosen) // rules.fresh.within * rules.fresh.within
            end = min(top_k, first + rules.fresh.within)
            missing = min(rules.fresh.count, end - first) - sum(map(is_fresh, chosen[first:]))
            fresh = [row for row in allowed if is_fresh(row)]
            if missing >= end - len(chosen) and missing > 0 and fresh:
                allowed = fresh
        if not allowed:
            break
        if rules.mmr is None:
            chosen.append(allowed[0])
            continue
        column, weight = rules.mmr.column, rules.mmr.weight
        worth = [
            (1 - weight) * row["score"] / spread
            - weight * max((alike(row[column], other[column]) for other in chosen), default=0.0)
            for row in allowed
        ]
        chosen.append(allowed[int(np.argmax(worth))])
    return [row["item_id"] for row in chosen]


def alike(one: Any, other: Any) -> float:
    """Similarity of two values: equality, or the cosine of two vectors where it is positive."""
    if one is None or other is None:
        return 0.0
    if not isinstance(one, list):
        return float(one == other)
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return max(0.0, float(np.dot(one, other) / lengths)) if lengths else 0.0


CREATOR = {"column": "creator", "count": 1, "within": 3}
TOPIC = {"column": "topic", "count": 2, "within": 8}
FRESH = {"count": 2, "within": 4, "days": 3}


@pytest.mark.parametrize(
    "rules",
    [
        {"at_most": [CREATOR]},
        {"at_most": [TOPIC]},
        {"at_most": [CREATOR, TOPIC], "fresh": FRESH},
        {"fresh": FRESH},
        {"fresh": {"count": 3, "within": 20, "days": 0}},
        {"mmr": {"column": "creator", "weight": 0.4}},
        {"mmr": {"column": "topic", "weight": 0.9}, "at_most": [CREATOR], "fresh": FRESH},
        {"mmr": {"column": "content", "weight": 0.3}},
        {"mmr": {"column": "content", "weight": 0.8}, "at_most": [CREATOR], "fresh": FRESH},
    ],
    ids=lambda rules: "+".join(rules),
)
@pytest.mark.parametrize("pool", [1, 4])
def test_lists_are_those_of_a_loop_over_users(rules, pool, monkeypatch):
    """Also where lists are first filled from as few rows as they have ranks.

    The cosines of all pairs of a user's rows are in memory, or those with the last row only.
    """
    monkeypatch.setattr("mtl_ranker.ranking.lists.POOL", pool)
    monkeypatch.setattr("mtl_ranker.ranking.lists.PAIRS", 0 if pool == 1 else 1 << 25)
    rng = np.random.default_rng(0)
    settings = project(WITH_ITEMS, scoring={"top_k": 7, "rules": rules})
    table, rows = items(rng, 30), scored(rng, 40, 30)
    lists = DayLists.of(settings, DAY, {}, [(["item_id"], table)])
    ranking, effects = lists.ranked(rows)
    full = rows.join(table, on="item_id").to_dicts()
    plain_differs = False
    for user, own in ranking.group_by("user_id"):
        given = [row for row in full if row["user_id"] == user[0]]
        own = own.sort("rank")
        assert own["item_id"].to_list() == list_by_hand(given, settings, 7), user
        assert own["rank"].to_list() == list(range(1, own.height + 1))
        best = sorted(given, key=lambda row: (-row["score"], row["item_id"]))[:7]
        plain_differs |= own["item_id"].to_list() != [row["item_id"] for row in best]
    assert plain_differs
    assert ranking["user_id"].n_unique() == rows["user_id"].n_unique()
    assert ranking.columns == [*rows.columns, "rank"]
    steps = [f"at_most[{n}]" for n in range(len(rules.get("at_most", [])))]
    steps += [step for step in ("fresh", "mmr") if step in rules]
    assert [effect.step for effect in effects] == steps
    assert effects[-1].after.rows == ranking.height
    discount = 1 / np.log2(1 + ranking["rank"].to_numpy())
    mean = (discount * ranking["score"].to_numpy()).sum() / discount.sum()
    assert effects[-1].after.mean == pytest.approx(mean)


def test_diversity_of_vectors_by_hand():
    """Scores 3, 2, 1 have s = √(2/3); to the first item the others have cosines 1 and 0.

    At rank 2 they are worth (1 - w) 2 / s - w and (1 - w) 1 / s: 0.72 and 0.61 with w = 0.5, but
    0.38 and 0.49 with w = 0.6.
    """
    table = pl.DataFrame({"item_id": [1, 2, 3], "content": [[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]]})
    rows = pl.DataFrame({"user_id": [5, 5, 5], "item_id": [1, 2, 3], "score": [3.0, 2.0, 1.0]})
    orders = {}
    for weight in (0.5, 0.6):
        rules = {"mmr": {"column": "content", "weight": weight}}
        settings = project(WITH_ITEMS, scoring={"top_k": 3, "rules": rules})
        ranking, _ = DayLists.of(settings, DAY, {}, [(["item_id"], table)]).ranked(rows)
        assert ranking.columns == [*rows.columns, "rank"]
        orders[weight] = ranking["item_id"].to_list()
    assert orders == {0.5: [1, 2, 3], 0.6: [1, 3, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[1.0, 2.0], [1.0]], "vectors in 'content' have 1, 2 numbers; allowed: one length"),
        (pl.Series([[], []], dtype=pl.List(pl.Float32)), "vectors in 'content' have 0 numbers"),
        ([["a"], ["b"]], "'content' is List.String.; allowed: single values, or lists of numbers"),
        ([[1.0, float("nan")], [1.0, 2.0]], "vectors in 'content' hold nan; allowed: finite"),
    ],
)
def test_columns_that_are_no_vectors_are_refused(content, message):
    rules = {"mmr": {"column": "content", "weight": 0.5}}
    settings = project(WITH_ITEMS, scoring={"rules": rules})
    table = pl.DataFrame({"item_id": [1, 2], "content": content})
    with pytest.raises(ProjectError, match=message):
        DayLists.of(settings, DAY, {}, [(["item_id"], table)])
    limited = project(WITH_ITEMS, scoring={"rules": {"at_most": [CREATOR | {"column": "content"}]}})
    with pytest.raises(ProjectError, match=r"at_most.0..column: 'content' is .*; allowed: single"):
        DayLists.of(limited, DAY, {}, [(["item_id"], table)])


def test_vectors_are_read_from_the_item_table(tmp_path):
    """Of the night's files: checked before the night, and lists are those of a loop over users."""
    _, artifact, day = prepared(tmp_path)
    ranker = RegisteredRanker(artifact, "1")
    ruled = with_rules(tmp_path, mmr={"column": "content", "weight": 0.6})
    check_rules(ruled)
    ranking = pl.read_parquet(score_day(ruled, ranker, day).path)
    assert "content" not in ranking.columns
    scoring = ruled.project.scoring
    every = scoring.model_copy(update={"rules": type(scoring.rules)(), "top_k": 99})
    whole = Context(
        ruled.project.model_copy(update={"scoring": every}), ruled.source, ruled.workspace
    )
    full = pl.read_parquet(score_day(whole, ranker, day).path)
    table = pl.read_parquet(tmp_path / "items.parquet").rename({"i": "item_id"})
    rows = full.join(table.select("item_id", "content"), on="item_id").to_dicts()
    for user in range(11):
        own = ranking.filter(pl.col("user_id") == user)["item_id"].to_list()
        given = [row for row in rows if row["user_id"] == user]
        assert own == list_by_hand(given, ruled.project, 4), user


def test_the_effect_of_a_rule_by_hand():
    """Two items of one creator, scores 4, 3 and 1: the third moves to rank 2, the list ends."""
    settings = project(
        WITH_ITEMS,
        scoring={"top_k": 3, "rules": {"at_most": [CREATOR | {"count": 1}]}},
    )
    table = pl.DataFrame({"item_id": [1, 2, 3], "creator": ["a", "a", "b"]})
    rows = pl.DataFrame({"user_id": [5, 5, 5], "item_id": [1, 2, 3], "score": [4.0, 3.0, 1.0]})
    ranking, (effect,) = DayLists(settings, DAY, {}, [(["item_id"], table)]).ranked(rows)
    assert ranking["item_id"].to_list() == [1, 3]
    second = 1 / np.log2(3)
    assert effect.before.mean == pytest.approx((4 + 3 * second + 0.5) / (1.5 + second))
    assert effect.after.mean == pytest.approx((4 + second) / (1 + second))
    assert (effect.before.rows, effect.after.rows, effect.dropped, effect.lists) == (3, 2, 0, 1)


def prepared(folder: Path) -> tuple[Context, RankerArtifact, date]:
    """A ranker of random weights, and every pair as a candidate of the day."""
    rng = np.random.default_rng(3)
    table = items(rng, 13).rename({"item_id": "i"})
    published = FIRST + timedelta(days=7) - pl.duration(days=pl.col("i") % 5)
    table.with_columns(published=published).drop(PUBLISHED).write_parquet(folder / "items.parquet")
    context, artifact = random_ranker(
        folder,
        log={"items": ITEMS},
        scoring={"candidates": "candidates", "top_k": 4},
    )
    day = FIRST + timedelta(days=6)
    pairs = pl.DataFrame({"u": range(11)}).join(pl.DataFrame({"i": range(13)}), how="cross")
    write_candidates(context, day, pairs.with_columns(tab=pl.lit("home")))
    return context, artifact, day


def with_rules(folder: Path, context: Sequence[str] = ("tab",), **rules: Any) -> Context:
    settings = {"candidates": "candidates", "top_k": 4, "rules": rules}
    log = {"items": ITEMS, "context": list(context)}
    write_project(folder, PAIRED, log=log, scoring=settings)
    return open_context(str(folder / "project.toml"), folder, folder / "ws")


def test_seen_blocked_and_not_allowed_candidates_are_dropped(tmp_path, monkeypatch):
    """The rules are the project file's, not those that the model was trained with."""
    context, artifact, day = prepared(tmp_path)
    monkeypatch.setattr(scoring, "BLOCKS_PER_CORE", 1)
    ranker = RegisteredRanker(artifact, "1")
    plain = pl.read_parquet(score_day(context, ranker, day).path)
    assert plain.columns[-2:] == ["rank", "model_version"]
    pl.DataFrame({"item": [3, 99], "why": ["spam", "gone"]}).write_parquet(tmp_path / "b.parquet")
    pl.DataFrame({"u": ["2", "2"], "item_id": [0, 1]}).write_parquet(tmp_path / "pairs.parquet")
    pl.DataFrame({"topic": [0, 2]}).write_parquet(tmp_path / "topics.parquet")
    with pytest.raises(ProjectError, match=r"b.parquet: column 'item_id' \(scoring.rules.block"):
        check_rules(with_rules(tmp_path, block=[{"path": "b.parquet", "key": ["item_id"]}]))
    pl.DataFrame({"i": [3, 99]}).write_parquet(tmp_path / "b.parquet")
    ruled = with_rules(
        tmp_path,
        seen_days=2,
        block=[
            {"path": "b.parquet", "key": ["item_id"]},
            {"path": "pairs.parquet", "key": ["u", "i"]},
        ],
        allow=[{"path": "topics.parquet", "key": ["topic"]}],
    )
    check_rules(ruled)
    ranked = score_day(ruled, ranker, day)
    ranking = pl.read_parquet(ranked.path)
    seen = ruled.workspace.scan("events", [day - timedelta(days=n) for n in (1, 2)])
    pairs = set(seen.select("user_id", "item_id").collect().rows())
    topic = dict(pl.read_parquet(tmp_path / "items.parquet").select("i", "topic").rows())
    every = [(u, i) for u in range(11) for i in range(13)]
    kept = [
        (u, i)
        for u, i in every
        if (u, i) not in pairs and i != 3 and topic[i] in (0, 2) and (u, i) not in ((2, 0), (2, 1))
    ]
    assert 0 < len(kept) < len(every)
    expected = [min(4, sum(u == user for u, _ in kept)) for user in range(11)]
    counts = [ranking.filter(pl.col("user_id") == user).height for user in range(11)]
    assert counts == expected
    assert set(ranking.select("user_id", "item_id").rows()) <= set(kept)
    steps = {effect.step: effect for effect in ranked.effects}
    assert list(steps) == ["seen_days", "block[0]", "block[1]", "allow[0]"]
    assert sum(effect.dropped for effect in ranked.effects) == len(every) - len(kept)
    assert steps["seen_days"].dropped == sum(pair in pairs for pair in every)
    assert steps["seen_days"].before.rows == plain.height

    # The same rules in other blocks; a changed block list changes the provenance.
    small = ruled.project.scoring.model_copy(update={"block_rows": 20})
    blocks = Context(
        ruled.project.model_copy(update={"scoring": small}), ruled.source, ruled.workspace
    )
    again = score_day(blocks, ranker, day)
    assert (
        pl.read_parquet(again.path)
        .select("user_id", "item_id", "rank")
        .equals(ranking.select("user_id", "item_id", "rank"))
    )
    made = scoring.rankings_provenance(ruled, ranker, day)
    pl.DataFrame({"i": [4]}).write_parquet(tmp_path / "b.parquet")
    changed = scoring.rankings_provenance(ruled, ranker, day)
    assert [name for name in made if made[name] != changed[name]] == [
        "table of scoring.rules.block[0]"
    ]


@pytest.mark.slow
def test_rules_on_users_and_items_with_ids_of_text(tmp_path, monkeypatch):
    """Seen and blocked pairs are dropped, with all users in one block and with some in each."""

    def as_text(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.with_columns(u=pl.format("user {}", "u"), i=pl.format("item {}", "i"))

    def write_texts(folder: Path) -> None:
        for file in (write_log(folder) / "log").glob("*/*.parquet"):
            as_text(pl.read_parquet(file)).write_parquet(file)

    monkeypatch.setattr("tests.ranking.test_scoring.write_log", write_texts)
    monkeypatch.setattr(scoring, "BLOCKS_PER_CORE", 1)
    settings = {"candidates": "candidates", "top_k": 13}
    context, artifact = random_ranker(tmp_path, scoring=settings)
    day = FIRST + timedelta(days=6)
    pairs = pl.DataFrame({"u": range(11)}).join(pl.DataFrame({"i": range(13)}), how="cross")
    write_candidates(context, day, as_text(pairs).with_columns(tab=pl.lit("home")))
    blocked = pl.DataFrame({"u": ["user 3", "user 7"], "i": ["item 1", "item 2"]})
    blocked.write_parquet(tmp_path / "b.parquet")
    rules = {"seen_days": 2, "block": [{"path": "b.parquet", "key": ["u", "i"]}]}
    seen = context.workspace.scan("events", [day - timedelta(days=n) for n in (1, 2)])
    dropped = {*seen.select("user_id", "item_id").collect().rows(), *blocked.rows()}
    expected = set(as_text(pairs).rows()) - dropped
    for block_rows in (1_000, 20):
        write_project(
            tmp_path, PAIRED, scoring={**settings, "rules": rules, "block_rows": block_rows}
        )
        ruled = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
        ranked = score_day(ruled, RegisteredRanker(artifact, str(block_rows)), day)
        ranking = pl.read_parquet(ranked.path)
        assert set(ranking.select("user_id", "item_id").rows()) == expected


def test_what_all_parts_of_a_ranking_share_is_read_once(tmp_path, monkeypatch):
    """A block list in a store: its requests do not grow with the number of parts."""
    _, artifact, day = prepared(tmp_path)
    pl.DataFrame({"i": [3, 99]}).write_parquet(tmp_path / "b.parquet")
    rules = {"seen_days": 2, "block": [{"path": "b.parquet", "key": ["i"]}]}
    ruled = with_rules(tmp_path, **rules, at_most=[{"column": "tab", "count": 3, "within": 4}])
    monkeypatch.setattr(scoring, "BLOCKS_PER_CORE", 1)
    requests, rankings = [], []
    with s3_server() as endpoint:
        data = upload(tmp_path, "shared")
        for block_rows in (1_000, 20):
            edit_project(tmp_path, scoring={"block_rows": block_rows})
            context = open_context(str(tmp_path / "project.toml"), data, ruled.workspace.root)
            with proxy(endpoint) as answers:
                ranked = score_day(context, RegisteredRanker(artifact, f"{block_rows}"), day)
            requests.append(sum(a.request.path.endswith("/b.parquet") for a in answers))
            rankings.append(pl.read_parquet(ranked.path).select("user_id", "item_id", "rank"))
    assert rankings[0].equals(rankings[1])
    assert 0 < requests[1] <= requests[0]


def test_a_table_that_only_the_rules_read_changes_the_provenance(tmp_path):
    _, _, day = prepared(tmp_path)
    edit_project(
        tmp_path,
        log={"items": {"path": "kinds.parquet", "key": "i", "columns": ["kind"]}},
        scoring={"rules": {"at_most": [{"column": "kind", "count": 1, "within": 2}]}},
    )
    kinds = pl.DataFrame({"i": range(13), "kind": "a"})
    kinds.write_parquet(tmp_path / "kinds.parquet")
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    made = rules_provenance(context, day)
    assert rules_provenance(context, day) == made
    kinds.with_columns(kind=pl.col("i")).write_parquet(tmp_path / "kinds.parquet")
    assert rules_provenance(context, day) != made


def test_other_events_on_the_seen_days_change_the_provenance(tiny):
    edit_project(tiny, scoring={"rules": {"seen_days": 2}})
    context, day = open_context(str(tiny / "project.toml"), tiny, tiny / "ws"), FIRST
    for each in context.source.days():
        ingest_day(context, each)
        day = each + timedelta(days=1)
    made = [rules_provenance(context, day)]
    for age in (3, 2):  # days before the ranked one
        changed = day - timedelta(days=age)
        write_day(tiny, changed, tiny_events(changed, shift=50))
        context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
        ingest_day(context, changed)
        made.append(rules_provenance(context, day))
    assert made[1] == made[0]
    assert made[2] != made[0]


def test_a_rule_may_read_context_that_the_model_does_not_have(tmp_path):
    _, artifact, day = prepared(tmp_path)
    place = next((tmp_path / "candidates").glob("*/*.parquet"))
    given = pl.read_parquet(place).with_columns(shelf=pl.col("i") % 2)
    given.write_parquet(place)
    rule = {"column": "shelf", "count": 1, "within": 2}
    ruled = with_rules(tmp_path, ["tab", "shelf"], at_most=[rule])
    ranked = score_day(ruled, RegisteredRanker(artifact, "1"), day)
    shelves = pl.read_parquet(ranked.path).with_columns(shelf=pl.col("item_id") % 2)
    assert "shelf" not in pl.read_parquet(ranked.path).columns
    assert shelves.select((pl.col("shelf").diff().over("user_id") != 0).all()).item()


def test_a_rule_on_a_candidates_own_column_keeps_the_vectors_of_the_item_table(tmp_path):
    """The limit on `tab` drops nothing: the list is that of diversity by `content` alone."""
    _, artifact, day = prepared(tmp_path)
    mmr = {"column": "content", "weight": 0.9}
    limit = {"column": "tab", "count": 9, "within": 9}
    found = []
    for rules in ({}, {"mmr": mmr}, {"mmr": mmr, "at_most": [limit]}):
        ranked = score_day(with_rules(tmp_path, **rules), RegisteredRanker(artifact, "1"), day)
        found.append(pl.read_parquet(ranked.path).select("user_id", "item_id", "rank"))
    plain, diverse, limited = found
    assert not plain.equals(diverse)
    assert diverse.equals(limited)


@pytest.mark.parametrize(
    ("scoring_settings", "message"),
    [
        ({"rules": {"at_most": [CREATOR | {"column": "color"}]}}, "at_most.0..column: 'color'"),
        ({"rules": {"mmr": {"column": "color", "weight": 0.5}}}, "mmr.column: 'color'"),
        ({"rules": {"block": [{"path": "b", "key": ["color"]}]}}, "block.0..key: 'color'"),
        ({"rules": {"fresh": FRESH | {"count": 9}}}, "count = 9; allowed: at most within = 4"),
        ({"rules": {"seen_day": 3}}, "unknown key .did you mean seen_days"),
        (
            {"top_k": 9, "rules": {"at_most": [CREATOR]}, "exploration": {"temperature": 1}},
            "at_most.0..within = 3 restricts the order of lists of top_k = 9",
        ),
    ],
)
def test_mistakes_name_the_setting(scoring_settings, message):
    with pytest.raises(ProjectError, match=message):
        parse_project(project_text(WITH_ITEMS, scoring=scoring_settings), "project.toml")


def test_fresh_items_need_their_days():
    with pytest.raises(ProjectError, match=r"rules.fresh: needs .* log.items.published"):
        parse_project(project_text(TINY, scoring={"rules": {"fresh": FRESH}}), "project.toml")


def test_a_missing_table_is_named_before_the_training(tiny):
    write_project(tiny, scoring={"rules": {"allow": [{"path": "no.parquet", "key": ["u"]}]}})
    context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
    message = r"no.parquet: not found \(scoring.rules.allow\[0\]"
    with pytest.raises(ProjectError, match=message):
        check_rules(context)
    with pytest.raises(ProjectError, match=message):
        list(check_project(str(tiny / "project.toml"), tiny))
    pl.DataFrame({"u": [1]}).write_parquet(tiny / "no.parquet")
    lines: list[str] = []
    for line in check_project(str(tiny / "project.toml"), tiny):
        lines.append(line)
        if line.startswith("ok  scoring.rules"):
            break
    assert lines[-1] == "ok  scoring.rules: allow"
