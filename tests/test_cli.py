"""The command line: help, examples, completion and dry runs."""

from __future__ import annotations

import shlex

import pytest
import typer
from typer.testing import CliRunner

from mtl_ranker.commands.app import EXAMPLES, app

COMMANDS = typer.main.get_command(app)


def test_every_command_shows_an_example():
    names = set(COMMANDS.commands) - {"study"}
    assert names == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_valid_command(name):
    program, command, *arguments = shlex.split(EXAMPLES[name])
    assert (program, command) == ("mtl-ranker", name)
    # Parsed, with all required options, but not run.
    COMMANDS.commands[name].make_context(name, arguments)


def test_completion_offers_the_commands():
    variables = {
        "_MTL_RANKER_COMPLETE": "complete_bash",
        "COMP_WORDS": "mtl-ranker ro",
        "COMP_CWORD": "1",
    }
    done = CliRunner().invoke(app, [], prog_name="mtl-ranker", env=variables)
    assert done.output.split() == ["rollback"]


@pytest.mark.parametrize("name", ["ingest", "features", "train", "score", "nightly"])
def test_a_dry_run_writes_nothing(name, tiny, tmp_path):
    workspace = tmp_path / "none"
    project = str(tiny / "project.toml")
    options = ["-c", project, "-d", str(tiny), "-w", str(workspace), "--dry-run"]
    done = CliRunner().invoke(app, [name, *options])
    assert done.exit_code == 0, done.output
    assert done.output.strip()
    assert ("everything would be built" in done.output) == (name != "score")
    assert not workspace.exists()
