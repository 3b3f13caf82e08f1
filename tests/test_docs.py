"""The code of the documentation: Python runs, commands, settings and automations exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
import yaml
from prefect.events.schemas.automations import AutomationCore, Posture
from pydantic import ValidationError

from flows.nightly import ALARM, raise_alarms
from mtl_ranker.commands.app import app
from mtl_ranker.config import Project
from tests.projects import project
from tests.reports.test_history import with_trouble

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted(DOCS.rglob("*.md")),
]


def sections(page: str) -> dict[str, str]:
    """Heading → the Python code of its section, in order."""
    parts = re.split(r"^## (.+)$", (DOCS / page).read_text("utf-8"), flags=re.MULTILINE)
    blocks = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {
        heading: "\n".join(blocks.findall(text))
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def run(page: str, *headings: str) -> dict[str, object]:
    """Run the code of these sections, one after the other, in one namespace."""
    names: dict[str, object] = {}
    for heading in headings:
        code = sections(page)[heading]
        assert code
        exec(compile(code, f"{page}, {heading}", "exec"), names)
    return names


@pytest.mark.slow
def test_the_librarys_page_trains_on_frames_and_tensors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("library.md", "Train on a polars frame", "Read gates and experts")
    assert "expert 4" in capsys.readouterr().out
    assert (tmp_path / "gates.png").stat().st_size > 1_000
    assert (tmp_path / "losses.png").stat().st_size > 1_000
    run("library.md", "Train on a polars frame", "Train on tensors")


def test_the_readme_trains_a_model():
    """With frames of the columns that it names."""
    (code,) = (text for page, text in blocks("python") if page == "README.md")
    rows = pl.DataFrame({"price": [0.1 * n for n in range(200)], "click": [0, 1] * 100})
    names: dict[str, Any] = {"train": rows[:150], "validate": rows[150:]}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].predict(rows).columns == ["click"]


@pytest.mark.slow
def test_the_librarys_page_runs_a_night(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("library.md", "Train on a polars frame", "A night, step by step")
    assert "rankings" in capsys.readouterr().out
    assert "objectives" in (tmp_path / "report.html").read_text("utf-8")


def test_every_section_with_code_is_run():
    assert list(sections("library.md")) == [
        "Train on a polars frame",
        "Read gates and experts",
        "Train on tensors",
        "A night, step by step",
    ]


def test_every_section_of_the_report_is_described():
    templates = (ROOT / "mtl_ranker/reports" / name for name in ("report.html", "lists.html"))
    text = "\n".join(file.read_text("utf-8") for file in templates)
    sections = re.findall(r"<h[23]>([^<]+)</h[23]>", text.replace("{{ day }}", "D"))
    described = re.findall(
        r"\*\*([^*]+?)\.?\*\*", (DOCS / "reading-the-report.md").read_text("utf-8")
    )
    assert {"Notes", "Lists of D", "Data health"} <= set(sections)
    assert set(sections) - {"Layer {{ loop.index }}"} <= set(described)


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Page and text of each block of code in this language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        for text in pattern.findall(page.read_text("utf-8")):
            yield str(page.relative_to(ROOT)), text


def command_lines(program: str) -> Iterator[tuple[str, str]]:
    """Page and arguments of each use of a program: lines of shell blocks, and inline code."""
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            found = re.match(rf"\s*(?:\.venv/bin/)?{program}(?: +(.*))?$", line)
            if found:
                yield page, found[1] or ""
    for page in PAGES:
        for arguments in re.findall(rf"`{program} ([^`]+)`", page.read_text("utf-8")):
            yield str(page.relative_to(ROOT)), arguments


@cache
def program() -> Any:
    return typer.main.get_command(app)


def parse(arguments: str) -> None:
    """Raise AssertionError for a command line of `mtl-ranker` whose command or option is none."""
    words = shlex.split(arguments, comments=True)
    if words and words[0].startswith("-"):
        return  # of the program itself: --help
    command = program()
    while hasattr(command, "commands") and words:
        name, *words = words
        for each in name.split("|"):
            assert each in command.commands, f"no command {each}"
        command = command.commands[name.split("|")[0]]
    known = {word for option in command.params for word in (*option.opts, *option.secondary_opts)}
    options = {word.split("=")[0].rstrip(",.") for word in words if word.startswith("-")}
    assert options <= known | {"--help"}, f"{sorted(options - known)}; allowed: {sorted(known)}"


@pytest.mark.parametrize(("page", "arguments"), sorted(set(command_lines("mtl-ranker"))))
def test_every_command_and_option_exists(page, arguments):
    parse(arguments)


@pytest.mark.parametrize("wrong", ["nightlyy -c a", "nightly --confg a", "study censuss"])
def test_a_command_that_does_not_exist_is_found(wrong):
    with pytest.raises(AssertionError):
        parse(wrong)


def test_every_target_of_make_and_module_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page, arguments in command_lines("make"):
        assert shlex.split(arguments, comments=True)[0] in targets, page
    for page, arguments in command_lines("python"):
        words = shlex.split(arguments, comments=True)
        if words and words[0] == "-m" and words[1].split(".")[0] in ("benchmarks", "flows"):
            assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file(), f"{page}: {words[1]}"


def test_shell_blocks_parse(tmp_path):
    script = "\n".join(f"# {page}\n{text}" for page, text in blocks("sh"))
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(("page", "text"), list(blocks("toml")))
def test_every_setting_of_an_example_exists(page, text):
    objective = {"name": "click", "group": "engagement", "label": "click"}
    content = {"objectives": [objective]} | tomllib.loads(text)
    try:
        Project.model_validate(content)
    except ValidationError as error:
        unknown = [
            e["loc"] for e in error.errors() if e["type"] in ("extra_forbidden", "literal_error")
        ]
        assert unknown == [], page


def test_the_automations_of_the_operations_page_expect_the_events_of_a_night():
    text = (DOCS / "operations.md").read_text("utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    made = [AutomationCore.model_validate(each) for each in yaml.safe_load(block)["automations"]]
    alarm, missed = (each.trigger for each in made)
    assert alarm.expect == {ALARM}
    assert alarm.posture is Posture.Reactive
    assert (missed.posture, missed.within.total_seconds()) == (Posture.Proactive, 26 * 3600)
    assert f"`{ALARM}`" in text


def test_alarms_of_a_night_are_printed(capsys):
    records = with_trouble(12)
    raise_alarms(project(), records[-1].day, records)
    printed = " ".join(capsys.readouterr().out.split())
    assert "alarm AUC of click 0.6800 [0.6700, 0.6900]" in printed
    assert "alarm predictions of long are 1.80 times the labels" in printed
    raise_alarms(project(), records[-3].day, records)
    assert not capsys.readouterr().out
