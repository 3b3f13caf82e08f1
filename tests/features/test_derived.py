"""Derived features: hand-worked values, the same for candidates, and errors that name the key."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.audit import audit_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import write_project

DAYS = 3
LAST = FIRST + timedelta(days=DAYS - 1)
DERIVED = {
    "discount": "1 - shown_price / price",  # impression and item
    "affordable": "case when budget >= price then 1.0 else 0.5 end",  # user and item
    "budget_left": "budget - 0.5 * shown_price",  # user and impression
    "per_stock": "price / stock",  # item; stock may be 0
    "loyal": "ln(years)",  # user; years may be 0 or missing
}


def write_world(root: Path, derived: dict[str, str] = DERIVED, **features: Any) -> None:
    write_project(
        root,
        log={
            "context": ["tab", "shown_price"],
            "users": {"path": "users.parquet", "key": "u", "columns": ["budget", "years"]},
            "items": {"path": "items.parquet", "key": "i", "columns": ["price", "stock"]},
        },
        features={"derived": derived, "numerics": ["price"], **features},
        split={"warmup_days": 0, "train_days": 1},
        scoring={"candidates": "candidates.parquet", "top_k": 100},
    )
    pl.DataFrame({"u": range(11), "budget": range(11), "years": [0, None, *range(1, 10)]}).cast(
        {"budget": pl.Decimal(8, 2)}
    ).write_parquet(root / "users.parquet")
    prices = [0.1 * n for n in range(13)]
    pl.DataFrame({"i": range(13), "price": prices, "stock": [n % 3 for n in range(13)]}).cast(
        {"price": pl.Float64}
    ).write_parquet(root / "items.parquet")
    shown = (pl.col("i") % 4).alias("shown_price")
    for n in range(DAYS):
        day = FIRST + timedelta(days=n)
        write_day(root, day, tiny_events(day, shift=n).with_columns(shown))
    last = tiny_events(LAST, shift=DAYS - 1).with_columns(shown)
    rows = last.select(user_id="u", item_id="i", tab="tab", shown_price="shown_price")
    rows.unique(["user_id", "item_id"]).write_parquet(root / "candidates.parquet")


def built(root: Path) -> Context:
    context = open_context(str(root / "project.toml"), root, root / "ws")
    for day in context.source.days():
        ingest_day(context, day)
        aggregate_day(context, day)
    build_examples(context, LAST)
    return context


def expected(user: int, item: int) -> dict[str, float | None]:
    """By hand; numbers of the project's `numerics` are Float32."""
    price, shown, stock = float(np.float32(0.1 * item)), item % 4, item % 3
    years = [0, None, *range(1, 10)][user]
    return {
        "discount": None if price == 0 else 1 - shown / price,
        "affordable": 1.0 if user >= price else 0.5,
        "budget_left": user - 0.5 * shown,
        "per_stock": None if stock == 0 else price / stock,
        "loyal": None if not years else float(np.log(years)),
    }


def test_values_are_those_worked_by_hand(tmp_path):
    write_world(tmp_path)
    context = built(tmp_path)
    rows = context.workspace.scan("examples", [LAST]).collect()
    assert rows.height == 40
    for row in rows.to_dicts():
        for name, value in expected(row["user_id"], row["item_id"]).items():
            assert row[name] == (None if value is None else float(np.float32(value)))
    assert rows.schema["discount"] == pl.Float32
    assert rows["shown_price"].dtype == pl.Int64  # as it was
    assert audit_day(context, LAST, 40).differences == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 - shown_prize / price", r"discount: 'shown_prize' is no column .*mean shown_price\?"),
        ("play / price", r"discount: 'play' is no column of log.context, log.users or log.items"),
        (
            "case when price > 100 then max(price) else 0 end",
            r"discount: .* depends on other rows; allowed",
        ),
        ("price / avg(price)", r"discount: 'price / avg\(price\)' depends on other rows; allowed"),
        ("price - tab", r"discount: .* cannot be computed with price Float64, tab String: "),
        ("tab", r"discount: 'tab' cannot be computed with tab String"),
        ("1 / 2", r"discount: '1 / 2' reads no column; allowed: tab, shown_price, budget"),
        ("1 -", r"discount: '1 -' is no SQL expression"),
    ],
)
def test_mistakes_name_the_key(tmp_path, text, message):
    write_world(tmp_path, {"discount": text})
    with pytest.raises(ProjectError, match=rf"features.derived.{message}"):
        list(check_project(str(tmp_path / "project.toml"), tmp_path))


def test_names_are_free(tmp_path):
    write_world(tmp_path, {"tab": "price"})
    with pytest.raises(ProjectError, match=r"column 'tab' of the log .* generated column"):
        list(check_project(str(tmp_path / "project.toml"), tmp_path))
    write_world(tmp_path, {"price": "price"})
    with pytest.raises(ProjectError, match=r"derived: 'price' is also in features.numerics"):
        list(check_project(str(tmp_path / "project.toml"), tmp_path))
