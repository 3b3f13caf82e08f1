"""How late labels arrive: the share of a day's positives that are known after some days."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import polars as pl

from mtl_ranker.context import Context
from mtl_ranker.errors import counted
from mtl_ranker.features.sql import day_number
from mtl_ranker.features.tables import scan_events
from mtl_ranker.logs.actions import EVENT, final_day, with_actions
from mtl_ranker.logs.contract import derived_columns, label_actions

MOST_DAYS = 7  # latest days whose labels are final


@dataclass(frozen=True)
class Arrival:
    """When the positives of a binary objective become known.

    Attributes:
        days: on which they are counted; their labels are final.
        positives: their number.
        rows: number of impressions with the label.
        shares: share of them that is known at the end of the impression's day, a day later, and so
            on.
    """

    objective: str
    days: Sequence[date]
    positives: int
    rows: int
    shares: list[float]

    @property
    def rate(self) -> float:
        """The share of positives."""
        return self.positives / self.rows if self.rows else float("nan")

    def __str__(self) -> str:
        known = ", ".join(
            f"{share:.1%} after {counted(age, 'day')}" for age, share in enumerate(self.shares)
        )
        return f"{self.objective}: of {self.positives:,} positives {known}"


def arrivals(context: Context, night: date) -> list[Arrival]:
    """The arrival of positives by age, of each binary objective that reads an action.

    Args:
        night: D; of earlier days the latest ones whose labels are final on D count.
    """
    project, found = context.project, []
    labels = derived_columns(project)
    for objective in project.objectives:
        actions = label_actions(project, [objective])
        if not actions or objective.kind != "binary":
            continue
        ended = [
            day
            for day in context.workspace.days("events")
            if day <= night and final_day(project, actions, day) <= night
        ][-MOST_DAYS:]
        if not ended:
            continue
        ages = (final_day(project, actions, ended[-1]) - ended[-1]).days
        positive = (labels[objective.name] == 1).sum().alias("positive")
        present = labels[objective.name].is_not_null().sum().alias("present")
        counts, labelled = [0] * (ages + 1), 0
        for day in ended:
            events = scan_events(context, [day]).with_row_index(EVENT)
            for age in range(ages + 1):
                known = pl.col("known") <= day_number(day + timedelta(days=age))
                rows = with_actions(context, events, day, known)
                found_now = rows.select(positive, present).collect(engine="streaming").row(0)
                counts[age] += found_now[0]
            labelled += found_now[1]
        total = counts[-1]
        shares = [count / total if total else float("nan") for count in counts]
        found.append(Arrival(objective.name, ended, total, labelled, shares))
    return found
