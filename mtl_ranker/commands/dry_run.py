"""`--dry-run`: what a command would build and why, without building it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date, timedelta

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError, counted
from mtl_ranker.features.aggregates import stale_aggregates
from mtl_ranker.features.days import needed_days, needed_history, span, split_days
from mtl_ranker.features.examples import examples_provenance
from mtl_ranker.logs.ingest import events_provenance
from mtl_ranker.nightly.suite import contenders_of
from mtl_ranker.ranking.candidates import candidate_files


def plan_days(context: Context, days: Sequence[date], night: date | None = None) -> Iterator[str]:
    """A line for each day whose events or examples would be built, with the reasons.

    A rebuilt day changes the windows of later days, so their examples would be rebuilt as well.

    Args:
        night: D, on which labels are known; None for the last published day.
    """
    project, source, workspace = context.project, context.source, context.workspace
    rebuilt: list[date] = []
    longest = project.features.windows[-1]
    up_to_date = 0
    for day in needed_history(project, source.days(), list(days)):
        why = workspace.stale("events", day, events_provenance(context, day))
        reasons = [f"events {why}"] if why else []
        if why is None:
            why = stale_aggregates(context, day)
            reasons = [f"aggregates {why}"] if why else []
        if why:
            rebuilt.append(day)
        if day in days:
            changed = [d for d in rebuilt if 0 < (day - d).days <= longest]
            if changed:
                reasons.append(f"examples: {changed[0]} would be built before them")
            else:
                provenance = examples_provenance(context, day, night)
                why = workspace.stale("examples", day, provenance)
                reasons += [f"examples {why}"] if why else []
        if reasons:
            yield f"{day}  {'; '.join(reasons)}"
        else:
            up_to_date += 1
    yield f"{counted(up_to_date, 'day')} up to date"


def plan_night(context: Context, day: date) -> Iterator[tuple[str, str]]:
    """Lines about what `nightly --date D` would do, each with its step: build, train or rank.

    Raises ProjectError as `nightly` would.
    """
    project, source = context.project, context.source
    available = source.days()
    split = split_days(project, needed_days(project, available, day), day)
    days = split.all
    for line in plan_days(context, days, day):
        yield "build", line
    settings = project.training
    counts = Counter(each.name for each in contenders_of(project))
    models = ", ".join(f"{name} ({n} seed{'s' * (n > 1)})" for name, n in counts.items())
    further = settings.spread_seeds if len(settings.seeds) == 1 else 0
    more = f", {further} more of the winner" if further else ""
    if settings.start == "champion":
        more += f"; between full trainings, every {settings.full_every} days, the champion alone"
    yield (
        "train",
        f"train    {models}{more}, on {span(split.train)}, "
        f"validate {span(split.validate)}, test {span(split.test)}",
    )
    yield "rank", plan_ranking(context, day + timedelta(days=1))


def plan_ranking(context: Context, day: date) -> str:
    """The candidates that `score --date D` would rank.

    Raises ProjectError if a given set is missing.
    """
    project, source = context.project, context.source
    given = project.scoring.candidates
    if given is None:
        return f"rank     candidates of {day}, generated from the log"
    files = candidate_files(context, day)
    if not files:
        raise ProjectError(
            f"{source.root / given}: no candidate set for {day} (scoring.candidates = {given!r})"
        )
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return f"rank     candidates of {day}: {len(files)} files, {megabytes:,.1f} MB"
