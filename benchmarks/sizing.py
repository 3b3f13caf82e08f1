"""What a night of so many impressions a day would take, computed from measured rates.

Reads the figures that `benchmarks.scale` wrote with --save or --json, and assumes that days, user
ranges and ranks share the work evenly: time falls with the cores, and nothing else is in the way. A
day's events and aggregates are built on one machine. Training is one epoch of one model.
A continued training (`training.start`) reads one new day with a replay of older rows; its quality
and seconds beside a full one are measured by `benchmarks.incremental`. An estimate, not a
measurement: beyond the machine that was measured, networks and shared disks come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE

STAGES = ("ingest", "aggregates", "features", "encoding", "training", "scoring")
ONE_MACHINE = ("ingest", "aggregates")  # of the stages
CONTINUED = {"encoding": "encoding, continued", "training": "training, continued"}
SUMS = {
    "sum, full training": STAGES,
    "sum, continued": tuple(CONTINUED.get(stage, stage) for stage in STAGES),
}


def main() -> None:
    options = results.parser(__doc__)
    saved = results.FOLDER / "scale.json"
    options.add_argument(
        "figures", type=Path, nargs="?", default=saved, help="of benchmarks.scale; default: saved"
    )
    options.add_argument("--impressions", type=float, default=1e9, help="a day")
    options.add_argument("--candidates", type=float, default=5e9, help="a day")
    options.add_argument("--train-days", type=int, default=7)
    options.add_argument("--replay", type=float, default=1.0, help="training.replay")
    options.add_argument("--negative-keep", type=float, default=0.1, help="training.negative_keep")
    options.add_argument(
        "--positive", type=float, default=0.25, help="share of rows with a positive label, all kept"
    )
    options.add_argument("--machines", type=int, default=8)
    options.add_argument("--cores", type=int, default=32, help="of each machine")
    chosen = results.parse(options)
    sizes = results.read(chosen.figures)
    size = max(sizes, key=int)
    found: dict[str, Any] = sizes[size]
    cores = found["limits"]["threads"]
    kept = chosen.impressions * (chosen.positive + (1 - chosen.positive) * chosen.negative_keep)
    trained, continued = kept * chosen.train_days, kept * (1 + chosen.replay)
    counts = (*[chosen.impressions] * 3, trained, trained, chosen.candidates)
    rows = dict(zip(STAGES, counts, strict=True))
    rows |= dict.fromkeys(CONTINUED.values(), continued)
    result: dict[str, Any] = {}
    for stage, count in rows.items():
        measured = found[stage.partition(",")[0]]
        rate = measured["rows"] / measured["seconds"]
        machines = 1 if stage in ONE_MACHINE else chosen.machines
        hours, minutes = count / rate / 3600, count / rate / 60 * cores / (machines * chosen.cores)
        result[stage] = {"rows": count, "rate": rate, "hours": hours, "minutes_there": minutes}
    result["setting"] = {"cores_measured": cores, "there": f"{chosen.machines} × {chosen.cores}"}
    table = Table(
        title=f"{chosen.impressions:,.0f} impressions and {chosen.candidates:,.0f} candidates a day"
    )
    for heading in _headings(result):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in _rows(result):
        table.add_row(*row)
    CONSOLE.print(table)
    day = found["ingest"]["mb_written"] * 1e6 / found["ingest"]["rows"]
    example = found["features"]["mb_written"] * 1e6 / found["features"]["rows"]
    CONSOLE.print(
        f"one epoch; {chosen.positive:.0%} of rows with a positive label, "
        f"{chosen.negative_keep:.0%} of the others kept; from {int(size):,} "
        f"simulated impressions. Disk: events {day:.0f} bytes a row, examples {example:.0f}: "
        f"{chosen.impressions * day / 1e9:,.0f} and {chosen.impressions * example / 1e9:,.0f} GB "
        "a day"
    )
    result["bytes_per_event"], result["bytes_per_example"] = day, example
    results.write(chosen, result)


def _headings(figures: Mapping[str, Any]) -> list[str]:
    cores, there = figures["setting"]["cores_measured"], figures["setting"]["there"]
    hours, minutes = f"hours on {cores} cores", f"minutes on {there} cores"
    return ["stage", "rows", f"rows/s on {cores} cores", hours, minutes]


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for stage in (*STAGES, *CONTINUED.values()):
        each = figures[stage]
        rates = f"{each['rows']:,.0f}", f"{each['rate']:,.0f}"
        rows.append([stage, *rates, f"{each['hours']:,.1f}", f"{each['minutes_there']:,.1f}"])
    for name, stages in SUMS.items():
        sums = [_sum(figures, stages, k) for k in ("hours", "minutes_there")]
        rows.append([name, "", "", *(f"{value:,.1f}" for value in sums)])
    return rows


def _sum(figures: Mapping[str, Any], stages: Sequence[str], key: str) -> float:
    return sum(figures[stage][key] for stage in stages)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    return {"sizing": markdown.table(_headings(figures), _rows(figures))}


def summary(figures: Mapping[str, Any]) -> str:
    full, continued = (_sum(figures, stages, "minutes_there") for stages in SUMS.values())
    there = figures["setting"]["there"]
    return f"computed: {full:.1f} minutes on {there} cores, {continued:.1f} continued"


if __name__ == "__main__":
    main()
