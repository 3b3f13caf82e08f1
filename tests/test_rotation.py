"""No case is left out for longer than a few days."""

from __future__ import annotations

from datetime import date, timedelta

import pytest

from tests.rotation import PARTS, of_today


@pytest.mark.parametrize("parts", [2, PARTS])
def test_as_many_days_as_there_are_parts_have_every_case_once(monkeypatch, parts):
    monkeypatch.delenv("MTL_RANKER_ALL_CASES", raising=False)
    days = [date(2026, 2, 27) + timedelta(days=n) for n in range(parts)]
    assert sorted(case for day in days for case in of_today(range(23), parts, day)) == [*range(23)]
    monkeypatch.setenv("MTL_RANKER_ALL_CASES", "1")
    assert of_today(range(23), parts) == [*range(23)]
