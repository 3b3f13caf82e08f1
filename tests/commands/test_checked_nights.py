"""Whenever `check` finds no error, a night succeeds, for generated project files and logs."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mtl_ranker.commands.check import check_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.models.presets import PRESETS
from tests.conftest import FIRST, midnight, write_day
from tests.nights import run_night
from tests.projects import TINY, merged, write_project

DAYS = 6
DTYPES: dict[str, pl.DataType] = {
    "whole": pl.Int64(),
    "small": pl.Int16(),
    "unsigned": pl.UInt32(),
    "number": pl.Float64(),
    "text": pl.String(),
    "flag": pl.Boolean(),
    "date": pl.Date(),
    "words": pl.List(pl.String()),
    "codes": pl.List(pl.Int32()),
    "vector": pl.List(pl.Float64()),
}
KINDS = st.sampled_from([*DTYPES, "whole", "text", "flag", "words"])
USES = ["categoricals", "numerics", "lists", "entity", "history"]
FITTING = {
    "number": ["categoricals", "numerics", "entity"],
    "text": ["categoricals", "entity", "history"],
    "date": ["entity"],
    "words": ["lists", "history"],
    "codes": ["lists", "history"],
    "vector": ["lists"],
}
SHARES = st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.97, 1.0])


def values(rng: np.random.Generator, kind: str, rows: int, nulls: float) -> pl.Series:
    """Random values of a kind, a share of them null."""
    codes = rng.integers(0, 4, rows).tolist()
    made: list[Any] = {
        "number": [c / 3 for c in codes],
        "text": ["abcd"[c] for c in codes],
        "flag": [c % 2 == 0 for c in codes],
        "date": [FIRST - timedelta(days=c) for c in codes],
        "words": [["a", "b", None][:c] for c in codes],
        "codes": [[c] * c for c in codes],
        "vector": [[0.5] * c for c in codes],
    }.get(kind, codes)
    missing = rng.random(rows) < nulls
    present = [None if m else v for m, v in zip(missing, made, strict=True)]
    return pl.Series(present, dtype=DTYPES[kind])


@st.composite
def columns(draw) -> dict[str, Any]:
    """An extra column: where it is, its kind on all days, its nulls, and what reads it.

    One in ten is read by something that its kind does not suit.
    """
    kind = draw(KINDS)
    fitting = FITTING.get(kind, ["categoricals", "numerics", "entity", "history"])
    uses = st.sampled_from(USES if draw(st.integers(0, 9)) == 0 else fitting)
    return {
        "in": draw(st.sampled_from(["context", "items"])),
        "kind": kind,
        "nulls": draw(SHARES),
        "untyped_days": draw(st.sets(st.integers(0, DAYS - 1), max_size=2)),
        "use": draw(st.sets(uses, max_size=2)),
        "hashed": draw(st.booleans()),
    }


@st.composite
def objectives(draw) -> list[dict[str, Any]]:
    click = {"name": "click", "group": "engagement", "label": "click"}
    more = [
        {"name": "after", "group": "satisfaction", "label": '"like"', "where": "click = 1"},
        {"name": "esmm", "group": "satisfaction", "label": "click * like",
         "conditional_on": "click"},
        {"name": "stars", "group": "satisfaction", "kind": "ordinal", "label": "stars",
         "levels": draw(st.sampled_from([4, 4, 4, 3]))},
        {"name": "play", "group": "engagement", "kind": "regression", "label": "play",
         "transform": draw(st.sampled_from(["identity", "log1p"]))},
        {"name": "watched", "group": "engagement", "kind": "watch_time", "label": "play"},
    ]  # fmt: skip
    chosen = draw(st.lists(st.sampled_from(range(len(more))), max_size=2, unique=True))
    return [click, *(more[n] for n in chosen)]


@st.composite
def nights(draw) -> dict[str, Any]:
    """A project and a log, as plain values so that a failing one can be read."""
    chance = st.sampled_from([0, 0, 0, 1])
    presets = [name for name in PRESETS if name != "single_task"]
    return {
        "seed": draw(st.integers(0, 1_000)),
        "rows": draw(st.lists(st.sampled_from([3, 20, 40]), min_size=DAYS, max_size=DAYS)),
        "users": draw(st.sampled_from([1, 7])),
        "text_ids": draw(st.booleans()),
        "missing_days": draw(st.sets(st.integers(0, DAYS - 2), max_size=1)),
        "click": [0.5, 0.4, 0.3, 0.5, draw(st.sampled_from([0.0, 0.3, 0.5, 0.5])), draw(SHARES)],
        "like": [0.5, *draw(st.lists(SHARES, min_size=5, max_size=5))],
        "two_files": draw(st.sets(st.integers(0, DAYS - 1), max_size=2)),
        "columns": draw(st.lists(columns(), max_size=3)),
        "objectives": draw(objectives()),
        "windows": draw(st.sampled_from([[1], [1, 3], [7]])),
        "rates": draw(st.sampled_from(["absolute", "relative"])),
        "encoding": draw(st.sampled_from(["piecewise_linear", "standardise"])),
        "presets": draw(st.lists(st.sampled_from(presets), min_size=1, max_size=1)),
        "alone": bool(draw(chance)),
        "refit": bool(draw(chance)),
        "trees": draw(chance) * 3,
        "balancing": draw(st.sampled_from(["fixed", "uncertainty", "dwa", "gradnorm", "pcgrad"])),
        "keep": draw(st.sampled_from([1.0, 0.5])),
        "candidates": draw(st.sampled_from([None, "plain", "with context"])),
        "position": draw(st.booleans()),
        "test_days": draw(st.sampled_from([1, 2])),
    }


def write_night(folder: Path, made: dict[str, Any]) -> None:
    """Write the project file, the log, the item table and the candidates."""
    rng = np.random.default_rng(made["seed"])
    in_log = {f"c{n}": c for n, c in enumerate(made["columns"]) if c["in"] == "context"}
    in_items = {f"c{n}": c for n, c in enumerate(made["columns"]) if c["in"] == "items"}
    ids = (lambda name, k: f"{name}{k}") if made["text_ids"] else (lambda name, k: k)
    for n in set(range(DAYS)) - made["missing_days"]:
        day, rows = FIRST + timedelta(days=n), made["rows"][n]
        frame = pl.DataFrame(
            {
                "u": [ids("u", int(k)) for k in rng.integers(0, made["users"], rows)],
                "i": [ids("i", int(k)) for k in rng.integers(0, 5, rows)],
                "ts": [midnight(day) + 1_000 * k for k in range(rows)],
                "tab": [["home", "search"][int(k)] for k in rng.integers(0, 2, rows)],
                "pos": rng.integers(0, 4, rows),
                "click": (rng.random(rows) < made["click"][n]).astype(int),
                "like": (rng.random(rows) < made["like"][n]).astype(int),
                "stars": rng.integers(0, 4, rows),
                "play": rng.exponential(9.0, rows),
            }
        )
        for name, column in in_log.items():
            series = values(rng, column["kind"], rows, column["nulls"])
            untyped = n in column["untyped_days"]
            frame = frame.with_columns((pl.lit(None) if untyped else series).alias(name))
        file = write_day(folder, day, frame)
        if n in made["two_files"]:
            half = rows // 2
            frame.head(half).write_parquet(file)
            frame.slice(half).write_parquet(file.with_name("part-1.parquet"))
    table = {name: values(rng, c["kind"], 5, c["nulls"]) for name, c in in_items.items()}
    pl.DataFrame({"i": [ids("i", k) for k in range(5)], **table}).write_parquet(
        folder / "items.parquet"
    )
    if made["candidates"] is not None:
        place = folder / "candidates" / f"date={FIRST + timedelta(days=DAYS)}"
        place.mkdir(parents=True)
        given = {"u": [ids("u", k) for k in (0, 0, 99)], "i": [ids("i", k) for k in (0, 1, 2)]}
        if made["candidates"] == "with context":
            given |= {"tab": ["home", "search", None]}
            given |= {n: values(rng, c["kind"], 3, c["nulls"]) for n, c in in_log.items()}
        pl.DataFrame(given).write_parquet(place / "a.parquet")
    write_project(folder, _project(made, list(in_log), list(in_items)))


def _project(made: dict[str, Any], in_log: list[str], in_items: list[str]) -> dict[str, Any]:
    used = {f"c{n}": c for n, c in enumerate(made["columns"])}
    by_use = {use: [name for name, c in used.items() if use in c["use"]] for use in USES}
    hashes = [{"hash_buckets": 7} if used[c]["hashed"] else {} for c in by_use["categoricals"]]
    categoricals = [
        {"column": "tab"},
        *({"column": c, **h} for c, h in zip(by_use["categoricals"], hashes, strict=True)),
    ]
    listed = [{"column": c} for c in by_use["lists"]]
    known = {*by_use["categoricals"], *by_use["lists"]}
    histories = [c for c in by_use["history"] if c in known]
    signal = {"signal": "click", "columns": histories}
    log: dict[str, Any] = {
        "context": ["tab", *in_log],
        "items": {"path": "items.parquet", "key": "i", "columns": in_items},
        **({"position": "pos"} if made["position"] else {}),
    }
    models = {made["presets"][0]: {"preset": made["presets"][0], "expert_hidden": [4]}}
    if made["alone"]:
        models["single_task"] = {"preset": "single_task", "expert_hidden": [4]}
    scoring = {} if made["candidates"] is None else {"candidates": "candidates"}
    project = merged(
        TINY,
        log={**log, "ranges": {}},
        objectives=made["objectives"],
        features={
            "windows": made["windows"],
            "rates": made["rates"],
            "numeric_encoding": made["encoding"],
            "entities": [["user_id"], ["item_id"], *([c] for c in by_use["entity"])],
            "categoricals": categoricals,
            "numerics": by_use["numerics"],
            "lists": listed,
            "histories": [{**signal, "length": 3}] if histories else [],
        },
        training={
            "epochs": 1,
            "refit": made["refit"],
            "trees": made["trees"],
            "balancing": made["balancing"],
            "negative_keep": made["keep"],
        },
        split={"test_days": made["test_days"], "train_days": 3},
        promotion={"bootstrap": 20},
        scoring={**scoring, "generated_items": 5, "top_k": 5},
    )
    del project["models"]["mmoe"]
    return merged(project, models=models)


def succeeds_if_checked(made: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_night(root, made)
        try:
            list(check_project(str(root / "project.toml"), root))
        except ProjectError as refused:
            event(f"refused: {str(refused).splitlines()[0].rpartition(folder)[2][:60]}")
            return
        night = run_night(root)
        assert night.ranked.rows > 0
        event("a night")


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@given(nights())
@settings(max_examples=3, derandomize=True, **QUIET)
def test_a_night_succeeds_whenever_check_did(made):
    succeeds_if_checked(made)


@pytest.mark.slow
@given(nights())
@settings(max_examples=100, **QUIET)
def test_many_nights_succeed_whenever_check_did(made):
    succeeds_if_checked(made)
