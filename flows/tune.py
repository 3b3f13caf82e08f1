"""The tune flow: search a model's settings (weekly schedule)."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.features import features
from flows.ingest import ingest
from flows.night import HOOKS, announce
from flows.nightly import chosen_day
from flows.schedule import in_turn, mark_lost_runs
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.tuning import Budget, Search
from mtl_ranker.tracking.search import run_search

WAIT_MINUTES = 120.0  # for another run in the workspace


@flow(name="tune", **HOOKS)
def tune(
    config: str,
    data: str,
    workspace: str,
    model: str,
    day: date | Literal["yesterday"] | None = None,
    trials: int = 30,
    minutes: float | None = 120.0,
) -> Search:
    """Build missing days of the split that ends with D, and search the model's settings on it.

    The project file is not changed; the artifact contains the lines to put there.

    Args:
        model: NAME of a `[models.NAME]`.
        day: as in `nightly`.
        trials: trainings in all, including those of earlier searches.
        minutes: no trial starts after this time.
    """
    context = open_context(config, Path(data), Path(workspace)).pinned()
    mark_lost_runs()
    chosen = chosen_day(context, day)
    budget = Budget(trials, None if minutes is None else 60 * minutes)
    with in_turn(context.workspace, f"tune {model} {chosen}", WAIT_MINUTES):
        ingest(context, chosen)
        features(context, chosen)
        recorded = run_search(context, chosen, model, budget)
    search = recorded.search
    announce("tune", f"{model}: {search.trials} trials; {search.decision}")
    compared = "".join(f"- {each}\n" for each in search.confirmed)
    create_markdown_artifact(
        key="tuned",
        markdown=f"```toml\n{recorded.toml}```\n\n{search.trials} trials; {search.decision}.\n\n"
        f"{compared}",
        description="The best settings found",
    )
    return search
