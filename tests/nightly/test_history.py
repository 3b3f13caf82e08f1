"""Records of nights: what stands out, what is stored, and what other tools read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import date, timedelta
from pathlib import PurePath

import numpy as np
import pytest

from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.nightly.history import (
    Champion,
    NightRecord,
    ObjectiveRecord,
    alarms,
    as_json,
    champion_quality,
    prometheus,
    record_of,
    store,
    stored,
)
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.scoring import Ranked
from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST
from tests.nightly.test_suite import LAST, prepared
from tests.projects import project


def objective(name: str, auc: float, ratio: float = 1.0, rate: float = 0.3) -> ObjectiveRecord:
    return ObjectiveRecord(
        name=name,
        measure="auc",
        label_rate=rate,
        quality=Interval(auc, auc - 0.01, auc + 0.01),
        gauc=Interval(auc - 0.05, auc - 0.07, auc - 0.03),
        calibration=Interval(ratio, ratio * 0.9, ratio * 1.1),
    )


def nights(count: int) -> list[NightRecord]:
    """Calm nights: a promotion every fifth one, small changes otherwise."""
    rng = np.random.default_rng(0)
    found: list[NightRecord] = []
    for n in range(count):
        day, promoted = FIRST + timedelta(days=n), n % 5 == 0
        noise = rng.normal(0, 0.002, 2)
        found.append(
            NightRecord(
                day=day,
                champion=str(n // 5 + 1),
                model="mmoe, refit",
                trained=day - timedelta(days=n % 5),
                promoted=promoted,
                reason="promoted: better" if promoted else "kept the champion: not significant",
                rows=10_000 + int(rng.integers(0, 900)),
                objectives=[
                    objective("click", 0.72 + noise[0]),
                    objective("long", 0.65 + noise[1]),
                ],
                seconds=100.0 + n,
                training_seconds=80.0,
                ranked_rows=2_000,
                ranked_users=400,
                effects=["fresh: blended score 0.2000 to 0.1990 (-0.50%) in 400 lists"],
                exploration=-0.004,
            )
        )
    return found


def test_calm_nights_have_no_alarms():
    assert not any(alarms(nights(12), project()).values())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"objectives": [objective("click", 0.70)]},
            "AUC of click 0.7000 [0.6900, 0.7100], median",
        ),
        ({"objectives": [objective("click", 0.72, ratio=1.7)]}, "1.70 times the labels"),
        (
            {"objectives": [objective("click", 0.72, rate=0.6)]},
            "mean of click 0.6000, 0.3000 before",
        ),
        ({"rows": 2_000}, "2,000 impressions, "),
        ({"seconds": 300.0}, "300 s, 103 s before"),
        ({"failed": "disk full", "objectives": []}, "failed: disk full"),
    ],
)
def test_what_stands_out(change, line):
    records = nights(8)
    records[-1] = replace(records[-1], **change)
    (found,) = [lines for day, lines in alarms(records, project()).items() if lines]
    assert any(line in each for each in found), found
    assert alarms(records, project())[records[-1].day] == found


def test_full_trainings_are_not_slower_than_continued_ones():
    records = nights(6)
    for n in (1, 2, 3, 5):
        records[n] = replace(records[n], full=False, seconds=30.0)
    assert not any(alarms(records, project()).values())
    records[5] = replace(records[5], seconds=61.0)
    assert list(filter(None, alarms(records, project()).values())) == [
        ["the night took 61 s, 30 s before"]
    ]


def test_a_failed_night_is_no_standard_for_later_ones():
    records = nights(3)
    records[1] = replace(records[0], day=records[1].day, failed="disk full", seconds=1.0, rows=90)
    assert list(filter(None, alarms(records, project()).values())) == [
        ["failed: disk full", "90 impressions, 10,277 before"]
    ]


def test_records_are_stored_and_read_again(tmp_path):
    workspace, records = Workspace(tmp_path), nights(2)
    unknown = replace(objective("long", 0.6), gauc=None, label_rate=math.nan)
    half = replace(unknown, quality=Interval(0.6, math.nan, math.nan, "few labels"))
    records[1] = replace(records[1], objectives=[half])
    for record in reversed(records):
        store(workspace, record)
    first, second = stored(workspace)
    assert first == records[0]
    assert second.objectives[0].quality.note == "few labels"
    assert math.isnan(second.objectives[0].quality.low)
    assert math.isnan(second.objectives[0].label_rate)
    assert second.objectives[0].gauc is None
    # A later version's record has keys that this one does not know.
    file = tmp_path / f"history/{records[0].day}.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"new": 1}))
    assert stored(workspace)[0] == records[0]
    plain = json.loads(json.dumps(as_json([first, second], project()), allow_nan=False))
    assert [night["age_days"] for night in plain["nights"]] == [0, 1]
    assert plain["nights"][1]["objectives"][0]["label_rate"] is None


def test_metrics_of_the_last_night():
    text = prometheus(nights(3), project())
    assert 'mtl_ranker_champion_age_days{project="tiny"} 2\n' in text
    assert 'mtl_ranker_night_failed{project="tiny"} 0\n' in text
    assert 'mtl_ranker_exploration_change{project="tiny"} -0.004\n' in text
    assert 'mtl_ranker_label_rate{project="tiny",objective="long"} 0.3\n' in text
    lines = text.splitlines()
    assert lines.count("# TYPE mtl_ranker_quality gauge") == 1
    samples = [line for line in lines if not line.startswith("#")]
    assert len(set(samples)) == len(samples)
    # Samples of a metric follow its description, as the format demands.
    for line in samples:
        name = line.split("{")[0]
        before = lines[lines.index(f"# TYPE {name} gauge") + 1 : lines.index(line)]
        assert all(each.startswith(f"{name}{{") for each in before)
    assert "nan" not in text
    assert prometheus([], project()) == ""


@pytest.mark.slow
def test_the_champion_is_measured_on_the_test_days(tiny):
    """As the suite measures the same model on the same rows."""
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    records = champion_quality(context, suite.winner.artifact, suite.days.test)
    assert [record.name for record in records] == ["click", "long"]
    for t, record in enumerate(records):
        metrics = suite.winner.metrics[record.name]
        assert record.quality.value == pytest.approx(metrics["auc"], abs=1e-6)
        assert record.gauc.value == pytest.approx(metrics["gauc"], abs=1e-6)
        labels = suite.held_out.labels[:, t]
        assert record.label_rate == pytest.approx(np.nanmean(labels))
        if record.calibration is not None:
            assert record.calibration.value == pytest.approx(metrics["calibration"], abs=1e-5)
    assert records[0].quality.low < records[0].quality.value < records[0].quality.high


@pytest.mark.slow
def test_a_night_that_runs_again_keeps_its_promotion_in_the_record(tiny):
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    ranked = Ranked(path=PurePath("rankings"), candidates=4, users=2, rows=4, repeated=0)

    def recorded(version: str, decision: Decision) -> tuple[bool, str]:
        champion = Champion(suite.winner.artifact, version, suite.winner.name, LAST)
        record = record_of(context, suite, decision, champion, ranked)
        store(context.workspace, record)
        return record.promoted, record.reason

    first = Decision(True, "promoted: better")
    again = Decision(False, "version 3 is champion already")
    assert recorded("3", first) == (True, "promoted: better")
    assert recorded("3", again) == (True, "promoted: better")
    kept = Decision(False, "kept the champion: not significant")
    assert recorded("2", kept) == (False, "kept the champion: not significant")  # 3 was rolled back


def test_the_age_is_that_of_the_training():
    record = NightRecord(day=date(2026, 3, 9), trained=date(2026, 3, 2))
    assert record.age == 7
    assert NightRecord(day=date(2026, 3, 9)).age is None


def test_a_night_is_known_by_its_own_day_although_it_tests_on_an_earlier_one(tmp_path):
    """A longer window moves the test day back; the night stays after the nights before it."""
    workspace = Workspace(tmp_path)
    before = NightRecord(day=date(2026, 3, 8), tested=date(2026, 3, 8), failed="no actions")
    after = NightRecord(
        day=date(2026, 3, 9), tested=date(2026, 3, 6), trained=date(2026, 3, 5), rows=40
    )
    store(workspace, after)
    store(workspace, before)
    assert stored(workspace) == [before, after]
    assert after.age == 1
    text = prometheus(stored(workspace), project())
    midnight = (date(2026, 3, 9) - date(1970, 1, 1)).days * 86_400
    assert f'mtl_ranker_night_day_seconds{{project="tiny"}} {midnight}\n' in text
    assert 'mtl_ranker_night_failed{project="tiny"} 0\n' in text
