"""The connection to a tracking server."""

from __future__ import annotations

import http.server
import socket
import threading

import mlflow
import pytest

from mtl_ranker.errors import is_outside
from mtl_ranker.tracking.connection import connect
from mtl_ranker.workspace import Workspace


@pytest.fixture(autouse=True)
def restored():
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


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
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    uri = f"http://admin:secret@127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    try:
        assert connect(Workspace(tmp_path)) == uri == mlflow.get_tracking_uri()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
