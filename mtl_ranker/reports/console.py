"""The terminal: one console, and one kind of progress bar."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Without a terminal (cron, a container's log) rich would wrap lines at 80 columns.
console = Console(width=None if sys.stdout.isatty() else 140)


def progress_bar(*columns: Any, **options: Any) -> Progress:
    """A progress bar on the console.

    Without `columns` it shows description, count, elapsed and remaining time.
    """
    default = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*(columns or default), console=console, **options)
