"""Why a pair scores what it scores: features as of the day, predictions, experts, blend, rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import polars as pl
import torch

from mtl_ranker.artifact import RankerArtifact
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.queries import join_features
from mtl_ranker.logs.sources import Source
from mtl_ranker.training.batches import encoded_tensors
from mtl_ranker.workspace import Workspace


@dataclass(frozen=True)
class Explanation:
    """One candidate's way through the ranker.

    Attributes:
        features: raw feature rows as of the day; None = not known.
        raw, predictions: per objective, before and after calibration.
        parts: objective → what it adds to the score: w·p, or w·ln p of a product.
        experts: objective → the last layer's gate weights, expert by expert.
        effects: feature → change of the score when this feature is taken away (made missing), the
            largest first.
        rank: in the day's published ranking, None where it is not among the top k.
    """

    user: Any
    item: Any
    day: date
    version: str
    features: dict[str, Any]
    raw: dict[str, float]
    predictions: dict[str, float]
    parts: dict[str, float]
    experts: dict[str, list[float]]
    score: float
    effects: dict[str, float]
    rank: int | None
    known_user: bool
    known_item: bool


def explain(
    project: Project,
    source: Source,
    workspace: Workspace,
    artifact: RankerArtifact,
    version: str,
    user: str,
    item: str,
    day: date,
    context: Mapping[str, str] | None = None,
) -> Explanation:
    """Follow one (user, item) through features as of `day`, the model, and the blend.

    Context columns not given are missing, as in a candidate set without them. Raises ProjectError
    for an id that cannot be one of the log's, and for an unknown context column.
    """
    days = workspace.days("events")
    if not days:
        raise ProjectError("no events are published; run `mtl-ranker nightly` first")
    schema = workspace.scan("events", days[-1:]).collect_schema()
    given = dict(context or {})
    for column in given:
        if column not in project.log.context:
            raise ProjectError(
                f"--context {column}: no context column; allowed: "
                f"{', '.join(project.log.context) or 'none'}"
            )
    values: dict[str, pl.Series] = {}
    wanted = {"user_id": user, "item_id": item} | {c: given.get(c) for c in project.log.context}
    for column, text in wanted.items():
        value = pl.Series(column, [text], pl.String)
        if schema[column] != pl.String:
            value = value.cast(schema[column], strict=False)
        if text is not None and value[0] is None:
            raise ProjectError(f"{column} {text!r}: is no {schema[column]}, the log's own type")
        values[column] = value
    candidate = pl.DataFrame(values)
    row = join_features(project, source, workspace, candidate.lazy(), day).collect()
    names = [task.name for task in artifact.tasks]
    found = artifact.predict(row)
    plain = artifact.uncalibrated(row)
    with torch.no_grad():
        inputs = encoded_tensors(artifact.encoder.transform(row))
        gates = artifact.model.gate_weights(*inputs)[-1][0]
    weights, how = artifact.project.blend_weights, artifact.project.scoring.blend
    logs = how == "weighted_product"
    parts = {
        n: weights[n] * (math.log(max(found[n][0], 1e-9)) if logs else float(found[n][0]))
        for n in names
    }
    score = float(found["score"][0])
    seen = workspace.scan("events", days)
    known = seen.select(
        (pl.col("user_id") == values["user_id"][0]).any().alias("user"),
        (pl.col("item_id") == values["item_id"][0]).any().alias("item"),
    ).collect(engine="streaming")
    return Explanation(
        values["user_id"][0],
        values["item_id"][0],
        day,
        version,
        {c: _plain(row[c][0]) for c in artifact.columns},
        {n: float(plain[n][0]) for n in names},
        {n: float(found[n][0]) for n in names},
        parts,
        {n: gates[t].tolist() for t, n in enumerate(names)},
        score,
        _effects(artifact, row, score),
        _rank(workspace, day, values["user_id"][0], values["item_id"][0]),
        bool(known["user"][0]),
        bool(known["item"][0]),
    )


def _effects(artifact: RankerArtifact, row: pl.DataFrame, score: float) -> dict[str, float]:
    """The score with everything, minus the score without one feature: all at once, a row each."""
    columns = artifact.columns
    known = [c for c in columns if row[c][0] is not None]
    many = pl.concat([row] * max(len(known), 1))
    without = many.with_columns(
        pl.when(pl.int_range(pl.len()) == number).then(None).otherwise(pl.col(c)).alias(c)
        for number, c in enumerate(known)
    )
    scores = artifact.predict(without)["score"].to_list()
    found = {c: score - scores[number] for number, c in enumerate(known)}
    return dict(sorted(found.items(), key=lambda pair: -abs(pair[1])))


def _rank(workspace: Workspace, day: date, user: Any, item: Any) -> int | None:
    if day not in workspace.days("rankings"):
        return None
    found = (
        workspace.scan("rankings", [day])
        .filter((pl.col("user_id") == user) & (pl.col("item_id") == item))
        .select("rank")
        .collect()
    )
    return int(found["rank"][0]) if found.height else None


def _plain(value: Any) -> Any:
    return value.to_list() if isinstance(value, pl.Series) else value
