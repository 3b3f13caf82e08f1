"""The HTML report: self-contained, with words for every picture, and what sharing did."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from mtl_ranker.config import load_project
from mtl_ranker.evaluation.report import training_report, warnings_of
from mtl_ranker.training.suite import train_suite
from tests.training.test_suite import LAST, prepared

MODELS = """
[models.alone]
preset = "single_task"
expert_hidden = [8]
[models.stack]
preset = "ple"
expert_hidden = [8]
[models.mmoe]
"""


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
    text = (tiny / "project.toml").read_text().replace("[models.mmoe]\n", MODELS)
    text = text.replace("epochs = 2", "epochs = 1")
    (tiny / "project.toml").write_text(text)
    project, workspace = prepared(tiny)
    return load_project(str(tiny / "project.toml")), train_suite(project, workspace, LAST)


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
    assert sum(tag == "img" for tag, _ in page.tags) == 3 * len(suite.runs) + 1  # data health
    words = " ".join(page.words)
    for name in ("alone", "stack", "mmoe", "click", "long", "base_rate", "Layer 2", "utilisation"):
        assert name in words
    assert len(suite.gains) == 4  # two models against the one that shares nothing
    for gain in suite.gains:
        assert gain.reference == "alone"
        assert f"{gain.gain.value:+.4f}" in text


def test_without_a_reference_the_page_says_how_to_get_one(tiny):
    project, workspace = prepared(tiny)
    suite = train_suite(project, workspace, LAST)
    assert suite.gains == []
    assert "single_task" in training_report(project, suite)


def test_warnings_carry_the_trainings_name(trained):
    _, suite = trained
    for words in warnings_of(suite):
        assert words.split(" seed ")[0] in ("alone", "stack", "mmoe")
