"""The one exception for mistakes in settings and data; printed without a stack trace."""


class ProjectError(Exception):
    """Something the user can fix: a setting, a file, a column, a day.

    The message names the place (file, key, column or row), what was found, and what is allowed.
    """
