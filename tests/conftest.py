"""Shared fixtures: small real projects on disk, never mocks."""

from __future__ import annotations

import os
import shutil
import tempfile
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from hypothesis import settings

from mtl_ranker.environment import prepare
from mtl_ranker.logs.simulate import Feed, simulate
from tests.hosts import hosts
from tests.projects import write_project

__all__ = ["hosts"]

SHARED = Path(os.environ.get("MTL_RANKER_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))
FIRST = date(2026, 3, 2)


settings.register_profile("mtl-ranker", deadline=None)  # no test asserts a time
settings.load_profile("mtl-ranker")


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.mkdtemp(prefix="mtl-ranker-tests-")
    config.add_cleanup(partial(shutil.rmtree, folder, ignore_errors=True))
    prepare(Path(folder))


# Side by side, whole files are distributed in the order of the tests: the longest ones first, so
# that no core waits for the last one.
LONGEST = (
    "integration/test_chaos.py",
    "benchmarks/test_scripts.py",
    "mutation/test_mutants.py",
    "integration/test_operating.py",
    "integration/test_stack.py",
    "integration/test_hosts_and_store.py",
    "integration/test_night.py",
    "integration/test_judging.py",
    "integration/test_servers.py",
    "integration/test_workers.py",
    "integration/test_processes.py",
    "integration/test_night_of_stores.py",
    "nightly/test_workers.py",
    "test_docs.py",
    "nightly/test_rolling.py",
    "training/test_two_hosts.py",
    "training/test_distributed.py",
    "features/test_actions.py",
    "tracking/test_runs.py",
    "ranking/test_scoring.py",
    "training/test_state.py",
    "nightly/test_suite.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small simulated feed of seven days."""
    size = Feed(impressions=12_000, days=7, users=300, items=200, first_day=FIRST)
    return simulate(size, tmp_path_factory.mktemp("feed"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here (MTL_RANKER_SHARED_DATA)")
    return SHARED


def midnight(day: date) -> int:
    return (day - date(1970, 1, 1)).days * 86_400_000


def tiny_events(day: date, rows: int = 40, shift: int = 0) -> pl.DataFrame:
    """A day's raw log in the tiny project's own columns, deterministic."""
    n = list(range(rows))
    return pl.DataFrame(
        {
            "u": [(k * 7 + shift) % 11 for k in n],
            "i": [(k * 5 + shift) % 13 for k in n],
            "ts": [midnight(day) + k * 60_000 for k in n],
            "tab": [["home", "search"][(k + shift) % 2] for k in n],
            "click": [int((k * 3 + shift) % 5 < 2) for k in n],
            "play": [float((k * 11 + shift) % 23) for k in n],
        }
    )


def write_log(root: Path, days: int = 6) -> Path:
    for n in range(days):
        day = FIRST + timedelta(days=n)
        write_day(root, day, tiny_events(day, shift=n))
    return root


def write_day(root: Path, day: date, frame: pl.DataFrame) -> Path:
    folder = root / "log" / f"date={day}"
    folder.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(folder / "part-0.parquet")
    return folder / "part-0.parquet"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Folder with the tiny project's `project.toml` and log."""
    write_project(tmp_path)
    return write_log(tmp_path)
