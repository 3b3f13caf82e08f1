"""A real S3 server, and real Delta and Iceberg tables, of a log of folders."""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.request import urlopen

import polars as pl

from tests.projects import Table, merged

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}
BUCKET = "feed"
SERVERS: dict[str, str] = {}  # host → endpoint of a server that no test uses


@contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[str]:
    """moto's S3 with an empty bucket, and the environment that names it; yields the endpoint.

    The server is a process of its own: deltalake holds Python's lock while it creates a table. It
    takes seconds to start, and is kept for the next tests of this process.

    Args:
        host: the address of this machine at which it listens.
    """
    import boto3

    endpoint = SERVERS.pop(host, None) or _start(host)
    before = dict(os.environ)
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
    try:
        urlopen(f"{endpoint}/moto-api/reset", b"").close()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        os.environ.clear()
        os.environ.update(before)
        if host == "127.0.0.1":  # others are gone with their network
            SERVERS[host] = endpoint


def _start(host: str) -> str:
    """Start a server, which ends with this process; returns its endpoint."""
    port = free_port(host)
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    own = os.getpid()

    def end() -> None:
        if os.getpid() == own:  # not in a fork
            server.terminate()

    atexit.register(end)
    await_server(host, port, server)
    return f"http://{host}:{port}"


class Request(NamedTuple):
    """A request to the store.

    Attributes:
        number: from 0 on.
        sent: bytes of its content.
    """

    number: int
    command: str
    path: str
    sent: int


class Answer(NamedTuple):
    """What the store answered to a request, with the bytes of its content."""

    request: Request
    status: int
    received: int


KEPT_HEADERS = ("content-type", "etag", "last-modified", "content-range", "accept-ranges")


@contextmanager
def proxy(
    endpoint: str,
    refused: Callable[[Request], bool] = lambda request: False,
    lost: Callable[[Request], bool] = lambda request: False,
) -> Iterator[list[Answer]]:
    """A proxy before the store, named by the environment; yields what it answers.

    Args:
        refused: whether a request is answered with 503 and does not reach the store.
        lost: whether a request reaches the store, and its answer is replaced by 503.
    """
    answers: list[Answer] = []
    numbers = itertools.count()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            request = Request(next(numbers), self.command, self.path, len(content))
            status, headers, body = 503, {}, b""
            if not refused(request):
                target = HTTPConnection(endpoint.removeprefix("http://"))
                target.request(self.command, self.path, content or None, dict(self.headers))
                answer = target.getresponse()
                status, body = answer.status, answer.read()
                headers = {name.lower(): value for name, value in answer.getheaders()}
                target.close()
                if lost(request):
                    status, headers, body = 503, {}, b""
            answers.append(Answer(request, status, len(body)))
            self.send_response(status)
            for name in KEPT_HEADERS:
                if name in headers:
                    self.send_header(name, headers[name])
            if status != 204:
                self.send_header("content-length", headers.get("content-length", f"{len(body)}"))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """No line for each request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = Thread(target=server.serve_forever, args=(0.01,))  # seconds until it sees its end
    thread.start()
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    try:
        yield answers
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before
        server.shutdown()
        thread.join()
        server.server_close()


def free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return free.getsockname()[1]


def await_server(host: str, port: int, server: subprocess.Popen[bytes]) -> None:
    """Return once the server accepts connections."""
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((host, port), 1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def upload(folder: Path, prefix: str) -> str:
    """Copy the files of a folder to the bucket; the address of the copy."""
    import boto3

    client = boto3.client("s3")
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(folder)}")
    return f"s3://{BUCKET}/{prefix}"


def daily_frames(log: Path) -> list[pl.DataFrame]:
    """The days of a log of date=… folders, with the date as a column."""
    folders = sorted(log.glob("date=*"))
    return [
        pl.read_parquet(folder / "*.parquet", hive_partitioning=False).with_columns(
            pl.lit(folder.name.removeprefix("date=")).str.to_date().alias("date")
        )
        for folder in folders
    ]


def write_delta(uri: str | Path, frames: list[pl.DataFrame], by: list[str] | None = None) -> None:
    """A Delta table with one commit a frame."""
    from deltalake import write_deltalake

    from mtl_ranker.stores.objects import is_address, store_options

    options = store_options(str(uri)) if is_address(uri) else None
    for frame in frames:
        write_deltalake(
            str(uri), frame.to_arrow(), mode="append", partition_by=by, storage_options=options
        )


@contextmanager
def iceberg_catalog(folder: Path) -> Iterator[Any]:
    """A SQLite catalog named by the environment, with its warehouse in a folder."""
    from pyiceberg.catalog import load_catalog

    folder.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    properties = {
        "type": "sql",
        "uri": f"sqlite:///{folder / 'catalog.db'}",
        "warehouse": f"file://{folder / 'warehouse'}",
    }
    os.environ.update(
        {f"PYICEBERG_CATALOG__DEFAULT__{k.upper()}": v for k, v in properties.items()}
    )
    os.environ["POLARS_ICEBERG_PLANNER"] = "pyiceberg"
    try:
        catalog = load_catalog("default", **properties)
        catalog.create_namespace_if_not_exists("feed")
        yield catalog
    finally:
        os.environ.clear()
        os.environ.update(before)


def write_iceberg(catalog: Any, name: str, frames: list[pl.DataFrame], by: str | None) -> Any:
    """An Iceberg table with one snapshot a frame, in partitions of a column's values."""
    table = catalog.create_table(name, schema=frames[0].to_arrow().schema)
    if by is not None:
        with table.update_spec() as update:
            update.add_identity(by)
    for frame in frames:
        table.append(frame.to_arrow())
    return table


def in_format(base: Table, format: str, **log: Any) -> Table:
    """A project whose log is in a table format."""
    return merged(base, log={"format": format, **log})
