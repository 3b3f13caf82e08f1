"""The whole night as one flow of sub-flows."""

from __future__ import annotations

from datetime import date, timedelta

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows.features import features
from flows.ingest import ingest
from flows.night import last_day, open_night, say
from flows.promote import promote
from flows.score import score
from flows.train import train
from mtl_ranker.scoring import Ranked
from mtl_ranker.training.suite import model_specs


def run_name() -> str:
    return f"nightly {flow_run.parameters.get('day') or 'latest'}"


@flow(name="nightly", flow_run_name=run_name, validate_parameters=False)
def nightly(config: str, data: str, workspace: str, day: date | str | None = None) -> Ranked:
    """After day D has ended: learn from the log up to D, rank the candidates of D + 1.

    Without a day (a schedule gives none) D is the last day of the log.
    """
    night = open_night(config, data, workspace)
    model_specs(night.project)
    chosen = date.fromisoformat(day) if isinstance(day, str) else day or last_day(night)
    arguments = (config, data, workspace, chosen)
    ingest(*arguments)
    features(*arguments)
    suite = train(*arguments)
    decision = promote(*arguments)
    ranked = score(config, data, workspace, chosen + timedelta(days=1))
    say(f"[bold green]done[/]      {ranked.path}")
    create_markdown_artifact(
        key="night",
        markdown=f"{suite.winner.label} won the training of {chosen}; {decision.reason}.\n\n"
        f"Ranked candidates: `{ranked.path}`",
        description="What the night did",
    )
    return ranked
