"""Files and folders of the log: local ones, and objects of S3, Google Cloud Storage and Azure.

Objects are listed with obstore (`stores/objects.py`) and read by polars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from types import SimpleNamespace
from typing import Any

import polars as pl

from mtl_ranker.context import Place
from mtl_ranker.stores import objects
from mtl_ranker.stores.objects import ADDRESS, Meta, address_of, is_address, store_options
from mtl_ranker.workspace import FileSize, Workspace, file_content, file_stamp


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
        found = objects.listing(self.address) if self.listing is None else self.listing
        return replace(self, listing=found)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self._meta() is not None

    def is_dir(self) -> bool:
        if self.listing is None:
            return objects.holds(self.address)
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
        return objects.head(self.address) if self.listing is None else self.listing.get(self.key)

    def _below(self) -> Iterator[str]:
        listing = objects.listing(self.address) if self.listing is None else self.listing
        keys = (key for key in listing if key.startswith(self._prefix))
        return (key.removeprefix(self._prefix) for key in keys)


def place_at(place: str | Path) -> Place:
    """The folder or file that a path or an address names.

    Raises ProjectError for an address of another kind of store, and without obstore.
    """
    return ObjectPath(address_of(place)) if is_address(place) else Path(place)


def listed(place: Place) -> Place:
    """A place whose further look-ups share one listing of the store; a local path as it is."""
    return place.listed() if isinstance(place, ObjectPath) else place


def size_of(place: Place) -> FileSize:
    """Name, size and time of a file or an object."""
    if isinstance(place, ObjectPath):
        meta = place.meta()
        return FileSize(place.name, meta.size, meta.modified.timestamp())
    return FileSize.of(Path(str(place)))


def stamp_of(place: Place) -> str:
    """What changes when a file or an object is written again, without reading it."""
    if isinstance(place, ObjectPath):
        return content_of(place)
    return file_stamp(Path(str(place)))


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
        options["storage_options"] = store_options(addresses[0])
    return pl.scan_parquet(addresses, glob=False, **options)


def schema_of(file: Place) -> pl.Schema:
    """The columns of a Parquet file or object."""
    return scan_places([file]).collect_schema()
