"""A search for better settings as a flow: the weekly schedule."""

from __future__ import annotations

from datetime import date

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.features import features
from flows.ingest import ingest
from flows.night import HOOKS, open_night
from flows.nightly import chosen_day
from mtl_ranker.judging import as_toml, tune_command
from mtl_ranker.training.tuning import Search


@flow(name="tune", validate_parameters=False, **HOOKS)
def tune(
    config: str,
    data: str,
    workspace: str,
    model: str,
    day: date | str | None = None,
    trials: int = 30,
    minutes: float | None = 120.0,
) -> Search:
    """Build what is missing of the split that ends with D, then search `[models.NAME]` on it.

    The project file is not changed: the artifact holds the lines to put there.
    """
    night = open_night(config, data, workspace)
    chosen = chosen_day(night, day)
    with night.workspace.lock(f"tune {model} {chosen}"):
        ingest(config, data, workspace, chosen)
        features(config, data, workspace, chosen)
        found = tune_command(night.project, night.workspace, chosen, model, trials, minutes, None)
    create_markdown_artifact(
        key="tuned",
        markdown=f"```toml\n{as_toml(night.project, model, found)}```\n\n{found.trials} trials, "
        f"validation quality {found.quality:.4f}",
        description="The best settings found",
    )
    return found
