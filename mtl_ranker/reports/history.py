"""The page of all nights, `reports/index.html`: curves, alarms, links to the nights' reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import PurePath

import numpy as np
from rich import box
from rich.table import Table

from mtl_ranker.config import Project
from mtl_ranker.errors import counted
from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.nightly.history import NightRecord, ObjectiveRecord, alarms, stored
from mtl_ranker.nightly.results import report_place
from mtl_ranker.reports.page import template
from mtl_ranker.workspace import Workspace

SHOWN = 90  # latest nights on the page
WIDTH, HEIGHT, EDGE = 260.0, 96.0, 6.0  # of a chart, in its own units
LEFT = 52.0  # for the ends of the vertical axis


@dataclass(frozen=True)
class Point:
    """A night in a chart: its place, the ends of its interval, and its text."""

    x: float
    y: float
    low: float
    high: float
    text: str
    alarm: bool
    promoted: bool


@dataclass(frozen=True)
class Chart:
    """A number over nights.

    Attributes:
        latest: the last value in words.
        ends: largest and smallest value, ends of intervals included, each with its height.
        lines: polylines through consecutive nights with a value.
    """

    title: str
    latest: str
    ends: list[tuple[float, str]]
    points: list[Point]
    lines: list[str]


def publish_index(workspace: Workspace, project: Project) -> PurePath | None:
    """Publish `reports/index.html` of the recorded nights; None without any."""
    records = stored(workspace)
    if not records:
        return None
    return workspace.publish_file("reports/index.html", history_page(project, records, workspace))


def history_page(project: Project, records: Sequence[NightRecord], workspace: Workspace) -> str:
    """The page as self-contained HTML; its links are to the reports beside it.

    Args:
        records: of at least one night, ascending.
        workspace: whose reports are linked, if they exist.
    """
    warned = alarms(records, project)
    shown = records[-SHOWN:]
    names = list(dict.fromkeys(own.name for record in shown for own in record.objectives))
    groups = {objective.name: objective.group for objective in project.objectives}
    return template("history.html").render(
        project=project,
        nights=list(reversed(shown)),
        left_out=len(records) - len(shown),
        last=records[-1],
        alarms=warned,
        names=names,
        groups=groups,
        by_objective={name: _objective_charts(shown, warned, name) for name in names},
        charts=_night_charts(shown, warned),
        linked={r.day for r in shown if workspace.has(report_place(r.day))},
        counted=counted,
        width=WIDTH,
        height=HEIGHT,
    )


def history_table(records: Sequence[NightRecord], project: Project, width: int) -> Table:
    """The nights for a terminal, oldest first, with the number of alarms of each."""
    warned = alarms(records, project)
    names = list(dict.fromkeys(own.name for record in records for own in record.objectives))
    table = Table(box=box.SIMPLE_HEAD, title=f"{project.name}: {counted(len(records), 'night')}")
    table.title_justify = "left"
    table.add_column("night", no_wrap=True)
    table.add_column("champion", no_wrap=True)
    for heading in ("age", *names, "rows", "ranked", "seconds", "alarms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        own = {each.name: each.quality for each in record.objectives}
        champion = f"{record.champion or '–'}{' *' if record.promoted else ''}"
        table.add_row(
            str(record.day),
            champion if width < 100 else f"{champion} {record.model}",
            _whole(record.age),
            *(_four(own.get(name)) for name in names),
            _whole(record.rows),
            _whole(record.ranked_rows),
            _whole(record.seconds),
            str(len(warned[record.day]) or ""),
            style="red" if warned[record.day] else None,
        )
    table.caption = "* promoted; quality of the champion on the test day: AUC, or R²"
    table.caption_justify = "left"
    return table


Warned = Mapping[date, Sequence[str]]  # day → alarms


def _objective_charts(records: Sequence[NightRecord], warned: Warned, name: str) -> list[Chart]:
    """Charts of one objective: quality, GAUC, calibration and label rate."""

    def own(record: NightRecord) -> ObjectiveRecord | None:
        return next((each for each in record.objectives if each.name == name), None)

    measure = next(o.measure for o in map(own, records) if o is not None)
    picks: list[tuple[str, Callable[[ObjectiveRecord], Interval | None]]] = [
        (MEASURE_NAMES[measure], lambda o: o.quality),
        ("GAUC", lambda o: o.gauc),
        ("calibration ratio", lambda o: o.calibration),
        ("mean label", lambda o: Interval(o.label_rate, o.label_rate, o.label_rate)),
    ]
    charts = []
    for title, pick in picks:
        values = [None if (o := own(record)) is None else pick(o) for record in records]
        if any(value is not None for value in values):
            about = {"calibration ratio": f"predictions of {name}", "mean label": f"mean of {name}"}
            mark = f"{about.get(title, f'{title} of {name}')} "
            charts.append(_chart(title, records, values, _marked(records, warned, mark)))
    return charts


def _night_charts(records: Sequence[NightRecord], warned: Warned) -> list[Chart]:
    """Charts of whole nights: volume, rows ranked, duration, the champion's age, exploration."""
    picks: list[tuple[str, Callable[[NightRecord], float | None], str | None]] = [
        ("impressions", lambda r: r.rows, "impressions, "),
        ("rows ranked", lambda r: r.ranked_rows, None),
        ("seconds", lambda r: r.seconds, "s before"),
        ("champion's age in days", lambda r: r.age, None),
        ("score by exploration", lambda r: r.exploration, None),
    ]
    charts = []
    for title, pick, mark in picks:
        numbers = [pick(record) for record in records]
        values = [None if v is None else Interval(float(v), float(v), float(v)) for v in numbers]
        if any(value is not None for value in values):
            charts.append(_chart(title, records, values, _marked(records, warned, mark)))
    return charts


def _marked(records: Sequence[NightRecord], warned: Warned, mark: str | None) -> list[bool]:
    """Whether each night has an alarm with these words."""
    if mark is None:
        return [False] * len(records)
    return [any(f" {mark}" in f" {line}" for line in warned[record.day]) for record in records]


def _chart(
    title: str,
    records: Sequence[NightRecord],
    values: Sequence[Interval | None],
    marked: Sequence[bool],
) -> Chart:
    known = [v for v in values if v is not None and np.isfinite(v.value)]
    ends = [end for v in known for end in (v.low, v.high, v.value) if np.isfinite(end)]
    least, most = min(ends, default=0.0), max(ends, default=1.0)
    bottom, top = least, most
    room = 0.08 * (top - bottom) or max(abs(top), 1.0) * 0.05
    bottom, top = bottom - room, top + room

    def height(value: float) -> float:
        return HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (value - bottom) / (top - bottom)

    step = (WIDTH - LEFT - EDGE) / max(len(records) - 1, 1)
    points: list[Point] = []
    lines: list[list[str]] = []
    line: list[str] = []
    for number, (record, value) in enumerate(zip(records, values, strict=True)):
        if value is None or not np.isfinite(value.value):
            lines, line = [*lines, line], []
            continue
        low, high = (value.value if np.isnan(end) else end for end in (value.low, value.high))
        x, y = LEFT + number * step, height(value.value)
        text = f"{record.day}: {_words(value)}"
        points.append(Point(x, y, height(low), height(high), text, marked[number], record.promoted))
        line = [*line, f"{x:.1f},{y:.1f}"]
    joined = [" ".join(each) for each in [*lines, line] if len(each) > 1]
    latest = _words(known[-1]) if known else "–"
    marks = [(height(value), _short(value)) for value in dict.fromkeys((most, least))]
    return Chart(title, latest, marks if known else [], points, joined)


def _words(value: Interval) -> str:
    if value.low < value.high:
        return f"{_short(value.value)} [{_short(value.low)}, {_short(value.high)}]"
    return _short(value.value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _four(value: Interval | None) -> str:
    return "–" if value is None else f"{value.value:.4f}"
