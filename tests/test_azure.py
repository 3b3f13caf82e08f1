"""A workspace in Azure's emulator, where Azurite is installed: `npm install -g azurite`."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, date, datetime
from http.client import HTTPConnection
from pathlib import Path

import polars as pl
import pytest

from mtl_ranker.errors import ProjectError
from mtl_ranker.stores import leases, objects
from mtl_ranker.workspace import open_workspace
from tests.stores import await_server, free_port

DAY = date(2026, 3, 1)
ACCOUNT = "devstoreaccount1"  # of every Azurite, as is its key
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Azurite with an empty container; its address."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not installed")
    port = free_port("127.0.0.1")
    words = [program, "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    place = ["--inMemoryPersistence", "--blobPort", str(port)]
    server = subprocess.Popen([*words, *place], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        await_server("127.0.0.1", port, server)
        name = f"feed{port}"  # connections are kept by this name
        create_container(port, name)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{port}/{ACCOUNT}")
        monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
        yield f"az://{name}"
    finally:
        server.terminate()
        server.wait()


def create_container(port: int, name: str) -> None:
    """By a request signed with the account's key, as obstore creates none."""
    now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": now, "x-ms-version": "2023-11-03"}
    signed = "".join(f"{key}:{value}\n" for key, value in sorted(headers.items()))
    text = "PUT" + 12 * "\n" + signed + f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    request = HTTPConnection("127.0.0.1", port)
    request.request("PUT", f"/{ACCOUNT}/{name}?restype=container", headers=headers)
    assert request.getresponse().status == 201
    request.close()


@pytest.mark.slow
def test_hosts_share_a_workspace_in_azure(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    frame = pl.DataFrame({"a": range(1000)})
    monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / "a"))
    first = open_workspace(container)
    lease = f"{container}/.leases/build.json"
    with first.lock("night of the first"):
        first.publish("events", DAY, frame, {"log": "x"})
        with pytest.raises(ProjectError, match="night of the first"), leases.leased(lease, "other"):
            pass
    monkeypatch.setenv("MTL_RANKER_CACHE", str(tmp_path / "b"))
    second = open_workspace(container)
    # the store gives no last bytes without the size of the object
    assert second.provenance("events", DAY) == {"log": "x"}
    assert not list((tmp_path / "b").rglob("*.parquet"))
    assert second.scan("events", [DAY]).collect().equals(frame)
    place = second.place("events", DAY)
    content = second.file(place).read_bytes()
    for size in (5, len(content), 10 * len(content)):
        assert objects.end_of(f"{container}/{place}", size) == content[-size:]
    assert objects.end_of(f"{container}/none", 5) is None
    second.remove("events")
    first.refresh()
    assert first.days("events") == []
