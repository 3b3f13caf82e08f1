"""A workspace in a real S3 server: what hosts see of each other, leases, and faults."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from threading import Thread

import polars as pl
import pytest

from mtl_ranker.errors import ProjectError
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.features.vectors import load_vectors
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.stores import copies, leases, objects
from mtl_ranker.workspace import Workspace, open_workspace
from tests.projects import edit_project
from tests.stores import BUCKET, Request, proxy, s3_server

DAY = date(2026, 3, 1)
FRAME = pl.DataFrame({"a": range(1000)})
OpenOn = Callable[[str], Workspace]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def address(s3: str, tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def on(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenOn:
    """Opens the workspace on a host of a name, which has a cache folder of its own."""

    def opened(host: str) -> Workspace:
        monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / host))
        return open_workspace(address)

    return opened


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that end at once and are not renewed, as those of a host that hangs."""
    monkeypatch.setattr(leases, "SECONDS", 0.05)
    monkeypatch.setattr(leases, "BEATS", 0.001)
    monkeypatch.setattr(leases, "POLL", 0.05)


def downloaded(host: Path) -> list[str]:
    return sorted(file.name for file in host.rglob("*") if file.is_file())


class TestTwoHosts:
    def test_the_second_reads_what_the_first_published(self, on: OpenOn, tmp_path: Path):
        first = on("a")
        first.publish("events", DAY, FRAME, {"log": "x"})
        first.publish_file("reports/a.html", "page")
        second = on("b")
        assert second.days("events") == [DAY]
        assert second.places("reports") == {"reports/a.html": 4}
        assert second.file("reports/a.html").read_text() == "page"
        assert second.scan("events", [DAY]).collect().equals(FRAME)
        assert second.where("reports") == first.where("reports")
        assert str(second.where("reports")) == f"s3://{BUCKET}/{tmp_path.name}/reports"

    @pytest.mark.parametrize("end_bytes", [65_536, 16], ids=["in one read", "in two reads"])
    def test_provenance_and_rows_need_no_download(
        self, on: OpenOn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end_bytes: int
    ):
        monkeypatch.setattr(copies, "END_BYTES", end_bytes)
        on("a").publish("events", DAY, FRAME, {"log": "x"})
        second = on("b")
        assert second.provenance("events", DAY) == {"log": "x"}
        assert second.stale("events", DAY, {"log": "y"}) == "changed: log"
        assert second.rows("events", DAY) == 1000
        assert second.provenance("events", date(2026, 3, 2)) is None
        assert downloaded(tmp_path / "b") == ["part-0.parquet.end"]

    def test_the_second_has_the_vectors_that_the_first_stored(self, on: OpenOn, tiny: Path):
        vectors = [[float(n), -1.0] for n in range(13)]
        items = pl.DataFrame({"i": range(13), "content": vectors})
        items.write_parquet(tiny / "items.parquet")
        table = {"path": "items.parquet", "key": "i", "columns": ["content"]}
        edit_project(tiny, log={"items": table}, features={"embeddings": ["content"]})
        context = open_context(str(tiny / "project.toml"), tiny, str(on("a").where()))
        build_split(context, context.last_day())
        second = on("b")
        rows = second.scan("examples", second.days("examples")[-1:])
        table_of_rows = load_vectors(second, ["content"], [rows])["content"]
        keys = rows.collect()
        found = table_of_rows.vectors[table_of_rows.rows(keys["content"])]
        assert found.tolist() == [vectors[n] for n in keys["item_id"]]

    def test_a_new_content_is_seen_when_the_lock_is_taken(self, on: OpenOn):
        second = on("b")
        on("a").publish("events", DAY, FRAME, {"log": "x"})
        second.refresh()
        assert second.scan("events", [DAY]).collect().height == 1000
        on("a").publish("events", DAY, FRAME.head(3), {"log": "y"})
        with second.lock("ingest"):
            assert second.provenance("events", DAY) == {"log": "y"}
            assert second.scan("events", [DAY]).collect().height == 3

    def test_a_task_on_another_host_sees_what_is_there_and_has_its_own_copies(
        self, on: OpenOn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        first = on("a")
        assert first.days("events") == []
        first.publish("events", DAY, FRAME, {})
        sent = pickle.dumps(first)
        on("c").publish("events", date(2026, 3, 2), FRAME, {})
        monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / "b"))
        task = pickle.loads(sent)
        assert len(task.days("events")) == 2
        assert task.path("events", DAY).is_relative_to(tmp_path / "b")
        assert first.path("events", DAY).is_relative_to(tmp_path / "a")

    def test_parts_of_another_host_are_published_and_those_of_other_inputs_removed(
        self, on: OpenOn
    ):
        first, second = on("a"), on("b")
        (outdated,) = first.parts("rankings", DAY, {"log": "x"}, 1)
        with first.published(outdated) as temporary:
            FRAME.write_parquet(temporary)
        parts = first.parts("rankings", DAY, {"log": "y"}, 2)
        for part in parts:
            with first.published(part) as temporary:
                FRAME.head(2).write_parquet(temporary)
        second.refresh()
        assert not second.has(outdated)
        assert second.parts("rankings", DAY, {"log": "y"}, 2) == parts
        assert all(second.has(part) for part in parts)
        second.publish_parts("rankings", DAY, parts, {})
        assert second.scan("rankings", [DAY]).collect()["a"].to_list() == [0, 1, 0, 1]
        first.refresh()
        assert first.places(".parts") == {}

    def test_copies_of_replaced_objects_are_removed_after_a_day(self, on: OpenOn):
        first = on("a")
        first.publish_file("reports/a.html", "old")
        old = first.file("reports/a.html")
        first.publish_file("reports/a.html", "new")
        with first.lock("ingest"):
            assert old.read_text() == "old"  # another process may read it
        os.utime(old.parents[1], (time.time() - 2 * 86_400,) * 2)
        with first.lock("ingest"):
            assert not old.exists()
            assert first.file("reports/a.html").read_text() == "new"


class TestLeases:
    def test_a_second_run_is_refused_with_the_name_of_the_first(self, on: OpenOn, address: str):
        with (
            on("a").lock("night of the first"),
            pytest.raises(ProjectError, match=r"another run .*night of the first, process \d+ on "),
            leases.leased(f"{address}/.leases/build.json", "second"),
        ):
            pass
        with leases.leased(f"{address}/.leases/build.json", "second"):
            pass

    def test_the_process_of_a_night_may_lock_again(self, on: OpenOn):
        workspace = on("a")
        with workspace.lock("night"), workspace.lock("ingest"):
            workspace.publish_file("a", "x")

    def test_a_run_that_waits_gets_the_lease_when_it_is_given_back(
        self, on: OpenOn, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(leases, "POLL", 0.05)
        workspace, order = on("a"), []

        def rank() -> None:
            with workspace.lock("other", "rankings/1", wait=True):
                order.append("second")

        with workspace.lock("one", "rankings/1", wait=True):
            other = Thread(target=rank)
            other.start()
            time.sleep(0.2)
            order.append("first")
        other.join()
        assert order == ["first", "second"]

    def test_a_living_run_renews_its_lease(self, address: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(leases, "BEATS", 1000)
        place = f"{address}/.leases/build.json"
        with leases.leased(place, "first") as lease:
            before = objects.read(place)
            while objects.read(place) == before:
                time.sleep(0.02)
            leases.confirm(place, lease.owner)

    def test_who_lost_its_lease_publishes_nothing(self, on: OpenOn, address: str, brief: None):
        workspace = on("a")
        sent = pickle.dumps(workspace)
        with workspace.lock("first"):
            task = pickle.loads(pickle.dumps(workspace))  # of a Dask worker
            time.sleep(0.1)
            with leases.leased(f"{address}/.leases/build.json", "second"):
                for one in (workspace, task):
                    with pytest.raises(ProjectError, match="was taken over by second, process"):
                        one.publish_file("reports/a.html", "late")
                pickle.loads(sent).days("events")
        assert not on("b").has("reports/a.html")
        on("b").publish_file("reports/a.html", "free")

    def test_what_the_former_holder_gives_back_is_not_the_lease_of_the_new_one(
        self, address: str, brief: None
    ):
        place = f"{address}/.leases/build.json"
        with leases.leased(place, "first"):
            time.sleep(0.1)
            second = leases.leased(place, "second")
            lease = second.__enter__()
        leases.confirm(place, lease.owner)
        second.__exit__(None, None, None)


class TestFaults:
    def test_requests_that_are_refused_for_a_while_are_repeated(self, s3: str, on: OpenOn):
        with proxy(s3, refused=lambda request: request.number % 3 != 2) as answers:
            workspace = on("a")
            with workspace.lock("night"):
                workspace.publish("events", DAY, FRAME, {})
            assert on("b").scan("events", [DAY]).collect().equals(FRAME)
        assert {answer.status for answer in answers} >= {503, 200}

    def test_a_lease_that_was_written_before_an_error_is_ones_own(self, s3: str, on: OpenOn):
        seen: list[Request] = []

        def first_put(request: Request) -> bool:
            seen.extend([request] if request.command == "PUT" else [])
            return seen == [request]

        with proxy(s3, lost=first_put) as answers, on("a").lock("night"):
            on("a").publish_file("a", "x")
        assert [a.status for a in answers if a.request.command == "PUT"][:2] == [503, 412]

    def test_a_bucket_that_is_not_there_is_one_sentence(self, s3: str):
        with pytest.raises(ProjectError, match=r"s3://other/a: the store cannot be read: "):
            open_workspace("s3://other/a").days("events")

    def test_a_kill_in_the_middle_of_an_upload_leaves_nothing(
        self, s3: str, on: OpenOn, address: str, tmp_path: Path
    ):
        code = (
            "import sys; from mtl_ranker.stores import leases\n"
            "from mtl_ranker.workspace import open_workspace\n"
            "leases.SECONDS = 1.0\n"
            "workspace = open_workspace(sys.argv[1])\n"
            "with workspace.lock('night'):\n"
            "    workspace.publish_file('reports/a.html', 'x' * 30_000_000)"
        )
        started: list[subprocess.Popen[bytes]] = []

        def kill(request: Request) -> bool:
            if "partNumber=2" in request.path:
                started[0].send_signal(signal.SIGKILL)
            return False

        with proxy(s3, kill):
            environment = os.environ | {"MTL_RANKER_CACHE": str(tmp_path / "a")}
            command = [sys.executable, "-c", code, address]
            started.append(subprocess.Popen(command, env=environment))
            assert started[0].wait(60) == -signal.SIGKILL
        workspace = on("b")
        assert not workspace.has("reports/a.html")
        with workspace.lock("next", wait=True):  # the lease ends by itself
            workspace.publish_file("reports/a.html", "whole")
        assert on("c").file("reports/a.html").read_text() == "whole"


@pytest.mark.slow
def test_ranks_of_several_hosts_and_studies_refuse_an_address(tmp_path: Path):
    for module, arguments, why in (
        ("train_ranks", ["-c", "simulated"], "ranks on several hosts share their rows"),
        ("app", ["study", "synthetic"], "studies allow a local folder only"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"mtl_ranker.commands.{module}", *arguments, "-w", "s3://b/w"],
            env=os.environ | {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2
        assert f"--workspace s3://b/w: {why}" in done.stderr


def test_an_unknown_store_is_refused():
    with pytest.raises(ProjectError, match=r"ftp://a/b: no known store; allowed: .* s3://"):
        open_workspace("ftp://a/b")


@pytest.mark.slow
def test_events_and_examples_of_two_hosts_are_those_of_a_folder(
    tiny: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second host builds one more window of features, and nothing a second time."""

    def build(workspace: str | Path, host: str) -> tuple[pl.DataFrame, list[str | None]]:
        monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / host))
        context = open_context(str(tiny / "project.toml"), tiny, workspace)
        days = context.source.days()
        built = [ingest_day(context, day).why for day in days]
        built += [aggregate_day(context, day) for day in days]
        built += [build_examples(context, days[-1])]
        return context.workspace.scan("examples", days[-1:]).collect(), built

    edit_project(tiny, features={"block_rows": 7})
    expected, _ = build(tmp_path / "local", "none")
    found, built = build(address, "a")
    assert found.equals(expected)
    assert None not in built
    again, built = build(address, "b")
    assert again.equals(expected)
    assert set(built) == {None}
    edit_project(tiny, features={"windows": [2, 3]})
    changed, built = build(address, "c")
    assert built[:-1] == [None] * len(built[:-1])
    assert built[-1] == "changed: setting features.windows"
    assert changed.equals(build(tmp_path / "local", "none")[0])


def test_each_store_has_the_options_of_its_own_environment(monkeypatch: pytest.MonkeyPatch):
    """The endpoint of an S3-compatible store, as of MLflow's artifacts, is not for the others."""
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", "account.json")
    s3 = {"aws_endpoint_url": "http://minio:9000", "aws_allow_http": "true"}
    assert objects.store_options("s3://bucket/feed") == s3
    assert objects.store_options("az://container/feed") == {}
    assert objects.store_options("gs://bucket/feed") == {"google_service_account": "account.json"}
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT")
    assert objects.store_options("gs://bucket/feed") == {}


def test_workers_of_a_cluster_are_told_absolute_folders(tmp_path, monkeypatch):
    """A worker has a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    assert objects.seen_by_workers(Path("ws"), "tcp://scheduler:8786") == tmp_path / "ws"
    assert objects.seen_by_workers(Path("ws"), None) == Path("ws")
    address = Path("s3://bucket/ws")
    assert objects.seen_by_workers(address, "tcp://scheduler:8786") == address
