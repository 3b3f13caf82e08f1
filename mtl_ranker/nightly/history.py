"""What each night did, kept as `history/D.json`: champion, quality, data, promotion, ranking, cost.

The champion is judged on the night's test days, which it was not trained on, or which its training
kept apart. They end with D, or earlier where labels of later days are not final. Alarms compare a
night with the nights before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from statistics import median
from typing import Any

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.evaluation.calibration_bounds import calibrated
from mtl_ranker.evaluation.influence import MEASURE_NAMES, Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Interval, model_quality
from mtl_ranker.evaluation.metrics import can_be_judged, quality_metric
from mtl_ranker.nightly.blend_search import predicted_by
from mtl_ranker.nightly.build import model_examples
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.results import Suite
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.scoring import Ranked
from mtl_ranker.workspace import Workspace

HISTORY = "history"
BEFORE = 7  # nights that a night is compared with
SLOWER = 2.0  # times the median duration of these


@dataclass(frozen=True, kw_only=True)
class ObjectiveRecord:
    """The champion on one objective of the test days.

    Attributes:
        measure: auc or r2.
        quality, gauc, calibration: None where the labels do not support them; calibration is the
            sum of predictions over the sum of labels.
        label_rate: mean of the labels; NaN without labels.
    """

    name: str
    measure: str
    label_rate: float
    quality: Interval | None = None
    gauc: Interval | None = None
    calibration: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class NightRecord:
    """A night.

    Attributes:
        day: D, the last day of the log.
        tested: the last test day; None: D.
        failed: why the night failed; other facts may then be missing.
        champion: version that is champion after the night.
        model: what that model is, in words.
        trained: its last test day.
        full: it trained every model from scratch (`training.start`).
        reason: the promotion's.
        rows: impressions of D.
        drift: warnings of `[drift]`.
        seconds: of the whole night; training_seconds of its networks, without trees.
        effects: rules and exploration, in words.
        exploration: relative change of the blended score by exploration; None without.
    """

    day: date
    tested: date | None = None
    failed: str | None = None
    champion: str | None = None
    model: str = ""
    trained: date | None = None
    promoted: bool = False
    full: bool = True
    reason: str = ""
    rows: int | None = None
    objectives: list[ObjectiveRecord] = field(default_factory=list)
    drift: list[str] = field(default_factory=list)
    seconds: float | None = None
    training_seconds: float | None = None
    ranked_rows: int | None = None
    ranked_users: int | None = None
    effects: list[str] = field(default_factory=list)
    exploration: float | None = None

    @property
    def age(self) -> int | None:
        """Days since the champion's last test day."""
        return None if self.trained is None else ((self.tested or self.day) - self.trained).days


@dataclass(frozen=True)
class Champion:
    """The model that is champion: its version, name and last test day."""

    artifact: RankerArtifact
    version: str
    model: str
    trained: date | None


def record_of(
    context: Context, suite: Suite, decision: Decision, champion: Champion, ranked: Ranked
) -> NightRecord:
    """The record of a night that ranked, without its duration.

    Of a night that runs again, a promotion whose version still is champion stays in the record.
    """
    day = suite.days.test[-1]
    promoted, reason = decision.promoted or decision.fallback is not None, decision.reason
    for before in stored(context.workspace):
        if before.day == suite.night and before.promoted and before.champion == champion.version:
            promoted, reason = True, before.reason
    # A champion of a later night, where this one runs again, was trained on these days.
    later = champion.trained is not None and champion.trained > day
    objectives = [] if later else champion_quality(context, champion.artifact, suite.days.test)
    events = context.workspace.scan("events", [suite.night])
    exploration = [effect.change for effect in ranked.effects if effect.step == "exploration"]
    return NightRecord(
        day=suite.night,
        tested=day,
        champion=champion.version,
        model=champion.model,
        trained=champion.trained,
        promoted=promoted,
        full=suite.plan.full,
        reason=reason,
        rows=events.select(pl.len()).collect().item(),
        objectives=objectives,
        drift=list(suite.drift.warnings),
        training_seconds=sum(run.trained.seconds for run in suite.trainings),
        ranked_rows=ranked.rows,
        ranked_users=ranked.users,
        effects=[str(effect) for effect in ranked.effects],
        exploration=exploration[0] if exploration else None,
    )


def champion_quality(
    context: Context, artifact: RankerArtifact, days: list[date]
) -> list[ObjectiveRecord]:
    """A model's quality and calibration on test days, by objective."""
    confidence = context.project.promotion.confidence
    rows = predicted_by(artifact, model_examples(context, artifact, days), context)
    labels, prediction = rows.labels, rows.prediction
    bounds = {each.objective: each.ratio for each in calibrated(artifact.tasks, rows, confidence)}
    clusters, records = Clusters.of(rows.user, rows.lists), []
    for t, task in enumerate(artifact.tasks):
        known = labels[~np.isnan(labels[:, t]), t]
        own = LabelledRows.of(task.kind, labels[:, t], clusters)
        found: dict[str, Interval | None] = {}
        for name in (quality_metric(task.kind), "gauc"):
            found[name] = None
            if can_be_judged(known) and (name != "gauc" or task.kind == "binary"):
                quality = model_quality(own, [prediction[:, t]], name, fixed=True)
                interval = quality.interval(confidence)
                found[name] = None if math.isnan(interval.value) else interval
        records.append(
            ObjectiveRecord(
                name=task.name,
                measure=quality_metric(task.kind),
                label_rate=float(known.mean()) if len(known) else math.nan,
                quality=found[quality_metric(task.kind)],
                gauc=found["gauc"],
                calibration=bounds[task.name],
            )
        )
    return records


def store(workspace: Workspace, record: NightRecord) -> None:
    """Publish the record of a night; a night that runs again replaces its record."""
    content = json.dumps(_plain(asdict(record)), indent=1, default=str, allow_nan=False)
    workspace.publish_file(f"{HISTORY}/{record.day}.json", content)


def stored(workspace: Workspace) -> list[NightRecord]:
    """The records of all nights, ascending."""
    files = workspace.files([p for p in workspace.places(HISTORY) if p.endswith(".json")])
    return [_record(json.loads(file.read_text("utf-8"))) for file in files]


def as_json(records: Sequence[NightRecord], project: Project) -> dict[str, Any]:
    """The records with their ages and alarms, as plain values; null where a number is missing."""
    warned = alarms(records, project)
    nights = [
        _plain(asdict(record)) | {"age_days": record.age, "alarms": warned[record.day]}
        for record in records
    ]
    return {"project": project.name, "nights": nights}


def alarms(records: Sequence[NightRecord], project: Project) -> dict[date, list[str]]:
    """What stands out on each night against the nights before it, in words.

    A quality whose interval lies below the median of the nights before, a calibration out of
    `promotion.max_calibration_ratio`, a label rate or a volume that changed by more than
    `drift.warn_label` or `drift.warn_volume`, twice the duration of nights that also trained every
    model or also continued the champion, and a failure.
    """
    found: dict[date, list[str]] = {}
    for number, record in enumerate(records):
        earlier = [each for each in records[:number] if each.failed is None][-BEFORE:]
        found[record.day] = [
            *([f"failed: {record.failed}"] if record.failed is not None else []),
            *_of_objectives(record, earlier, project),
            *_changed("impressions", record.rows, [e.rows for e in earlier], project),
            *_slower(record.seconds, [e.seconds for e in earlier if e.full == record.full]),
        ]
    return found


def _of_objectives(
    record: NightRecord, earlier: Sequence[NightRecord], project: Project
) -> list[str]:
    lines, ratio = [], project.promotion.max_calibration_ratio
    for own in record.objectives:
        before = [each for e in earlier for each in e.objectives if each.name == own.name]
        measure = MEASURE_NAMES[own.measure]
        for name, value in ((measure, own.quality), ("GAUC", own.gauc)):
            of = "gauc" if name == "GAUC" else "quality"
            past = [getattr(each, of).value for each in before if getattr(each, of) is not None]
            if value is not None and past and value.high < median(past):
                lines.append(
                    f"{name} of {own.name} {value.value:.4f} [{value.low:.4f}, {value.high:.4f}], "
                    f"median of the {len(past)} nights before {median(past):.4f}"
                )
        bound = own.calibration
        if bound is not None and not (bound.low <= ratio and bound.high >= 1 / ratio):
            lines.append(
                f"predictions of {own.name} are {bound.value:.2f} times the labels, "
                f"allowed {1 / ratio:.2f} to {ratio:.2f}"
            )
        rates = [each.label_rate for each in before if not math.isnan(each.label_rate)]
        middle = median(rates) if rates else 0.0
        if middle and abs(own.label_rate / middle - 1) > project.drift.warn_label:
            lines.append(f"mean of {own.name} {own.label_rate:.4f}, {middle:.4f} before")
    return lines


def _changed(
    what: str, value: float | None, before: Sequence[float | None], project: Project
) -> list[str]:
    past = [each for each in before if each]
    if value is None or not past or abs(value / median(past) - 1) <= project.drift.warn_volume:
        return []
    return [f"{value:,.0f} {what}, {median(past):,.0f} before"]


def _slower(value: float | None, before: Sequence[float | None]) -> list[str]:
    past = [each for each in before if each]
    if value is None or not past or value <= SLOWER * median(past):
        return []
    return [f"the night took {value:,.0f} s, {median(past):,.0f} s before"]


def prometheus(records: Sequence[NightRecord], project: Project) -> str:
    """The last night in Prometheus' text format, for the node exporter's textfile collector."""
    if not records:
        return ""
    last = records[-1]
    midnight = (last.day - date(1970, 1, 1)).days * 86_400
    gauges: list[tuple[str, str, dict[str, str], float | None]] = [
        ("night_day_seconds", "last night's day D, seconds since 1970", {}, midnight),
        ("night_failed", "1 if the last night failed", {}, float(last.failed is not None)),
        ("alarms", "what stands out", {}, len(alarms(records, project)[last.day])),
        ("champion_age_days", "days since the champion's last test day", {}, last.age),
        ("night_seconds", "duration of the night", {}, last.seconds),
        ("impressions", "rows of day D", {}, last.rows),
        ("ranked_rows", "rows of the ranking", {}, last.ranked_rows),
        ("drift_warnings", "warnings of [drift]", {}, len(last.drift)),
        ("exploration_change", "of the blended score", {}, last.exploration),
    ]
    picks: dict[str, Callable[[ObjectiveRecord], Interval | None]] = {
        "quality": lambda own: own.quality,
        "gauc": lambda own: own.gauc,
        "calibration_ratio": lambda own: own.calibration,
    }
    for name, pick in picks.items():
        for own in last.objectives:
            labels = {"objective": own.name}
            labels |= {"measure": own.measure} if name == "quality" else {}
            value = pick(own)
            number = None if value is None else value.value
            gauges.append((name, "of the champion", labels, number))
    for own in last.objectives:
        gauges.append(("label_rate", "mean label", {"objective": own.name}, own.label_rate))
    lines: list[str] = []
    for name, text, labels, number in gauges:
        if number is None or not math.isfinite(number):
            continue
        head = f"# HELP mtl_ranker_{name} {text}"
        if head not in lines:
            lines += [head, f"# TYPE mtl_ranker_{name} gauge"]
        pairs = ",".join(f'{k}="{v}"' for k, v in ({"project": project.name} | labels).items())
        lines.append(f"mtl_ranker_{name}{{{pairs}}} {number:.10g}")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """The same with text for dates and None for NaN."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, date):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(content: dict[str, Any]) -> NightRecord:
    """A stored record; keys that this version does not have are left out."""
    known = {each.name for each in fields(NightRecord)}
    content = {key: value for key, value in content.items() if key in known}
    content["day"] = date.fromisoformat(content["day"])
    for name in ("trained", "tested"):
        if content.get(name):
            content[name] = date.fromisoformat(content[name])
    content["objectives"] = [_objective(each) for each in content.get("objectives", [])]
    return NightRecord(**content)


def _objective(content: dict[str, Any]) -> ObjectiveRecord:
    known = {each.name for each in fields(ObjectiveRecord)}
    content = {key: value for key, value in content.items() if key in known}
    for name in ("quality", "gauc", "calibration"):
        if content.get(name) is not None:
            content[name] = Interval(**{k: _number(v) for k, v in content[name].items()})
    return ObjectiveRecord(**content | {"label_rate": _number(content["label_rate"])})


def _number(value: Any) -> Any:
    return math.nan if value is None else value
