"""The HTML report: self-contained, with words for every picture, and what sharing did."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mtl_ranker.config import load_project
from mtl_ranker.context import without_log
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.load_test import Serving
from mtl_ranker.reports.page import training_report, warnings_of, with_decision
from mtl_ranker.reports.tables import comparison_rows, comparison_table
from tests.nightly.test_suite import LAST, prepared
from tests.projects import write_project

MODELS = {
    "alone": {"preset": "single_task", "expert_hidden": [8]},
    "stack": {"preset": "ple", "expert_hidden": [8]},
}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def trained(tiny):
    write_project(tiny, models=MODELS, training={"epochs": 1})
    project, workspace = prepared(tiny)
    return load_project(str(tiny / "project.toml")), train_suite(
        without_log(project, workspace), LAST
    )


def test_page_is_self_contained_and_says_what_sharing_did(trained):
    project, suite = trained
    text = training_report(project, suite)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object")
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:"), (tag, attributes[key][:50])
        if tag == "img":
            assert len(attributes["alt"]) > 20
    # Data health, and the front of engagement against satisfaction.
    has_front = len({o.group for o in project.objectives}) == 2
    assert sum(tag == "img" for tag, _ in page.tags) == 3 * len(suite.runs) + 1 + has_front
    assert has_front == ("choices of weights" in text)
    for run in suite.runs:
        assert f"{run.trained.model.parameter_count():,}" in text
    words = " ".join(page.words)
    for name in ("alone", "stack", "mmoe", "click", "long", "base_rate", "Layer 2", "utilisation"):
        assert name in words
    assert len(suite.gains) == 4  # two models against the one that shares nothing
    for gain in suite.gains:
        assert gain.reference == "alone"
        assert f"{gain.gain.value:+.4f}" in text


def test_without_a_reference_the_page_says_how_to_get_one(tiny):
    project, workspace = prepared(tiny)
    suite = train_suite(without_log(project, workspace), LAST)
    assert suite.gains == []
    assert "single_task" in training_report(project, suite)


def test_warnings_carry_the_trainings_name(trained):
    _, suite = trained
    for words in warnings_of(suite):
        assert words.split(" seed ")[0] in ("alone", "stack", "mmoe")


def test_the_decision_takes_its_place_and_a_later_one_replaces_it(trained):
    project, suite = trained
    text = training_report(project, suite)
    assert "Not compared yet" in text
    better, unclear = Interval(0.02, 0.01, 0.03), Interval(-0.01, -0.03, 0.01)
    serving = Serving(1.5, 12.0)
    first = Decision(True, "promoted: it is better", better, {"click": better}, serving)
    page = with_decision(text, first, "2", "1", 0.9)
    assert "Not compared yet" not in page
    words = " ".join(" ".join(Page(page).words).split())
    assert "promoted: it is better." in words
    assert "Challenger (version 2) less champion (version 1)" in words
    assert "90 % intervals" in words
    assert "click +0.0200 [ +0.0100 , +0.0300 ] yes: better" in words.replace("[", "[ ").replace(
        "]", " ]"
    ).replace(", +0.0300", " , +0.0300")
    assert "12.0 s for a million rows, 1.5 MB" in words
    second = Decision(False, "kept the champion", unclear, {"click": unclear})
    again = with_decision(page, second, "2", "1", 0.9)
    assert "promoted: it is better" not in again
    assert again.count("no: within the noise") == 2
    assert again == with_decision(again, second, "2", "1", 0.9)
    assert again.split("<h2>Objectives")[1] == text.split("<h2>Objectives")[1]


@pytest.mark.parametrize("width", [*range(60, 100, 3), 80, 140])
def test_the_terminals_table_cuts_no_number(trained, width):
    _, suite = trained
    console = Console(width=width, file=io.StringIO())
    console.print(comparison_table(suite, width))
    text = console.file.getvalue()
    assert "…" not in text
    for row in comparison_rows(suite):
        assert row["quality"] in text
        assert row["interval"] in text
    (headings,) = [line for line in text.splitlines() if line.strip().startswith("objective")]
    assert "ECE" in headings or width < 140
    assert "calib" not in headings or width > 80
    assert ("in a wider terminal" in " ".join(text.split())) == ("ECE" not in headings)
