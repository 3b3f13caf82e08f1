"""Columns of every type as features, from Parquet to the prediction."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import polars as pl
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.encoders import fit_encoder
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.models.presets import make
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import cast_keys
from mtl_ranker.ranking.explain import Pair, explain
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.training.network import build_ranker, tasks_of
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import write_project

LAST = FIRST + timedelta(days=5)
ITEMS = range(13)
NUMERICS = ["price", "fresh", "made", "updated", "since", "fare"]
CATEGORICALS = ["shelf", "size", "sealed", "tab"]
LISTS = ["tags", "shops", "words"]


def write_items(folder) -> None:
    shelves = ["low", "high", None]
    table = pl.DataFrame(
        {
            "i": ITEMS,
            "price": [Decimal(n) / 4 for n in ITEMS],
            "fresh": [None if n == 5 else n % 2 == 0 for n in ITEMS],
            "sealed": [n % 3 == 0 for n in ITEMS],
            "made": [None if n == 4 else FIRST - timedelta(days=n) for n in ITEMS],
            # At 23:00 UTC it is the next day in Berlin.
            "updated": [datetime(2026, 2, 1 + n, 23, tzinfo=UTC) for n in ITEMS],
            "shelf": [shelves[n % 3] for n in ITEMS],
            "size": ["S" if n < 7 else "M" for n in ITEMS],
            "tags": [None if n == 3 else ["a", "b"][: n % 3] for n in ITEMS],
            "shops": [[n % 4, 9] for n in ITEMS],
            "words": [None if n == 2 else "x,y" if n % 2 else "y" for n in ITEMS],
        },
        schema_overrides={
            "price": pl.Decimal(8, 2),
            "shelf": pl.Categorical(),
            "size": pl.Enum(["S", "M", "L"]),
            "tags": pl.List(pl.String),
            "shops": pl.Array(pl.Int16, 2),
        },
    )
    table.write_parquet(folder / "items.parquet")


@pytest.fixture
def typed(tmp_path):
    """A project with features of every type, of the item and of the impression."""
    write_items(tmp_path)
    columns = [*NUMERICS[:4], *CATEGORICALS[:3], *LISTS[:2]]
    table = {"path": "items.parquet", "key": "i", "columns": columns, "lists": {"words": ","}}
    write_project(
        tmp_path,
        log={
            "context": ["tab", "since", "fare"],
            "timezone": "Europe/Berlin",
            "items": table,
        },
        features={
            "numerics": NUMERICS,
            "categoricals": [{"column": c} for c in CATEGORICALS],
            "lists": [{"column": c, "max_length": 2} for c in LISTS],
        },
    )
    for n in range(6):
        day = FIRST + timedelta(days=n)
        rows = tiny_events(day, shift=n).with_columns(
            (pl.lit(day) - pl.duration(days="u")).alias("since"),
            (pl.col("i") / 2).cast(pl.Decimal(6, 2)).alias("fare"),
            pl.col("tab").cast(pl.Categorical),
        )
        write_day(tmp_path, day, rows)
    return tmp_path


def test_values_of_every_type_reach_encoder_and_prediction(typed):
    context = open_context(str(typed / "project.toml"), typed, typed / "ws")
    for day in context.source.days():
        ingest_day(context, day)
        aggregate_day(context, day)
    build_examples(context, LAST)
    rows = context.workspace.scan("examples", [LAST]).collect()
    for row in rows.to_dicts():
        n = row["item_id"]
        assert row["price"] == n / 4
        assert row["fresh"] == (None if n == 5 else float(n % 2 == 0))
        assert row["made"] == (None if n == 4 else 5 + n)
        assert row["updated"] == (LAST - date(2026, 2, 2 + n)).days
        assert (row["since"], row["fare"]) == (row["user_id"], n / 2)
        assert row["shelf"] == ["low", "high", None][n % 3]
        assert row["size"] == ("S" if n < 7 else "M")
        assert row["tags"] == (None if n == 3 else ["a", "b"][: n % 3])
        assert row["shops"] == [n % 4, 9]
        assert row["words"] == (None if n == 2 else ["x", "y"] if n % 2 else ["y"])
    encoder = fit_encoder(context.project, rows)
    assert {v.column: v.values for v in (*encoder.categoricals, *encoder.lists)} == {
        "shelf": ["high", "low"],
        "size": ["M", "S"],
        "sealed": [False, True],
        "tab": ["home", "search"],
        "tags": ["a", "b"],
        "shops": [0, 1, 2, 3, 9],
        "words": ["x", "y"],
    }
    tasks = tasks_of(context.project)
    model = build_ranker(make("m", {"preset": "shared_bottom"}, len(tasks)), encoder, tasks).eval()
    ranker = RankerArtifact(context.project, encoder, tasks, model)
    predicted = ranker.predict(rows)["click"]
    for column in [*NUMERICS, *CATEGORICALS, *LISTS]:
        without = rows.with_columns(pl.lit(None, rows.schema[column]).alias(column))
        assert (ranker.predict(without)["click"] - predicted).abs().max() > 0, column
    registered = RegisteredRanker(ranker, "1")
    ranked = pl.read_parquet(score_day(context, registered, LAST).path)
    assert ranked["score"].is_finite().all()
    assert ranked.schema["since"] == pl.Date  # the candidate's own value
    explained = explain(context, registered, Pair("3", "4", {"since": "2026-03-01"}), LAST)
    assert explained.features["since"] == 6.0
    with pytest.raises(ProjectError, match=r"since 'March': is no Date, the log's own type"):
        explain(context, registered, Pair("3", "4", {"since": "March"}), LAST)


@pytest.mark.parametrize("dates", [["2026-03-01", None], [date(2026, 3, 1), None]])
def test_candidates_may_have_dates_as_text(typed, dates):
    context = open_context(str(typed / "project.toml"), typed, typed / "ws")
    ingest_day(context, FIRST)
    types = context.workspace.scan("events", [FIRST]).collect_schema()
    given = pl.LazyFrame({"user_id": [1, 2], "item_id": [1, 2], "since": dates})
    cast = cast_keys(given, types, LAST, ["since"]).collect()
    assert cast["since"].to_list() == [date(2026, 3, 1), None]
    wrong = given.with_columns(pl.lit("March").alias("since"))
    with pytest.raises(ProjectError, match=r"'since' is String and holds \['March', 'March'\]"):
        cast_keys(wrong, types, LAST, ["since"])


def test_check_stores_and_ranks_with_every_type(typed):
    said = list(check_project(str(typed / "project.toml"), typed))
    assert any(line.startswith("ok  encoder, 1 model,") for line in said)
    assert any("candidates of 10 users ranked" in line for line in said)
