"""What `mtl-ranker blend` prints of a search."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from mtl_ranker.commands.blend import blend_table
from mtl_ranker.evaluation.pareto import Point
from mtl_ranker.nightly.blend_search import Blend


def point(engagement: float, satisfaction: float, weight: float = 1.0) -> Point:
    return Point({"click": weight, "like": 1.0}, engagement, satisfaction, True)


BLEND = Blend(
    how="weighted_sum",
    points=[point(0.7, 0.3), point(0.7, 0.3, 2.0), point(0.6, 0.4), point(0.60001, 0.4, 3.0)],
    current=point(0.6, 0.4),
    proposed=point(0.7, 0.3),
    current_on_test=point(0.6, 0.4),
    proposed_on_test=point(0.59, 0.39),
    test_days="2026-03-09",
)


def printed(blend: Blend) -> str:
    console = Console(width=150)
    with console.capture() as capture:
        console.print(blend_table(blend, "50% satisfaction"))
    return capture.get()


def test_the_table_names_the_test_days_and_repeats_no_point_of_the_front():
    text = printed(BLEND)
    assert "test days 2026-03-09: chosen on half of the users" in text
    assert sum(" front " in line for line in text.splitlines()[3:]) == 2


def test_a_proposal_is_worse_if_it_is_so_for_both_groups():
    assert BLEND.worse_on_test
    assert not replace(BLEND, proposed_on_test=point(0.59, 0.41)).worse_on_test
    assert not replace(BLEND, proposed_on_test=point(0.6, 0.4)).worse_on_test
