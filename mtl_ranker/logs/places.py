"""Files and folders of the log: local ones, and objects of S3, Google Cloud Storage and Azure.

An address is `s3://bucket/key`, `gs://bucket/key` or `az://container/key`. Credentials are those of
the usual environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`); `AWS_ENDPOINT_URL` names an S3-compatible
store. Objects are listed with obstore and read by polars.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePath, PurePosixPath
from types import SimpleNamespace
from typing import Any

import polars as pl

from mtl_ranker.context import Place
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.workspace import FileSize, Workspace, file_content

SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss")
# `Path` writes s3://bucket as s3:/bucket.
ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>[^/].*)")


@dataclass(frozen=True)
class Meta:
    """An object's size in bytes, the time of its last change, and the tag of its content."""

    size: int
    modified: datetime
    tag: str


@dataclass(frozen=True)
class ObjectPath:
    """An object of a store, or the objects below a common prefix as a folder.

    It has the methods of `pathlib.Path` that readers of a log use. Each looks at the store, unless
    the path, or the folder it was made from, is `listed`.

    Attributes:
        address: without a slash at its end.
        listing: key below the bucket → object, of a folder and all below it.
    """

    address: str
    listing: Mapping[str, Meta] | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> str:
        """The path below the bucket."""
        return self.address.split("://", 1)[1].partition("/")[2]

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.address.rpartition("/")[0])

    def listed(self) -> ObjectPath:
        """The path with the present listing of the store, which paths made from it share.

        Raises ProjectError where the store cannot be listed.
        """
        return self if self.listing is not None else replace(self, listing=_list(self.address))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self._meta() is not None

    def is_dir(self) -> bool:
        if self.listing is None:
            return _holds(self.address)
        return any(key.startswith(self._prefix) for key in self.listing)

    def meta(self) -> Meta:
        """The object's size, time and tag. Raises FileNotFoundError where there is none."""
        found = self._meta()
        if found is None:
            raise FileNotFoundError(self.address)
        return found

    def stat(self) -> Any:
        """Size in bytes and time of the last change, by the names that `Path.stat` gives them."""
        meta = self.meta()
        return SimpleNamespace(st_size=meta.size, st_mtime=meta.modified.timestamp())

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Folders and objects below that match, part by part, in ascending order."""
        parts = pattern.split("/")
        found = set()
        for inner in self._below():
            have = inner.split("/")[: len(parts)]
            if len(have) == len(parts) and all(map(fnmatchcase, have, parts)):
                found.add("/".join(have))
        return (self / name for name in sorted(found))

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects at any depth whose names match, in ascending order."""
        below = [name for name in self._below() if fnmatchcase(name.rpartition("/")[2], pattern)]
        return (self / name for name in sorted(below))

    def relative_to(self, other: Any) -> PurePath:
        return PurePosixPath(self.address).relative_to(PurePosixPath(str(other)))

    def resolve(self) -> ObjectPath:
        return self

    def __truediv__(self, other: Any) -> Any:
        """A path below; an absolute path or an address is kept."""
        text = str(other)
        if text.startswith("/") or ADDRESS.match(text):
            return place_at(text)
        return replace(self, address=f"{self.address}/{text.strip('/')}")

    def __lt__(self, other: Any) -> bool:
        return self.address < str(other)

    def __str__(self) -> str:
        return self.address

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _meta(self) -> Meta | None:
        return _head(self.address) if self.listing is None else self.listing.get(self.key)

    def _below(self) -> Iterator[str]:
        listing = _list(self.address) if self.listing is None else self.listing
        keys = (key for key in listing if key.startswith(self._prefix))
        return (key.removeprefix(self._prefix) for key in keys)


def is_address(place: object) -> bool:
    """Whether a text or path is the address of an object store."""
    return ADDRESS.match(str(place)) is not None


def place_at(place: str | Path) -> Place:
    """The folder or file that a path or an address names.

    Raises ProjectError for an address of another kind of store, and without obstore.
    """
    found = ADDRESS.match(str(place))
    if found is None:
        return Path(place)
    address = f"{found['scheme'].lower()}://{found['rest'].rstrip('/')}"
    if found["scheme"].lower() not in SCHEMES:
        raise ProjectError(
            f"{address}: no known store; allowed: a folder, or s3://, gs:// or az://"
        )
    needs_extra(address, "obstore")
    return ObjectPath(address)


def needs_extra(what: str, package: str) -> None:
    """Raise ProjectError without a package of the extra `stores`."""
    if find_spec(package) is None:
        raise ProjectError(
            f"{what}: needs {package}, which is not installed: pip install 'mtl_ranker[stores]'"
        )


def listed(place: Place) -> Place:
    """A place whose further look-ups share one listing of the store; a local path as it is."""
    return place.listed() if isinstance(place, ObjectPath) else place


def size_of(place: Place) -> FileSize:
    """Name, size and time of a file or an object."""
    if isinstance(place, ObjectPath):
        meta = place.meta()
        return FileSize(place.name, meta.size, meta.modified.timestamp())
    return FileSize.of(Path(str(place)))


def content_of(place: Place, workspace: Workspace | None = None) -> str:
    """A file's name and its content's SHA-256; of an object its name, size and entity tag.

    The store gives an object another tag when its content changes, so it need not be read.
    """
    if isinstance(place, ObjectPath):
        meta = place.meta()
        return f"{place.name}:{meta.size}:{meta.tag}"
    return file_content(Path(str(place)), workspace)


def scan_places(files: Sequence[Place], **options: Any) -> pl.LazyFrame:
    """`pl.scan_parquet` of local files or of objects, without patterns in their names."""
    addresses = [str(file) for file in files]
    if is_address(addresses[0]):
        options["storage_options"] = store_options()
    return pl.scan_parquet(addresses, glob=False, **options)


def schema_of(file: Place) -> pl.Schema:
    """The columns of a Parquet file or object."""
    if isinstance(file, ObjectPath):
        return scan_places([file]).collect_schema()
    return pl.Schema(pl.read_parquet_schema(str(file)))


def store_options() -> dict[str, str]:
    """Options for object stores that polars and deltalake do not take from the environment."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if not endpoint:
        return {}
    plain = {"aws_allow_http": "true"} if endpoint.startswith("http://") else {}
    return {"aws_endpoint_url": endpoint, **plain}


def _list(address: str) -> dict[str, Meta]:
    """The object of an address, or every object below it."""
    import obstore

    with _readable(address) as (store, prefix):
        batches = obstore.list(store, prefix or None, chunk_size=1000)
        found = {entry["path"]: _meta_of(entry) for batch in batches for entry in batch}
        single = None if found or not prefix else _head(address)
        return found if single is None else {prefix: single}


def _holds(address: str) -> bool:
    """Whether there is an object below an address."""
    import obstore

    with _readable(address) as (store, prefix):
        return any(len(batch) for batch in obstore.list(store, prefix or None, chunk_size=1))


def _head(address: str) -> Meta | None:
    """The object of an address, or None."""
    import obstore

    with _readable(address) as (store, key):
        try:
            return _meta_of(obstore.head(store, key)) if key else None
        except FileNotFoundError:
            return None


def _meta_of(entry: Any) -> Meta:
    tag = entry["e_tag"] or entry["version"] or entry["last_modified"].isoformat()
    return Meta(entry["size"], entry["last_modified"], tag.strip('"'))


@contextmanager
def _readable(address: str) -> Iterator[tuple[Any, str]]:
    """The connection to an address's bucket, and its key there.

    A request that the store refuses for a while (503) is repeated by obstore. Raises ProjectError
    for one that fails.
    """
    from obstore.exceptions import BaseError

    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    try:
        yield _bucket(f"{scheme}://{bucket}", tuple(sorted(store_options().items()))), key
    except (BaseError, OSError) as error:
        raise ProjectError(f"{address}: the store cannot be read: {first_line(error)}") from error


@functools.cache
def _bucket(address: str, options: tuple[tuple[str, str], ...]) -> Any:
    """A connection to a bucket, which threads share."""
    from obstore.store import from_url

    config: Any = dict(options)
    plain = config.pop("aws_allow_http", "false") == "true"
    return from_url(address, config=config, client_options={"allow_http": plain})
