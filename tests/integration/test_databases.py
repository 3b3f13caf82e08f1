"""Prefect's database: its schema is made once per version, and copied into new workspaces."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest

from mtl_ranker.commands.serve import free_port, server
from mtl_ranker.stores.databases import template_of
from tests.integration.commands import environment

pytestmark = pytest.mark.slow


def test_the_step_of_the_installation_makes_what_a_new_workspace_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    command = [sys.executable, "-m", "mtl_ranker.commands.databases"]
    subprocess.run(command, env=environment(), check=True, timeout=600)
    assert template_of("mlflow").is_file()
    with sqlite3.connect(template_of("prefect")) as kept:
        assert kept.execute("select count(*) from flow_run").fetchone() == (0,)
        kept.execute("create table mark (n integer)")  # only a copy has it
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with server(tmp_path / "workspace", free_port()) as settings:
        assert settings["PREFECT_API_URL"].startswith("http://127.0.0.1:")
        with sqlite3.connect(tmp_path / "workspace/prefect/prefect.db") as database:
            assert database.execute("select count(*) from mark").fetchone() == (0,)
            assert database.execute("select count(*) from flow_run").fetchone() == (0,)
