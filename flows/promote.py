"""The promote flow: challenger against champion on the same test rows."""

from __future__ import annotations

from datetime import date

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from flows.connect import connect
from flows.night import RETRY, announce, working
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.days import last_final_day
from mtl_ranker.nightly.promotion import Decision, accept_by_hand, compare_artifacts
from mtl_ranker.nightly.results import report_place
from mtl_ranker.reports.page import with_decision
from mtl_ranker.tracking import registry


@task(name="decide", task_run_name="decide {day}", **RETRY)
def decide_task(
    context: Context, day: date, challenger: str, champion: str | None, accept: bool
) -> Decision:
    """A version against the one that is champion, if there is one."""
    project = context.project
    new = registry.load_version(project, challenger)
    with registry.artifact_folder(project, new.version) as folder:
        if accept:
            return accept_by_hand(context, day, new.artifact, folder)
        old = None if champion is None else registry.load_version(project, champion).artifact
        return compare_artifacts(context, day, new.artifact, old, folder)


@flow(name="promote", flow_run_name="promote {day}", validate_parameters=False)
def promote(context: Context, day: date, dry_run: bool = False, accept: bool = False) -> Decision:
    """Compare challenger and champion; give the challenger the alias `champion` if it is promoted.

    With `dry_run` the decision is only printed. With `accept` the challenger is not compared with
    the champion; it must still be calibrated and be served. Raises ProjectError without a
    challenger.
    """
    connect(context)
    # `rollback` and `freeze` wait meanwhile, so that the decision is on the champion it names.
    with context.workspace.lock(f"promote {day}", registry.REGISTRY, wait=True):
        return _promote(context, day, dry_run, accept)


def _promote(context: Context, day: date, dry_run: bool, accept: bool) -> Decision:
    project, workspace = context.project, context.workspace
    challenger = registry.alias_version(project, "challenger")
    champion = registry.alias_version(project, "champion")
    if challenger is None:
        raise ProjectError(f"models:/{project.name}@challenger: none; run `mtl-ranker train` first")
    frozen = registry.frozen(project)
    tested = last_final_day(project, day)
    known = registry.tested_later(project, tested, [v for v in (challenger, champion) if v])
    if champion == challenger:
        decision = Decision(False, f"version {champion} is champion already")
    elif champion is not None and frozen is not None:
        decision = Decision(False, f"kept the champion: it is frozen ({frozen})")
    elif registry.rolled_back(project, challenger) and not accept:
        reason = (
            f"kept the champion: version {challenger} was rolled back; a training on other days "
            "or settings makes a new version, and `promote --accept` promotes this one"
        )
        decision = Decision(False, reason)
    elif known is not None and not accept:
        decision = Decision(False, f"kept the champion: {known}")
    else:
        with working("promote", "comparing the challenger, loading it in a fresh process"):
            decision = decide_task(context, day, challenger, champion, accept)
    if dry_run:
        announce("promote", f"would be: {decision.reason}; champion stays version {champion}")
        return decision
    workspace.confirm()
    place = report_place(day)
    if decision.fallback is not None:
        registry.register_baseline(context, tested, decision.fallback, decision.reason)
    if champion != challenger:  # otherwise the decision that made it champion stands
        registry.record_decision(project, challenger, decision)
        if workspace.has(place):
            confidence = project.promotion.confidence
            text = workspace.file(place).read_text("utf-8")
            text = with_decision(text, decision, challenger, champion, confidence)
            workspace.publish_file(place, text)
            registry.replace_report(project, challenger, text)
    now = registry.alias_version(project, "champion")
    announce("promote", f"{decision.reason}; champion is version {now}")
    create_markdown_artifact(
        key="promotion",
        markdown=f"{decision.reason}\n\nChallenger version {challenger}, champion version {now}. "
        f"The differences are in the first section of `{workspace.where(place)}`.",
    )
    return decision
