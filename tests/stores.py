"""A real S3 server, and real Delta and Iceberg tables, of a log of folders."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from tests.projects import Table, merged

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}
BUCKET = "feed"


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's S3 with an empty bucket, and the environment that names it; yields the endpoint.

    The server is a process of its own: deltalake holds Python's lock while it creates a table.
    """
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    endpoint = f"http://127.0.0.1:{port}"
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=endpoint)
    try:
        _await(port, server)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.terminate()
        server.wait()


def _await(port: int, server: subprocess.Popen[bytes]) -> None:
    """Return once the server accepts connections."""
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
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

    options = store_options() if is_address(uri) else None
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
