"""Projects built by keyword: a change that does not fit fails instead of doing nothing."""

from __future__ import annotations

import copy
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from mtl_ranker.config import Project, parse_project
from mtl_ranker.context import Context

Table = dict[str, Any]

# As the value of a change: the key is taken away.
WITHOUT = object()

# Of the log that `tests.conftest.tiny_events` makes.
FEW_STEPS = {"batch_size": 2048, "learning_rate": 2e-3}  # of quick trainings
TINY: Table = {
    "name": "tiny",
    "log": {
        "path": "log",
        "user": "u",
        "item": "i",
        "timestamp": "ts",
        "context": ["tab"],
        "ranges": {"play": {"min": 0}},
    },
    "objectives": [
        {"name": "click", "group": "engagement", "label": "click"},
        {
            "name": "long",
            "group": "satisfaction",
            "label": "case when play > 10 then 1 else 0 end",
            "where": "click = 1",
        },
    ],
    "features": {
        "windows": [1, 3],
        "entities": [["user_id"], ["item_id"], ["user_id", "tab"]],
        "categoricals": [{"column": "tab"}, {"column": "item_id", "min_count": 2}],
    },
    "split": {"warmup_days": 1, "train_days": 3},
    "models": {"mmoe": {"preset": "mmoe", "experts": 2, "expert_hidden": [8]}},
    "training": {**FEW_STEPS, "epochs": 2, "refit": False, "spread_seeds": 0},
    # Forty rows a day bound no loss that matters.
    "promotion": {"require_spread": False, "refit_margin": 10.0},
}

# Of the simulated feed, for whole nights.
SMALL: Table = {
    "name": "small",
    "log": {
        "user": "user",
        "item": "item",
        "timestamp": "shown_at_ms",
        "context": ["surface"],
        "items": {
            "path": "items.parquet",
            "key": "item",
            "columns": ["topic", "creator"],
            "published": "published",
        },
    },
    "objectives": [
        {"name": "click", "group": "engagement", "label": "click"},
        {"name": "like", "group": "satisfaction", "label": '"like"'},
    ],
    "features": {
        "windows": [3],
        "entities": [["user_id"], ["item_id"], ["user_id", "topic"]],
        "categoricals": [{"column": "surface"}, {"column": "topic"}],
        "histories": [{"signal": "click", "columns": ["topic"], "length": 5}],
    },
    "split": {"warmup_days": 2, "train_days": 3},
    "models": {
        "shared_bottom": {"preset": "shared_bottom"},
        "mmoe": {"preset": "mmoe", "experts": 2},
    },
    "training": {**FEW_STEPS, "epochs": 2, "spread_seeds": 0},
    "promotion": {
        "max_seconds_per_million": 100000,
        "tolerance": 0.1,
        "require_spread": False,
    },
    "scoring": {"generated_items": 20, "top_k": 5},
}


def merged(base: Table = TINY, /, **changes: Any) -> Table:
    """A copy of `base` with the changes: tables merge, all else replaces, WITHOUT takes away."""
    return _merge(base, changes, "")


def changed(tables: list[Table], index: int, /, **changes: Any) -> list[Table]:
    """A copy of a list of tables (objectives, categoricals) with changes in one of them."""
    if not 0 <= index < len(tables):
        raise IndexError(f"no table {index}: there are {len(tables)}")
    found = copy.deepcopy(tables)
    found[index] = _merge(found[index], changes, f"[{index}].")
    return found


def project_text(base: Table = TINY, /, **changes: Any) -> str:
    """The changed project as TOML."""
    return tomli_w.dumps(merged(base, **changes))


def project(base: Table = TINY, /, **changes: Any) -> Project:
    """The changed project as a night reads it."""
    return parse_project(project_text(base, **changes), "project.toml")


def write_project(folder: Path, base: Table = TINY, /, **changes: Any) -> Path:
    """Write the changed project as the folder's `project.toml`."""
    file = folder / "project.toml"
    file.write_text(project_text(base, **changes), "utf-8")
    return file


def edit_project(folder: Path, /, **changes: Any) -> Path:
    """Change the folder's `project.toml` as it is now; an edit that changes nothing fails."""
    before = tomllib.loads((folder / "project.toml").read_text("utf-8"))
    if merged(before, **changes) == before:
        raise ValueError(f"{folder / 'project.toml'} says so already: {changes}")
    return write_project(folder, before, **changes)


def _merge(base: Table, changes: Table, place: str) -> Table:
    found = copy.deepcopy(base)
    for key, value in changes.items():
        if value is WITHOUT:
            if key not in found:
                raise KeyError(f"{place}{key} is not there to be taken away")
            del found[key]
        elif isinstance(value, dict):
            old = found.get(key)
            found[key] = _merge(old if isinstance(old, dict) else {}, value, f"{place}{key}.")
        else:
            found[key] = copy.deepcopy(value)
    return found


def with_training(context: Context, **settings: Any) -> Context:
    """The context with other settings of `[training]`."""
    training = context.project.training.model_copy(update=settings)
    return replace(context, project=context.project.model_copy(update={"training": training}))
