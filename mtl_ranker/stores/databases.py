"""SQLite databases of Prefect and MLflow: their schema is made once, and copied from then on.

Both packages make a new database by all migrations since their first release, which takes seconds.
A template of it is kept in the user's cache folder, by the package's version.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from mtl_ranker.stores.staging import staging_path

LOG = logging.getLogger(__name__)


def template_of(package: str) -> Path:
    """Where the template of the installed version of a package is: $XDG_CACHE_HOME/mtl_ranker."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "mtl_ranker" / f"{package}-{version(package)}.db"


def copy_template(package: str, database: Path) -> bool:
    """Make a database by copying the template; False where there is none, or a damaged one."""
    template = template_of(package)
    if not template.is_file() or not _is_whole(template):
        return False
    temporary = staging_path(database.parent)
    shutil.copyfile(template, temporary)
    os.replace(temporary, database)
    return True


def _is_whole(database: Path) -> bool:
    """Whether SQLite can read all of a database that has a table."""
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
            tables = opened.execute("select count(*) from sqlite_master").fetchone()
            return tables != (0,) and opened.execute("pragma quick_check").fetchone() == ("ok",)
    except sqlite3.DatabaseError:
        return False


def keep_template(package: str, database: Path) -> None:
    """Keep a copy of a database that holds nothing but its schema.

    The database may be in use. A cache folder that cannot be written only costs time, so that is
    logged at level INFO.
    """
    target = template_of(package)
    try:
        temporary = staging_path(target.parent)
        with closing(sqlite3.connect(database)) as source:
            source.execute("vacuum into ?", (str(temporary),))
        os.replace(temporary, target)
    except (OSError, sqlite3.Error) as error:
        LOG.info("%s: the schema of %s is not kept there (%s)", target, package, error)
