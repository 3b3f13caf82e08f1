"""What every step of a run needs: the project, its log and its workspace."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

import polars as pl
from pydantic_core import core_schema

from mtl_ranker.config import Log, Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.workspace import FileSize, Workspace


class Place(Protocol):
    """A file or folder below `--data`: a `pathlib.Path`, or an object's address."""

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> Any: ...

    def exists(self) -> bool: ...

    def is_file(self) -> bool: ...

    def is_dir(self) -> bool: ...

    def glob(self, pattern: str) -> Iterator[Any]: ...

    def rglob(self, pattern: str) -> Iterator[Any]: ...

    def relative_to(self, other: Any, /) -> PurePath: ...

    def stat(self) -> Any: ...

    def resolve(self) -> Any: ...

    def __truediv__(self, other: str, /) -> Any: ...

    def __lt__(self, other: Any, /) -> bool: ...

    def __hash__(self) -> int: ...


@runtime_checkable
class Source(Protocol):
    """A log of impressions with its user and item tables, whatever their format.

    Attributes:
        root: the folder or address that `--data` names.
    """

    @property
    def root(self) -> Place: ...

    def days(self) -> list[date]:
        """Days present in the log, ascending."""

    def has_day(self, day: date) -> bool:
        """Whether a day is present in the log."""

    def with_log(self, log: Log, past_columns: Collection[str] = ()) -> Source:
        """The same files read by other settings.

        Args:
            past_columns: of the user and item tables, as log.items.price; null where the files do
                not have them.
        """

    def actions(self, name: str) -> Source:
        """The stream of an action, whose rows have the canonical columns of user, item and time."""

    def pinned(self) -> Source:
        """The same log with its tables at their present versions, which later commits leave."""

    def versions(self) -> dict[str, str]:
        """Setting (log, log.users) → version of the Delta or Iceberg table that it names."""

    @property
    def undivided(self) -> bool:
        """Whether there are no folders of days, so that a day without rows is no missing one."""

    def sizes(self, day: date) -> list[FileSize]:
        """Size and time of each file that the day's rows are read from."""

    def state(self, day: date) -> list[str]:
        """Name and content's hash of each file that the day's rows are read from."""

    def tables_state(self, day: date) -> list[str]:
        """The same for the user and item tables as of D, including how they are read."""

    def scan_day(self, day: date, used: Collection[str] | None = None) -> pl.LazyFrame:
        """One day's rows in canonical columns, unchecked. Raises ProjectError.

        Args:
            used: columns beside the canonical ones; None for all.
        """

    def columns(self, day: date) -> list[str]:
        """The log's own columns on a day, for messages."""

    def table(self, which: str, day: date) -> pl.LazyFrame | None:
        """The "users" or "items" table keyed by `user_id` or `item_id`, or None.

        Args:
            day: D, at whose start the values are known; a table without dates has others on no day.
        """

    def snapshots(self, which: str) -> list[date]:
        """Days of which there are snapshots of a table, ascending; empty for one without."""


class NoSource:
    """Placeholder for the log in commands that read only published partitions."""

    def with_log(self, log: Log, past_columns: Collection[str] = ()) -> NoSource:
        return self

    def pinned(self) -> NoSource:
        return self

    def __getattr__(self, name: str) -> Any:
        raise ProjectError("this command reads no log; it was started without --data")


@dataclass(frozen=True)
class Context:
    """A project with its log and its workspace.

    Attributes:
        sql: template name → text of a saved model's features; None for those of this version.
        aggregates_in, examples_in: folders of the workspace in which a saved model's aggregates
            and examples lie, where they differ from those of the project file; "" otherwise.
        past_actions: actions that only a saved model reads, not the project file; on days that
            their streams do not have they have no rows.
    """

    project: Project
    source: Source
    workspace: Workspace
    sql: Mapping[str, str] | None = None
    aggregates_in: str = ""
    examples_in: str = ""
    past_actions: frozenset[str] = frozenset()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Prefect describes a flow's parameters with pydantic; a context is passed unchanged."""
        return core_schema.any_schema()

    def pinned(self) -> Context:
        """The context with its tables at their present versions (`Source.pinned`)."""
        return replace(self, source=self.source.pinned())

    @property
    def log_path(self) -> Place:
        """Path of the log, for messages."""
        return self.source.root / self.project.log.path

    def last_day(self) -> date:
        """The log's last day. Raises ProjectError for an empty log."""
        days = self.source.days()
        if not days:
            raise ProjectError(f"{self.log_path}: the log holds no day")
        return days[-1]


def without_log(project: Project, workspace: Workspace) -> Context:
    """A context for steps that read only published partitions."""
    return Context(project, NoSource(), workspace)
