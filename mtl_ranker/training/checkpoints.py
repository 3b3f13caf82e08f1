"""A training that was killed goes on where it was, bit for bit.

A checkpoint holds everything that decides the rest: weights, optimiser, balancing, the best weights
so far, the random state, and how many batches of the epoch are done.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Checkpoint:
    """Where and how often one training is saved.

    Args:
        path: of the file; written aside, then renamed.
        key: what decides the training (`workspace.fingerprint` of settings and rows); a file with
            another key is of another training and is ignored.
        seconds: at least so long between two files.
    """

    path: Path
    key: str
    seconds: float = 60.0
    _last: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None."""
        if not self.path.is_file():
            return None
        state = torch.load(self.path, weights_only=True)
        return state if state["key"] == self.key else None

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.seconds

    def save(self, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}")
        torch.save(state | {"key": self.key}, temporary)
        os.replace(temporary, self.path)
        self._last = time.monotonic()
