"""The suite's trainings side by side against one after the other, and that the results agree."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE
from benchmarks.prepared import TITLES, folders, parser, preset_of, real_examples
from mtl_ranker.nightly.suite import train_all
from mtl_ranker.training.specs import model_specs


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--epochs", type=int, default=0, help="0 = the preset's")
    chosen = results.parse(options)
    cores = chosen.threads or torch.get_num_threads()
    figures: dict[str, Any] = {}
    for folder in folders(chosen.data):
        project, parts = real_examples(folder)
        ways = {
            "one after the other, all threads": {"jobs": 1, "threads": cores},
            "one after the other, one thread": {"jobs": 1, "threads": 1},
            "side by side, one thread each": {"jobs": cores, "threads": 1},
        }
        found: dict[str, Any] = {}
        predictions = {}
        for name, how in ways.items():
            update = how | {"seeds": list(range(chosen.seeds))}
            update |= {"epochs": chosen.epochs} if chosen.epochs else {}
            training = project.training.model_copy(update=update)
            own = project.model_copy(update={"training": training})
            began = time.perf_counter()
            runs = train_all(own, parts)
            found[name] = {"seconds": time.perf_counter() - began, "trainings": len(runs)}
            predictions[name] = np.stack([run.test_prediction for run in runs])
        best = min(v["seconds"] for k, v in found.items() if k.startswith("one"))
        table = Table(title=f"{preset_of(folder)}: {len(model_specs(project))} models")
        for heading in ("how", "trainings", "seconds", "throughput"):
            table.add_column(heading, justify="left" if heading == "how" else "right")
        for name, values in found.items():
            values["ratio"] = best / values["seconds"]
            row = f"{values['trainings']}", f"{values['seconds']:.1f}", f"{values['ratio']:.2f}x"
            table.add_row(name, *row)
        CONSOLE.print(table)
        names = list(ways)
        same = np.array_equal(predictions[names[1]], predictions[names[2]])
        CONSOLE.print(f"{cores} cores; with one thread each the predictions are equal: {same}")
        figures[preset_of(folder)] = {"ways": found, "cores": cores, "equal": bool(same)}
    results.write(chosen, figures)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Seconds of each way; side by side also over the best of the others."""
    rows, ways = [], list(next(iter(figures.values()))["ways"])
    for data, each in figures.items():
        cells = [f"{found['seconds']:.1f} s" for found in each["ways"].values()]
        cells[-1] += f": {each['ways'][ways[-1]]['ratio']:.2f} times the best of the others"
        rows.append([TITLES[data], *cells])
    return {"suite_speed": markdown.table(["", *ways], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    ratios = [
        f"{list(e['ways'].values())[-1]['ratio']:.2f} times on {TITLES[d]}"
        for d, e in figures.items()
    ]
    return f"side by side over one after the other: {', '.join(ratios)}"


if __name__ == "__main__":
    main()
