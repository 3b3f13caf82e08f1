"""Explain the score of a user-item pair: features, predictions, experts, blend and rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.point_in_time import AsOf
from mtl_ranker.features.tables import read_as
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.blend import blend_values, factors
from mtl_ranker.training.batches import encoded_tensors
from mtl_ranker.workspace import Workspace

# A Boolean column's values on the command line.
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Pair:
    """A user and an item, with context columns, as text from the command line."""

    user: str
    item: str
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """How the ranker scores one pair.

    Attributes:
        features: raw features as of the day; None = missing.
        raw, predictions: per objective, before and after calibration, of network and trees.
        values: objective → v, what the blend reads (see ranking/blend.py): its prediction, times
            the probabilities of the objectives that it is predicted given.
        multiplied: objective → those objectives, empty for most.
        contributions: objective → its term of the score: w·v, or w·ln v of a product.
        experts: objective → its weight on each expert of the last layer, native experts included;
            empty where the network has no share in the prediction, as with trees alone.
        effects: feature → score minus the score with this feature missing, largest first.
        context: the context columns of the pair, None = missing.
        published: whether context columns are those of the published ranking.
        rank: in the day's published ranking; None if the pair is not among the top k.
        ranked_by: version of the model that made that ranking, or None.
        published_score: the pair's score there, or None.
        known_user, known_item: whether the id occurs in the published events.
        unknown_context: context columns whose value does not occur there.
        listed: whether the user has a published list of the day.
    """

    user: Any
    item: Any
    day: date
    version: str
    features: dict[str, Any]
    raw: dict[str, float]
    predictions: dict[str, float]
    values: dict[str, float]
    multiplied: dict[str, list[str]]
    contributions: dict[str, float]
    experts: dict[str, list[float]]
    score: float
    effects: dict[str, float]
    context: dict[str, Any]
    published: bool
    rank: int | None
    ranked_by: str | None
    published_score: float | None
    known_user: bool
    known_item: bool
    unknown_context: list[str]
    listed: bool


def explain(context: Context, ranker: RegisteredRanker, pair: Pair, day: date) -> Explanation:
    """Score one pair with features as of `day`, and return every step.

    Context columns not given are those of the pair in the day's published ranking, so that the
    score is the published one, where the same model made it. Without a published one they are
    missing, as in a candidate set without them. Raises ProjectError for an id or context value that
    is not of the log's type, and for an unknown context column.
    """
    context, artifact = ranker.context(context), ranker.artifact
    project, workspace = context.project, context.workspace
    days = workspace.days("events")
    if not days:
        raise ProjectError("no events are published; run `mtl-ranker nightly` first")
    candidate = _candidate(project, workspace.scan("events", days[-1:]).collect_schema(), pair)
    user, item = candidate["user_id"][0], candidate["item_id"][0]
    listed = _published(workspace, day, user)
    of_item = listed.filter(pl.col("item_id") == item)
    ranked = of_item.head(1) if of_item.height else None
    columns = project.log.context
    taken = [] if ranked is None else [c for c in columns if c not in pair.context and c in ranked]
    if ranked is not None:
        candidate = candidate.with_columns(ranked[c].cast(candidate.schema[c]) for c in taken)
    row = AsOf.build(context, candidate.lazy(), day).join(candidate.lazy()).collect()
    names = [task.name for task in artifact.tasks]
    calibrated, raw = artifact.predict(row), artifact.uncalibrated(row)
    layers = artifact.model.expert_weights(*encoded_tensors(artifact.encoder.transform(row)))
    weights = artifact.project.blend_weights
    score = float(calibrated["score"][0])

    values = calibrated.select(**blend_values(artifact.project)).row(0, named=True)

    def contribution(name: str) -> float:
        value = values[name]
        if artifact.project.scoring.blend == "weighted_product":
            value = math.log(max(value, 1e-9))
        return weights[name] * value

    given = [c for c in pair.context if not candidate.schema[c].is_nested()]
    known = (
        workspace.scan("events", days)
        .select(
            (pl.col("user_id") == user).any().alias("known user"),
            (pl.col("item_id") == item).any().alias("known item"),
            *(pl.col(c).eq_missing(candidate[c][0]).any() for c in given),
        )
        .collect(engine="streaming")
    )
    return Explanation(
        user=user,
        item=item,
        day=day,
        version=ranker.version,
        features={c: _plain(row[c][0]) for c in artifact.columns},
        raw={n: float(raw[n][0]) for n in names},
        predictions={n: float(calibrated[n][0]) for n in names},
        values={n: values[n] for n in names},
        multiplied=factors(artifact.project),
        contributions={n: contribution(n) for n in names},
        experts={
            n: layers[-1][0][t].tolist() if layers and artifact.network_counts(t) else []
            for t, n in enumerate(names)
        },
        score=score,
        effects=_effects(artifact, row, score),
        context={c: _plain(candidate[c][0]) for c in columns},
        published=bool(taken),
        rank=None if ranked is None else int(ranked["rank"][0]),
        ranked_by=None if ranked is None else str(ranked["model_version"][0]),
        published_score=None if ranked is None else float(ranked["score"][0]),
        known_user=bool(known["known user"][0]),
        known_item=bool(known["known item"][0]),
        unknown_context=[c for c in given if not known[c][0]],
        listed=listed.height > 0,
    )


def _candidate(project: Project, schema: pl.Schema, pair: Pair) -> pl.DataFrame:
    """The pair as one candidate in the log's types."""
    columns = project.log.context
    for column in pair.context:
        if column not in columns:
            raise ProjectError(
                f"--context {column}: no context column; allowed: {', '.join(columns) or 'none'}"
            )
    values: dict[str, pl.Series] = {}
    given = {"user_id": pair.user, "item_id": pair.item} | {c: pair.context.get(c) for c in columns}
    for column, text in given.items():
        value = pl.Series(column, [text], pl.String)
        if schema[column] == pl.Boolean:
            value = pl.Series(column, [BOOLEANS.get((text or "").lower())], pl.Boolean)
        elif schema[column].is_nested():
            if text is not None:
                raise ProjectError(f"--context {column}: is {schema[column]}, not one value")
            value = pl.Series(column, [None], schema[column])
        elif schema[column] != pl.String:
            read = read_as(column, value.dtype, schema[column])
            value = value.to_frame().select(read).to_series()
        if text is not None and value[0] is None:
            raise ProjectError(f"{column} {text!r}: is no {schema[column]}, the log's own type")
        values[column] = value
    return pl.DataFrame(values)


def _effects(artifact: RankerArtifact, row: pl.DataFrame, score: float) -> dict[str, float]:
    """The score minus the score without one feature, for every feature that is not missing."""
    columns = artifact.columns
    present = [c for c in columns if row[c][0] is not None]
    copies = pl.concat([row] * max(len(present), 1))
    ablated = copies.with_columns(
        pl.when(pl.int_range(pl.len()) == number).then(None).otherwise(pl.col(c)).alias(c)
        for number, c in enumerate(present)
    )
    scores = artifact.predict(ablated)["score"].to_list()
    effects = {c: score - scores[number] for number, c in enumerate(present)}
    return dict(sorted(effects.items(), key=lambda pair: -abs(pair[1])))


def _published(workspace: Workspace, day: date, user: Any) -> pl.DataFrame:
    """The user's rows of the day's published ranking; none without one."""
    if day not in workspace.days("rankings"):
        return pl.DataFrame(schema={"item_id": pl.Null})
    return workspace.scan("rankings", [day]).filter(pl.col("user_id") == user).collect()


def _plain(value: Any) -> Any:
    return value.to_list() if isinstance(value, pl.Series) else value
