"""The HTML report is self-contained, describes every picture and shows the effect of sharing."""

from __future__ import annotations

import io
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mtl_ranker.evaluation.intervals import ONE_SEED, Interval
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.load_test import Serving
from mtl_ranker.reports.page import training_report, warnings_of, with_decision
from mtl_ranker.reports.tables import comparison_rows, comparison_table
from tests.nightly.test_suite import LAST, prepared
from tests.projects import edit_project, write_project

MODELS = {
    "alone": {"preset": "single_task", "expert_hidden": [8]},
    "stack": {"preset": "ple", "expert_hidden": [8]},
}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def trained(tiny):
    write_project(tiny, models=MODELS, training={"epochs": 1})
    context = prepared(tiny)
    return context.project, train_suite(context, LAST)


def test_page_is_self_contained_and_shows_the_gains_of_sharing(trained):
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
    page_text = " ".join(page.texts)
    for name in ("alone", "stack", "mmoe", "click", "long", "base_rate", "Layer 2", "utilisation"):
        assert name in page_text
    assert len(suite.gains) == 4  # two models against the one that shares nothing
    for gain in suite.gains:
        assert gain.reference == "alone"
        assert f"{gain.gain.value:+.4f}" in text


def test_without_a_reference_the_page_explains_how_to_add_one(tiny):
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    assert suite.gains == []
    assert "single_task" in training_report(context.project, suite)


@pytest.mark.slow
def test_the_cost_counts_each_network_once(tiny):
    """Trees beside a network and trees alone have no training of their own; a refit has one."""
    write_project(tiny, models={}, training={"epochs": 1, "trees": 3, "refit": True})
    context = prepared(tiny)
    suite = train_suite(context, LAST)
    networks = {id(run.trained): run.trained for run in suite.runs}
    assert len(networks) < len(suite.runs)
    assert any(run.name == "trees alone" for run in suite.runs)
    seconds = sum(trained.seconds for trained in networks.values())
    text = " ".join(Page(training_report(context.project, suite)).texts)
    assert f"{seconds:,.0f} s of training for {len(networks)} networks" in text
    assert text.count("the network of ") == len(suite.runs) - len(networks)


def test_warnings_name_their_training(trained):
    _, suite = trained
    for warning in warnings_of(suite):
        assert warning.split(" seed ")[0] in ("alone", "stack", "mmoe", "linear")


def test_a_training_whose_best_epoch_is_the_last_allowed_is_warned_of(trained):
    _, suite = trained  # one epoch is allowed
    capped = [w for w in warnings_of(suite) if w.endswith("raise training.epochs")]
    assert len(capped) == len({id(run.trained) for run in suite.runs})
    assert all("the best epoch of click, long is the last one allowed (1)" in w for w in capped)


def test_the_decision_is_inserted_and_a_later_one_replaces_it(trained):
    project, suite = trained
    text = training_report(project, suite)
    assert "Not compared yet" in text
    better, unclear = Interval(0.02, 0.01, 0.03), Interval(-0.01, -0.03, 0.01)
    serving = Serving(1.5, 12.0)
    first = Decision(True, "promoted: it is better", better, {"click": better}, serving)
    page = with_decision(text, first, "2", "1", 0.9)
    assert "Not compared yet" not in page
    page_text = " ".join(" ".join(Page(page).texts).split())
    assert "promoted: it is better." in page_text
    assert "Challenger (version 2) minus champion (version 1)" in page_text
    assert "90 % intervals over users" in page_text
    assert "click +0.0200 [+0.0100, +0.0300] yes: better" in page_text
    assert "12.0 s for a million rows, 1.5 MB" in page_text
    second = Decision(False, "kept the champion", unclear, {"click": unclear})
    replaced = with_decision(page, second, "2", "1", 0.9)
    assert "promoted: it is better" not in replaced
    assert replaced.count("no: the interval contains zero") == 2
    assert replaced == with_decision(replaced, second, "2", "1", 0.9)
    assert replaced.split("<h2>Objectives")[1] == text.split("<h2>Objectives")[1]
    alone = Interval(0.02, 0.01, 0.03, ONE_SEED)
    third = Decision(True, "promoted", alone, {"click": alone})
    without_verdict = with_decision(page, third, "2", "1", 0.9)
    assert without_verdict.count(ONE_SEED) == text.count(ONE_SEED) + 2
    assert "yes: better" not in without_verdict
    assert "where the spread of training seeds is known, seeds." in " ".join(page.split())
    model = with_decision(page, replace(first, against="item popularity"), "1", None, 0.9)
    assert "minus item popularity on the same test rows" in " ".join(model.split())
    assert "90 % intervals over users, for this training." in " ".join(model.split())


@pytest.mark.slow
def test_the_table_of_one_seed_says_that_it_is_no_verdict_on_models(trained, tiny):
    project, suite = trained
    assert "Intervals cover users. A verdict" in " ".join(training_report(project, suite).split())
    assert comparison_table(suite, 140).caption.split("\n")[0].endswith(f"over users ({ONE_SEED})")
    edit_project(tiny, training={"seeds": [0, 1]})
    several = train_suite(prepared(tiny), LAST)
    assert comparison_table(several, 140).caption.split("\n")[0].endswith("over users and seeds")


def test_the_table_fits_a_terminal_without_cutting_numbers(trained):
    _, suite = trained
    for width in (*range(60, 100, 3), 80, 140):
        fits(suite, width)


def fits(suite, width):
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
