"""The one exception a user's mistake may raise; printed without a stack trace."""


class ProjectError(Exception):
    """Something the user can mend: a setting, a file, a column, a day.

    The message names the place (file, key, column or row), what was found, and what is allowed.
    """
