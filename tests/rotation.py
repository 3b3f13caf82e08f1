"""Long lists of slow cases, of which a run has every other one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import date
from typing import TypeVar

Case = TypeVar("Case")


def of_today(cases: Iterable[Case]) -> list[Case]:
    """Every other case, the others on the next day; all of them with MTL_RANKER_ALL_CASES=1."""
    found = list(cases)
    if os.environ.get("MTL_RANKER_ALL_CASES") == "1":
        return found
    return found[date.today().toordinal() % 2 :: 2]
