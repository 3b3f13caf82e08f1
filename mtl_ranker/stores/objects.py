"""Objects of S3, Google Cloud Storage and Azure: addresses, requests, and conditional puts.

An address is `s3://bucket/key`, `gs://bucket/key` or `az://container/key`. Credentials are those of
the usual environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`); `AWS_ENDPOINT_URL` names an S3-compatible
store. A request that the store refuses for a while (503) is repeated by obstore.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from mtl_ranker.errors import ProjectError, first_line

SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss")
# `Path` writes s3://bucket as s3:/bucket.
ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>[^/].*)")
CHUNK = 8 * 2**20  # bytes of a download that are in memory at a time

Version = dict[str, str]  # an object's tag and version, as a conditional put names them


class Address(PurePosixPath):
    """An address with the names that `pathlib` gives to its parts, for messages and results."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)


@dataclass(frozen=True)
class Meta:
    """An object's size in bytes, the time of its last change, and the tag of its content."""

    size: int
    modified: datetime
    tag: str


def is_address(place: object) -> bool:
    """Whether a text or path is the address of an object store."""
    return ADDRESS.match(str(place)) is not None


def seen_by_workers(place: Path, cluster: str | None) -> Path:
    """A folder as the workers of a cluster find it: by its absolute path.

    They have working directories of their own. Without a cluster, and for an address of a store,
    the place is returned as it is.
    """
    return place if cluster is None or is_address(place) else place.resolve()


def address_of(place: object) -> str:
    """An address as it is written, without a slash at its end.

    Raises ProjectError for an address of another kind of store, and without obstore.
    """
    found = ADDRESS.match(str(place))
    if found is None:
        raise ProjectError(f"{place}: no address; allowed: s3://, gs:// or az://")
    address = f"{found['scheme'].lower()}://{found['rest'].rstrip('/')}"
    if found["scheme"].lower() not in SCHEMES:
        raise ProjectError(
            f"{address}: no known store; allowed: a folder, or s3://, gs:// or az://"
        )
    needs_extra(address, "obstore")
    return address


def needs_extra(what: str, package: str) -> None:
    """Raise ProjectError without a package of the extra `stores`."""
    if find_spec(package) is None:
        raise ProjectError(
            f"{what}: needs {package}, which is not installed: pip install 'mtl_ranker[stores]'"
        )


def store_options(address: str) -> dict[str, str]:
    """Options for an address's store that polars and deltalake do not take from the environment."""
    scheme = address.partition(":")[0].lower()
    if scheme in ("gs", "gcs"):
        # without an option polars takes GOOGLE_APPLICATION_CREDENTIALS only
        account = os.environ.get("GOOGLE_SERVICE_ACCOUNT")
        return {"google_service_account": account} if account else {}
    if scheme not in ("s3", "s3a"):
        return {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if not endpoint:
        return {}
    plain = {"aws_allow_http": "true"} if endpoint.startswith("http://") else {}
    return {"aws_endpoint_url": endpoint, **plain}


def listing(address: str) -> dict[str, Meta]:
    """Key → the object of an address, or every object below it."""
    import obstore

    with _connected(address) as (store, prefix):
        batches = obstore.list(store, prefix or None, chunk_size=1000)
        found = {entry["path"]: _meta_of(entry) for batch in batches for entry in batch}
        single = None if found or not prefix else head(address)
        return found if single is None else {prefix: single}


def holds(address: str) -> bool:
    """Whether there is an object below an address."""
    import obstore

    with _connected(address) as (store, prefix):
        return any(len(batch) for batch in obstore.list(store, prefix or None, chunk_size=1))


def head(address: str) -> Meta | None:
    """The object of an address, or None."""
    import obstore

    with _connected(address) as (store, key):
        try:
            return _meta_of(obstore.head(store, key)) if key else None
        except FileNotFoundError:
            return None


def read(address: str) -> tuple[bytes, Version] | None:
    """An object's content and version, or None without the object."""
    import obstore

    with _connected(address) as (store, key):
        try:
            found = obstore.get(store, key)
        except FileNotFoundError:
            return None
        return bytes(found.bytes()), _version_of(found.meta)


def end_of(address: str, size: int) -> bytes | None:
    """The last `size` bytes of an object, or all of a shorter one; None without the object."""
    with _connected(address) as (store, key):
        try:
            return _last_bytes(store, key, size)
        except FileNotFoundError:
            return None


def download(address: str, target: Path) -> Meta | None:
    """Write an object's content to a file; returns what was read, or None without the object."""
    import obstore

    with _connected(address) as (store, key):
        try:
            found = obstore.get(store, key)
        except FileNotFoundError:
            return None
        with open(target, "wb") as file:
            for chunk in found.stream(min_chunk_size=CHUNK):
                file.write(chunk)
        return _meta_of(found.meta)


def upload(source: Path, address: str) -> str:
    """Put a file as one object, which others see whole or not at all; its content's tag.

    A large file is sent in parts, which become the object when the last one has arrived.
    """
    import obstore

    with _connected(address, "written") as (store, key):
        made = obstore.put(store, key, source)
        tag = made["e_tag"] or made["version"]
        return tag.strip('"') if tag else _meta_of(obstore.head(store, key)).tag


def put_if(address: str, content: bytes, before: Version | None) -> Version | None:
    """Put an object if its version is still `before`, or if there is none (None).

    Returns the new version, or None where the object is another one: nothing is written then.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    with _connected(address, "written") as (store, key):
        mode: Any = "create" if before is None else before
        try:
            return _version_of(obstore.put(store, key, content, mode=mode))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return None


def remove(addresses: Iterable[str]) -> None:
    """Remove objects, which need not exist."""
    import obstore

    for address in addresses:
        with _connected(address, "written") as (store, key):
            try:
                obstore.delete(store, key)
            except FileNotFoundError:
                continue


def _last_bytes(store: Any, key: str, size: int) -> bytes:
    import obstore
    from obstore.exceptions import NotSupportedError, PreconditionError

    try:
        return bytes(obstore.get(store, key, options={"range": {"suffix": size}}).bytes())
    except NotSupportedError:  # Azure counts from an object's beginning only
        pass
    while True:
        found = obstore.head(store, key)
        span = max(found["size"] - size, 0), found["size"]
        same: Any = {"range": span, "if_match": found["e_tag"]}
        try:
            return bytes(obstore.get(store, key, options=same).bytes())
        except PreconditionError:  # replaced since its size was read
            continue


def _version_of(entry: Any) -> Version:
    return {name: entry[name] for name in ("e_tag", "version") if entry[name]}


def _meta_of(entry: Any) -> Meta:
    tag = entry["e_tag"] or entry["version"] or entry["last_modified"].isoformat()
    return Meta(entry["size"], entry["last_modified"], tag.strip('"'))


@contextmanager
def _connected(address: str, done: str = "read") -> Iterator[tuple[Any, str]]:
    """The connection to an address's bucket, and its key there.

    Raises ProjectError for a request that fails.
    """
    from obstore.exceptions import BaseError

    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    try:
        options = tuple(sorted(store_options(address).items()))
        yield _bucket(f"{scheme}://{bucket}", options), key
    except (BaseError, OSError) as error:
        raise ProjectError(f"{address}: the store cannot be {done}: {first_line(error)}") from error


@functools.cache
def _bucket(address: str, options: tuple[tuple[str, str], ...]) -> Any:
    """A connection to a bucket, which threads share."""
    from obstore.store import from_url

    config: Any = dict(options)
    plain = config.pop("aws_allow_http", "") == "true"
    # any options of the client, also empty ones, replace those of the environment
    return from_url(address, config=config, client_options={"allow_http": True} if plain else None)
