"""A night with a fault at each stage: what exists in the morning, and that the next night recovers.

The table in docs/operations.md is compared with what happens.
"""

from __future__ import annotations

import fcntl
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from mtl_ranker.workspace import Workspace
from tests.conftest import FIRST, tiny_events, write_day
from tests.integration import forks
from tests.integration.commands import environment, shared_api
from tests.integration.faults import FAULTS
from tests.projects import edit_project, write_project
from tests.rotation import PARTS, of_today

DAY = FIRST + timedelta(days=6)
DOCS = Path(__file__).parents[2] / "docs/operations.md"


@dataclass(frozen=True)
class Night:
    """A project with its log and workspace, after the nights before `DAY`."""

    root: Path

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root / "now/ws")

    def start(self, fault: str, day=DAY) -> forks.Command:
        here = self.root / "now"
        return forks.start(
            *(fault, "nightly", "-c", here / "project.toml", "-d", here, "-w", here / "ws"),
            *("--date", str(day)),
            module="tests.integration.faults",
            env=environment() | {"PREFECT_API_URL": shared_api()},
        )

    def run(self, fault: str = "nothing", day=DAY) -> str:
        return "".join(self.start(fault, day).communicate(timeout=1200))

    def restore(self) -> None:
        shutil.rmtree(self.root / "now")
        shutil.copytree(self.root / "before", self.root / "now")

    def ranking(self) -> pl.DataFrame | None:
        path = self.workspace.path("rankings", DAY + timedelta(days=1))
        return pl.read_parquet(path) if path.is_file() else None

    def champion(self) -> str:
        return registry_of(self.workspace)


def registry_of(workspace: Workspace) -> str:
    """The champion's version, read in a fresh process, as MLflow keeps databases open."""
    done = forks.run(
        *(workspace.root, workspace.root.parent / "project.toml"),
        module="tests.integration.champion",
        env=environment() | {"PREFECT_API_URL": shared_api()},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def nights(tmp_path_factory):
    """The state after one night, and the ranking of an undisturbed second one."""
    root = tmp_path_factory.mktemp("chaos")
    here = root / "now"
    here.mkdir()
    write_project(
        here,
        log={
            "users": {"path": "users.parquet", "key": "u", "columns": ["age"]},
            "day_tolerance_hours": 0,
            "actions": [{"name": "like", "path": "likes", "window": "1h", "value": "stars"}],
        },
        features={"numerics": ["age"], "signals": {"liked": '"like"'}},
        promotion={
            "max_seconds_per_million": 1e6,
            "max_megabytes": 1000,
            "max_calibration_ratio": 1e9,
            "max_calibration_shift": 1e9,
        },
    )
    pl.DataFrame({"u": range(11), "age": [20.0 + n for n in range(11)]}).write_parquet(
        here / "users.parquet"
    )
    for number in range(7):
        day = FIRST + timedelta(days=number)
        events = tiny_events(day, rows=120, shift=number)
        write_day(here, day, events)
        liked = events.filter(pl.col("play") > 15).select("u", "i", "ts", stars=pl.col("play") % 5)
        liked.write_parquet(likes(here, day), mkdir=True)
    night = Night(root)
    printed = night.run(day=DAY - timedelta(days=1))
    assert "done" in printed, printed
    shutil.copytree(here, root / "before")
    undisturbed = night.run()
    ranking = night.ranking()
    assert ranking is not None, undisturbed
    return night, ranking.drop("model_version")


def outcome(night: Night, printed: str, champion: str) -> str:
    """What the morning after finds; asserts what must hold whatever the fault was."""
    assert "Traceback" not in printed, printed
    for file in night.workspace.root.rglob("part-0.parquet"):
        assert pl.read_parquet(file).width > 0
    now, ranking = night.champion(), night.ranking()
    assert now == champion or "promoted: " in printed
    if ranking is None:
        assert re.search(r"^(failed|error) ", printed, re.MULTILINE), printed
        return "no ranking, one sentence"
    assert ranking["rank"].min() == 1
    assert not ranking.select("user_id", "rank").is_duplicated().any()
    assert ranking["model_version"].unique().to_list() == [now]
    if "after the failure" in printed:
        return "the champion's ranking"
    assert "done" in printed, printed
    return "the night's ranking"


def of_log(change: Callable[[Path], None]) -> Callable[[Night], str]:
    def disturbed(night: Night) -> str:
        change(night.root / "now")
        return night.run()

    return disturbed


def partition(here: Path) -> Path:
    return here / "log" / f"date={DAY}" / "part-0.parquet"


def likes(here: Path, day=DAY) -> Path:
    return here / "likes" / f"date={day}" / "part-0.parquet"


def rewritten(*columns: pl.Expr, of: Callable[[Path], Path] = partition) -> Callable[[Night], str]:
    def change(here: Path) -> None:
        file = of(here)
        pl.read_parquet(file).with_columns(*columns).write_parquet(file)

    return of_log(change)


def half_written(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def refreshed(here: Path) -> None:
    rows = pl.read_parquet(here / "users.parquet").with_columns(pl.col("age") + 1)
    rows.write_parquet(here / "users.parquet")


def second_job(night: Night) -> str:
    with open(night.workspace.root / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return night.run()


def unpublishable(night: Night) -> str:
    """The night of a project whose table of rankings cannot be written: a file is in the way."""
    here = night.root / "now"
    file = here / "project.toml"
    text = file.read_text("utf-8")
    edit_project(here, scoring={"publish": str(here / "users.parquet" / "table")})
    printed = night.run()
    file.write_text(text, "utf-8")
    assert re.search(r"^error .*users\.parquet", printed, re.MULTILINE), printed
    return printed


LOG_FAULTS: dict[str, Callable[[Night], str]] = {
    "a new column on the last day": rewritten(pl.lit("b").alias("experiment")),
    "int32 ids on the last day": rewritten(pl.col("u").cast(pl.Int32)),
    "text ids on the last day": rewritten(pl.col("u").cast(pl.String)),
    "a label's column is missing on the last day": of_log(
        lambda here: pl.read_parquet(partition(here)).drop("click").write_parquet(partition(here))
    ),
    "the last day's file is cut off": of_log(lambda here: half_written(partition(here))),
    "the last day's folder is empty": of_log(lambda here: partition(here).unlink()),
    "the clock of the last day is two days late": rewritten(pl.col("ts") + 2 * 86_400_000),
    "an action's file of the last day is cut off": of_log(lambda here: half_written(likes(here))),
    "an action's value is text on the last day": rewritten(pl.lit("many").alias("stars"), of=likes),
    "an action's folder of the last day is missing": of_log(
        lambda here: shutil.rmtree(likes(here).parent)
    ),
    "the user table is refreshed": of_log(refreshed),
    "the user table is missing": of_log(lambda here: (here / "users.parquet").unlink()),
    "another job holds the workspace": second_job,
    "the table of rankings cannot be written": unpublishable,
}


def documented() -> dict[str, str]:
    """Fault → outcome, in the table of docs/operations.md."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", DOCS.read_text("utf-8"), re.MULTILINE)
    names = {*FAULTS, *LOG_FAULTS}
    return {name: result for name, result in rows if name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", of_today((name for name in (*FAULTS, *LOG_FAULTS) if name != "nothing"), PARTS)
)
def test_after_a_fault_there_is_a_ranking_or_a_sentence_and_the_next_night_recovers(nights, fault):
    night, undisturbed = nights
    night.restore()
    champion = night.champion()
    printed = LOG_FAULTS[fault](night) if fault in LOG_FAULTS else night.run(fault)
    result = outcome(night, printed, champion)
    for name in ("log", "likes", "users.parquet"):
        source, target = night.root / "before" / name, night.root / "now" / name
        if source.is_dir():
            shutil.rmtree(target)
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
    again = night.run()
    assert "done" in again, again
    recovered = night.ranking()
    assert recovered is not None
    assert recovered.drop("model_version").equals(undisturbed)
    assert documented().get(fault) == result, printed


@pytest.mark.slow
def test_a_night_killed_at_random_moments_ends_with_the_undisturbed_ranking(nights):
    """Twenty moments within a night, five of them on a day."""
    night, undisturbed = nights
    night.restore()
    champion, moments = night.champion(), random.Random(0)
    for seconds in of_today([moments.uniform(0.5, 15.0) for _ in range(20)], PARTS):
        process = night.start("nothing")
        time.sleep(seconds)
        process.kill()
        process.wait()
        for file in night.workspace.root.rglob("part-0.parquet"):
            assert pl.read_parquet(file).width > 0
        assert night.champion() in (champion, str(int(champion) + 1))
    printed = night.run()
    assert "done" in printed, printed
    ranking = night.ranking()
    assert ranking is not None
    assert ranking.drop("model_version").equals(undisturbed)


def test_every_fault_is_documented():
    assert set(documented()) == (set(FAULTS) - {"nothing"}) | set(LOG_FAULTS)
