"""Figures as Markdown: tables and their cells."""

from __future__ import annotations

from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; an empty cell is one space wide."""
    lines = [headings, ["---"] * len(headings), *rows]
    for row in lines:
        if len(row) != len(headings):
            raise ValueError(f"{len(headings)} headings, but a row of {len(row)} cells: {row}")
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def gain(value: float, low: float, high: float, verdict: int) -> str:
    """A difference with its interval, bold where its verdict (`intervals.Judged`) is not 0."""
    text = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"**{text}**" if verdict else text


def times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def span(values: Sequence[float], form: str = ",.0f") -> str:
    """`33 to 54`, or one number where both ends read the same."""
    low, high = (f"{end:{form}}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
