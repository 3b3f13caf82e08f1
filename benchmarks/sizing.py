"""What a night of so many impressions a day would take, computed from measured rates.

Reads the figures that `scale.py --json` wrote and assumes that days, user ranges and ranks share
the work evenly: time falls with the cores, and nothing else is in the way. An estimate, not a
measurement: beyond the machine that was measured, networks and shared disks come on top.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measured import CONSOLE
from rich.table import Table

from mtl_ranker.workspace import write_json


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("figures", type=Path, help="written by scale.py --json")
    options.add_argument("--impressions", type=float, default=1e9, help="a day")
    options.add_argument("--candidates", type=float, default=5e9, help="a day")
    options.add_argument("--train-days", type=int, default=7)
    options.add_argument("--negative-keep", type=float, default=0.1, help="training.negative_keep")
    options.add_argument("--machines", type=int, default=8)
    options.add_argument("--cores", type=int, default=32, help="of each machine")
    options.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = options.parse_args()
    sizes = json.loads(chosen.figures.read_text("utf-8"))
    size = max(sizes, key=int)
    found: dict[str, Any] = sizes[size]
    cores = found["limits"]["threads"]
    share = chosen.machines * chosen.cores / cores
    rows = {
        "ingest": chosen.impressions,
        "aggregates": chosen.impressions,
        "features": chosen.impressions,
        "encoding": chosen.impressions * chosen.train_days * chosen.negative_keep,
        "training": chosen.impressions * chosen.train_days * chosen.negative_keep,
        "scoring": chosen.candidates,
    }
    table = Table(
        title=f"{chosen.impressions:,.0f} impressions and {chosen.candidates:,.0f} candidates a day"
    )
    there = f"on {chosen.machines} x {chosen.cores} cores"
    for heading in ("stage", "rows", "rows/s measured", f"hours on {cores} cores", f"min {there}"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    result = {}
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
    write_json(chosen.json, result)


if __name__ == "__main__":
    main()
