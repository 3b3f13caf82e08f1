"""The documentation's Python code runs, and its automations are those of a night."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore, Posture

from flows.nightly import ALARM, raise_alarms
from tests.projects import project
from tests.reports.test_history import with_trouble

DOCS = Path(__file__).parents[1] / "docs"


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


def test_the_librarys_page_trains_on_frames_and_tensors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("library.md", "Train on a polars frame", "Read gates and experts")
    assert "expert 4" in capsys.readouterr().out
    assert (tmp_path / "gates.png").stat().st_size > 1_000
    assert (tmp_path / "losses.png").stat().st_size > 1_000
    run("library.md", "Train on a polars frame", "Train on tensors")


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
