"""The connection to a tracking server."""

from __future__ import annotations

import http.server
import socket
import sqlite3
import threading

import mlflow
import pytest

from mtl_ranker.errors import ProjectError, is_outside
from mtl_ranker.stores.databases import copy_template, keep_template, template_of
from mtl_ranker.tracking import server
from mtl_ranker.tracking.connection import connect, create_database
from mtl_ranker.tracking.server import check_server
from mtl_ranker.workspace import Workspace


@pytest.fixture(autouse=True)
def restored():
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


def test_a_second_workspace_of_one_process_has_its_own_database(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uris = []
    for name in ("first", "second", "first"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        uris.append(connect(Workspace(folder)))
        assert mlflow.get_tracking_uri() == uris[-1] == f"sqlite:///{folder}/mlflow.db"
    chosen = f"sqlite:///{tmp_path}/chosen.db"
    mlflow.set_tracking_uri(chosen)
    assert connect(Workspace(tmp_path / "first")) == chosen


def test_a_server_that_does_not_answer_is_one_sentence_without_its_password(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://admin:secret@127.0.0.1:{port}")
    with pytest.raises(ConnectionError) as caught:
        connect(Workspace(tmp_path))
    assert is_outside(caught.value)
    message = str(caught.value)
    assert message.startswith(f"MLflow at http://127.0.0.1:{port} does not answer ([Errno 111]")
    assert "secret" not in message
    assert message.endswith("start it, or correct MLFLOW_TRACKING_URI")


@pytest.mark.parametrize("status", [200, 401, 404])
def test_a_server_that_answers_with_any_status_is_used(tmp_path, monkeypatch, status):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    uri = f"http://admin:secret@127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    try:
        assert connect(Workspace(tmp_path)) == uri == mlflow.get_tracking_uri()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_server_that_is_away_for_a_moment_is_asked_again(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asked = []

        def answer() -> None:
            for reply in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
                connection, _ = listening.accept()
                with connection:
                    asked.append(connection.recv(1_000))
                    connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setattr(server, "PAUSES", (0.01, 0.01))
        check_server()
        thread.join()
    assert [request.split()[1] for request in asked] == [b"/health", b"/health"]


@pytest.mark.parametrize(
    "uri", ["http://localhost:abc", "HTTP://exa mple", "http://[::1", f"http://{'a' * 70}.example"]
)
def test_an_address_that_is_none_is_one_sentence(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(server, "PAUSES", ())
    with pytest.raises(ProjectError, match=r"MLFLOW_TRACKING_URI: MLflow at .* does not answer"):
        check_server()


@pytest.mark.parametrize("uri", [None, "sqlite:////no/such/file.db", "file:///no/such/folder"])
def test_without_a_server_nothing_is_asked(monkeypatch, uri):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    check_server()


@pytest.mark.parametrize("size", [0, 5_000, 100_000])
def test_a_damaged_template_is_made_again(tmp_path, monkeypatch, size):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    template = template_of("mlflow")
    template.parent.mkdir(parents=True)
    whole = tmp_path / "whole.db"
    with sqlite3.connect(whole) as made:
        made.execute("create table numbers (n integer)")
        made.executemany("insert into numbers values (?)", [(n,) for n in range(50_000)])
    template.write_bytes(whole.read_bytes()[:size])
    assert not copy_template("mlflow", tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()
    keep_template("mlflow", whole)
    assert copy_template("mlflow", tmp_path / "copy.db")


@pytest.mark.slow
def test_a_second_workspace_copies_the_schema_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = Workspace(tmp_path / "a"), Workspace(tmp_path / "b")
    create_database(first)
    with sqlite3.connect(template_of("mlflow")) as kept:
        kept.execute("create table mark (n integer)")  # only a copy has it
    create_database(second)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{second.root / 'mlflow.db'}")
    assert client.get_run(client.create_run("0").info.run_id).info.experiment_id == "0"

    def tables(folder: Workspace) -> set[str]:
        with sqlite3.connect(folder.root / "mlflow.db") as database:
            return {sql for (sql,) in database.execute("select sql from sqlite_master") if sql}

    assert tables(second) - tables(first) == {"CREATE TABLE mark (n integer)"}
    assert tables(first) < tables(second)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with sqlite3.connect(tmp_path / "schema.db") as database:
        database.execute("create table t (n integer)")
    with caplog.at_level("INFO"):
        keep_template("mlflow", tmp_path / "schema.db")
    assert "the schema of mlflow is not kept there" in caplog.text
    assert not copy_template("mlflow", tmp_path / "copy.db")
