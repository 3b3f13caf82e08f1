"""How many experts? MMoE with 1 to 16 experts, at equal width and at equal total units.

`n x h` is n experts of h units. One expert is a shared bottom; the reference is the first. Beside
quality: the effective number of experts a row, the similarity of the two most similar experts, and
the number of warnings.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.variants import (
    CONSOLE,
    Benchmark,
    Compared,
    Variant,
    columns_of,
    options,
    run,
    significant,
)


def sizes(chosen: argparse.Namespace) -> list[Variant]:
    found = [(n, chosen.units) for n in chosen.experts]
    found += [(n, max(1, chosen.total // n)) for n in chosen.experts]
    return [
        Variant(f"{n} x {h}", {"preset": "mmoe", "experts": n, "expert_hidden": [h]})
        for n, h in dict.fromkeys(found)
    ]


def look(found: Compared) -> dict[str, dict[str, float | None]]:
    """What each variant's experts do, printed and as figures."""
    made: dict[str, dict[str, float | None]] = {}
    table = Table(title=f"{found.data}: what the experts do")
    for heading in (
        "experts",
        "effective experts",
        "gate information",
        "most alike (CKA)",
        "warnings",
    ):
        table.add_column(heading, justify="left" if heading == "experts" else "right")
    for name, runs in found.runs.items():
        layers = [r.diagnosis.layers[-1] for r in runs]
        apart = [m.similarity[np.triu_indices(m.experts, 1)] for m in layers]
        alike = float(np.mean([a.max() for a in apart])) if len(apart[0]) else None
        gated = alike is not None  # a single expert has no gate
        made[name] = {
            "effective_experts": float(np.mean([m.effective_experts.mean() for m in layers]))
            if gated
            else None,
            "gate_information": float(np.mean([m.gate_information.mean() for m in layers]))
            if gated
            else None,
            "most_alike": alike,
            "warned": sum(len(r.diagnosis.warnings) for r in runs),
        }
        table.add_row(
            name,
            number(made[name]["effective_experts"]),
            number(made[name]["gate_information"], 3),
            number(alike),
            str(made[name]["warned"]),
        )
    CONSOLE.print(table)
    return made


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    found = options(__doc__, "experts.png")
    found.add_argument("--experts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    found.add_argument("--units", type=int, default=64, help="of each expert at equal width")
    found.add_argument("--total", type=int, default=128, help="of all experts together")
    run(found, sizes, Benchmark("number and width of experts", look=look))


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    more = {
        "experts a row": lambda model: number(model["effective_experts"]),
        "CKA": lambda model: number(model["most_alike"]),
        "warnings": lambda model: str(model["warned"]),
    }
    return {"experts": columns_of(figures, more)}


def summary(figures: Mapping[str, Any]) -> str:
    return significant(figures)


if __name__ == "__main__":
    main()
