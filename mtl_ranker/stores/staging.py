"""Temporary files below a folder, which are moved into place when they are complete."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from pathlib import Path

ABANDONED = 7 * 86_400.0  # seconds


def staging_path(root: Path) -> Path:
    """A new path for a temporary file or folder, named after this host and process."""
    folder = root / ".staging"
    _clean(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"


def age(path: Path) -> float:
    """Seconds since the file was written; 0 if it has been removed."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _clean(folder: Path) -> None:
    """Remove temporary files and folders of killed runs.

    Files of this host's living processes are kept. Other hosts may share this folder: their
    files are kept for a week.
    """
    for file in folder.glob("*-*-*") if folder.is_dir() else []:
        host, pid, _ = file.name.rsplit("-", 2)
        here = host == socket.gethostname()
        if not _alive(int(pid)) if here else age(file) > ABANDONED:
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True
