"""What a night of so many impressions a day would take, computed from measured rates.

Reads the figures that `benchmarks.scale` wrote with --save or --json, and assumes that days, user
ranges and ranks share the work evenly: time falls with the cores, and nothing else is in the way.
An estimate, not a measurement: beyond the machine that was measured, networks and shared disks come
on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE

STAGES = ("ingest", "aggregates", "features", "encoding", "training", "scoring")


def main() -> None:
    options = results.parser(__doc__)
    saved = results.FOLDER / "scale.json"
    options.add_argument(
        "figures", type=Path, nargs="?", default=saved, help="of benchmarks.scale; default: saved"
    )
    options.add_argument("--impressions", type=float, default=1e9, help="a day")
    options.add_argument("--candidates", type=float, default=5e9, help="a day")
    options.add_argument("--train-days", type=int, default=7)
    options.add_argument("--negative-keep", type=float, default=0.1, help="training.negative_keep")
    options.add_argument("--machines", type=int, default=8)
    options.add_argument("--cores", type=int, default=32, help="of each machine")
    chosen = results.parse(options)
    sizes = results.read(chosen.figures)
    size = max(sizes, key=int)
    found: dict[str, Any] = sizes[size]
    cores = found["limits"]["threads"]
    share = chosen.machines * chosen.cores / cores
    trained = chosen.impressions * chosen.train_days * chosen.negative_keep
    counts = (*[chosen.impressions] * 3, trained, trained, chosen.candidates)
    rows = dict(zip(STAGES, counts, strict=True))
    table = Table(
        title=f"{chosen.impressions:,.0f} impressions and {chosen.candidates:,.0f} candidates a day"
    )
    there = f"on {chosen.machines} x {chosen.cores} cores"
    for heading in ("stage", "rows", "rows/s measured", f"hours on {cores} cores", f"min {there}"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    result: dict[str, Any] = {}
    for stage, count in rows.items():
        rate = found[stage]["rows"] / found[stage]["seconds"]
        hours, minutes = count / rate / 3600, count / rate / 60 / share
        result[stage] = {"rows": count, "rate": rate, "hours": hours, "minutes_there": minutes}
        cells = f"{count:,.0f}", f"{rate:,.0f}", f"{hours:,.1f}", f"{minutes:,.1f}"
        table.add_row(stage, *cells)
    total = sum(each["minutes_there"] for each in result.values())
    table.add_row(
        "sum", "", "", f"{sum(e['hours'] for e in result.values()):,.1f}", f"{total:,.1f}"
    )
    CONSOLE.print(table)
    day = found["ingest"]["mb_written"] * 1e6 / found["ingest"]["rows"]
    example = found["features"]["mb_written"] * 1e6 / found["features"]["rows"]
    CONSOLE.print(
        f"one epoch; {chosen.negative_keep:.0%} of all-negative rows kept; from {int(size):,} "
        f"simulated impressions. Disk: events {day:.0f} bytes a row, examples {example:.0f}: "
        f"{chosen.impressions * day / 1e9:,.0f} and {chosen.impressions * example / 1e9:,.0f} GB "
        "a day"
    )
    result["bytes_per_event"], result["bytes_per_example"] = day, example
    result["setting"] = {"cores_measured": cores, "there": f"{chosen.machines} × {chosen.cores}"}
    results.write(chosen, result)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    cores, there = figures["setting"]["cores_measured"], figures["setting"]["there"]
    stages = {name: figures[name] for name in STAGES}
    rows = [
        [
            name,
            f"{each['rows']:,.0f}",
            f"{each['rate']:,.0f}",
            f"{each['hours']:,.1f}",
            f"{each['minutes_there']:,.1f}",
        ]
        for name, each in stages.items()
    ]
    sums = [sum(each[k] for each in stages.values()) for k in ("hours", "minutes_there")]
    rows.append(["sum", "", "", *(f"{value:,.1f}" for value in sums)])
    headings = (
        "stage",
        "rows",
        f"rows/s on {cores} cores",
        f"hours on {cores} cores",
        f"minutes on {there} cores",
    )
    return {"sizing": markdown.table(headings, rows)}


def summary(figures: Mapping[str, Any]) -> str:
    minutes = sum(figures[name]["minutes_there"] for name in STAGES)
    return f"computed: {minutes:.1f} minutes on {figures['setting']['there']} cores"


if __name__ == "__main__":
    main()
