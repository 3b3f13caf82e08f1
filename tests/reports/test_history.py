"""The page of all nights is self-contained, links reports that exist and marks alarms."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import date

from rich.console import Console

from mtl_ranker.nightly.history import NightRecord, store
from mtl_ranker.ranking.rules import Effect, ListScore
from mtl_ranker.reports.history import history_page, history_table, publish_index
from mtl_ranker.reports.page import with_lists
from mtl_ranker.workspace import Workspace
from tests.nightly.test_history import nights, objective
from tests.projects import project
from tests.reports.test_page import Page


def with_trouble(count: int) -> list[NightRecord]:
    """Nights of which one failed, and the last is worse."""
    records = nights(count)
    records[-4] = NightRecord(day=records[-4].day, failed="no space <left> on device")
    worse = [objective("click", 0.68), objective("long", 0.65, ratio=1.8)]
    records[-1] = replace(records[-1], objectives=worse)
    return records


def test_page_is_self_contained_and_links_the_reports_beside_it(tmp_path):
    workspace, records = Workspace(tmp_path), with_trouble(12)
    workspace.publish_file(f"reports/{records[3].day}.html", "report")
    assert publish_index(workspace, project()) is None
    for record in records:
        store(workspace, record)
    place = publish_index(workspace, project())
    assert place == tmp_path / "reports/index.html"
    text = place.read_text("utf-8")
    page = Page(text)
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links == [f"{records[3].day}.html"]
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "img")
        assert attributes.get("src") is None
        if tag == "svg":
            assert len(attributes["aria-label"]) > 20
    words = " ".join(" ".join(page.texts).split())
    assert "no space <left> on device" in words
    assert "AUC of click 0.6800" in words
    assert "kept the champion: not significant" in words
    # Red on the charts: AUC and GAUC of click, calibration of long; the failed night has no point.
    alarms = [a for tag, a in page.tags if tag == "circle" and a.get("class") == "alarm"]
    assert len(alarms) == 3
    rows = [a.get("class") for tag, a in page.tags if tag == "tr"]
    assert rows.count("alarm") == 2


def test_points_of_a_chart_by_hand(tmp_path):
    """Three nights, the second failed: two points at the ends, and no line between them."""
    records = nights(3)
    records[1] = NightRecord(day=records[1].day, failed="why")
    text = history_page(project(), records, Workspace(tmp_path))
    chart = text.split("<figure>")[-2]  # the champion's age, in days: 0 and 2
    assert "champion&#39;s age in days" in chart
    places = [a for tag, a in Page(chart).tags if tag == "circle"]
    assert [p["cx"] for p in places] == ["52.0", "254.0"]
    # 0 to 2 with 8 % of room: 84 units of height from 90 upwards.
    expected = [90 - 84 * (v + 0.16) / 2.32 for v in (0.0, 2.0)]
    assert [float(p["cy"]) for p in places] == [round(v, 1) for v in expected]
    assert "polyline" not in [tag for tag, _ in Page(chart).tags]


def test_table_fits_a_terminal():
    records = with_trouble(6)
    for width in (100, 140):
        console = Console(width=width, file=io.StringIO())
        console.print(history_table(records, project(), width))
        text = console.file.getvalue()
        assert "0.6800" in text
        assert "…" not in text


def test_effects_are_inserted_once_into_a_report():
    score = ListScore(20.0, 10.0, 12)
    effect = Effect("fresh", 3, 4, score, replace(score, total=19.0))
    page = "<p>a</p><!-- lists --><!-- /lists --><p>b</p>"
    once = with_lists(page, date(2026, 3, 9), [effect])
    assert once == with_lists(once, date(2026, 3, 9), [effect])
    cells = [text for text in Page(once).texts if text.strip()]
    row = cells[cells.index("fresh") :]
    assert row[:8] == ["fresh", "3", "4", "12", "12", "2.0000", "1.9000", "-5.00 %"]
    assert with_lists(page, date(2026, 3, 9), []).count("<p>") == 2
    assert with_lists("an earlier page", date(2026, 3, 9), [effect]) == "an earlier page"
