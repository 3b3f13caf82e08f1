"""Long lists of slow cases, of which a run has a part."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import date
from typing import TypeVar

Case = TypeVar("Case")

PARTS = 4  # of long lists of expensive cases: all of them are run within four days


def of_today(cases: Iterable[Case], parts: int = 2, today: date | None = None) -> list[Case]:
    """Each `parts`-th case, the others on the days that follow.

    All of them with MTL_RANKER_ALL_CASES=1.
    """
    found = list(cases)
    if os.environ.get("MTL_RANKER_ALL_CASES") == "1":
        return found
    return found[(today or date.today()).toordinal() % parts :: parts]
