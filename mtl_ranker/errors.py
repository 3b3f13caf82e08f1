"""Mistakes in settings and data, and errors that come from outside the program.

Both are printed as a sentence without a stack trace.
"""


class ProjectError(Exception):
    """Something the user can fix: a setting, a file, a column, a day.

    The message names the place (file, key, column or row), what was found, and what is allowed.
    """


# Packages whose errors come from a server or a database.
REMOTE = {"mlflow", "sqlalchemy", "sqlite3", "requests", "urllib3", "httpx"}


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 day`, `1,200 days`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def is_outside(error: BaseException) -> bool:
    """Whether an error comes from a disk, a server or a database."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in REMOTE


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
