"""The Prefect server that a command starts."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from mtl_ranker.commands.serve import _without_schema


@pytest.mark.parametrize("part", ["API", "SERVER"])
def test_a_home_whose_settings_name_another_database_gets_none(tmp_path, part):
    variables = {
        "PREFECT_HOME": str(tmp_path),
        f"PREFECT_{part}_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////elsewhere/prefect.db",
    }
    with ExitStack() as creating:
        assert _without_schema(variables, creating) is None
    assert list(tmp_path.iterdir()) == []
