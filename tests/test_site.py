"""The reference pages that `docs/hooks/reference.py` makes, and the pages of the site."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
import yaml

import mtl_ranker as mr
from mtl_ranker.config import Project
from mtl_ranker.logs.sources import open_context
from mtl_ranker.ranking.artifact import RegisteredRanker
from mtl_ranker.ranking.scoring import score_day
from tests.conftest import FIRST
from tests.features.test_actions import DAYS, Acted, Shown, build, one_each_day, write_world
from tests.projects import edit_project
from tests.ranking.test_scoring import HISTORY, random_ranker

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"hooks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return hook("reference")


@pytest.fixture(scope="module")
def messages() -> ModuleType:
    return hook("messages")


def test_every_setting_is_described(reference):
    found = {key.place: key.field.description for key in reference.settings_keys()}
    assert {"log.items.key", "objectives.kind", "scoring.rules.at_most.within"} <= set(found)
    assert "log.list" in found  # by its name in the file
    assert [place for place, words in found.items() if not words] == []


def test_the_page_of_settings_has_type_range_default_and_meaning(reference):
    page = reference.settings_page()
    assert page.count("\n| `") >= len(list(reference.settings_keys()))
    rows = {
        "| `name` | text | required | name of the prediction's column |",
        "| `weight_decay` | number (≥ 0) | `0.0001` | of matrices |",
        "| `confidence` | number (> 0.5, < 1) | `0.95` | of every interval and verdict |",
    }
    assert rows <= set(page.splitlines())
    headings = re.findall(r"^## `(.+)`$", page, re.MULTILINE)
    assert {"[log]", "[[objectives]]", "[log.ranges.COLUMN]", "[models.NAME]"} <= set(headings)
    assert len(headings) == len(set(headings))
    assert set(Project.model_fields) - {"name", "models"} <= {h.strip("[]") for h in headings}


def test_the_settings_are_of_the_only_version(reference):
    """A second version needs the version of each setting."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"All keys exist since version {version}." in reference.settings_page()


def test_the_page_of_commands_has_every_option(reference):
    page = reference.commands_page()
    assert "| `--format` | `mlflow` | An MLflow model, a torch.export program" in page
    assert "| `--config`, `-c` | required |" in page
    assert "## study census" in page


def test_every_error_message_has_a_remedy(messages):
    found = messages.messages()
    assert len(found) > 200
    assert [message for message in found if messages.remedy_of(message) is None] == []


def test_every_pattern_of_the_remedies_finds_a_message(messages):
    used = {messages.remedy_of(message) for message in messages.messages()}
    assert [each.pattern.pattern for each in messages.remedies() if each not in used] == []


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ('f"--from {first.date()} is after --to {last}"', "--from <first> is after --to <last>"),
        ("""f"{name!r} lacks {', '.join(n)}; " "run it\"""", "'<name>' lacks <…>; run it"),
        ('f"{path}: {log.user}" + (f" of {day:%Y}" "!")', "<path>: <user> of <day>!"),
        ('"\\n".join([f"{source}: wrong", *lines])', "<source>: wrong"),
        ('f"{place}: it has:\\n{table}"', "<place>: it has:"),
        ("str(error)", ""),
    ],
)
def test_formatted_values_are_named_in_messages(messages, code, text):
    assert messages.sentence(ast.parse(code, mode="eval").body) == text


def test_the_page_of_messages_has_a_section_for_each_area(messages):
    page = messages.messages_page()
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == list(messages.AREAS)
    block = next(part for part in page.split("\n\n") if "torch finds no such device" in part)
    text, remedy = block.split("\n")
    assert text.startswith("`` <key> = '<name>': torch finds no such device on this machine;")
    assert remedy == ":   Use a device that the message lists, or `auto`."


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))

    def pages(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        inner = entry.values() if isinstance(entry, dict) else entry
        return {page for each in inner for page in pages(each)}

    written = {str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md")}
    made = {"reference/settings.md", "reference/commands.md", "reference/messages.md"}
    made |= {"contributing.md", "benchmarks.md"}
    decisions = {page for page in written if page.startswith("decisions/")}  # by the hook
    assert pages(settings["nav"]) == (written | made) - decisions


def test_every_name_of_the_library_is_on_its_page():
    page = (DOCS / "reference/python.md").read_text("utf-8")
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert set(mr.__all__) - {"__version__", "Training"} <= listed
    assert "mr.Training" in page


def columns_of(page: str, dataset: str, names: dict[str, list[str]]) -> set[str]:
    """The columns that the page of datasets lists, with the names of a project filled in."""
    text = page.split(f"\n## {dataset}\n")[1].split("\n## ")[0]
    found: set[str] = set()
    for first in re.findall(r"^\| ([^|]+) \| (?!---)", text, re.MULTILINE):
        for written in first.replace("`", "").split(", "):
            filled = {written}
            for key, values in names.items():
                filled = {f.replace(key, v) for f in filled for v in (values if key in f else [""])}
            found |= filled
    return found


def test_the_page_of_datasets_lists_the_columns_of_actions_and_derived_features(tmp_path):
    shown = one_each_day([Shown(1, 1, "home", 24 * n + 3) for n in range(DAYS)])
    write_world(tmp_path, shown, [Acted(1, 1, 4, 0, 1)], [])
    pl.DataFrame({"i": [1], "price": [2.0], "at": [FIRST]}).write_parquet(
        tmp_path / "items.parquet"
    )
    items = {"path": "items.parquet", "key": "i", "columns": ["price"], "published": "at"}
    edit_project(
        tmp_path,
        log={"items": items},
        features={"numerics": ["price"], "derived": {"double": "2 * price"}},
        training={"immature": "soft", "sample_weight": "length(tab)"},
    )
    context = open_context(str(tmp_path / "project.toml"), tmp_path, tmp_path / "ws")
    examples = set(build(context).columns)
    extra = {"open_label_like", "sample_weight", "double", "item_age_days", "price"}
    assert extra <= examples
    page = (DOCS / "reference/datasets.md").read_text("utf-8")
    names = {
        "CONTEXT": ["tab"],
        "LOGGED": [],
        "TABLE": ["price"],
        "DERIVED": ["double"],
        "OBJECTIVE": ["like", "long"],
        "ENTITY": ["user", "item", "tab", "item_x_tab", "user_x_tab"],
        "SIGNAL": ["like", "long", "watched"],
        "WINDOW": ["1", "3"],
        "COLUMN": ["item_id"],
    }
    assert examples <= columns_of(page, "examples", names)
    actions = context.workspace.scan("actions/like", [FIRST]).collect_schema().names()
    assert {"column", *actions} == columns_of(page, "actions", {})


@pytest.mark.slow
def test_the_page_of_datasets_lists_every_published_column(tmp_path):
    scoring = {"top_k": 5, "exploration": {"temperature": 0.5}}
    context, artifact = random_ranker(tmp_path, features=HISTORY, scoring=scoring)
    ranked = score_day(context, RegisteredRanker(artifact, "7"), FIRST + timedelta(days=7))
    workspace = context.workspace
    page = (DOCS / "reference/datasets.md").read_text("utf-8")
    entities = ["user", "item", "tab", "item_x_tab", "user_x_item"]
    names = {
        "CONTEXT": ["tab"],
        "LOGGED": ["tab", "click", "play"],
        "KEY": ["user_id", "item_id", "tab"],
        "OBJECTIVE": ["click", "long"],
        "ENTITY": entities,
        "SIGNAL": ["click", "long"],
        "WINDOW": ["1", "3"],
        "COLUMN": ["item_id", "tab"],
    }
    published = {"rankings": set(pl.read_parquet_schema(ranked.path))}
    for dataset in ("events", "quarantine", "examples"):
        published[dataset] = set(workspace.scan(dataset, [FIRST]).collect_schema())
    sums = workspace.root.glob("aggregates/*/*/*.parquet")
    published["aggregates"] = {name for file in sums for name in pl.read_parquet_schema(file)}
    for dataset, columns in published.items():
        listed = columns_of(page, dataset, names)
        if dataset == "quarantine":
            listed |= columns_of(page, "events", names)
        assert columns <= listed, dataset
