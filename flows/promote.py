"""Challenger against champion on the same held-out rows."""

from __future__ import annotations

from datetime import date

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.night import open_night, say
from mtl_ranker import registry
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.comparison import compare_artifacts
from mtl_ranker.evaluation.report import with_decision
from mtl_ranker.promotion import Decision


@flow(name="promote", flow_run_name="promote {day}", validate_parameters=False)
def promote(config: str, data: str, workspace: str, day: date, dry_run: bool = False) -> Decision:
    """Give the challenger the alias `champion` if it earned it; say why either way.

    With `dry_run` only says what would be decided.
    """
    night = open_night(config, data, workspace)
    registry.connect(night.workspace)
    challenger = registry.alias_version(night.project, "challenger")
    champion = registry.alias_version(night.project, "champion")
    if challenger is None:
        raise ProjectError(
            f"models:/{night.project.name}@challenger: none; run `mtl-ranker train` first"
        )
    frozen = registry.frozen(night.project)
    if champion == challenger:
        decision = Decision(False, f"version {champion} is champion already")
    elif champion is not None and frozen is not None:
        decision = Decision(False, f"kept the champion: it is frozen ({frozen})")
    else:
        new, version = registry.load_artifact(night.project, "challenger")
        old = registry.load_artifact(night.project, "champion")[0] if champion else None
        folder = registry.artifact_folder(night.project, version)
        decision = compare_artifacts(night.project, night.workspace, day, new, old, folder)
    if dry_run:
        say(f"[bold]promote[/]   would be: {decision.reason}; champion stays version {champion}")
        return decision
    registry.record_decision(night.project, challenger, decision)
    page = night.workspace.root / f"reports/{day}.html"
    if page.is_file() and champion != challenger:
        confidence = night.project.promotion.confidence
        text = with_decision(page.read_text("utf-8"), decision, challenger, champion, confidence)
        night.workspace.publish_file(f"reports/{day}.html", text)
        registry.replace_report(night.project, challenger, text)
    now = registry.alias_version(night.project, "champion")
    say(f"[bold]promote[/]   {decision.reason}; champion is version {now}")
    create_markdown_artifact(
        key="promotion",
        markdown=f"{decision.reason}\n\nChallenger version {challenger}, champion version {now}. "
        f"The evidence: first section of `{page}`.",
    )
    return decision
