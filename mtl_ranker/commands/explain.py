"""`mtl-ranker explain`: print how the champion scores one pair."""

from __future__ import annotations

from datetime import date

from rich import box
from rich.table import Table

from mtl_ranker.context import Context
from mtl_ranker.ranking.explain import Explanation, Pair, explain
from mtl_ranker.reports.console import console
from mtl_ranker.tracking import connection, registry


def explain_command(context: Context, pair: Pair, day: date) -> Explanation:
    """Print the champion's explanation of one pair and return it."""
    project = context.project
    connection.connect(context.workspace)
    champion = registry.load_artifact(project, "champion")
    artifact, version = champion
    explanation = explain(context, champion, pair, day)
    known = {"user": explanation.known_user, "item": explanation.known_item}
    unknown = [entity for entity, in_log in known.items() if not in_log]
    unknown += [f"{c} = {explanation.context[c]}" for c in explanation.unknown_context]
    note = f"; not in the log: {', '.join(unknown)}" if unknown else ""
    console.print(
        f"user {explanation.user}, item {explanation.item}, {day}, {project.name} "
        f"version {version}{note}",
        highlight=False,
    )
    if explanation.context:
        given = ", ".join(f"{c} = {v}" for c, v in explanation.context.items() if v is not None)
        missing = [c for c, value in explanation.context.items() if value is None]
        source = " (of the published ranking)" if explanation.published else ""
        absent = f"missing: {', '.join(missing)}, set by --context" if missing else ""
        text = f"context {given}{source}" if given else "context"
        console.print("; ".join(filter(None, [text, absent])), highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    with_experts = any(explanation.experts.values())
    with_chains = any(explanation.multiplied.values())
    how = artifact.project.scoring.blend
    adds = "adds to score" if how == "weighted_sum" else "adds to ln score"
    numbers = ["uncalibrated", "calibrated", "value", "weight", adds]
    table.add_column("objective")
    for heading in numbers:
        if heading != "value" or with_chains:
            table.add_column(heading, justify="right")
    if with_experts:
        table.add_column("experts")
    for name, value in explanation.predictions.items():
        table.add_row(
            name,
            f"{explanation.raw[name]:.4f}",
            f"{value:.4f}",
            *([f"{explanation.values[name]:.4f}"] if with_chains else []),
            f"{artifact.project.blend_weights[name]:g}",
            f"{explanation.contributions[name]:+.4f}",
            *([" ".join(f"{w:.2f}" for w in explanation.experts[name])] if with_experts else []),
        )
    console.print(table)
    for name, chain in explanation.multiplied.items():
        if chain:
            terms = " · ".join(["calibrated", *(f"P({other})" for other in chain)])
            console.print(f"value of {name} = {terms}", highlight=False, markup=False)
    rank = f"rank {explanation.rank}"
    if explanation.rank is None:
        rank = "not in the user's published list" if explanation.listed else "the user has no list"
    if explanation.ranked_by not in (None, version):
        rank += f" (made by version {explanation.ranked_by})"
    if explanation.published_score is not None:
        changed = abs(explanation.published_score - explanation.score)
        if changed > 1e-3 * abs(explanation.published_score):
            rank += f" with score {explanation.published_score:.4f}"
    console.print(f"score {explanation.score:.4f} ({how}); {rank} of {day}\n", highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        title="effect of each feature on the score",
        caption="score minus the score with the feature missing; the ten largest",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("feature", "value", "effect"):
        table.add_column(heading, justify="left" if heading == "feature" else "right")
    for name, effect in list(explanation.effects.items())[:10]:
        value = explanation.features[name]
        table.add_row(
            name, f"{value:.4g}" if isinstance(value, float) else str(value), f"{effect:+.4f}"
        )
    console.print(table)
    return explanation
